"""KL divergence, agreement and perplexity against sums written out in plain Python."""

import math

import numpy as np
import pytest

from toolkit.quality.measures import compare_logits

RNG = np.random.default_rng(0)


def random_logits(count: int, vocab: int = 11) -> np.ndarray:
    return RNG.normal(0, 3, (count, vocab)).astype(np.float32)


def softmax(row: np.ndarray) -> list[float]:
    powers = [math.exp(float(value)) for value in row]
    return [power / math.fsum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


# 130 rows cross the chunks of 64 twice, the last one ragged.
@pytest.mark.parametrize("count", [2, 63, 64, 65, 130])
def test_measures_are_the_definitions(count):
    source, artifact = random_logits(count), random_logits(count)
    ids = RNG.integers(0, 11, count).tolist()
    found = compare_logits(source, artifact, ids)
    p, q = [softmax(row) for row in source], [softmax(row) for row in artifact]
    kl = [divergence(*rows) for rows in zip(p, q, strict=True)]
    # float64 sums of 11 terms each: equal up to rounding.
    assert found.kl == pytest.approx(kl, rel=1e-12)
    assert found.mean_kl == pytest.approx(math.fsum(kl) / count, rel=1e-12)
    assert found.kl_quantile(1.0) == max(found.kl)
    assert found.kl_quantile(0.5) == pytest.approx(np.median(kl), rel=1e-12)
    same = sum(int(a.index(max(a)) == b.index(max(b))) for a, b in zip(p, q, strict=True))
    assert found.top1 == same / count
    for rows, perplexity in ((p, found.perplexity_source), (q, found.perplexity_artifact)):
        losses = [-math.log(row[token]) for row, token in zip(rows[:-1], ids[1:], strict=True)]
        assert perplexity == pytest.approx(math.exp(math.fsum(losses) / (count - 1)), rel=1e-12)


def test_identical_models_are_zero_apart():
    logits = random_logits(70)
    found = compare_logits(logits, logits.copy(), [0] * 70)
    assert found.mean_kl == 0
    assert found.top1 == 1
    assert found.perplexity_source == found.perplexity_artifact


def test_a_shift_of_all_logits_changes_nothing():
    logits = random_logits(70)
    # float32 keeps 1000 + x to 6e-5; a divergence is quadratic in that.
    assert compare_logits(logits, logits + 1000, [0] * 70).mean_kl < 1e-8


def test_one_bad_position_shows_in_the_maximum_only():
    source = random_logits(200)
    artifact = source.copy()
    artifact[17] = artifact[17, ::-1]
    found = compare_logits(source, artifact, [0] * 200)
    assert found.kl_quantile(1.0) == found.kl[17] > 0.1
    assert found.kl_quantile(0.99) < 1e-12


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["source", "artifact"])
def test_values_that_are_not_finite_are_refused(bad, side):
    pair = {"source": random_logits(5), "artifact": random_logits(5)}
    pair[side][3, 2] = bad
    with pytest.raises(ValueError, match=f"the {side}'s logits hold NaN or infinity"):
        compare_logits(pair["source"], pair["artifact"], [0] * 5)


@pytest.mark.parametrize("shape", [(5, 12), (4, 11), (6, 11)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="logits of 5 tokens"):
        compare_logits(random_logits(5), np.zeros(shape, np.float32), [0] * 5)
