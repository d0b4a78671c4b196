"""Commands that measure what runs: bench, tune, compare."""

from pathlib import Path
from typing import Any

import click

from toolkit.cli.options import (
    devices_option,
    expect_option,
    json_option,
    prompt_option,
    read_smoke,
    seed_option,
    settings_options,
    temperature_option,
)
from toolkit.console import Console


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers from 1 with commas, such as 64,512."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """Read the numbers; a usage error when there is another word."""
        if isinstance(value, tuple):
            return value
        words = str(value).split(",")
        if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            self.fail(f"{value!r} are no whole numbers from 1 with commas", param, ctx)
        return tuple(sorted({int(word) for word in words}))


@click.command("bench")
@click.argument("place", metavar="ARTIFACT|DEVICE")
@click.option(
    "--prompt-tokens", type=Numbers(), default="64,512,2048", show_default=True,
    help="Lengths of the prompts; those that do not fit are left out.",
)  # fmt: skip
@click.option(
    "--new-tokens", type=click.IntRange(1), default=64, show_default=True,
    help="Tokens of each answer.",
)  # fmt: skip
@click.option(
    "--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs of each length."
)
@settings_options
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the result as JSON."
)
@click.option(
    "--plot", "picture", type=click.Path(path_type=Path, dir_okay=False),
    help="Draw it: FILE.svg, .png or .pdf.",
)  # fmt: skip
@click.option(
    "--with", "others", type=click.Path(path_type=Path, dir_okay=False, exists=True),
    multiple=True, help="Show a result of before beside it; may be given several times.",
)  # fmt: skip
@devices_option
@json_option
def bench_command(
    place: str, prompt_tokens: tuple[int, ...], new_tokens: int, repeat: int, out: Path | None,
    picture: Path | None, others: tuple[Path, ...], devices: Path | None, as_json: bool,
    **settings: int | None,
) -> None:  # fmt: skip
    """Measure time to first token, tokens/s, loading, memory and heat, here or on a device.

    In place of an artifact, FILE.json shows what --out has written before.
    """
    from toolkit.measuring.bench import Work, bench, show_results, write_result
    from toolkit.measuring.plot import check_plot, plot
    from toolkit.measuring.result import read_result
    from toolkit.place import open_place

    console, before = Console(as_json=as_json), [read_result(path) for path in others]
    if picture:
        check_plot(picture)
    if place.endswith(".json"):
        result = read_result(Path(place))
    else:
        with open_place(place, devices) as opened:
            result = bench(opened, Work(prompt_tokens, new_tokens, repeat, settings), console)
    show_results([*before, result], console)
    if out:
        write_result(result, out)
    if picture:
        plot([*before, result], picture)
        console.note(f"drawn: {picture}")


class Context(click.ParamType[int]):
    """A number of tokens, or `largest`."""

    name = "tokens|largest"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Read it; `largest` is LARGEST."""
        from toolkit.measuring.tune import LARGEST

        if isinstance(value, int):
            return value
        if value == "largest":
            return LARGEST
        if not value.isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is neither a number of tokens nor `largest`", param, ctx)
        return int(value)


@click.command("tune")
@click.argument("place", metavar="ARTIFACT|DEVICE")
@click.option(
    "--for", "goal", type=click.Choice(["decode", "prompt", "memory", "balanced"]),
    default="decode", show_default=True, help="What is to become better.",
)  # fmt: skip
@click.option(
    "--context", type=Context(),
    help="Context to tune for, or `largest` that fits the memory; else the artifact's own.",
)  # fmt: skip
@click.option(
    "--prompt-tokens", type=Numbers(), default="64,512", show_default=True,
    help="Lengths of the prompts that are measured.",
)  # fmt: skip
@click.option(
    "--new-tokens", type=click.IntRange(2), default=48, show_default=True,
    help="Tokens of each answer.",
)  # fmt: skip
@click.option(
    "--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs of each try."
)
@click.option("--dry-run", is_flag=True, help="Show what would be tried, and run nothing.")
@click.option("--reset", "is_reset", is_flag=True, help="Forget the settings that are kept.")
@prompt_option
@expect_option
@devices_option
@json_option
def tune_command(
    place: str, goal: str, context: int | None, prompt_tokens: tuple[int, ...], new_tokens: int,
    repeat: int, dry_run: bool, is_reset: bool, prompt: str | None, expect: str | None,
    devices: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Find the fastest threads, batches and cache for a machine, on it, and keep them there.

    The winner has to answer the smoke question rightly; fewer bits in the cache also have to choose
    the same tokens. It is kept in settings.json beside the release, for that machine alone.
    """
    from toolkit.measuring.tune import Wish, reset, tune
    from toolkit.place import open_place

    console, smoke = Console(as_json=as_json), read_smoke(prompt, expect)
    with open_place(place, devices) as opened:
        if is_reset:
            reset(opened, console)
            return
        wish = Wish(goal, context, prompt_tokens, new_tokens, repeat, smoke)
        tune(opened, wish, console, is_dry=dry_run)


@click.command("compare")
@click.argument("sides", nargs=-1, required=True, metavar="A B [...]")
@click.option("--prompt", "texts", multiple=True, help="Ask this; may be given several times.")
@click.option(
    "--prompts", "prompts_file", type=click.Path(path_type=Path, dir_okay=False),
    help="Ask what a file says: a question a line, or .jsonl with `messages`.",
)  # fmt: skip
@click.option(
    "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Of each answer."
)
@temperature_option
@seed_option
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=600.0, show_default=True,
    help="Seconds for each answer.",
)  # fmt: skip
@click.option(
    "--key-env", "key_variables", multiple=True, metavar="[SIDE=]NAME",
    help="Environment variable with an endpoint's key, instead of PHISHIP_API_KEY; "
    "B=NAME for the second side alone.",
)  # fmt: skip
@click.option(
    "--html", "page", type=click.Path(path_type=Path, dir_okay=False),
    help="Write the answers as one HTML file.",
)  # fmt: skip
@devices_option
@json_option
def compare_command(
    sides: tuple[str, ...], texts: tuple[str, ...], prompts_file: Path | None, max_tokens: int,
    temperature: float, seed: int | None, timeout: float, key_variables: tuple[str, ...],
    page: Path | None, devices: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Ask the same of artifacts, devices and endpoints, and show where answers differ.

    A side is an artifact's folder, a device, or an OpenAI-compatible endpoint: BASE_URL#MODEL, such
    as https://models.github.ai/inference#microsoft/phi-4-mini-instruct
    """
    from toolkit.measuring.compare import Asking, compare, show_comparison
    from toolkit.measuring.page import write_page
    from toolkit.measuring.prompts import choose_prompts
    from toolkit.measuring.sides import make_sides

    console, asking = Console(as_json=as_json), Asking(max_tokens, temperature, seed, timeout)
    made, prompts = make_sides(sides, key_variables), choose_prompts(texts, prompts_file)
    comparison = compare(made, prompts, asking, console, devices)
    show_comparison(comparison, console)
    if page:
        write_page(comparison, page)
        console.note(f"written: {page}")
    comparison.raise_failure()
