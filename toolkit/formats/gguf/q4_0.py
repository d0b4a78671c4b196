"""Q4_0 of bf16 weights in NumPy: the bytes of ggml's quantize_row_q4_0_ref, faster.

A block of 32 weights has a scale d = extreme / -8 (float16), where `extreme` is the weight of
largest magnitude, the first of equal ones; code = trunc(weight / d + 8.5), at most 15. Byte j of a
block holds code j below code j + 16.

Blocks are turned on their side: column b of a [8, blocks] array of 64-bit words is block b, four
weights a word. Reductions over a block and products with its scale are then plain passes over long
rows, and the two codes of a byte lie four rows apart. Passes run over steps that stay in a core's
L2 cache; what is per block (1/32 of the weights) is done once per call.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.formats.gguf.ggml import to_float16

BLOCK_WEIGHTS = 32
BLOCK = np.dtype([("scale", "<f2"), ("codes", "<u4", (4,))])
WORDS = 8  # 64-bit words of a block
STEP_BLOCKS = 1 << 12
SIGN = np.uint16(0x8000)
# Below 2^-116 the inverse of a scale may be infinite, and ggml's code is undefined in C.
TINY = np.uint16((127 - 116) << 7)
HALF_WORD, HIGH_HALF = np.uint32(16), np.uint32(0xFFFF0000)
BYTE, NIBBLE = np.uint16(256), np.uint8(16)

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]


def find_extremes(raw: Bits) -> Bits:
    """Bits of each block's weight of largest magnitude, of equal ones the first, [blocks]."""
    weights = raw.reshape(-1, BLOCK_WEIGHTS)
    # As signed numbers bits order the positive weights, as unsigned ones the negative.
    highest = np.empty(4 * len(weights), np.int16)
    lowest = np.empty(4 * len(weights), np.uint16)
    work = _work()
    for part in _steps(len(weights)):
        bits = work.turn(weights[part]).view(np.uint16)
        fours = slice(4 * part.start, 4 * part.start + bits.shape[1])
        np.maximum.reduce(bits.view(np.int16), axis=0, out=highest[fours])
        np.maximum.reduce(bits, axis=0, out=lowest[fours])
    positive = np.maximum(_reduce_fours(highest), np.int16(0)).view(np.uint16)
    negative = np.maximum(_reduce_fours(lowest), SIGN)
    opposite = negative ^ SIGN
    extremes: Bits = np.maximum(positive, opposite)
    extremes |= np.left_shift(opposite > positive, 15, dtype=np.uint16)
    ties = np.flatnonzero((positive == opposite) & (positive > 0))
    rows = weights[ties]
    extremes[ties] = rows[np.arange(ties.size), np.argmax(rows & ~SIGN, axis=1)]
    return extremes


def quantize(raw: Bits, extremes: Bits, encoded: NDArray[np.uint8]) -> bool:
    """Quantize finite bf16 bits, whole blocks in C order, to blocks of 18 bytes.

    False, and nothing done, where a block's weights are so small that ggml itself must do it.
    """
    if ((extremes & ~SIGN) - np.uint16(1) < TINY - 1).any():  # 0 wraps to 65535
        return False
    weights, blocks = raw.reshape(-1, BLOCK_WEIGHTS), encoded.reshape(-1).view(BLOCK)
    scales = np.left_shift(extremes, 16, dtype=np.uint32).view(np.float32)
    np.multiply(scales, np.float32(-1 / 8), out=scales)
    inverses = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    work = _work()
    blocks["scale"] = to_float16(scales)
    for part in _steps(len(weights)):
        work.encode(weights[part], inverses[part], blocks["codes"][part])
    return True


class _Work:
    """Buffers of one process for steps of STEP_BLOCKS."""

    def __init__(self) -> None:
        count = STEP_BLOCKS * BLOCK_WEIGHTS
        self._words = np.empty(count // 4, np.uint64)
        self._half = np.empty(count // 2, np.uint32)
        self._codes = [np.empty(count // 2, np.uint16) for _ in range(2)]
        self._spread = np.empty(count // 16, np.float32)
        self._limits = np.full(count // 8, 15, np.uint8)

    def turn(self, weights: Bits) -> NDArray[np.uint64]:
        """The blocks on their side."""
        words = self._words[: WORDS * len(weights)].reshape(WORDS, -1)
        np.copyto(words, weights.view(np.uint64).T)
        return words

    def encode(self, weights: Bits, inverses: Floats, codes: NDArray[np.uint32]) -> None:
        """Write codes [blocks, 4], four bytes a word."""
        pairs = self.turn(weights).view(np.uint32)
        half = self._half[: pairs.size].reshape(pairs.shape)
        low, high = (codes[: pairs.size].reshape(pairs.shape) for codes in self._codes)
        spread = self._spread[: pairs.shape[1]]
        spread[0::2] = spread[1::2] = inverses
        np.left_shift(pairs, HALF_WORD, out=half)
        _scale_and_round(half.view(np.float32), spread, low)
        np.bitwise_and(pairs, HIGH_HALF, out=pairs)
        _scale_and_round(pairs.view(np.float32), spread, high)
        np.multiply(high, BYTE, out=high)
        np.bitwise_or(low, high, out=low)
        single = low.view(np.uint8)
        np.minimum(single, self._limits[: 2 * len(spread)], out=single)
        np.multiply(single[4:], NIBBLE, out=single[4:])
        np.bitwise_or(single[:4], single[4:], out=single[:4])
        for index, row in enumerate(single[:4].view(np.uint32)):
            codes[:, index] = row


def _scale_and_round(values: Floats, inverses: Floats, codes: Bits) -> None:
    """Two roundings, as ggml has them where there is no fused multiply-add."""
    np.multiply(values, inverses, out=values)
    np.add(values, np.float32(8.5), out=values)
    np.copyto(codes, values, casting="unsafe")


def _reduce_fours(array: NDArray[Any]) -> NDArray[Any]:
    """The largest of every four, by passes over neighbours: strided ones are slower."""
    pairs = np.maximum(array[:-1], array[1:])
    fours: NDArray[Any] = np.maximum(pairs[:-2], pairs[2:])
    return fours[::4]


def _steps(blocks: int) -> Iterator[slice]:
    for first in range(0, blocks, STEP_BLOCKS):
        yield slice(first, min(blocks, first + STEP_BLOCKS))


_works: list[_Work] = []


def _work() -> _Work:
    """The process's buffers, made when first needed."""
    if not _works:
        _works.append(_Work())
    return _works[0]
