"""What an artifact is held against: the checkpoint itself in float32, through transformers or our own code (OWN).

The reference's figures of the scored positions are kept in the cache, so that a second artifact of the same checkpoint
costs no second pass: log-probabilities of the text's own tokens exactly (float32), and the distributions as
phi3edge.distributions keeps them, in 1 kB a token.
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
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from phi3edge import __version__, machine, prequantized
from phi3edge.cache import cache_dir
from phi3edge.checkpoint import open_checkpoint
from phi3edge.distributions import DRAWN, TOP, Distributions, Keeper, open_kept
from phi3edge.errors import CheckpointError, MissingExtraError, OutputError, Phi3EdgeError, UsageError
from phi3edge.families import parse_config
from phi3edge.hf_config import readable_config
from phi3edge.hf_tokenizer import load_hf_tokenizer
from phi3edge.progress import Advance, Stages, silent
from phi3edge.types import JSON
from phi3edge.units import size

CACHE_BYTES = 10**9
"""What kept passes may take on disk; the oldest go first. The newest stays whatever its size."""

OWN = {
    "phimoe": "transformers forgets LongRoPE's long factors",
    "phi3small": "transformers has none, and the repository's code needs flash-attn and triton",
}
"""Families that phi3edge computes itself, and why."""

SHARED = "shared.npy"

_FORMAT = "3"  # of the kept files
_SAMPLES, _SAMPLE_BYTES = 256, 4096  # of each weight file, evenly spaced, to tell one model's from another's


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the reference is asked for.

    Attributes:
        chunks: windows of the text, int64, shape (chunks, tokens).
        first: the first position of each whose prediction is scored; the last position's is not.
        prompts: token ids to continue greedily.
        greedy_tokens: at most so many tokens each.
        long: sequences, each int64 of shape (tokens,), and the positions of each whose predictions are scored.
    """

    chunks: np.ndarray
    first: int
    prompts: list[list[int]]
    greedy_tokens: int
    long: list[tuple[np.ndarray, list[int]]]

    @property
    def rows(self) -> int:
        """Positions scored in each chunk."""
        return self.chunks.shape[1] - self.first - 1


@dataclass(frozen=True, slots=True)
class Reference:
    """Figures of the scored rows.

    Attributes:
        distributions: of the chunks, shape (chunks, rows), memory maps.
        text_log_probs: float32, shape (chunks, rows): log-probability of the token that the text goes on with.
        shared: of a mixture of experts: whether a weight of the row's token is not 1, since another expert's score is
            near that of a chosen one; bool, shape (chunks, rows). None for other models.
        long: distributions at the positions of each long sequence, shape (positions,).
        greedy: the most likely continuation of each prompt, without the end-of-generation token.
        ended: whether an end-of-generation token came after it.
        software: name and version of what computed it.
    """

    distributions: Distributions
    text_log_probs: np.ndarray
    shared: np.ndarray | None
    long: list[Distributions]
    greedy: list[list[int]]
    ended: list[bool]
    software: dict[str, str]


def load_tokenizer(checkpoint: Path) -> Any:
    """The checkpoint's own tokenizer, as transformers reads it.

    Raises:
        MissingExtraError: transformers is not installed.
        CheckpointError: the folder has no tokenizer that transformers can read.
    """
    _transformers()
    try:
        return load_hf_tokenizer(checkpoint)
    except Phi3EdgeError:
        raise
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


def reference_pass(checkpoint: Path, wanted: Wanted, stages: Stages = silent) -> Reference:
    """Runs the checkpoint over a text and prompts, or gives back what an earlier run kept.

    Args:
        checkpoint: folder in Hugging Face layout.
        wanted: what of.
        stages: shows progress.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        CheckpointError: transformers cannot load the checkpoint.
        UsageError: the weights do not fit into the free memory, and stand in the files as integers.
        OutputError: no space for the cache.
    """
    root = cache_dir() / "reference"
    kept = root / _key(checkpoint, wanted)
    if not kept.is_dir():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=".pass-", ignore_cleanup_errors=True) as work:
                _run(checkpoint, wanted, Path(work), stages)
                if not kept.is_dir():  # else another process was faster
                    Path(work).rename(kept)
        except OSError as error:
            raise OutputError(
                f"cannot keep the reference pass in {root}: {error.strerror}", "PHI3EDGE_CACHE names another folder"
            ) from error
        _prune(root, kept)
    notes = json.loads((kept / "notes.json").read_text())
    return Reference(
        distributions=open_kept(kept),
        text_log_probs=np.load(kept / "text_log_probs.npy"),
        shared=np.load(kept / SHARED) if (kept / SHARED).exists() else None,
        long=[open_kept(kept / f"long-{n}")[0] for n in range(len(wanted.long))],
        greedy=notes["greedy"],
        ended=notes["ended"],
        software=notes["software"],
    )


