"""Rows of a tensor as ONNX stores them: quantized blocks, plain, or transposed."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit import fileio
from toolkit.checkpoint import to_float32
from toolkit.quantize import mlas
from toolkit.quantize.grids import Grid
from toolkit.quantize.kernels import Codes, Floats, pack
from toolkit.stream import write_rows

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int32": 4}


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
        codes = np.empty((rows, columns * self.bits // 8), np.uint8)
        scales, points = self._reserve(rows, columns)
        flat = None if points is None else points.reshape(-1)
        mlas.quantize(raw, self.bits, self.block_size, codes.reshape(-1), scales.reshape(-1), flat)
        self._write(descriptor, codes, scales, points, row, offsets)

    def fit(self, weights: Floats, importance: Floats | None = None) -> Grid:
        """The grid that `write` takes; it looks at weights only."""
        del importance
        scales, points = self._reserve(*weights.shape)
        flat = None if points is None else points.reshape(-1)
        mlas.fit(weights, self.bits, self.block_size, scales.reshape(-1), flat)
        steps = scales.astype(np.float32)
        middle = np.float32(1 << (self.bits - 1)) if points is None else points
        stored = (scales,) if points is None else (scales, points)
        return Grid(steps, -steps * middle, stored)

    def write_codes(
        self, descriptor: int, codes: Codes, grid: Grid, row: int, offsets: tuple[int, ...]
    ) -> None:
        """Write codes, one a byte, and the grid's scales and zero points."""
        scales, *points = grid.stored
        packed = pack(codes, self.bits).reshape(len(codes), -1)
        self._write(descriptor, packed, scales, points[0] if points else None, row, offsets)

    def _reserve(self, rows: int, columns: int) -> tuple[NDArray[Any], Codes | None]:
        """Room for scales and, when asymmetric, zero points: [rows, blocks]."""
        blocks = columns // self.block_size
        points = None if self.symmetric else np.empty((rows, blocks), np.uint8)
        return np.empty((rows, blocks), self.scale_dtype), points

    def _write(
        self, descriptor: int, codes: Codes, scales: NDArray[Any], points: Codes | None, row: int,
        offsets: tuple[int, ...],
    ) -> None:  # fmt: skip
        write_rows(descriptor, codes, row, offsets[0])
        write_rows(descriptor, scales, row, offsets[1])
        if points is not None:
            write_rows(descriptor, mlas.pack_zero_points(points, self.bits), row, offsets[2])


@dataclass(frozen=True)
class Plain:
    """Rows times a factor in another float type; bfloat16 takes bfloat16 only, to lose nothing."""

    dtype: str
    factor: float = 1.0

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Convert rows and write them in place."""
        if self.factor != 1:
            raw = to_float32(raw) * np.float32(self.factor)
        write_rows(descriptor, convert(raw, self.dtype), row, offsets[0])


@dataclass(frozen=True)
class Picked:
    """Some values of a vector as plain ones: `count` from `start` on, every `step`-th."""

    dtype: str
    span: slice

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Convert them and write them in place."""
        values = np.ascontiguousarray(convert(raw, self.dtype)[:, self.span])
        write_rows(descriptor, values, row, offsets[0])


@dataclass(frozen=True)
class Transposed:
    """Rows of an [out, in] matrix written as columns of an [in, out] one, `out` wide."""

    dtype: str
    out: int

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Write each input's run of outputs: one short write for each column of `raw`."""
        columns = np.ascontiguousarray(convert(raw, self.dtype).T)
        item_bytes = ITEM_BYTES[self.dtype]
        for index, column in enumerate(columns):
            offset = offsets[0] + (index * self.out + row) * item_bytes
            fileio.write_at(descriptor, fileio.as_bytes(column), offset)


def convert(raw: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Rows in another float type; ValueError for what it cannot hold."""
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
