"""The front, levels, names beside points, tokens: what a report is put together from."""

import itertools
import random
from pathlib import Path

import pytest

from tests.reporting import samples
from toolkit.reporting.content import shorten
from toolkit.reporting.front import find_front
from toolkit.reporting.labels import place_labels
from toolkit.reporting.scale import HALF_DECADES, LEVELS, THIRDS, make_scale, write_short
from toolkit.reporting.svg import drawing
from toolkit.reporting.tables import write_kl
from toolkit.reporting.trace import level, trace


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1, 1)], [0]),
        ([(2, 1), (1, 2)], [1, 0]),
        ([(1, 1), (2, 2)], [0]),
        ([(1, 1), (2, 1)], [0]),
        ([(1, 2), (1, 1)], [1]),
        ([(1, 1), (1, 1)], [0]),
        ([(3, 0.5), (1, 3), (2, 1), (2.5, 2)], [1, 2, 0]),
    ],
)
def test_the_front(points: list[tuple[float, float]], front: list[int]) -> None:
    assert find_front(points) == front


def test_the_front_is_what_none_beats() -> None:
    chance = random.Random(1)
    points = [(chance.randrange(20), chance.randrange(20)) for _ in range(80)]

    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    best = {point for point in points if not any(beats(other, point) for other in points)}
    assert [points[place] for place in find_front(points)] == sorted(best)


@pytest.mark.parametrize("steps", [HALF_DECADES, THIRDS])
@pytest.mark.parametrize("largest", [3e-7, 0.01, 0.171, 0.9999, 1.0, 7.0, 3000.0])
def test_levels(steps: tuple[int, ...], largest: float) -> None:
    scale = make_scale([0.0, largest / 3, largest, float("nan")], steps)
    assert len(scale.bounds) == LEVELS
    assert list(scale.bounds) == sorted(scale.bounds)
    assert scale.level(largest) == LEVELS
    # The highest level is not wider than a step of the scale: nothing is darker than it must be.
    assert (
        largest < scale.bounds[-1] * 10 / steps[-1] * (1 + 1e-9) or largest < scale.bounds[-1] * 3.4
    )
    assert scale.level(0.0) == 0
    assert scale.level(float("nan")) == LEVELS
    assert [scale.level(bound) for bound in scale.bounds] == list(range(1, LEVELS + 1))
    assert scale.describe(1) == f"from {write_short(scale.bounds[0])}"


def test_levels_of_nothing() -> None:
    assert make_scale([], THIRDS).level(0.0) == 0


@pytest.mark.parametrize(
    ("value", "short", "kl"),
    [
        (0.0, "0", "0"), (0.00056, "0.00056", "0.000560"), (5.6e-5, "5.6e-5", "0.0000560"),
        (1e-6, "1e-6", "1e-6"), (0.01697, "0.017", "0.0170"), (0.171, "0.17", "0.171"),
        (12.34, "12", "12.3"), (float("nan"), "nan", "nan"),
    ],
)  # fmt: skip
def test_numbers(value: float, short: str, kl: str) -> None:
    assert (write_short(value), write_kl(value)) == (short, kl)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["phi-gguf-q4", "phi-gguf-q8"], ["q4", "q8"]),
        (["phi-gguf", "phi-mlx-4bit"], ["gguf", "mlx-4bit"]),
        (["phi", "phi-q4"], ["phi", "phi-q4"]),
        (["phi-q4"], ["phi-q4"]),
        (["a-x", "b-x"], ["a-x", "b-x"]),
        (["a-", "a-b"], ["a-", "b"]),
    ],
)
def test_short_names(names: list[str], short: list[str]) -> None:
    assert shorten(names) == short


def test_names_beside_points_cover_nothing() -> None:
    points = [(1.0, 1.0), (1.01, 1.0), (1.02, 1.005), (2.0, 2.0), (2.0, 1.0), (1.0, 2.0)]
    line = [(1.0, 2.0), (1.0, 1.0), (2.0, 1.0)]
    with drawing(860, 430) as figure:
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True))
        axes.margins(0.15)
        place_labels(figure, axes, points, [f"name-{n}" for n in range(len(points))], line)
        renderer = figure.canvas.get_renderer()
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        assert len(boxes) == len(points)
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)
        for box, point in itertools.product(boxes, points):
            assert not box.contains(*axes.transData.transform(point))
        for box in boxes:
            for here, there in itertools.pairwise(line):
                for share in (n / 100 for n in range(101)):
                    place = [a + share * (b - a) for a, b in zip(here, there, strict=True)]
                    assert not box.contains(*axes.transData.transform(place))


def test_tokens_have_the_divergence_of_what_foresaw_them(tmp_path: Path) -> None:
    artifact = samples.seal(tmp_path, "a")
    details = samples.make_details(
        artifact, texts=["a", "b", "c", "d", "e"], sequences=[3, 2],
        kl=(0.1, 0.5, 9.0, 0.3, 8.0), delta_p=(1.0, 2.0, None, 4.0, None),
        same_top=(True, False, True, True, True),
    )  # fmt: skip
    found = trace(details, 4)
    assert [token.text for token in found.shown] == ["a", "b", "c", "d"]
    assert [token.kl for token in found.shown] == [None, 0.1, 0.5, None]
    assert [(bad.token.text, bad.token.kl, bad.token.delta_p) for bad in found.worst] == [
        ("c", 0.5, 2.0), ("e", 0.3, 4.0), ("b", 0.1, 1.0),
    ]  # fmt: skip
    assert [bad.token.same_top for bad in found.worst] == [False, True, True]
    assert (found.worst[0].before, found.worst[0].after) == ("ab", "de")
    assert found.total == 5
    assert "KL 0.5 nats, Δp +2.0 %, another" in found.shown[2].describe()
    scale = make_scale([0.5], THIRDS)
    assert [level(token, scale) for token in found.shown] == [0, LEVELS - 2, LEVELS, 0]
