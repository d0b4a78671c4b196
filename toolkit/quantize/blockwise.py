"""Round-to-nearest block quantization to 4 or 8 bits, bit-exact with MLAS (ONNX Runtime).

A block of consecutive weights shares one scale; value = (code - zero point) * scale.

symmetric    the signed weight of largest magnitude becomes code 0: scale = extreme / -2^(bits-1),
             zero point 2^(bits-1); of two opposite extremes the negative one counts.
asymmetric   scale = (max - min) / (2^bits - 1) with 0 inside [min, max], zero point rounded.

Source: MatMulNBits' quantizer in onnxruntime/core/mlas (BlockwiseQuantizer).

Speed comes from whole-array passes over steps that stay in a core's L2 cache, and from as few of
them as possible: what is per block (1/32 of the weights) is done once per call, not per step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEP_WEIGHTS = 1 << 17

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass
class BlockQuantizer:
    """Quantizes flat runs of whole blocks; keeps its work buffers between calls.

    `scale_dtype` float16 passes the weights through float16 first, as the vendor's fp16 path does.
    """

    bits: int
    block_size: int
    symmetric: bool = True
    scale_dtype: type = np.float32
    _buffers: dict[tuple[str, Any], NDArray[Any]] = field(default_factory=dict, repr=False)

    def quantize(
        self, raw: NDArray[Any], codes: Codes, scales: NDArray[Any], zero_points: Codes | None
    ) -> None:
        """Quantize raw (bf16 bits, float16 or float32), a flat run of whole blocks.

        codes [len * bits / 8] (two 4-bit codes a byte, the first in the low half), scales
        [blocks], zero_points [blocks], one a byte, None when symmetric. ValueError when a weight
        is not finite.
        """
        if zero_points is None:
            middle = 1 << (self.bits - 1)
            np.multiply(self._signed_extremes(raw), np.float32(-1 / middle), out=scales)
            offsets: Any = np.float32(middle + 0.5)
        else:
            self._ranges(raw, scales, zero_points)
            offsets = zero_points + np.float32(0.5)
        self._encode(raw, _reciprocals(scales), offsets, codes)

    def _signed_extremes(self, raw: NDArray[Any]) -> Floats:
        """The weight of largest magnitude of each block, with its sign.

        Rotated left by one, magnitude above sign, a weight's bits order by magnitude, ties
        negative.
        """
        wide = np.float16 if self.scale_dtype is np.float16 else np.float32
        keeps_bf16 = raw.dtype == np.uint16 and wide is np.float32
        dtype = np.dtype(np.uint16 if keeps_bf16 or wide is np.float16 else np.uint32)
        width = dtype.itemsize * 8
        largest = np.empty(raw.size // self.block_size, dtype)
        for part, blocks in self._steps(raw):
            bits = part if keeps_bf16 else self._widen(part, wide).view(dtype)
            key = self._buffer("key", dtype, part.size)
            sign = self._buffer("spare", dtype, part.size)
            np.add(bits, bits, out=key)
            np.right_shift(bits, width - 1, out=sign)
            np.bitwise_or(key, sign, out=key)
            largest[blocks] = self._slide(key, np.maximum)
        bits = (largest >> 1) | (largest << (width - 1))
        if keeps_bf16:
            extremes: Floats = np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
        else:
            extremes = bits.view(wide).astype(np.float32)
        _require_finite(extremes)
        return extremes

    def _ranges(self, raw: NDArray[Any], scales: NDArray[Any], zero_points: Codes) -> None:
        """Scales and zero points of [min, max] widened to hold 0."""
        low = np.empty(scales.size, np.float32)
        high = np.empty(scales.size, np.float32)
        for part, blocks in self._steps(raw):
            values = self._widen(part, np.float32)
            low[blocks] = self._slide(values, np.minimum)
            high[blocks] = self._slide(values, np.maximum)
        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
        top = (1 << self.bits) - 1
        exact = (high - low) / np.float32(top)
        _require_finite(exact)
        scales[:] = exact
        points = np.divide(-low, exact, out=low.copy(), where=exact != 0)
        np.copyto(
            zero_points, np.clip(np.floor(points + np.float32(0.5)), 0, top), casting="unsafe"
        )

    def _encode(self, raw: NDArray[Any], reciprocals: Floats, offsets: Any, codes: Codes) -> None:
        """codes = trunc(weight / scale + offset), clipped and packed; offsets carry their half."""
        repeated = self._buffer("repeated", np.float32, STEP_WEIGHTS + self.block_size)
        for part, blocks in self._steps(raw):
            values = self._widen(part, np.float32)
            spread = repeated[: part.size]
            np.copyto(spread.reshape(-1, self.block_size), reciprocals[blocks, None])
            np.multiply(values, spread, out=values)
            if isinstance(offsets, np.float32):
                np.add(values, offsets, out=values)
            else:
                np.copyto(spread.reshape(-1, self.block_size), offsets[blocks, None])
                np.add(values, spread, out=values)
            first = blocks.start * self.block_size * self.bits // 8
            self._pack(values, codes[first : first + part.size * self.bits // 8])

    def _pack(self, values: Floats, codes: Codes) -> None:
        if self.bits == 8:
            np.clip(values, 0, 255, out=values)
            np.copyto(codes, values, casting="unsafe")
            return
        # Values lie in [-8, 24]. As int8 against arrays, not scalars, the clip is one fast pass.
        whole = self._buffer("whole", np.int8, values.size)
        np.copyto(whole, values, casting="unsafe")
        np.minimum(whole, self._constant(15, whole.size), out=whole)
        if self.scale_dtype is np.float16:  # a rounded scale can push below 0
            np.maximum(whole, self._constant(0, whole.size), out=whole)
        pairs = whole.view("<u2")
        packed = self._buffer("packed", np.uint16, pairs.size)
        np.right_shift(pairs, 4, out=packed)
        np.bitwise_or(pairs, packed, out=packed)
        np.copyto(codes, packed, casting="unsafe")

    def _steps(self, raw: NDArray[Any]) -> Iterator[tuple[NDArray[Any], slice]]:
        """Yield runs of about STEP_WEIGHTS with the range of blocks they hold."""
        step = STEP_WEIGHTS // self.block_size
        for first in range(0, raw.size // self.block_size, step):
            part = raw[first * self.block_size : (first + step) * self.block_size]
            yield part, slice(first, first + part.size // self.block_size)

    def _widen(self, raw: NDArray[Any], dtype: type) -> NDArray[Any]:
        """Weights as `dtype` in a work buffer; through float16 first when scales are float16."""
        values = self._buffer("values", np.float32, raw.size)
        if raw.dtype == np.uint16:
            np.left_shift(raw, 16, out=values.view(np.uint32), dtype=np.uint32)
        else:
            np.copyto(values, raw)
        if self.scale_dtype is not np.float16:
            return values
        half = self._buffer("half", np.float16, raw.size)
        with np.errstate(over="ignore"):  # found by _require_finite
            np.copyto(half, values, casting="same_kind")
        if dtype is np.float16:
            return half
        np.copyto(values, half)
        return values

    def _slide(self, array: NDArray[Any], pick: np.ufunc) -> NDArray[Any]:
        """Reduce every block by `pick` with whole-array passes; returns a view [blocks].

        Each pass combines every element with the one half a block further on; after log2(block)
        passes the first element of each block holds the block's result, the others are not used.
        """
        source = array
        spares = [self._buffer(name, array.dtype, array.size) for name in ("slide", "spare")]
        half = self.block_size // 2
        while half:
            count = array.size - half
            pick(source[:count], source[half:], out=spares[0][:count])
            source, spares = spares[0], spares[::-1]
            half //= 2
        return source[:: self.block_size]

    def _constant(self, value: int, size: int) -> NDArray[np.int8]:
        key = (f"constant {value}", np.dtype(np.int8))
        if key not in self._buffers or self._buffers[key].size < size:
            self._buffers[key] = np.full(size, value, np.int8)
        return self._buffers[key][:size]

    def _buffer(self, name: str, dtype: Any, size: int) -> NDArray[Any]:
        key = (name, np.dtype(dtype))
        if key not in self._buffers or self._buffers[key].size < size:
            self._buffers[key] = np.empty(size, dtype)
        return self._buffers[key][:size]


def pack_nibbles(values: Codes) -> Codes:
    """Pack [rows, n] values of 0..15 to [rows, ceil(n / 2)] bytes, the first in the low half."""
    rows, count = values.shape
    even = np.zeros((rows, count + count % 2), np.uint8)
    even[:, :count] = values
    packed: Codes = even[:, 0::2] | (even[:, 1::2] << 4)
    return packed


def _reciprocals(scales: NDArray[Any]) -> Floats:
    """1 / scale in float32; 0 where the scale is 0."""
    wide = scales.astype(np.float32)
    inverse: Floats = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide != 0)
    return inverse


def _require_finite(values: Floats) -> None:
    if not np.isfinite(values).all():
        raise ValueError("a weight is not finite (NaN, Inf or beyond the format's range)")
