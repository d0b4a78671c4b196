"""How ranges of lengths are judged; real runtimes that leave their source are in tests/cli."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from tests.checkpoints import variant_config
from tests.small_checkpoints import BASE
from toolkit.artifact import Limits
from toolkit.checkpoint.config import Config
from toolkit.decoder import BlockSparse, Decoder
from toolkit.families import read_decoder
from toolkit.quality.agreement import find_switches, is_within, measure_ranges, tell_agreement
from toolkit.quality.details import Range
from toolkit.quality.measures import Comparison, Estimate

LIMITS = Limits(max_kl=0.1, min_top1=0.8)
SEQUENCES = 8


def read_variant(variant: str) -> Decoder:
    return read_decoder(Config(variant, variant_config(variant)))


def make_comparison(length: int, kl_at: Callable[[int], float]) -> Comparison:
    """Sequences whose divergence depends on the place only, but for some noise."""
    noise = np.random.default_rng(length).uniform(0.5, 1.5, length * SEQUENCES)
    kl = np.array([kl_at(place) for place in range(length)] * SEQUENCES) * noise
    ids = np.arange(length * SEQUENCES)
    losses = np.ones((2, len(kl)))
    losses[:, length - 1 :: length] = np.nan  # nothing follows a sequence's last token
    return Comparison(ids, kl, np.ones(len(kl), np.bool_), losses)


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


def test_a_switch_is_where_the_first_block_is_not_seen() -> None:
    """By the pattern itself: 2 local blocks of 16 tokens here, 16 of 64 in the published models."""
    small = read_decoder(Config("small", BASE))
    assert find_switches(small, 48) == [32]
    assert find_switches(small, 32) == []
    sparse = small.sparse
    assert sparse
    for position in (31, 32):
        seen = [sparse.sees(position // sparse.block, 0, shift) for shift in sparse.shifts]
        assert all(seen) == (position < 32)


def test_blocks_and_long_factors_are_judged_on_two_lengths_of_text() -> None:
    long = dataclasses.replace(read_variant("longrope"), sparse=BlockSparse(16, 2, 4, (0,), 2))
    cuts: list[int] = []
    ranges = judge(long, lambda place: 1.0 if place >= 32 else 0.01, cuts=cuts)
    assert [(one.first, one.last) for one in ranges] == [(1, 32), (33, 64), (65, 100)]
    assert [one.agrees for one in ranges] == [True, False, False]
    assert cuts == [64, 64, 100]


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


def test_a_range_of_the_last_position_has_no_next_token():
    first, last = judge(read_variant("window"), lambda _: 0.01, length=33)
    assert (last.first, last.last, last.tokens) == (33, 33, SEQUENCES)
    assert last.mean_kl == pytest.approx(0.01, rel=0.5)
    assert (first.judged, last.judged) == (True, False)


def test_too_few_tokens_are_not_judged():
    # 8 sequences: 12 tokens each are 96, 13 are 104.
    kl_at = lambda place: 0.01 if place < 32 else 5.0  # noqa: E731
    _, short = judge(read_variant("window"), kl_at, length=44)
    assert (short.tokens, short.judged, short.agrees) == (96, False, True)
    assert tell_agreement([short]) == "too short to say at 33 to 44 tokens"
    _, enough = judge(read_variant("window"), kl_at, length=45)
    assert (enough.tokens, enough.judged, enough.agrees) == (104, True, False)


def test_a_short_range_is_not_what_others_are_measured_by():
    kl_at = lambda place: 0.01 if place < 32 else 1e-5  # noqa: E731
    long, _ = judge(read_variant("window"), kl_at, length=44)
    assert long.agrees


@pytest.mark.parametrize(
    ("measure", "limits", "inside", "outside"),
    [
        ("mean KL", {"max_kl": 0.05}, Estimate(0.079, 0.01), Estimate(0.081, 0.01)),
        ("top-1 agreement", {"min_top1": 0.8}, Estimate(0.72, 0.03), Estimate(0.70, 0.03)),
        ("99 % KL", {"max_kl_99": 0.5}, Estimate(0.5), Estimate(0.51)),
        ("perplexity ratio", {"max_perplexity_ratio": 1.1}, Estimate(1.12, 0.01),
         Estimate(1.14, 0.01)),
    ],
)  # fmt: skip
def test_every_limit_is_held_when_it_is_surely_missed(measure, limits, inside, outside):
    assert is_within({measure: inside}, Limits(**limits))
    assert not is_within({measure: outside}, Limits(**limits))
