"""The command that shows what is known of a model's artifacts."""

from pathlib import Path

import click

from toolkit.cli.options import json_option
from toolkit.console import Console


@click.command("report")
@click.argument(
    "artifacts", nargs=-1, required=True, metavar="ARTIFACT...",
    type=click.Path(path_type=Path, file_okay=False),
)  # fmt: skip
@click.option(
    "--data", "files", type=click.Path(path_type=Path, dir_okay=False), multiple=True,
    help="What check --details, bench --out or parity --json wrote; may be given several times.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("report.html"),
    show_default=True, help="The page.",
)  # fmt: skip
@click.option(
    "--markdown", type=click.Path(path_type=Path, dir_okay=False), help="The tables as Markdown."
)
@click.option(
    "--tokens", type=click.IntRange(0), default=1000, show_default=True,
    help="Tokens of each text to show.",
)  # fmt: skip
@json_option
def report_command(
    artifacts: tuple[Path, ...], files: tuple[Path, ...], out: Path, markdown: Path | None,
    tokens: int, as_json: bool,
) -> None:  # fmt: skip
    """Show the artifacts of one model on one page: quality, size, speed, costs.

    Folders of sealed artifacts; what else is known of them comes with --data.
    """
    from toolkit.reporting.writing import write_report

    write_report(artifacts, files, out, markdown, tokens, Console(as_json=as_json))
