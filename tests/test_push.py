"""Uploading to the hub, against a local server that speaks its protocol. Each push is a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from _cards import write_artifact
from _hub_server import COMMIT, Hub, serve

from phi3edge.errors import OutputError
from phi3edge.push import prepare

PUSH = "import time; time.sleep = lambda seconds: None\nfrom phi3edge.cli.app import main\nmain()"  # no waits to retry


@pytest.fixture
def hub():
    with serve(Hub({})) as hub:
        yield hub


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "tiny")


def push(hub: Hub, folder: Path, *options: str, token: str | None = "hf_good", home: Path) -> tuple[int, Any, str]:
    """Exit code, the JSON on stdout, and stderr."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "NO_PROXY": "*", "no_proxy": "*"}
    settings |= {"HF_HUB_DISABLE_XET": "1", **({"HF_TOKEN": token} if token else {})}  # git-lfs: what any hub speaks
    command = [sys.executable, "-c", PUSH, "push", str(folder), *options, "--json"]
    done = subprocess.run(command, env=kept | settings, capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("part_bytes", [None, 400], ids=["whole", "in parts"])
def test_an_artifact_arrives_whole_in_one_commit(
    hub: Hub, artifact: Path, tmp_path: Path, part_bytes: int | None
) -> None:
    hub.part_bytes = part_bytes
    (artifact / "notes of mine.txt").write_text("nobody else's business")
    (artifact / "calibration.npy").write_bytes(b"token ids")
    code, said, errors = push(hub, artifact, "me/tiny", "--create", "--private", home=tmp_path)
    assert (code, errors) == (0, "")
    [(repository, branch, files)] = hub.commits
    assert (repository, branch) == ("me/tiny", "main")
    assert sorted(files) == ["README.md", "phi3edge.json", "tiny-q8_0.gguf"]
    assert files == {name: (artifact / name).read_bytes() for name in files}
    assert sorted(said["files"]) == sorted(files)
    assert said["commit"] == COMMIT
    assert said["url"] == f"{hub.url}/me/tiny/commit/{COMMIT}"
    assert hub.private == {"me/tiny"}
    assert hub.leaked == []


def test_a_second_push_sends_no_large_file_again(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    assert push(hub, artifact, "me/tiny", "--create", home=tmp_path)[0] == 0
    sent = sum(method == "PUT" for method, _, _ in hub.asked)
    assert push(hub, artifact, "me/tiny", home=tmp_path)[0] == 0
    assert sum(method == "PUT" for method, _, _ in hub.asked) == sent == 1
    assert hub.commits[0][2] == hub.commits[1][2]
    assert hub.private == set()


def test_another_branch(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    assert push(hub, artifact, "me/tiny", "--create", "--revision", "q8", home=tmp_path)[0] == 0
    assert hub.commits[0][1] == "q8"
    code, said, _ = push(hub, artifact, "me/tiny", "--revision", "q9", home=tmp_path)
    assert code == 2
    assert "no revision 'q9'" in said["error"]


def test_a_dry_run_asks_the_hub_nothing(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    code, said, _ = push(hub, artifact, "me/tiny", "--create", "--dry-run", home=tmp_path)
    assert code == 0
    assert said["commit"] is None
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "options", "token", "message", "hint"),
    [
        ("me/tiny", (), "hf_good", "has no model me/tiny", "--create"),
        ("me/tiny", ("--create",), None, "only with a token", "hf auth login"),
        ("me/tiny", ("--create",), "hf_bad", r"refused the token \(HTTP 401\)", "hf auth login"),
        ("others/tiny", ("--create",), "hf_good", "does not let this token write to others/tiny", "HF_TOKEN"),
        ("me/taken", ("--create",), "hf_good", "me/taken exists", "leave out --create"),
        ("no name", (), "hf_good", "is not a model's name", "organization/name"),
    ],
    ids=["missing", "no token", "bad token", "no permission", "exists", "no name"],
)
def test_refusals_are_one_line_and_what_to_do(
    hub: Hub,
    artifact: Path,
    tmp_path: Path,
    name: str,
    options: tuple[str, ...],
    token: str | None,
    message: str,
    hint: str,
) -> None:
    hub.repositories["me/taken"] = tmp_path
    code, said, _ = push(hub, artifact, name, *options, token=token, home=tmp_path)
    assert code == 2
    assert re.search(message, said["error"]), said
    assert "\n" not in said["error"]
    assert hint in said["hint"]
    assert hub.commits == []


def test_a_damaged_artifact_stays_here(artifact: Path) -> None:
    file = artifact / "tiny-q8_0.gguf"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(OutputError, match=r"tiny-q8_0\.gguf: sha256"):
        prepare(artifact, "me/tiny")


def test_a_failed_gate_stays_here_unless_told_otherwise(tmp_path: Path) -> None:
    failed = write_artifact(tmp_path / "failed", passed=False)
    with pytest.raises(OutputError, match="failed its gates: kl_mean") as error:
        prepare(failed, "me/tiny")
    assert "--allow-failed" in str(error.value.hint)
    assert "report.json" in prepare(failed, "me/tiny", allow_failed=True).files


def test_private_is_said_when_a_repository_is_made(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    code, said, _ = push(hub, artifact, "me/tiny", "--private", home=tmp_path)
    assert code == 2
    assert said["hint"] == "add --create"


def test_a_connection_that_breaks_for_good_is_one_line(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    hub.repositories["me/tiny"] = tmp_path
    hub.break_after = [0] * 100
    code, said, errors = push(hub, artifact, "me/tiny", home=tmp_path)
    assert code == 2
    assert f"the connection to {hub.url} failed" in said["error"]
    assert "Traceback" not in errors
    assert hub.commits == []


def test_a_broken_upload_is_tried_again(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    hub.repositories["me/tiny"] = tmp_path
    hub.break_after = [0]
    assert push(hub, artifact, "me/tiny", home=tmp_path)[0] == 0
    assert len(hub.commits) == 1
