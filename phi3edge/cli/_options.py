"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from phi3edge.budget import Budget
from phi3edge.errors import UsageError
from phi3edge.units import parse_size

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
ChunksOption = Annotated[
    int, typer.Option("--chunks", min=1, help="Chunks of 512 tokens to evaluate on; more is slower and more exact.")
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
    typer.Option("--calibration", help="self, python, self+python, a text file, or hub:ORG/NAME:FILE."),
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
