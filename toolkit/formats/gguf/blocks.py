"""ggml's blocks taken apart: the grid each lays under its weights, and codes put back into it.

The grid is ggml's own choice (its search, weighted by importance); only the codes are chosen anew.
Layouts follow ggml-common.h and ggml-quants.c (dequantize_row_*); tests hold every one against
gguf-py's reader.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.formats.gguf.mix import GgmlType
from toolkit.quantize.grids import Grid
from toolkit.quantize.kernels import Codes, Floats

IQ4_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
# Subtracted from what is stored.
ORIGINS = {GgmlType.Q4_0: 8, GgmlType.Q5_0: 16, GgmlType.Q6_K: 32, GgmlType.Q8_0: 128}
SCALE_IQ4_XS = 32


@dataclass(frozen=True)
class Blocks:
    """A type whose codes others may choose: fields of a block, bits of a code."""

    fields: np.dtype[Any]
    bits: int


def _block(*fields: tuple[str, str] | tuple[str, str, tuple[int, ...]]) -> np.dtype[Any]:
    return np.dtype(list(fields))


BLOCKS = {
    GgmlType.Q4_0: Blocks(_block(("d", "<f2"), ("qs", "u1", (16,))), 4),
    GgmlType.Q4_1: Blocks(_block(("d", "<f2"), ("m", "<f2"), ("qs", "u1", (16,))), 4),
    GgmlType.Q5_0: Blocks(_block(("d", "<f2"), ("qh", "<u4"), ("qs", "u1", (16,))), 5),
    GgmlType.Q5_1: Blocks(
        _block(("d", "<f2"), ("m", "<f2"), ("qh", "<u4"), ("qs", "u1", (16,))), 5
    ),
    GgmlType.Q8_0: Blocks(_block(("d", "<f2"), ("qs", "u1", (32,))), 8),
    GgmlType.IQ4_NL: Blocks(_block(("d", "<f2"), ("qs", "u1", (16,))), 4),
    GgmlType.IQ4_XS: Blocks(
        _block(("d", "<f2"), ("high", "<u2"), ("low", "u1", (4,)), ("qs", "u1", (128,))), 4
    ),
    GgmlType.Q4_K: Blocks(
        _block(("d", "<f2"), ("m", "<f2"), ("scales", "u1", (12,)), ("qs", "u1", (128,))), 4
    ),
    GgmlType.Q5_K: Blocks(
        _block(
            ("d", "<f2"), ("m", "<f2"), ("scales", "u1", (12,)), ("qh", "u1", (32,)),
            ("qs", "u1", (128,)),
        ),
        5,
    ),
    GgmlType.Q6_K: Blocks(
        _block(("ql", "u1", (128,)), ("qh", "u1", (64,)), ("scales", "i1", (16,)), ("d", "<f2")),
        6,
    ),
}  # fmt: skip


def read_grid(kind: GgmlType, encoded: NDArray[np.uint8]) -> Grid:
    """The grid of encoded rows [rows, bytes], which it keeps to put codes into."""
    blocks = encoded.view(BLOCKS[kind].fields)
    steps = _read_steps(kind, blocks)
    origins = _read_origins(kind, blocks, steps)
    levels = IQ4_LEVELS if kind in (GgmlType.IQ4_NL, GgmlType.IQ4_XS) else None
    rows = len(encoded)
    return Grid(steps.reshape(rows, -1), origins.reshape(rows, -1), (encoded,), levels)


def put_codes(kind: GgmlType, encoded: NDArray[np.uint8], codes: Codes) -> NDArray[np.uint8]:
    """Encoded rows with other codes [rows, columns], one a byte."""
    encoded = encoded.copy()
    blocks = encoded.view(BLOCKS[kind].fields).reshape(-1)
    if kind == GgmlType.Q6_K:
        _put_q6_k(blocks, codes)
        return encoded
    if kind == GgmlType.Q8_0:
        blocks["qs"] = (codes ^ 128).reshape(len(blocks), -1)  # in two's complement
        return encoded
    # Of 32 codes halves lie one above the other; K-quants do so with 64.
    half = 32 if kind in (GgmlType.Q4_K, GgmlType.Q5_K) else 16
    parts = codes.reshape(len(blocks), -1, 2, half)
    low = parts & 15
    blocks["qs"] = (low[:, :, 0] | low[:, :, 1] << 4).reshape(len(blocks), -1)
    if kind == GgmlType.Q5_K:
        fifth = parts.reshape(len(blocks), 8, 32) >> 4
        blocks["qh"] = np.bitwise_or.reduce(fifth << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    if kind in (GgmlType.Q5_0, GgmlType.Q5_1):
        fifth = codes.reshape(len(blocks), 32).astype(np.uint32) >> 4
        blocks["qh"] = np.bitwise_or.reduce(fifth << np.arange(32, dtype=np.uint32), axis=1)
    return encoded


def _read_steps(kind: GgmlType, blocks: NDArray[Any]) -> Floats:
    """Float32, the groups of a block last."""
    scale: Floats = blocks["d"].astype(np.float32)[..., None]
    if kind in (GgmlType.Q4_K, GgmlType.Q5_K):
        scale = scale * _six_bits(blocks["scales"])[0]
    if kind == GgmlType.Q6_K:
        scale = scale * blocks["scales"]
    if kind == GgmlType.IQ4_XS:
        low = np.stack([blocks["low"] & 15, blocks["low"] >> 4], axis=-1)
        high = blocks["high"][..., None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
        whole = low.reshape(high.shape).astype(np.int32) | high.astype(np.int32) << 4
        scale = scale * (whole - SCALE_IQ4_XS).astype(np.float32)
    return scale


def _read_origins(kind: GgmlType, blocks: NDArray[Any], steps: Floats) -> Floats:
    origins: Floats = steps * np.float32(-ORIGINS.get(kind, 0))
    if kind in (GgmlType.Q4_1, GgmlType.Q5_1):
        origins[:] = blocks["m"][..., None]
    if kind in (GgmlType.Q4_K, GgmlType.Q5_K):
        minima = _six_bits(blocks["scales"])[1]
        origins -= blocks["m"].astype(np.float32)[..., None] * minima
    return origins


def _six_bits(packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Eight scales and eight minima of 6 bits from 12 bytes (get_scale_min_k4)."""
    first, second, third = (packed[..., part : part + 4] for part in (0, 4, 8))
    scales = [first & 63, third & 15 | first >> 6 << 4]
    minima = [second & 63, third >> 4 | second >> 6 << 4]
    return np.concatenate(scales, axis=-1), np.concatenate(minima, axis=-1)


def _put_q6_k(blocks: NDArray[Any], codes: Codes) -> None:
    """Of 128 codes, four runs of 32: low halves in two runs of bytes, two high bits in a third."""
    runs = codes.reshape(len(blocks), 2, 4, 32)
    low, high = runs & 15, runs >> 4
    joined = low[:, :, :2] | low[:, :, 2:] << 4
    blocks["ql"] = joined.reshape(len(blocks), -1)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    blocks["qh"] = np.bitwise_or.reduce(high << shifts, axis=2).reshape(len(blocks), -1)
