"""Commands that let a model answer: here or on a device, in the terminal or over HTTP."""

import sys
from pathlib import Path

import click

from toolkit.cli.options import (
    devices_option,
    json_option,
    seed_option,
    settings_options,
    temperature_option,
)
from toolkit.console import Console

system_option = click.option("--system", default="", help="What the model is told first.")
port_option = click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True,
    help="Port of this machine's loopback; 0 takes a free one.",
)  # fmt: skip


@click.command("run")
@click.argument("place")
@click.option("--prompt", help="Answer this one question instead of a conversation.")
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path),
    help="With --prompt: a picture that it is about; may be given more than once.",
)  # fmt: skip
@click.option("--serve", is_flag=True, help="Answer OpenAI's API over HTTP instead (artifacts).")
@click.option(
    "--image-folder", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With --serve: where file: URLs of pictures may point; else nowhere.",
)  # fmt: skip
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Of one answer; else as many as there is room for."
)
@system_option
@temperature_option
@seed_option
@port_option
@settings_options
@devices_option
@json_option
def run_command(
    place: str, prompt: str | None, images: tuple[Path, ...], serve: bool,
    image_folder: Path | None, max_tokens: int | None, system: str, temperature: float,
    seed: int | None, port: int, devices: Path | None, as_json: bool, **given: int | None,
) -> None:  # fmt: skip
    """Converse with an artifact here, with the runner that devices get; or with a device.

    PLACE is an artifact's folder, or a device with a release in use.
    """
    from toolkit.artifact import MANIFEST
    from toolkit.serve import answer_once, ask_about, chat_with, run_here

    is_here = (Path(place) / MANIFEST).is_file()
    answering = _name_options(max_tokens=max_tokens, temperature=temperature, seed=seed)
    settings = _name_options(**given)
    if serve and prompt is not None:
        raise click.UsageError("--serve and --prompt exclude each other")
    if images and prompt is None:
        raise click.UsageError("--image goes with --prompt")
    if image_folder and not serve:
        raise click.UsageError("--image-folder goes with --serve")
    if prompt is not None and images and not is_here:
        ask_about(
            place, prompt, images, Console(as_json=as_json), system=system, max_tokens=max_tokens,
            temperature=temperature, seed=seed, settings=settings, devices_file=devices,
        )  # fmt: skip
    elif prompt is not None:
        pictures = [word for image in images for word in ("--image", str(image.absolute()))]
        words = ["--system", system, *pictures, *answering, *settings]
        answer_once(place, prompt, words, Console(as_json=as_json), devices)
    elif serve:
        if not is_here:
            raise click.UsageError("--serve is for artifacts; for a device: phiship serve DEVICE")
        folder = ["--image-folder", str(image_folder.absolute())] if image_folder else []
        run_here(place, ["serve", "--port", str(port), *folder, *settings, *_json(as_json)])
    elif is_here:
        run_here(place, ["chat", "--system", system, *answering, *settings])
    else:
        code = chat_with(
            place, system=system, max_tokens=max_tokens, temperature=temperature, seed=seed,
            settings=settings, devices_file=devices,
        )  # fmt: skip
        sys.exit(code)


@click.command("serve")
@click.argument("device")
@port_option
@settings_options
@click.option(
    "--install", is_flag=True,
    help="Have the device serve by itself, now and after every boot (systemd --user, launchd).",
)  # fmt: skip
@click.option("--remove", is_flag=True, help="Stop that service, and remove it.")
@click.option(
    "--host", default="127.0.0.1", show_default=True,
    help="With --install: the device's address to listen on; others than loopback want a token.",
)  # fmt: skip
@click.option(
    "--token-env", metavar="NAME",
    help="With --install: environment variable with the token that clients must show.",
)  # fmt: skip
@devices_option
@json_option
def serve_command(
    device: str, port: int, install: bool, remove: bool, host: str, token_env: str | None,
    devices: Path | None, as_json: bool, **given: int | None,
) -> None:  # fmt: skip
    """Let a device's release answer OpenAI's API, on a port of this machine, until Ctrl-C."""
    from toolkit.device import resolve_device
    from toolkit.serve import install_service, remove_service, serve_device

    if install and remove:
        raise click.UsageError("--install and --remove exclude each other")
    if not install and (token_env or host != "127.0.0.1"):
        raise click.UsageError("--host and --token-env belong to --install")
    if install and port == 0:
        raise click.UsageError("--install needs a port that stays the same, not 0")
    console, resolved = Console(as_json=as_json), resolve_device(device, devices)
    if install:
        install_service(resolved, port, host, token_env, _name_options(**given), console)
    elif remove:
        remove_service(resolved, console)
    else:
        serve_device(resolved, port, _name_options(**given), console)


def _name_options(**values: float | None) -> list[str]:
    words = []
    for name, value in values.items():
        if value is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    return words


def _json(as_json: bool) -> list[str]:
    return ["--json"] if as_json else []
