"""From folders and files to a page and Markdown."""

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from toolkit.console import Console
from toolkit.errors import SettingsError, require
from toolkit.fileio import write_whole
from toolkit.reporting.content import collect
from toolkit.reporting.data import Data, read_data
from toolkit.reporting.markdown import render_markdown
from toolkit.reporting.page import render_page


def write_report(
    folders: Sequence[Path],
    files: Sequence[Path],
    out: Path,
    markdown: Path | None,
    most_tokens: int,
    console: Console,
) -> None:
    """Read everything, then write; equal input makes equal files on one day.

    MissingExtraError without matplotlib, ArtifactError, SettingsError as in `collect` and
    `read_data`, BuildError when a file cannot be written.
    """
    require("matplotlib.figure")
    _require_places(files, out, markdown)
    when = read_date()
    data = sum((read_data(path) for path in files), Data())
    content = collect(folders, data)
    for name in content.left_out:
        console.note(f"left out, because its artifact is not among those given: {name}")
    for name in content.outdated:
        console.note(f"left out, because measured on another build of the artifact: {name}")
    page = render_page(content, when, most_tokens)
    said = render_markdown(content, when, most_tokens) if markdown else ""
    for path, text in ((out, page), (markdown, said)):
        if path:
            write_whole(text, path)
            left_out = [*content.left_out, *content.outdated]
            console.event("report", path=str(path), left_out=left_out)
            console.result(str(path))


def _require_places(files: Sequence[Path], out: Path, markdown: Path | None) -> None:
    """SettingsError when an output has no folder, or would replace the other or what is read."""
    if markdown and _is_same(out, markdown):
        raise SettingsError(
            f"--markdown {markdown}: the same file as --out", advice="give each its own name"
        )
    for option, path in (("--out", out), ("--markdown", markdown)):
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise SettingsError(f"{option} {path}: its folder is not there")
        if any(_is_same(path, one) for one in files):
            raise SettingsError(
                f"{option} {path}: also given with --data, and would be replaced",
                advice="give another name",
            )


def _is_same(one: Path, other: Path) -> bool:
    """True for two names of one file, which need not be there yet."""
    if one.resolve() == other.resolve():
        return True
    return one.exists() and other.exists() and one.samefile(other)


def read_date() -> str:
    """Today, or the day that SOURCE_DATE_EPOCH names, as for any reproducible file."""
    told = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not told:
        return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    try:
        return datetime.datetime.fromtimestamp(int(told), datetime.timezone.utc).strftime(
            "%Y-%m-%d"
        )
    except (ValueError, OverflowError, OSError):
        raise SettingsError(
            f"SOURCE_DATE_EPOCH: got {told!r}; allowed: whole seconds since 1970"
        ) from None
