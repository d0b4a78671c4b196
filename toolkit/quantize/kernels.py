"""The two loops that see every weight, the range of each group and its codes, and rounding.

Compiled from the .c files here when the package is built; where no compiler was found, NumPy does
the same more slowly (`python -m bench.quantizer`). What is per group, scales and zero points, the
module of the vendor whose numbers are matched computes between the two: `mlas`, `nncf`, `mlx`. For
two of their grids the compiled kernel does all three in one call, `quantize_groups`. What gptq.py
calls is here too.
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
NOT_FINITE = "a weight is not finite (NaN, Inf or beyond the format's range)"
IS_DONE, IS_NOT_FINITE = 0, 1  # what phiship_quantize returns
STEP_WEIGHTS = 1 << 17  # NumPy's work stays in a core's L2 cache
DTYPES = {np.dtype("<u2"): 0, np.dtype("<f2"): 1, np.dtype("<f4"): 2}  # u2: the bits of bfloat16

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class Rule(IntEnum):
    """How a weight becomes a code, clipped to 0 .. 2^bits - 1; every step rounds to float32."""

    MULTIPLY_ADD_TRUNCATE = 0  # trunc(weight * first + second)
    SUBTRACT_DIVIDE_ROUND = 1  # rint((weight - first) / second)
    DIVIDE_ADD_ROUND = 2  # rint(weight / first + second)


class Fit(IntEnum):
    """Step and origin of a group, from its range; codes are rint((weight - origin) / step)."""

    MLX = 0  # mlx.py
    NNCF = 1  # nncf.py, symmetric


class Layout(IntEnum):
    """How codes lie in memory."""

    STREAM = 0  # one stream of bits, the first code lowest
    HALVES = 1  # 4 bits: byte j of every 32 codes holds code j below code j + 16
    SIGNED = 2  # 4 bits: as STREAM, codes less 8 in two's complement


def find_ranges(
    raw: NDArray[Any], size: int, *, through_half: bool = False
) -> tuple[Floats, Floats]:
    """Least and greatest weight of each group of `size`, [groups]; ValueError if one is not finite.

    raw: a contiguous run of whole groups: bf16 bits (uint16), float16 or float32. `through_half`
    rounds every weight to float16 first.
    """
    groups = raw.size // size
    low, high = np.empty((2, groups), np.float32)
    if library := load_library():
        source = (raw.ctypes.data, DTYPES[raw.dtype], groups, size)
        is_finite = library.phiship_ranges(*source, low.ctypes.data, high.ctypes.data)
    else:
        for values, part in _steps(raw, size):
            values.min(axis=1, out=low[part])
            values.max(axis=1, out=high[part])
        is_finite = _are_finite(low, high)
        with np.errstate(invalid="ignore"):  # a NaN, which is refused below
            low += 0  # -0 becomes 0: groups of zeros are alike
            high += 0
    if through_half:
        low, high = _round_to_half(low), _round_to_half(high)  # which keeps their order
        is_finite = is_finite and _are_finite(low, high)
    if not is_finite:
        raise ValueError(NOT_FINITE)
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


def quantize_groups(
    raw: NDArray[Any],
    size: int,
    codes: Codes,
    bits: int,
    fit: Fit,
    layout: Layout,
    steps: NDArray[Any],
    origins: NDArray[Any] | None,
) -> bool:
    """Ranges, grid and codes in one call, compiled only: the weights come from memory once.

    raw, codes: as in encode. steps and origins (None: not stored) [groups], of one type of those of
    `raw`. False when a step is too large to be stored, ValueError when a weight is not finite.
    """
    library = load_library()
    assert library, "not compiled"
    settings = (raw.size // size, size, bits, fit, layout, DTYPES[steps.dtype])
    second = None if origins is None else origins.ctypes.data
    pointers = (steps.ctypes.data, second, codes.ctypes.data)
    found = library.phiship_quantize(raw.ctypes.data, DTYPES[raw.dtype], *settings, *pointers)
    if found == IS_NOT_FINITE:
        raise ValueError(NOT_FINITE)
    return bool(found == IS_DONE)


def pack(codes: Codes, bits: int, layout: Layout = Layout.STREAM) -> Codes:
    """Pack codes of any shape, one a byte, in C order; the last byte is filled with zeros."""
    flat = codes.reshape(-1)
    if layout is Layout.HALVES:
        halves = flat.reshape(-1, 2, 16)
        return _join(halves[:, 0], halves[:, 1]).reshape(-1)
    if bits == 8:
        return flat
    if layout is Layout.SIGNED:
        flat = flat ^ np.uint8(8)
    if bits == 4 and flat.size % 2 == 0:
        return _join(flat[0::2], flat[1::2])
    shifts = np.arange(bits, dtype=np.uint8)
    return np.packbits((flat[:, None] >> shifts) & 1, bitorder="little")


def narrow(values: NDArray[np.float32], out: NDArray[Any]) -> None:
    """Round float32 to nearest even into `out`: float32, float16, or bf16 as uint16 bits.

    Infinite where the type does not reach; NaN is not kept.
    """
    if out.dtype == np.float32:
        out[:] = values
    elif library := load_library():
        wide = np.ascontiguousarray(values)
        library.phiship_narrow(wide.ctypes.data, wide.size, DTYPES[out.dtype], out.ctypes.data)
    elif out.dtype == np.uint16:
        bits = values.view(np.uint32)
        out[:] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    else:
        with np.errstate(over="ignore"):
            out[:] = values


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
    library.phiship_ranges.argtypes = [pointer, number, count, count, pointer, pointer]
    library.phiship_ranges.restype = ctypes.c_bool
    source: list[Any] = [pointer, number, number, count, count]
    library.phiship_encode.argtypes = [*source, number, number, number, *[pointer] * 3]
    library.phiship_encode.restype = None
    settings: list[Any] = [count, count, *[number] * 4]
    library.phiship_quantize.argtypes = [pointer, number, *settings, *[pointer] * 3]
    library.phiship_quantize.restype = number
    library.phiship_narrow.argtypes = [pointer, count, number, pointer]
    library.phiship_narrow.restype = None
    place: list[Any] = [count, count, count, *[pointer] * 5]
    grid: list[Any] = [count, *[pointer] * 4]
    library.phiship_feedback.argtypes = [*place, *grid, number, pointer, pointer]
    library.phiship_feedback.restype = None
    return library


def _steps(
    raw: NDArray[Any], size: int, through_half: bool = False
) -> Iterator[tuple[Floats, slice]]:
    """Yield about STEP_WEIGHTS weights as fresh float32 [groups, size], and which groups."""
    step = max(1, STEP_WEIGHTS // size)
    groups = raw.reshape(-1, size)
    for start in range(0, len(groups), step):
        part = groups[start : start + step]
        if raw.dtype == np.uint16:
            values: Floats = np.left_shift(part, 16, dtype=np.uint32).view(np.float32)
        else:
            values = part.astype(np.float32)
        if through_half:
            values = _round_to_half(values)
        yield values, slice(start, start + len(part))


def _round_to_half(values: Floats) -> Floats:
    with np.errstate(over="ignore"):  # find_ranges refuses what becomes infinite
        return values.astype(np.float16).astype(np.float32)


def _are_finite(*arrays: Floats) -> bool:
    return all(bool(np.isfinite(array).all()) for array in arrays)


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
