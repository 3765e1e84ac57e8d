"""How much memory is left, a container's own limit included."""

from pathlib import Path

from phi3edge import machine


def test_a_containers_limit_counts_and_its_cached_files_are_free(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 250\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert machine._free_in_container(tmp_path, 10_000) == 1000 - 700 + 250
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._free_in_container(tmp_path, 10_000) == 10_000
    (tmp_path / "memory.max").write_text("500\n")
    (tmp_path / "memory.stat").write_text("anon 700\n")
    assert machine._free_in_container(tmp_path, 10_000) == 0


def test_without_a_group_nothing_changes(tmp_path: Path) -> None:
    assert machine._free_in_container(tmp_path / "none", 10_000) == 10_000
