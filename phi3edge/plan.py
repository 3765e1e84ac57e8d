"""What an export will write, and whether it fits, from the config alone: no weights are read, nothing is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from phi3edge.codecs import codec, codec_names, is_float, row_bytes
from phi3edge.errors import ConfigError, DoesNotFitError, UnsupportedError
from phi3edge.prequantized import exact_codec
from phi3edge.providers import codecs_for, load_provider
from phi3edge.recipes import Recipe, shipped_recipes
from phi3edge.targets import KV_BYTES, Format, Runtime, Target
from phi3edge.types import JSON, ROLES, ModelSpec, Option, QuantPlan, TensorPlan, TensorSpec, stays_float, total_kl
from phi3edge.units import size

MICRO_BATCH = 512
"""Prompt tokens that llama.cpp computes at once by default (n_ubatch). ONNX Runtime GenAI computes them all at once."""

SCALE_BYTES = 4
"""A block's scale in memory on ONNX Runtime's CPU provider: float32, whatever the file holds."""

BLOCK_SUM_BYTES = 4
"""What the CPU provider packs beside each block's codes: a float32 sum (onnxruntime core/mlas/lib/qnbitgemm.cpp)."""

RUNTIME_BYTES = 64 * 2**20
"""What a runtime takes besides weights, KV cache and scratch: code, vocabulary, graph. Measured near 50 MiB."""


TEXT_ONLY = (
    "Text only: this is the model's text decoder. What reads images is not in the artifact; the parameters and "
    "the reference are the text decoder's too."
)
"""Said of models that also read images."""

NO_GGUF = {
    "phi3small": "llama.cpp has no architecture with block-sparse attention, whose mask differs from head to head",
}
"""Families that no GGUF file can hold, and why."""


def make_plan(model: ModelSpec, name: str, recipe: Recipe, choices: Mapping[str, Option] | None = None) -> QuantPlan:
    """Choose a codec and method for every tensor of a model.

    Args:
        model: what is planned.
        name: of the recipe.
        recipe: says the codecs and the method.
        choices: what a byte budget chose, by tensor name; the recipe's own codec for the others.

    Raises:
        ConfigError: a row that neither the recipe's codec nor its declared fallbacks can hold.
        UnsupportedError: codes of the checkpoint that no codec of the recipe's format can hold as they are.
    """
    found = choices or {}
    return QuantPlan(model, name, tuple(_plan_tensor(t, model, name, recipe, found.get(t.name)) for t in model.tensors))


def _plan_tensor(
    tensor: TensorSpec, model: ModelSpec, name: str, recipe: Recipe, choice: Option | None = None
) -> TensorPlan:
    wanted = choice.codec if choice else recipe.wanted(tensor, model.layers, model.tied)
    columns = tensor.shape[-1]
    if tensor.grid is not None and not is_float(wanted):
        chosen = wanted = exact_codec(tensor.grid, codec(wanted).FORMATS[0])
        method = "imported"
    else:
        chosen = recipe.resolve(name, wanted, tensor)
        method = "cast" if is_float(chosen) else "rtn" if tensor.role == "embedding" else recipe.method
    return TensorPlan(
        tensor=tensor,
        codec=chosen,
        method=method,
        bytes=tensor.size // columns * row_bytes(chosen, columns),
        wanted=None if chosen == wanted else wanted,
        predicted_kl=choice.loss if choice else None,
    )


def budget_codecs(
    model: ModelSpec, name: str, recipe: Recipe, target: Target, format_: Format
) -> dict[str, tuple[str, ...]]:
    """The codecs that a byte budget may choose from, by tensor name; of what it leaves alone, none.

    They are those of the recipe's [budget] that the target's runtime has kernels for, and their fallbacks where they do
    not hold a tensor's rows. Norms, and linears that keep the checkpoint's own integers, are left alone.

    Raises:
        ConfigError: no codec is left for a tensor.
    """
    assert recipe.budget is not None
    found = {}
    for tensor in model.tensors:
        if stays_float(tensor.role) or tensor.grid is not None:
            continue
        known = known_codecs(tensor.role, model, target.formats[format_], format_)
        rule = recipe.budget.codecs_of(tensor.role, model.tied)
        held = dict.fromkeys(recipe.resolve(name, codec_, tensor) for codec_ in rule)
        found[tensor.name] = tuple(codec_ for codec_ in held if codec_ in known)
        if not found[tensor.name]:
            raise ConfigError(
                f"recipe {name}: {target.formats[format_].name} has no kernel for any codec that its [budget] has for "
                f"{tensor.role}",
                f"codecs there: {', '.join(known)}",
            )
    return found


