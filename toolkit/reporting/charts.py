"""The pictures of a report, each as an <svg> element for the page."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from toolkit.console import format_bytes
from toolkit.errors import require
from toolkit.pages import make_visible
from toolkit.reporting.content import Content, Entry
from toolkit.reporting.labels import place_labels
from toolkit.reporting.looks import find_look
from toolkit.reporting.measured import Measured
from toolkit.reporting.svg import INK, drawing, to_markup

WIDTH = 860.0
# Above these ratios of the largest to the smallest, most points would lie in a corner.
LOG_KL, LOG_SIZE = 5.0, 3.0
POINT_SIZE = 8.0


@dataclass(frozen=True)
class _Point:
    """An artifact where it is drawn: its size, and nats or the floor of a logarithmic axis."""

    entry: Entry
    measured: Measured
    at: tuple[float, float]
    is_front: bool


def draw_front(content: Content) -> Markup:
    """Size against mean divergence; a step line joins what no other artifact beats."""
    points, unit, is_log = _list_points(content)
    with drawing(WIDTH, 430) as figure:
        axes = figure.subplots()
        _set_scales(axes, [point.at[0] for point in points], is_log)
        steps = _list_steps([point.at for point in points if point.is_front])
        axes.plot(
            *zip(*steps, strict=True), color=INK["soft"], linewidth=1.2, dashes=(5, 3), zorder=1
        )
        for number, point in enumerate(points):
            _draw_point(axes, point, f"point-{number}")
        dress(axes)
        axes.grid(visible=True, color=INK["line"], linewidth=0.6)
        axes.set_xlabel(f"size, {unit}")
        axes.set_ylabel("mean KL to the source, nats per token")
        place_labels(figure, axes, [p.at for p in points], [_name(p) for p in points], steps)
        titles = {f"point-{number}": _describe(point) for number, point in enumerate(points)}
        return to_markup(figure, "front", "Size against mean KL of every artifact", titles)


def _list_points(content: Content) -> tuple[list[_Point], str, bool]:
    """The points, the front's first; the unit of sizes; whether divergences need a log axis."""
    heights, is_log = _lift_zeros([measured.mean_kl for _, measured in content.plotted])
    front = {entry.manifest.name for entry in content.front}
    sizes = [entry.manifest.size_bytes for entry, _ in content.plotted]
    unit, unit_bytes = ("GB", 1e9) if max(sizes) >= 1e9 else ("MB", 1e6)
    points = [
        _Point(entry, measured, (size / unit_bytes, height), entry.manifest.name in front)
        for (entry, measured), size, height in zip(content.plotted, sizes, heights, strict=True)
    ]
    return sorted(points, key=lambda point: not point.is_front), unit, is_log


def _lift_zeros(values: Sequence[float]) -> tuple[list[float], bool]:
    """Heights to draw at, and whether the axis is logarithmic; there a zero lies at the floor."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) < LOG_KL * min(positive):
        return list(values), False
    return [value if value > 0 else min(positive) / 3 for value in values], True


def _set_scales(axes: Any, sizes: Sequence[float], is_log: bool) -> None:
    ticker = require("matplotlib.ticker")
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    if max(sizes) > LOG_SIZE * min(sizes):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 6), numticks=12))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: write_plain(value)))
    axes.margins(x=0.12, y=0.16)


def write_plain(value: float) -> str:
    """A number of an axis without an exponent."""
    return f"{value:.9f}".rstrip("0").rstrip(".")


def _list_steps(front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The least divergence within a size: level until the next artifact fits, then down to it."""
    ordered = sorted(front)
    steps = [
        corner
        for here, there in itertools.pairwise(ordered)
        for corner in (here, (there[0], here[1]))
    ]
    return [*steps, ordered[-1]]


def _draw_point(axes: Any, point: _Point, gid: str) -> None:
    look, error, height = find_look(point.entry), point.measured.mean_kl_error, point.at[1]
    colour = INK[look.ink]
    if error:
        below = min(error, height * 0.95)  # a logarithmic axis has no zero
        axes.errorbar(*point.at, yerr=[[below], [error]], color=colour, linewidth=1, zorder=2)
    axes.plot(
        *point.at, marker=look.marker, markersize=POINT_SIZE, markeredgewidth=1.6, color=colour,
        markerfacecolor=colour if point.is_front else INK["back"], linestyle="", gid=gid,
        zorder=4 if point.is_front else 3,
    )  # fmt: skip


def _name(point: _Point) -> str:
    return make_visible(point.entry.label) + (" (KL 0)" if point.measured.mean_kl == 0 else "")


def _describe(point: _Point) -> str:
    manifest, measured = point.entry.manifest, point.measured
    size = format_bytes(manifest.size_bytes)
    return make_visible(f"{manifest.name}: {size}, mean KL {measured.mean_kl:.4g} nats")


def dress(axes: Any) -> None:
    """The look that all charts share: two thin axes, the grid behind."""
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK["soft"])
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))


@dataclass(frozen=True)
class Bar:
    """A row of bars: its name, its ink, hatched or full; a heading stands above it."""

    name: str
    ink: str
    is_hatched: bool = False
    heading: str = ""


@dataclass(frozen=True)
class Panel:
    """One measure of all rows; NaN where it is not known."""

    title: str
    values: Sequence[float]
    show: Callable[[float], str]


def draw_bars(name: str, label: str, rows: Sequence[Bar], panels: Sequence[Panel]) -> Markup:
    """Horizontal bars, one panel a measure side by side; the names stand left of the first."""
    places, place = [], -1.0
    for number, row in enumerate(rows):
        place += (1.9 if number else 1.4) if row.heading else 1.0
        places.append(place)
    with drawing(WIDTH, 50 + 24 * (place + 1)) as figure:
        columns = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(columns, panels, strict=True):
            _draw_panel(axes, places, rows, panel)
            axes.set_yticks([])
        columns[0].set_yticks(places, [make_visible(row.name) for row in rows])
        columns[0].tick_params(axis="y", labelcolor=INK["soft"])
        for place, row in zip(places, rows, strict=True):
            _head(columns[0], place - 0.72, make_visible(row.heading))
        return to_markup(figure, name, label)


def _head(axes: Any, place: float, heading: str) -> None:
    axes.annotate(
        heading, (0, place), (4, 0), textcoords="offset points", va="center", fontsize=9.5,
        color=INK["text"], annotation_clip=False,
    )  # fmt: skip


def _draw_panel(axes: Any, places: Sequence[float], rows: Sequence[Bar], panel: Panel) -> None:
    for place, value, row in zip(places, panel.values, rows, strict=True):
        is_known = not math.isnan(value)
        if is_known:
            axes.barh(
                place, value, 0.72, color=INK["back" if row.is_hatched else row.ink],
                edgecolor=INK[row.ink], hatch="////" if row.is_hatched else "", linewidth=1,
            )  # fmt: skip
        axes.annotate(
            panel.show(value) if is_known else "not known", (value if is_known else 0, place),
            (4, 0), textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    dress(axes)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.set_title(panel.title, loc="left", fontsize=10.5)
    axes.set_xlim(0, 1.3 * max((v for v in panel.values if not math.isnan(v)), default=1.0) or 1.0)
    axes.set_ylim(places[-1] + 0.6, min(places[0] - 0.6, -0.6))
