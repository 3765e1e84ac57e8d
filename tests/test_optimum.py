"""Our ONNX folders in optimum-onnx, the other door to ONNX Runtime: the same logits, the same greedy text.

optimum-onnx needs transformers 4, so these tests run in an environment of their own: `make test-optimum`. They import
it late, so that other environments can collect this file.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _models import GROUPED, MHA, TIED, Shape, write_model

from phi3edge.build import export
from phi3edge.reference import load_tokenizer

pytestmark = pytest.mark.optimum

SHAPES = {"plain": MHA, "grouped": GROUPED, "tied": replace(TIED, kv_heads=1)}
WINDOW = 40  # tokens that attention looks back: less than there are
IDS = torch.tensor([[(7919 * n + 13) % 300 for n in range(60)]])
PROMPTS = ("The capital of France is", "def fib(n):", "Water boils at")
TOKENS = 20


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(SHAPES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape: Shape = SHAPES[request.param]
    return write_model(tmp_path_factory.mktemp(request.param) / "tiny", shape, sliding_window=WINDOW)


def write(name: str, out: Path, recipe: str) -> Path:
    return export(name, "cpu", recipe=recipe, format_="onnx", out=out).folder


def open_optimum(folder: Path) -> Any:
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTModelForCausalLM

    options = SessionOptions()
    options.intra_op_num_threads = 1  # more would spin, and wait for each other and for torch's on a busy machine
    return ORTModelForCausalLM.from_pretrained(folder, session_options=options)


def open_runner(folder: Path) -> Any:
    from phi3edge.runners import ort_genai

    return ort_genai.open(folder, context=128)


def open_reference(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def logits(model: Any) -> np.ndarray:
    """Logits of IDS in two steps, so that the second reads the KV cache of the first."""
    split = IDS.shape[1] // 2
    with torch.inference_mode():
        first = model(IDS[:, :split], attention_mask=torch.ones(1, split, dtype=torch.int64), use_cache=True)
        mask = torch.ones_like(IDS)
        second = model(IDS[:, split:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits, second.logits], dim=1)[0].numpy()


def greedy(model: Any, ids: torch.Tensor) -> list[int]:
    """Exactly TOKENS more ids."""
    tokens = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **tokens)
    return made[0, ids.shape[1] :].tolist()


def test_a_float_folder_is_the_checkpoint(checkpoint, tmp_path):
    ours, theirs = open_optimum(write(str(checkpoint), tmp_path / "out", "f32")), open_reference(checkpoint)
    np.testing.assert_allclose(logits(ours), logits(theirs), atol=1e-4)
    assert ours.generation_config.eos_token_id == [0, 3]
    for start in range(0, 50, 10):
        answer = greedy(ours, IDS[:, start:])
        assert len(answer) == TOKENS
        assert answer == greedy(theirs, IDS[:, start:])


def test_an_int4_folder_computes_what_the_runner_does(checkpoint, tmp_path):
    folder = write(str(checkpoint), tmp_path / "out", "int4")
    with torch.inference_mode():
        found = open_optimum(folder)(IDS, attention_mask=torch.ones_like(IDS)).logits[0].numpy()
    with open_runner(folder) as runner:
        np.testing.assert_allclose(found, runner.logits(IDS[0].numpy()), atol=1e-4)


def test_the_demo_answers_as_in_the_runner(demo, tmp_path):
    from transformers import AutoTokenizer, pipeline

    folder = write("demo", tmp_path / "out", "int4")
    model, tokenizer, original = open_optimum(folder), AutoTokenizer.from_pretrained(folder), load_tokenizer(demo)
    with open_runner(folder) as runner:
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt")
            assert inputs.input_ids[0].tolist() == (ids := original(prompt).input_ids)
            made = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
            assert made[0].tolist() == ids + runner.generate(ids, TOKENS)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    [said] = pipeline("text-generation", model=model, tokenizer=tokenizer)(chat, max_new_tokens=20, do_sample=False)
    assert "Paris" in said["generated_text"][-1]["content"]
