"""llama.cpp, through llama-cpp-python's low-level API: runs GGUF files on the CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phi3edge.errors import MissingExtraError, RunnerError, UsageError
from phi3edge.gguf_file import GGUFTensor, read_header
from phi3edge.machine import usable_cores
from phi3edge.runners import Runner, Traffic, _tiny_gguf, shared_length
from phi3edge.runners._memory import peak_memory
from phi3edge.runners._timing import samples

RUNTIME = "llama.cpp"
HEEDS_WINDOW = False  # it has that switched off for phi3 (src/models/phi3.cpp)
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}  # ggml's numbers of the types a KV cache can have

KV_BYTES = {"f32": 4.0, "f16": 2.0, "q4_0": 18 / 32, "q8_0": 34 / 32}
"""Bytes of one number in a KV cache."""

_BATCH = 512  # tokens per llama_decode: bounds the logits that are asked for at once
_LIBRARY_BATCH, _LIBRARY_MICRO_BATCH = 2048, 512  # the library's defaults, and llama-bench's
_ROWS = 64  # rows of logits per message
_SPLIT = re.compile(r"(.*)-00001-of-(\d{5})\.gguf")


def accepts(artifact: Path) -> bool:
    """Whether this runtime runs such an artifact."""
    return artifact.suffix == ".gguf"


def files(artifact: Path) -> list[Path]:
    """All files of the artifact: the file itself, or every part of a split one whose first part is given."""
    match = _SPLIT.fullmatch(artifact.name)
    if not match:
        return [artifact]
    count = int(match[2])
    return [artifact.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def open(
    artifact: Path,
    *,
    context: int,
    threads: int | None = None,
    kv_type: str = "f16",
    plain: bool = False,
    vocab_only: bool = False,
    batch: int | None = _BATCH,
    micro_batch: int | None = None,
    spinning: bool = False,
    timeout: float = 600,
) -> Runner:
    """Opens a GGUF file in a child process.

    Args:
        artifact: the file, or the first part of a split one.
        context: number of tokens the KV cache holds.
        threads: None for one per usable core.
        kv_type: one of KV_TYPES.
        plain: no repacked weights and no flash attention (which a quantized KV cache needs): slower kernels, but the
            figures depend less on the CPU. KL moves by a few percent from one to the other.
        vocab_only: read the vocabulary only; then nothing but `info` and `tokenize` works.
        batch: most tokens of a prompt given to the library at once (n_batch); None for its own default.
        micro_batch: most tokens computed at once (n_ubatch); None for its own default.
        spinning: threads that wait for each other spin, as the library has it: faster, unless something else runs.
        timeout: seconds that one answer may take.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        UsageError: unknown kv_type, or more in a micro-batch than in a batch.
        RunnerError: a missing or wrong file, or a runtime that does not start.
    """
    require_runtime()
    if kv_type not in KV_TYPES:
        raise UsageError(f"unknown KV cache type {kv_type!r}", f"known: {', '.join(KV_TYPES)}")
    batch = batch or _LIBRARY_BATCH
    if (micro_batch or 0) > batch:
        raise UsageError(f"a micro-batch of {micro_batch} tokens is more than the batch of {batch} that it is part of")
    for file in files(artifact):
        if not file.is_file():
            raise RunnerError(f"no such file: {file}")
    options = {
        "path": str(artifact.resolve()),
        "context": context,
        "threads": threads or usable_cores(),
        "kv_type": kv_type,
        "plain": plain,
        "vocab_only": vocab_only,
        "batch": batch,
        "micro_batch": micro_batch or min(batch, _LIBRARY_MICRO_BATCH),
    }
    return Runner("llama_cpp", RUNTIME, artifact, options, timeout, spinning)


def traffic(artifact: Path, kv_type: str) -> Traffic:
    """What decoding one token reads: every tensor, but of the embedding one row, and of experts those that are used.

    Where the file has no output matrix, the embedding is that too, and is read whole.

    Raises:
        CheckpointError: not a GGUF file, or a damaged one.
    """
    headers = [read_header(file) for file in files(artifact)]
    tensors = [tensor for header in headers for tensor in header.tensors]
    data = headers[0].metadata
    settings = {
        key.split(".", 1)[1]: v for key, v in data.items() if key.startswith(f"{data['general.architecture']}.")
    }
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    used = settings.get("expert_used_count", 1) / (settings.get("expert_count") or 1)

    def read(tensor: GGUFTensor) -> float:
        if tensor.name == "token_embd.weight" and not tied:
            return tensor.nbytes / tensor.shape[0]
        return tensor.nbytes * (used if "_exps." in tensor.name else 1)

    heads = settings.get("attention.head_count", 0)
    kv_heads = settings.get("attention.head_count_kv", heads)
    width = settings["embedding_length"] // heads if heads and not isinstance(heads, list) else 0
    numbers = settings.get("attention.key_length", width) + settings.get("attention.value_length", width)
    all_heads = sum(kv_heads) if isinstance(kv_heads, list) else kv_heads * settings.get("block_count", 0)
    return Traffic(round(sum(map(read, tensors))), all_heads * numbers * KV_BYTES[kv_type])


def require_runtime() -> None:
    """Raise MissingExtraError unless llama-cpp-python is installed; imports nothing."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingExtraError("running GGUF files", "llama-cpp")


