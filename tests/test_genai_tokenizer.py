"""The tokenizer files of ONNX Runtime GenAI folders: transformers says what is right, the runtime what it reads."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _models import MHA, phi3_config
from _tokenizers import CHAT, END, ENDOFTEXT, PIECES, TEMPLATE, TEXTS, USER, write_byte_level, write_sentencepiece
from tokenizers import Regex, pre_tokenizers

from phi3edge import tokenizer
from phi3edge.emitters import _genai_template as template_file
from phi3edge.emitters import _genai_tokenizer as tokenizer_file
from phi3edge.emitters._genai_template import runtime_template
from phi3edge.emitters._genai_tokenizer import tokenizer_files
from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.families import phi3
from phi3edge.parity import STRINGS
from phi3edge.types import ModelSpec

og = pytest.importorskip("onnxruntime_genai")
transformers = pytest.importorskip("transformers")

VOCAB = PIECES + 20
LONG_WORD = TEXTS[-1]
WORDS = (
    "Hello", "  ", " ", "\n", "\n\n", "\t", "é", "你好", "🙂", "e\u0301", "\u200b", "\u00a0", "a", " the", "123", "½",
    "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>", "</s>", "<s>", "<unk>", "don't", "<", "|",
    "▁", "_", "\ufeff", "\u3000", "İ", "ﬁ", "\U0010ffff", ".\n", ".\r\n", "\x07",
)  # fmt: skip
CHATS = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "  Odd \n one "}, {"role": "user", "content": "\n a  b <|end|> c \n\n"}],
    [
        {"role": "user", "content": "你好 🙂"},
        {"role": "assistant", "content": "def f():\n    return 1\n"},
        {"role": "user", "content": ""},
    ],
)


def spec(**changes: Any) -> ModelSpec:
    return phi3.parse(phi3_config(MHA, **{"vocab_size": VOCAB} | changes), {"eos_token_id": [ENDOFTEXT, END]}, "tiny")


def texts(seed: int = 7, count: int = 400) -> list[str]:
    """Hard strings, and random ones of hard pieces; without what no file can mend (see the tests of limits)."""
    choose = random.Random(seed)
    mixed = ["".join(choose.choices(WORDS, k=choose.randint(1, 8))) for _ in range(count)]
    kept = [text for text in mixed if not re.search(r">\s*[\u00a0\u3000]", text)]
    return [*STRINGS, *TEXTS[:-1], *kept]


def reference(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def runtime(files: dict[str, bytes], folder: Path) -> Any:
    """The runtime's tokenizer on those files; it needs genai_config.json, and no model."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    decoder = {"session_options": {"provider_options": []}, "filename": "model.onnx", "num_hidden_layers": 1}
    model = {"type": "phi3", "context_length": 64, "vocab_size": VOCAB, "eos_token_id": [2], "decoder": decoder}
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": {"max_length": 64}}))
    return og.Tokenizer(og.Config(str(folder)))


def differing(expected: Any, found: Any, strings: list[str]) -> list[str]:
    """The strings of which the ids differ, with the special tokens around a text or without."""
    wrong = []
    for around in (False, True):
        found.update_options(add_special_tokens="true" if around else "false")
        wrong += [s for s in strings if expected(s, add_special_tokens=around)["input_ids"] != found.encode(s).tolist()]
    return wrong


def checkpoint(folder: Path, write: Callable[[Path], None]) -> Path:
    write(folder)
    (folder / "config.json").write_text('{"model_type": "phi3"}')
    return folder


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.fixture(scope="module")
def phi3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("phi3"), write_sentencepiece)


@pytest.fixture
def copy(phi3_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phi3_folder, tmp_path / "copy"))


ONLY_MODEL = pytest.param(
    ("tokenizer.model",),
    marks=pytest.mark.skipif(
        transformers.__version__ < "5", reason="transformers 4 puts a space in front of such a text; a note says so"
    ),
)


