"""Recipes: which codec each role and layer of a model gets, as data (recipes/*.toml)."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from phi3edge import _toml
from phi3edge._toml import Size, Strict
from phi3edge.codecs import codec_names, holds, is_float
from phi3edge.errors import ConfigError, UsageError
from phi3edge.gates import Gates, known_gates
from phi3edge.registry import did_you_mean
from phi3edge.types import FUSED, ROLES, TensorSpec, stays_float

Method = Literal["rtn", "awq", "gptq", "awq+gptq"]
METHODS = get_args(Method)
GROUPS = ("linear", "norm")
"""Names in [codecs] that stand for several roles: every linear; every norm, with biases and routers, which stay floats
like them (f32 where nothing is said). A role's own name wins over its group; that of the fused linear that it is a part
of comes in between."""


def _known_codec(name: str) -> str:
    if name not in codec_names():
        raise ValueError(f"unknown codec {name!r}; {did_you_mean(name, codec_names())}")
    return name


class Layers(Strict):
    """A choice among the n decoder blocks, numbered from 0.

    Block i is chosen if it is among the first or last ones, or if it is every `every`-th of those after the first ones.
    `first` and `last` are numbers of blocks (4) or shares of them ("1/8"). With 1/8, 1/8 and 3 this is llama.cpp's
    `use_more_bits` (src/llama-quant.cpp).
    """

    first: int | str = 0
    last: int | str = 0
    every: int | None = None

    @field_validator("first", "last")
    @classmethod
    def _share(cls, value: int | str) -> int | str:
        try:
            good = value >= 0 if isinstance(value, int) else 0 <= Fraction(value) <= 1
        except (ValueError, ZeroDivisionError):
            good = False
        if not good:
            raise ValueError("expected a number of blocks such as 4, or a share of them such as '1/8'")
        return value

    @field_validator("every")
    @classmethod
    def _step(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError("expected 1 or more")
        return value

    def chosen(self, layer: int, layers: int) -> bool:
        """Whether block `layer` of `layers` is chosen."""
        start = _count(self.first, layers)
        stop = layers - self.last if isinstance(self.last, int) else int(layers * (1 - Fraction(self.last)))
        if layer < start or layer >= stop:
            return True
        return self.every is not None and (layer - start) % self.every == self.every - 1


def _count(share: int | str, layers: int) -> int:
    return share if isinstance(share, int) else int(layers * Fraction(share))


class Upgrade(Strict):
    """Another codec for some roles in some layers."""

    roles: tuple[str, ...]
    layers: Layers
    codec: str

    _codec = field_validator("codec")(_known_codec)

    @field_validator("roles")
    @classmethod
    def _known_roles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for role in value:
            if role not in ROLES:
                raise ValueError(f"unknown role {role!r}; {did_you_mean(role, ROLES)}")
        return value


class BudgetRule(Strict):
    """What a byte budget may choose from: one codec for each linear, embedding and head.

    Attributes:
        codecs: the codecs that any of them may take; where they do not hold its rows, their fallbacks.
        roles: another choice for some roles; "tied" for an embedding that is also the head.
        size: the budget where none is given: bytes of the whole artifact.
    """

    codecs: tuple[str, ...] = Field(min_length=1)
    roles: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = {}
    size: Size | None = None

    @field_validator("codecs", "roles")
    @classmethod
    def _known(cls, value: Any) -> Any:
        for name in value if isinstance(value, tuple) else [n for names in value.values() for n in names]:
            _known_codec(name)
        return value

    @field_validator("roles")
    @classmethod
    def _chosen_roles(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        known = (*(role for role in ROLES if group(role) == "linear"), "tied")
        for role in value:
            if role not in known:
                raise ValueError(f"unknown role {role!r}; {did_you_mean(role, known)}")
        return value

    def codecs_of(self, role: str, tied: bool) -> tuple[str, ...]:
        """The codecs that a role may take; a tied embedding is also the head: "tied"'s or the head's."""
        if role == "embedding" and tied:
            return self.roles.get("tied") or self.roles.get("head") or self.codecs
        return self.roles.get(role, self.codecs)


class Recipe(Strict):
    """A recipe file.

    Attributes:
        codecs: role, or "linear" or "norm" for all roles of that kind, to codec; "tied" for an embedding that is also
            the head, where that is not the head's.
        upgrades: exceptions by role and layer; the last one that applies wins.
        fallback: codec to the codec that is taken where a row is not whole blocks of it.
        gguf_file_type: the number that llama.cpp shows for this mix (`general.file_type`).
        budget: what a byte budget chooses from, in place of `codecs`; None for a recipe that is no mix by budget.
        gates: what an artifact of it is held to, over the target's; see phi3edge.gates.
    """

    summary: str
    formats: tuple[Literal["gguf", "onnx"], ...]
    method: Method = "rtn"
    gguf_file_type: int | None = Field(default=None, ge=0, lt=2**31)
    codecs: dict[str, str]
    upgrades: tuple[Upgrade, ...] = ()
    fallback: dict[str, str] = {}
    budget: BudgetRule | None = None
    gates: Gates = {}

    _gates = field_validator("gates")(known_gates)

    @field_validator("codecs", "fallback")
    @classmethod
    def _codecs(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value.values():
            _known_codec(name)
        return value

    @field_validator("fallback")
    @classmethod
    def _fallback_keys(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            _known_codec(name)
        return value

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        known = (*ROLES, *GROUPS, "tied")
        for key in self.codecs:
            if key not in known:
                raise ValueError(f"[codecs] names unknown role {key!r}; {did_you_mean(key, known)}")
        for role in ROLES:
            named = any(name in self.codecs for name in (role, FUSED.get(role), group(role)))
            if not named and (role.endswith("norm") or not stays_float(role)):
                raise ValueError(f"[codecs] says nothing for role {role!r}; name it, or its group {group(role)!r}")
        return self

    def wanted(self, tensor: TensorSpec, layers: int, tied: bool) -> str:
        """The codec that the recipe names for a tensor. A tied embedding is also the head: "tied" or the head's."""
        if tensor.role == "embedding" and tied:
            return self.codecs.get("tied") or self.codecs.get("head") or self.codecs["linear"]
        role, fused, layer = tensor.role, FUSED.get(tensor.role, tensor.role), tensor.layer
        choice = self.codecs.get(role) or self.codecs.get(fused) or self.codecs.get(group(role), "f32")
        for upgrade in self.upgrades:
            if {role, fused} & set(upgrade.roles) and layer is not None and upgrade.layers.chosen(layer, layers):
                choice = upgrade.codec
        return choice

    def resolve(self, name: str, wanted: str, tensor: TensorSpec) -> str:
        """The codec that can hold the tensor's rows: the wanted one, or the first declared fallback that can.

        Raises:
            ConfigError: no declared fallback holds the rows.
        """
        columns, codec, tried = tensor.shape[-1], wanted, [wanted]
        while not holds(codec, columns):
            codec = self.fallback.get(codec, "")
            if not codec or codec in tried:
                raise ConfigError(
                    f"recipe {name}: {tensor.name} has rows of {columns} weights, too odd for {' and '.join(tried)}",
                    "declare a codec with smaller blocks under [fallback], for example q4_k = 'q5_0'",
                )
            tried.append(codec)
        return codec


