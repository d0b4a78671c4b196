"""A picture of results of `bench`, to be read on paper and on screens, bright or dark."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import BuildError, SettingsError, require
from toolkit.measuring.result import Length, Result, Spread

# On white and on black it has a contrast of 4.5, which WCAG 2 asks of text.
GREY = "#767676"
# Told apart with any colour vision (Okabe and Ito), on white and on black; hatches are for print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
HATCHES = ("", "//", "..", "xx", "\\\\", "++")
SUFFIXES = (".svg", ".png", ".pdf")

PANELS: tuple[tuple[str, Callable[[Length], Spread | None]], ...] = (
    ("decoding, tokens/s", lambda length: length.tokens_per_second),
    ("prompt, tokens/s", lambda length: length.prompt_tokens_per_second),
    ("time to first token, s", lambda length: length.first_token_seconds),
)


def check_plot(path: Path) -> None:
    """Raise before anything is measured when the picture could not be drawn."""
    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(
            f"{path}: {path.suffix or 'no ending'} is no kind of picture; "
            f"allowed: {', '.join(SUFFIXES)}"
        )
    require("matplotlib.figure")


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw medians as bars, least and most as whiskers; groups are prompt lengths.

    MissingExtraError without matplotlib; BuildError when the file cannot be written.
    """
    figure_module, backend = (
        require("matplotlib.figure"),
        require("matplotlib.backends.backend_agg"),
    )
    figure = figure_module.Figure(figsize=(11, 4.2 + 0.25 * len(results)), layout="constrained")
    backend.FigureCanvasAgg(figure)
    lengths = sorted({length.prompt_tokens for result in results for length in result.lengths})
    for axes, (title, choose) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _draw_panel(axes, results, lengths, choose)
        _dress(axes, title, lengths)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", frameon=False, labelcolor=GREY)
    try:
        figure.savefig(path, transparent=True, dpi=160, metadata={"Title": "phiship bench"})
    except OSError as error:
        raise BuildError(f"{path}: cannot be written: {error.strerror or error}") from None


def _draw_panel(
    axes: Any,
    results: Sequence[Result],
    lengths: list[int],
    choose: Callable[[Length], Spread | None],
) -> None:
    width = 0.8 / len(results)
    for number, result in enumerate(results):
        by_length = {length.prompt_tokens: choose(length) for length in result.lengths}
        spreads = [by_length.get(tokens) for tokens in lengths]
        offset = (number - (len(results) - 1) / 2) * width
        axes.bar(
            [place + offset for place in range(len(lengths))],
            [spread.median if spread else math.nan for spread in spreads],
            width * 0.92,
            yerr=[[_below(spread) for spread in spreads], [_above(spread) for spread in spreads]],
            label=f"{result.title}, {result.engine} on {result.provider}",
            color=COLOURS[number % len(COLOURS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor=GREY,
            linewidth=0.6,
            ecolor=GREY,
            capsize=3,
        )


def _dress(axes: Any, title: str, lengths: list[int]) -> None:
    axes.set_title(title, color=GREY, fontsize=11, loc="left")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_xlabel("prompt tokens", color=GREY)
    axes.tick_params(colors=GREY)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=GREY, alpha=0.25)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)


def _below(spread: Spread | None) -> float:
    return spread.median - spread.least if spread else math.nan


def _above(spread: Spread | None) -> float:
    return spread.most - spread.median if spread else math.nan
