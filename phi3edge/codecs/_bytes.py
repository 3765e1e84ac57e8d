"""Compiled loops that pack and unpack blocks of 32 codes, eight codes in a 64-bit word at a time.

ggml keeps code j of a block in the low nibble of byte j and code j + 16 in its high nibble. Packed blocks are an even
number of bytes, so they are read and written as 16-bit words. Words are little-endian, as the format is.
"""

import numpy as np
from numba import njit

from phi3edge.codecs._half import from_half, to_half

_LOW = np.uint64(0x0F0F0F0F0F0F0F0F)
_ONES = np.uint64(0x0101010101010101)
_TOPS = np.uint64(0x8080808080808080)
_GATHER = np.uint64(0x0102040810204080)  # brings the lowest bits of eight bytes into the highest byte, in order
_4, _16, _56 = np.uint64(4), np.uint64(16), np.uint64(56)


@njit(nogil=True, cache=True)
def put_floats(values, out, at):
    """Writes float32 (blocks,) as float16 into column `at` of out, uint16 (blocks, words)."""
    for b in range(values.shape[0]):
        out[b, at] = to_half(values[b])


@njit(nogil=True, cache=True)
def get_floats(data, at, values):
    """Reads column `at` of data, uint16 (blocks, words), as float16 into float32 (blocks,)."""
    for b in range(values.shape[0]):
        values[b] = from_half(data[b, at])


@njit(nogil=True, cache=True)
def put_nibbles(codes, out, at, zero):
    """Packs the low four bits of codes + zero.

    Args:
        codes: the codes, uint64 (blocks, 4).
        out: uint16 (blocks, words), written.
        at: the first of the 8 words to write.
        zero: 8 (signed codes) or 0.
    """
    flip = np.uint64(zero) * _ONES  # (code + 8) mod 16 flips bit 3
    for b in range(codes.shape[0]):
        for k in range(2):
            word = ((codes[b, k] ^ flip) & _LOW) | (((codes[b, k + 2] ^ flip) & _LOW) << _4)
            for i in range(4):
                out[b, at + 4 * k + i] = np.uint16(word >> (_16 * np.uint64(i)))


@njit(nogil=True, cache=True)
def get_nibbles(data, at, codes):
    """The inverse of put_nibbles for zero = 0."""
    for b in range(codes.shape[0]):
        for k in range(2):
            word = np.uint64(0)
            for i in range(4):
                word |= np.uint64(data[b, at + 4 * k + i]) << (_16 * np.uint64(i))
            codes[b, k] = word & _LOW
            codes[b, k + 2] = (word >> _4) & _LOW


@njit(nogil=True, cache=True)
def put_fifth_bits(codes, out, at, zero):
    """Packs bit 4 of codes + zero (16 or 0): bit j of a 32-bit word, columns `at` and `at` + 1, is code j's."""
    flip = np.uint64(zero) * _ONES
    for b in range(codes.shape[0]):
        for k in range(2):
            low = ((((codes[b, 2 * k] ^ flip) >> _4) & _ONES) * _GATHER) >> _56
            high = ((((codes[b, 2 * k + 1] ^ flip) >> _4) & _ONES) * _GATHER) >> _56
            out[b, at + k] = np.uint16(low | (high << np.uint64(8)))


@njit(nogil=True, cache=True)
def add_fifth_bits(data, at, codes):
    """Adds 16 to the codes whose bit is set: the inverse of put_fifth_bits for zero = 0."""
    for b in range(codes.shape[0]):
        for k in range(4):
            bits = np.uint64(data[b, at + k // 2] >> (8 * (k % 2))) & np.uint64(0xFF)
            # Each byte gets a copy of the eight bits and keeps its own; adding 0x7F carries it into bit 7.
            own = (bits * _ONES) & np.uint64(0x8040201008040201)
            spread = ((own & ~_TOPS) + ~_TOPS | own) & _TOPS
            codes[b, k] |= spread >> np.uint64(3)


@njit(nogil=True, cache=True)
def make_signed(codes, zero):
    """Subtracts `zero` (8 or 16) from codes in [0, 31], byte by byte without borrows."""
    shift = np.uint64(zero) * _ONES
    for b in range(codes.shape[0]):
        for k in range(4):
            codes[b, k] = ((codes[b, k] | _TOPS) - shift) ^ _TOPS


@njit(nogil=True, cache=True)
def put_bytes(codes, out, at):
    """Copies 8-bit codes, uint16 (blocks, 16), to the words from column `at` on."""
    for b in range(codes.shape[0]):
        for k in range(16):
            out[b, at + k] = codes[b, k]


def pack_blocks(codes: np.ndarray, floats: tuple[np.ndarray, ...], bits: int, zero: int) -> np.ndarray:
    """Packs blocks of 32 codes: their floats as float16, the fifth bits if there are any, then the codes.

    Args:
        codes: int8 or uint8 (rows, columns).
        floats: the block's float fields in order, each float32 (rows, blocks).
        bits: 4, 5 or 8 per code.
        zero: what is added to a code to store it.

    Returns:
        uint8 (rows, bytes).
    """
    rows, columns = codes.shape
    blocks = rows * (columns // 32)
    out = np.empty((blocks, len(floats) + 2 * bits), np.uint16)
    for at, values in enumerate(floats):
        put_floats(np.ascontiguousarray(values).reshape(blocks), out, at)
    at = len(floats)
    codes = np.ascontiguousarray(codes)
    if bits == 8:
        put_bytes(codes.view(np.uint16).reshape(blocks, 16), out, at)
    else:
        words = codes.view(np.uint64).reshape(blocks, 4)
        if bits == 5:
            put_fifth_bits(words, out, at, zero)
        put_nibbles(words, out, at + 2 * (bits - 4), zero)
    return out.view(np.uint8).reshape(rows, columns // 32 * out.itemsize * out.shape[1])


def unpack_blocks(data: np.ndarray, floats: int, bits: int, zero: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The inverse of pack_blocks.

    Returns:
        The codes (rows, columns), int8 if `zero` else uint8, and the float fields, each float32 (rows, blocks).
    """
    rows = data.shape[0]
    words = floats + 2 * bits
    per_row = data.shape[1] // (2 * words)
    packed = data.view(np.uint16).reshape(rows * per_row, words)
    fields = [np.empty(rows * per_row, np.float32) for _ in range(floats)]
    for at, values in enumerate(fields):
        get_floats(packed, at, values)
    if bits == 8:
        codes = np.ascontiguousarray(packed[:, floats:]).view(np.uint64)
    else:
        codes = np.empty((rows * per_row, 4), np.uint64)
        get_nibbles(packed, floats + 2 * (bits - 4), codes)
        if bits == 5:
            add_fifth_bits(packed, floats, codes)
        if zero:
            make_signed(codes, zero)
    dtype = np.int8 if zero or bits == 8 else np.uint8
    return codes.view(dtype).reshape(rows, per_row * 32), [f.reshape(rows, per_row) for f in fields]
