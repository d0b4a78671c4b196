"""The command line: parse, one call, render. Everything else is elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import click

from toolkit import __version__
from toolkit.console import Console
from toolkit.errors import PhishipError
from toolkit.report import Report
from toolkit.yamlfile import ByteSize

EXIT_INTERRUPTED = 130


class _Size(click.ParamType[int]):
    """A count of bytes such as 2GiB."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return ByteSize.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Group(click.Group):
    """Shows commands in the order of use, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)


def main() -> NoReturn:
    """Run a command; expected errors end with their own exit code and no traceback."""
    as_json = "--json" in sys.argv
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except PhishipError as error:
        Console(as_json=as_json).error(error)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        Console(as_json=as_json).note("interrupted; nothing half-written was left behind")
        sys.exit(EXIT_INTERRUPTED)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON event a line.")
workers_option = click.option(
    "--workers", type=click.IntRange(1, 64), help="Worker processes; as many as cores, at most 8."
)
context_option = click.option(
    "--context", type=click.IntRange(min=16), help="Context length, instead of the recipe's."
)
memory_option = click.option(
    "--memory", type=_Size(), help="Memory the build may take, such as 2GiB; limits workers."
)
out_option = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("build"),
    show_default=True, help="Folder in which the artifact's folder appears.",
)  # fmt: skip
check_option = click.option(
    "--check/--no-check", default=True,
    help="Compare logits with the source. Without, the artifact is sealed as unchecked.",
)  # fmt: skip
devices_option = click.option(
    "--devices", type=click.Path(path_type=Path, dir_okay=False), help="The devices.yaml to use."
)
prompt_option = click.option(
    "--prompt", help="Question of the smoke test, instead of the recipe's."
)
expect_option = click.option("--expect", help="Text that the answer must contain.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="phiship")
def cli() -> None:
    """Turn a Phi-3 checkpoint into what a device runs best, prove it, push it, test it there.

    Start with: phiship ship CHECKPOINT DEVICE
    """


@cli.command("ship")
@click.argument("checkpoint")
@click.argument("device")
@click.option("--recipe", help="Recipe to use, instead of the best that fits the device.")
@prompt_option
@expect_option
@out_option
@context_option
@workers_option
@devices_option
@json_option
def ship_command(
    checkpoint: str, device: str, recipe: str | None, prompt: str | None, expect: str | None,
    out: Path, context: int | None, workers: int | None, devices: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Probe the device, choose a recipe, build, check, push, and ask it a question there."""
    from toolkit.build import Options, raise_on_sigterm
    from toolkit.ship import ship

    raise_on_sigterm()
    console = Console(as_json=as_json)
    report = Report(f"ship {checkpoint} to {device}")
    with _rendering(console, report):
        ship(
            checkpoint, device, console, report, out=out, recipe_name=recipe,
            options=Options(context_length=context, workers=workers),
            smoke=_smoke(prompt, expect), devices_file=devices,
        )  # fmt: skip


@cli.command("list")
@click.argument("kind", type=click.Choice(["recipes", "targets", "models"]), required=False)
@json_option
def list_command(kind: str | None, as_json: bool) -> None:
    """Show the bundled recipes, targets and models."""
    from toolkit.listing import show_list

    for one in [kind] if kind else ["recipes", "targets", "models"]:
        show_list(one, Console(as_json=as_json))


