"""Token ids in llama.cpp, from a GGUF of ours, are those of the tokenizers library on the checkpoint's own file."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _models import MHA, phi3_config
from _tokenizers import (
    ADDED,
    ASSISTANT,
    CHAT,
    END,
    ENDOFTEXT,
    PIECES,
    TEXTS,
    USER,
    write_byte_level,
    write_sentencepiece,
)
from tokenizers import Regex, Tokenizer, pre_tokenizers

from phi3edge import tokenizer
from phi3edge.checkpoint import TOKENIZER_FILES
from phi3edge.emitters import gguf
from phi3edge.errors import CheckpointError, Phi3EdgeError, UnsupportedError
from phi3edge.families import phi3
from phi3edge.gguf_file import write_header
from phi3edge.tokenizer import TokenType, Vocabulary, load_tokenizer
from phi3edge.types import ModelSpec, QuantPlan, Source

VOCAB = PIECES + 20


def spec(name: str = "Phi-3-tiny", eos: tuple[int, ...] = (ENDOFTEXT, ASSISTANT, END)) -> ModelSpec:
    config = phi3_config(MHA, vocab_size=VOCAB, eos_token_id=ENDOFTEXT, pad_token_id=ENDOFTEXT)
    return phi3.parse(config, {"eos_token_id": list(eos)}, name)


class LlamaVocabulary:
    """llama.cpp on a GGUF file without tensors."""

    def __init__(self, model: ModelSpec, vocabulary: Vocabulary, path: Path) -> None:
        llama_cpp = pytest.importorskip("llama_cpp")
        pairs = gguf.metadata(QuantPlan(model, "none", ()), Source(None, None), vocabulary, file_type=None)
        with path.open("wb") as file:
            write_header(file, pairs, [])
        self.llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        self.is_end = llama_cpp.llama_vocab_is_eog
        self.vocab = llama_cpp.llama_model_get_vocab(self.llama._model.model)

    def ids(self, text: str) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=True, special=True)

    def ends(self) -> list[int]:
        return [n for n in range(VOCAB) if self.is_end(self.vocab, n)]


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    write_sentencepiece(folder)
    return folder


def only(folder: Path, target: Path, *names: str) -> Path:
    """A copy of some files of a folder."""
    target.mkdir()
    for name in (*names, "tokenizer_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.mark.parametrize("files", [("tokenizer.model", "tokenizer.json"), ("tokenizer.model",), ("tokenizer.json",)])
def test_sentencepiece_ids(sentencepiece_folder: Path, tmp_path: Path, files: tuple[str, ...]) -> None:
    truth = Tokenizer.from_file(str(sentencepiece_folder / "tokenizer.json"))
    vocabulary = load_tokenizer(only(sentencepiece_folder, tmp_path / "copy", *files), spec())
    llama = LlamaVocabulary(spec(), vocabulary, tmp_path / "vocabulary.gguf")
    assert vocabulary.notes == ()
    for text in TEXTS:
        assert llama.ids(text) == truth.encode(text).ids, text


def test_sentencepiece_spaces_between_words_keep_their_number(sentencepiece_folder: Path, tmp_path: Path) -> None:
    truth = Tokenizer.from_file(str(sentencepiece_folder / "tokenizer.json"))
    vocabulary = load_tokenizer(only(sentencepiece_folder, tmp_path / "copy", "tokenizer.json"), spec())
    llama = LlamaVocabulary(spec(), vocabulary, tmp_path / "vocabulary.gguf")
    for count in range(1, 40):
        text = "a" + " " * count + "b"
        assert llama.ids(text) == truth.encode(text).ids, count


def test_special_tokens_swallow_space_whatever_the_model_is_called(sentencepiece_folder: Path, tmp_path: Path) -> None:
    vocabulary = load_tokenizer(sentencepiece_folder, spec())
    newline = vocabulary.tokens.index("<0x0A>")
    for name in ("Phi-3-mini", "my fine-tune"):
        ids = LlamaVocabulary(spec(name), vocabulary, tmp_path / "vocabulary.gguf").ids(CHAT)
        assert ids[:2] == [1, USER]
        assert ids[-2:] == [END, ASSISTANT]
        assert newline not in ids


def test_special_tokens_keep_space_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    """As Phi-3-vision's: the same tokens without rstrip, and a name that would turn llama.cpp's rule on."""
    write_sentencepiece(tmp_path, rstrip=False)
    truth = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    vocabulary = load_tokenizer(tmp_path, spec("Phi-3-vision"))
    llama = LlamaVocabulary(spec("Phi-3-vision"), vocabulary, tmp_path / "vocabulary.gguf")
    for text in TEXTS:
        assert llama.ids(text) == truth.encode(text).ids, text


def test_every_listed_id_ends_a_generation(sentencepiece_folder: Path, tmp_path: Path) -> None:
    vocabulary = load_tokenizer(sentencepiece_folder, spec())
    ends = LlamaVocabulary(spec(), vocabulary, tmp_path / "vocabulary.gguf").ends()
    assert ends == [2, ENDOFTEXT, ASSISTANT, END]  # </s> by llama.cpp's own choice

    more = spec(eos=(ENDOFTEXT, ASSISTANT, USER, PIECES + 2, END, PIECES + 3))
    llama = LlamaVocabulary(more, vocabulary, tmp_path / "vocabulary.gguf")
    unwritten = [line for line in gguf.notes(more, vocabulary) if "does not stop" in line]
    missing = [n for n in more.eos_token_ids if n not in llama.ends()]
    assert len(missing) == len(unwritten) == 2
    assert all(f"(id {n})" in line for n, line in zip(missing, unwritten, strict=True))


LLAMA3 = pre_tokenizers.Split(Regex(tokenizer.LLAMA3), "isolated")
QWEN2 = pre_tokenizers.Split(Regex(tokenizer.QWEN2), "isolated")
GPT4O = pre_tokenizers.Split(Regex(tokenizer.GPT4O), "removed", invert=True)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("pre", "steps", "ignore_merges"),
    [
        ("gpt-2", [GPT2], False),
        ("smollm", [DIGITS, GPT2], False),
        ("dbrx", [LLAMA3, BYTES], False),
        ("llama-bpe", [LLAMA3, BYTES], True),
        ("qwen2", [QWEN2, BYTES], False),
        ("gpt-4o", [GPT4O, BYTES], False),
    ],
)
def test_byte_level_ids(
    tmp_path: Path, pre: str, steps: list[pre_tokenizers.PreTokenizer], ignore_merges: bool
) -> None:
    write_byte_level(tmp_path, steps, ignore_merges=ignore_merges)
    truth = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model = replace(spec("phi3-demo"), bos_token_id=0, pad_token_id=0, eos_token_ids=(0, 4))
    vocabulary = load_tokenizer(tmp_path, model)
    assert (vocabulary.model, vocabulary.pre, vocabulary.notes) == ("gpt2", pre, ())
    assert vocabulary.special_ids == {"bos": 0, "eos": 4, "pad": 0}
    llama = LlamaVocabulary(model, vocabulary, tmp_path / "vocabulary.gguf")
    for text in TEXTS:
        assert llama.ids(text) == truth.encode(text).ids, text
    assert llama.ends() == [0, 4]


def test_an_unknown_pre_tokenizer_is_refused_by_what_it_does(tmp_path: Path) -> None:
    write_byte_level(tmp_path, [pre_tokenizers.Punctuation(), BYTES])
    with pytest.raises(UnsupportedError, match="Punctuation"):
        load_tokenizer(tmp_path, spec())


def test_tokens_types_and_scores(sentencepiece_folder: Path) -> None:
    vocabulary = load_tokenizer(sentencepiece_folder, spec())
    assert len(vocabulary.tokens) == len(vocabulary.types) == len(vocabulary.scores) == VOCAB
    assert vocabulary.tokens[PIECES : PIECES + len(ADDED)] == ADDED
    assert vocabulary.tokens[-1] == f"[PAD{VOCAB - 1}]"
    assert vocabulary.types[-1] is TokenType.UNUSED
    assert vocabulary.types[END] is TokenType.CONTROL
    assert vocabulary.types[2] is TokenType.USER_DEFINED
    assert vocabulary.types[vocabulary.tokens.index("<0x41>")] is TokenType.BYTE
    assert vocabulary.special_ids == {"bos": 1, "eos": ENDOFTEXT, "unk": 0, "pad": ENDOFTEXT}
    assert (vocabulary.add_bos, vocabulary.add_eos, vocabulary.add_space_prefix) == (True, False, True)


def test_tokenizer_model_is_read_as_sentencepiece_reads_it(sentencepiece_folder: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    truth = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    vocabulary = load_tokenizer(sentencepiece_folder, spec())
    normal = range(3, PIECES)  # the first three are added tokens too
    assert [vocabulary.tokens[n] for n in normal] == [truth.id_to_piece(n) for n in normal]
    assert [vocabulary.scores[n] for n in normal] == [truth.get_score(n) for n in normal]
    assert [n for n in normal if vocabulary.types[n] is TokenType.BYTE] == [n for n in normal if truth.is_byte(n)]


def test_scores_from_merges_order_pieces_as_the_model_file_does(sentencepiece_folder: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(only(sentencepiece_folder, tmp_path / "copy", "tokenizer.json"), spec())
    theirs = load_tokenizer(sentencepiece_folder, spec())
    merged = [n for n in range(PIECES) if theirs.types[n] is TokenType.NORMAL and len(theirs.tokens[n]) > 1]
    assert sorted(merged, key=lambda n: -ours.scores[n]) == sorted(merged, key=lambda n: -theirs.scores[n])
    assert ours.tokens == theirs.tokens
    assert ours.types == theirs.types


def change(folder: Path, name: str, **keys: object) -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps(content | keys), encoding="utf-8")


def test_space_prefix_follows_the_normalizer(sentencepiece_folder: Path, tmp_path: Path) -> None:
    folder = only(sentencepiece_folder, tmp_path / "copy", "tokenizer.json")
    change(folder, "tokenizer.json", normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    vocabulary = load_tokenizer(folder, spec())
    assert not vocabulary.add_space_prefix
    truth = Tokenizer.from_file(str(folder / "tokenizer.json"))
    llama = LlamaVocabulary(spec(), vocabulary, tmp_path / "vocabulary.gguf")
    for text in TEXTS:
        assert llama.ids(text) == truth.encode(text).ids, text


def test_a_space_at_the_very_start_only_is_left_out_for_the_sake_of_chats(
    sentencepiece_folder: Path, tmp_path: Path
) -> None:
    folder = only(sentencepiece_folder, tmp_path / "copy", "tokenizer.json")
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    change(folder, "tokenizer.json", normalizer=None, pre_tokenizer=first)
    vocabulary = load_tokenizer(folder, spec())
    llama = LlamaVocabulary(spec(), vocabulary, tmp_path / "vocabulary.gguf")
    assert llama.ids(CHAT) == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(CHAT).ids
    assert len(vocabulary.notes) == 1
    change(folder, "tokenizer_config.json", chat_template=None)
    vocabulary = load_tokenizer(folder, spec())
    assert vocabulary.add_space_prefix
    assert "space after every special token" in vocabulary.notes[0]


def test_flags_that_gguf_cannot_say_are_noted(sentencepiece_folder: Path, tmp_path: Path) -> None:
    folder = only(sentencepiece_folder, tmp_path / "copy", "tokenizer.json")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"][-1] |= {"lstrip": True, "rstrip": False}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    text = "\n".join(gguf.notes(spec(), load_tokenizer(folder, spec())))
    assert "'<|user|>' takes the spaces before it (lstrip, 1 tokens)" in text
    assert "on is wrong for <|user|>" in text


def test_chat_templates(sentencepiece_folder: Path, tmp_path: Path) -> None:
    folder = only(sentencepiece_folder, tmp_path / "copy", "tokenizer.model")
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    change(folder, "tokenizer_config.json", chat_template=named)
    vocabulary = load_tokenizer(folder, spec())
    assert (vocabulary.chat_template, vocabulary.other_templates) == ("one", {"tool_use": "two"})
    (folder / "chat_template.jinja").write_text("three")
    assert load_tokenizer(folder, spec()).chat_template == "three"


def test_only_files_that_are_pulled_and_hashed_are_read(sentencepiece_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sentencepiece_folder, tmp_path / "all"))
    change(folder, "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.json").write_text('{"chat_template": "of the legacy file"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("not read")
    vocabulary = load_tokenizer(folder, spec())
    assert vocabulary.chat_template == "of the legacy file"
    pulled = only(folder, tmp_path / "pulled", *(name for name in TOKENIZER_FILES if (folder / name).exists()))
    assert load_tokenizer(pulled, spec()) == vocabulary


def damaged(folder: Path, problem: str) -> None:
    if problem == "nothing":
        (folder / "tokenizer.model").unlink()
        (folder / "tokenizer.json").unlink()
    elif problem == "cut model":
        data = (folder / "tokenizer.model").read_bytes()
        (folder / "tokenizer.model").write_bytes(data[: len(data) // 2 + 1])
    elif problem == "cut json":
        (folder / "tokenizer.json").write_text("{")
    elif problem == "another model's json":
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"]
        vocab["▁the"], vocab["▁of"] = vocab["▁of"], vocab["▁the"]
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    elif problem == "token twice":
        change(folder, "tokenizer.json", added_tokens=[{"id": PIECES, "content": "▁the"}])
    elif problem == "unigram":
        change(folder, "tokenizer.json", model={"type": "Unigram", "vocab": []})


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("nothing", "got neither"),
        ("cut model", "tokenizer.model: not a SentencePiece model"),
        ("cut json", "tokenizer.json: not JSON"),
        ("another model's json", "disagree"),
        ("token twice", "'▁the' as ids"),
        ("unigram", "type BPE, got 'Unigram'"),
    ],
)
def test_damage_is_one_clear_line(sentencepiece_folder: Path, tmp_path: Path, problem: str, message: str) -> None:
    folder = only(sentencepiece_folder, tmp_path / "copy", "tokenizer.model", "tokenizer.json")
    damaged(folder, problem)
    with pytest.raises(Phi3EdgeError, match=message):
        load_tokenizer(folder, spec())


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tokenizer.json", "model", {"type": "BPE", "vocab": {"a": 10**12}, "merges": []}),
        ("tokenizer.json", "model", {"type": "BPE", "vocab": {"a": -1}, "merges": []}),
        ("tokenizer.json", "model", {"type": "BPE", "vocab": {"a": "0"}, "merges": []}),
        ("tokenizer.json", "model", {"type": "BPE", "vocab": ["a"], "merges": []}),
        ("tokenizer.json", "pre_tokenizer", "ByteLevel"),
        ("tokenizer.json", "added_tokens", [{"id": -1, "content": "<|x|>"}]),
        ("tokenizer.json", "added_tokens", [{"content": "<|x|>"}]),
        ("tokenizer.json", "added_tokens", [{"id": PIECES, "content": "\ud800"}]),
        ("tokenizer_config.json", "added_tokens_decoder", {"x": {"content": "<|x|>"}}),
        ("tokenizer_config.json", "added_tokens_decoder", ["<|x|>"]),
        ("tokenizer_config.json", "chat_template", [{"name": "default"}]),
    ],
)
def test_whatever_a_json_file_holds_the_answer_is_our_error(
    sentencepiece_folder: Path, tmp_path: Path, name: str, key: str, value: Any
) -> None:
    folder = only(sentencepiece_folder, tmp_path / "copy", "tokenizer.json", "tokenizer_config.json")
    change(folder, name, **{key: value})
    with pytest.raises(CheckpointError):
        load_tokenizer(folder, spec())


def test_a_tokenizer_larger_than_the_embedding_is_refused(sentencepiece_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=f"below vocab_size {PIECES}, got id {PIECES + len(ADDED) - 1}"):
        load_tokenizer(sentencepiece_folder, replace(spec(), vocab_size=PIECES))