def probe() -> dict[str, Any]:
    """Runs a tiny quantized model: some builds start, and crash at the first token.

    Returns:
        version, threads and workaround (or None).

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        RunnerError: it does not start, crashes, hangs, or computes no numbers.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        _tiny_gguf.write(path)
        with open(path, context=64, timeout=60) as runner:
            if not np.isfinite(runner.logits(np.arange(48))).all():
                raise RunnerError(f"{RUNTIME} computes NaN or infinite logits from finite weights")
            return {key: runner.info()[key] for key in ("version", "threads", "workaround")}


class Session:
    """A loaded model and its context; lives in the child process. The methods are those of `Runner`."""

    def __init__(
        self,
        path: str,
        context: int,
        threads: int,
        kv_type: str,
        plain: bool,
        vocab_only: bool,
        batch: int,
        micro_batch: int,
    ) -> None:
        import llama_cpp as lib

        self._lib = lib
        self._log = lib.llama_log_callback(_log)  # kept: the library calls it for as long as it lives
        lib.llama_log_set(self._log, ctypes.c_void_p(0))
        lib.llama_backend_init()
        started = time.perf_counter()

        params = lib.llama_model_default_params()  # weights are mapped, not read: the default
        params.n_gpu_layers = 0
        params.vocab_only = vocab_only
        amx = _has_amx()
        params.use_extra_bufts = self._repack = not plain and not amx
        self._workaround = "with AMX, repacked weights can crash llama_decode: not used" if amx else None
        self._model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise RunnerError(
                f"llama.cpp cannot load {Path(path).name}",
                "`phi3edge inspect` tells whether the file is whole; export it again if not",
            )
        self._held: list[int] = []  # tokens in the context
        self._vocabulary = lib.llama_model_get_vocab(self._model)
        self._size = lib.llama_vocab_n_tokens(self._vocabulary)
        self._threads, self._context_length, self._kv_type = threads, context, kv_type
        self._flash = not plain or kv_type in ("q4_0", "q8_0")
        self._n_batch, self._n_ubatch = batch, micro_batch
        self._random = np.random.default_rng(0)
        self._context = None if vocab_only else self._open_context()
        self._load_s = time.perf_counter() - started

    def _open_context(self) -> Any:
        lib = self._lib
        params = lib.llama_context_default_params()
        params.n_ctx = self._context_length
        params.n_batch, params.n_ubatch = self._n_batch, self._n_ubatch
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = KV_TYPES[self._kv_type]
        params.flash_attn_type = -1 if self._flash else 0  # the library's own choice, or off
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise RunnerError(f"llama.cpp cannot make a context of {self._context_length} tokens", "is memory short?")
        self._batch = lib.llama_batch_init(self._n_batch, 0, 1)
        return context

    def info(self) -> dict[str, Any]:
        """What runs it and how."""
        lib = self._lib
        template = lib.llama_model_chat_template(self._model, None)
        return {
            "runtime": RUNTIME,
            "version": f"llama-cpp-python {lib.__version__}",
            "threads": self._threads,
            "context": self._context_length,
            "kv_type": self._kv_type,
            "batch": self._n_batch,
            "micro_batch": self._n_ubatch,
            "repacked_weights": self._repack,
            "flash_attention": "auto" if self._flash else "off",
            "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "model_type": self._described(),
            "model_bytes": lib.llama_model_size(self._model),
            "parameters": lib.llama_model_n_params(self._model),
            "vocabulary_size": self._size,
            "eog_ids": [i for i in range(self._size) if lib.llama_vocab_is_eog(self._vocabulary, i)],
            "chat_template": template.decode("utf-8", "replace") if template else None,
            "system": lib.llama_print_system_info().decode().strip(),
            "workaround": self._workaround,
            "load_s": self._load_s,
        }

    def logits(self, ids: np.ndarray, start: int, reuse: bool = False) -> Iterator[np.ndarray]:
        """Rows of logits from position `start` on, in blocks."""
        tokens = ids.tolist()
        for first in range(self._begin(tokens, start if reuse else 0), len(tokens), _BATCH):
            batch = tokens[first : first + _BATCH]
            rows = self._decode(batch, first, max(start - first, 0))
            for row in range(0, len(rows), _ROWS):
                yield rows[row : row + _ROWS]

    def generate(self, ids: list[int], max_tokens: int, reuse: bool = False) -> list[int]:
        """Greedy continuation."""
        begin = self._begin(ids, len(ids) - 1 if reuse else 0)
        out: list[int] = []
        while len(out) < max_tokens:
            token = self._next(out[-1], len(ids) + len(out) - 1) if out else self._prompt(ids, begin)
            if self._lib.llama_vocab_is_eog(self._vocabulary, token):
                break
            out.append(token)
        return out

    def tokenize(self, text: str, special: bool, bos: bool) -> list[int]:
        """Token ids of a text."""
        data = text.encode()
        room = len(data) + 8
        while True:
            tokens = (self._lib.llama_token * room)()
            n = self._lib.llama_tokenize(self._vocabulary, data, len(data), tokens, room, bos, special)
            if n >= 0:
                return list(tokens[:n])
            room = -n

    def detokenize(self, ids: list[int]) -> str:
        """The text of token ids."""
        tokens = (self._lib.llama_token * len(ids))(*ids)
        room = 16 * len(ids) + 16
        while True:
            text = ctypes.create_string_buffer(room)
            n = self._lib.llama_detokenize(self._vocabulary, tokens, len(ids), text, room, False, False)
            if n >= 0:
                return text.raw[:n].decode("utf-8", "replace")
            room = -n

    def chat(self, messages: list[dict[str, str]]) -> str | None:
        """None: the library knows templates by their look; what uses it brings an engine for others."""
        return None

    def samples(self, **work: Any) -> Iterator[np.ndarray]:
        """Timings; see `_timing.samples`."""
        return samples(self, **work)

    def start(self, depth: int, decoding: bool) -> None:
        """Makes the context hold `depth` random tokens, the same every time; those that it holds already stay."""
        ids = np.random.default_rng(0).integers(0, self._size, depth).tolist()
        begin = self._begin(ids, depth)
        self._feed(ids[begin:])

    def feed(self, count: int) -> None:
        """Evaluates random tokens, with logits of the last of each batch, as llama-bench does."""
        self._feed(self._random.integers(0, self._size, count).tolist())

    def _feed(self, ids: list[int]) -> None:
        if ids and not self._held and self._lib.llama_vocab_get_add_bos(self._vocabulary):
            ids[0] = self._lib.llama_vocab_bos(self._vocabulary)
        for first in range(0, len(ids), self._n_batch):
            batch = ids[first : first + self._n_batch]
            self._evaluate(batch, len(self._held), len(batch) - 1)
        self._lib.llama_synchronize(self._context)

    def choose(self) -> None:
        """The most likely token after those fed."""
        self._logits(1).argmax()

    def step(self) -> None:
        """Decodes one random token; nothing is chosen after it, as in llama-bench."""
        self._evaluate([int(self._random.integers(self._size))], len(self._held), 0)
        self._lib.llama_synchronize(self._context)

    def peak_memory(self) -> int | None:
        """Highest resident memory so far, in bytes."""
        return peak_memory()

    def _clear(self) -> None:
        if self._context is None:
            raise RunnerError("the model was opened for its vocabulary only")
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._held = []

    def _begin(self, ids: list[int], most: int) -> int:
        """Empties the context but for at most `most` tokens that `ids` begins with, too; how many stay."""
        kept = shared_length(self._held[: max(most, 0)], ids)
        if kept and self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), 0, kept, -1):
            del self._held[kept:]
            return kept
        self._clear()
        return 0

    def _prompt(self, ids: list[int], begin: int = 0) -> int:
        """Evaluates a prompt of which the context holds `begin` tokens; the most likely next token."""
        if not ids:
            raise RunnerError("an empty prompt has no continuation")
        for first in range(begin, len(ids), _BATCH):
            batch = ids[first : first + _BATCH]
            rows = self._decode(batch, first, len(batch) - 1)
        return int(rows[-1].argmax())

    def _next(self, token: int, position: int) -> int:
        return int(self._decode([token], position, 0)[-1].argmax())

    def _decode(self, ids: list[int], position: int, first_output: int) -> np.ndarray:
        """Logits of ids[first_output:], a view that the next call overwrites, shape (outputs, vocabulary)."""
        self._evaluate(ids, position, first_output)
        return self._logits(max(len(ids) - first_output, 0))

    def _evaluate(self, ids: list[int], position: int, first_output: int) -> None:
        if position + len(ids) > self._context_length:
            raise RunnerError(f"{position + len(ids)} tokens do not fit into a context of {self._context_length}")
        if not all(0 <= i < self._size for i in ids):
            raise RunnerError(f"a token id is not in the artifact's vocabulary of {self._size}")
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i] = token
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= first_output
        code = self._lib.llama_decode(self._context, batch)
        if code:
            raise RunnerError(f"llama_decode failed with code {code}")
        self._held[position:] = ids

    def _logits(self, outputs: int) -> np.ndarray:
        if not outputs:
            return np.empty((0, self._size), np.float32)
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (outputs, self._size))

    def _described(self) -> str:
        text = ctypes.create_string_buffer(128)
        self._lib.llama_model_desc(self._model, text, len(text))
        return text.value.decode("utf-8", "replace")


def _log(level: int, text: bytes, _: Any) -> None:
    if level in (3, 4, 5):  # warning, error, and what continues a line
        os.write(2, text)


def _has_amx() -> bool:
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
