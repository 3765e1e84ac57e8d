"""An artifact by a path, whoever made it: the file that a runtime opens, and what can be read of it without one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from phi3edge import folders, manifest
from phi3edge.errors import UsageError
from phi3edge.genai_folder import is_genai, read_folder
from phi3edge.gguf_file import read_header
from phi3edge.types import JSON


@dataclass(frozen=True, slots=True)
class Artifact:
    """What a path stands for.

    Attributes:
        file: what a runtime opens: a .gguf file (of a split one, the first part), an ONNX model, or its folder.
        folder: that it is in.
        said: its manifest; None for one that phi3edge did not write.
    """

    file: Path
    folder: Path
    said: JSON | None = field(repr=False)

    @property
    def is_onnx(self) -> bool:
        """Whether it is an ONNX Runtime GenAI folder, and no GGUF file."""
        return is_genai(self.file)

    @property
    def positions(self) -> int:
        """Tokens that the artifact itself says it is for."""
        if self.is_onnx:
            return int(read_folder(self.file).config["model"]["context_length"])
        found = read_header(self.file).metadata
        return int(found.get(f"{found.get('general.architecture')}.context_length", 0))


def find_artifact(path: Path) -> Artifact:
    """What a user means by a path.

    Args:
        path: a folder that export wrote, a .gguf file, or an ONNX Runtime GenAI folder.

    Raises:
        UsageError: nothing is there, or several artifacts.
        OutputError: a folder that is neither, or a manifest that cannot be read.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist", "expected an exported folder, a .gguf file or an ONNX folder")
    if found := folders.artifacts_in(path):
        raise UsageError(f"{path} holds {len(found)} artifacts", f"name one of them: {found[0]}")
    folder = path if path.is_dir() else path.parent
    ours = (folder / manifest.NAME).is_file() or (path.is_dir() and not is_genai(path))
    said = manifest.read_manifest(folder) if ours else None
    return Artifact(folder / said["files"][0]["name"] if said and path.is_dir() else path, folder, said)
