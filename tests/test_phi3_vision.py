"""Phi-3-vision: its text decoder is read, written and run as the checkpoint means it, and images are said to be out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from _models import EMBEDDING, copy_model
from _prequantized import AWQ, write_prequantized
from _vision import CONTEXT, IMAGE, ORIGINAL, SHAPE, image_tensors, vision_config, write_vision
from safetensors.torch import load_file, save_file

from phi3edge.build import export, prepare
from phi3edge.checkpoint import open_checkpoint
from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.families import parse_config
from phi3edge.proof import Protocol, validate_artifact
from phi3edge.reference import load_model, load_tokenizer
from phi3edge.rounding import Rounding
from phi3edge.runners import llama_cpp, ort_genai
from phi3edge.validate import Windows

LENGTHS = (40, ORIGINAL, ORIGINAL + 1, 400)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_vision(tmp_path_factory.mktemp("model") / "Phi-3-vision-tiny")


def ids(count: int, most: int = 700) -> np.ndarray:
    return np.random.default_rng(0).integers(3, most, count)


def reference(model: Path, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return load_model(model)(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()


def kl(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    p, q = (torch.log_softmax(torch.from_numpy(logits).double(), -1) for logits in (expected, found))
    return (p.exp() * (p - q)).sum(-1).numpy()


def test_it_is_the_text_decoder_and_its_parameters() -> None:
    spec = parse_config(vision_config(), {"eos_token_id": [2, 700]}, "x")
    assert (spec.family, spec.images, spec.eos_token_ids) == ("phi3", "model.vision_embed_tokens.", (2, 700))
    assert spec.rope.long_factors == tuple(vision_config()["rope_scaling"]["long_factor"])
    plain = vision_config(architectures=["Phi3ForCausalLM"], model_type="phi3")
    text = parse_config({key: plain[key] for key in plain if key not in ("embd_layer", "img_processor")}, None, "x")
    assert spec.parameters == text.parameters == sum(t.size for t in text.tensors)
    assert spec.tensors == text.tensors
    assert text.images is None


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"audio_processor": {}}, UnsupportedError, "unknown key 'audio_processor'"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act is 'gelu'"),
        ({"architectures": ["Phi3ForCausalLM"]}, UnsupportedError, "family phi3_v reads"),
        ({"img_processor": "clip"}, CheckpointError, "img_processor is 'clip'; expected an object"),
        ({"model_type": "phi3"}, UnsupportedError, "architectures"),
    ],
    ids=str,
)
def test_what_is_not_known_is_refused_by_name(changes: dict, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        parse_config(vision_config(**changes), None, "x")


def test_tensors_of_images_are_passed_over_and_others_are_not(model: Path, tmp_path: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        checkpoint.check(parse_config(checkpoint.config, checkpoint.generation_config, "x"))
        assert set(image_tensors()) < set(checkpoint.names)
    folder = copy_model(model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.audio_embed_tokens.weight": tensors[EMBEDDING].clone()}, folder / "model.safetensors")
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(CheckpointError, match=r"unknown tensor 'model\.audio_embed_tokens"),
    ):
        checkpoint.check(parse_config(checkpoint.config, None, "x"))


def test_an_onnx_folder_is_the_reference(model: Path, tmp_path: Path) -> None:
    made = export(str(model), "cpu", format_="onnx", recipe="f32", out=tmp_path / "out", context=CONTEXT)
    assert any(note.startswith("Text only") for note in made.notes)
    config = json.loads((made.folder / "config.json").read_text())
    assert config["model_type"] in ("phi3", "llama")
    assert not {"img_processor", "embd_layer", "auto_map"} & set(config)
    with ort_genai.open(made.folder, context=CONTEXT, threads=1) as runner:
        for length in LENGTHS:
            assert kl(reference(model, ids(length)), runner.logits(ids(length))).max() < 1e-6


def test_a_gguf_file_is_the_reference_on_either_side(model: Path, tmp_path: Path) -> None:
    made = export(str(model), "cpu", format_="gguf", recipe="f32", out=tmp_path / "out", context=CONTEXT)
    assert any(note.startswith("Text only") for note in made.notes)
    assert "Text only" in (made.folder / "README.md").read_text()
    for side, lengths in ((ORIGINAL, LENGTHS[:2]), (CONTEXT, LENGTHS[2:])):
        with llama_cpp.open(made.artifact, context=side, threads=1, kv_type="f32", plain=True) as runner:
            for length in lengths:
                assert kl(reference(model, ids(length)), runner.logits(ids(length))).max() < 1e-4


def test_a_chat_of_text_has_the_reference_s_ids(model: Path, tmp_path: Path) -> None:
    """In llama.cpp no token swallows white space, or all do; here <|assistant|> does, <|user|> and <|end|> do not."""
    from gguf import GGUFReader

    tokenizer = load_tokenizer(model)
    chat = [
        {"role": "user", "content": " Hello\nthere "},
        {"role": "assistant", "content": "  Hi.\n"},
        {"role": "user", "content": "What is <|image|>this?"},
    ]
    expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    known = tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert known.count(IMAGE) == 1
    for format_, runtime in (("gguf", llama_cpp), ("onnx", ort_genai)):
        made = export(str(model), "cpu", format_=format_, recipe="f32", out=tmp_path / format_, context=512)
        where = made.artifact if format_ == "gguf" else made.folder
        with runtime.open(where, context=512, threads=1) as runner:
            template = runner.info()["chat_template"]
            ours = runner.chat(chat) or tokenizer.apply_chat_template(
                chat, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            assert runner.tokenize(ours, special=True, bos=False) == known
            if format_ == "gguf":
                name = GGUFReader(made.artifact).fields["general.name"].contents()
                assert "phi-3" not in name.lower()
                assert any("the chat template makes up for <|assistant|>" in note for note in made.notes)
                assert runner.tokenize(expected, special=True, bos=False) != known


@pytest.mark.parametrize(("format_", "recipe", "method"), [("gguf", "q8_0", "rtn"), ("onnx", "int4", "awq+gptq")])
def test_it_is_rounded_like_any_phi3(model: Path, tmp_path: Path, format_: str, recipe: str, method: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Words to calibrate on, and more of them: the parser reads arguments. " * 400)
    rounding = Rounding(method, *(() if method == "rtn" else (str(text), 8)))
    made = export(
        str(model), "cpu", format_=format_, recipe=recipe, out=tmp_path / "out", context=CONTEXT, rounding=rounding
    )
    report, *_ = validate_artifact(made.folder, protocol=Protocol(windows=Windows(1, 64), threads=1, positions=False))
    assert report.metrics["kl_mean"].value < 0.3
    assert any(note.startswith("Text only") for note in made.notes)


def test_the_plan_says_it_before_any_weight_is_read(model: Path) -> None:
    ready = prepare(str(model), "iphone")
    assert any(note.startswith("Text only") for note in ready.notes)
    assert ready.plan.model.vocab_size == SHAPE.vocab


def test_integers_that_a_checkpoint_brings_are_read_as_any_phi3s(tmp_path: Path) -> None:
    text = tmp_path / "text"
    write_prequantized(text, AWQ)
    folder = copy_model(text, tmp_path / "vision")
    config = json.loads((folder / "config.json").read_text())
    images = {key: vision_config()[key] for key in ("img_processor", "embd_layer")}
    changed = {"model_type": "phi3_v", "architectures": ["Phi3VForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | changed | images))
    save_file(load_file(folder / "model.safetensors") | image_tensors(), folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check(parse_config(checkpoint.config, None, "x"))
    np.testing.assert_array_equal(reference(folder, ids(20, 300)), reference(text, ids(20, 300)))
