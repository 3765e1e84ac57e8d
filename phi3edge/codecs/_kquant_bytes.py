"""What the super-block formats share at the edges: float16 numbers and bit fields in bytes."""

import numpy as np

SUPER = 256
"""Weights in a super-block."""


def half_bytes(values: np.ndarray) -> np.ndarray:
    """float32 (rows, super-blocks) as the two bytes of a float16: uint8 (rows, super-blocks, 2)."""
    return values.astype("<f2").view(np.uint8).reshape(*values.shape, 2)


def from_half_bytes(data: np.ndarray) -> np.ndarray:
    """The inverse of half_bytes."""
    return np.ascontiguousarray(data).view("<f2")[..., 0].astype(np.float32)


def pack_fields(codes: np.ndarray, bits: int, out: np.ndarray) -> None:
    """Puts fields of `bits` bits next to each other: out[..., l] = sum over k of codes[..., k, l] << (bits * k).

    Args:
        codes: uint8 (..., 8 / bits, l), each below 2**bits.
        bits: 1, 2 or 4.
        out: uint8 (..., l), written.
    """
    out[...] = codes[..., 0, :]
    for k in range(1, 8 // bits):
        out |= codes[..., k, :] << np.uint8(bits * k)


def unpack_fields(data: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of pack_fields: uint8 (..., l) -> uint8 (..., 8 / bits, l)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (data[..., None, :] >> shifts) & np.uint8(2**bits - 1)


def pack_scales_mins(scales: np.ndarray, mins: np.ndarray, out: np.ndarray) -> None:
    """The 12 bytes of Q4_K and Q5_K that hold 8 scales and 8 mins of 6 bits.

    Bytes 0-3: scales 0-3, and in their top two bits the high bits of scales 4-7; bytes 4-7: the same of the mins;
    bytes 8-11: the low four bits of scales 4-7, and above them those of mins 4-7.

    Args:
        scales: uint8 (..., 8).
        mins: uint8 (..., 8).
        out: uint8 (..., 12), written.
    """
    out[..., 0:4] = scales[..., :4] | (scales[..., 4:] >> 4) << 6
    out[..., 4:8] = mins[..., :4] | (mins[..., 4:] >> 4) << 6
    out[..., 8:12] = (scales[..., 4:] & 15) | mins[..., 4:] << 4


def unpack_scales_mins(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of pack_scales_mins: uint8 (..., 12) -> scales and mins, each uint8 (..., 8)."""
    low = data[..., 8:12]
    scales = np.concatenate([data[..., 0:4] & 63, (low & 15) | (data[..., 0:4] >> 6) << 4], axis=-1)
    mins = np.concatenate([data[..., 4:8] & 63, (low >> 4) | (data[..., 4:8] >> 6) << 4], axis=-1)
    return scales, mins
