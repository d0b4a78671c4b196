"""The tables of a report, the same on the page and in Markdown."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from toolkit.artifact import Manifest
from toolkit.console import format_bytes
from toolkit.measuring.bench import format_time
from toolkit.measuring.result import Result, Spread
from toolkit.quality.details import TensorError
from toolkit.reporting.content import Content, Heated
from toolkit.reporting.data import Built
from toolkit.reporting.looks import find_look
from toolkit.reporting.measured import Measured
from toolkit.reporting.scale import write_short
from toolkit.reporting.trace import Trace

WORST_TENSORS = 3
MOST_DECIMALS = 7
NONE = "–"
COSTS = ("wall_s", "cpu_s", "peak_memory_bytes")
ENGINES = {"native": "phiship", "vendor": "vendor"}


@dataclass(frozen=True)
class Table:
    """Headers and rows of text; the first `names` columns are words, the others numbers."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1


def list_artifacts(content: Content) -> Table:
    """Every artifact with what was measured on the text that they are compared by."""
    rows = []
    for entry in content.entries:
        manifest, found = entry.manifest, entry.on(content.key)
        rows.append(
            [
                f"{find_look(entry).sign} {manifest.name}",
                f"{manifest.format}, {describe_weights(manifest)}",
                _name_runtime(manifest),
                "yes" if manifest.quality.checked else "no",
                format_bytes(manifest.size_bytes),
                *_describe_quality(found),
            ]
        )
    headers = ["artifact", "format and weights", "runtime", "checked", "size", "mean KL, nats"]
    return Table([*headers, "top-1", "perplexity"], rows, names=4)


def _describe_quality(measured: Measured | None) -> list[str]:
    if measured is None:
        return [NONE] * 3
    values, errors = measured.values, measured.errors
    alone = " (weights alone)" if measured.is_weights_alone else ""
    return [
        _add_error(write_kl(measured.mean_kl), errors.get("mean KL")) + alone,
        _add_error(write_share(values["top-1 agreement"]), errors.get("top-1 agreement"))
        if "top-1 agreement" in values
        else NONE,
        _describe_perplexity(values),
    ]


def _describe_perplexity(values: Mapping[str, float]) -> str:
    """The artifact's, and how much that is more than the source's."""
    found, source = values.get("artifact perplexity"), values.get("source perplexity")
    if not found or not source:
        return NONE
    more = round(found / source - 1, 3) + 0.0  # no -0.0
    return f"{found:.2f} ({more:+.1%})"


def _add_error(text: str, error: float | None) -> str:
    """A number with its standard error to as many decimals."""
    if not error or "e" in text:
        return text
    kind, decimals = "%" if "%" in text else "f", len(text.rstrip("%").partition(".")[2])
    return f"{text} ± {error:.{decimals}{kind}}"


def write_kl(value: float) -> str:
    """A divergence with three figures and no exponent, as long as that is short."""
    if not value or not math.isfinite(value):
        return f"{value:.0f}"
    figures = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, figures)}f}" if figures <= MOST_DECIMALS else write_short(value)


def write_share(value: float) -> str:
    """A share in percent."""
    return f"{value:.1%}"


def describe_weights(manifest: Manifest) -> str:
    """How the recipe has weights stored, as its quantization says."""
    found = manifest.plan.get("quantization")
    if not isinstance(found, dict):
        return "as it was adopted"
    said: dict[str, Any] = found
    kind = str(said.get("precision") or f"{said.get('bits', '?')} bits")
    size = said.get("block_size") or said.get("group_size")
    is_grouped = kind == "int4" or (manifest.format == "mlx" and kind != "16 bits")
    parts = [kind]
    if is_grouped and size:
        parts.append("a range a row" if size == -1 else f"groups of {size}")
    if is_grouped and said.get("symmetric") is False:
        parts.append("asymmetric")
    parts += [str(said["method"]).upper()] if said.get("method", "rtn") != "rtn" else []
    parts += ["equalized"] if said.get("equalize") else []
    parts += ["by the vendor"] if manifest.plan.get("engine") == "vendor" else []
    return ", ".join(parts)


def _name_runtime(manifest: Manifest) -> str:
    return f"{manifest.runtime.package}, {manifest.runtime.provider}"


def list_worst_tensors(heated: Iterable[Heated]) -> Table:
    """The matrices that cost each artifact the most."""
    rows = []
    for one in heated:
        tensors = sorted(one.tensors, key=lambda tensor: (-(tensor.kl or 0.0), tensor.name))
        rows += [
            [one.entry.label if number == 0 else "", *_list_tensor(tensor)]
            for number, tensor in enumerate(tensors[:WORST_TENSORS])
        ]
    return Table(["artifact", "tensor", "bits", "relative error", "KL, nats"], rows, names=2)


def _list_tensor(tensor: TensorError) -> list[str]:
    bits = f"{tensor.bits:.3g}" if tensor.bits else NONE
    return [tensor.name, bits, write_short(tensor.relative_error), write_kl(tensor.kl or 0.0)]


def list_worst_tokens(trace: Trace) -> Table:
    """The worst predictions with what is around them."""
    rows = [
        [
            str(bad.rank), bad.before, bad.token.shown, bad.after, write_kl(bad.token.kl or 0.0),
            f"{round(bad.token.delta_p, 1) + 0.0:+.1f} %",
            "same" if bad.token.same_top else "another",
        ]
        for bad in trace.worst
    ]  # fmt: skip
    headers = ["", "before", "token", "after", "KL, nats", "Δp", "likeliest"]
    return Table(headers, rows, names=4)