def _run(checkpoint: Path, wanted: Wanted, work: Path, stages: Stages) -> None:
    """The pass itself; leaves its files in `work`."""
    transformers = _transformers()
    import torch

    own, mixture = model_type(checkpoint) in OWN, model_type(checkpoint) == "phimoe"
    in_files = stays_in_files(checkpoint)
    with stages(loading(checkpoint), None):
        model = load_model(checkpoint)
    vocabulary, shape = model.config.vocab_size, (len(wanted.chunks), wanted.rows)
    text_log_probs, shared = np.empty(shape, np.float32), np.zeros(shape, bool)
    with torch.inference_mode():
        with Keeper(work, shape, vocabulary) as keeper, stages("reference", len(wanted.chunks)) as advance:
            for i, chunk in enumerate(wanted.chunks):
                ids = torch.from_numpy(chunk)
                given = model(ids[None], use_cache=False, logits_to_keep=wanted.rows + 1)
                log_probs = torch.log_softmax(given.logits[0, :-1], -1)
                if mixture:
                    shared[i] = given.shared[0, wanted.first : -1].numpy()
                text_log_probs[i] = log_probs.gather(1, ids[wanted.first + 1 :, None])[:, 0].numpy()
                keeper.add(log_probs.numpy())
                advance(1)
        for n, (tokens, positions) in enumerate(wanted.long):
            folder = work / f"long-{n}"
            folder.mkdir()
            with (
                Keeper(folder, (1, len(positions)), vocabulary) as keeper,
                stages(f"reference, {len(tokens)} tokens", None),
            ):
                ids, rows = torch.from_numpy(tokens), torch.tensor(positions)
                logits = model(ids[None], use_cache=False, logits_to_keep=rows).logits[0]
                keeper.add(torch.log_softmax(logits, -1).numpy())
        # side by side where each step reads all weights anew; one by one is faster where it does not, and needed where
        # the longest sequence would decide about the others' rotary factors
        original = getattr(model.config, "original_max_position_embeddings", None)
        longest = max(map(len, wanted.prompts), default=0) + wanted.greedy_tokens
        together = in_files and not own and 0 < longest <= (original or model.config.max_position_embeddings)
        batches = [wanted.prompts] if together else [[prompt] for prompt in wanted.prompts]
        answers = []
        with stages("reference answers", len(batches) * (wanted.greedy_tokens + 1)) as advance:
            for prompts in batches:
                answers += _greedy(model, prompts, wanted.greedy_tokens, eos_ids(checkpoint), advance)
    np.save(work / "text_log_probs.npy", text_log_probs)
    if mixture:
        np.save(work / SHARED, shared)
    by = ("phi3edge", __version__) if own else ("transformers", transformers.__version__)
    software = dict([by, ("torch", torch.__version__)])
    notes = {"greedy": [a for a, _ in answers], "ended": [ended for _, ended in answers], "software": software}
    (work / "notes.json").write_text(json.dumps(notes))


def model_type(checkpoint: Path) -> str | None:
    """What config.json says."""
    return _config(checkpoint, "config.json").get("model_type")


