"""Models from the hub, through huggingface_hub: its cache, its tokens, its mirrors (HF_HOME, HF_TOKEN, HF_ENDPOINT).

Only what an export reads is downloaded, and nothing big before it is known that the model can be exported. Large files
go to `blobs/<sha256>.incomplete` of the hub's cache and are renamed when their hash is right, so that an interrupted
pull goes on where it stopped, in whichever process: huggingface_hub itself starts a file over.
"""

from __future__ import annotations

import errno
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import HfApi, constants, errors, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import are_symlinks_supported, http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import (
    WeakFileLock,
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    logging,
)

from phi3edge.checkpoint import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    SINGLE_FILE,
    SMALL_FILES,
    no_safetensors,
    read_json,
    refuse_foreign_code,
    weight_files,
)
from phi3edge.errors import CheckpointError, HubError
from phi3edge.families import parse_config
from phi3edge.files import sha256 as sha256_of
from phi3edge.progress import Told
from phi3edge.types import Source

WORKERS = 4
NETWORK_PACKAGES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


def pull(
    repository: str, revision: str | None = None, progress: Told | None = None, *, weights: bool = True
) -> tuple[Path, Source]:
    """Bring a model into the hub's cache, or find it there.

    Args:
        repository: "organization/name".
        revision: a branch, tag or commit; the main branch if None. A commit that is complete in the cache is not asked
            for again; everything else is, unless HF_HUB_OFFLINE is set.
        progress: told of the bytes of weights as they arrive.
        weights: fetch the weights too, not only what describes them.

    Returns:
        The folder of the snapshot, and a source whose revision is the commit that the revision stands for.

    Raises:
        HubError: gated, missing, offline, no space, refused or broken connection; says what to do.
        CheckpointError, UnsupportedError: a repository that cannot be exported; found before its weights are fetched.
    """
    if revision is not None and {"", ".."} & set(revision.split("/")):
        raise HubError(f"{revision!r} is not a revision")
    storage = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    cached = _cached(storage, revision or "main", weights)
    if cached and revision == cached.name:
        return cached, Source(repository, cached.name)
    if constants.HF_HUB_OFFLINE:
        if cached:
            return cached, Source(repository, cached.name)
        wanted = f"{repository}@{revision}" if revision else repository
        raise HubError(
            f"HF_HUB_OFFLINE is set, and {wanted} is not complete in {storage.parent}", "pull it while online"
        )
    with plain_errors(repository, revision), quiet():
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        commit, files = str(info.sha), {file.rfilename: file for file in info.siblings or []}
        folder = _download(storage, repository, commit, files, progress, weights)
        _remember(storage, revision or "main", commit)
    return folder, Source(repository, commit)


def dataset_file(repository: str, name: str, revision: str | None = None) -> tuple[Path, str]:
    """Bring one file of a data set into the hub's cache, or find it there.

    Args:
        repository: "organization/name".
        name: the file's path in it.
        revision: a branch, tag or commit; the main branch if None.

    Returns:
        The file, and the commit that the revision stands for.

    Raises:
        HubError: see `pull`; or there is no such file.
    """
    with plain_errors(repository, revision, "data set"), quiet():
        try:
            found = hf_hub_download(repository, name, repo_type="dataset", revision=revision, library_name="phi3edge")
        except errors.LocalEntryNotFoundError as error:
            raise HubError(
                f"{repository} has {name} not in {constants.HF_HUB_CACHE}, and it cannot be reached", "try while online"
            ) from error
        except errors.EntryNotFoundError as error:
            raise HubError(f"the data set {repository} has no file {name}") from error
    return (path := Path(found)), path.parents[name.count("/")].name


def _download(
    storage: Path,
    repository: str,
    commit: str,
    files: dict[str, RepoSibling],
    progress: Told | None,
    weights: bool,
) -> Path:
    """Small files first, then, if they describe a model that can be exported, the weights."""
    if CONFIG not in files:
        raise CheckpointError(f"{repository} has no {CONFIG}: not a model in Hugging Face layout")
    if SINGLE_FILE not in files and INDEX not in files:
        raise no_safetensors(repository, list(files))

    def link(name: str) -> Path:
        return Path(hf_hub_download(repository, name, revision=commit, library_name="phi3edge"))

    small = [link(name) for name in SMALL_FILES if name in files]
    folder = small[0].parent
    _refuse_what_cannot_be_exported(folder, repository)
    if not weights:
        return folder
    names, _ = weight_files(read_json(folder, INDEX) if INDEX in files else None)
    if missing := [name for name in names if name not in files]:
        raise CheckpointError(f"{INDEX} of {repository} names {missing[0]}, which is not there")
    _check_space(storage, repository, [files[name] for name in names if not (folder / name).exists()])
    done = dict.fromkeys(names, 0)
    total = sum(files[name].size or 0 for name in names)
    lock, stop = threading.Lock(), threading.Event()

    def fetch(name: str) -> None:
        def advance(position: int) -> None:
            if stop.is_set():  # another file failed, or the user pressed Ctrl-C
                raise CancelledError
            with lock:
                done[name] = position
                if progress:
                    progress(f"pull {repository}", sum(done.values()), total)

        lfs = files[name].lfs
        if (
            lfs
            and re.fullmatch(r"[0-9a-f]{64}", lfs.sha256)
            and not (folder / name).exists()
            and are_symlinks_supported(storage.parent)
        ):
            url = hf_hub_url(repository, name, revision=commit)
            _fetch_blob(storage, url, lfs.sha256, lfs.size, advance)
        link(name)
        advance(files[name].size or 0)

    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for future in as_completed([pool.submit(fetch, name) for name in names]):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return folder


