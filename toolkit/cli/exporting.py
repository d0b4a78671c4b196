"""Commands about artifacts from elsewhere, and for apps."""

from pathlib import Path

import click

from toolkit.cli.options import expect_option, json_option, prompt_option, read_smoke, rendering
from toolkit.console import Console
from toolkit.report import Report

PLATFORMS = ("android", "ios", "macos")
PROVIDERS = ("cpu", "cuda", "metal", "vulkan", "gpu", "npu")


@click.command("bundle")
@click.argument("artifact", type=click.Path(path_type=Path, file_okay=False))
@click.option("--platform", type=click.Choice(PLATFORMS), help="The app's platform; without, the "
              "first that runs the artifact.")  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("bundles"),
    show_default=True, help="Folder in which the bundle appears.",
)  # fmt: skip
@click.option("--zip", "as_zip", is_flag=True, help="Write one .zip, the same bytes every time.")
@click.option("--accept-unchecked", is_flag=True, help="Take an artifact whose check was skipped.")
@json_option
def bundle_command(
    artifact: Path, platform: str | None, out: Path, as_zip: bool, accept_unchecked: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Pack an artifact for an app: its files, checksums, a memory table, a how-to.

    Android and iOS apps run ONNX (for the CPU) by onnxruntime-genai; iOS and macOS apps run MLX.
    """
    from toolkit.build import raise_on_sigterm
    from toolkit.bundle import bundle

    raise_on_sigterm()
    console, report = Console(as_json=as_json), Report(f"bundle {artifact.name}")
    with rendering(console, report):
        path = bundle(
            artifact, out, console, report, platform=platform, as_zip=as_zip,
            accept_unchecked=accept_unchecked,
        )  # fmt: skip
    console.event("bundled", path=str(path))
    console.result(str(path))


@click.command("adopt")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("build"),
    show_default=True, help="Folder in which the artifact's folder appears.",
)  # fmt: skip
@click.option("--name", help="The artifact's name; without, the folder's or file's own.")
@click.option("--context", type=click.IntRange(min=16), help="Context length, instead of all.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="A folder that has the tokenizer and the chat template, such as the source checkpoint's.",
)  # fmt: skip
@click.option(
    "--checkpoint", help="Compare it with this source, a folder or a Hugging Face id, as `build` "
    "does; it is sealed as checked then.",
)  # fmt: skip
@click.option("--provider", type=click.Choice(PROVIDERS), help="What it is to run on.")
@click.option("--replace", is_flag=True, help="Replace an artifact of that name.")
@click.option("--copy", is_flag=True, help="Copy files, also where links would do.")
@prompt_option
@expect_option
@json_option
def adopt_command(
    source: Path, out: Path, name: str | None, context: int | None, tokenizer: Path | None,
    checkpoint: str | None, provider: str | None, replace: bool, copy: bool, prompt: str | None,
    expect: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Seal an artifact made elsewhere, so that it can be deployed, served or bundled.

    SOURCE is a GGUF file, or a folder with ONNX (genai_config.json), MLX, OpenVINO, or a Genie
    bundle (genie_config.json). It is looked at and never changed. Without --checkpoint nobody
    compares it with its source, so that deploying it takes --accept-unchecked.
    """
    from toolkit.adopt import SMOKE, Wish, adopt
    from toolkit.build import raise_on_sigterm

    raise_on_sigterm()
    console, report = Console(as_json=as_json), Report(f"adopt {source.name}")
    wish = Wish(
        name=name, context_length=context, tokenizer=tokenizer, provider=provider,
        smoke=read_smoke(prompt, expect) or SMOKE, checkpoint=checkpoint, replace=replace,
        copy=copy,
    )  # fmt: skip
    with rendering(console, report):
        folder = adopt(source, out, wish, console, report)
    console.event("adopted", path=str(folder))
    console.result(str(folder) if checkpoint else f"{folder}: deploy it with --accept-unchecked")
