"""From folders and files to a page and Markdown."""

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from toolkit.console import Console
from toolkit.errors import SettingsError, require
from toolkit.pages import write_whole
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
    for option, path in (("--out", out), ("--markdown", markdown)):
        if path and not path.absolute().parent.is_dir():
            raise SettingsError(f"{option} {path}: its folder is not there")
    when = read_date()
    data = sum((read_data(path) for path in files), Data())
    content = collect(folders, data)
    for name in content.left_out:
        console.note(f"left out, because its artifact is not among those given: {name}")
    page = render_page(content, when, most_tokens)
    said = render_markdown(content, when, most_tokens) if markdown else ""
    for path, text in ((out, page), (markdown, said)):
        if path:
            write_whole(text, path)
            console.event("report", path=str(path), left_out=list(content.left_out))
            console.result(str(path))


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
