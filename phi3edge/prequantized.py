"""Checkpoints whose linears are integers already: what AutoAWQ, AutoGPTQ and GPTQModel write, read strictly.

A linear of N outputs and K inputs is stored transposed, as several tensors. With groups of g inputs, and words (int32)
of 32/bits codes, the first one in the lowest bits:

    scales    (K/g, N)            float
    qweight   (K, N * bits/32)    awq: a word holds eight outputs, in AWQ_ORDER
              (K * bits/32, N)    gptq: a word holds 32/bits inputs
    qzeros    (K/g, N * bits/32)  zero points; a word holds outputs, in the order of qweight (awq) or in their own
    g_idx     (K,)                gptq: the group of each input

Weight: scale * (code - zero point). Format "gptq" stores zero points minus one, "gptq_v2" and awq as they are.
Sources: AutoAWQ awq/modules/linear/gemm.py, awq/utils/packing_utils.py; GPTQModel gptqmodel/nn_modules/qlinear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phi3edge.codecs import codec
from phi3edge.codecs._affine import BLOCK_SIZES
from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.registry import did_you_mean
from phi3edge.types import JSON, ModelSpec, Quantized, TensorSpec

if TYPE_CHECKING:
    import numpy as np

KEY = "quantization_config"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of its eight outputs each 4-bit field of a word holds, lowest first."""

BITS = {"awq": (4,), "gptq": (4, 8)}
LAYOUTS = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}
"""By quant_method; without any of LAYOUT_KEYS it is the first one."""

LAYOUT_KEYS = ("version", "format", "checkpoint_format")
USED = {
    "bits",
    "group_size",
    "lm_head",
    "modules_in_block_to_quantize",
    "modules_to_not_convert",
    "quant_method",
    "sym",
    "zero_point",
    *LAYOUT_KEYS,
}
FIXED: dict[str, tuple[Any, ...]] = {
    "activation": (None,),
    "adapter": (None,),
    "backend": (None, "auto", "autoawq", "auto_trainable"),
    "block_name_to_quantize": (None, "model.layers"),
    "dynamic": (None, {}),
    "is_marlin_format": (False, None),
    "method": ("awq", "gptq", None),
    "pack_dtype": ("int32", None),
    "rotation": (None,),
}
"""Keys that change what the tensors mean, with the values that are read here."""

NO_EFFECT = {
    "act_group_aware",
    "batch_size",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "desc_act",  # g_idx says whether inputs are out of order
    "disable_exllama",
    "do_fuse",
    "exllama_config",
    "fuse_max_seq_len",
    "hyb_act",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_to_fuse",
    "mse",
    "pad_token_id",
    "quantizer",
    "static_groups",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
}
"""Keys about how the codes were found, or how other software runs them."""

EXACT_GGML = {"int4": "q4_0", "uint4": "q5_0", "int8": "q8_0"}
"""The ggml type that holds every code minus its zero point. Q4_1 would need scale * zero point to be a float16."""


