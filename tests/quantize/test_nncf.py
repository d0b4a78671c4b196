"""NNCF's grid against its rule spelled out; tests/formats/test_openvino.py has its own digests."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from toolkit.checkpoint import to_float32
from toolkit.quantize import nncf

ROWS, COLUMNS = 64, 512
EPSILON = np.float32(2.0**-23)


def make_weights(seed: int = 0) -> NDArray[np.float32]:
    """Rows of many magnitudes, with the cases in which signs, ties and zeros decide."""
    random = np.random.default_rng(seed)
    scales = random.choice([1e-3, 0.02, 1.0, 30.0], (ROWS, 1))
    weights = (random.standard_normal((ROWS, COLUMNS)) * scales).astype(np.float32)
    weights[0] = 0
    weights[1, ::2], weights[1, 1::2] = 0.5, -0.5  # opposite extremes: the negative one counts
    weights[2] = np.arange(COLUMNS) % 33 / 16 - 1  # halves of a step: ties
    weights[3] = (np.arange(COLUMNS) % 31 - 15) * 2.0**-30  # steps below the least scale
    return weights


def as_raw(weights: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """What a checkpoint of this type holds."""
    if dtype == "bf16":
        return (weights.view(np.uint32) >> 16).astype(np.uint16)
    return weights.astype({"f16": np.float16, "f32": np.float32}[dtype])


def unpack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two codes a byte, the first in the low half."""
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1)


def quantize(
    raw: NDArray[Any], bits: int, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.uint8]]:
    groups = raw.size // size
    codes = np.empty(raw.size * bits // 8, np.uint8)
    scales, points = np.empty(groups, np.float16), np.empty(groups, np.uint8)
    nncf.quantize_asymmetric(raw.reshape(-1), bits, size, codes, scales, points)
    return (unpack(codes) if bits == 4 else codes), scales, points


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("size", [32, 64, 128, COLUMNS])
def test_symmetric_codes_and_scales(size: int, dtype: str) -> None:
    raw = as_raw(make_weights(), dtype)
    codes, scales = np.empty(raw.size // 2, np.uint8), np.empty(raw.size // size, np.float16)
    nncf.quantize_symmetric(raw.reshape(-1), size, codes, scales)
    groups = to_float32(raw).reshape(-1, size)
    low, high = groups.min(1), groups.max(1)
    wide = np.where(np.abs(low) >= high, np.abs(low), -high) / np.float32(8)
    wide[np.abs(wide) < EPSILON] = EPSILON
    expected = np.clip(np.rint(groups / wide[:, None]), -8, 7).astype(np.int8)
    found = (unpack(codes) ^ 8).astype(np.int8) - 8
    np.testing.assert_array_equal(found.reshape(-1, size), expected)
    np.testing.assert_array_equal(scales, wide.astype(np.float16))


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("size", [32, 64, 128, COLUMNS])
@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_codes_scales_and_zero_points(bits: int, size: int, dtype: str) -> None:
    raw = as_raw(make_weights(), dtype)
    codes, scales, points = quantize(raw, bits, size)
    groups = to_float32(raw).reshape(-1, size)
    low, high = groups.min(1), groups.max(1)
    wide = (high - low) / np.float32(2**bits - 1)
    wide[np.abs(wide) < EPSILON] = EPSILON
    zero = np.clip(-np.rint(low / wide), 0, 2**bits - 1)
    expected = np.rint(groups / wide[:, None] + zero[:, None]).clip(0, 2**bits - 1)
    np.testing.assert_array_equal(codes.reshape(-1, size), expected)
    np.testing.assert_array_equal(points, zero)
    np.testing.assert_array_equal(scales, wide.astype(np.float16))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_of_one_sign_keeps_its_values(bits: int, sign: int) -> None:
    """NNCF itself would clip them; here the range is widened to hold 0."""
    weights = sign * np.linspace(1, 2, 64, dtype=np.float32)
    codes, scales, points = quantize(weights, bits, 64)
    found = (codes.astype(np.float32) - points) * scales.astype(np.float32)
    step = 2 / (2**bits - 1)
    np.testing.assert_allclose(found, weights, atol=0.51 * step, rtol=2.0**-10)


def test_a_group_of_one_positive_value_keeps_it() -> None:
    """NNCF itself takes a scale of +value / 8 here, whose code 8 is clipped to 7."""
    raw = np.full(32, 0.5, np.float32)
    codes, scales = np.empty(16, np.uint8), np.empty(1, np.float16)
    nncf.quantize_symmetric(raw, 32, codes, scales)
    assert ((unpack(codes) ^ 8).astype(np.float32) - 8) * scales == pytest.approx(raw)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_that_is_not_finite_is_refused(bits: int, value: float) -> None:
    weights = make_weights()
    weights[5, 7] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize(weights, bits, 64)


def test_weights_beyond_the_scales_type_are_refused() -> None:
    weights = np.full(64, 3e8, np.float32)
    codes, scales = np.empty(32, np.uint8), np.empty(1, np.float16)
    with pytest.raises(ValueError, match="too large for a float16 scale"):
        nncf.quantize_symmetric(weights, 64, codes, scales)
    with pytest.raises(ValueError, match="too large for a float16 scale"):
        quantize(np.array([-3e38, 3e38] * 32, np.float32), 8, 64)