def group(role: str) -> str:
    """The group that a role belongs to in a recipe: "norm" or "linear"."""
    return "norm" if stays_float(role) else "linear"


def load_recipe(name: str) -> tuple[str, Recipe]:
    """A shipped recipe by name, or a user's own by the path of its .toml file.

    Raises:
        ConfigError: unknown name, or a file that is not a recipe.
    """
    stem, recipe = _toml.load("recipes", name, Recipe)
    for role in filter(stays_float, ROLES):
        codec = recipe.codecs.get(role) or recipe.codecs.get("norm", "f32")
        if not is_float(codec):
            raise ConfigError(
                f"recipe {stem}: role {role} has codec {codec}; norms, biases and routers stay in floats such as f32"
            )
    return stem, recipe


def with_method(recipe: Recipe, method: str | None) -> Recipe:
    """The recipe with another method; None leaves its own.

    Raises:
        UsageError: an unknown method.
    """
    if method is None:
        return recipe
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}", did_you_mean(method, METHODS))
    return recipe.model_copy(update={"method": method})


def shipped_recipes() -> dict[str, Recipe]:
    """All recipes that come with phi3edge, by name."""
    return {name: load_recipe(name)[1] for name in _toml.shipped("recipes")}


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, for a manifest."""
    return recipe.model_dump(mode="json", exclude_defaults=True)


def gates_of(data: Any) -> Gates:
    """The gates of a recipe that `to_json` made plain data of.

    Raises:
        ConfigError: they are none.
    """
    try:
        return TypeAdapter(Gates).validate_python(data)
    except ValidationError as error:
        raise ConfigError(f"the recipe's gates are not gates: {error.errors()[0]['msg']}", "export again") from None
