"""A report as one HTML file that needs nothing else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from toolkit import __version__
from toolkit.console import format_bytes
from toolkit.measuring.result import Length, Result
from toolkit.pages import render
from toolkit.quality.details import Details
from toolkit.reporting import tables
from toolkit.reporting.charts import Bar, Panel, draw_bars, draw_front
from toolkit.reporting.content import Content, Entry
from toolkit.reporting.data import Built
from toolkit.reporting.heat import draw_heat
from toolkit.reporting.looks import find_look
from toolkit.reporting.scale import HALF_DECADES, LEVELS, THIRDS, Scale, make_scale
from toolkit.reporting.trace import Trace, level, trace

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Traced:
    """An artifact with its text."""

    entry: Entry
    details: Details
    trace: Trace
    table: tables.Table


def render_page(content: Content, when: str, most_tokens: int) -> str:
    """Return the page; whatever comes from artifacts and files is escaped.

    `when` is the date to print; of each text the first `most_tokens` tokens are shown.
    """
    traced = trace_all(content, most_tokens)
    text_scale = make_scale((kl for one in traced for kl in one.details.kl), THIRDS)
    heated = content.heated
    costs = (tensor.kl or 0.0 for one in heated for tensor in one.tensors)
    heat_scale = make_scale(costs, HALF_DECADES)
    kinds = sorted({entry.manifest.format for entry in content.entries})
    benches = [result for result in content.benches if result.lengths]
    made, files = tables.list_origins(content)
    return render(
        Path(__file__).parent,
        TEMPLATE,
        version=__version__,
        when=when,
        content=content,
        source=content.entries[0].manifest.source,
        measured=content.plotted[0][1] if content.plotted else None,
        tiles=tables.list_tiles(content),
        artifacts=tables.list_artifacts(content),
        looks=[(kind, find_look(_first(content, kind))) for kind in kinds],
        front=draw_front(content) if len(content.plotted) > 1 else None,
        heat=draw_heat(heated, heat_scale) if heated else None,
        heat_legend=describe_scale(heat_scale),
        worst_tensors=tables.list_worst_tensors(heated),
        ranges=tables.list_ranges(content),
        traced=traced,
        text_legend=describe_scale(text_scale),
        level=lambda token: level(token, text_scale),
        write_kl=tables.write_kl,
        most_tokens=most_tokens,
        benches=tables.list_benches(content.benches),
        speed=draw_speed(benches, content) if benches else None,
        built=tables.list_built(content.built),
        costs=draw_costs(content.built) if content.built else None,
        made=made,
        files=files,
    )


def trace_all(content: Content, most_tokens: int) -> list[Traced]:
    """The text of every artifact that has one."""
    found = []
    for entry in content.entries:
        details = next((one for one in entry.details if one.texts), None)
        if details:
            traced = trace(details, most_tokens)
            found.append(Traced(entry, details, traced, tables.list_worst_tokens(traced)))
    return found


def describe_scale(scale: Scale) -> list[tuple[int, str]]:
    """Every level with its words."""
    return [(number, scale.describe(number)) for number in range(LEVELS + 1)]


def _first(content: Content, kind: str) -> Entry:
    return next(entry for entry in content.entries if entry.manifest.format == kind)


def draw_speed(benches: Sequence[Result], content: Content) -> Markup:
    """Rates and memory with the longest prompt of each bench, device by device."""
    looks = {entry.manifest.name: (entry.label, find_look(entry).ink) for entry in content.entries}
    ordered = sorted(benches, key=lambda result: result.machine.title)
    rows, last = [], [result.lengths[-1] for result in ordered]
    for number, result in enumerate(ordered):
        title = result.machine.title
        is_first = not number or ordered[number - 1].machine.title != title
        rows.append(Bar(*looks[result.name], heading=title if is_first else ""))
    panels = [
        Panel("decoding, tokens/s", [_decoding(one) for one in last], tables.write_rate),
        Panel("prompt, tokens/s", [one.prompt_tokens_per_second.median for one in last],
              tables.write_rate),
        Panel("peak memory", [float(one.peak_memory_bytes) for one in last], format_bytes),
    ]  # fmt: skip
    return draw_bars("speed", "Speed and memory of every artifact on every device", rows, panels)


def _decoding(length: Length) -> float:
    return length.tokens_per_second.median if length.tokens_per_second else math.nan


def draw_costs(built: Sequence[Built]) -> Markup:
    """Time, CPU and memory of both converters, recipe by recipe; the vendor's are hatched."""
    ordered = sorted(built, key=lambda one: (one.recipe, one.name))
    rows = []
    for number, one in enumerate(ordered):
        is_first = not number or ordered[number - 1].recipe != one.recipe
        name, heading = tables.ENGINES.get(one.name, one.name), one.recipe if is_first else ""
        rows.append(Bar(name, "series-0", one.name != "native", heading))
    memory = [float(one.peak_memory_bytes) or math.nan for one in ordered]
    panels = [
        Panel("time", [one.wall_s for one in ordered], lambda value: f"{value:.3g} s"),
        Panel("CPU", [one.cpu_s for one in ordered], lambda value: f"{value:.3g} s"),
        Panel("memory", memory, format_bytes),
    ]
    return draw_bars("costs", "Costs of building, phiship and the vendors", rows, panels)
