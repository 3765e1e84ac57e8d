"""ONNX Runtime GenAI: runs its folders on the CPU.

Folders made for another execution provider run here too, on the CPU's kernels, and `info()` says so. The thread count
and the log level are set for a run; the folder is not changed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from phi3edge import manifest
from phi3edge.errors import MissingExtraError, RunnerError, UsageError
from phi3edge.genai_folder import GenAIFolder, is_genai, read_folder
from phi3edge.machine import free_memory, usable_cores
from phi3edge.onnx_file import ONNXModel, ONNXTensor
from phi3edge.runners import Runner, Traffic, shared_length
from phi3edge.runners._memory import peak_memory
from phi3edge.runners._timing import samples
from phi3edge.units import size

RUNTIME = "ONNX Runtime GenAI"
HEEDS_WINDOW = True  # as the CPU provider does, which runs here
SPINNING = "session.intra_op.allow_spinning"
"""Threads that spin while they wait slow a busy machine many times: off, unless the folder sets it."""

PACKAGE = "onnxruntime-genai"

_BATCH = 512  # tokens per run of the graph: bounds its logits, which come for every token
_ROWS = 64  # rows of logits per message
_BROKEN = "\ufffd"  # what the library writes for bytes that are no character
_MOST_BYTES = 4  # of a character in UTF-8
_ROW_INPUTS = {
    "Gather": {0},
    "com.microsoft.GatherBlockQuantized": {0, 2, 3},
    "com.microsoft.GroupQueryAttention": {7, 8},
    "com.microsoft.RotaryEmbedding": {2, 3},
    "com.microsoft.SparseAttention": {9, 10},
}
"""Inputs of which a node reads one row for one token: embeddings, cosines and sines. Source: onnx/docs/Operators.md,
onnxruntime/docs/ContribOperators.md."""

_BY_LENGTH = {"If", "Greater", "GreaterOrEqual"}  # operators by which a LongRoPE graph chooses factors for a length
_NOISE = re.compile(  # where in the library's source it failed, and on what condition
    r"Load model from .*?\.onnx failed: ?|/\S+\.(?:cc|h):\d+ .*?\) (?:\[with [^\]]*\] )?(?:[^.]* was false\. )?"
)
_HINTS = {
    r"[Bb]ad.alloc|[Cc]ould not allocate|[Ff]ailed to allocate|[Oo]ut of memory": (
        "is memory short? a smaller context needs less"
    ),
    r"Could not find an implementation": (
        "the CPU has no kernel for it in {installed}: a folder for another provider runs on that provider's devices"
    ),
    r"not a registered function|No Op registered|[Oo]pset|IR version|attribute": (
        "it may need a newer runtime than {installed}: pip install --upgrade onnxruntime-genai onnxruntime"
    ),
    r"JSON Error|model_type": (
        "genai_config.json is damaged, or for a newer runtime than {installed}: pip install --upgrade onnxruntime-genai"
    ),
}


def accepts(artifact: Path) -> bool:
    """Whether this runtime runs such an artifact: a folder with genai_config.json, or the ONNX model in it."""
    return is_genai(artifact)


def files(artifact: Path) -> list[Path]:
    """The files that hold the model: graph and weights. Configuration and tokenizer are not counted."""
    found = read_folder(artifact)
    return [found.model_file, *found.data_files]


def open(
    artifact: Path,
    *,
    context: int,
    threads: int | None = None,
    kv_type: str | None = None,
    plain: bool = False,
    vocab_only: bool = False,
    batch: int | None = _BATCH,
    micro_batch: int | None = None,
    spinning: bool = False,
    timeout: float = 600,
) -> Runner:
    """Opens a folder in a child process.

    Args:
        artifact: the folder, or the ONNX model in it.
        context: number of tokens the KV cache holds.
        threads: None for one per usable core.
        kv_type: has no effect: the graph fixes the KV cache's type, which `info()` tells.
        plain: threads that wait for work sleep. The runtime lets them spin, which decodes faster on an idle machine and
            several times slower beside another busy process. Figures are the same: the graph fixes what is computed.
        vocab_only: read the vocabulary only; then nothing but `info` and `tokenize` works.
        batch: most tokens of a prompt per run of the graph; None for the whole prompt, as the runtime has it.
        micro_batch: must be None: the runtime has none.
        spinning: has no effect: see `plain`.
        timeout: seconds that one answer may take.

    Raises:
        MissingExtraError: onnxruntime-genai is not installed.
        UsageError: more context than the model has positions for, or a micro-batch.
        CheckpointError, UnsupportedError, OutputError: a folder that is not whole, or not safe; see `read_folder`.
        RunnerError: a runtime that is too old or does not start, or too little memory for the context.
    """
    require_runtime()
    if micro_batch is not None:
        raise UsageError(f"{RUNTIME} has no micro-batches", "leave --micro-batch out; --batch is tokens per run")
    found = read_folder(artifact)
    if context > (most := found.config["model"]["context_length"]):
        raise UsageError(f"{artifact} has {most} positions, a context of {context} was wanted", "give it less context")
    _require_version(found)
    if not vocab_only:
        _require_memory(found, context)
    options = {
        "folder": str(found.folder.resolve()),
        "context": context,
        "threads": threads or usable_cores(),
        "plain": plain,
        "vocab_only": vocab_only,
        "batch": batch,
    }
    return Runner("ort_genai", RUNTIME, artifact, options, timeout, spinning)


def traffic(artifact: Path, kv_type: str | None = None) -> Traffic:
    """What decoding one token reads: every tensor, but of one that only such nodes read as take a row, one row.

    Args:
        artifact: the folder, or the ONNX model in it.
        kv_type: has no effect: the graph fixes the KV cache's type.

    Raises:
        CheckpointError, UnsupportedError, OutputError: see `read_folder`.
    """
    found = read_folder(artifact)
    rows = _read_by_row(found.model)

    def read(tensor: ONNXTensor) -> float:
        return tensor.nbytes / tensor.shape[0] if tensor.name in rows and tensor.shape else tensor.nbytes

    return Traffic(round(sum(map(read, found.model.tensors))), found.kv_bytes(1))


def _read_by_row(model: ONNXModel) -> set[str]:
    """Names of the values that nodes read by row only."""
    stored = {output: node.inputs[0] for node in model.nodes if node.operator == "Cast" for output in node.outputs}
    by_row: set[str] = set()
    whole: set[str] = set()
    for node in model.nodes:
        if node.operator == "Cast":  # folded when the model is loaded
            continue
        for i, name in enumerate(node.inputs):
            (by_row if i in _ROW_INPUTS.get(node.operator, ()) else whole).add(stored.get(name, name))
    return by_row - whole


def require_runtime() -> None:
    """Raise MissingExtraError unless onnxruntime-genai is installed; imports nothing."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise MissingExtraError("running ONNX Runtime GenAI folders", "onnx")


