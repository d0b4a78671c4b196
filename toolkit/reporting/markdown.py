"""A report as Markdown: the tables of the page, and the front as a list."""

import re
from collections.abc import Iterable

from toolkit import __version__
from toolkit.console import format_bytes
from toolkit.pages import make_visible
from toolkit.reporting import tables
from toolkit.reporting.content import Content
from toolkit.reporting.page import trace_all
from toolkit.reporting.tables import Table

MEASURE = "`phiship check ARTIFACT --details FILE`"
BY_NAME = "Benches name their artifact, not its build: they are matched by name alone."
SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|&~$!])")


def render_markdown(content: Content, when: str, most_tokens: int) -> str:
    """Return the tables; whatever comes from artifacts and files is escaped."""
    source = content.entries[0].manifest.source
    about = (
        f"{len(content.entries)} artifacts of the checkpoint {escape(source.revision[:12])}, "
        f"digest {escape(source.digest[:12])}. phiship {__version__}, {when}."
    )
    parts = [
        f"# {escape(source.model)}",
        about,
        "## Artifacts",
        _show(tables.list_artifacts(content)),
        *_describe_lacking(content),
        *_describe_front(content),
        *_section("The costliest matrices", tables.list_worst_tensors(content.heated)),
        *_describe_heat(content),
    ]
    parts += _section("Agreement by length", tables.list_ranges(content))
    for one in trace_all(content, most_tokens):
        parts += _section(f"The worst tokens of {escape(one.entry.manifest.name)}", one.table)
    parts += _section("Speed and memory on devices", tables.list_benches(content.benches))
    parts += [BY_NAME] if content.benches else []
    parts += _section("What building costs", tables.list_built(content.built))
    made, files = tables.list_origins(content)
    parts += [*_section("How these numbers were made", made), *_section("Files", files)]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """The text as it reads, on one line, whatever Markdown would make of it."""
    return SPECIAL.sub(r"\\\1", make_visible(text))


def _describe_front(content: Content) -> Iterable[str]:
    if not content.plotted:
        return
    measured = content.plotted[0][1]
    yield f"Measured on {escape(measured.where)}" + (
        f", text {measured.digest[:12]}." if measured.digest else "."
    )
    yield "## The front: none is smaller and nearer to the source"
    yield "\n".join(
        f"- {escape(entry.manifest.name)}: {format_bytes(entry.manifest.size_bytes)}, "
        f"mean KL {tables.write_kl(found.mean_kl)} nats"
        for entry in content.front
        for found in [entry.on(content.key)]
        if found
    )


def _describe_lacking(content: Content) -> Iterable[str]:
    if content.plotted and content.unmeasured:
        is_details = content.plotted[0][1].digest
        what = "Without details of this text" if is_details else "Never measured"
        yield f"{what}: {_join(content.unmeasured)}. {MEASURE} measures it."
    if content.elsewhere:
        yield f"Measured on other tokens, so not compared: {_join(content.elsewhere)}."


def _describe_heat(content: Content) -> Iterable[str]:
    if content.heat_text:
        yield f"Matrices were measured on the first of {escape(content.heat_text)}."
    if content.unheated:
        yield f"Left out, because measured on another text: {_join(content.unheated)}."


def _join(names: Iterable[str]) -> str:
    return ", ".join(map(escape, names))


def _section(title: str, table: Table) -> list[str]:
    return [f"## {title}", _show(table)] if table.rows else []


def _show(table: Table) -> str:
    lines = [
        "| " + " | ".join(map(escape, table.headers)) + " |",
        "|" + "".join(
            " --- |" if number < table.names else " ---: |" for number in range(len(table.headers))
        ),
    ]  # fmt: skip
    lines += ["| " + " | ".join(map(escape, row)) + " |" for row in table.rows]
    return "\n".join(lines)
