"""The only module that prints: tables and progress for people, JSON lines for scripts."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import rich.box
import rich.console
import rich.markup
import rich.progress
import rich.table

from toolkit.errors import PhishipError
from toolkit.progress import Bar, Ignored
from toolkit.report import Report

WORDS_SHOWN = 60  # beside a spinner
WORDS_TOLD = 200  # in an event
WAITING_EVENT_S = 1.0


def format_bytes(count: float) -> str:
    """Format a count of bytes in decimal units: 2_720_000_000 -> '2.72 GB'."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= 0.9995 * size:
            return (
                f"{count / size:.3g} {unit}"
                if abs(count) < 999.5 * size
                else (f"{count / size:.0f} {unit}")
            )
    return f"{count:.0f} B"


class Console:
    """Renders what use cases tell it. Results go to stdout, everything else to stderr."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._out = rich.console.Console(highlight=False, emoji=False)
        self._err = rich.console.Console(stderr=True, highlight=False, emoji=False)

    def event(self, name: str, /, **fields: object) -> None:
        """Print one JSON event in --json mode; nothing otherwise."""
        if self.as_json:
            print(json.dumps({"event": name, **fields}, default=str), flush=True)

    def note(self, text: str) -> None:
        """Tell people something on stderr."""
        if not self.as_json:
            self._err.print(rich.markup.escape(text))

    def result(self, text: str) -> None:
        """Print a line of a command's result to stdout, for people."""
        if not self.as_json:
            self._out.print(rich.markup.escape(text), soft_wrap=True)

    def table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table of a command's result, for people."""
        if self.as_json:
            return
        table = rich.table.Table(
            title=rich.markup.escape(title) or None,
            box=rich.box.SIMPLE_HEAD,
            title_justify="left",
            show_header=any(headers),
        )
        for header in headers:
            table.add_column(header, overflow="fold")
        for row in rows:
            table.add_row(*(rich.markup.escape(cell) for cell in row))
        self._out.print(table)

    def report(self, report: Report) -> None:
        """Print a report: a table for people; `step` events and a `report` event for scripts."""
        for step in report.steps:
            self.event("step", report=report.title, **vars(step))
        self.event("report", title=report.title, ok=report.ok)
        rows = [
            ["ok" if s.ok else "FAILED", s.name, f"{s.seconds:.1f} s", _beside(s.measured, s.limit)]
            for s in report.steps
        ]
        self.table(report.title, ["", "step", "time", "measured (limit)"], rows)

    def error(self, error: PhishipError) -> None:
        """Print an expected error to stderr with its next step."""
        self.event("error", kind=type(error).__name__, message=str(error), advice=error.advice)
        if not self.as_json:
            self._err.print(f"[bold red]error:[/] {rich.markup.escape(str(error))}", soft_wrap=True)
            if error.advice:
                self._err.print(f"  {rich.markup.escape(error.advice)}", soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total_bytes: int) -> Iterator[Bar]:
        """Show bytes, rate and time left of a long job; yields what takes bytes done."""
        if self.as_json:
            yield _Events(self, label, total_bytes)
            return
        if not self._err.is_terminal:
            yield Ignored()
            return
        bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=self._err,
            transient=True,  # the report says what came of it
        )
        with bar:
            yield _Row(bar, label, total_bytes)

    @contextmanager
    def waiting(self, label: str) -> Iterator[Callable[[str], None]]:
        """Show that a job of unknown length goes on; yields a function for its last words."""
        if self.as_json:
            yield self._json_waiting(label)
            return
        if not self._err.is_terminal:
            yield lambda _: None
            return
        bar = rich.progress.Progress(
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.fields[words]}", style="dim"),
            console=self._err,
            transient=True,
        )
        with bar:
            task = bar.add_task(rich.markup.escape(label), total=None, words="")
            yield lambda words: bar.update(task, words=rich.markup.escape(words[:WORDS_SHOWN]))

    def _json_waiting(self, label: str) -> Callable[[str], None]:
        """A `waiting` event whenever the last words changed, at most one in WAITING_EVENT_S."""
        started_s = told_s = time.monotonic()
        told = ""

        def tell(words: str) -> None:
            nonlocal told, told_s
            now_s = time.monotonic()
            if words != told and now_s - told_s >= WAITING_EVENT_S:
                told, told_s = words, now_s
                self.event(
                    "waiting", label=label, elapsed_s=now_s - started_s, words=words[:WORDS_TOLD]
                )

        return tell


class _Row:
    """A Bar on a terminal."""

    def __init__(self, bar: rich.progress.Progress, label: str, total_bytes: int) -> None:
        self._bar, self._label = bar, rich.markup.escape(label)
        self._task = bar.add_task(self._label, total=total_bytes)

    def __call__(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def show(self, part: str) -> None:
        part = rich.markup.escape(part[:WORDS_SHOWN])
        self._bar.update(self._task, description=f"{self._label}: {part}")


class _Events:
    """A Bar for scripts: one `progress` event a percent."""

    def __init__(self, console: Console, label: str, total_bytes: int) -> None:
        self._console, self._label, self._total_bytes = console, label, total_bytes
        self._done_bytes = 0
        self._shown_percent = -1
        self._part: dict[str, str] = {}

    def __call__(self, count: int) -> None:
        self._done_bytes += count
        percent = 100 * self._done_bytes // max(1, self._total_bytes)
        if percent > self._shown_percent:
            self._shown_percent = percent
            self._console.event(
                "progress", label=self._label, done_bytes=self._done_bytes,
                total_bytes=self._total_bytes, **self._part,
            )  # fmt: skip

    def show(self, part: str) -> None:
        self._part = {"part": part}


def _beside(measured: str, limit: str) -> str:
    """Each line of what was measured with its limit in brackets."""
    if not limit:
        return measured
    lines, limits = measured.split("\n"), limit.split("\n")
    if len(lines) != len(limits):
        return f"{measured} ({limit})"
    return "\n".join(f"{line} ({bound})" for line, bound in zip(lines, limits, strict=True))
