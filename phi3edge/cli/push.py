"""`phi3edge push`: an exported folder onto the model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi3edge.cli._options import JsonOption
from phi3edge.cli._output import print_json, progress, say, stdout
from phi3edge.errors import UsageError
from phi3edge.units import size


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that phi3edge export wrote.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository on the hub.")],
    revision: Annotated[str, typer.Option("--revision", help="The branch to upload to.")] = "main",
    create: Annotated[bool, typer.Option("--create", help="Make the repository, and the branch, first.")] = False,
    private: Annotated[bool, typer.Option("--private", help="With --create: only its owner sees it.")] = False,
    allow_failed: Annotated[
        bool, typer.Option("--allow-failed", help="Upload it even if a gate of its report failed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything here, and upload nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload an artifact with its model card, manifest and reports, in one commit.

    The files are held against the manifest's hashes first; an artifact whose report has a failed gate is refused.
    Tokens and endpoint are Hugging Face's own: `hf auth login`, HF_TOKEN, HF_ENDPOINT.

    Examples: `phi3edge push dist/demo-iphone me/demo-gguf --create --private`,
    `phi3edge push dist/demo-iphone me/demo-gguf --dry-run`
    """
    from phi3edge.push import prepare
    from phi3edge.push import push as upload_to

    if private and not create:
        raise UsageError("--private is for a repository that is made now", "add --create")
    with progress(quiet=as_json) as stages:
        upload = prepare(folder, repository, revision, allow_failed, stages)
        done = None if dry_run else upload_to(upload, create, private, stages)
    if as_json:
        return print_json(
            {
                "repository": upload.repository,
                "revision": upload.revision,
                "files": list(upload.files),
                "bytes": upload.bytes,
                "commit": done.commit if done else None,
                "url": done.url if done else None,
            }
        )
    for name in upload.files:
        say(f"{name}: {size((upload.folder / name).stat().st_size)}")
    if done:
        stdout.print(done.url, soft_wrap=True)
    else:
        say(f"dry run: {size(upload.bytes)} would go to {upload.repository}, branch {upload.revision}")
    return None
