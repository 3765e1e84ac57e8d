"""What is timed in the process of a runtime, and how: the only clock. The semantics are llama-bench's.

A sample starts from a context that holds `depth` tokens; what fills it is not timed. Then a prompt is evaluated, a
token chosen, and tokens are decoded one at a time. Source: llama.cpp, tools/llama-bench/llama-bench.cpp, test_prompt
and test_gen: random tokens, logits of the last one of a batch only, one whole prompt and one token to warm up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from phi3edge.runners._energy import Meter

_TICK_S = 0.01  # USER_HZ is 100 wherever Linux runs
_IDLE = (3, 4)  # columns of /proc/stat that are no work: idle and waiting for a disk
_WORK = 8  # columns up to "steal", which is work of other machines; what follows is counted in them already


class Timed(Protocol):
    """What a session does for a measurement. Tokens are random."""

    def start(self, depth: int, decoding: bool) -> None:
        """Makes the context hold `depth` tokens, and where `decoding`, makes it ready for `step`."""

    def feed(self, count: int) -> None:
        """Evaluates the next `count` tokens together, as a prompt."""

    def choose(self) -> None:
        """Chooses the token after those fed: the most likely one."""

    def step(self) -> None:
        """Decodes one token."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One repetition. NaN stands for what the machine does not tell.

    Attributes:
        prompt_ns: evaluating the prompt.
        first_token_ns: the same and choosing the token after it.
        decode_ns: decoding all tokens.
        joules: energy of the processors meanwhile, whatever ran on them.
        others_s: seconds of CPU time that other processes, and other virtual machines on our cores, took meanwhile;
            the system counts in hundredths, so that only the sum over seconds means something.
    """

    prompt_ns: float
    first_token_ns: float
    decode_ns: float
    joules: float
    others_s: float


def samples(
    session: Timed,
    prompt: int,
    decode: int,
    depth: int,
    repeats: int,
    warm_up: bool,
    clock: Callable[[], int] = time.perf_counter_ns,
    meter: Callable[[], float] | None = None,
) -> Iterator[np.ndarray]:
    """Measures; yields each repetition as it ends.

    Args:
        session: what is measured.
        prompt: tokens of the prompt, 0 for none.
        decode: tokens to decode, 0 for none.
        depth: tokens in the context before the clock starts.
        repeats: number of repetitions.
        warm_up: run the prompt and one decoded token first, untimed: pages of the file, buffers, clock rates.
        clock: nanoseconds.
        meter: joules so far; None for the machine's own.

    Yields:
        The fields of a `Sample`, float64.
    """
    meter = meter or Meter()
    if warm_up:
        session.start(0, decoding=not prompt)
        if prompt:
            session.feed(prompt)
            session.choose()
        if decode:
            session.step()
    for _ in range(repeats):
        session.start(depth, decoding=not prompt)
        others, joules = _others_s(), meter()
        started = clock()
        if prompt:
            session.feed(prompt)
        fed = clock()
        if prompt:
            session.choose()
        chosen = clock()
        for _ in range(decode):
            session.step()
        ended = clock()
        used, taken = meter() - joules, _others_s() - others
        yield np.array(astuple(Sample(fed - started, chosen - started, ended - chosen, used, taken)))


def _others_s() -> float:
    """CPU seconds that were spent on anything but this process since the machine started; NaN where unknown."""
    try:
        columns = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return float("nan")
    busy = sum(int(ticks) for i, ticks in enumerate(columns[:_WORK]) if i not in _IDLE)
    return busy * _TICK_S - time.process_time()
