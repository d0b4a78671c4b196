"""What every block format has in common: a code's value is origin + step * level of its group.

Formats differ in how step and origin follow from a group's weights, and in how all is stored; that
is what a `GridEncoder` knows. Choosing codes (nearest here, GPTQ in gptq.py) needs only the grid.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from toolkit.quantize.kernels import Codes, Floats

# What is still worth choosing codes for with care: the error of 8 bits drowns in that of others.
MOST_BITS = 6


@dataclass(frozen=True)
class Grid:
    """Where codes of [rows, columns] weights lie, as the runtime will read them from the file.

    steps, origins: float32 [rows, groups], rounded to the type they are stored in. `levels`
    [2^bits], rising, where a code is not its own level. `stored` is what the encoder writes beside
    the codes.
    """

    steps: Floats
    origins: Floats
    stored: tuple[NDArray[Any], ...] = field(repr=False)
    levels: Floats | None = None


@runtime_checkable
class GridEncoder(Protocol):
    """An encoder (stream.py) whose codes of `bits` others may choose."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    def fit(self, weights: Floats, importance: Floats | None = None) -> Grid:
        """The format's own grid for weights [rows, columns]; ValueError when it holds them not.

        `importance` [columns] says which columns' errors count most, for formats that search.
        """

    def write_codes(
        self, descriptor: int, codes: Codes, grid: Grid, row: int, offsets: tuple[int, ...]
    ) -> None:
        """Write codes [rows, columns], one a byte, as `Encoder.write` writes rows."""


def is_choosable(encoder: object) -> TypeGuard[GridEncoder]:
    """True when choosing an encoder's codes with care is worth it."""
    return isinstance(encoder, GridEncoder) and encoder.bits <= MOST_BITS


def fit_together(encoder: GridEncoder, weights: Floats, importance: Floats | None = None) -> Grid:
    """As `encoder.fit`, by several threads: ggml searches for a K-quant's scales for a while."""
    parts = [part for part in np.array_split(weights, os.cpu_count() or 1) if len(part)]
    with ThreadPoolExecutor(len(parts)) as pool:
        grids = list(pool.map(lambda part: encoder.fit(part, importance), parts))
    stored = tuple(
        np.concatenate(arrays) for arrays in zip(*(g.stored for g in grids), strict=True)
    )
    return Grid(
        np.concatenate([grid.steps for grid in grids]),
        np.concatenate([grid.origins for grid in grids]),
        stored,
        grids[0].levels,
    )


def nearest(weights: Floats, grid: Grid, bits: int) -> Codes:
    """Codes of the values nearest to weights [rows, columns], one a byte."""
    grouped = weights.reshape(*grid.steps.shape, -1)
    steps = grid.steps[..., None]
    positions = np.divide(
        grouped - grid.origins[..., None], steps, out=np.zeros_like(grouped), where=steps != 0
    )
    if grid.levels is None:
        codes: Codes = np.clip(np.rint(positions), 0, (1 << bits) - 1).astype(np.uint8)
    else:
        middles = (grid.levels[1:] + grid.levels[:-1]) / 2
        codes = np.searchsorted(middles, positions).astype(np.uint8)
    return codes.reshape(weights.shape)


def decode(codes: Codes, grid: Grid) -> Floats:
    """Float32 values of codes [rows, columns], as the runtime sees them."""
    levels = codes.astype(np.float32) if grid.levels is None else grid.levels[codes]
    values = levels.reshape(*grid.steps.shape, -1)
    values *= grid.steps[..., None]
    values += grid.origins[..., None]
    return values.reshape(codes.shape)
