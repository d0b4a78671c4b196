"""The two loops that see every weight: the range of each group, and its codes.

Compiled from kernels.c when the package is built; where no compiler was found, NumPy does the same
more slowly (`python -m bench.quantizer`). What is per group, scales and zero points, the module of
the vendor whose numbers are matched computes between the two: `mlas`, `nncf`, `mlx`.
"""

import ctypes
from collections.abc import Iterator
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIBRARY = Path(__file__).with_name("_kernels.so")
STEP_WEIGHTS = 1 << 17  # NumPy's work stays in a core's L2 cache
DTYPES = {np.dtype("<u2"): 0, np.dtype("<f2"): 1, np.dtype("<f4"): 2}  # u2: the bits of bfloat16

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class Rule(IntEnum):
    """How a weight becomes a code, clipped to 0 .. 2^bits - 1; every step rounds to float32."""

    MULTIPLY_ADD_TRUNCATE = 0  # trunc(weight * first + second)
    SUBTRACT_DIVIDE_ROUND = 1  # rint((weight - first) / second)
    DIVIDE_ADD_ROUND = 2  # rint(weight / first + second)


class Layout(IntEnum):
    """How codes lie in memory."""

    STREAM = 0  # one stream of bits, the first code lowest
    HALVES = 1  # 4 bits: byte j of every 32 codes holds code j below code j + 16


def find_ranges(
    raw: NDArray[Any], size: int, *, through_half: bool = False
) -> tuple[Floats, Floats]:
    """Least and greatest weight of each group of `size`, [groups]; ValueError if one is not finite.

    raw: a contiguous run of whole groups: bf16 bits (uint16), float16 or float32. `through_half`
    rounds every weight to float16 first.
    """
    groups = raw.size // size
    low, high = np.empty(groups, np.float32), np.empty(groups, np.float32)
    if library := load_library():
        source = (raw.ctypes.data, DTYPES[raw.dtype], through_half, groups, size)
        library.phiship_ranges(*source, low.ctypes.data, high.ctypes.data)
    else:
        for values, part in _steps(raw, size, through_half):
            values.min(axis=1, out=low[part])
            values.max(axis=1, out=high[part])
    low += 0  # -0 becomes 0: blocks of zeros are alike
    high += 0
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("a weight is not finite (NaN, Inf or beyond the format's range)")
    return low, high


def encode(
    raw: NDArray[Any],
    size: int,
    codes: Codes,
    bits: int,
    rule: Rule,
    first: Floats,
    second: Floats,
    *,
    layout: Layout = Layout.STREAM,
    through_half: bool = False,
) -> None:
    """Write the codes of `raw` (as in find_ranges; finite) to codes [raw.size * bits / 8].

    first, second: contiguous [groups]. `size` * bits is a multiple of 8; HALVES needs `size` 32.
    """
    if library := load_library():
        source = (raw.ctypes.data, DTYPES[raw.dtype], through_half, raw.size // size, size)
        pointers = (first.ctypes.data, second.ctypes.data, codes.ctypes.data)
        library.phiship_encode(*source, bits, rule, layout, *pointers)
        return
    for values, part in _steps(raw, size, through_half):
        one, other = first[part, None], second[part, None]
        with np.errstate(over="ignore", invalid="ignore"):  # a reciprocal may be infinite
            _apply(rule, values, one, other)
        whole = np.fmin(np.fmax(values, 0, out=values), (1 << bits) - 1, out=values)
        start = part.start * size * bits // 8
        packed = pack(whole.astype(np.uint8), bits, layout)
        codes[start : start + packed.size] = packed


def pack(codes: Codes, bits: int, layout: Layout = Layout.STREAM) -> Codes:
    """Pack codes of any shape, one a byte, in C order; the last byte is filled with zeros."""
    flat = codes.reshape(-1)
    if layout is Layout.HALVES:
        halves = flat.reshape(-1, 2, 16)
        return _join(halves[:, 0], halves[:, 1]).reshape(-1)
    if bits == 8:
        return flat
    if bits == 4 and flat.size % 2 == 0:
        return _join(flat[0::2], flat[1::2])
    shifts = np.arange(bits, dtype=np.uint8)
    return np.packbits((flat[:, None] >> shifts) & 1, bitorder="little")


def _join(low: Codes, high: Codes) -> Codes:
    joined: Codes = low | np.left_shift(high, 4, dtype=np.uint8)
    return joined


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels; None where the package was built without a compiler."""
    if not LIBRARY.is_file():
        return None
    library = ctypes.CDLL(str(LIBRARY))
    pointer, count, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    source: list[Any] = [pointer, number, number, count, count]
    library.phiship_ranges.argtypes = [*source, pointer, pointer]
    library.phiship_ranges.restype = None
    library.phiship_encode.argtypes = [*source, number, number, number, *[pointer] * 3]
    library.phiship_encode.restype = None
    return library


def _steps(raw: NDArray[Any], size: int, through_half: bool) -> Iterator[tuple[Floats, slice]]:
    """Yield about STEP_WEIGHTS weights as fresh float32 [groups, size], and which groups."""
    step = max(1, STEP_WEIGHTS // size)
    groups = raw.reshape(-1, size)
    for start in range(0, len(groups), step):
        part = groups[start : start + step]
        yield _widen(part, through_half), slice(start, start + len(part))


def _widen(raw: NDArray[Any], through_half: bool) -> Floats:
    if raw.dtype == np.uint16:
        values: Floats = np.left_shift(raw, 16, dtype=np.uint32).view(np.float32)
    else:
        values = raw.astype(np.float32)
    if through_half:
        with np.errstate(over="ignore"):  # find_ranges refuses what becomes infinite
            values = values.astype(np.float16).astype(np.float32)
    return values


def _apply(rule: Rule, values: Floats, first: Floats, second: Floats) -> None:
    """In place; the clip comes before truncation, which it does not change."""
    if rule is Rule.MULTIPLY_ADD_TRUNCATE:
        np.multiply(values, first, out=values)
        np.add(values, second, out=values)
        return
    if rule is Rule.SUBTRACT_DIVIDE_ROUND:
        np.subtract(values, first, out=values)
        np.divide(values, second, out=values)
    else:
        np.divide(values, first, out=values)
        np.add(values, second, out=values)
    np.rint(values, out=values)
