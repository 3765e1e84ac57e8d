"""Affine integer grids, as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them.

`uint4_b32` is 4 bits, blocks of 32, with a zero point a block; `int4_b32` is the same without: its codes are signed.
Bits 4 and 8; blocks of 16, 32, 64 and 128.

Weight: scale * (code - zero_point), codes in [0, 2**bits - 1]; the signed ones are stored plus 2**(bits - 1), which is
then the zero point that the operators assume.
A packed row is its codes (two 4-bit codes a byte, the first one low), its float16 scales, and its zero points, packed
as the codes are and filled to a whole byte. Source: onnxruntime docs/ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class AffineCodec:
    """One affine grid; see phi3edge.codecs for what a codec offers.

    Attributes:
        bits: 4 or 8.
        signed: no zero points: the grid is symmetric about 0, but for its one code more below.
    """

    bits: int
    BLOCK_SIZE: int
    signed: bool

    @property
    def NAME(self) -> str:
        """The codec's name."""
        return f"{'' if self.signed else 'u'}int{self.bits}_b{self.BLOCK_SIZE}"

    @property
    def FORMATS(self) -> tuple[str, ...]:
        """Formats it can be written in."""
        return ("onnx",)

    def sections(self, columns: int) -> tuple[int, int, int]:
        """Bytes of a row's codes, scales and zero points."""
        blocks = columns // self.BLOCK_SIZE
        return columns * self.bits // 8, 2 * blocks, 0 if self.signed else -(-blocks * self.bits // 8)

    def row_bytes(self, columns: int) -> int:
        """Packed bytes of one row of `columns` weights."""
        return sum(self.sections(columns))


CODECS = {c.NAME: c for c in (AffineCodec(b, n, s) for b in (4, 8) for n in BLOCK_SIZES for s in (True, False))}
"""All affine codecs by name."""
