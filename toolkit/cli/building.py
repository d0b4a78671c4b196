"""Commands about recipes, checkpoints and artifacts on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from toolkit.cli.options import (
    OrderedGroup,
    Size,
    accept_option,
    adapter_option,
    apart_option,
    calibration_option,
    check_option,
    context_option,
    equalize_option,
    json_option,
    memory_option,
    method_option,
    out_option,
    rendering,
    workers_option,
)
from toolkit.console import Console
from toolkit.report import Report

if TYPE_CHECKING:
    from toolkit.budget import Budget

KINDS = ("recipes", "targets", "models")


@click.command("list")
@click.argument("kind", type=click.Choice([*KINDS, "support"]), required=False)
@click.option("--markdown", is_flag=True, help="With support: write docs/support.md to stdout.")
@json_option
def list_command(kind: str | None, markdown: bool, as_json: bool) -> None:
    """Show the bundled recipes, targets and models; or which model runs in what, where."""
    from toolkit.listing import show_list, show_support

    console = Console(as_json=as_json)
    if markdown and kind != "support":
        raise click.UsageError("--markdown goes with support")
    if kind == "support":
        show_support(console, markdown=markdown)
        return
    for one in [kind] if kind else KINDS:
        show_list(one, console)


@click.command("plan")
@click.argument("recipe")
@click.option("--for", "target", help="Target that must be able to hold and run it.")
@click.option("--checkpoint", help="Folder or Hugging Face id; without, the model's known shape.")
@adapter_option
@apart_option
@context_option
@workers_option
@memory_option
@json_option
def plan_command(
    recipe: str, target: str | None, checkpoint: str | None, adapter: Path | None,
    adapter_apart: bool, context: int | None, workers: int | None, memory: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Show what would be built: every default filled in, every cost predicted."""
    from toolkit.listing import show_plan

    console = Console(as_json=as_json)
    show_plan(
        recipe, target, checkpoint, context, workers, memory, console, adapter=adapter,
        adapter_apart=adapter_apart,
    )  # fmt: skip


