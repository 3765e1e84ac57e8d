"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi3edge.budget import Budget
from phi3edge.errors import UsageError
from phi3edge.units import parse_size

if TYPE_CHECKING:
    from phi3edge.validate import Windows

CheckpointArg = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="org/name[@revision] on the hub, a local folder, or 'demo'.")
]
TargetOption = Annotated[str, typer.Option("--target", "-t", help="A target's name, or a path to a .toml file.")]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", "-r", help="A recipe's name or .toml file; default: the target's.")
]
ContextOption = Annotated[
    int | None, typer.Option("--context", min=1, help="Tokens that the KV cache must hold; default: the target's.")
]
FormatsOption = Annotated[
    str | None, typer.Option("--format", "-f", help="gguf, onnx, or both; default: the one that the target prefers.")
]
KVCacheOption = Annotated[
    str | None,
    typer.Option("--kv-cache", help="gguf: f32, f16, q8_0, q4_0; onnx: f32, f16, int8; default: the target's."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, no talk.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Worker threads; default: all cores.")]
TextOption = Annotated[
    Path | None, typer.Option("--text", help="UTF-8 text to evaluate on; default: the documentation inside Python.")
]
ReferenceOption = Annotated[
    str | None, typer.Option("--checkpoint", "-c", help="The reference; default: what the manifest names.")
]
GatesOfOption = Annotated[
    str | None, typer.Option("--target", "-t", help="Whose gates to apply; default: what the manifest names.")
]
ChunksOption = Annotated[
    int,
    typer.Option("--chunks", min=0, help="Windows of the text to evaluate on, 0 for all; more is slower, more exact."),
]
WindowOption = Annotated[int, typer.Option("--window", min=4, help="Tokens in each window.")]
StrideOption = Annotated[
    int | None,
    typer.Option(
        "--stride", min=1, help="Tokens from window to window: at most half a window scores every token; default: one."
    ),
]
GatesOption = Annotated[
    Path | None, typer.Option("--gates", help="A gates.toml of your own, over the gates of target and recipe.")
]
BaselineOption = Annotated[
    Path | None, typer.Option("--baseline", help="An earlier report.json, for gates that are relative to it.")
]
PositionsOption = Annotated[
    bool, typer.Option("--positions/--no-positions", help="Score the positions where long contexts break.")
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget", help="Bytes of the whole artifact, e.g. 1.8GiB: chooses each tensor's codec by its predicted KL."
    ),
]
BitsOption = Annotated[
    float | None, typer.Option("--bits-per-weight", help="The same for the weights alone, in bits each, e.g. 4.25.")
]


def parse_budget(size: str | None, bits_per_weight: float | None) -> Budget | None:
    """The budget that two options mean, if any.

    Raises:
        UsageError: both, or something that is no size.
    """
    if size is not None and bits_per_weight is not None:
        raise UsageError("--budget and --bits-per-weight are two ways to say one thing", "give one of them")
    if size is not None:
        return Budget(bytes=parse_size(size))
    if bits_per_weight is None:
        return None
    if not 0 < bits_per_weight <= 32:
        raise UsageError(f"--bits-per-weight {bits_per_weight:g}: expected more than 0, at most 32")
    return Budget(bits_per_weight=bits_per_weight)


def make_windows(chunks: int, window: int = 512, stride: int | None = None) -> Windows:
    """How the text is cut; 0 chunks are all that it has.

    Raises:
        UsageError: nothing to score, or a stride that would leave tokens out unevenly.
    """
    from phi3edge.validate import Windows

    return Windows(chunks or None, window, stride)


MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="rtn: round to nearest; gptq: calibrated error feedback; awq: scaled channels; awq+gptq. "
        "Default: the recipe's.",
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="self (default), python, self+python, a text file, or hub:ORG/NAME:FILE. A mixture of experts needs "
        "python or a file.",
    ),
]
SequencesOption = Annotated[
    int | None,
    typer.Option("--sequences", min=8, help="Of 512 tokens, to calibrate on; default: by the model's width."),
]
StatisticsOption = Annotated[
    Path | None,
    typer.Option("--statistics", help="For rtn: what `phi3edge calibrate` wrote, or an importance matrix (.gguf)."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where the model is calibrated: cpu or cuda.")]
