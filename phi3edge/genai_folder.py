"""An ONNX Runtime GenAI folder: genai_config.json, the ONNX model that it names, tokenizer files; read without it.

What a runtime would believe is checked first: names stay inside the folder, no native library is loaded because a
configuration says so, and the data files are as long as the model needs them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi3edge import manifest
from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.onnx_file import HINT, ONNXModel, ONNXValue, check_data, read_model
from phi3edge.types import JSON

CONFIG = "genai_config.json"


@dataclass(frozen=True, slots=True)
class GenAIFolder:
    """A folder whose files are there and of a sensible size; what the values mean is the runtime's to judge.

    Attributes:
        folder: where it is.
        config: content of genai_config.json.
        model: the ONNX model's header.
        model_file: the ONNX model.
        data_files: the files that hold its weights.
    """

    folder: Path
    config: JSON = field(repr=False)
    model: ONNXModel
    model_file: Path
    data_files: tuple[Path, ...]

    @property
    def eog_ids(self) -> list[int]:
        """Every end-of-generation id, sorted."""
        ids = self.config["model"].get("eos_token_id", [])
        return sorted({ids} if isinstance(ids, int) else set(ids))

    @property
    def session_options(self) -> JSON:
        """ONNX Runtime's options of the decoder's session."""
        return self.config["model"]["decoder"].get("session_options", {})

    @property
    def providers(self) -> list[str]:
        """Execution providers that it was made for; empty for the CPU's."""
        return [name for entry in self.session_options.get("provider_options", []) for name in entry]

    @property
    def special_ids(self) -> set[int]:
        """Ids of the tokens that tokenizer.json calls special; empty without that file."""
        if not (path := self.folder / "tokenizer.json").is_file():
            return set()
        return {token["id"] for token in _read_object(path).get("added_tokens", []) if token.get("special")}

    @property
    def vocabulary_size(self) -> int:
        """Columns of the logits."""
        size = self.logits.shape[-1] if self.logits.shape else "?"
        return size if isinstance(size, int) else self.config["model"]["vocab_size"]

    @property
    def logits(self) -> ONNXValue:
        """The graph's output of logits."""
        name = self.config["model"]["decoder"].get("outputs", {}).get("logits", "logits")
        return _find(self.model.outputs, name, self.model_file)

    @property
    def kv_type(self) -> str:
        """Type of the KV cache, in the words of targets: f32, f16, int8 ...; the graph fixes it."""
        pattern = self.config["model"]["decoder"].get("inputs", {}).get("past_key_names", "past_key_values.%d.key")
        dtype = _find(self.model.inputs, pattern.replace("%d", "0"), self.model_file).dtype
        return {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(dtype, dtype)

    def kv_bytes(self, tokens: int) -> int:
        """Size of a KV cache for so many tokens."""
        decoder = self.config["model"]["decoder"]
        caches = [v for v in self.model.inputs if v.name.startswith("past")]
        width = decoder.get("num_key_value_heads", 0) * decoder.get("head_size", 0)
        return len(caches) * width * tokens * (4 if self.kv_type == "f32" else 1 if self.kv_type == "int8" else 2)

    @property
    def chat_template(self) -> str | None:
        """The chat template that the runtime applies: chat_template.jinja, else the one in tokenizer_config.json."""
        if (path := self.folder / "chat_template.jinja").is_file():
            return path.read_text(encoding="utf-8")
        if not (path := self.folder / "tokenizer_config.json").is_file():
            return None
        template = _read_object(path).get("chat_template")
        return template if isinstance(template, str) else None


def is_genai(path: Path) -> bool:
    """Whether a path is such a folder, or the ONNX model in one."""
    return (path / CONFIG).is_file() or (path.suffix == ".onnx" and (path.parent / CONFIG).is_file())


def read_folder(path: Path) -> GenAIFolder:
    """Reads the headers of a folder, given by itself or by the ONNX model in it.

    Raises:
        CheckpointError: a file is missing, damaged, too short, or no such file.
        UnsupportedError: it asks for a native library, or is more than one decoder graph.
        OutputError: phi3edge.json is there and cannot be read, or is from a newer phi3edge.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / manifest.NAME).is_file():
        manifest.read_manifest(folder)
    where = folder / CONFIG
    config = _read_object(where)
    name = _check_config(config, where)
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / name} is missing: {CONFIG} names it", "copy or export the folder again")
    if path.suffix == ".onnx" and path.name != name:
        raise CheckpointError(f"{where} names {name}, not {path.name}", f"give {folder / name}")
    model = read_model(folder / name)
    found = GenAIFolder(folder, config, model, folder / name, tuple(check_data(model, folder)))
    if found.vocabulary_size != config["model"]["vocab_size"]:
        raise CheckpointError(
            f"{where} has vocab_size {config['model']['vocab_size']}, the logits {found.vocabulary_size} columns",
            "the files are of different models: export again",
        )
    return found


def _check_config(config: JSON, where: Path) -> str:
    """The model's file name in a genai_config.json that holds what is read here, and nothing that is not safe."""
    if "custom_ops_library" in json.dumps(config):
        raise UnsupportedError(
            f"{where} asks for a native library (custom_ops_library), which would run whatever it holds",
            "remove the key if you trust the folder and do not need the library",
        )
    model = _typed(config, "model", dict, where)
    decoder = _typed(model, "decoder", dict, where)
    _typed(model, "type", str, where)
    _typed(model, "vocab_size", int, where)
    _typed(model, "context_length", int, where)
    ids = model.get("eos_token_id", [])
    if not all(isinstance(i, int) for i in (ids if isinstance(ids, list) else [ids])):
        raise CheckpointError(f"{where}: eos_token_id is {ids!r}, expected one id or several", HINT)
    for key in ("vision", "speech", "embedding", "encoder", "pipeline"):
        if key in model or key in decoder:
            raise UnsupportedError(f"{where} has the part {key!r}; only models of one decoder graph are supported")
    options = _typed({"session_options": {}, **decoder}, "session_options", dict, where)
    providers = _typed({"provider_options": [], **options}, "provider_options", list, where)
    if not all(isinstance(entry, dict) for entry in providers):
        raise CheckpointError(f"{where}: provider_options is {providers!r}, expected a list of objects", HINT)
    for key in ("inputs", "outputs"):
        _typed({key: {}, **decoder}, key, dict, where)
    name = _typed(decoder, "filename", str, where)
    if name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
        raise CheckpointError(f"{where}: filename is {name!r}, expected the name of a file beside it")
    return name


def _typed(content: JSON, key: str, kind: type, where: Path) -> Any:
    value = content.get(key)
    if not isinstance(value, kind):
        raise CheckpointError(f"{where}: {key} is {value!r:.60}, expected {kind.__name__}", HINT)
    return value


def _read_object(path: Path) -> JSON:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", "expected a folder that ONNX Runtime GenAI opens")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", HINT) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object", HINT)
    return content


def _find(values: tuple[ONNXValue, ...], name: str, path: Path) -> ONNXValue:
    for value in values:
        if value.name == name:
            return value
    raise CheckpointError(f"{path} has no {name!r}, which {CONFIG} names", "the files are of different models")
