"""What several test files use."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from phi3edge.cache import cache_dir
from phi3edge.demo import build_demo


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that goes with the tests; the demo in it is a link to the user's, built there if it is missing."""
    users, own = cache_dir(), tmp_path_factory.mktemp("cache")
    build_demo(users)
    for entry in users.iterdir():
        if entry.name.startswith(("demo-", "SmolLM2")):
            (own / entry.name).symlink_to(entry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHI3EDGE_CACHE", str(own))
        yield


@pytest.fixture(scope="session")
def demo() -> Path:
    """The folder of the demo checkpoint. Not to be written to."""
    return build_demo(cache_dir())
