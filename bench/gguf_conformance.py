"""Compare our GGUF files with those of llama.cpp's own converter, key by key and tensor by tensor.

    python bench/gguf_conformance.py --llama-cpp DIR [--work DIR]

DIR is a checkout of llama.cpp. Small random checkpoints are written, converted by both, and compared; the demo is
among them, since the converter knows only byte-level vocabularies that it has met. Each difference is either in
INTENDED below, with its reason, or WRONG, and then the exit code is 1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from _models import GROUPED, MHA, TIED, Shape, write_model  # noqa: E402
from _tokenizers import ASSISTANT, END, ENDOFTEXT, PIECES, write_sentencepiece  # noqa: E402

from phi3edge.cache import cache_dir  # noqa: E402
from phi3edge.checkpoint import open_checkpoint  # noqa: E402
from phi3edge.demo import build_demo  # noqa: E402
from phi3edge.emitters.gguf import emit  # noqa: E402
from phi3edge.families import phi3  # noqa: E402
from phi3edge.plan import make_plan  # noqa: E402
from phi3edge.quantize import quantize  # noqa: E402
from phi3edge.recipes import load_recipe  # noqa: E402
from phi3edge.tokenizer import load_tokenizer  # noqa: E402

INTENDED = {
    "general.name": "the converter's spelling turns Phi-3's special-token rule off, or on where it is wrong",
    "general.basename": "guessed by the converter from the folder's name",
    "general.finetune": "guessed by the converter from the folder's name",
    "general.version": "guessed by the converter from the folder's name",
    "general.languages": "the model card's, for a hub to show",
    "general.quantization_version": "the layout of quantized blocks, of which these files have none",
    "tokenizer.ggml.eot_token_id": "ends a generation, so that all listed ids do",
    "tokenizer.ggml.eom_token_id": "ends a generation, so that all listed ids do",
    "tokenizer.ggml.unknown_token_id": "the tokenizer's own; the converter looks only into tokenizer.json for it",
    "tokenizer.ggml.add_bos_token": "always written: llama.cpp's default depends on the vocabulary",
    "tokenizer.ggml.add_eos_token": "always written: llama.cpp's default depends on the vocabulary",
    "tokenizer.ggml.add_sep_token": "false, which is llama.cpp's default",
}
"""Why a key differs from the converter's, or is in one of the files only."""

WITHOUT_MODEL_FILE = {
    "tokenizer.ggml.scores": "from the order of merges: the same order as tokenizer.model's scores, other numbers",
}

CASES: dict[str, tuple[Shape | None, dict[str, bool], str]] = {
    "mha f16": (MHA, {}, "f16"),
    "mha bf16": (MHA, {}, "bf16"),
    "mha f32": (MHA, {}, "f32"),
    "float16 weights f16": (Shape(dtype="float16"), {}, "f16"),
    "grouped f16": (GROUPED, {}, "f16"),
    "tied bf16": (TIED, {}, "bf16"),
    "no tokenizer.json": (GROUPED, {"fast": False}, "f16"),
    "no tokenizer.model": (GROUPED, {"model": False}, "f16"),
    "no rstrip": (MHA, {"rstrip": False}, "f16"),
    "all sampling f16": (MHA, {}, "f16"),
    "greedy f16": (MHA, {}, "f16"),
    "demo bf16": (None, {}, "bf16"),
}
"""Shape of the model (None: the demo), what its tokenizer lacks, recipe."""

SAMPLING = {
    "all sampling f16": {
        "sequence": "penalties;top_k;temperature",
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "xtc_probability": 0.25,
        "xtc_threshold": 0.1,
        "temperature": 1,
        "penalty_last_n": -1,
        "penalty_repeat": 1.1,
        "repetition_penalty": 1.3,
        "mirostat": 2,
        "mirostat_tau": 5.0,
        "mirostat_eta": 0.1,
    },
    "greedy f16": {
        "do_sample": False,
        "sequence": "",
        "top_k": None,
        "temperature": 0.0,
        "repetition_penalty": 1.05,
    },
}
"""What generation_config.json holds besides ids that end a generation, by case."""


def make_checkpoint(folder: Path, shape: Shape, lacking: dict[str, bool], case: str) -> Path:
    """A random model with a Phi-3-like SentencePiece vocabulary and Phi-3's ids."""
    vocab = PIECES + 20
    sized = Shape(**{name: getattr(shape, name) for name in shape.__dataclass_fields__} | {"vocab": vocab})
    write_model(folder, sized, shards=2, eos_token_id=ENDOFTEXT, pad_token_id=ENDOFTEXT)
    generation_config = {"eos_token_id": [ENDOFTEXT, ASSISTANT, END], **SAMPLING.get(case, {})}
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    (folder / "tokenizer.json").unlink()
    write_sentencepiece(folder, **lacking)
    return folder