@cli.command("plan")
@click.argument("recipe")
@click.option("--for", "target", help="Target that must be able to hold and run it.")
@click.option("--checkpoint", help="Folder or Hugging Face id; without, the model's known shape.")
@context_option
@workers_option
@memory_option
@json_option
def plan_command(
    recipe: str, target: str | None, checkpoint: str | None, context: int | None,
    workers: int | None, memory: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Show what would be built: every default filled in, every cost predicted."""
    from toolkit.listing import show_plan

    console = Console(as_json=as_json)
    show_plan(recipe, target, checkpoint, context, workers, memory, console)


@cli.command("build")
@click.argument("recipe", required=False)
@click.option("--all", "build_all_of", is_flag=True, help="Every bundled recipe of the model.")
@click.option(
    "--format", "kinds", multiple=True, help="With --all: this format only; may be repeated."
)
@click.option("--checkpoint", required=True, help="Folder, or Hugging Face id[@revision].")
@out_option
@workers_option
@memory_option
@context_option
@check_option
@click.option("--replace", is_flag=True, help="Replace an artifact that is already there.")
@click.option(
    "--engine", type=click.Choice(["native", "vendor"]), help="Converter, instead of the recipe's."
)
@click.option(
    "--force-memory", is_flag=True, help="Run a vendor's converter beyond the memory that is free."
)
@json_option
def build_command(
    recipe: str | None, build_all_of: bool, kinds: tuple[str, ...], checkpoint: str, out: Path,
    workers: int | None, memory: int | None, context: int | None, check: bool, replace: bool,
    engine: Literal["native", "vendor"] | None, force_memory: bool, as_json: bool,
) -> None:  # fmt: skip
    """Convert a checkpoint, check it against its source, seal it as an artifact.

    Give the name of a RECIPE (or a path to one), or --all for every recipe of the checkpoint's
    model in one pass over it; what is there already is kept.
    """
    from toolkit import catalog
    from toolkit.build import Options, build_all, raise_on_sigterm, require_all
    from toolkit.source import list_recipes, open_source

    if bool(recipe) == build_all_of:
        raise click.UsageError("give either a RECIPE or --all")
    if kinds and not build_all_of:
        raise click.UsageError("--format goes with --all")
    raise_on_sigterm()
    console = Console(as_json=as_json)
    options = Options(
        context_length=context, workers=workers, memory_bytes=memory, check=check, replace=replace,
        force_memory=force_memory,
    )  # fmt: skip
    recipes = [catalog.load_recipe(recipe)] if recipe else []
    report = Report(f"build {recipes[0].name if recipes else 'all recipes'}")
    with _rendering(console, report):
        opened = open_source(checkpoint, console)
        recipes = recipes or list_recipes(opened, checkpoint, kinds)
        recipes = [one.with_engine(engine) if engine else one for one in recipes]
        results = build_all(recipes, opened, out, options, console, report)
        for name, result in results.items():
            if isinstance(result, Path):
                console.event("artifact", name=name, path=str(result))
        require_all(results)
    for result in results.values():
        console.result(str(result))


@cli.command("check")
@click.argument("artifact", type=click.Path(path_type=Path, file_okay=False))
@click.option("--checkpoint", help="Source checkpoint; without, the one the manifest names.")
@json_option
def check_command(artifact: Path, checkpoint: str | None, as_json: bool) -> None:
    """Compare an artifact with its source: files, token ids, logits, stop ids."""
    from toolkit.check import check_artifact

    console = Console(as_json=as_json)
    report = Report(f"check {artifact}")
    with _rendering(console, report):
        check_artifact(artifact, checkpoint, console, report)


@cli.command("deploy")
@click.argument("artifact", type=click.Path(path_type=Path, file_okay=False))
@click.argument("device")
@click.option("--accept-unchecked", is_flag=True, help="Push an artifact whose check was skipped.")
@prompt_option
@expect_option
@devices_option
@json_option
def deploy_command(
    artifact: Path, device: str, accept_unchecked: bool, prompt: str | None, expect: str | None,
    devices: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Push an artifact over SSH, verify it there, ask it a question, switch to it when right."""
    from toolkit.build import raise_on_sigterm
    from toolkit.deploy import deploy
    from toolkit.device import resolve_device

    raise_on_sigterm()
    console = Console(as_json=as_json)
    report = Report(f"deploy {artifact.name} to {device}")
    with _rendering(console, report):
        deploy(
            artifact, resolve_device(device, devices), console, report=report,
            accept_unchecked=accept_unchecked, smoke=_smoke(prompt, expect),
        )  # fmt: skip


@cli.command("probe")
@click.argument("device")
@devices_option
@json_option
def probe_command(device: str, devices: Path | None, as_json: bool) -> None:
    """Show what a device is: system, memory, disk, Python, engines."""
    from toolkit.listing import show_probe

    show_probe(device, devices, Console(as_json=as_json))


@cli.command("status")
@click.argument("device")
@devices_option
@json_option
def status_command(device: str, devices: Path | None, as_json: bool) -> None:
    """Show what is deployed on a device."""
    from toolkit.listing import show_status

    show_status(device, devices, Console(as_json=as_json))


@cli.command("trust")
@click.argument("device")
@click.option("--fingerprint", required=True, help="SHA256:... as the device's owner knows it.")
@devices_option
def trust_command(device: str, fingerprint: str, devices: Path | None) -> None:
    """Remember a device's host key, when its fingerprint is the one given."""
    from toolkit.device import resolve_device
    from toolkit.ssh.hostkeys import trust

    path = trust(resolve_device(device, devices), fingerprint)
    Console().note(f"{device}: host key {fingerprint} is now trusted, in {path}")


@cli.command("parity")
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
    """Build with both engines and compare: tensors, logits, size, time, memory."""
    from toolkit import catalog
    from toolkit.build import raise_on_sigterm
    from toolkit.parity import compare

    raise_on_sigterm()
    loaded, console = catalog.load_recipe(recipe), Console(as_json=as_json)
    compare(recipe, loaded, checkpoint, console, work=work, force_memory=force_memory)


@cli.group("vendor", cls=_Group)
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


def _smoke(prompt: str | None, expect: str | None) -> Any:
    from toolkit.artifact import Smoke

    if (prompt is None) != (expect is None):
        raise click.UsageError("--prompt and --expect belong together: give both or neither")
    return None if prompt is None or expect is None else Smoke(prompt=prompt, expect=expect)


@contextmanager
def _rendering(console: Console, report: Report) -> Iterator[None]:
    """Print the report however the block ends."""
    try:
        yield
    finally:
        if report.steps:
            console.report(report)
