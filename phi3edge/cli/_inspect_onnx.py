"""What `phi3edge inspect` says of an ONNX model, and of the ONNX Runtime GenAI folder around it."""

from __future__ import annotations

import re
from collections import Counter
from math import prod
from pathlib import Path

from rich.text import Text

from phi3edge.cli._output import stdout, table
from phi3edge.genai_folder import GenAIFolder, is_genai, read_folder
from phi3edge.onnx_file import ONNXModel, ONNXTensor, check_data, read_model
from phi3edge.types import JSON
from phi3edge.units import size


def explain(path: Path, tensors: bool) -> JSON:
    """A folder that ONNX Runtime GenAI opens, or an ONNX model alone, as plain data; reads headers only."""
    found = read_folder(path) if is_genai(path) else None
    model = found.model if found else read_model(path)
    files = [found.model_file, *found.data_files] if found else [path, *check_data(model, path.parent)]
    content: JSON = {
        "version": model.ir_version,
        "file_bytes": sum(f.stat().st_size for f in files),
        "architecture": found.config["model"]["type"] if found else "ONNX",
        "name": found.folder.resolve().name if found else path.name,
        "settings": _settings(found) if found else {},
        "producer": model.producer,
        "opsets": model.opsets,
        "inputs": [{"name": v.name, "type": v.dtype, "shape": list(v.shape)} for v in model.inputs],
        "outputs": [{"name": v.name, "type": v.dtype, "shape": list(v.shape)} for v in model.outputs],
        "operators": model.operators,
        "types": _by_type(model),
        "files": [{"name": f.name, "bytes": f.stat().st_size} for f in files + _others(found)],
        "chat_template": found.chat_template if found else None,
    }
    if tensors:
        content["tensors"] = [
            {
                "name": t.name,
                "type": t.dtype,
                "shape": list(t.shape),
                "file": t.location,
                "offset": t.offset,
                "bytes": t.nbytes,
            }
            for t in model.tensors
        ]
    return content


def _settings(found: GenAIFolder) -> JSON:
    model, search = found.config["model"], found.config.get("search", {})
    decoder = model["decoder"]
    return {
        "layers": decoder.get("num_hidden_layers"),
        "hidden_size": decoder.get("hidden_size"),
        "heads": decoder.get("num_attention_heads"),
        "kv_heads": decoder.get("num_key_value_heads"),
        "head_dim": decoder.get("head_size"),
        "vocab_size": model["vocab_size"],
        "context_length": model["context_length"],
        "max_length": search.get("max_length"),
        "provider": ", ".join(found.providers) or "cpu",
        "kv_cache": found.kv_type,
        "eos_token_ids": found.eog_ids,
        "session_options": {k: v for k, v in found.session_options.items() if k != "provider_options"},
    }


def _others(found: GenAIFolder | None) -> list[Path]:
    """The rest of the folder: configuration, tokenizer, manifest."""
    taken = {found.model_file, *found.data_files} if found else set()
    return sorted(f for f in found.folder.iterdir() if f.is_file() and f not in taken) if found else []


def _by_type(model: ONNXModel) -> list[JSON]:
    """Tensors by element type; several that share their bytes in a data file count once."""
    held: dict[object, ONNXTensor] = {
        (t.location, t.offset) if t.location else i: t for i, t in enumerate(model.tensors)
    }
    counts, sizes, values = Counter[str](), Counter[str](), Counter[str]()
    for t in held.values():
        counts[t.dtype] += 1
        sizes[t.dtype] += t.nbytes
        values[t.dtype] += prod(t.shape)
    return [{"type": k, "tensors": counts[k], "values": values[k], "bytes": n} for k, n in sizes.most_common()]


def show(content: JSON) -> None:
    """What follows the head and the settings on a terminal."""
    types = table("type", ">tensors", ">values", ">bytes")
    for t in content["types"]:
        types.add_row(t["type"], str(t["tensors"]), f"{t['values']:,}", size(t["bytes"]))
    operators = table("operator", ">nodes")
    for name, count in content["operators"].items():
        operators.add_row(Text(name), str(count))
    values = table("graph", "type", "shape")
    for kind in ("inputs", "outputs"):
        for name, dtype, shape in _grouped(content[kind]):
            values.add_row(Text(f"{kind[:-1]} {name}"), dtype, Text(shape))
    files = table("file", ">bytes")
    for f in content["files"]:
        files.add_row(Text(f["name"]), size(f["bytes"]))
    for rows in (types, operators, values, files):
        stdout.print(Text(), rows)
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in content["opsets"].items())
    template = "with" if content["chat_template"] else "without"
    made = f"made by {content['producer'] or '?'}, operators of {opsets}, {template} chat template"
    stdout.print(Text(f"\n{made}"))


def _grouped(values: list[JSON]) -> list[tuple[str, str, str]]:
    """Inputs or outputs for people: those that differ only in a layer's number are one."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for v in values:
        shape = " x ".join(map(str, v["shape"]))
        groups.setdefault((re.sub(r"\.\d+\.", ".N.", v["name"]), v["type"], shape), []).append(v["name"])
    return [
        (names[0] if len(names) == 1 else f"{pattern} ({len(names)} times)", dtype, shape)
        for (pattern, dtype, shape), names in groups.items()
    ]
