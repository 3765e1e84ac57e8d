"""Runtimes that execute an artifact: one file each, found by its name, each run in a process of its own.

A runner's file has `accepts(artifact)`, `files(artifact)`, `traffic(artifact, kv_type)`, `probe()`,
`open(artifact, ...)`, which returns a `Runner`, and the class `Session`, which `_child.py` makes in the child process
and whose methods answer the calls made here. So the death of a native library ends a child, and is an error of one line
here. `HEEDS_WINDOW` says whether attention looks back no further than the model's window.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from phi3edge import registry
from phi3edge.errors import RunnerError, UsageError
from phi3edge.runners._child import receive, send
from phi3edge.runners._timing import Sample

# threads that wait for each other sleep: where they spin, a busy machine slows a runtime twenty times
_SLEEPING = {"OMP_WAIT_POLICY": "passive"}

_CHILD = "from phi3edge.runners._child import main; main()"
_SOURCE_FOLDER = re.compile(r"\S*/(?=[\w.-]+\.(?:c|cc|cpp|cu|h):\d+)")  # where the library was built
_COMPLAINT = re.compile(r"error|invalid|assert|abort|fail|what\(\)|exception|fatal", re.IGNORECASE)


def runner_for(artifact: Path) -> ModuleType:
    """The runner whose runtime executes such an artifact.

    Raises:
        UsageError: none does.
    """
    for name in registry.names("runners"):
        module = registry.load("runners", name)
        if module.accepts(artifact):
            return module
    raise UsageError(
        f"no runtime here runs {artifact.name}",
        f"runtimes: {', '.join(registry.names('runners'))}; a .gguf file, say, or a folder with genai_config.json",
    )


@dataclass(frozen=True, slots=True)
class Traffic:
    """What decoding one token reads from memory, as the artifact stores it.

    Attributes:
        weights: bytes of all tensors, without the rows of those of which a token reads one row only.
        kv_per_token: bytes of the KV cache for each token in the context.
    """

    weights: int
    kv_per_token: float

    def bytes(self, length: float) -> float:
        """For one token with `length` tokens in the context."""
        return self.weights + self.kv_per_token * length


class Runner:
    """An artifact opened in a runtime, in a child process. Closes with `close()` or as a context manager.

    Every method raises RunnerError if the runtime refuses, crashes, or gives no answer within the timeout; the child is
    gone after a crash or a timeout.

    Args:
        name: name of the runner's file.
        runtime: the runtime's own name, for messages.
        artifact: the file or folder to run.
        options: arguments of the runner's Session, as JSON values.
        timeout: seconds that one answer, or one block of an answer, may take.
        spinning: threads of OpenMP wait as the library has it (they spin, unless OMP_WAIT_POLICY says otherwise), not
            asleep: faster on an idle machine.
    """

    def __init__(
        self,
        name: str,
        runtime: str,
        artifact: Path,
        options: dict[str, Any],
        timeout: float,
        spinning: bool = False,
    ) -> None:
        self._runtime, self._artifact, self._timeout = runtime, artifact.name, timeout
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, name, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**({} if spinning else _SLEEPING), **os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        )
        try:
            self._info: dict[str, Any] = self._receive("opening it", 0)[0]["result"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Id of the child process."""
        return self._process.pid

    def close(self) -> None:
        """Ends the child process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def info(self) -> dict[str, Any]:
        """What runs it: runtime, version, threads, vocabulary_size, eog_ids, chat_template, load_s, flags ..."""
        return self._info

    def logits(self, ids: np.ndarray, start: int = 0, *, reuse: bool = False) -> np.ndarray:
        """Logits of a sequence, evaluated from an empty context.

        Args:
            ids: token ids, shape (n,), n at most the context it was opened with.
            start: the first position wanted.
            reuse: keep what the context holds of the sequence's beginning from the call before, where the runtime can:
                faster, and apart from an empty context's figures by the rounding of other batches.

        Returns:
            float32, shape (n - start, vocabulary): row i predicts the token after position start + i.
        """
        return np.concatenate(list(self.logits_blocks(ids, start, reuse=reuse)))

    def logits_blocks(self, ids: np.ndarray, start: int = 0, *, reuse: bool = False) -> Iterator[np.ndarray]:
        """The rows of `logits`, in order, a few at a time."""
        sent = self._send("logits", {"start": start, "reuse": reuse}, np.asarray(ids, dtype=np.int32))
        while True:
            _, rows = self._receive("computing logits", sent)
            if rows is None:
                return
            yield rows

    def generate(self, ids: list[int], max_tokens: int, *, reuse: bool = False) -> list[int]:
        """The most likely continuation, token by token, up to an end-of-generation token (not included).

        Args:
            ids: the prompt.
            max_tokens: at most so many.
            reuse: see `logits`.
        """
        return self._call("generate", "generating", ids=ids, max_tokens=max_tokens, reuse=reuse)

    def tokenize(self, text: str, *, special: bool, bos: bool) -> list[int]:
        """Token ids of a text.

        Args:
            text: what to tokenize.
            special: read the text of special tokens as those tokens.
            bos: add what the artifact adds to a prompt (a beginning-of-sequence token, where it has one).
        """
        return self._call("tokenize", "tokenizing", text=text, special=special, bos=bos)

    def detokenize(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens; U+FFFD stands for bytes that are no whole character."""
        return self._call("detokenize", "detokenizing", ids=ids)

    def chat(self, messages: list[dict[str, str]]) -> str | None:
        """A chat and the opening of an answer, as the runtime's own engine renders it; None where it has no engine.

        Args:
            messages: with keys "role" and "content".
        """
        return self._call("chat", "rendering a chat", messages=messages)

    def samples(
        self, prompt: int, decode: int, *, depth: int = 0, repeats: int = 1, warm_up: bool = True
    ) -> Iterator[Sample]:
        """Times a prompt and the tokens decoded after it, as often as wanted; to be read to its end.

        The context must have room for depth + prompt + decode + 2 tokens.

        Args:
            prompt: number of tokens, 0 for none.
            decode: number of tokens, 0 for none.
            depth: tokens in the context before the clock starts.
            repeats: number of samples.
            warm_up: run the prompt and one token first, untimed.
        """
        work = {"prompt": prompt, "decode": decode, "depth": depth, "repeats": repeats, "warm_up": warm_up}
        sent = self._send("samples", work)
        while True:
            _, sample = self._receive("measuring", sent)
            if sample is None:
                return
            yield Sample(*sample.tolist())

    def speed(self, prompt_tokens: int, decode_tokens: int) -> dict[str, float]:
        """prompt_tokens_per_s, decode_tokens_per_s, time_to_first_token_s (of that prompt) and load_s, when warm."""
        (sample,) = self.samples(prompt_tokens, decode_tokens)
        return {
            "prompt_tokens_per_s": 1e9 * prompt_tokens / sample.prompt_ns,
            "decode_tokens_per_s": 1e9 * decode_tokens / sample.decode_ns,
            "time_to_first_token_s": sample.first_token_ns / 1e9,
            "load_s": self._info["load_s"],
        }

    def peak_memory(self) -> int | None:
        """Highest resident memory of the child so far, in bytes; None where unknown.

        Mapped weights are included, and Python and numpy, which are about 50 MB.
        """
        return self._call("peak_memory", "measuring")

    def _call(self, method: str, doing: str, **arguments: Any) -> Any:
        return self._receive(doing, self._send(method, arguments))[0]["result"]

    def _send(self, method: str, arguments: dict[str, Any], array: np.ndarray | None = None) -> int:
        """Sends a request; returns how long the log was."""
        position = os.fstat(self._log.fileno()).st_size
        assert self._process.stdin is not None
        try:
            send(self._process.stdin, {"method": method, "arguments": arguments}, array)
        except (BrokenPipeError, OSError):
            raise self._death("waiting for work", position) from None
        return position

    def _receive(self, doing: str, log_start: int) -> tuple[dict[str, Any], np.ndarray | None]:
        assert self._process.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        watchdog = threading.Timer(self._timeout, expire)
        watchdog.daemon = True
        watchdog.start()
        try:
            message, array = receive(self._process.stdout)
        except EOFError:
            if expired.is_set():
                raise RunnerError(
                    f"{self._runtime} gave no answer within {self._timeout:g} s while {doing} ({self._artifact})",
                    "a busy machine slows it many times: run it alone, with fewer threads, or give it longer",
                ) from None
            raise self._death(doing, log_start) from None
        finally:
            watchdog.cancel()
        if "error" in message:
            cause = self._complaint(log_start)
            raise RunnerError(message["error"] + (f": {cause}" if cause else ""), message["hint"])
        return message, array

    def _death(self, doing: str, log_start: int) -> RunnerError:
        code = self._process.wait()
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        cause = self._complaint(log_start) or "it said nothing"
        return RunnerError(
            f"{self._runtime} {how} while {doing} ({self._artifact}): {cause}",
            "`phi3edge doctor` tells whether this runtime works here; `phi3edge inspect` whether the file is whole",
        )

    def _complaint(self, start: int) -> str:
        """The first line that the native library wrote since `start` that speaks of an error, else its last line."""
        self._log.seek(start)
        lines = [line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        line = next((line for line in lines if _COMPLAINT.search(line)), lines[-1] if lines else "")
        return _SOURCE_FOLDER.sub("", line)[:300]


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
