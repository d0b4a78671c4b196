"""The heat map: a model from its embedding to its head, one strip an artifact."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from toolkit.errors import require
from toolkit.pages import make_visible
from toolkit.quality.details import TensorError
from toolkit.reporting.charts import WIDTH, dress
from toolkit.reporting.content import Heated
from toolkit.reporting.scale import Scale, write_short
from toolkit.reporting.svg import INK, drawing, to_markup

KINDS = ("qkv", "attention_out", "gate_up", "down")
# In pixels: a row, a strip's title above its rows, and what is around the strips.
ROW, TITLE, LEFT, BOTTOM = 20, 32, 96, 24
NUMBERED = 44  # cells as wide as this have their number in them


@dataclass(frozen=True)
class _Map:
    """Where things are: `x` in layers, `y` in pixels from the top."""

    layers: int
    kinds: Sequence[str]
    strips: int

    @property
    def outer(self) -> float:
        """Width of the embedding and of the head: wide enough for their names."""
        return max(1.0, self.layers / 16)

    @property
    def width(self) -> float:
        """Of everything, in layers."""
        return self.layers + 2.5 * self.outer

    @property
    def rows(self) -> int:
        """Of a strip."""
        return max(1, len(self.kinds))

    @property
    def strip(self) -> int:
        """Height of a strip with its title."""
        return TITLE + ROW * self.rows

    def place(self, tensor: TensorError) -> tuple[float, float, float, float] | None:
        """Left, top, width and height within a strip; None for what has no place."""
        if tensor.kind == "embedding":
            return (-1.2 * self.outer, 0, self.outer, ROW * self.rows)
        if tensor.kind == "head":
            return (self.layers + 0.2 * self.outer, 0, self.outer, ROW * self.rows)
        if tensor.layer is None or tensor.kind not in self.kinds:
            return None
        return (tensor.layer, ROW * self.kinds.index(tensor.kind), 1, ROW)


def draw_heat(heated: Sequence[Heated], scale: Scale) -> Markup:
    """Layers from left to right, kinds from top to bottom; outermost the embedding and the head."""
    tensors = [tensor for one in heated for tensor in one.tensors]
    layers = 1 + max((t.layer for t in tensors if t.layer is not None), default=0)
    kinds = [kind for kind in KINDS if any(tensor.kind == kind for tensor in tensors)]
    map_ = _Map(layers, kinds, len(heated))
    height = map_.strip * len(heated) + BOTTOM
    with drawing(WIDTH, height) as figure:
        figure.set_layout_engine("none")
        left, bottom = LEFT / WIDTH, BOTTOM / height
        axes = figure.add_axes((left, bottom, 1 - left, 1 - bottom))
        titles: dict[str, str] = {}
        for number, one in enumerate(heated):
            top = number * map_.strip + TITLE
            axes.text(-1.2 * map_.outer, top - 7, make_visible(one.entry.label), fontsize=10.5)
            for cell in _list_cells(one.tensors, map_):
                gid = f"cell-{number}-{len(titles)}"
                titles[gid] = _describe(cell[0])
                _draw_cell(axes, cell, top, scale, gid, map_)
        _label(axes, map_)
        return to_markup(figure, "heat", "Divergence that each tensor causes, by layer", titles)


Cell = tuple[TensorError, tuple[float, float, float, float]]


def _list_cells(tensors: Sequence[TensorError], map_: _Map) -> Iterator[Cell]:
    for tensor in tensors:
        place = map_.place(tensor)
        if place:
            yield tensor, place


def _describe(tensor: TensorError) -> str:
    """What a pointer on the cell tells."""
    bits = f", {tensor.bits:.3g} bits" if tensor.bits else ""
    return make_visible(
        f"{tensor.name}: KL {tensor.kl or 0.0:.3g} nats, "
        f"relative error {tensor.relative_error:.3g}{bits}"
    )


def _draw_cell(axes: Any, cell: Cell, top: float, scale: Scale, gid: str, map_: _Map) -> None:
    (x, y, width, height), kl = cell[1], cell[0].kl or 0.0
    level = scale.level(kl)
    box = require("matplotlib.patches").Rectangle((x, top + y), width, height, gid=gid, linewidth=1)
    box.set(facecolor=INK[f"heat-{level}"], edgecolor=INK["back"])
    axes.add_patch(box)
    if (WIDTH - LEFT) * width / map_.width >= NUMBERED:
        axes.text(
            x + width / 2, top + y + height / 2, write_short(kl), ha="center", va="center",
            fontsize=8.5, color=INK[f"heat-text-{level}"],
        )  # fmt: skip


def _label(axes: Any, map_: _Map) -> None:
    """Layers below the last strip, kinds beside every strip."""
    axes.set_xlim(-1.25 * map_.outer, map_.width - 1.25 * map_.outer)
    axes.set_ylim(map_.strips * map_.strip, 0)
    step = max(1, -(-map_.layers // 16))
    shown = list(range(0, map_.layers, step))
    places = [-0.7 * map_.outer, *(n + 0.5 for n in shown), map_.layers + 0.7 * map_.outer]
    axes.set_xticks(places, ["embed", *map(str, shown), "head"])
    rows = [
        (strip * map_.strip + TITLE + ROW * (row + 0.5), kind)
        for strip in range(map_.strips)
        for row, kind in enumerate(map_.kinds)
    ]
    axes.set_yticks([place for place, _ in rows], [kind for _, kind in rows])
    dress(axes)
    for spine in axes.spines.values():
        spine.set_visible(False)
