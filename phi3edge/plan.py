"""What an export will write, and whether it fits, from the config alone: no weights are read, nothing is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from phi3edge.codecs import is_float, row_bytes
from phi3edge.errors import DoesNotFitError, UnsupportedError
from phi3edge.recipes import Recipe, shipped_recipes
from phi3edge.targets import KV_BYTES, Format, Target
from phi3edge.types import JSON, ROLES, ModelSpec, QuantPlan, TensorPlan, TensorSpec
from phi3edge.units import size

MICRO_BATCH = 512
"""Prompt tokens that llama.cpp computes at once by default (n_ubatch)."""

RUNTIME_BYTES = 64 * 2**20
"""What a runtime takes besides weights, KV cache and scratch: code, vocabulary, graph. Measured near 50 MiB."""


def make_plan(model: ModelSpec, name: str, recipe: Recipe) -> QuantPlan:
    """Choose a codec and method for every tensor of a model.

    Raises:
        ConfigError: a row that neither the recipe's codec nor its declared fallbacks can hold.
    """
    return QuantPlan(model, name, tuple(_plan_tensor(t, model, name, recipe) for t in model.tensors))


def _plan_tensor(tensor: TensorSpec, model: ModelSpec, name: str, recipe: Recipe) -> TensorPlan:
    wanted = recipe.wanted(tensor, model.layers, model.tied)
    codec = recipe.resolve(name, wanted, tensor)
    columns = tensor.shape[-1]
    return TensorPlan(
        tensor=tensor,
        codec=codec,
        method="cast" if is_float(codec) else recipe.method,
        bytes=tensor.size // columns * row_bytes(codec, columns),
        wanted=None if codec == wanted else wanted,
    )


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
        RoleSummary(*key, len(group), sum(t.tensor.size for t in group), sum(t.bytes for t in group))
        for key, group in groups.items()
    ]
    return sorted(rows, key=lambda row: (ROLES.index(row.role), -row.bytes))


@dataclass(frozen=True, slots=True)
class Fit:
    """A plan's memory on a target, in bytes, and its speed limit there. Estimates, before anything is run.

    Attributes:
        kv_cache: for `context` tokens, in the target's KV-cache type.
        scratch: activations of one micro-batch, and the runtime itself.
        limit: memory that the app may use.
        largest_context: most tokens that would fit, at most the model's own context; 0 if not even the weights fit.
        roofline_tokens_per_s: memory bandwidth over the bytes that one decoded token reads, with an empty cache.
        roofline_full_tokens_per_s: the same with a full cache.
    """

    context: int
    weights: int
    kv_cache: int
    scratch: int
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

    KV cache: 2 x layers x KV heads x head size numbers a token. Scratch: the float32 activations of a micro-batch that
    llama.cpp keeps at once (logits, gate and up, four hidden states). A decoded token reads every weight but the
    embedding (one row of it), and the keys and values of all tokens before it.
    """
    model = plan.model
    kv_per_token = int(2 * model.layers * model.kv_heads * model.head_dim * KV_BYTES[target.formats[format_].kv_cache])
    activations = model.vocab_size + 2 * model.intermediate_size + 4 * model.hidden_size
    scratch = RUNTIME_BYTES + 4 * min(MICRO_BATCH, context) * activations
    free = target.memory.app - plan.weight_bytes - RUNTIME_BYTES
    largest = (free - 4 * MICRO_BATCH * activations) // kv_per_token
    if largest < MICRO_BATCH:  # then the micro-batch is as small as the context
        largest = min(MICRO_BATCH, free // (4 * activations + kv_per_token))
    embedding = 0 if model.tied else sum(t.bytes for t in plan.tensors if t.tensor.role == "embedding")
    read, bandwidth = plan.weight_bytes - embedding, target.bandwidth.gb_per_s * 1e9
    return Fit(
        context=context,
        weights=plan.weight_bytes,
        kv_cache=kv_per_token * context,
        scratch=scratch,
        limit=target.memory.app,
        largest_context=max(0, min(model.context_length, largest)),
        roofline_tokens_per_s=bandwidth / read,
        roofline_full_tokens_per_s=bandwidth / (read + kv_per_token * context),
    )


def choose_context(model: ModelSpec, target: Target, wanted: int | None) -> int:
    """The context to plan for: the wanted one, else the target's default, at most what the model was trained for.

    Raises:
        UnsupportedError: more than the model's own context was asked for.
    """
    if wanted is None:
        return min(target.context, model.context_length)
    if wanted > model.context_length:
        raise UnsupportedError(
            f"--context {wanted} is more than {model.name} was trained for ({model.context_length})",
            f"use --context {model.context_length} or less",
        )
    return wanted


def warnings(plan: QuantPlan, target: Target, format_: Format, context: int) -> list[str]:
    """What an engineer should know before shipping this plan in this format on this target."""
    runtime = target.formats[format_]
    notes = [*target.notes, *runtime.notes]
    window = plan.model.sliding_window
    if window is not None and context > window and format_ == "gguf":
        notes.append(
            f"The model attends to the last {window} tokens; llama.cpp ignores that window, so beyond {window} tokens "
            "of context its answers differ from the reference."
        )
    fallbacks = sorted({(t.wanted, t.codec) for t in plan.tensors if t.wanted})
    notes += [f"Rows that are no whole blocks of {wanted} are written as {codec}." for wanted, codec in fallbacks]
    if runtime.codecs:
        odd = sorted({t.codec for t in plan.tensors if not is_float(t.codec)} - set(runtime.codecs))
        notes += [f"{runtime.name} has no kernel for {codec}." for codec in odd]
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
        if name != plan.recipe and format_ in recipe.formats:
            other = make_plan(plan.model, name, recipe)
            if other.weight_bytes < plan.weight_bytes and estimate_fit(other, target, format_, fit.context).fits:
                options.append(f"--recipe {name}")
    raise DoesNotFitError(
        f"{plan.model.name} as {plan.recipe} does not fit {target_name}: weights {size(fit.weights)} + KV cache "
        f"{size(fit.kv_cache)} ({fit.context} tokens) + scratch {size(fit.scratch)} = {size(fit.total)}, "
        f"the app may use {size(fit.limit)}",
        f"what fits: {', '.join(options) or 'no shipped recipe at any context'}; or --force to write it anyway",
    )


def to_json(plan: QuantPlan, fit: Fit) -> JSON:
    """The plan and its fit as plain data, for --json and the manifest."""
    return {
        "recipe": plan.recipe,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "weight_bytes": plan.weight_bytes,
        "roles": [{**asdict(row), "bits_per_weight": round(row.bits_per_weight, 4)} for row in summarize(plan)],
        "fit": {**asdict(fit), "total": fit.total, "fits": fit.fits, "estimate": True},
    }
