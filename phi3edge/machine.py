"""What this machine offers."""

from __future__ import annotations

import os
import platform
from pathlib import Path

COMFORT = 0.75
"""Share of the free memory that a model may take: the rest is for what it computes, and for others."""


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def free_memory() -> int | None:
    """Bytes that programs can still have, or None where it is not known; a container's own limit counts."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    free = 1024 * int(lines["MemAvailable"].split()[0])
    return min(free, _free_in_container(Path("/sys/fs/cgroup"), free))


def holds(needed: int) -> bool:
    """Whether so many bytes fit well into the free memory; where that is not known, they do."""
    free = free_memory()
    return free is None or needed < COMFORT * free


def _free_in_container(group: Path, otherwise: int) -> int:
    """What a control group (version 2) leaves to its programs; cached files count as free."""
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return otherwise
    return otherwise if limit == "max" else max(int(limit) - used + int(stat.get("inactive_file", 0)), 0)
