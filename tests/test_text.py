import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from phi3edge.errors import UsageError
from phi3edge.text import cut, default_text, read_text


def test_default_text_is_prose_of_this_python() -> None:
    text = default_text()
    assert len(text.text) > 800_000
    words = " ".join(text.text.split())
    assert "statement is used to iterate over the elements of a sequence" in words  # the language reference
    assert "Choose a random element from a non-empty sequence." in words  # random.choice
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in text.name


def test_default_text_mixes_its_sources_from_the_start() -> None:
    beginning = default_text().text[:100_000]
    assert "assert_stmt" in beginning or "Assignment statement" in beginning
    assert "parser = argparse.ArgumentParser" in beginning


def test_default_text_is_the_same_in_another_process_that_imports_none_of_it() -> None:
    code = (
        "import sys; from phi3edge.text import default_text; print(default_text().sha256); "
        "assert not {'imaplib', 'mailbox', 'pydoc_data.topics', 'torch'} & set(sys.modules)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == default_text().sha256, done.stderr


def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UsageError, match=r"topics\.py") as error:
        default_text()
    assert "--text" in error.value.hint


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("naïve\n", encoding="utf-8")
    text = read_text(path)
    assert (text.name, text.text) == ("notes.txt", "naïve\n")
    path.write_bytes(b"na\xefve")
    with pytest.raises(UsageError, match=r"not UTF-8 \(byte 2\)"):
        read_text(path)
    with pytest.raises(UsageError, match="No such file"):
        read_text(tmp_path / "none.txt")


def test_chunks() -> None:
    chunks = cut(list(range(100)), 3, 32, 32, "x")
    assert chunks.dtype == np.int64
    assert chunks.tolist() == np.arange(96).reshape(3, 32).tolist()


def test_too_short_a_text_says_how_much_is_there_and_needed() -> None:
    with pytest.raises(UsageError, match=r"has 1500 tokens; 4 chunks of 512 need 2048") as error:
        cut([1] * 1500, 4, 512, 512, "x")
    assert error.value.hint == "give a longer text, or --chunks 2"
    with pytest.raises(UsageError) as error:
        cut([1] * 500, 4, 512, 512, "x")
    assert error.value.hint == "give a longer text"