def write_ours(folder: Path, out: Path, recipe_name: str) -> Path:
    """Our file."""
    _, recipe = load_recipe(recipe_name)
    with open_checkpoint(folder) as checkpoint:
        spec = phi3.parse(checkpoint.config, checkpoint.generation_config, checkpoint.name)
        checkpoint.check(spec)
        plan = make_plan(spec, recipe_name, recipe)
        vocabulary = load_tokenizer(folder, spec)
        stream = quantize(checkpoint, plan)
        [written] = emit(
            plan,
            checkpoint.source,
            vocabulary,
            stream,
            out,
            "ours",
            file_type=recipe.gguf_file_type,
            generation_config=checkpoint.generation_config,
        )
    return written.path


def write_theirs(folder: Path, out: Path, recipe_name: str, llama_cpp: Path) -> Path | str:
    """The converter's file, or the last line of its complaint."""
    path = out / "theirs.gguf"
    command = [sys.executable, llama_cpp / "convert_hf_to_gguf.py", folder, "--outfile", path, "--outtype", recipe_name]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else path


def value_of(field: gguf.ReaderField) -> object:
    """Type and value of a key."""
    return [kind.name for kind in field.types], field.contents()


def differences(ours: Path, theirs: Path, intended: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(what, "same", "intended" or "WRONG", why) of every key and tensor."""
    our, their = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    keys = [key for key in dict.fromkeys([*our.fields, *their.fields]) if not key.startswith("GGUF.")]
    for key in keys:
        values = [value_of(reader.fields[key]) if key in reader.fields else None for reader in (our, their)]
        if values[0] == values[1]:
            yield key, "same", ""
        else:
            shown = " | ".join("absent" if value is None else str(value[1])[:40] for value in values)
            yield key, "intended" if key in intended else "WRONG", f"{shown}: {intended.get(key, 'no reason known')}"
    tensors = [{tensor.name: tensor for tensor in reader.tensors} for reader in (our, their)]
    for name in dict.fromkeys([*tensors[0], *tensors[1]]):
        pair = [found.get(name) for found in tensors]
        if None in pair:
            yield name, "WRONG", f"only in {'theirs' if pair[0] is None else 'ours'}"
            continue
        facts = [(t.tensor_type.name, tuple(map(int, t.shape)), bytes(t.data)) for t in pair]
        same = facts[0] == facts[1]
        yield name, "same" if same else "WRONG", "" if same else f"{facts[0][:2]} | {facts[1][:2]}"
    if list(tensors[0]) != list(tensors[1]):
        yield "order of tensors", "intended", "ours is the order of execution, theirs the checkpoint's"


def main() -> int:
    """Run all cases; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a checkout of llama.cpp")
    parser.add_argument("--work", type=Path, help="where files are kept; a temporary folder by default")
    parser.add_argument("--only", nargs="*", help="names of cases")
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name, (shape, lacking, recipe) in CASES.items():
            if args.only and name not in args.only:
                continue
            out = (args.work or Path(temporary)) / name.replace(" ", "-")
            if shape is None:
                folder = build_demo(cache_dir())
                out.mkdir(parents=True)
            else:
                folder = make_checkpoint(out / "Phi-3-tiny-4k-instruct", shape, lacking, name)
            ours, theirs = write_ours(folder, out, recipe), write_theirs(folder, out, recipe, args.llama_cpp)
            reference = intended = None
            if isinstance(theirs, str):
                print(f"\n{name}: the converter fails ({theirs}); compared with its file of the complete checkpoint")
                reference = make_checkpoint(out / "complete" / folder.name, shape or MHA, {}, name)
                theirs = write_theirs(reference, out, recipe, args.llama_cpp)
                intended = INTENDED | WITHOUT_MODEL_FILE
            rows = list(differences(ours, Path(theirs), intended or INTENDED))
            counts = {kind: sum(row[1] == kind for row in rows) for kind in ("same", "intended", "WRONG")}
            print(f"\n{name}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
            for what, kind, why in rows:
                if kind != "same":
                    print(f"  {kind:8}  {what:36}  {why}")
            wrong += counts["WRONG"]
    print(f"\n{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
