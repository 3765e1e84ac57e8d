"""`phi3edge pull`: fetch a checkpoint from the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from phi3edge.cli._options import JsonOption
from phi3edge.cli._output import print_json, progress, say
from phi3edge.progress import reporting


def pull(
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME[@REVISION]", help="A repository on the hub.")],
    as_json: JsonOption = False,
) -> None:
    """Fetch what an export needs from the hub: safetensors, config, tokenizer. Resumes where it stopped.

    Tokens, mirrors, cache and offline mode are Hugging Face's own: HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE.

    Example: `phi3edge pull microsoft/Phi-3-mini-4k-instruct`
    """
    from phi3edge.hub import pull as fetch

    name, _, revision = repository.partition("@")
    with progress(quiet=as_json) as stages, reporting(stages) as told:
        folder, source = fetch(name, revision or None, told)
    if as_json:
        return print_json({"path": str(folder), "repository": source.repository, "revision": source.revision})
    say(f"{source.repository} at commit {source.revision}")
    typer.echo(folder)
    return None
