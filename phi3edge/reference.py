"""What an artifact is held against: the checkpoint itself, in float32 through transformers.

The reference's figures of the scored positions are kept in the cache, so that a second artifact of the same checkpoint
costs no second pass: its most likely tokens and the log-probabilities of the text's own tokens exactly (float32), and
the whole distributions as float16 log-probabilities, to be normalized again when read. Their rounding adds about 1e-6
nats to a KL divergence.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi3edge import machine, prequantized
from phi3edge.cache import cache_dir
from phi3edge.checkpoint import open_checkpoint
from phi3edge.errors import CheckpointError, MissingExtraError, OutputError, Phi3EdgeError, UsageError
from phi3edge.families import parse_config
from phi3edge.progress import Stages, silent
from phi3edge.types import JSON
from phi3edge.units import size

CACHE_BYTES = 4 * 10**9
"""What kept passes may take on disk; the oldest go first. The newest stays whatever its size."""

_FORMAT = "2"  # of the kept files
_SAMPLES, _SAMPLE_BYTES = 256, 4096  # of each weight file, evenly spaced, to tell one model's from another's


@dataclass(frozen=True, slots=True)
class Reference:
    """Figures of the scored rows: in each chunk, the second half's positions but the last.

    Attributes:
        log_probs: float16, shape (chunks, rows, vocabulary), a memory map.
        text_log_probs: float32, shape (chunks, rows): log-probability of the token that the text goes on with.
        top1: int32, shape (chunks, rows): the most likely token.
        greedy: the most likely continuation of each prompt, without the end-of-generation token.
        software: name and version of what computed it.
    """

    log_probs: np.ndarray
    text_log_probs: np.ndarray
    top1: np.ndarray
    greedy: list[list[int]]
    software: dict[str, str]


def load_tokenizer(checkpoint: Path) -> Any:
    """The checkpoint's own tokenizer, as transformers reads it.

    Raises:
        MissingExtraError: transformers is not installed.
        CheckpointError: the folder has no tokenizer that transformers can read.
    """
    transformers = _transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            f"transformers cannot read the tokenizer of {checkpoint.name}: {_one_line(error)}"
        ) from error


def vocabulary_size(checkpoint: Path) -> int:
    """Number of rows of the head: more than the tokenizer has tokens, where a model's vocabulary is padded."""
    return int(_config(checkpoint, "config.json")["vocab_size"])


