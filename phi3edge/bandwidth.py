"""How fast this machine's memory is read: what decoding a token comes down to."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from phi3edge.errors import MissingExtraError

LEAST = 2**29
"""Bytes of the buffer at least."""

_CACHES = 4  # the buffer is so many times as large as all last-level caches together
_PASSES = 8


def read_bandwidth(threads: int) -> float:
    """Memory read by so many threads at once, each its own part of one buffer.

    The best of several passes counts, as in STREAM (McCalpin, "Memory bandwidth and machine balance", 1995): it is a
    ceiling that is looked for.

    Args:
        threads: at least 1.

    Returns:
        Bytes per second.

    Raises:
        MissingExtraError: numba is not installed.
    """
    try:
        from numba import njit
    except ImportError:
        raise MissingExtraError("measuring memory bandwidth", "gguf") from None
    read = njit(nogil=True)(_read)
    data = np.ones(max(LEAST, _CACHES * cache_bytes()) // 8, np.int64)  # written, so that its pages exist
    parts = np.array_split(data, threads)
    read(parts[0][:8])  # compiles
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PASSES):
            started = time.perf_counter()
            total = sum(pool.map(read, parts))
            seconds.append(time.perf_counter() - started)
            assert total == data.size  # every word was read
    return data.nbytes / min(seconds)


def _read(data: np.ndarray) -> int:
    """The sum of int64 words: it vectorizes, and costs nothing beside the reading."""
    total = 0
    for i in range(data.size):
        total += data[i]
    return total


def cache_bytes(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Size of all last-level caches together; 0 where unknown."""
    found = {}
    for cache in cpus.glob("cpu[0-9]*/cache/index3"):
        try:
            found[(cache / "shared_cpu_list").read_text()] = int((cache / "size").read_text().strip().rstrip("K"))
        except (OSError, ValueError):
            continue
    return 1024 * sum(found.values())
