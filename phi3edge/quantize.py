"""Turns a checkpoint into a stream of packed rows, as a plan says: read, round, pack, on all cores, in order.

Work is cut into chunks of rows. Worker threads read, round and pack a chunk (all of it releases the GIL); the stream
gives the chunks back in file order with a bounded number in flight, so memory does not grow with the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias

from phi3edge.codecs import codec
from phi3edge.errors import UnsupportedError
from phi3edge.machine import usable_cores
from phi3edge.registry import load
from phi3edge.types import QuantPlan, Statistics, TensorPlan

if TYPE_CHECKING:
    import numpy as np

    from phi3edge.forward import Basis

CHUNK_WEIGHTS = 2**20
"""Weights of one chunk: 4 MiB as float32, which stays in a core's share of the cache."""

Rows: TypeAlias = "Callable[[TensorPlan, int, int], np.ndarray | None]"
"""rows(planned, start, stop): packed rows of a tensor, uint8 (rows, row bytes), or None if it is not rounded yet."""

PackedTensor: TypeAlias = "tuple[TensorPlan, Iterator[np.ndarray]]"


def quantize(
    checkpoint: Basis,
    plan: QuantPlan,
    threads: int | None = None,
    rounded: Rows | None = None,
    statistics: Mapping[str, Statistics] | None = None,
) -> Generator[PackedTensor, None, None]:
    """Round and pack every tensor of a plan, in its order. Close the generator to end the threads before its end.

    Args:
        checkpoint: where weights are read.
        plan: a codec and a method for every tensor.
        threads: None for one per usable core.
        rounded: gives the packed rows of tensors that are rounded already.
        statistics: of the linears' inputs, by tensor name; what is missing is rounded without.

    Yields:
        A tensor's plan, and an iterator over its packed rows: uint8 arrays, in order. Take each tensor's rows to the
        end before asking for the next tensor.

    Raises:
        CheckpointError: a weight that is not finite.
        UnsupportedError: a weight that its codec cannot hold; names the tensor.
    """
    count = threads or usable_cores()
    work = ((t, start, stop) for t in plan.tensors for start, stop in _chunks(t))
    with ThreadPoolExecutor(count, thread_name_prefix="quantize") as pool:
        flying: deque[Future[np.ndarray]] = deque()

        def fill() -> None:
            while len(flying) < 2 * count and (item := next(work, None)):
                flying.append(pool.submit(_pack_rows, checkpoint, rounded, statistics or {}, *item))

        def rows(chunks: int) -> Iterator[np.ndarray]:
            for _ in range(chunks):
                fill()
                yield flying.popleft().result()

        try:
            for t in plan.tensors:
                yield t, rows(len(_chunks(t)))
        finally:
            for future in flying:
                future.cancel()


def _chunks(t: TensorPlan) -> list[tuple[int, int]]:
    """Row ranges of a tensor; a norm is one row."""
    rows = t.tensor.shape[0] if len(t.tensor.shape) == 2 else 1
    step = max(1, CHUNK_WEIGHTS // t.tensor.shape[-1])
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _pack_rows(
    checkpoint: Basis,
    rounded: Rows | None,
    statistics: Mapping[str, Statistics],
    t: TensorPlan,
    start: int,
    stop: int,
) -> np.ndarray:
    """Rows start to stop of a tensor, rounded and packed."""
    if rounded is not None and (ready := rounded(t, start, stop)) is not None:
        return ready
    module, method = codec(t.codec), load("methods", t.method)
    read = checkpoint.codes if t.method == "imported" else checkpoint.rows
    try:
        return module.pack(method.quantize(read(t.tensor.name, start, stop), module, statistics.get(t.tensor.name)))
    except UnsupportedError as error:
        raise UnsupportedError(f"tensor {t.tensor.name!r}: {error.message}", error.hint) from error