def eos_ids(checkpoint: Path) -> tuple[int, ...]:
    """Every id that config.json or generation_config.json says ends a generation, sorted."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        value = _config(checkpoint, name).get("eos_token_id")
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))


def _config(checkpoint: Path, name: str) -> JSON:
    path = checkpoint / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def reference_pass(
    checkpoint: Path, ids: np.ndarray, prompts: list[list[int]], greedy_tokens: int, stages: Stages = silent
) -> Reference:
    """Runs the checkpoint over the chunks and prompts, or gives back what an earlier run kept.

    Args:
        checkpoint: folder in Hugging Face layout.
        ids: chunks of the text, int64, shape (chunks, tokens).
        prompts: token ids to continue greedily.
        greedy_tokens: at most so many tokens each.
        stages: shows progress.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        CheckpointError: transformers cannot load the checkpoint.
        UsageError: the weights in float32 do not fit into this machine's free memory.
        OutputError: no space for the cache.
    """
    root = cache_dir() / "reference"
    kept = root / _key(checkpoint, ids, prompts, greedy_tokens)
    if not kept.is_dir():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=".pass-", ignore_cleanup_errors=True) as work:
                _run(checkpoint, ids, prompts, greedy_tokens, Path(work), stages)
                if not kept.is_dir():  # else another process was faster
                    Path(work).rename(kept)
        except OSError as error:
            raise OutputError(
                f"cannot keep the reference pass in {root}: {error.strerror}", "PHI3EDGE_CACHE names another folder"
            ) from error
        _prune(root, kept)
    notes = json.loads((kept / "notes.json").read_text())
    return Reference(
        log_probs=np.load(kept / "log_probs.npy", mmap_mode="r"),
        text_log_probs=np.load(kept / "text_log_probs.npy"),
        top1=np.load(kept / "top1.npy"),
        greedy=notes["greedy"],
        software=notes["software"],
    )


def _run(
    checkpoint: Path, ids: np.ndarray, prompts: list[list[int]], greedy_tokens: int, work: Path, stages: Stages
) -> None:
    """The pass itself; leaves its files in `work`."""
    transformers = _transformers()
    import torch

    with stages("load reference", None):
        model = load_model(checkpoint)
    chunks, tokens = ids.shape
    half = tokens // 2
    rows = tokens - half - 1
    shape = (chunks, rows, model.config.vocab_size)
    text_log_probs, top1 = np.empty(shape[:2], np.float32), np.empty(shape[:2], np.int32)
    with torch.inference_mode(), (work / "log_probs.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        with stages("reference", chunks) as advance:
            for i, chunk in enumerate(ids):
                logits = model(torch.from_numpy(chunk)[None], use_cache=False, logits_to_keep=rows + 1).logits[0, :-1]
                log_probs = torch.log_softmax(logits, -1)
                text_log_probs[i] = log_probs.gather(1, torch.from_numpy(chunk[half + 1 :, None]))[:, 0].numpy()
                top1[i] = log_probs.argmax(-1).numpy()
                file.write(log_probs.half().numpy().tobytes())
                advance(1)
        with stages("reference answers", len(prompts)) as advance:
            greedy = []
            for prompt in prompts:
                greedy.append(_greedy(model, prompt, greedy_tokens, eos_ids(checkpoint)))
                advance(1)
    np.save(work / "text_log_probs.npy", text_log_probs)
    np.save(work / "top1.npy", top1)
    software = {"transformers": transformers.__version__, "torch": torch.__version__}
    (work / "notes.json").write_text(json.dumps({"greedy": greedy, "software": software}))


def load_model(checkpoint: Path) -> Any:
    """The checkpoint in float32, as a model of transformers.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        CheckpointError: transformers cannot load the checkpoint.
        UsageError: the weights in float32 do not fit into this machine's free memory.
    """
    _transformers()
    _check_memory(checkpoint)
    try:
        return _load(checkpoint).eval()
    except Phi3EdgeError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"transformers cannot load {checkpoint.name}: {_one_line(error)}") from error


def _load(checkpoint: Path) -> Any:
    """The model in float32; what its checkpoint stores as integers is dequantized first, as transformers needs it."""
    transformers = _transformers()
    import torch

    local = {"trust_remote_code": False, "local_files_only": True}
    if not _is_prequantized(checkpoint):
        load = transformers.AutoModelForCausalLM.from_pretrained
        return load(checkpoint, dtype=torch.float32, use_safetensors=True, **local)
    with open_checkpoint(checkpoint) as stored:
        spec = parse_config(stored.config, stored.generation_config, stored.name)
        stored.check(spec)
        weights = {tensor.name: torch.from_numpy(stored.read(tensor.name)) for tensor in spec.tensors}
    config = transformers.AutoConfig.from_pretrained(checkpoint, **local)
    del config.quantization_config
    model = getattr(transformers, config.architectures[0])
    return model.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)


def _is_prequantized(checkpoint: Path) -> bool:
    return _config(checkpoint, "config.json").get(prequantized.KEY) is not None


def _greedy(model: Any, prompt: list[int], max_tokens: int, stop: Iterable[int]) -> list[int]:
    """The plain most likely continuation: `generate` would apply the penalties of generation_config.json."""
    import torch

    out: list[int] = []
    feed, past = torch.tensor([prompt]), None
    while len(out) < max_tokens:
        step = model(feed, past_key_values=past, use_cache=True, logits_to_keep=1)
        token = int(step.logits[0, -1].argmax())
        if token in stop:
            break
        out.append(token)
        feed, past = torch.tensor([[token]]), step.past_key_values
    return out


def _key(checkpoint: Path, ids: np.ndarray, prompts: list[list[int]], greedy_tokens: int) -> str:
    """Names a pass by all that it depends on."""
    digest = hashlib.sha256()
    for part in (_FORMAT, _transformers().__version__, ids.shape, prompts, greedy_tokens, eos_ids(checkpoint)):
        digest.update(repr(part).encode() + b"\0")
    digest.update(ids.tobytes())
    digest.update(fingerprint(checkpoint).encode())
    return digest.hexdigest()[:32]


def fingerprint(checkpoint: Path) -> str:
    """Tells a checkpoint's function from another's: config.json, and the weight files' headers, sizes and samples.

    Times of change count too, but alone they are not enough: archives and image layers set them all alike, and
    fine-tunes share headers and sizes.
    """
    digest = hashlib.sha256((checkpoint / "config.json").read_bytes())
    for shard in sorted(checkpoint.glob("*.safetensors")):
        status = shard.stat()
        digest.update(f"{shard.name} {status.st_size} {status.st_mtime_ns}".encode())
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            digest.update(file.read(min(length, status.st_size)))
            for at in range(0, status.st_size, max(status.st_size // _SAMPLES, _SAMPLE_BYTES)):
                file.seek(at)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _prune(root: Path, newest: Path) -> None:
    """Deletes the oldest passes until the rest take at most CACHE_BYTES."""
    found = []
    for folder in root.iterdir():
        if folder.name.startswith(".pass-"):  # one that another process is at work on
            continue
        with contextlib.suppress(OSError):  # another process may have deleted it, or it is no folder
            taken = sum(file.stat().st_size for file in folder.iterdir())
            found.append((folder != newest, -folder.stat().st_mtime, folder, taken))
    room = CACHE_BYTES
    for is_old, _, folder, taken in sorted(found):
        room -= taken
        if room < 0 and is_old:
            shutil.rmtree(folder, ignore_errors=True)


def _check_memory(checkpoint: Path) -> None:
    """Refuses at once what the kernel would kill minutes later; 2-byte weights take twice their file in float32."""
    free = machine.free_memory()
    if free is None:
        return
    config = _config(checkpoint, "config.json")
    growth = 1 if "float32" in (config.get("dtype"), config.get("torch_dtype")) else 2
    needed = growth * sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    if _is_prequantized(checkpoint):
        needed = 4 * parse_config(config, None, checkpoint.name).parameters
    if needed > free:
        raise UsageError(
            f"the float32 reference of {checkpoint.name} needs about {size(needed)} of memory, {size(free)} are free",
            "validate on a machine with more memory, or export with --no-validate",
        )


def require_reference() -> None:
    """Raise MissingExtraError unless the reference can run; imports nothing."""
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        raise MissingExtraError("the float32 reference", "reference")


def _transformers() -> Any:
    # before torch loads OpenMP: threads that spin while they wait slow it several times on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError:
        raise MissingExtraError("the float32 reference", "reference") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
