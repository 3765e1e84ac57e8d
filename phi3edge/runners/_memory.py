"""Memory of the process that a runtime lives in."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def peak_memory() -> int | None:
    """Highest resident memory of this process so far, in bytes; None where unknown."""
    # not getrusage on Linux: its maximum includes what the parent process held when it forked
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])  # type: ignore[index]
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
