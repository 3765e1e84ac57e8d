"""Energy counters of the processors: RAPL, as Linux's powercap shows it, for Intel's and AMD's.

Source: Linux, Documentation/power/powercap/powercap.rst. The counters run over at `max_energy_range_uj`. Reading them
takes root on most systems.
"""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Joules that all processor packages have used since the meter was made; NaN where the machine does not tell.

    Args:
        folder: where the counters are.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        zones = sorted(folder.glob("intel-rapl:*")) if folder.is_dir() else []
        self._packages = [zone for zone in zones if zone.name.count(":") == 1 and _is_package(zone)]
        self._ranges = [_number(zone / "max_energy_range_uj") for zone in self._packages]
        self._last = [_number(zone / "energy_uj") for zone in self._packages]
        self._joules = 0.0 if self._packages else float("nan")

    def __call__(self) -> float:
        """Joules so far."""
        now = [_number(zone / "energy_uj") for zone in self._packages]
        for before, after, most in zip(self._last, now, self._ranges, strict=True):
            self._joules += (after - before + (most if after < before else 0)) / 1e6
        self._last = now
        return self._joules


def _is_package(zone: Path) -> bool:
    """Whether a zone is a whole processor: `psys`, beside them, holds them and more."""
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def _number(path: Path) -> float:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return float("nan")
