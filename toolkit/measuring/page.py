"""A comparison as one HTML file that needs nothing else."""

import datetime
from pathlib import Path
from typing import Any

from toolkit import __version__
from toolkit.fileio import write_whole
from toolkit.measuring.agreement import split_differences
from toolkit.measuring.compare import (
    PAIR_HEADERS,
    SIDE_HEADERS,
    Comparison,
    list_pair,
    list_side,
)
from toolkit.measuring.sides import Side
from toolkit.pages import render

TEMPLATE = "compare.html.j2"


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page; BuildError when that fails."""
    write_whole(render_page(comparison), path)


def render_page(comparison: Comparison) -> str:
    """Return the page; whatever a model or a server wrote is escaped."""
    sides, count = comparison.sides, len(comparison.prompts)
    asked = [
        (prompt.title, [_describe_answer(comparison, side, number) for side in sides])
        for number, prompt in enumerate(comparison.prompts)
    ]
    return render(
        Path(__file__).parent,
        TEMPLATE,
        version=__version__,
        when=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        asking=comparison.asking,
        asked=asked,
        side_headers=SIDE_HEADERS,
        sides=[(side, list_side(side, count)) for side in sides],
        pair_headers=PAIR_HEADERS[1:],
        pairs=[list_pair(agreement) for agreement in comparison.agreements],
    )


def _describe_answer(comparison: Comparison, side: Side, number: int) -> dict[str, Any]:
    """One cell: the text in pieces, those that differ from the first side's answer marked."""
    answer, first = side.answers[number], comparison.sides[0].answers[number]
    if answer.text is None or answer.reply is None:
        reason = answer.failure or str(side.error or "not asked")
        return {"letter": side.letter, "failure": reason}
    is_compared = side is not comparison.sides[0] and first.text is not None
    segments = (
        split_differences(answer.text, first.text or "") if is_compared else [(answer.text, False)]
    )
    reply = answer.reply
    tokens = "" if reply.completion_tokens is None else f"{reply.completion_tokens} tokens, "
    cost = f"{tokens}{reply.seconds:.2f} s, {reply.finish_reason or 'no reason told'}"
    return {"letter": side.letter, "failure": "", "segments": segments, "cost": cost}
