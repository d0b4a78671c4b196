"""Block-sparse attention as onnxruntime's SparseAttention takes it: tables of blocks, by layout.

A layout is compressed sparse rows: of each row of blocks where its columns begin, and the columns.
Heads take layouts in turn, so that as few are stored as heads differ.

Source: com.microsoft.SparseAttention in onnxruntime/docs/ContribOperators.md.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.decoder import BlockSparse

ROWS, COLUMNS = "block_rows", "block_columns"
BLOCK_MULTIPLE = 16
NONE = -1  # behind the columns of a layout that has fewer than others


@dataclass(frozen=True)
class Tables:
    """Where rows begin [layouts, blocks + 1], and columns [layouts, most of any layout]; int32."""

    rows: NDArray[np.int32]
    columns: NDArray[np.int32]


def list_shifts(sparse: BlockSparse) -> tuple[int, ...]:
    """The shift of each layout: those of the first heads, as far as they do not repeat."""
    shifts = tuple(shift % sparse.stride for shift in sparse.shifts)
    heads = len(shifts)
    fits = (n for n in range(1, heads) if shifts[:n] * (heads // n) == shifts)
    return shifts[: next(fits, heads)]


def make_tables(sparse: BlockSparse, context_length: int) -> Tables:
    """The tables for as many blocks as a context has."""
    blocks = -(-context_length // sparse.block)
    queries, keys = np.arange(blocks)[:, None], np.arange(blocks)
    starts, columns = [], []
    for shift in list_shifts(sparse):
        seen = sparse.sees(queries, keys, shift) & (keys <= queries)
        starts.append(np.concatenate([[0], np.cumsum(seen.sum(axis=1))]))
        columns.append(np.nonzero(seen)[1])
    table = np.full((len(columns), max(map(len, columns))), NONE, np.int32)
    for row, found in zip(table, columns, strict=True):
        row[: len(found)] = found
    return Tables(np.array(starts, np.int32), table)