def list_ranges(content: Content) -> Table:
    """How artifacts agree by the length of what was read, where the architecture changes."""
    rows = [
        [
            entry.label, f"{found.first:,} to {found.last:,}", _say_yes(found.claimed),
            _say_yes(found.agrees if found.judged else None),
            _add_error(write_kl(found.mean_kl), found.kl_error), write_share(found.top1),
        ]
        for entry in content.entries
        for found in next((one.ranges for one in entry.details if one.ranges), ())
    ]  # fmt: skip
    headers = ["artifact", "after tokens", "claimed", "agrees", "mean KL, nats", "top-1"]
    return Table(headers, rows, names=4)


def _say_yes(is_so: bool | None) -> str:
    """A dash where too little was measured to say."""
    return NONE if is_so is None else "yes" if is_so else "no"


def list_benches(benches: Iterable[Result]) -> Table:
    """Every length of every bench: the medians, with the least and most of decoding."""
    rows = [
        [
            result.name, result.machine.title, f"{result.engine} on {result.provider}",
            str(length.prompt_tokens), format_time(length.first_token_seconds.median),
            write_rate(length.prompt_tokens_per_second.median), _show(length.tokens_per_second),
            format_bytes(length.peak_memory_bytes),
        ]
        for result in benches
        for length in result.lengths
    ]  # fmt: skip
    headers = ["artifact", "device", "engine", "prompt", "first token"]
    headers += ["prompt tokens/s", "decoding tokens/s", "memory"]
    return Table(headers, rows, names=3)


def _show(spread: Spread | None) -> str:
    if spread is None:
        return NONE
    least, most = write_rate(spread.least), write_rate(spread.most)
    return f"{write_rate(spread.median)} ({least}–{most})"


def list_built(built: Sequence[Built]) -> Table:
    """Both engines' costs of each recipe, and how many times the vendor's is ours."""
    rows = [
        [
            one.recipe, ENGINES.get(one.name, one.name), f"{one.wall_s:.1f} s",
            f"{one.cpu_s:.1f} s", _show_memory(one), format_bytes(one.size_bytes),
            write_kl(one.kl_to_source), write_share(one.top1),
        ]
        for one in built
    ]  # fmt: skip
    for recipe in dict.fromkeys(one.recipe for one in built):
        ratios = [divide(built, recipe, name) for name in COSTS]
        if any(ratios):
            shown = [f"{ratio:.1f} ×" if ratio else NONE for ratio in ratios]
            rows.append([recipe, "vendor / phiship", *shown, "", "", ""])
    rows.sort(key=lambda row: row[0])
    headers = ["recipe", "converter", "time", "CPU", "memory", "size", "mean KL, nats", "top-1"]
    return Table(headers, rows, names=2)


def _show_memory(one: Built) -> str:
    return format_bytes(one.peak_memory_bytes) if one.peak_memory_bytes else NONE


def divide(built: Iterable[Built], recipe: str, field: str) -> float | None:
    """How many times ours the vendor's cost is; None when either is not known."""
    sides = {one.name: float(getattr(one, field)) for one in built if one.recipe == recipe}
    ours, theirs = sides.get("native", 0.0), sides.get("vendor", 0.0)
    return theirs / ours if ours and theirs else None


def list_origins(content: Content) -> tuple[Table, Table]:
    """What made the artifacts, and the files that numbers came from."""
    made = [
        [
            entry.manifest.name, entry.manifest.plan_digest[:12],
            ", ".join(f"{name} {version}" for name, version in entry.manifest.tools.items()),
        ]
        for entry in content.entries
    ]  # fmt: skip
    files = [[one.name, one.sha256[:12], one.holds] for one in content.origins]
    return (
        Table(["artifact", "plan", "made with"], made, names=3),
        Table(["file", "sha256", "holds"], files, names=3),
    )


@dataclass(frozen=True)
class Tile:
    """One number that says a lot."""

    title: str
    number: str
    unit: str
    words: str


def list_tiles(content: Content) -> list[Tile]:
    """The smallest, the nearest, the fastest, and what building costs the vendors."""
    smallest = min(content.entries, key=lambda entry: entry.manifest.size_bytes)
    size, _, unit = format_bytes(smallest.manifest.size_bytes).partition(" ")
    tiles = [Tile("smallest", size, unit, smallest.label)]
    if content.plotted:
        entry, found = min(content.plotted, key=lambda pair: pair[1].mean_kl)
        tiles.append(Tile("least mean KL", write_short(found.mean_kl), "nats", entry.label))
    fastest = max(content.benches, key=_rate, default=None)
    if fastest and _rate(fastest):
        labels = {entry.manifest.name: entry.label for entry in content.entries}
        words = f"{labels[fastest.name]}, {fastest.machine.title}"
        tiles.append(Tile("fastest decoding", write_rate(_rate(fastest)), "tokens/s", words))
    recipes = dict.fromkeys(one.recipe for one in content.built)
    ratios = [ratio for name in recipes if (ratio := divide(content.built, name, "wall_s"))]
    if ratios:
        words = next(iter(recipes)) if len(ratios) == 1 else f"median of {len(ratios)} recipes"
        tiles.append(Tile("vendor’s time to build", f"{median(ratios):.2g}", "× phiship’s", words))
    return tiles


def write_rate(rate: float) -> str:
    """Tokens/s with three figures and no exponent."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _rate(result: Result) -> float:
    """The best median of decoding, in tokens/s."""
    rates = [one.tokens_per_second.median for one in result.lengths if one.tokens_per_second]
    return max((rate for rate in rates if math.isfinite(rate)), default=0.0)