@dataclass(frozen=True, slots=True)
class RoleSummary:
    """All tensors of a role that share a codec: what a person wants to see of a plan."""

    role: str
    codec: str
    wanted: str | None
    method: str
    tensors: int
    weights: int
    bytes: int
    predicted_kl: float | None

    @property
    def bits_per_weight(self) -> float:
        """Packed bits over number of weights."""
        return 8 * self.bytes / self.weights


def summarize(plan: QuantPlan) -> list[RoleSummary]:
    """The plan by role and codec, roles in the order of ROLES, larger parts first."""
    groups: dict[tuple[str, str, str | None, str], list[TensorPlan]] = {}
    for t in plan.tensors:
        groups.setdefault((t.tensor.role, t.codec, t.wanted, t.method), []).append(t)
    rows = [
        RoleSummary(*key, len(group), sum(t.tensor.size for t in group), sum(t.bytes for t in group), total_kl(group))
        for key, group in groups.items()
    ]
    return sorted(rows, key=lambda row: (ROLES.index(row.role), -row.bytes))


@dataclass(frozen=True, slots=True)
class Fit:
    """A plan's memory on a target, in bytes, and its speed limit there. Estimates, before anything is run.

    Attributes:
        weights: as they lie in the runtime's memory.
        kv_cache: for `context` tokens, in the target's KV-cache type.
        scratch: activations of `prompt` tokens, and the runtime itself.
        prompt: tokens of a prompt that the runtime computes at once, at most.
        limit: memory that the app may use.
        largest_context: most tokens that would fit, at most the model's own context; 0 if not even the weights fit.
        roofline_tokens_per_s: memory bandwidth over the bytes that one decoded token reads, with an empty cache.
        roofline_full_tokens_per_s: the same with a full cache.
    """

    context: int
    weights: int
    kv_cache: int
    scratch: int
    prompt: int
    limit: int
    largest_context: int
    roofline_tokens_per_s: float
    roofline_full_tokens_per_s: float

    @property
    def total(self) -> int:
        """All the memory that the plan needs."""
        return self.weights + self.kv_cache + self.scratch

    @property
    def fits(self) -> bool:
        """Whether the target holds it."""
        return self.total <= self.limit