def probe() -> dict[str, Any]:
    """Runs a tiny quantized model.

    Returns:
        version, threads and provider.

    Raises:
        MissingExtraError: onnxruntime-genai, or onnx, which writes the model, is not installed.
        RunnerError: it does not start, crashes, hangs, or computes no numbers.
    """
    require_runtime()
    try:
        from phi3edge.runners import _tiny_onnx
    except ImportError:
        raise MissingExtraError("trying ONNX Runtime GenAI", "onnx") from None
    with tempfile.TemporaryDirectory() as folder:
        _tiny_onnx.write(Path(folder))
        with open(Path(folder), context=64, timeout=60) as runner:
            if not np.isfinite(runner.logits(np.arange(48))).all():
                raise RunnerError(f"{RUNTIME} computes NaN or infinite logits from finite weights")
            return {key: runner.info()[key] for key in ("version", "threads", "provider")}


def _require_memory(found: GenAIFolder, context: int) -> None:
    """Refuse what the runtime would fill with zeros until the machine stands still."""
    weights = sum(path.stat().st_size for path in (found.model_file, *found.data_files))
    free, cache = free_memory(), found.kv_bytes(context)
    if free is not None and weights + cache > free:
        raise RunnerError(
            f"{found.folder.name} needs {size(weights)} for its weights and {size(cache)} for a KV cache of {context} "
            f"tokens; {size(free)} of memory are free",
            "give it less context, or more memory",
        )


def _require_version(found: GenAIFolder) -> None:
    """Hold what the manifest requires, `>=` a version, against what is installed."""
    if not (found.folder / manifest.NAME).is_file():
        return
    for package, wanted in manifest.read_manifest(found.folder).get("requires", {}).items():
        least = re.fullmatch(r"(?:>=)?\s*([0-9.]+)", wanted)
        if least is None:
            raise RunnerError(f"{found.folder} requires {package} {wanted!r}, expected >= and a version")
        try:
            have = metadata.version(package)
        except metadata.PackageNotFoundError:
            have = "0 (none)"
        if _numbers(have) < _numbers(least[1]):
            raise RunnerError(
                f"{found.folder} needs {package} {least[1]} or newer, {have} is installed",
                f"pip install --upgrade '{package}>={least[1]}'",
            )


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3]]


