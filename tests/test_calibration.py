"""Calibration text: each source, what is kept, and overlap with the text that is measured on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from _hub_server import COMMIT, Hub, serve
from _models import GROUPED, write_model

from phi3edge import calibration, generation
from phi3edge.cache import cache_dir
from phi3edge.calibration import CalibrationText, calibration_text, refuse_overlap
from phi3edge.checkpoint import open_checkpoint
from phi3edge.errors import OutputError, UsageError
from phi3edge.families import parse_config
from phi3edge.prompts import PROMPTS
from phi3edge.reference import load_tokenizer
from phi3edge.text import Text, default_text
from phi3edge.types import ModelSpec

PROSE = " ".join(f"The {n}th sentence says that {n * n} is the square of {n}." for n in range(400))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("calibration") / "model", GROUPED)


@pytest.fixture(scope="module")
def spec(model: Path) -> ModelSpec:
    return _spec(model)


def _spec(folder: Path) -> ModelSpec:
    with open_checkpoint(folder) as checkpoint:
        return parse_config(checkpoint.config, checkpoint.generation_config, "tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path / "cache"))
    return cache_dir() / "calibration"


def test_what_the_model_writes_is_half_chat_and_half_free(model: Path, spec: ModelSpec, cache: Path) -> None:
    text = calibration_text("self", model, spec, 6, 300)
    assert text.ids.shape == (6, 300)
    assert text.ids.dtype == np.int64
    assert text.ids.min() >= 0
    assert text.ids.max() < spec.vocab_size
    assert text.name == "written by the model itself, seed 0"
    tokenizer = load_tokenizer(model)
    chats = tokenizer.batch_decode(text.ids[::2])
    for chat in chats:
        assert any(chat.startswith(f"<|user|>\n{prompt}<|end|>\n<|assistant|>\n") for prompt in PROMPTS)
    assert len({chat[:100] for chat in chats}) == 3
    for free in tokenizer.batch_decode(text.ids[1::2]):
        assert free[0] == " "
        assert free[1].isalpha()


def test_the_second_span_of_a_sequence_begins_anew(model: Path, spec: ModelSpec, cache: Path) -> None:
    text = calibration_text("self", model, spec, 2, 300)  # two spans of 150
    second = load_tokenizer(model).decode(text.ids[0, 150:])
    assert any(second.startswith(f"<|user|>\n{prompt[:40]}") for prompt in PROMPTS)


def test_a_model_without_chat_template_goes_on_from_the_bare_prompts(spec: ModelSpec, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", GROUPED)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    text = load_tokenizer(folder).decode(calibration_text("self", folder, spec, 2, 200).ids[0])
    assert any(text.startswith(f"{prompt}\n\n") for prompt in PROMPTS)


def test_what_the_model_wrote_is_kept(
    model: Path, spec: ModelSpec, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = calibration_text("self", model, spec, 2, 32)
    other = calibration_text("self", model, spec, 2, 32, seed=1)
    assert first.sha256 != other.sha256
    [kept, _] = cache.iterdir()
    monkeypatch.setattr(generation, "generate", None)
    monkeypatch.setattr("phi3edge.reference.load_tokenizer", None)
    again = calibration_text("self", model, spec, 2, 32)
    assert (again.ids == first.ids).all()
    assert again.sha256 == first.sha256
    assert kept.suffix == ".npy"


def test_another_model_and_another_template_write_another_text(spec: ModelSpec, tmp_path: Path, cache: Path) -> None:
    folders = [write_model(tmp_path / f"model-{seed}", GROUPED, seed=seed) for seed in (1, 2)]
    texts = [calibration_text("self", folder, spec, 2, 32) for folder in folders]
    config = json.loads((folders[0] / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0]['content'] }}<|assistant|>"
    (folders[0] / "tokenizer_config.json").write_text(json.dumps(config))
    texts.append(calibration_text("self", folders[0], spec, 2, 32))
    assert len({text.sha256 for text in texts}) == 3
    assert len(list(cache.iterdir())) == 3


def test_an_interrupted_model_leaves_nothing(
    model: Path, spec: ModelSpec, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibration_text("self", model, spec, 2, 16)
    assert list(cache.iterdir()) == []
    assert calibration_text("self", model, spec, 2, 16).ids.shape == (2, 16)


def test_a_cache_that_cannot_be_made(
    model: Path, spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot keep the calibration text") as error:
        calibration_text("self", model, spec, 2, 16)
    assert "PHI3EDGE_CACHE" in error.value.hint


def test_python_documentation_that_validation_does_not_score_on(demo: Path) -> None:
    spec, tokenizer = _spec(demo), load_tokenizer(demo)
    text = calibration_text("python", demo, spec, 48, 512)
    assert text.ids.shape == (48, 512)
    assert len({tuple(row) for row in text.ids.tolist()}) == 48
    read = "".join(tokenizer.decode(row) for row in text.ids)
    letters = sum(c.isalpha() or c.isspace() for c in read) / len(read)
    assert letters > 0.85  # prose rather than examples
    assert text.name.startswith("python-3")
    scored = np.array([tokenizer(default_text().text)["input_ids"]])
    refuse_overlap(text, scored, "the default text")


@pytest.fixture
def little_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small models' tokenizer makes a million ids of the default text: seconds."""
    monkeypatch.setattr(calibration, "default_text", lambda: Text("little", PROSE, ""))


