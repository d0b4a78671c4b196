"""GPTQ and coordinate descent: against the definition of what they minimize, and each other."""

import itertools
from typing import Any

import numpy as np
import pytest

from toolkit.formats.gguf.encoder import GridBlocks
from toolkit.formats.gguf.mix import GgmlType
from toolkit.formats.onnx.encoders import Blocks
from toolkit.quantize import gptq
from toolkit.quantize.grids import Grid, decode, nearest

ROWS, COLUMNS, TOKENS = 24, 256, 700


@pytest.fixture(params=["compiled", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations of the inner loop."""
    if request.param == "numpy":
        monkeypatch.setattr(gptq, "load_library", lambda: None)
    elif gptq.load_library() is None:
        pytest.fail("the kernels were not compiled; is a C compiler installed?")
    return str(request.param)


def make_inputs(seed: int = 0) -> Any:
    """Correlated activations with a few large channels, as a layer norm's outputs have."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((TOKENS, 64)) @ rng.standard_normal((64, COLUMNS))
    inputs = mixed + rng.standard_normal((TOKENS, COLUMNS))
    return (inputs * np.exp(rng.standard_normal(COLUMNS))).astype(np.float32)


def make_weights(seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def output_error(weights: Any, values: Any, gram: Any) -> Any:
    """tr(E G E'), row by row."""
    off = (values - weights).astype(np.float64)
    return np.einsum("ij,jk,ik->i", off, gram.astype(np.float64), off)


def test_factor_takes_the_damped_gram_apart():
    inputs = make_inputs()
    gram = inputs.T @ inputs
    found = gptq.factor(gram)
    order = found.order
    damped = gram + np.eye(COLUMNS) * found.damping * np.diag(gram).mean()
    damped = damped[np.ix_(order, order)].astype(np.float64)
    upper = np.triu(found.feedback, 1).astype(np.float64) + np.eye(COLUMNS)
    inverse = np.linalg.inv(upper)
    diagonal = inverse @ damped @ inverse.T
    # float32 factors of a matrix whose columns differ a hundredfold.
    scale = np.sqrt(np.outer(np.diag(damped), np.diag(damped)))
    assert np.abs((diagonal - np.diag(np.diag(diagonal))) / scale).max() < 1e-4
    assert np.all(np.diff(found.importance[order]) <= 0)
    assert np.allclose(found.descent * np.diag(damped), damped * (1 - np.eye(COLUMNS)), rtol=1e-4)


def test_shifted_weights_make_the_sources_outputs_of_other_inputs():
    """Against the same least squares in float64; without a difference nothing moves."""
    expected, weights = make_inputs(), make_weights()
    noise = np.random.default_rng(3).standard_normal(expected.shape).astype(np.float32)
    inputs = expected + noise * np.abs(expected).mean(axis=0) / 4
    gram = inputs.T @ inputs
    assert gptq.find_shift(inputs, inputs, gram) is None
    found = weights + weights @ gptq.find_shift(expected, inputs, gram)
    wide = inputs.astype(np.float64)
    damped = wide.T @ wide + np.eye(COLUMNS) * gptq.AIM_DAMPING * np.diag(gram).mean()
    right = weights + weights @ (expected - wide).T @ wide @ np.linalg.inv(damped)
    assert np.abs(found - right).max() < 1e-4 * np.abs(right).max()
    target = expected @ weights.T
    after, before = (np.square(inputs @ w.T - target).sum() for w in (found, weights))
    assert after < 0.7 * before


def test_outputs_are_nearer_than_with_the_nearest_codes(way):
    inputs, weights = make_inputs(), make_weights()
    gram = inputs.T @ inputs
    grid = Blocks(4, 32, True, "float32").fit(weights)
    codes = gptq.choose_codes(weights, grid, 4, gptq.factor(gram))
    chosen = output_error(weights, decode(codes, grid), gram)
    rounded = output_error(weights, decode(nearest(weights, grid, 4), grid), gram)
    assert (chosen < rounded).all()
    assert chosen.sum() < 0.4 * rounded.sum()


def test_both_ways_choose_the_same(monkeypatch):
    """Also with levels that are not evenly spaced, stretched columns and rows of one thread."""
    inputs, weights = make_inputs(), make_weights()
    found = gptq.factor(inputs.T @ inputs)
    stretch = np.exp(np.random.default_rng(2).standard_normal(COLUMNS) / 4).astype(np.float32)
    for encoder in (Blocks(4, 16, False, "float32"), GridBlocks(GgmlType.IQ4_XS)):
        grid = encoder.fit(weights * stretch)
        fast = gptq.choose_codes(weights, grid, encoder.bits, found, stretch)
        with monkeypatch.context() as patch:
            patch.setattr(gptq, "load_library", lambda: None)
            slow = gptq.choose_codes(weights, grid, encoder.bits, found, stretch)
        # A sum in another order may turn a code over, and those after it.
        assert np.mean(fast != slow) < 0.01


def test_a_sweep_never_makes_it_worse(way, monkeypatch):
    """Each step of coordinate descent is the best one, so the error can only fall."""
    inputs, weights = make_inputs(), make_weights()
    gram = inputs.T @ inputs
    grid = Blocks(4, 32, True, "float32").fit(weights)
    errors = []
    for sweeps in range(4):
        monkeypatch.setattr(gptq, "SWEEPS", sweeps)
        found = gptq.factor(gram)
        codes = gptq.choose_codes(weights, grid, 4, found)
        damped = gram + np.eye(COLUMNS) * found.damping * np.diag(gram).mean()
        errors.append(output_error(weights, decode(codes, grid), damped))
    for before, after in itertools.pairwise(errors):
        assert (after <= before * 1.0001).all()
    assert errors[1].sum() < 0.997 * errors[0].sum()


def test_two_columns_by_hand(monkeypatch):
    """w = (0.4, 0.4) on whole numbers, columns that correlate by 0.9.

    Rounded to the nearest both are 0. Here the first becomes 0 too, with an error of 0.4; the
    second is asked for 0.4 + 0.9 * 0.4 = 0.76 and becomes 1, which the sweep then leaves.
    """
    monkeypatch.setattr(gptq, "DAMPING", 1e-9)
    gram = np.array([[1.0, 0.9], [0.9, 1.0]], np.float32)
    grid = Grid(np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32), ())
    weights = np.array([[0.4, 0.4]], np.float32)
    monkeypatch.setattr(gptq, "load_library", lambda: None)
    codes = gptq.choose_codes(weights, grid, 4, gptq.factor(gram))
    assert codes.tolist() == [[0, 1]]


def test_inputs_that_never_fire(way):
    """Dead channels and a text of zeros: their codes are the nearest, nothing is divided by 0."""
    weights = make_weights()
    grid = Blocks(4, 32, True, "float32").fit(weights)
    inputs = make_inputs()
    inputs[:, :32] = 0
    codes = gptq.choose_codes(weights, grid, 4, gptq.factor(inputs.T @ inputs))
    assert np.array_equal(codes[:, :32], nearest(weights, grid, 4)[:, :32])
    # ggml searches by importance, and would drop what has none at all.
    for kind in (GgmlType.Q4_0, GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.IQ4_XS):
        encoder, found = GridBlocks(kind), gptq.factor(inputs.T @ inputs)
        searched = encoder.fit(weights, found.damped_importance)
        values = decode(gptq.choose_codes(weights, searched, encoder.bits, found), searched)
        assert np.square(values - weights)[:, :32].mean() < 0.15, kind
    zero = gptq.factor(np.zeros((COLUMNS, COLUMNS), np.float32))
    assert np.array_equal(gptq.choose_codes(weights, grid, 4, zero), nearest(weights, grid, 4))


def test_fewer_tokens_than_columns_are_damped(way):
    inputs = make_inputs()[:20]
    found = gptq.factor(inputs.T @ inputs)
    grid = Blocks(4, 32, True, "float32").fit(make_weights())
    codes = gptq.choose_codes(make_weights(), grid, 4, found)
    values = decode(codes, grid)
    rounded = decode(nearest(make_weights(), grid, 4), grid)
    fresh = make_inputs()[20:]
    gram = fresh.T @ fresh
    # What the text does not show is left near to the nearest code: no harm on other text.
    assert output_error(make_weights(), values, gram).sum() < 1.3 * (
        output_error(make_weights(), rounded, gram).sum()
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_refused(bad):
    gram = np.eye(COLUMNS, dtype=np.float32)
    gram[3, 3] = bad
    with pytest.raises(ValueError, match="not finite"), np.errstate(invalid="ignore"):
        gptq.factor(gram)