@pytest.mark.parametrize("files", [("tokenizer.model", "tokenizer.json"), ONLY_MODEL, ("tokenizer.json",)])
def test_sentencepiece_ids(copy: Path, tmp_path: Path, files: tuple[str, ...]) -> None:
    for name in {"tokenizer.model", "tokenizer.json"}.difference(files):
        (copy / name).unlink()
    written, notes = tokenizer_files(copy, spec())
    found = runtime(written, tmp_path / "out")
    assert differing(reference(copy), found, texts()) == []
    assert [note for note in notes if "space in front" in note] == []
    ids = found.encode(CHAT).tolist()
    assert [*ids[:2], *ids[-2:]] == [1, USER, END, USER - 4]


def test_special_tokens_keep_white_space_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "in", lambda folder: write_sentencepiece(folder, rstrip=False))
    written, notes = tokenizer_files(folder, spec())
    found = runtime(written, tmp_path / "out")
    assert differing(reference(folder), found, texts()) == []
    assert [note for note in notes if "rstrip" in note] == []


def test_files_as_they_are_would_not_do(phi3_folder: Path, tmp_path: Path) -> None:
    """The runtime's own reading of a checkpoint's files: what the rewriting is for."""
    plain = {p.name: p.read_bytes() for p in phi3_folder.iterdir() if p.suffix == ".json"}
    assert len(differing(reference(phi3_folder), runtime(plain, tmp_path / "out"), texts())) > 100


def test_merges_with_a_carriage_return(copy: Path, tmp_path: Path) -> None:
    fast = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = fast["model"]["vocab"]
    vocab |= {"\r": PIECES + 10, ">\r": PIECES + 11}
    fast["model"]["merges"] = ["> \r", *(" ".join(pair) for pair in fast["model"]["merges"])]
    (copy / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")
    expected = reference(copy)
    assert PIECES + 11 in expected("<a>\r\n")["input_ids"]
    found = runtime(tokenizer_files(copy, spec())[0], tmp_path / "out")
    assert differing(expected, found, ["<a>\r\n", ">\r", "b\r"]) == []


def test_limits_of_sentencepiece_are_noted(phi3_folder: Path, tmp_path: Path) -> None:
    """Where no file helps: one of these failing means that the runtime learned it, and that the note may go."""
    written, notes = tokenizer_files(phi3_folder, spec())
    found, expected = runtime(written, tmp_path / "out"), reference(phi3_folder)
    for text, note in (
        (LONG_WORD, "100 characters"),
        ("a" + 150 * " " + "b", "of spaces"),
        ("<|end|>\u3000a", "rstrip"),
        ("<|end|>\u00a0", "rstrip"),
    ):
        assert differing(expected, found, [text])
        assert any(note in line for line in notes)


@pytest.mark.parametrize("chat", [True, False])
def test_a_space_only_at_the_start_is_noted(copy: Path, tmp_path: Path, chat: bool) -> None:
    scheme = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    change(copy / "tokenizer.json", normalizer=None, pre_tokenizer=scheme)
    if not chat:
        change(copy / "tokenizer_config.json", chat_template=None)
    written, notes = tokenizer_files(copy, spec())
    assert [note for note in notes if "of a text, as is right for a chat" in note or "only at the very start" in note]
    found = runtime(written, tmp_path / "out")
    assert differing(reference(copy), found, [CHAT] if chat else ["Hello there"]) == []
    assert differing(reference(copy), found, ["Hello there"] if chat else [CHAT])


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


@pytest.mark.parametrize(
    "steps",
    [
        [GPT2],
        [DIGITS, GPT2],
        [split(tokenizer.LLAMA3), BYTES],
        [split(tokenizer.QWEN2), BYTES],
        [pre_tokenizers.Split(Regex(tokenizer.GPT4O), "removed", invert=True), BYTES],
    ],
    ids=["gpt2", "digits", "llama3", "qwen2", "gpt4o"],
)
def test_byte_level_ids(tmp_path: Path, steps: list[pre_tokenizers.PreTokenizer]) -> None:
    folder = checkpoint(tmp_path / "in", lambda folder: write_byte_level(folder, steps))
    written, notes = tokenizer_files(folder, spec())
    assert [note for note in notes if "slash" not in note] == []
    assert differing(reference(folder), runtime(written, tmp_path / "out"), [*texts(), LONG_WORD]) == []


def test_the_folder_is_the_same_tokenizer_for_transformers(tmp_path: Path) -> None:
    steps = [DIGITS, GPT2]
    for name, write in (("spm", write_sentencepiece), ("bytes", lambda folder: write_byte_level(folder, steps))):
        expected = reference(checkpoint(tmp_path / name, write))
        written = tokenizer_files(tmp_path / name, spec())[0]
        runtime(written, tmp_path / f"{name}-out")
        for config in (None, '{"model_type": "phi3"}', '{"model_type": "llama"}'):
            if config:
                (tmp_path / f"{name}-out" / "config.json").write_text(config)
            again = reference(tmp_path / f"{name}-out")
            strings = texts()
            assert again(strings)["input_ids"] == expected(strings)["input_ids"]
            assert set(again("a")) == {"input_ids", "attention_mask"}  # what generate() of a model takes
            assert again.chat_template == expected.chat_template
            assert again.special_tokens_map == expected.special_tokens_map


@pytest.mark.parametrize("side", ["bos", "eos", "neither", "both"])
def test_what_is_added_to_a_text(tmp_path: Path, side: str) -> None:
    folder = checkpoint(tmp_path / "in", lambda folder: write_byte_level(folder, [GPT2]))
    parts = {"bos": "<|endoftext|> $A", "eos": "$A <|end|>", "neither": "$A", "both": "<|endoftext|> $A <|end|>"}[side]
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}} if p == "$A" else {"SpecialToken": {"id": p, "type_id": 0}}
        for p in parts.split()
    ]
    ids = {"<|endoftext|>": 0, "<|end|>": 4}
    special = {token: {"id": token, "ids": [n], "tokens": [token]} for token, n in ids.items()}
    post = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}
    change(folder / "tokenizer.json", post_processor=post)
    written, notes = tokenizer_files(folder, spec())
    assert notes == []
    assert differing(reference(folder), runtime(written, tmp_path / "out"), ["Hello", "", CHAT]) == []


