"""What several test files use."""

from pathlib import Path

import pytest

from phi3edge.cache import cache_dir
from phi3edge.demo import build_demo


@pytest.fixture(scope="session")
def demo() -> Path:
    """The folder of the demo checkpoint, built into the user's cache if it is not there. Not to be written to."""
    return build_demo(cache_dir())
