"""Rows of a tensor as OpenVINO stores them: groups of integers, or floats."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import to_float32
from toolkit.quantize import kernels, nncf
from toolkit.quantize.grids import Grid
from toolkit.quantize.kernels import Codes, Floats
from toolkit.stream import write_rows

DTYPES: dict[str, type[np.generic]] = {
    "f32": np.float32,
    "f16": np.float16,
    "i64": np.int64,
    "i32": np.int32,
    "u8": np.uint8,
    "boolean": np.bool_,
}


@dataclass(frozen=True)
class Symmetric:
    """4-bit codes in two's complement, and scales."""

    size: int

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Quantize rows; `offsets` are those of codes and scales."""
        rows, columns = raw.shape
        codes = np.empty((rows, columns // 2), np.uint8)
        scales = np.empty((rows, columns // self.size), np.float16)
        nncf.quantize_symmetric(raw, self.size, codes.reshape(-1), scales.reshape(-1))
        write_rows(descriptor, codes, row, offsets[0])
        write_rows(descriptor, scales, row, offsets[1])

    def fit(self, weights: Floats, importance: Floats | None = None) -> Grid:
        """The grid that `write` takes; it looks at weights only."""
        del importance
        scales = np.empty((len(weights), weights.shape[1] // self.size), np.float16)
        nncf.fit_symmetric(weights, self.size, scales.reshape(-1))
        steps = scales.astype(np.float32)
        return Grid(steps, steps * np.float32(-8), (scales,))

    def write_codes(
        self, descriptor: int, codes: Codes, grid: Grid, row: int, offsets: tuple[int, ...]
    ) -> None:
        """Write codes, one a byte, and the grid's scales."""
        packed = kernels.pack(codes, 4, kernels.Layout.SIGNED).reshape(len(codes), -1)
        write_rows(descriptor, packed, row, offsets[0])
        write_rows(descriptor, grid.stored[0], row, offsets[1])


@dataclass(frozen=True)
class Asymmetric:
    """4- or 8-bit codes, scales and zero points of `point_bits`, whole bytes a row."""

    bits: Literal[4, 8]
    size: int
    point_bits: Literal[4, 8]

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Quantize rows; `offsets` are those of codes, scales and zero points."""
        rows, columns = raw.shape
        groups = columns // self.size
        codes = np.empty((rows, columns * self.bits // 8), np.uint8)
        scales, points = np.empty((rows, groups), np.float16), np.empty((rows, groups), np.uint8)
        nncf.quantize_asymmetric(
            raw, self.bits, self.size, codes.reshape(-1), scales.reshape(-1), points.reshape(-1)
        )
        self._write(descriptor, (codes, scales, points), row, offsets)

    def fit(self, weights: Floats, importance: Floats | None = None) -> Grid:
        """The grid that `write` takes; it looks at weights only."""
        del importance
        shape = len(weights), weights.shape[1] // self.size
        scales, points = np.empty(shape, np.float16), np.empty(shape, np.uint8)
        nncf.fit_asymmetric(weights, self.bits, self.size, scales.reshape(-1), points.reshape(-1))
        steps = scales.astype(np.float32)
        return Grid(steps, -steps * points, (scales, points))

    def write_codes(
        self, descriptor: int, codes: Codes, grid: Grid, row: int, offsets: tuple[int, ...]
    ) -> None:
        """Write codes, one a byte, and the grid's scales and zero points."""
        packed = kernels.pack(codes, self.bits).reshape(len(codes), -1)
        self._write(descriptor, (packed, *grid.stored), row, offsets)

    def _write(
        self, descriptor: int, arrays: tuple[NDArray[Any], ...], row: int, offsets: tuple[int, ...]
    ) -> None:
        """Write codes, scales and zero points, these one a byte until now."""
        codes, scales, points = arrays
        packed = kernels.pack(points, self.point_bits).reshape(len(points), -1)
        for array, offset in zip((codes, scales, packed), offsets, strict=True):
            write_rows(descriptor, array, row, offset)


@dataclass(frozen=True)
class Plain:
    """Rows times a factor, in float16 or float32."""

    dtype: Literal["f16", "f32"]
    factor: float = 1.0

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Convert rows and write them in place."""
        wide = to_float32(raw)
        if self.factor != 1:
            wide = wide * np.float32(self.factor)
        with np.errstate(over="ignore"):
            converted: NDArray[Any] = wide.astype(DTYPES[self.dtype], copy=False)
        if not np.isfinite(converted).all():
            raise ValueError(f"a weight is not finite (NaN, Inf or beyond {self.dtype})")
        write_rows(descriptor, converted, row, offsets[0])
