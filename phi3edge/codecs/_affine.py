"""Affine integer grids, as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them.

`uint4_b32` is 4 bits, blocks of 32, with a zero point a block; `int4_b32` is the same without: its codes are signed.
Bits 4 and 8; blocks of 16, 32, 64 and 128.

Weight: scale * (code - zero_point), codes in [0, 2**bits - 1]; the signed ones are stored plus 2**(bits - 1), which is
then the zero point that the operators assume.
A packed row is its codes (two 4-bit codes a byte, the first one low), its float16 scales, and its zero points, packed
as the codes are and filled to a whole byte. Source: onnxruntime docs/ContribOperators.md.

On the CPU both operators read all sixteen, with float32 or float16 scales: MatMulNBits 4 bits in every version, 8 bits
from 1.23 on; GatherBlockQuantized from 1.23 on, but for rows of an odd number of blocks with 4-bit zero points, which
it reads wrongly before 1.27 (found by running these grids in each).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3edge.errors import UnsupportedError
from phi3edge.types import Quantized

if TYPE_CHECKING:
    import numpy as np

BLOCK_SIZES = (16, 32, 64, 128)

# First guesses of the search (see _affine_kernels.fit) by bits, the first one being plain rounding.
# Steps that are cut off above and below a block's range:
_CLIPS = {
    4: (
        (0.0, 0.0),
        (-0.75, -0.75),
        (-0.75, 0.0),
        (0.0, -0.75),
        (-0.25, 0.5),
        (0.25, 0.25),
        (0.5, -0.25),
        (0.5, 1.0),
        (1.0, 0.5),
        (0.25, 1.75),
        (1.75, 0.25),
    ),
    8: tuple((trim, trim) for trim in (0.0, 0.5, -0.7, -1.4, -2.1, -2.8, -3.5, -4.2)),
}
# The code of a block's weight of largest magnitude, less the zero point:
_TOPS = {
    4: tuple((code, 0.0) for code in (-8.0, -7.2, -7.6, -8.4, -8.8, -9.6, 6.0, 6.6, 7.0, 7.4, 8.0, 8.6)),
    8: tuple((code, 0.0) for code in (-128.0, -127.0, -126.0, -125.0, -124.0, -123.0, -122.0, -121.0)),
}


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

    @property
    def LEVELS(self) -> range:
        """What a code counts in steps: from 0, or from below it where the grid is symmetric about 0."""
        half = 2 ** (self.bits - 1)
        return range(-half, half) if self.signed else range(2 * half)

    def sections(self, columns: int) -> tuple[int, int, int]:
        """Bytes of a row's codes, scales and zero points."""
        blocks = columns // self.BLOCK_SIZE
        return columns * self.bits // 8, 2 * blocks, 0 if self.signed else -(-blocks * self.bits // 8)

    def row_bytes(self, columns: int) -> int:
        """Packed bytes of one row of `columns` weights."""
        return sum(self.sections(columns))

    def quantize(self, weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
        """Rounds float32 (rows, columns) by a least-squares search.

        Args:
            weight: columns must be a multiple of the block size.
            importance: float32 (columns,): weighs each column's squared error; None: every weight's counts by its
                size plus the root mean square of its block, which loses less of the model than weighing all alike.

        Returns:
            codes uint8 (rows, columns), in [0, 2**bits - 1] whether signed or not; scales float32 (rows, blocks), on
            float16 values, some of them negative if signed; zero_points uint8 (rows, blocks), None if signed.

        Raises:
            UnsupportedError: rows that are not whole blocks, an importance that does not fit them, or a weight that is
                not finite or beyond the codes times the largest float16.
        """
        from phi3edge.codecs import _affine_kernels as kernels

        guesses = _TOPS if self.signed else _CLIPS
        return kernels.quantize(
            self.NAME, weight, importance, self.BLOCK_SIZE, self.bits, self.signed, guesses[self.bits]
        )

    def dequantize(self, q: Quantized) -> np.ndarray:
        """The weights, float32 (rows, columns)."""
        from phi3edge.codecs import _affine_kernels as kernels

        return kernels.dequantize(q, self.BLOCK_SIZE, self.bits)

    def pack(self, q: Quantized) -> np.ndarray:
        """The operators' bytes row by row, uint8 (rows, row_bytes); `sections` says where each part of a row ends."""
        import numpy as np

        assert q.scales is not None
        codes, scales, _ = self.sections(q.codes.shape[1])
        out = np.empty((len(q.codes), self.row_bytes(q.codes.shape[1])), np.uint8)
        out[:, :codes] = _pack_codes(q.codes, self.bits)
        out[:, codes : codes + scales] = q.scales.astype("<f2").view(np.uint8)
        if q.zero_points is not None:
            out[:, codes + scales :] = _pack_codes(q.zero_points, self.bits)
        return out

    def unpack(self, data: np.ndarray) -> Quantized:
        """The inverse of `pack`.

        Raises:
            UnsupportedError: data of another dtype, or not whole blocks.
        """
        import numpy as np

        if data.dtype != np.uint8 or data.ndim != 2 or self.row_bytes(self._columns(data.shape[1])) != data.shape[1]:
            raise UnsupportedError(
                f"{self.NAME} packs rows of whole blocks and their zero points, got {data.dtype} of shape {data.shape}",
                "the data is cut off or of another type",
            )
        codes, scales, _ = self.sections(self._columns(data.shape[1]))
        values = np.ascontiguousarray(data[:, codes : codes + scales]).view("<f2").astype(np.float32)
        zero_points = None
        if not self.signed:
            zero_points = np.ascontiguousarray(
                _unpack_codes(data[:, codes + scales :], self.bits)[:, : values.shape[1]]
            )
        return Quantized(self.NAME, _unpack_codes(data[:, :codes], self.bits), values, zero_points=zero_points)

    def _columns(self, row_bytes: int) -> int:
        """Weights of a packed row, if it is one."""
        half_bytes = self.BLOCK_SIZE * self.bits // 4 + 4 + (0 if self.signed else self.bits // 4)
        return 2 * row_bytes // half_bytes * self.BLOCK_SIZE


def _pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes, uint8 (rows, count), as bytes: two 4-bit codes in one, the first one low, a last half byte 0."""
    import numpy as np

    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    pairs = np.ascontiguousarray(codes).view("<u2")
    return (pairs | pairs >> 4).astype(np.uint8)


def _unpack_codes(data: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of _pack_codes, but for the filled half byte, which is there as a code."""
    import numpy as np

    if bits == 8:
        return np.ascontiguousarray(data)
    pairs = data.astype("<u2")
    return ((pairs | pairs << 4) & 0x0F0F).view(np.uint8)


CODECS = {c.NAME: c for c in (AffineCodec(b, n, s) for b in (4, 8) for n in BLOCK_SIZES for s in (True, False))}
"""All affine codecs by name."""