def test_half_of_each(model: Path, spec: ModelSpec, cache: Path, little_scored: None) -> None:
    text = calibration_text("self+python", model, spec, 5, 32)
    own, python = calibration_text("self", model, spec, 3, 32), calibration_text("python", model, spec, 2, 32)
    assert (text.ids == np.concatenate([own.ids, python.ids])).all()
    assert own.name in text.name
    assert python.name in text.name


def test_without_a_wish_the_default_is_taken(model: Path, spec: ModelSpec, cache: Path, little_scored: None) -> None:
    default = calibration_text(None, model, spec, 4, 32)
    assert default.sha256 == calibration_text(calibration.DEFAULT, model, spec, 4, 32).sha256


def test_a_file_is_read_evenly(model: Path, spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "squares.txt"
    path.write_text(PROSE)
    text = calibration_text(str(path), model, spec, 10, 40)
    assert (text.name, text.note) == ("squares.txt", None)
    tokenizer = load_tokenizer(model)
    rows = [tokenizer.decode(row) for row in text.ids]
    places = [PROSE.index(row) for row in rows]
    assert places[0] == 0
    assert places[-1] + len(rows[-1]) == len(PROSE)
    steps = np.diff(places)
    assert steps.min() > 0.8 * steps.max()


def test_a_short_file_gives_fewer_sequences(model: Path, spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(PROSE[:800])
    ids = load_tokenizer(model)(PROSE[:800])["input_ids"]
    tokens = len(ids) // 9
    text = calibration_text(str(path), model, spec, 32, tokens)
    assert text.ids.shape == (9, tokens)
    assert text.note == f"short.txt has {len(ids)} tokens: 9 sequences of {tokens} instead of 32"
    with pytest.raises(UsageError, match=rf"short.txt has {len(ids)} tokens; 8 sequences of 200 need 1600"):
        calibration_text(str(path), model, spec, 32, 200)


def test_what_cannot_be_read(model: Path, spec: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no calibration text 'selv'") as error:
        calibration_text("selv", model, spec, 8, 32)
    assert error.value.hint.startswith("did you mean 'self'?")
    (tmp_path / "latin").write_bytes(b"na\xefve")
    with pytest.raises(UsageError, match="not UTF-8"):
        calibration_text(str(tmp_path / "latin"), model, spec, 8, 32)
    with pytest.raises(UsageError, match="1024 tokens a sequence are more than the model's context of 512"):
        calibration_text("python", model, spec, 8, 1024)
    with pytest.raises(UsageError, match="names no file") as error:
        calibration_text("hub:org/data", model, spec, 8, 32)
    assert error.value.hint == "expected hub:ORG/NAME[@REVISION]:FILE"


HUB = """
import json, sys
from pathlib import Path
from phi3edge.calibration import _hub_text
from phi3edge.errors import Phi3EdgeError
found = []
for wanted in sys.argv[1:]:
    try:
        text = _hub_text(wanted)
        found.append([text.name, text.text])
    except Phi3EdgeError as error:
        found.append([type(error).__name__, error.message])
print(json.dumps(found))
"""


def _from_hub(url: str, home: Path, *wanted: str, **more: str) -> list[list[str]]:
    """In a process of its own: huggingface_hub reads HF_* when it is imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": url, "NO_PROXY": "*", "no_proxy": "*"} | more
    done = subprocess.run([sys.executable, "-c", HUB, *wanted], env=kept | settings, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_a_file_of_a_hub_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "parts").mkdir(parents=True)
    (folder / "prose.txt").write_text("Some prose.")
    (folder / "parts" / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "n": 2}\n')
    (folder / "bad.jsonl").write_text('{"content": "one"}\n')
    home = tmp_path / "home"
    with serve(Hub({"org/data": folder})) as hub:
        prose, lines, bad, missing, unknown = _from_hub(
            hub.url,
            home,
            "hub:org/data:prose.txt",
            "hub:org/data@v1:parts/a.jsonl",
            "hub:org/data:bad.jsonl",
            "hub:org/data:none.txt",
            "hub:org/other:prose.txt",
        )
    assert prose == [f"org/data@{COMMIT}:prose.txt", "Some prose."]
    assert lines == [f"org/data@{COMMIT}:parts/a.jsonl", "one\n\ntwo"]
    assert bad == ["UsageError", "bad.jsonl is not lines of JSON objects with a field 'text'"]
    assert missing == ["HubError", "the data set org/data has no file none.txt"]
    assert unknown[0] == "HubError"
    assert "has no data set org/other" in unknown[1]
    kept, gone = _from_hub(hub.url, home, "hub:org/data:prose.txt", "hub:org/data:more.txt", HF_HUB_OFFLINE="1")
    assert kept == prose
    assert gone[0] == "HubError"
    assert "more.txt" in gone[1]


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 30_000, shape)


def test_a_shared_passage_is_found_and_named() -> None:
    evaluation = _random(40, 512)
    text = CalibrationText(_random(6, 512) + 40_000, "notes.txt")
    refuse_overlap(text, evaluation)
    text.ids[3, 100:131] = evaluation[21, 400:431]  # 31 tokens
    refuse_overlap(text, evaluation)
    text.ids[3, 131] = evaluation[21, 431]
    with pytest.raises(UsageError) as error:
        refuse_overlap(text, evaluation, "wiki.test")
    assert error.value.message == (
        "the calibration text (notes.txt) and wiki.test share a passage of 32 tokens: "
        "sequence 4 from token 101, chunk 22 from token 401"
    )


def test_ruled_lines_are_no_passage() -> None:
    evaluation, text = _random(4, 512), CalibrationText(_random(4, 512) + 40_000, "x")
    evaluation[1, 50:120] = text.ids[2, 200:270] = 198
    refuse_overlap(text, evaluation)


def test_the_same_text_with_other_space_before_it_overlaps(model: Path, spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "measured.txt"
    path.write_text(f"\n   {PROSE}")
    text = calibration_text(str(path), model, spec, 20, 64)
    scored = np.array(load_tokenizer(model)(PROSE)["input_ids"])
    with pytest.raises(UsageError, match=r"measured\.txt"):
        refuse_overlap(text, scored[: len(scored) // 128 * 128].reshape(-1, 128))
