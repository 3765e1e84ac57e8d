"""The errors that users see: what was expected, what came, and what to do next.

Raise them deep, with the facts; the command line formats them once, in one place, and maps them to exit codes.
"""


class Phi3EdgeError(Exception):
    """Something the user can act on. Ends a command with exit code 2.

    Args:
        message: one line: what is wrong, what was expected and what came.
        hint: one line: what to do about it, if there is something; a command to type where possible.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(Phi3EdgeError):
    """An option or a combination of options that makes no sense."""


class CheckpointError(Phi3EdgeError):
    """A checkpoint that cannot be read, is not safe to read, or is not what its config says."""


class HubError(Phi3EdgeError):
    """A model hub that could not give what was asked for: gated, missing, offline, no space."""


class ConfigError(Phi3EdgeError):
    """A recipe, target or config.json with an unknown, missing or wrong field."""


class UnsupportedError(Phi3EdgeError):
    """A model, field or format that would need code that phi3edge does not have; refused rather than guessed."""


class DoesNotFitError(Phi3EdgeError):
    """A plan that needs more memory or file size than its target has."""


class OutputError(Phi3EdgeError):
    """An output that exists, cannot be written, or does not match its manifest."""


class RunnerError(Phi3EdgeError):
    """A runtime that is missing, crashed, hung or refused the artifact."""


class MissingExtraError(Phi3EdgeError):
    """A feature whose optional dependency is not installed; the hint is the command that installs it."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs a package that is not installed", install_command(extra))
        self.extra = extra


def install_command(extra: str) -> str:
    """The command that adds an extra to the Python that runs this, from where phi3edge itself was installed."""
    import json
    import sys
    from importlib import metadata
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    wanted = f"'phi3edge[{extra}]'"
    try:
        origin = json.loads(metadata.distribution("phi3edge").read_text("direct_url.json") or "{}")  # PEP 610
    except metadata.PackageNotFoundError:
        origin = {}
    if origin.get("dir_info", {}).get("editable"):
        wanted = f"--editable '{url2pathname(urlsplit(origin['url']).path)}[{extra}]'"
    elif vcs := origin.get("vcs_info"):
        wanted = f"'phi3edge[{extra}] @ {vcs['vcs']}+{origin['url']}@{vcs['commit_id']}'"
    elif origin:
        wanted = f"'phi3edge[{extra}] @ {origin['url']}'"
    return f"{sys.executable} -m pip install {wanted}"


class GateError(Phi3EdgeError):
    """An artifact that ran, and whose figures miss a gate. Ends a command with exit code 1."""

    exit_code = 1
