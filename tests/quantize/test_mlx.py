"""The grid of MLX against mlx.core.quantize itself."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from toolkit.quantize import kernels
from toolkit.quantize.kernels import narrow
from toolkit.quantize.mlx import quantize

ROWS, COLUMNS = 48, 512
Floats = NDArray[np.float32]
DTYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}
STORED: dict[str, Any] = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}


def make_weights(seed: int = 0) -> Floats:
    """Rows of many magnitudes, with the cases in which signs, ties and zeros decide."""
    random = np.random.default_rng(seed)
    scales = random.choice([1e-3, 0.02, 1.0, 30.0], (ROWS, 1))
    weights = (random.standard_normal((ROWS, COLUMNS)) * scales).astype(np.float32)
    weights[0] = 0
    weights[1] = np.abs(weights[1])
    weights[2] = -np.abs(weights[2])
    weights[3, ::2], weights[3, 1::2] = 0.5, -0.5  # ends equally far from 0
    weights[4] = 0.25  # no range
    weights[5] = -0.25
    weights[6] *= 1e-9  # below the least step
    weights[7] = 100 + weights[7] * 1e-3  # far from 0: the origin is many steps away
    weights[8] = -0.0
    weights[9] = np.round(weights[9] * 4) / 4  # weights half-way between codes
    return weights


def as_mlx(weights: Floats, dtype: str) -> Any:
    """The weights rounded to the type, as MLX holds them."""
    return mx.array(weights).astype(DTYPES[dtype])


def as_numpy(array: Any) -> NDArray[Any]:
    """An MLX array as a checkpoint or an artifact holds it; bf16 as its bits."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16))
    return np.array(array)


def run_ours(
    raw: NDArray[Any], bits: int, size: int
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any]]:
    codes = np.empty(raw.size * bits // 8, np.uint8)
    scales, biases = (np.empty(raw.size // size, raw.dtype) for _ in range(2))
    quantize(raw.reshape(-1), bits, size, codes, scales, biases)
    return codes, scales, biases


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_scheme_equals_mlx_bit_for_bit(bits: int, size: int, dtype: str) -> None:
    weights = as_mlx(make_weights(), dtype)
    expected = mx.quantize(weights, group_size=size, bits=bits, stream=mx.cpu)
    codes, scales, biases = run_ours(as_numpy(weights), bits, size)
    assert np.array_equal(codes, as_numpy(expected[0]).view(np.uint8).reshape(-1))
    unsigned = {2: np.uint16, 4: np.uint32}[scales.itemsize]
    for ours, theirs in ((scales, expected[1]), (biases, expected[2])):
        # As bits: -0 and 0 are different bytes of a file.
        assert np.array_equal(ours.view(unsigned), as_numpy(theirs).reshape(-1).view(unsigned))


@pytest.mark.parametrize("bits", [3, 4])
def test_without_a_compiler_the_bytes_are_the_same(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = as_numpy(as_mlx(make_weights(1), "bf16"))
    compiled = run_ours(raw, bits, 64)
    monkeypatch.setattr(kernels, "load_library", lambda: None)
    for ours, other in zip(compiled, run_ours(raw, bits, 64), strict=True):
        assert np.array_equal(ours, other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weights = make_weights()
    weights[10, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        run_ours(weights, 4, 64)


def test_a_range_beyond_float32_is_refused() -> None:
    weights = make_weights()
    weights[10, :2] = 3e38, -3e38
    with pytest.raises(ValueError, match="too far apart"):
        run_ours(weights, 4, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even(dtype: str) -> None:
    """Every upper half of a float32 below infinity, with lower halves around the tie."""
    upper = np.arange(0x7F80, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (upper | lower).view(np.float32).reshape(-1)
    values = np.concatenate([values, -values])
    with np.errstate(over="ignore"):
        narrow(values, found := np.empty(values.shape, STORED[dtype]))
    assert np.array_equal(found, as_numpy(as_mlx(values, dtype)))
