"""The compiled kernels against NumPy, bit for bit, and both against single weights by hand."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from toolkit.checkpoint import to_float32
from toolkit.quantize import kernels
from toolkit.quantize.kernels import (
    STEP_WEIGHTS,
    Layout,
    Rule,
    encode,
    find_ranges,
    narrow,
    pack,
)

# Fewer than a chunk of the C code, exactly one, more, and no multiple of one.
SIZES = [8, 16, 24, 32, 64, 128, 512, 768, 3072]
DTYPES = ["bf16", "f16", "f32"]


def make_raw(dtype: str, count: int, seed: int = 0) -> NDArray[Any]:
    """Finite weights of many magnitudes, float16's subnormals and ties among them."""
    random = np.random.default_rng(seed)
    weights = random.standard_normal(count) * random.choice([1e-7, 1e-3, 1, 100], count)
    weights[3::29] = random.choice([0.0, -0.0, 2.0**-25, -(2.0**-24) * 1.5, 65504.0], count)[3::29]
    wide = weights.astype(np.float32)
    if dtype == "bf16":
        return (wide.view(np.uint32) >> 16).astype(np.uint16)
    return wide.astype({"f16": np.float16, "f32": np.float32}[dtype])


def make_parameters(groups: int, rule: Rule) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One pair a group, such that codes fall within the range, on both ends, and on ties."""
    random = np.random.default_rng(1)
    first = random.choice([0.5, 3.7, 300.0, -20.0], groups)
    second = random.choice([8.5, 0.5, 2.0], groups)
    if rule is Rule.SUBTRACT_DIVIDE_ROUND:
        first, second = first * 1e-3, np.where(first > 0, 0.01, -0.25)
    if rule is Rule.DIVIDE_ADD_ROUND:
        first = 1 / first
    return first.astype(np.float32), second.astype(np.float32)


def run_encode(raw: NDArray[Any], size: int, bits: int, rule: Rule, **keywords: Any) -> Any:
    codes = np.zeros(raw.size * bits // 8, np.uint8)
    first, second = make_parameters(raw.size // size, rule)
    encode(raw, size, codes, bits, rule, first, second, **keywords)
    return codes


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load_library", lambda: None)


@pytest.mark.parametrize("through_half", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_ranges_are_the_same_both_ways(
    size: int, dtype: str, through_half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_raw(dtype, size * 37)
    if dtype != "f16" and through_half:
        raw = np.where(np.abs(to_float32(raw)) > 65000, 0, raw).astype(raw.dtype)
    compiled = find_ranges(raw, size, through_half=through_half)
    without_library(monkeypatch)
    plain = find_ranges(raw, size, through_half=through_half)
    for found, expected in zip(compiled, plain, strict=True):
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("through_half", [False, True])
@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_codes_are_the_same_both_ways(
    size: int, dtype: str, rule: Rule, through_half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_raw(dtype, size * 37)
    widths = (2, 3, 4, 5, 6, 8)
    compiled = [run_encode(raw, size, bits, rule, through_half=through_half) for bits in widths]
    without_library(monkeypatch)
    for bits, codes in zip(widths, compiled, strict=True):
        plain = run_encode(raw, size, bits, rule, through_half=through_half)
        np.testing.assert_array_equal(codes, plain)
        assert len(np.unique(codes)) > 2


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("rule", Rule)
def test_codes_are_what_the_rule_says(rule: Rule) -> None:
    raw = make_raw("f32", 32 * 37)
    codes = run_encode(raw, 32, 8, rule)
    first, second = make_parameters(37, rule)
    for index in np.random.default_rng(2).integers(0, raw.size, 200):
        weight, one, other = raw[index], first[index // 32], second[index // 32]
        expected = {
            Rule.MULTIPLY_ADD_TRUNCATE: lambda w, f, s: np.trunc(w * f + s),
            Rule.SUBTRACT_DIVIDE_ROUND: lambda w, f, s: np.rint((w - f) / s),
            Rule.DIVIDE_ADD_ROUND: lambda w, f, s: np.rint(w / f + s),
        }[rule](weight, one, other)
        assert codes[index] == int(min(max(expected, 0), 255))


@pytest.mark.usefixtures("implementation")
def test_halves_put_code_j_below_code_j_plus_16() -> None:
    raw = make_raw("bf16", 32 * 40)
    single = run_encode(raw, 32, 8, Rule.MULTIPLY_ADD_TRUNCATE)
    packed = run_encode(raw, 32, 4, Rule.MULTIPLY_ADD_TRUNCATE, layout=Layout.HALVES)
    halves = np.minimum(single, 15).reshape(-1, 2, 16)
    np.testing.assert_array_equal(packed.reshape(-1, 16), halves[:, 0] + 16 * halves[:, 1])


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
def test_signed_codes_are_two_complements(dtype: str) -> None:
    raw = make_raw(dtype, 64 * 40)
    plain = run_encode(raw, 64, 4, Rule.SUBTRACT_DIVIDE_ROUND)
    signed = run_encode(raw, 64, 4, Rule.SUBTRACT_DIVIDE_ROUND, layout=Layout.SIGNED)
    for shift in (0, 4):
        expected = ((plain >> shift & 15).astype(np.int8) - 8) & 15
        np.testing.assert_array_equal(signed >> shift & 15, expected)


def near_ties(steps: NDArray[np.float32], top: int) -> NDArray[np.float32]:
    """For each step the weights around every half code: [steps, codes * 7]."""
    middles = (np.arange(top + 1) + 0.5).astype(np.float32) * steps[:, None]
    near = middles.view(np.uint32)[..., None] + np.arange(-3, 4, dtype=np.int32).astype(np.uint32)
    return near.reshape(len(steps), -1).view(np.float32)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_near_a_tie_are_those_of_a_true_division(bits: int) -> None:
    """The compiled kernel multiplies by a reciprocal; python -m bench.division tries every step."""
    steps = np.random.default_rng(4).uniform(1, 2, 4000).astype(np.float32)
    steps[:2] = 1, np.nextafter(np.float32(2), np.float32(1))
    weights = near_ties(steps, (1 << bits) - 1)
    codes = np.empty(weights.size * bits // 8, np.uint8)
    rule, origins = Rule.SUBTRACT_DIVIDE_ROUND, np.zeros_like(steps)
    encode(weights, weights.shape[1], codes, bits, rule, origins, steps)
    expected = np.rint(weights / steps[:, None]).clip(0, (1 << bits) - 1).astype(np.uint8)
    np.testing.assert_array_equal(codes, pack(expected, bits))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("step", [1e-40, 1e-38, 2.0**-101, 2.0**-99, 2.0**99, 2.0**101, 3e38])
def test_steps_without_a_usable_reciprocal(step: float) -> None:
    weights = near_ties(np.array([step / 16], np.float32), 15)
    codes = np.empty(weights.size, np.uint8)
    divisor = np.array([step / 16], np.float32)
    origin = np.zeros(1, np.float32)
    encode(weights, weights.size, codes, 8, Rule.SUBTRACT_DIVIDE_ROUND, origin, divisor)
    np.testing.assert_array_equal(codes, np.rint(weights[0] / divisor[0]).clip(0, 255))


@pytest.mark.usefixtures("implementation")
def test_nothing_times_an_infinite_reciprocal_is_code_0() -> None:
    codes = np.full(16, 255, np.uint8)
    infinite, offset = np.array([np.inf], np.float32), np.array([8.5], np.float32)
    raw = np.zeros(32, np.float32)
    encode(raw, 32, codes, 4, Rule.MULTIPLY_ADD_TRUNCATE, infinite, offset)
    assert not codes.any()


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_a_stream_of_codes_reads_back_as_one_long_number(bits: int) -> None:
    codes = np.random.default_rng(3).integers(0, 1 << bits, 24).astype(np.uint8)
    number = int.from_bytes(pack(codes, bits).tobytes(), "little")
    assert [(number >> (bits * i)) & ((1 << bits) - 1) for i in range(24)] == codes.tolist()


@pytest.mark.usefixtures("implementation")
def test_every_float16_widens_to_itself() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    low, high = find_ranges(finite, 1)
    np.testing.assert_array_equal(low, finite.astype(np.float32))
    np.testing.assert_array_equal(high, low)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("through_half", [False, True])
def test_every_nan_is_refused(through_half: bool) -> None:
    for bits in (0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF):
        weights = np.array([1, bits], np.uint32).view(np.float32)
        with pytest.raises(ValueError, match="not finite"):
            find_ranges(weights, 2, through_half=through_half)


@pytest.mark.usefixtures("implementation")
def test_narrow_rounds_to_nearest_even() -> None:
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = (halves + np.append(halves[1:], 65504.0)) / 2
    values = np.concatenate([halves, middles, [65519, 65520, 1e30, 1e-30]]).astype(np.float32)
    values = np.concatenate([values, np.nextafter(values, np.float32(0)), -values])
    narrow(values, found := np.empty(values.size, np.float16))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found.view("<u2"), values.astype(np.float16).view("<u2"))


@pytest.mark.usefixtures("implementation")
def test_rounding_to_float16_is_to_nearest_even() -> None:
    """Each float16, the middle to its neighbour, and both sides of the middle."""
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = (halves + np.append(halves[1:], 65504.0)) / 2
    values = np.concatenate([halves, middles]).astype(np.float32)
    values = np.concatenate([values, np.nextafter(values, np.float32(0)), -values])
    expected = values.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(find_ranges(values, 1, through_half=True)[0], expected)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [32, 768])
def test_a_weight_that_is_not_finite_is_refused(size: int, bad: float, dtype: str) -> None:
    weights = np.ones(size * 3, np.float32)
    weights[size + size // 2] = bad
    raw = weights.view(np.uint32) >> 16 if dtype == "bf16" else weights
    raw = raw.astype({"bf16": np.uint16, "f16": np.float16, "f32": np.float32}[dtype])
    with pytest.raises(ValueError, match="not finite"):
        find_ranges(raw, size)


@pytest.mark.usefixtures("implementation")
def test_a_weight_beyond_float16_is_refused_on_the_way_through_it() -> None:
    values = np.array([65519.0, 1.0, 65520.0, 1.0], np.float32)
    find_ranges(values[:2], 2, through_half=True)
    with pytest.raises(ValueError, match="not finite"):
        find_ranges(values, 2, through_half=True)


@pytest.mark.usefixtures("implementation")
def test_a_run_of_several_steps_equals_its_groups_one_by_one() -> None:
    raw = make_raw("bf16", 2 * STEP_WEIGHTS + 96)
    low, high = find_ranges(raw, 32)
    codes = run_encode(raw, 32, 4, Rule.MULTIPLY_ADD_TRUNCATE)
    first, second = make_parameters(raw.size // 32, Rule.MULTIPLY_ADD_TRUNCATE)
    for group in (0, STEP_WEIGHTS // 32 - 1, STEP_WEIGHTS // 32, raw.size // 32 - 1):
        part, one = raw[32 * group : 32 * group + 32], np.empty(16, np.uint8)
        assert find_ranges(part, 32) == (low[group], high[group])
        pair = first[group : group + 1], second[group : group + 1]
        encode(part, 32, one, 4, Rule.MULTIPLY_ADD_TRUNCATE, *pair)
        np.testing.assert_array_equal(codes[16 * group : 16 * group + 16], one)
