"""Sizes as people write them."""

import re

from phi3edge.errors import UsageError

FACTORS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_size(text: str) -> int:
    """Bytes from "1.5 GB", "1800MiB", "2GiB" or a plain number; a bare unit letter (G) is refused as ambiguous.

    Raises:
        UsageError: not a size, or nothing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    count = int(float(match[1]) * FACTORS.get(match[2].lower(), 0)) if match else 0
    if not count:
        raise UsageError(
            f"{text!r} is not a size", "write a number and a unit: 1.5GB (10^9 bytes) or 1.5GiB (2^30 bytes)"
        )
    return count


def size(count: float) -> str:
    """A byte count for people, in powers of ten, as files and app limits are given: "2.39 GB"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(count) >= factor:
            value = count / factor
            return f"{value:.2f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{count:.0f} B"
