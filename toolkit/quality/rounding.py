"""What rounding to the nearest makes of a checkpoint in a format, without writing an artifact."""

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from toolkit.checkpoint import Checkpoint, to_float32
from toolkit.quality.reference import Array
from toolkit.quantize import grids
from toolkit.stream import DataFile, Encoder, Piece, read_piece

PIECE_WEIGHTS = 1 << 22  # rounded at once, to bound memory


def read_rounded(data: DataFile, checkpoint: Checkpoint) -> Iterator[tuple[str, Array]]:
    """Yield (name, float32) of every tensor as the data file would hold it, in the file's order.

    Float types are taken as they are: what they round away is nothing beside 8 bits.
    """
    waiting: dict[str, list[Piece]] = {}
    for piece in data.pieces:
        # Rows of a tensor may lie apart; one that is stored twice, a tied head, comes twice.
        pieces = waiting.setdefault(piece.tensor, [])
        pieces.append(piece)
        if sum(one.rows for one in pieces) >= prod(checkpoint.tensors[piece.tensor].shape[:-1]):
            yield piece.tensor, _round(checkpoint, piece.tensor, waiting.pop(piece.tensor))


def round_trip(encoder: Encoder, weights: Array) -> Array:
    """What a runtime sees of weights [rows, columns] that this encoder rounds to the nearest."""
    if not isinstance(encoder, grids.GridEncoder):
        return weights
    grid = encoder.fit(weights)
    return grids.decode(grids.nearest(weights, grid, encoder.bits), grid)


def _round(checkpoint: Checkpoint, name: str, pieces: Sequence[Piece]) -> Array:
    rounded = np.empty(checkpoint.tensors[name].shape, np.float32)
    rows = rounded.reshape(-1, rounded.shape[-1])
    for piece in pieces:
        for row, raw in read_piece(checkpoint, piece, PIECE_WEIGHTS):
            start = piece.start + (row - piece.first) * piece.step
            span = slice(start, start + len(raw) * piece.step, piece.step)
            rows[span] = round_trip(piece.encoder, to_float32(raw))
    return rounded
