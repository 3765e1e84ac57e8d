"""A grid and its bytes: one file per codec, found by its name; affine codecs differ in numbers only and share one.

A codec, be it a module or an object, offers NAME, BLOCK_SIZE (weights), FORMATS (what it can be written in), and
`quantize`, `dequantize`, `pack`, `unpack`; its constants import nothing heavy: a plan can be made without numba.
Codecs for GGUF also have GGML_TYPE (the type's number in the file) and BLOCK_BYTES. See phi3edge.types.Quantized for
what passes between the four functions.
"""

from functools import cache
from typing import Any

from phi3edge.codecs import _affine
from phi3edge.errors import ConfigError
from phi3edge.registry import did_you_mean, load, names


@cache
def codec_names() -> tuple[str, ...]:
    """The names of all codecs, sorted."""
    return tuple(sorted([*names("codecs"), *_affine.CODECS]))


def codec(name: str) -> Any:
    """A codec by its name, such as "q4_k" or "uint4_b32".

    Raises:
        ConfigError: unknown; the message names the nearest one.
    """
    if name in _affine.CODECS:
        return _affine.CODECS[name]
    if name not in codec_names():
        raise ConfigError(f"unknown codec {name!r}", did_you_mean(name, codec_names()))
    return load("codecs", name)


def holds(name: str, columns: int) -> bool:
    """Whether rows of `columns` weights are whole blocks of the codec."""
    return columns % codec(name).BLOCK_SIZE == 0


def row_bytes(name: str, columns: int) -> int:
    """Packed bytes of one row of `columns` weights."""
    found = codec(name)
    if name in _affine.CODECS:
        return found.row_bytes(columns)
    return columns // found.BLOCK_SIZE * found.BLOCK_BYTES


def is_float(name: str) -> bool:
    """Whether a codec holds the weights themselves (f32, f16, bf16) rather than codes on a grid of blocks."""
    return codec(name).BLOCK_SIZE == 1
