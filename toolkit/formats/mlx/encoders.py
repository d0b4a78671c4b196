"""Rows of a tensor as MLX stores them: codes with scales and biases, or floats."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import to_float32
from toolkit.quantize import mlx
from toolkit.quantize.grids import Grid
from toolkit.quantize.kernels import Codes, Floats, narrow, pack
from toolkit.stream import write_rows

# A recipe's dtype as NumPy holds it; bf16 as its bits.
STORED: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype("<u2"),
    "fp16": np.dtype("<f2"),
    "fp32": np.dtype("<f4"),
}


@dataclass(frozen=True)
class Groups:
    """Codes of `bits`, and per `size` inputs a scale and a bias in `dtype`."""

    bits: int
    size: int
    dtype: str

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Quantize rows; `offsets` are those of codes, scales and biases."""
        rows, columns = raw.shape
        weights = _convert(raw, self.dtype)
        codes = np.empty((rows, columns * self.bits // 8), np.uint8)
        scales, biases = self._reserve(rows, columns)
        flat = [array.reshape(-1) for array in (weights, codes, scales, biases)]
        mlx.quantize(flat[0], self.bits, self.size, *flat[1:])
        for array, offset in zip((codes, scales, biases), offsets, strict=True):
            write_rows(descriptor, array, row, offset)

    def fit(self, weights: Floats, importance: Floats | None = None) -> Grid:
        """The grid that `write` takes; it looks at weights only."""
        del importance
        scales, biases = self._reserve(*weights.shape)
        mlx.fit(weights, self.bits, self.size, scales.reshape(-1), biases.reshape(-1))
        return Grid(to_float32(scales), to_float32(biases), (scales, biases))

    def write_codes(
        self, descriptor: int, codes: Codes, grid: Grid, row: int, offsets: tuple[int, ...]
    ) -> None:
        """Write codes, one a byte, and the grid's scales and biases."""
        packed = pack(codes, self.bits).reshape(len(codes), -1)
        for array, offset in zip((packed, *grid.stored), offsets, strict=True):
            write_rows(descriptor, array, row, offset)

    def _reserve(self, rows: int, columns: int) -> NDArray[Any]:
        """Room for scales and biases: [2, rows, groups]."""
        return np.empty((2, rows, columns // self.size), STORED[self.dtype])


@dataclass(frozen=True)
class Kernels:
    """Kernels [out, channels, height, width] as floats of `dtype`, channels last.

    A kernel's rows are [channels * height, width]; they have to come whole.
    """

    dtype: str
    channels: int
    height: int
    width: int

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Turn kernels and write them in place; ValueError when one is cut, or not finite."""
        if row % (self.channels * self.height) or len(raw) % (self.channels * self.height):
            raise ValueError(f"rows {row} to {row + len(raw)} are no whole kernels")
        kernels = raw.reshape(-1, self.channels, self.height * self.width)
        turned = np.ascontiguousarray(kernels.transpose(0, 2, 1))
        Plain(self.dtype).write(descriptor, turned.reshape(raw.shape), row, offsets)


@dataclass(frozen=True)
class Plain:
    """Rows as floats of `dtype`."""

    dtype: str

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Convert rows and write them in place; ValueError when a weight is not finite."""
        converted = _convert(raw, self.dtype)
        is_bits = converted.dtype == np.uint16
        bad = (converted & 0x7F80) == 0x7F80 if is_bits else ~np.isfinite(converted)
        if bad.any():
            raise ValueError(f"a weight is not finite (NaN, Inf or beyond {self.dtype})")
        write_rows(descriptor, converted, row, offsets[0])


def _convert(raw: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Raw weights in `dtype`, rounded to nearest even; `raw` itself when it is that already."""
    if raw.dtype == STORED[dtype]:
        return raw
    converted = np.empty(raw.shape, STORED[dtype])
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        narrow(to_float32(raw), converted)
    return converted
