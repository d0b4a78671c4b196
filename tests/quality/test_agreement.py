"""How ranges of lengths are judged; real runtimes that leave their source are in tests/cli."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.checkpoints import variant_config
from toolkit.artifact import Limits
from toolkit.checkpoint.config import Config
from toolkit.decoder import Decoder
from toolkit.families import read_decoder
from toolkit.quality.agreement import find_switches, measure_ranges, tell_agreement
from toolkit.quality.details import Range
from toolkit.quality.measures import Comparison

LIMITS = Limits(max_kl=0.1, min_top1=0.8)
SEQUENCES = 8


def read_variant(variant: str) -> Decoder:
    return read_decoder(Config(variant, variant_config(variant)))


def make_comparison(length: int, kl_at: Callable[[int], float]) -> Comparison:
    """Sequences whose divergence depends on the place only, but for some noise."""
    noise = np.random.default_rng(length).uniform(0.5, 1.5, length * SEQUENCES)
    kl = np.array([kl_at(place) for place in range(length)] * SEQUENCES) * noise
    ids = np.arange(length * SEQUENCES)
    return Comparison(ids, kl, np.ones(len(kl), np.bool_), np.ones((2, len(kl))))


def judge(
    decoder: Decoder,
    kl_at: Callable[[int], float],
    length: int = 100,
    valid: tuple[int, int] = (1, 128),
    cuts: list[int] | None = None,
) -> tuple[Range, ...]:
    def measure(cut: int) -> Comparison:
        if cuts is not None:
            cuts.append(cut)
        return make_comparison(cut, kl_at)

    return measure_ranges(measure, decoder, length, valid, LIMITS)


def test_switches_are_windows_and_long_factors():
    assert find_switches(read_variant("window"), 128) == [32]
    assert find_switches(read_variant("longrope"), 256) == [64]
    assert find_switches(read_variant("longrope"), 65) == [64]
    assert find_switches(read_variant("longrope"), 64) == []
    assert find_switches(read_variant("window"), 32) == []
    assert find_switches(read_variant("mha"), 256) == []


@pytest.mark.parametrize("variant", ["mha", "window", "longrope"])
def test_a_short_text_has_no_ranges(variant):
    assert judge(read_variant(variant), lambda _: 1.0, length=30) == ()


def test_a_window_is_found_in_one_reading():
    cuts: list[int] = []
    kl_at = lambda place: 0.002 if place < 32 else 0.05  # noqa: E731
    first, second = judge(read_variant("window"), kl_at, valid=(1, 32), cuts=cuts)
    assert set(cuts) == {100}
    assert (first.first, first.last, first.tokens) == (1, 32, 32 * SEQUENCES)
    assert (second.first, second.last, second.tokens) == (33, 100, 68 * SEQUENCES)
    assert (first.agrees, first.claimed) == (True, True)
    # Within the limits, and yet not what it is below.
    assert (second.agrees, second.claimed) == (False, False)
    assert first.mean_kl == pytest.approx(0.002, rel=0.1)
    assert second.mean_kl == pytest.approx(0.05, rel=0.1)
    assert 0 < first.kl_error < 1e-4
    assert tell_agreement([first, second]) == "agrees at 1 to 32 tokens; not at 33 to 100 tokens"


def test_with_longrope_each_range_has_a_reading_of_its_own():
    cuts: list[int] = []
    ranges = judge(read_variant("longrope"), lambda _: 0.002, cuts=cuts)
    assert sorted(cuts) == [64, 100]
    assert [(one.first, one.last, one.agrees) for one in ranges] == [(1, 64, True), (65, 100, True)]
    assert tell_agreement(ranges) == "agrees at 1 to 64 and 65 to 100 tokens"


@pytest.mark.parametrize(
    ("low", "high", "agrees"),
    [
        (0.01, 0.012, True),  # what texts differ by
        (1e-6, 5e-4, True),  # rounding
        (0.01, 0.03, False),
        (0.12, 0.12, False),  # beyond the limit everywhere
    ],
)
def test_what_counts_as_off(low, high, agrees):
    ranges = judge(read_variant("window"), lambda place: low if place < 32 else high)
    assert ranges[1].agrees is agrees


def test_a_range_is_claimed_when_all_of_it_is():
    for valid, claimed in (((1, 99), [True, False]), ((1, 100), [True, True]),
                           ((33, 100), [False, True]), ((34, 100), [False, False])):  # fmt: skip
        ranges = judge(read_variant("window"), lambda _: 0.01, valid=valid)
        assert [one.claimed for one in ranges] == claimed
