"""Where phi3edge keeps what it can make again: the demo model, reference passes, texts, losses, rounded linears."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: $PHI3EDGE_CACHE, else $XDG_CACHE_HOME/phi3edge, else ~/.cache/phi3edge. Not created here."""
    if own := os.environ.get("PHI3EDGE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "phi3edge"
