"""An exported folder onto the model hub, through huggingface_hub: its tokens, its endpoint, its upload protocol.

Only files of ours go: what the manifest names, with hashes that are checked first, and what phi3edge writes beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from phi3edge import card, folders, manifest
from phi3edge.errors import HubError, OutputError
from phi3edge.progress import Stages, silent
from phi3edge.report import read_report

BESIDE = (folders.CARD, manifest.NAME, folders.REPORT, folders.PAGE, folders.BENCH, folders.EVAL, folders.LAYERS)
"""What phi3edge writes beside an artifact, and a hub should show. The calibration's token ids stay at home."""

MAIN = "main"


@dataclass(frozen=True, slots=True)
class Upload:
    """What goes where.

    Attributes:
        folder: the artifact's.
        files: names in it, of what is uploaded.
        bytes: of all of them.
        repository: "organization/name".
        revision: the branch.
    """

    folder: Path
    files: tuple[str, ...]
    bytes: int
    repository: str
    revision: str


@dataclass(frozen=True, slots=True)
class Pushed:
    """What the hub made of it: the commit, and where it shows it."""

    commit: str
    url: str


def prepare(
    folder: Path,
    repository: str,
    revision: str = MAIN,
    allow_failed: bool = False,
    stages: Stages = silent,
) -> Upload:
    """Check an artifact before any of it leaves.

    Args:
        folder: one that export wrote.
        repository: "organization/name".
        revision: the branch to upload to.
        allow_failed: upload it even if a gate of its report failed.
        stages: shows progress.

    Raises:
        OutputError: no manifest, a file that is not as the manifest says, or a report with a failed gate.
        ConfigError: a report that this phi3edge does not read.
    """
    entries = manifest.read_manifest(folder)["files"]
    report = folder / folders.REPORT
    if report.is_file() and not allow_failed and not (found := read_report(report)).passed:
        failed = [gate.name for gate in found.gates if not gate.passed]
        raise OutputError(f"{folder} failed its gates: {', '.join(failed)}", "--allow-failed uploads it all the same")
    if not (folder / folders.CARD).is_file():
        card.write(folder)
    with stages("verify", sum(entry["bytes"] for entry in entries)) as advance:
        problems = manifest.verify(folder, advance)
    if problems:
        raise OutputError(f"{folder}: {'; '.join(problems)}", "export again, or copy the folder again")
    names = [*(entry["name"] for entry in entries), *(name for name in BESIDE if (folder / name).is_file())]
    return Upload(folder, tuple(names), sum((folder / n).stat().st_size for n in names), repository, revision)


def push(upload: Upload, create: bool = False, private: bool = False, stages: Stages = silent) -> Pushed:
    """Upload an artifact in one commit; what the repository holds besides stays.

    Args:
        upload: from `prepare`.
        create: make the repository, and the branch, first; one that exists is an error.
        private: make it private.
        stages: shows progress.

    Raises:
        HubError: no token, no permission, a repository that is missing or exists, a broken connection.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from phi3edge import __version__
    from phi3edge.hub import plain_errors, quiet

    hub = HfApi(library_name="phi3edge", library_version=__version__)
    repository, revision = upload.repository, upload.revision
    with plain_errors(repository, revision), _refused(repository), quiet():
        if create:
            hub.create_repo(repository, private=private or None, repo_type="model")
        if create and revision != MAIN:
            hub.create_branch(repository, branch=revision)
        files = [CommitOperationAdd(name, upload.folder / name) for name in upload.files]
        with stages("upload", None):
            found = hub.create_commit(
                repository, files, commit_message=f"Upload with phi3edge {__version__}", revision=revision
            )
    return Pushed(found.oid, found.commit_url)


@contextmanager
def _refused(repository: str) -> Iterator[None]:
    """What a hub answers to writing, as one line and what to do."""
    from huggingface_hub import constants, errors, get_token

    endpoint, login = constants.ENDPOINT, "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
    try:
        with _unwrapped():
            yield
    except errors.RepositoryNotFoundError as error:
        if get_token() is None:
            raise HubError(f"{endpoint} takes uploads only with a token, and none is there", login) from error
        raise HubError(
            f"{endpoint} has no model {repository}, or this token may not see it",
            "--create makes it; check the spelling",
        ) from error
    except errors.RevisionNotFoundError:
        raise
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status == 401 and get_token() is None:
            raise HubError(f"{endpoint} takes uploads only with a token, and none is there", login) from error
        if status == 403:
            raise HubError(f"{endpoint} does not let this token write to {repository}", login) from error
        if status == 409:
            raise HubError(f"{repository} exists at {endpoint}", "leave out --create to upload into it") from error
        raise


@contextmanager
def _unwrapped() -> Iterator[None]:
    """What went wrong in one of huggingface_hub's threads, without the RuntimeError around it."""
    try:
        yield
    except RuntimeError as error:
        raise (error.__cause__ or error) from None
