"""Names beside points, where they cover neither points nor other names."""

import itertools
from collections.abc import Sequence
from typing import Any

from toolkit.reporting.svg import INK

NEAR, FAR, STEP = 9, 22, 13
# Where a name may stand, best first: offset in pixels, and which of its sides is there.
BESIDE = (
    (NEAR, 0, "left", "center"), (-NEAR, 0, "right", "center"), (0, NEAR, "center", "bottom"),
    (0, -NEAR, "center", "top"), (7, 7, "left", "bottom"), (7, -7, "left", "top"),
    (-7, 7, "right", "bottom"), (-7, -7, "right", "top"),
)  # fmt: skip
# Further away a thin line leads to the point.
AWAY = tuple(
    (right, up, "left" if right > 0 else "right", "center")
    for distance in range(6)
    for up in (FAR + STEP * distance, -FAR - STEP * distance)
    for right in (FAR + STEP * distance, -FAR - STEP * distance, 2 * FAR, -2 * FAR)
)
SPOTS = BESIDE + AWAY
POINT_REACH, LINE_REACH, NAME_REACH = 7.0, 1.5, 1.0
FONT_PIXELS = 9.5
OUTSIDE_COST = 4.0
Place = tuple[float, float]
Spot = tuple[int, int, str, str]
Box = tuple[float, float, float, float]


def place_labels(
    figure: Any,
    axes: Any,
    points: Sequence[Place],
    names: Sequence[str],
    line: Sequence[Place],
) -> None:
    """Write each name where it covers the least of points, names and a line of right angles."""
    figure.draw_without_rendering()  # sets the axes' place, which the spots depend on
    extent = axes.get_window_extent()
    frame = (extent.x0, extent.y0, extent.x1, extent.y1)
    places = [tuple(axes.transData.transform(point)) for point in points]
    corners = [tuple(axes.transData.transform(corner)) for corner in line]
    taken = [_reach(place, place, POINT_REACH) for place in places]
    taken += [_reach(here, there, LINE_REACH) for here, there in itertools.pairwise(corners)]
    for place, point, name in zip(places, points, names, strict=True):
        size = _measure(figure, name)
        costs = {}
        for spot in SPOTS:
            box = _find_box(place, size, spot)
            cost = sum(_overlap(box, other) for other in taken)
            costs[spot] = cost + OUTSIDE_COST * _outside(box, frame)
            if not costs[spot]:
                break
        best = min(costs, key=lambda spot: costs[spot])
        _write(axes, name, point, best)
        taken.append(_find_box(place, size, best))


def _measure(figure: Any, name: str) -> tuple[float, float]:
    """Width and height of a name in pixels."""
    text = figure.text(0, 0, name, fontsize=FONT_PIXELS)
    extent = text.get_window_extent(figure.canvas.get_renderer())
    text.remove()
    return extent.width, extent.height


def _write(axes: Any, name: str, point: Place, spot: Spot) -> None:
    right, up, side, height = spot
    lead = {"arrowstyle": "-", "color": INK["soft"], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 6}
    axes.annotate(
        name, point, (right, up), textcoords="offset points", ha=side, va=height,
        fontsize=FONT_PIXELS, color=INK["text"], annotation_clip=False,
        arrowprops=None if spot in BESIDE else {**lead, "relpos": (0 if right > 0 else 1, 0.5)},
    )  # fmt: skip


def _find_box(place: Place, size: tuple[float, float], spot: Spot) -> Box:
    """What a name covers at a spot beside a place."""
    x, y, (width, height) = place[0] + spot[0], place[1] + spot[1], size
    left = {"left": x, "right": x - width, "center": x - width / 2}[spot[2]]
    bottom = {"bottom": y, "top": y - height, "center": y - height / 2}[spot[3]]
    return _reach((left, bottom), (left + width, bottom + height), NAME_REACH)


def _reach(here: Place, there: Place, reach: float) -> Box:
    """The box around two places, with some room."""
    (x0, x1), (y0, y1) = sorted((here[0], there[0])), sorted((here[1], there[1]))
    return (x0 - reach, y0 - reach, x1 + reach, y1 + reach)


def _overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Box, frame: Box) -> float:
    """The area of a box that lies outside of a frame."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)