@click.command("build")
@click.argument("recipe", required=False)
@click.option("--all", "build_all_of", is_flag=True, help="Every bundled recipe of the model.")
@click.option(
    "--format", "kinds", multiple=True, help="With --all: this format only; may be repeated."
)
@click.option("--checkpoint", required=True, help="Folder, or Hugging Face id[@revision].")
@adapter_option
@apart_option
@out_option
@workers_option
@memory_option
@context_option
@check_option
@accept_option
@method_option
@equalize_option
@calibration_option
@click.option("--replace", is_flag=True, help="Replace an artifact that is already there.")
@click.option(
    "--engine", type=click.Choice(["native", "vendor"]), help="Converter, instead of the recipe's."
)
@click.option(
    "--force-memory", is_flag=True, help="Run a vendor's converter beyond the memory that is free."
)
@click.option(
    "--max-size",
    type=Size(),
    help="Choose each matrix's bits, so that the artifact takes this at most, such as 2.1GB.",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(0, min_open=True),
    help="Choose each matrix's bits, so that the mean KL from the source is this at most.",
)
@json_option
def build_command(
    recipe: str | None, build_all_of: bool, kinds: tuple[str, ...], checkpoint: str,
    adapter: Path | None, adapter_apart: bool, out: Path,
    workers: int | None, memory: int | None, context: int | None, check: bool,
    accept_kl: float | None,
    method: Literal["rtn", "gptq"] | None, equalize: bool | None, calibration: Path | None,
    replace: bool,
    engine: Literal["native", "vendor"] | None, force_memory: bool, max_size: int | None,
    max_kl: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Convert a checkpoint, check it against its source, seal it as an artifact.

    Give the name of a RECIPE (or a path to one), or --all for every recipe of the checkpoint's
    model in one pass over it; what is there already is kept.
    """
    from toolkit import catalog
    from toolkit.adapt import Wanted, adapt_recipes
    from toolkit.build import build_all, raise_on_sigterm, require_all
    from toolkit.job import Options
    from toolkit.source import bind_recipe, choose_adapter, list_recipes, open_source

    if bool(recipe) == build_all_of:
        raise click.UsageError("give either a RECIPE or --all")
    if kinds and not build_all_of:
        raise click.UsageError("--format goes with --all")
    budget = _read_budget(max_size, max_kl, build_all_of)
    wanted = Wanted(engine, method, equalize, calibration, budget, adapter_apart)
    raise_on_sigterm()
    console = Console(as_json=as_json)
    options = Options(
        context_length=context, workers=workers, memory_bytes=memory, check=check, replace=replace,
        force_memory=force_memory, calibration=calibration, accept_kl=accept_kl,
    )  # fmt: skip
    recipes = [catalog.load_recipe(recipe)] if recipe else []
    report = Report(f"build {recipes[0].name if recipes else 'all recipes'}")
    with rendering(console, report):
        own = recipes[0] if recipes else None
        adapter = choose_adapter(own, adapter, apart=adapter_apart)
        opened = open_source(checkpoint, console, adapter)
        recipes = [bind_recipe(one, opened, checkpoint) for one in recipes]
        recipes = recipes or list_recipes(opened, checkpoint, kinds)
        recipes = adapt_recipes(recipes, opened, wanted, console, report, context)
        results = build_all(recipes, opened, out, options, console, report)
        for name, result in results.items():
            if isinstance(result, Path):
                console.event("artifact", name=name, path=str(result))
        require_all(results)
    for result in results.values():
        console.result(str(result))


def _read_budget(max_size: int | None, max_kl: float | None, is_for_all: bool) -> "Budget | None":
    """What --max-size or --max-kl say; a usage error where they cannot stand."""
    from toolkit.budget import Budget

    if max_size is None and max_kl is None:
        return None
    if max_size is not None and max_kl is not None:
        raise click.UsageError("give either --max-size or --max-kl")
    if is_for_all:
        raise click.UsageError("--max-size and --max-kl go with one RECIPE")
    return Budget(max_size, max_kl)


@click.command("check")
@click.argument("artifact", type=click.Path(path_type=Path, file_okay=False))
@click.option("--checkpoint", help="Source checkpoint; without, the one the manifest names.")
@adapter_option
@click.option(
    "--text",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Plain text, or chats as .jsonl, one a line; without, a part of Python's manual.",
)
@click.option(
    "--tokens",
    type=click.IntRange(2),
    default=2048,
    show_default=True,
    help="Tokens of the text to read, at most.",
)
@click.option(
    "--length",
    type=click.IntRange(2),
    help="Tokens of a sequence; without, 512, or more where attention is block-sparse.",
)
@click.option(
    "--details",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File for everything that was measured, token by token; `report` shows it.",
)
@click.option(
    "--weights",
    is_flag=True,
    help="Measure its weights without its runtime, as a whole and each matrix alone.",
)
@json_option
def check_command(
    artifact: Path, checkpoint: str | None, adapter: Path | None, text: Path | None, tokens: int,
    length: int | None, details: Path | None, weights: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compare an artifact with its source: files, token ids, stop ids, logits on a text."""
    from toolkit.check import Asked, check_artifact
    from toolkit.weights import check_weights

    console = Console(as_json=as_json)
    report = Report(f"check {artifact}")
    asked = Asked(text, tokens, length, details, adapter)
    with rendering(console, report):
        if weights:
            check_weights(artifact, checkpoint, console, report, asked)
        else:
            check_artifact(artifact, checkpoint, console, report, asked)


@click.command("parity")
@click.argument("recipe")
@click.argument("checkpoint")
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder for both artifacts meanwhile, instead of the system's temporary one.",
)
@click.option("--force-memory", is_flag=True, help="Run the vendor beyond the memory that is free.")
@json_option
def parity_command(
    recipe: str, checkpoint: str, work: Path | None, force_memory: bool, as_json: bool
) -> None:
    """Build with both engines and compare: tensors, logits, size, time, memory.

    Of checkpoints without adapters: the vendors' converters read none.
    """
    from toolkit import catalog
    from toolkit.build import raise_on_sigterm
    from toolkit.parity import compare

    raise_on_sigterm()
    loaded, console = catalog.load_recipe(recipe), Console(as_json=as_json)
    compare(recipe, loaded, checkpoint, console, work=work, force_memory=force_memory)


@click.group("vendor", cls=OrderedGroup)
def vendor_group() -> None:
    """The vendors' own converters, each in a pinned environment: for `engine: vendor`, parity."""


@vendor_group.command("setup")
@click.argument("name")
@click.option("--python", help="Python to make it with, instead of the one phiship runs in.")
@click.option("--again", is_flag=True, help="Make it anew, also when it is there.")
@json_option
def vendor_setup_command(name: str, python: str | None, again: bool, as_json: bool) -> None:
    """Make a vendor's environment in the user's cache folder: onnx, openvino, mlx or gguf."""
    from toolkit.build import raise_on_sigterm
    from toolkit.listing import setup_vendor

    raise_on_sigterm()
    setup_vendor(name, python, again, Console(as_json=as_json))


@vendor_group.command("list")
@json_option
def vendor_list_command(as_json: bool) -> None:
    """Show which vendors' environments are there, and their size."""
    from toolkit.listing import show_vendors

    show_vendors(Console(as_json=as_json))