def load_model(checkpoint: Path) -> Any:
    """The checkpoint in float32, as a model of transformers, or of ours that is called alike.

    Weights that do not fit into the free memory stay in their files and are widened when they are used: the same
    numbers, more slowly.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        CheckpointError: transformers cannot load the checkpoint.
        UsageError: the weights do not fit, and stand in the files as integers.
    """
    _transformers()
    if model_type(checkpoint) in OWN:
        if model_type(checkpoint) == "phimoe":
            from phi3edge.mixture import load_mixture

            return load_mixture(checkpoint)
        from phi3edge.phi3small import load_phi3small

        return load_phi3small(checkpoint)
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
    config = readable_config(checkpoint) or transformers.AutoConfig.from_pretrained(checkpoint, **local)
    if not _is_prequantized(checkpoint):
        load = transformers.AutoModelForCausalLM.from_pretrained
        if stays_in_files(checkpoint):
            from phi3edge.stored import load_stored

            return load_stored(checkpoint, config)
        return load(checkpoint, config=config, dtype=torch.float32, use_safetensors=True, **local)
    _require_memory(checkpoint)
    with open_checkpoint(checkpoint) as stored:
        spec = parse_config(stored.config, stored.generation_config, stored.name)
        stored.check(spec)
        weights = {tensor.name: torch.from_numpy(stored.read(tensor.name)) for tensor in spec.tensors}
    del config.quantization_config
    model = getattr(transformers, config.architectures[0])
    return model.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)


def _is_prequantized(checkpoint: Path) -> bool:
    return _config(checkpoint, "config.json").get(prequantized.KEY) is not None


def _greedy(
    model: Any, prompts: list[list[int]], most: int, stop: Iterable[int], advance: Advance = lambda units: None
) -> list[tuple[list[int], bool]]:
    """The plain most likely continuations of at most so many tokens, and whether each ended.

    transformers' `generate` would apply generation_config.json. Several prompts are padded on the left, which
    transformers masks; our own models take one at a time. `advance` hears of each step.
    """
    import torch

    widest, padded = max(map(len, prompts)), {}
    feed = torch.tensor([[0] * (widest - len(prompt)) + prompt for prompt in prompts])
    if len(prompts) > 1:
        mask = torch.tensor([[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        padded = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    found: list[list[int]] = [[] for _ in prompts]
    ended, past = [False] * len(prompts), None
    for n in range(most + 1):
        step = model(feed, past_key_values=past, use_cache=True, logits_to_keep=1, **padded)
        advance(1)
        chosen = step.logits[:, -1].argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            ended[row] = ended[row] or token in stop
            if not ended[row] and n < most:
                found[row].append(token)
        if all(ended):
            advance(most - n)
            break
        feed, past = chosen[:, None], step.past_key_values
        if padded:
            mask = torch.cat([mask, torch.ones_like(feed)], 1)
            padded = {"attention_mask": mask, "position_ids": padded["position_ids"][:, -1:] + 1}
    return list(zip(found, ended, strict=True))


def _key(checkpoint: Path, wanted: Wanted) -> str:
    """Names a pass by all that it depends on."""
    digest = hashlib.sha256()
    long = [(len(ids), positions) for ids, positions in wanted.long]
    parts = (wanted.chunks.shape, wanted.first, wanted.prompts, wanted.greedy_tokens, long)
    for part in (_FORMAT, TOP, DRAWN, _transformers().__version__, *parts, eos_ids(checkpoint)):
        digest.update(repr(part).encode() + b"\0")
    digest.update(wanted.chunks.tobytes())
    for ids, _ in wanted.long:
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
            taken = sum(file.stat().st_size for file in folder.rglob("*"))
            found.append((folder != newest, -folder.stat().st_mtime, folder, taken))
    room = CACHE_BYTES
    for is_old, _, folder, taken in sorted(found):
        room -= taken
        if room < 0 and is_old:
            shutil.rmtree(folder, ignore_errors=True)


def stays_in_files(checkpoint: Path) -> bool:
    """Whether the reference reads its weights as it computes: those that do not fit into the free memory in float32."""
    return not _is_prequantized(checkpoint) and not machine.holds(_bytes(checkpoint))


def loading(checkpoint: Path) -> str:
    """What to call the loading of the reference, before it is loaded."""
    if not stays_in_files(checkpoint):
        return "load reference"
    return f"open reference: {size(_bytes(checkpoint))} would fill the free memory, so each step reads its files"


def _bytes(checkpoint: Path) -> int:
    """Of all weights in float32."""
    if _is_prequantized(checkpoint):
        return 4 * parse_config(_config(checkpoint, "config.json"), None, checkpoint.name).parameters
    with open_checkpoint(checkpoint) as stored:
        return 4 * sum(prod(stored.info(name)[1]) for name in stored.names)


def _require_memory(checkpoint: Path) -> None:
    """Refuses at once what the kernel would kill minutes later."""
    free, needed = machine.free_memory(), _bytes(checkpoint)
    if free is not None and needed > free:
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