def estimate_fit(plan: QuantPlan, target: Target, format_: Format, context: int) -> Fit:
    """Memory and speed limit of a plan in a format on a target, with a KV cache for `context` tokens.

    KV cache: 2 x layers x KV heads x head size numbers a token, allocated for all tokens at the start. Scratch: the
    float32 activations that a runtime keeps at once (logits, gate and up, four hidden states) of the tokens that it
    computes at once. A decoded token reads every weight but the embedding (one row of it) and the experts that are not
    used, and the keys and values of all tokens before it.
    """
    model, runtime = plan.model, target.formats[format_]
    kv_per_token = int(2 * model.layers * model.kv_heads * model.head_dim * KV_BYTES[runtime.kv_cache])
    used, count = (model.experts.used, model.experts.count) if model.experts else (1, 1)
    activations = 4 * (model.vocab_size + 2 * used * model.intermediate_size + 4 * model.hidden_size)
    resident = {t: _resident_bytes(t, plan, runtime, format_) for t in plan.tensors}
    weights = sum(resident.values())
    batch = MICRO_BATCH if format_ == "gguf" else model.context_length
    free = target.memory.app - weights - RUNTIME_BYTES
    largest = (free - batch * activations) // kv_per_token
    if largest < batch:  # then no more tokens than the context are computed at once
        largest = min(batch, free // (activations + kv_per_token))
    read = weights - sum(n for t, n in resident.items() if t.tensor.role == "embedding" and not model.tied)
    if not _computes_all_experts(model, runtime, format_):
        read -= sum(n for t, n in resident.items() if t.tensor.expert is not None) * (count - used) // count
    bandwidth = target.bandwidth.gb_per_s * 1e9
    prompt = min(batch, context)
    return Fit(
        context=context,
        weights=weights,
        kv_cache=kv_per_token * context,
        scratch=RUNTIME_BYTES + prompt * activations,
        prompt=prompt,
        limit=target.memory.app,
        largest_context=max(0, min(model.context_length, runtime.max_context or largest, largest)),
        roofline_tokens_per_s=bandwidth / read,
        roofline_full_tokens_per_s=bandwidth / (read + kv_per_token * context),
    )


def _resident_bytes(planned: TensorPlan, plan: QuantPlan, runtime: Runtime, format_: Format) -> int:
    """Bytes that a tensor takes in the runtime's memory: as packed, but for ONNX Runtime's CPU provider.

    There a linear's scales are float32, its kernel packs a sum beside each block, and float16 becomes float32; a
    gathered embedding stays as it is. A tied one is both, in two copies.
    """
    tensor, grid = planned.tensor, codec(planned.codec)
    if format_ == "gguf" or runtime.provider != "cpu" or stays_float(tensor.role):
        return planned.bytes
    if is_float(planned.codec):
        packed = 4 * tensor.size
    else:
        codes, _, zero_points = grid.sections(tensor.shape[-1])
        blocks = tensor.shape[-1] // grid.BLOCK_SIZE
        packed = tensor.shape[0] * (codes + zero_points + blocks * (SCALE_BYTES + BLOCK_SUM_BYTES))
    if tensor.role != "embedding":
        return packed
    return planned.bytes + packed if plan.model.tied else planned.bytes


def choose_context(model: ModelSpec, target: Target, format_: Format, wanted: int | None) -> int:
    """The context to plan for: the wanted one, else the target's default for the format, at most the model's own.

    Where a runtime ignores the model's attention window, the default ends with the window: up to there it is exact.

    Raises:
        UnsupportedError: more than the model's own context, or than the runtime is known to bear, was asked for.
    """
    runtime = target.formats[format_]
    most = min(model.context_length, runtime.max_context or model.context_length)
    if wanted is None:
        window = None if heeds_window(runtime, format_) else model.sliding_window
        return min(runtime.context or target.context, most, window or most)
    if wanted > model.context_length:
        raise UnsupportedError(
            f"--context {wanted} is more than {model.name} was trained for ({model.context_length})",
            f"use --context {most} or less",
        )
    if wanted > most:
        raise UnsupportedError(
            f"--context {wanted} is more than {runtime.name} is known to bear ({most})", f"use --context {most} or less"
        )
    return wanted


def heeds_window(runtime: Runtime, format_: Format) -> bool:
    """Whether attention looks back no further than the model's window; llama.cpp has that switched off for phi3."""
    return format_ == "onnx" and load_provider(runtime.provider).reads_window


def _computes_all_experts(model: ModelSpec, runtime: Runtime, format_: Format) -> bool:
    """Whether a graph computes every expert of a mixture for every token, not only those that it chose."""
    return model.experts is not None and format_ == "onnx" and not load_provider(runtime.provider).picks_rows


def require_format(model: ModelSpec, format_: Format, runtime: Runtime) -> None:
    """Raise UnsupportedError for a model that a format's runtime cannot run."""
    if model.experts and format_ == "onnx" and runtime.provider == "dml":
        raise UnsupportedError(
            f"{model.name}: the ONNX graph of a mixture of experts is for the CPU, CUDA and WebGPU; there is none for "
            "provider dml",
            "use --format gguf, or target cpu",
        )
    if model.experts and runtime.kv_cache == "int8":
        raise UnsupportedError(f"{model.name}: an int8 KV cache is not calibrated for a mixture of experts")
    if format_ == "gguf" and model.family in NO_GGUF:
        raise UnsupportedError(
            f"{model.name} cannot be a GGUF file: {NO_GGUF[model.family]}", "write it with --format onnx"
        )


def require_kernels(plan: QuantPlan, target_name: str, target: Target, format_: Format) -> None:
    """Raise unless the target's runtime has kernels for every codec of a plan.

    Raises:
        UnsupportedError: with the role, its codec, and the codecs that the runtime takes there; or with the KV cache.
    """
    runtime, model = target.formats[format_], plan.model
    if runtime.kv_cache == "int8" and model.block_sparse:
        raise UnsupportedError(
            f"{model.name} keeps its KV cache in floats: ONNX Runtime's SparseAttention has none of 8 bits",
            "use --kv-cache f32",
        )
    for role, name in dict.fromkeys((t.tensor.role, t.codec) for t in plan.tensors):
        known = known_codecs(role, model, runtime, format_)
        if name not in known and not (is_float(name) and stays_float(role)):
            raise UnsupportedError(
                f"recipe {plan.recipe} has codec {name} for role {role}; {runtime.name} has no kernel for it",
                f"codecs there: {', '.join(known)}; recipe of target {target_name}: {runtime.recipe}",
            )


def known_codecs(role: str, model: ModelSpec, runtime: Runtime, format_: Format) -> list[str]:
    """Those codecs that a runtime has kernels for, for a role of a model."""
    known = list(runtime.codecs) or [n for n in codec_names() if format_ in codec(n).FORMATS]
    return codecs_for(runtime.provider, role, known, model.tied) if format_ == "onnx" else known


def warnings(plan: QuantPlan, target: Target, format_: Format, context: int) -> list[str]:
    """What an engineer should know before shipping this plan in this format on this target."""
    runtime, model = target.formats[format_], plan.model
    notes = [*target.notes, *runtime.notes]
    if model.images is not None:
        notes.append(TEXT_ONLY)
    window = model.sliding_window
    if window is not None and max(context, model.context_length) > window and not heeds_window(runtime, format_):
        who = "llama.cpp" if format_ == "gguf" else runtime.name
        ends = "" if context > window else " This artifact is for contexts up to there; --context allows more."
        notes.append(
            f"The model attends to the last {window} tokens; {who} ignores that window, so beyond {window} tokens "
            f"of context its answers differ from the reference.{ends}"
        )
    original = model.original_context_length
    if format_ == "gguf" and model.rope.by_length:
        side, other = ("up to", "above") if context <= original else ("above", "up to")
        notes.append(
            f"llama.cpp chooses LongRoPE's factors once, by the context it is opened with: this file is for contexts "
            f"{side} {original} tokens. Opened with one {other} {original}, its answers differ from the reference"
            + ("." if context <= original else f", and so do those to sequences that have at most {original} tokens.")
        )
    if format_ == "gguf" and model.experts:
        notes.append(
            "llama.cpp weighs both experts of a token by 1. Where the score of another one is within "
            f"{200 * model.experts.jitter:g} % of a chosen one's, the model shares the weight: for such tokens, and "
            "where they are attended to, answers differ from the reference."
        )
    if _computes_all_experts(model, runtime, format_):
        notes.append(
            f"{runtime.name} has no operator that picks the tokens of an expert: each of a layer's experts is computed "
            "for every token, which is exact and reads all weights."
        )
    if not runtime.runs_here:
        notes.append(
            f"{runtime.name} is not run here: the graph is held against a list of its operators and types, and figures "
            "come from the same weights on the CPU."
        )
    if imported := [t for t in plan.tensors if t.method == "imported"]:
        kept = " and ".join(sorted({t.codec for t in imported}))
        notes.append(
            f"{len(imported)} linears keep the checkpoint's integers, as {kept}: nothing is rounded again. The recipe "
            "decides the rest."
        )
    fallbacks = sorted({(t.wanted, t.codec) for t in plan.tensors if t.wanted})
    notes += [f"Rows that are no whole blocks of {wanted} are written as {taken}." for wanted, taken in fallbacks]
    return notes


def require_fit(plan: QuantPlan, fit: Fit, target_name: str, target: Target, format_: Format) -> None:
    """Raise unless the plan fits its target; the hint names what would.

    Raises:
        DoesNotFitError: with the largest context that fits, and the recipes that fit at this context.
    """
    if fit.fits:
        return
    options = []
    if fit.largest_context >= 256:
        options.append(f"--context {fit.largest_context // 256 * 256}")
    for name, recipe in shipped_recipes().items():
        if name != plan.recipe and format_ in recipe.formats and recipe.budget is None:
            try:
                other = make_plan(plan.model, name, recipe)
            except (ConfigError, UnsupportedError):  # it cannot hold this checkpoint: no option
                continue
            if other.weight_bytes < plan.weight_bytes and estimate_fit(other, target, format_, fit.context).fits:
                options.append(f"--recipe {name}")
    raise DoesNotFitError(
        f"{plan.model.name} as {plan.recipe} does not fit {target_name}: weights {size(fit.weights)} + KV cache "
        f"{size(fit.kv_cache)} ({fit.context} tokens) + scratch {size(fit.scratch)} = {size(fit.total)}, "
        f"the app may use {size(fit.limit)}",
        f"what fits: {', '.join(options) or 'no shipped recipe at any context'}; or --force to write it anyway",
    )


def chosen_tensors(plan: QuantPlan) -> list[JSON]:
    """What a byte budget chose, tensor by tensor; empty without one."""
    return [
        {"name": t.tensor.name, "codec": t.codec, "bytes": t.bytes, "predicted_kl": t.predicted_kl}
        for t in plan.tensors
        if t.predicted_kl is not None
    ]


def to_json(plan: QuantPlan, fit: Fit) -> JSON:
    """The plan and its fit as plain data, for --json and the manifest."""
    return {
        "recipe": plan.recipe,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "weight_bytes": plan.weight_bytes,
        "predicted_kl": plan.predicted_kl,
        "roles": [{**asdict(row), "bits_per_weight": round(row.bits_per_weight, 4)} for row in summarize(plan)],
        "chosen": chosen_tensors(plan),
        "fit": {**asdict(fit), "total": fit.total, "fits": fit.fits, "estimate": True},
    }
