"""A grid and its bytes: one file per codec, found by its name.

A codec module offers NAME, BLOCK_SIZE (weights), BLOCK_BYTES, GGML_TYPE (the type's number in a GGUF file), FORMATS,
and `quantize`, `dequantize`, `pack`, `unpack`; the first four import nothing heavy, so that a plan can be made
without numba. See phi3edge.types.Quantized for what passes between them.
"""

from types import ModuleType

from phi3edge.registry import load


def codec(name: str) -> ModuleType:
    """The module of a codec, by its name, such as "q4_k"."""
    return load("codecs", name)


def holds(name: str, columns: int) -> bool:
    """Whether rows of `columns` weights are whole blocks of the codec."""
    return columns % codec(name).BLOCK_SIZE == 0


def row_bytes(name: str, columns: int) -> int:
    """Packed bytes of one row of `columns` weights."""
    module = codec(name)
    return columns // module.BLOCK_SIZE * module.BLOCK_BYTES


def bits_per_weight(name: str) -> float:
    """Bits that a codec takes for one weight, scales included."""
    module = codec(name)
    return 8 * module.BLOCK_BYTES / module.BLOCK_SIZE


def is_float(name: str) -> bool:
    """Whether a codec holds the weights themselves (f32, f16, bf16) rather than codes on a grid of blocks."""
    return codec(name).BLOCK_SIZE == 1