def test_a_beginning_that_only_the_post_processor_names(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer_config.json").unlink()
    (copy / "tokenizer.model").unlink()
    written, _ = tokenizer_files(copy, spec())
    assert reference(copy)("Hello")["input_ids"][0] == 1
    assert differing(reference(copy), runtime(written, tmp_path / "out"), ["Hello", "", CHAT]) == []


def test_flags_that_the_runtime_ignores_are_noted(copy: Path) -> None:
    config = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    for token in list(config["added_tokens_decoder"].values())[3:]:
        token |= {"lstrip": True, "single_word": True, "normalized": True}
    (copy / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    notes = " ".join(tokenizer_files(copy, spec())[1])
    for flag in ("rstrip, 6", "lstrip, 6", "single_word, 6", "normalized, 6"):
        assert f"({flag} tokens)" in notes


TEMPLATES = {
    "Phi-3-mini": "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\n'"
    " + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}",
    "Phi-3.5": "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n'"
    " + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content']"
    " + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "Phi-4-mini": "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and"
    " message['tools'] is not none %}{{ '<|tool|>' + message['tools'] }}{% else %}{{ '<|' + message['role'] + '|>' +"
    " message['content'] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% else %}{{ eos_token }}{% endif %}",
    "on lines": "{# turns #}\n{% for m in messages %}\n    {% if m.role == 'user' %}\n  U: {{ m.content }}\n    {% else"
    " %}\n\nA: {{- m.content -}}  \n    {% endif %}\n\n\t{% endfor %}\n{%- if add_generation_prompt %}\n\nGo\n"
    "{%- endif %}\n\n",
    "kept space": "a\n \t{%+ if true %}b{% endif +%}\nc\n   {{ messages[0].role }}\n",
    "no tools": "{% if tools is not none or documents is not none %}tools{% else %}none{% endif %}",
    "escapes": "{{ '\\u00e9\\x41\\t\\n\\\\ \\'' }}{{ \"a\\\\b\\\"\" }}",
    "training": "{% for m in messages %}\n{%- generation -%}\n {{ m.content }}\n{% endgeneration %}\n{% endfor %}",
    "control": "{% macro f(x, y='!') %}[{{ x }}{{ y }}]{% endmacro %}{% set ns = namespace(n=0) %}{% for m in messages"
    " %}{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{{ f(m.content.strip()) }}"
    "{{ ns.n }}{{ loop.index0 }}{{ loop.last }}{% endfor %}{{ messages[1:] | length }}{{ messages[-1]['role'] }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_render_as_the_reference_does(copy: Path, tmp_path: Path, name: str) -> None:
    change(copy / "tokenizer_config.json", chat_template=TEMPLATES[name])
    expected = reference(copy)
    written, notes = tokenizer_files(copy, spec())
    found = runtime(written, tmp_path / "out")
    again = reference(tmp_path / "out")
    assert [note for note in notes if "template" in note] == []
    for chat in CHATS:
        for prompt in (False, True):
            wanted = expected.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert found.apply_chat_template(json.dumps(chat), add_generation_prompt=prompt) == wanted
            assert again.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt) == wanted


def test_prompts_have_the_ids_of_the_reference(phi3_folder: Path, tmp_path: Path) -> None:
    expected, found = reference(phi3_folder), runtime(tokenizer_files(phi3_folder, spec())[0], tmp_path / "out")
    found.update_options(add_special_tokens="false")
    for chat in CHATS:
        prompt = found.apply_chat_template(json.dumps(chat), add_generation_prompt=True)
        ids = expected.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert found.encode(prompt).tolist() == ids


SAMPLES = {
    "count": "messages | count", "default": "nope | default('x')",
    "dictsort": "{'b': 1, 'a': 2} | dictsort | list | length",
    "e": "'<' | e", "escape": "'<&' | escape", "int": "'12' | int", "items": "{'a': 1} | items | list | length",
    "join": "['a', 'b'] | join('-')", "last": "['a', 'b'] | last", "length": "messages | length",
    "list": "['a'] | list", "lower": "'AbC' | lower", "map": "messages | map(attribute='role') | join",
    "reject": "['a', 'b'] | reject('equalto', 'a') | join", "safe": "'<' | safe",
    "rejectattr": "messages | rejectattr('role', 'equalto', 'user') | list | length",
    "select": "['a', 'b'] | select('equalto', 'a') | join", "sort": "['b', 'a'] | sort | join",
    "selectattr": "messages | selectattr('role', 'equalto', 'user') | list | length", "string": "12 | string",
    "tojson": "messages | tojson", "trim": "' \n a ' | trim",
}  # fmt: skip
METHODS = {
    "endswith": "'ab'.endswith('b')", "get": "messages[0].get('role', 'x')",
    "items": "{'a': 1}.items() | list | length", "lstrip": "' a '.lstrip()",
    "rstrip": "' a\n'.rstrip('\n')", "split": "'a b'.split(' ') | join('-')", "startswith": "'ab'.startswith('a')",
    "strip": "' a '.strip()",
}  # fmt: skip


@pytest.mark.parametrize(
    ("names", "samples"),
    [(template_file.FILTERS, SAMPLES), (template_file.METHODS, METHODS)],
    ids=["filters", "methods"],
)
def test_the_runtime_has_what_templates_may_use(
    phi3_folder: Path, tmp_path: Path, names: str, samples: dict[str, str]
) -> None:
    expected, found = reference(phi3_folder), runtime(tokenizer_files(phi3_folder, spec())[0], tmp_path / "out")
    assert set(samples) == set(names.split())
    for sample in samples.values():
        text, notes = "{{ " + sample + " }}", []
        ours = runtime_template(text, notes)
        wanted = expected.apply_chat_template(CHATS[1], chat_template=text, tokenize=False)
        assert (found.apply_chat_template(json.dumps(CHATS[1]), template_str=ours), notes) == (wanted, []), sample


def test_every_test_of_templates_is_one_that_the_runtime_has(phi3_folder: Path, tmp_path: Path) -> None:
    expected, found = reference(phi3_folder), runtime(tokenizer_files(phi3_folder, spec())[0], tmp_path / "out")
    for name in template_file.TESTS.split():
        values = ["messages", "none", "1"] if name in ("sequence", "iterable", "number") else ["messages[0].role"]
        text = "".join(f"{{{{ 1 if {value} is {name} else 0 }}}}" for value in values)
        wanted = expected.apply_chat_template(CHATS[0], chat_template=text, tokenize=False)
        assert found.apply_chat_template(json.dumps(CHATS[0]), template_str=text) == wanted, name


@pytest.mark.parametrize(
    ("template", "note"),
    [
        ("{{ messages[0].role | upper }}", "filter 'upper'"),
        ("{{ messages[0].content.replace('a', 'b') }}", "method 'replace'"),
        ("{% if 3 is odd %}{% endif %}", "test 'odd'"),
        ("{% raw %}{{ x }}{% endraw %}", "block 'raw'"),
        ("{% with a = 1 %}{{ a }}{% endwith %}", "block 'With'"),
        ("{{ '<' in messages[0].content }}", "look for text in a text"),
        ("{% for m in messages %}", "is not valid"),
        ("{{ 'a", "is not valid"),
    ],
)
def test_what_the_runtime_cannot_render_is_noted(template: str, note: str) -> None:
    notes: list[str] = []
    runtime_template(template, notes)
    assert len(notes) == 1
    assert note in notes[0]


@pytest.mark.parametrize("how", ["list", "jinja"])
def test_chat_templates_wherever_they_are(copy: Path, tmp_path: Path, how: str) -> None:
    other = {"name": "tool_use", "template": "tools"}
    listed = [{"name": "default", "template": TEMPLATE}, other]
    change(copy / "tokenizer_config.json", chat_template=listed if how == "list" else None)
    if how == "jinja":
        (copy / "chat_template.jinja").write_text(TEMPLATE)
    written, notes = tokenizer_files(copy, spec())
    assert json.loads(written["tokenizer_config.json"])["chat_template"] == TEMPLATE
    assert any("'tool_use'" in note for note in notes) == (how == "list")
    found = runtime(written, tmp_path / "out")
    assert found.apply_chat_template(json.dumps(CHATS[0]), add_generation_prompt=True).endswith("<|assistant|>\n")


def test_code_of_the_repository_is_neither_run_nor_passed_on(copy: Path) -> None:
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    change(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    written, _ = tokenizer_files(copy, spec())
    assert set(written) == {"tokenizer.json", "tokenizer_config.json", "tokenizer_module.json"}
    assert all(b"evil" not in content for content in written.values())


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).unlink()


def linked(folder: Path) -> None:
    outside = folder.parent / "outside.json"
    (folder / "tokenizer_config.json").rename(outside)
    (folder / "tokenizer_config.json").symlink_to(outside)


def half_a_character(folder: Path) -> None:
    change(folder / "tokenizer_config.json", chat_template="\ud800")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_tokenizer, "cannot read the tokenizer"),
        (linked, "outside the folder"),
        (half_a_character, "half a character"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot read the tokenizer"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[1"), "cannot read the tokenizer"),
    ],
)
def test_damaged_files_are_one_error(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        tokenizer_files(copy, spec())


def test_a_tokenizer_of_another_model(copy: Path) -> None:
    with pytest.raises(CheckpointError, match=r"below vocab_size 705, got id 705"):
        tokenizer_files(copy, spec(vocab_size=705))


def test_a_file_that_is_too_large(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_file, "MAX_FILE_BYTES", 1000)
    with pytest.raises(CheckpointError, match="at most 1000"):
        tokenizer_files(copy, spec())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}, "pre_tokenizer": None}, "no SentencePiece tokenizer with the steps"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "no normalizer or NFC",
        ),
        (
            {
                "normalizer": None,
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                },
            },
            "no code to split words by",
        ),
    ],
)
def test_tokenizers_that_the_runtime_would_read_as_others(copy: Path, changes: dict[str, Any], message: str) -> None:
    change(copy / "tokenizer.json", **changes)
    with pytest.raises(UnsupportedError, match=message):
        tokenizer_files(copy, spec())