def _fetch_blob(storage: Path, url: str, sha256: str, size: int, advance: Callable[[int], None]) -> None:
    """Download a large file to its place among the cache's blobs, going on from what an earlier attempt left."""
    blob = storage / "blobs" / sha256
    part = blob.with_name(f"{sha256}.incomplete")
    lock = storage.parent / ".locks" / storage.name / f"{sha256}.lock"  # the same that huggingface_hub takes
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        with part.open("ab") as file:
            if file.tell() > size:
                file.seek(0)
                file.truncate()
            headers = build_hf_headers(library_name="phi3edge")
            target: Any = _Watched(file, advance)
            while (start := file.tell()) < size:
                try:
                    http_get(url, target, resume_size=start, headers=headers, expected_size=size)
                except Exception as error:
                    if not _is_network(error) or file.tell() <= start:
                        raise
        if (found := sha256_of(part)) != sha256:
            part.unlink()
            raise HubError(f"{url} arrived damaged: sha256 {found[:12]}, expected {sha256[:12]}", "pull it again")
        part.replace(blob)


class _Watched:
    """A file that tells its position after each write."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self._file, self._advance = file, advance

    def write(self, data: bytes) -> int:
        count = self._file.write(data)
        self._advance(self._file.tell())
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _refuse_what_cannot_be_exported(folder: Path, repository: str) -> None:
    config = read_json(folder, CONFIG)
    refuse_foreign_code(config)
    generation = read_json(folder, GENERATION_CONFIG) if (folder / GENERATION_CONFIG).exists() else None
    parse_config(config, generation, repository.rsplit("/", 1)[-1])


def _check_space(storage: Path, repository: str, files: list[RepoSibling]) -> None:
    """Raise HubError if the disk of the cache cannot take what is still missing of these files."""
    needed = 0
    for file in files:
        part = storage / "blobs" / f"{file.lfs.sha256}.incomplete" if file.lfs else None
        needed += (file.size or 0) - (part.stat().st_size if part and part.exists() else 0)
    free = shutil.disk_usage(storage).free
    if needed > free:
        raise HubError(
            f"no space: {repository} needs {needed / 1e9:.2f} GB more, {storage.parent} has {free / 1e9:.2f} GB free",
            "make room, or set HF_HOME to a folder on another disk",
        )


def _cached(storage: Path, revision: str, weights: bool) -> Path | None:
    """The snapshot of a revision as the cache knows it, if its config and (if asked for) all its weights are there."""
    ref = storage / "refs" / revision
    commit = revision if re.fullmatch(r"[0-9a-f]{40}", revision) else ref.read_text() if ref.is_file() else None
    folder = storage / "snapshots" / (commit or "none")
    if not (folder / CONFIG).exists():
        return None
    if not weights:
        return folder
    names, _ = weight_files(read_json(folder, INDEX) if (folder / INDEX).exists() else None)
    return folder if all((folder / name).exists() for name in names) else None


def _remember(storage: Path, revision: str, commit: str) -> None:
    """Note in the cache what a branch or tag stands for, as huggingface_hub does, for use offline."""
    if revision != commit:
        ref = storage / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


@contextmanager
def plain_errors(repository: str, revision: str | None, kind: str = "model") -> Iterator[None]:
    """Whatever huggingface_hub raises, as one line and what to do."""
    endpoint = constants.ENDPOINT
    login = "log in with `hf auth login`, or set HF_TOKEN"
    again = "run the same command again: what has arrived is kept; HF_HUB_OFFLINE=1 uses complete models of the cache"
    try:
        yield
    except errors.HFValidationError as error:
        raise HubError(
            f"{repository!r} is not a {kind}'s name: {_line(error)}", "expected organization/name"
        ) from error
    except errors.GatedRepoError as error:
        hint = f"ask for access at {endpoint}/{repository}, then {login}"
        raise HubError(f"{repository} is gated, and this account has no access to it", hint) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repository} has no revision {revision!r}", f"see {endpoint}/{repository}") from error
    except errors.RepositoryNotFoundError as error:
        hint = f"check the spelling; for a private {kind} {login}"
        raise HubError(f"{endpoint} has no {kind} {repository}, or it is private", hint) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise HubError(f"{endpoint} refused the token (HTTP {status}) for {repository}", login) from error
        raise HubError(f"{endpoint} failed: {_line(error)}", again) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            hint = "make room, or set HF_HOME to a folder on another disk; what has arrived is kept"
            raise HubError(f"the disk of {constants.HF_HUB_CACHE} is full", hint) from error
        if error.errno is not None and error.filename:
            hint = "set HF_HOME to a folder that can be written to"
            raise HubError(f"cannot write {error.filename}: {error.strerror}", hint) from error
        raise HubError(f"the connection to {endpoint} failed: {_line(error)}", again) from error
    except Exception as error:
        if not _is_network(error):
            raise
        raise HubError(f"the connection to {endpoint} failed: {_line(error)}", again) from error


def _is_network(error: Exception) -> bool:
    """A connection that could not be made, or broke: an error of the HTTP library, or one without a system's number."""
    if isinstance(error, errors.HfHubHTTPError):
        return False
    library = type(error).__module__.split(".")[0] in NETWORK_PACKAGES
    return library or (isinstance(error, OSError) and error.errno is None)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep huggingface_hub's own bars and retry messages off the terminal: `progress` and errors say it."""
    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


def _line(error: BaseException) -> str:
    """The last cause's first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
