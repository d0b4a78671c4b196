"""Rows of a tensor as ONNX stores them: quantized blocks, plain, or transposed."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit import fileio
from toolkit.checkpoint import to_float32
from toolkit.quantize.blockwise import BlockQuantizer, pack_nibbles
from toolkit.stream import write_rows

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}


@dataclass(frozen=True)
class Blocks:
    """MatMulNBits operands: codes, scales and, when asymmetric, packed zero points."""

    bits: int
    block_size: int
    symmetric: bool
    scale_dtype: str

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Quantize rows; `offsets` are those of codes, scales and, if any, zero points."""
        rows, columns = raw.shape
        blocks = columns // self.block_size
        work = _work(self, rows * columns)
        codes = work.codes[: rows * columns * self.bits // 8]
        scales, points = work.scales[: rows * blocks], work.zero_points[: rows * blocks]
        work.quantizer.quantize(raw.reshape(-1), codes, scales, None if self.symmetric else points)
        write_rows(descriptor, codes.reshape(rows, -1), row, offsets[0])
        write_rows(descriptor, scales.reshape(rows, -1), row, offsets[1])
        if not self.symmetric:
            packed = points.reshape(rows, -1)
            packed = pack_nibbles(packed) if self.bits == 4 else packed
            write_rows(descriptor, packed, row, offsets[2])


@dataclass(frozen=True)
class Plain:
    """Rows as they are, in another float type; bfloat16 takes bfloat16 only, to lose nothing."""

    dtype: str

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Convert rows and write them in place."""
        write_rows(descriptor, _convert(raw, self.dtype), row, offsets[0])


@dataclass(frozen=True)
class Transposed:
    """Rows of an [out, in] matrix written as columns of an [in, out] one, `out` wide."""

    dtype: str
    out: int

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Write each input's run of outputs: one short write for each column of `raw`."""
        columns = np.ascontiguousarray(_convert(raw, self.dtype).T)
        item_bytes = ITEM_BYTES[self.dtype]
        for index, column in enumerate(columns):
            offset = offsets[0] + (index * self.out + row) * item_bytes
            fileio.write_at(descriptor, fileio.as_bytes(column), offset)


def _convert(raw: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "bfloat16":
        if raw.dtype != np.uint16:
            raise ValueError(
                f"is {raw.dtype}; quantization.embedding: bf16 needs a bf16 checkpoint; "
                "allowed here fp16, fp32"
            )
        return raw
    wide = to_float32(raw)
    with np.errstate(over="ignore"):
        converted = wide.astype(dtype, copy=False)
    if not np.isfinite(converted).all():
        raise ValueError(f"a weight is not finite (NaN, Inf or beyond {dtype})")
    return converted


@dataclass
class _Work:
    """Buffers of one process for one encoding, reused by all its tasks."""

    quantizer: BlockQuantizer
    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    zero_points: NDArray[np.uint8]


_works: dict[Blocks, _Work] = {}


def _work(encoder: Blocks, weights: int) -> _Work:
    found = _works.get(encoder)
    if found is None or found.codes.size * 8 < weights * encoder.bits:
        dtype = np.float16 if encoder.scale_dtype == "float16" else np.float32
        blocks = weights // encoder.block_size
        found = _works[encoder] = _Work(
            BlockQuantizer(encoder.bits, encoder.block_size, encoder.symmetric, dtype),
            np.empty(weights * encoder.bits // 8, np.uint8),
            np.empty(blocks, dtype),
            np.empty(blocks, np.uint8),
        )
    return found
