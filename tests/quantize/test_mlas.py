"""The block quantizer against MLAS itself, as onnxruntime exports it."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from toolkit.checkpoint import to_float32
from toolkit.quantize import mlas

ROWS, COLUMNS = 48, 512
Floats = NDArray[np.float32]


def make_weights(seed: int = 0) -> Floats:
    """Rows of many magnitudes, with the cases in which signs, ties and zeros decide."""
    random = np.random.default_rng(seed)
    scales = random.choice([1e-3, 0.02, 1.0, 30.0], (ROWS, 1))
    weights = (random.standard_normal((ROWS, COLUMNS)) * scales).astype(np.float32)
    weights[0] = 0
    weights[1] = np.abs(weights[1])
    weights[2] = -np.abs(weights[2])
    weights[3, ::2], weights[3, 1::2] = 0.5, -0.5  # opposite extremes: the negative one counts
    weights[4, ::2], weights[4, 1::2] = -0.25, 0.25
    weights[5] *= 1e-6  # float16 subnormal scales
    weights[6] *= np.random.default_rng(seed + 1).choice([0.0, -0.0, 1.0], COLUMNS)
    weights[7] = np.where(np.arange(COLUMNS) % 2, 0.0, -0.0)
    return weights


def as_raw(weights: Floats, dtype: str) -> NDArray[Any]:
    """What a checkpoint of this type holds."""
    if dtype == "bf16":
        return (weights.view(np.uint32) >> 16).astype(np.uint16)
    return weights.astype({"f16": np.float16, "f32": np.float32}[dtype])


def quantize_with_mlas(
    weights: NDArray[Any], bits: int, block: int, symmetric: bool
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8]]:
    """Codes, scales and packed zero points from onnxruntime's own kernel."""
    state = pytest.importorskip("onnxruntime.capi._pybind_state")
    rows, columns = weights.shape
    blocks = columns // block
    codes = np.zeros((rows, blocks, block * bits // 8), np.uint8)
    scales = np.zeros(rows * blocks, weights.dtype)
    points = np.zeros((rows, (blocks * bits + 7) // 8), np.uint8)
    kernel = state.quantize_matmul_4bits if bits == 4 else state.quantize_matmul_8bits
    transposed = np.ascontiguousarray(weights.T)
    kernel(codes, transposed, scales, points.reshape(-1), block, rows, columns, symmetric)
    return codes.reshape(-1), scales, points


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_scheme_equals_mlas_bit_for_bit(
    bits: int, block: int, symmetric: bool, dtype: str, scale_dtype: type
) -> None:
    raw = as_raw(make_weights(), dtype)
    expected = quantize_with_mlas(to_float32(raw).astype(scale_dtype), bits, block, symmetric)
    blocks = raw.size // block
    codes = np.empty(raw.size * bits // 8, np.uint8)
    scales = np.empty(blocks, scale_dtype)
    points = np.empty(blocks, np.uint8)
    mlas.quantize(raw, bits, block, codes, scales, None if symmetric else points)
    np.testing.assert_array_equal(scales, expected[1])
    np.testing.assert_array_equal(codes, expected[0])
    if not symmetric:
        packed = mlas.pack_zero_points(points.reshape(ROWS, -1), bits)
        np.testing.assert_array_equal(packed, expected[2])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float, dtype: str, symmetric: bool) -> None:
    weights = np.ones(64, np.float32)
    weights[37] = bad
    scales, points = np.empty(2, np.float32), np.empty(2, np.uint8)
    with pytest.raises(ValueError, match="not finite"):
        raw, codes = as_raw(weights, dtype), np.empty(32, np.uint8)
        mlas.quantize(raw, 4, 32, codes, scales, None if symmetric else points)


def test_a_weight_beyond_float16_is_refused_when_scales_are_float16() -> None:
    weights = np.full(32, 1e6, np.float32)
    with pytest.raises(ValueError, match="not finite"):
        mlas.quantize(weights, 4, 32, np.empty(16, np.uint8), np.empty(1, np.float16), None)


def test_odd_counts_of_zero_points_fill_a_whole_byte() -> None:
    packed = mlas.pack_zero_points(np.array([[1, 2, 3]], np.uint8), 4)
    np.testing.assert_array_equal(packed, [[0x21, 0x03]])