@dataclass(frozen=True, slots=True)
class Prequantized:
    """How the linears of a checkpoint are stored.

    Attributes:
        method: "awq" or "gptq".
        bits: of a code.
        group_size: inputs that share a scale and a zero point; -1 for all of a row's.
        symmetric: every zero point is 2**(bits - 1).
        zero_offset: what is missing in stored zero points.
        head: the head is stored so too.
        left_out: a module whose name holds one of these is stored in floats.
        only: if not empty, a module whose name does not end in one of these is stored in floats.
    """

    method: str
    bits: int
    group_size: int
    symmetric: bool
    zero_offset: int
    head: bool
    left_out: tuple[str, ...]
    only: tuple[str, ...]

    @property
    def per_word(self) -> int:
        """Codes in a word."""
        return 32 // self.bits

    def grid(self, tensor: TensorSpec) -> str | None:
        """The affine codec that a tensor is stored on, None for floats.

        Raises:
            UnsupportedError: groups or words that the tensor's sides are no multiples of.
        """
        module = tensor.name.removesuffix(".weight")
        if len(tensor.shape) != 2 or tensor.role == "embedding" or (tensor.role == "head" and not self.head):
            return None
        if any(name in module for name in self.left_out):
            return None
        if self.only and tensor.role != "head" and not module.endswith(self.only):
            return None
        outputs, inputs = tensor.shape
        group = self.group(inputs)
        if inputs % group or outputs % self.per_word or inputs % self.per_word:
            raise UnsupportedError(
                f"{module} has {outputs} outputs and {inputs} inputs: not whole groups of {group} and words of "
                f"{self.per_word} codes"
            )
        if group % BLOCK_SIZES[0]:
            raise UnsupportedError(
                f"config.json: {KEY}.group_size is {self.group_size}, for {inputs} inputs; supported: multiples of "
                f"{BLOCK_SIZES[0]}"
            )
        return f"{'' if self.symmetric else 'u'}int{self.bits}_b{self.block(inputs)}"

    def group(self, inputs: int) -> int:
        """Inputs in a group."""
        return inputs if self.group_size == -1 else self.group_size

    def block(self, inputs: int) -> int:
        """The largest block that divides a group."""
        return max(n for n in BLOCK_SIZES if self.group(inputs) % n == 0)

    def parts(self, tensor: TensorSpec) -> dict[str, tuple[int, ...]]:
        """Suffix and shape of every tensor that a linear must be stored as."""
        outputs, inputs = tensor.shape
        words, groups = outputs // self.per_word, inputs // self.group(inputs)
        shapes: dict[str, tuple[int, ...]] = {"qzeros": (groups, words), "scales": (groups, outputs)}
        if self.method == "awq":
            return {"qweight": (inputs, words), **shapes}
        return {"qweight": (inputs // self.per_word, outputs), **shapes, "g_idx": (inputs,)}

    def sides(self, qweight: tuple[int, ...]) -> tuple[int, int]:
        """Outputs and inputs of a linear, from the shape of its qweight."""
        if self.method == "awq":
            return qweight[1] * self.per_word, qweight[0]
        return qweight[1], qweight[0] * self.per_word

    def words(self, start: int, stop: int) -> range:
        """The words, of those that hold outputs, that hold outputs [start, stop)."""
        return range(start // self.per_word, -(-stop // self.per_word))

    def outputs(self, words: range) -> range:
        """The outputs in some words."""
        return range(words.start * self.per_word, words.stop * self.per_word)

    def columns(self, words: range) -> range:
        """The columns of qweight that hold the outputs in some words."""
        return words if self.method == "awq" else self.outputs(words)

    def codes(self, qweight: np.ndarray) -> np.ndarray:
        """The codes of a run of outputs, uint8 (outputs, inputs), from its columns of qweight."""
        import numpy as np

        if self.method == "awq":
            return np.ascontiguousarray(self._across(qweight).T)
        words, outputs = qweight.shape
        fields = qweight.view(np.uint8).reshape(words, outputs, 4).transpose(1, 0, 2)
        return _fields(fields.reshape(outputs, words * 4), self.bits)

    def blocks(
        self, module: str, inputs: int, scales: np.ndarray, qzeros: np.ndarray, g_idx: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The scales and zero points of a run of outputs, by block, checked.

        Args:
            module: the linear, for messages.
            inputs: of the linear.
            scales: finite float32 (groups, outputs).
            qzeros: uint32 (groups, words).
            g_idx: int32 (inputs,), or None if inputs are in order.

        Returns:
            scales float32 (outputs, blocks), on float16 values; zero points uint8 (outputs, blocks).

        Raises:
            UnsupportedError: inputs of a block that are in several groups, or values that the grid does not hold.
            CheckpointError: groups or zero points that are not what config.json says.
        """
        import numpy as np

        block, groups = self.block(inputs), len(scales)
        order = np.arange(inputs, dtype=np.int32) // self.group(inputs) if g_idx is None else g_idx
        if order.min() < 0 or order.max() >= groups:
            raise CheckpointError(f"tensor '{module}.g_idx' names group {order.max()} or {order.min()} of {groups}")
        order = order.reshape(-1, block)
        if (order != order[:, :1]).any():
            raise UnsupportedError(
                f"tensor '{module}.g_idx' puts neighbouring inputs into different groups (desc_act, act-order): no "
                "format with blocks holds that without rounding again",
                "take a checkpoint that was quantized with desc_act=False, or with static_groups=True",
            )
        with np.errstate(over="ignore"):
            if (scales != scales.astype(np.float16)).any():
                raise UnsupportedError(f"tensor '{module}.scales' has values that are no float16")
        zero_points = self._across(qzeros).astype(np.uint16) + self.zero_offset
        if zero_points.max() >= 2**self.bits:
            raise UnsupportedError(
                f"tensor '{module}.qzeros' has zero point {2**self.bits}, which {self.bits} bits do not hold; tools "
                "differ in what they make of it",
                "quantize again, or save with checkpoint_format gptq_v2",
            )
        if self.symmetric and (wrong := zero_points[zero_points != 2 ** (self.bits - 1)]).size:
            raise CheckpointError(
                f"tensor '{module}.qzeros' has zero point {wrong[0]}; config.json says symmetric, which is "
                f"{2 ** (self.bits - 1)}",
                "correct sym, zero_point or checkpoint_format in config.json",
            )
        return scales.T[:, order[:, 0]], zero_points.astype(np.uint8).T[:, order[:, 0]]

    def _across(self, words: np.ndarray) -> np.ndarray:
        """Words that hold outputs as their codes, uint8 (rows, outputs), from uint32 (rows, words)."""
        import numpy as np

        fields = _fields(np.ascontiguousarray(words).view(np.uint8), self.bits)
        if self.method != "awq":
            return fields
        return fields.reshape(len(fields), -1, len(AWQ_ORDER))[..., np.argsort(AWQ_ORDER)].reshape(fields.shape)


def parse(config: JSON) -> Prequantized | None:
    """What config.json says of its quantized linears; None for a checkpoint of floats.

    Raises:
        UnsupportedError: a method, layout or key that is not read here.
    """
    said = config.get(KEY)
    if said is None:
        return None
    if not isinstance(said, dict):
        raise UnsupportedError(f"config.json: {KEY} is {said!r:.60}; expected an object")
    method = _one_of(said, "quant_method", tuple(BITS))
    _refuse_unknown(said)
    layouts = {str(said[key]).lower() for key in LAYOUT_KEYS if said.get(key) is not None} or {LAYOUTS[method][0]}
    layout = min(layouts)
    if len(layouts) > 1 or layout not in LAYOUTS[method]:
        raise UnsupportedError(
            f"config.json: {KEY} has layout {', '.join(sorted(layouts))}; supported for {method}: "
            f"{', '.join(LAYOUTS[method])}"
        )
    group_size = said.get("group_size")
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise UnsupportedError(f"config.json: {KEY}.group_size is {group_size!r:.60}; expected a positive number or -1")
    symmetric = (
        _one_of(said, "sym", (True, False)) if method == "gptq" else not _one_of(said, "zero_point", (True, False))
    )
    return Prequantized(
        method=method,
        bits=_one_of(said, "bits", BITS[method]),
        group_size=group_size,
        symmetric=symmetric,
        zero_offset=1 if layout == "gptq" else 0,
        head=bool(_one_of(said, "lm_head", (None, False, True))),
        left_out=_names(said, "modules_to_not_convert"),
        only=_names(said, "modules_in_block_to_quantize"),
    )


def mark(spec: ModelSpec, config: JSON) -> ModelSpec:
    """The model with the grid of every tensor that is stored on one.

    Raises:
        UnsupportedError: see `parse` and `Prequantized.grid`.
    """
    stored = parse(config)
    if stored is None:
        return spec
    return replace(spec, tensors=tuple(replace(t, grid=stored.grid(t)) for t in spec.tensors))


def exact_codec(grid: str, format_: str) -> str:
    """The codec of a format that holds whatever is on a grid without rounding it again.

    Raises:
        UnsupportedError: there is none.
    """
    if format_ in codec(grid).FORMATS:
        return grid
    kind, block = grid.split("_b")
    if kind not in EXACT_GGML or int(block) % 32:
        raise UnsupportedError(
            f"{format_} has no type that holds the checkpoint's {kind} in blocks of {block} without a second rounding",
            "--format onnx holds them, where the target takes it; --recipe f32 writes the weights as floats",
        )
    return EXACT_GGML[kind]


def dequantize(q: Quantized) -> np.ndarray:
    """The weights, float32 (rows, columns), of codes that have zero points; exact for float16 scales."""
    import numpy as np

    assert q.scales is not None
    assert q.zero_points is not None
    rows, blocks = q.scales.shape
    steps = q.codes.reshape(rows, blocks, -1) - q.zero_points.astype(np.float32)[..., None]
    return np.multiply(steps, q.scales[..., None], out=steps).reshape(q.codes.shape)


def _fields(data: np.ndarray, bits: int) -> np.ndarray:
    """The 4-bit or 8-bit fields of uint8 (rows, bytes), lowest first: uint8 (rows, bytes * 8 / bits)."""
    import numpy as np

    if bits == 8:
        return data
    fields = np.empty((*data.shape, 2), np.uint8)
    np.bitwise_and(data, 15, out=fields[..., 0])
    np.right_shift(data, 4, out=fields[..., 1])
    return fields.reshape(len(data), -1)


def _refuse_unknown(said: JSON) -> None:
    known = USED | NO_EFFECT | set(FIXED)
    for key, value in said.items():
        if key not in known:
            raise UnsupportedError(
                f"config.json: unknown key {key!r} in {KEY} (value {value!r:.60}): it may change what the codes mean",
                did_you_mean(key, sorted(known)),
            )
        if key in FIXED:
            _one_of(said, key, FIXED[key])


def _one_of(said: JSON, key: str, allowed: tuple[Any, ...]) -> Any:
    value = said.get(key)
    if not any(value == one and type(value) is type(one) for one in allowed):
        choices = ", ".join(str(one) for one in allowed if one is not None)
        raise UnsupportedError(
            f"config.json: {KEY}.{key} is {value!r:.60}; supported: {choices or 'none'}",
            "start from the original weights, or from a checkpoint that was quantized so",
        )
    return value


def _names(said: JSON, key: str) -> tuple[str, ...]:
    """A list of names, or of lists of names, flat."""
    value = said.get(key) or []
    names: list[Any] = []
    for part in value if isinstance(value, list) else [None]:
        names += part if isinstance(part, list) else [part]
    if not all(isinstance(name, str) and name for name in names):
        raise UnsupportedError(f"config.json: {KEY}.{key} is {value!r:.60}; expected a list of names")
    return tuple(names)
