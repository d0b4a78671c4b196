"""KL divergence, agreement and perplexity against sums written out in plain Python."""

import math
import statistics

import numpy as np
import pytest

from toolkit.quality.measures import compare_logits, join

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


def percentile(values: list[float], share: float) -> float:
    """Between the two nearest in order, in proportion."""
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    ordered = sorted(values)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def test_the_summary_is_the_definitions():
    count = 150
    source = random_logits(count)
    artifact = source + RNG.normal(0, 0.4, source.shape).astype(np.float32)
    ids = RNG.integers(0, 11, count).tolist()
    p, q = [softmax(row) for row in source], [softmax(row) for row in artifact]
    kl = [divergence(*rows) for rows in zip(p, q, strict=True)]
    losses = [
        [-math.log(row[token]) for row, token in zip(rows[:-1], ids[1:], strict=True)]
        for rows in (p, q)
    ]
    ratios = [second - first for first, second in zip(*losses, strict=True)]
    changes = [
        100 * (math.exp(-second) - math.exp(-first)) for first, second in zip(*losses, strict=True)
    ]
    top1 = statistics.mean(a.index(max(a)) == b.index(max(b)) for a, b in zip(p, q, strict=True))
    squares = [change**2 for change in changes]
    rms = math.sqrt(statistics.mean(squares))
    perplexities = [math.exp(statistics.mean(some)) for some in losses]
    ratio = perplexities[1] / perplexities[0]
    expected = {
        "mean KL": (statistics.mean(kl), standard_error(kl)),
        "median KL": (statistics.median(kl), None),
        "90 % KL": (percentile(kl, 0.9), None),
        "99 % KL": (percentile(kl, 0.99), None),
        "99.9 % KL": (percentile(kl, 0.999), None),
        "max KL": (max(kl), None),
        "top-1 agreement": (top1, math.sqrt(top1 * (1 - top1) / (count - 1))),
        "source perplexity": (perplexities[0], perplexities[0] * standard_error(losses[0])),
        "artifact perplexity": (perplexities[1], perplexities[1] * standard_error(losses[1])),
        "perplexity ratio": (ratio, ratio * standard_error(ratios)),
        "ln perplexity ratio": (math.log(ratio), standard_error(ratios)),
        "mean Δp": (statistics.mean(changes), standard_error(changes)),
        "RMS Δp": (rms, 0.5 / rms * standard_error(squares)),
        "min Δp": (min(changes), None),
        "1 % Δp": (percentile(changes, 0.01), None),
        "5 % Δp": (percentile(changes, 0.05), None),
        "25 % Δp": (percentile(changes, 0.25), None),
        "median Δp": (statistics.median(changes), None),
        "75 % Δp": (percentile(changes, 0.75), None),
        "95 % Δp": (percentile(changes, 0.95), None),
        "99 % Δp": (percentile(changes, 0.99), None),
        "max Δp": (max(changes), None),
    }
    found = compare_logits(source, artifact, ids)
    summary = found.summarize()
    assert list(summary) == list(expected)
    for name, (value, error) in expected.items():
        # Quantiles and differences of close numbers lose some digits.
        assert summary[name].value == pytest.approx(value, rel=1e-9, abs=1e-12), name
        assert summary[name].error == (error and pytest.approx(error, rel=1e-9)), name
    assert found.delta_p == pytest.approx(changes, abs=1e-10)


def test_two_tokens_by_hand():
    # The source gives 1/2, 1/4, 1/4, the artifact 1/4, 1/2, 1/4; the second token is 0.
    logits = np.log(np.array([[2, 1, 1], [1, 2, 1]], np.float32))
    source, artifact = logits, logits[::-1]
    found = compare_logits(source, artifact, [2, 0])
    quarter = math.log(2) / 4  # 1/2 ln 2 + 1/4 ln 1/2 + 1/4 ln 1, both ways
    assert found.kl == pytest.approx([quarter, quarter], rel=1e-6)
    assert found.same_top.tolist() == [False, False]
    assert found.ids.tolist() == [2, 0]
    assert found.delta_p == pytest.approx([-25], rel=1e-6)
    summary = found.summarize()
    assert summary["source perplexity"].value == pytest.approx(2, rel=1e-6)
    assert summary["artifact perplexity"].value == pytest.approx(4, rel=1e-6)
    assert summary["perplexity ratio"].value == pytest.approx(2, rel=1e-6)
    assert summary["top-1 agreement"].value == summary["top-1 agreement"].error == 0
    assert summary["mean KL"].error == pytest.approx(0, abs=1e-9)


def test_parts_are_the_whole():
    source, artifact = random_logits(80), random_logits(80)
    ids = RNG.integers(0, 11, 80).tolist()
    whole = compare_logits(source, artifact, ids)
    parts = join(
        [
            compare_logits(source[:30], artifact[:30], ids[:30], ids[30]),
            compare_logits(source[30:31], artifact[30:31], ids[30:31], ids[31]),
            compare_logits(source[31:], artifact[31:], ids[31:]),
        ]
    )
    assert parts.summarize() == whole.summarize()
    assert np.array_equal(parts.losses, whole.losses, equal_nan=True)
    assert np.array_equal(parts.ids, whole.ids)


def test_sequences_do_not_foresee_each_other():
    pairs = [(random_logits(40), random_logits(40)) for _ in range(2)]
    ids = [RNG.integers(0, 11, 40).tolist() for _ in range(2)]
    parts = [compare_logits(*pair, some) for pair, some in zip(pairs, ids, strict=True)]
    both = join(parts)
    assert len(both.kl) == len(both.same_top) == len(both.ids) == 80
    assert len(both.delta_p) == 78
    assert np.isnan(both.losses).any(axis=0).nonzero()[0].tolist() == [39, 79]
    assert both.mean_kl == pytest.approx((parts[0].mean_kl + parts[1].mean_kl) / 2)


def test_some_positions_can_be_chosen():
    found = compare_logits(random_logits(40), random_logits(40), [0] * 40)
    chosen = found.select(np.arange(40) >= 30)
    assert chosen.kl.tolist() == found.kl[30:].tolist()
    assert len(chosen.delta_p) == 9


def test_one_token_without_the_next_is_refused():
    one = random_logits(1)
    with pytest.raises(ValueError, match="logits of 1 tokens"):
        compare_logits(one, one, [3])
    assert compare_logits(one, one, [3], 4).perplexity_source > 1


def test_even_a_wild_artifact_has_numbers():
    source, ids = random_logits(40), [0] * 40
    summary = compare_logits(source, 1e6 * source[:, ::-1], ids).summarize()
    for estimate in summary.values():
        assert math.isfinite(estimate.value)
        assert estimate.error is None or math.isfinite(estimate.error)
    assert summary["artifact perplexity"].value > 1e100


def test_what_no_token_follows_has_no_loss_in_its_summary():
    found = compare_logits(random_logits(3), random_logits(3), [0, 1, 2])
    last = found.select(np.array([False, False, True]))
    assert last.summarize()["mean KL"].value == last.kl[0]
    assert not {"perplexity ratio", "mean Δp"} & last.summarize().keys()
    assert found.select(np.zeros(3, np.bool_)).summarize() == {}