class Session:
    """A loaded model and its KV cache; lives in the child process. The methods are those of `Runner`."""

    def __init__(
        self, folder: str, context: int, threads: int, plain: bool, vocab_only: bool, batch: int | None = _BATCH
    ) -> None:
        import onnxruntime_genai as lib

        self._lib = lib
        self._found = read_folder(Path(folder))
        self._size, self._eog = self._found.vocabulary_size, self._found.eog_ids
        self._context, self._threads = context, threads
        self._spinning = self._found.session_options.get(SPINNING, "0" if plain else "1")
        self._by_length = not _BY_LENGTH.isdisjoint(self._found.model.operators)
        self._batch = (
            batch if batch and not self._by_length else context
        )  # in pieces, the first would be rotated by other factors
        self._held: list[int] = []  # tokens of prompts in the context
        started = time.perf_counter()
        with _explained(f"cannot open {Path(folder).name}"):
            self._config = lib.Config(folder)
            self._config.clear_providers()
            self._config.overlay(json.dumps(self._overlay()))
            self._model = None if vocab_only else lib.Model(self._config)
        self._generator: Any = None
        self._endless = False
        self._random = np.random.default_rng(0)
        self._kept = 0  # tokens in the context that `start` put there
        self._tokenizer: Any = None
        if self._model:
            self._clear()
        self._load_s = time.perf_counter() - started

    def _overlay(self) -> dict[str, Any]:
        """What a run sets over genai_config.json: this machine's threads, and greedy search without any penalty."""
        session = {"intra_op_num_threads": self._threads, "log_severity_level": 4, SPINNING: self._spinning}
        search = {"max_length": self._context, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
        penalties = {"min_length": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        return {"model": {"decoder": {"session_options": session}}, "search": search | penalties}

    def info(self) -> dict[str, Any]:
        """What runs it and how."""
        providers = self._found.providers
        return {
            "runtime": RUNTIME,
            "version": ", ".join(f"{p} {metadata.version(p)}" for p in (PACKAGE, "onnxruntime")),
            "threads": self._threads,
            "context": self._context,
            "kv_type": self._found.kv_type,
            "batch": self._batch,
            "model_type": self._found.config["model"]["type"],
            "model_bytes": sum(tensor.nbytes for tensor in self._found.model.tensors),
            "provider": f"cpu (made for {', '.join(providers)})" if providers else "cpu",
            "spinning": "off" if self._spinning == "0" else "on",
            "vocabulary_size": self._size,
            "eog_ids": self._eog,
            "chat_template": self._found.chat_template,
            "load_s": self._load_s,
        }

    def logits(self, ids: np.ndarray, start: int, reuse: bool = False) -> Iterator[np.ndarray]:
        """Rows of logits from position `start` on, in blocks."""
        for first in range(self._begin(ids.tolist(), start if reuse else 0), len(ids), self._batch):
            piece = ids[first : first + self._batch]
            self._append(piece)
            rows = self._generator.get_output(self._found.logits.name)[0, max(start - first, 0) :]
            for row in range(0, len(rows), _ROWS):
                yield rows[row : row + _ROWS].astype(np.float32)

    def generate(self, ids: list[int], max_tokens: int, reuse: bool = False) -> list[int]:
        """Greedy continuation."""
        begin = self._begin(ids, len(ids) - 1 if reuse else 0)
        out: list[int] = []
        while len(out) < max_tokens:
            token = self._next() if out else self._prompt(ids, begin)
            if token in self._eog:
                break
            out.append(token)
        return out

    def tokenize(self, text: str, special: bool, bos: bool) -> list[int]:
        """Token ids of a text; without `special`, only for a text that holds no special token."""
        with _explained("cannot tokenize"):
            tokenizer = self._open_tokenizer()
            tokenizer.update_options(add_special_tokens="true" if bos else "false")
            ids = tokenizer.encode(text).tolist()
        if not special and (found := self._found.special_ids.intersection(ids[1:] if bos else ids)):
            raise RunnerError(f"{RUNTIME} always reads special tokens, and the text holds {sorted(found)}")
        return ids

    def detokenize(self, ids: list[int]) -> str:
        """The text of token ids; the library leaves out all that follows bytes that are no character."""
        before = ""
        while (text := self._decode(ids)).endswith(_BROKEN):
            clean = len(text.rstrip(_BROKEN))
            ends = range(len(ids))
            at = bisect_left(ends, clean, key=lambda end: len(self._decode(ids[:end]).rstrip(_BROKEN)))
            rest = ids[at + 1 :]
            if len(rest) < _MOST_BYTES - 1 and (not rest or self._decode(rest).startswith(_BROKEN)):
                break  # a character that may still become whole
            before, ids = before + text[:clean] + _BROKEN, rest
        return before + text

    def _decode(self, ids: list[int]) -> str:
        with _explained("cannot detokenize"):
            return str(self._open_tokenizer().decode(np.array(ids, np.int32)))

    def chat(self, messages: list[dict[str, str]]) -> str:
        """A chat by the folder's template and the runtime's engine."""
        with _explained("cannot render the chat template"):
            return str(self._open_tokenizer().apply_chat_template(json.dumps(messages), add_generation_prompt=True))

    def samples(self, **work: Any) -> Iterator[np.ndarray]:
        """Timings; see `_timing.samples`."""
        return samples(self, **work)

    def start(self, depth: int, decoding: bool) -> None:
        """Makes the context hold `depth` random tokens; those of the last time stay. To decode, it takes one more."""
        if depth and depth == self._kept:
            self._generator.rewind_to(depth)
        else:
            self._clear(endless=True)
            self.feed(depth)
        self._kept = depth
        if decoding:
            self.feed(1)
            self.choose()

    def feed(self, count: int) -> None:
        """Evaluates random tokens."""
        ids = self._random.integers(0, self._size, count)
        for first in range(0, count, self._batch):
            self._append(ids[first : first + self._batch])

    def choose(self) -> None:
        """The most likely token after those fed."""
        self._next()

    def step(self) -> None:
        """Evaluates the token chosen last, and chooses the next: one call of the library, as its benchmark has it."""
        self._next()

    def peak_memory(self) -> int | None:
        """Highest resident memory so far, in bytes."""
        return peak_memory()

    def _open_tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = self._lib.Tokenizer(self._config)
        return self._tokenizer

    def _clear(self, endless: bool = False) -> None:
        """Starts from an empty context; `endless` goes on past the end of generation."""
        if self._model is None:
            raise RunnerError("the model was opened for its vocabulary only")
        with _explained(f"cannot make a context of {self._context} tokens"):
            if self._generator is None or self._endless is not endless:
                self._generator = None  # its KV cache goes before the next one comes
                params = self._lib.GeneratorParams(self._model)
                params.set_search_options(min_length=self._context if endless else 0)
                self._generator, self._endless = self._lib.Generator(self._model, params), endless
            self._generator.rewind_to(0)
            self._held = []
        self._kept = 0

    def _begin(self, ids: list[int], most: int) -> int:
        """Empties the context but for at most `most` tokens that `ids` begins with, too; how many stay."""
        kept = 0 if self._endless else shared_length(self._held[: max(most, 0)], ids)
        if self._by_length and not kept == len(self._held) == len(ids) - 1:
            kept = 0  # its keys are rotated for the length they came with: only a token more is as in generating
        if not kept:
            self._clear()
            return 0
        with _explained(f"cannot go back to token {kept}"):
            self._generator.rewind_to(kept)
        del self._held[kept:]
        return kept

    def _prompt(self, ids: list[int], begin: int = 0) -> int:
        """Evaluates a prompt of which the context holds `begin` tokens; the most likely next token."""
        if not ids:
            raise RunnerError("an empty prompt has no continuation")
        for first in range(begin, len(ids), self._batch):
            self._append(np.array(ids[first : first + self._batch]))
        return self._next()

    def _next(self) -> int:
        """The most likely token after those so far; runs the graph on the last one if that was not done yet."""
        self._require_room(1)
        with _explained("failed to generate a token"):
            self._generator.generate_next_token()
            return int(self._generator.get_next_tokens()[0])

    def _append(self, ids: np.ndarray) -> None:
        self._require_room(len(ids))
        if ids.min() < 0 or ids.max() >= self._size:
            raise RunnerError(f"a token id is not in the artifact's vocabulary of {self._size}")
        with _explained("failed to compute logits"):
            self._generator.append_tokens(ids.astype(np.int32))
        self._held.extend(ids.tolist())

    def _require_room(self, count: int) -> None:
        if (wanted := self._generator.token_count() + count) > self._context:
            raise RunnerError(f"{wanted} tokens do not fit into a context of {self._context}")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Makes an exception of the library an error of one line, with what helps where that is known."""
    try:
        yield
    except Exception as error:  # RuntimeError, MemoryError, and what the binding makes of others
        cause = _NOISE.sub("", re.sub(r"\s+", " ", str(error))).strip() or type(error).__name__
        installed = f"{PACKAGE} {metadata.version(PACKAGE)}, onnxruntime {metadata.version('onnxruntime')}"
        hint = next((text for pattern, text in _HINTS.items() if re.search(pattern, cause)), None)
        raise RunnerError(f"{RUNTIME} {what}: {cause[:300]}", hint and hint.format(installed=installed)) from None
