"""Commands about devices: pushing to them, and looking after what is there."""

from pathlib import Path

import click

from toolkit.cli.options import (
    Size,
    accept_option,
    adapter_option,
    context_option,
    devices_option,
    expect_option,
    json_option,
    out_option,
    prompt_option,
    read_smoke,
    rendering,
    workers_option,
)
from toolkit.console import Console
from toolkit.report import Report
from toolkit.ssh.carrier import CARRIERS, Carrier

carrier_option = click.option(
    "--carrier", type=click.Choice(CARRIERS), default="auto",
    show_default=True, help="What carries the bytes; the system's ssh is the faster one.",
)  # fmt: skip
rate_option = click.option(
    "--limit-rate", type=Size(), help="Send no more than this a second, such as 2MB."
)

RUNTIMES = ("phiship", "ollama", "llamaedge")
runtime_option = click.option(
    "--runtime", type=click.Choice(RUNTIMES), default="phiship", show_default=True,
    help="What answers there: our runner, or the device's own Ollama or LlamaEdge (GGUF).",
)  # fmt: skip
ollama_option = click.option(
    "--ollama-port", type=click.IntRange(1, 65535), default=11434, show_default=True,
    help="Port of Ollama's API on the device.",
)  # fmt: skip


@click.command("ship")
@click.argument("checkpoint")
@click.argument("device")
@click.option("--recipe", help="Recipe to use, instead of the best that fits the device.")
@adapter_option
@prompt_option
@expect_option
@out_option
@context_option
@workers_option
@accept_option
@carrier_option
@rate_option
@devices_option
@json_option
def ship_command(
    checkpoint: str, device: str, recipe: str | None, adapter: Path | None, prompt: str | None,
    expect: str | None, out: Path, context: int | None, workers: int | None,
    accept_kl: float | None, carrier: Carrier, limit_rate: int | None, devices: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Probe the device, choose a recipe, build, check, push, and ask it a question there."""
    from toolkit.build import raise_on_sigterm
    from toolkit.deploy import Push
    from toolkit.job import Options
    from toolkit.ship import ship

    raise_on_sigterm()
    console = Console(as_json=as_json)
    report = Report(f"ship {checkpoint} to {device}")
    with rendering(console, report):
        ship(
            checkpoint, device, console, report, out=out, recipe_name=recipe,
            options=Options(context_length=context, workers=workers, accept_kl=accept_kl),
            push=Push(smoke=read_smoke(prompt, expect), carrier=carrier, bytes_per_s=limit_rate),
            devices_file=devices, adapter=adapter,
        )  # fmt: skip


@click.command("deploy")
@click.argument("artifact", type=click.Path(path_type=Path, file_okay=False))
@click.argument("device")
@click.option("--accept-unchecked", is_flag=True, help="Push an artifact whose check was skipped.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, and change nothing.")
@runtime_option
@ollama_option
@prompt_option
@expect_option
@carrier_option
@rate_option
@devices_option
@json_option
def deploy_command(
    artifact: Path, device: str, accept_unchecked: bool, dry_run: bool, runtime: str,
    ollama_port: int, prompt: str | None, expect: str | None, carrier: Carrier,
    limit_rate: int | None, devices: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Push an artifact over SSH, verify it there, ask it a question, switch to it when right.

    A failure after the switch goes back to the release that was good (exit code 16). DEVICE may be
    `adb` or `adb:SERIAL`: an Android phone's files, for an app.
    """
    from toolkit.adb import names_phone, push_with_adb, read_serial
    from toolkit.build import raise_on_sigterm
    from toolkit.deploy import Push, deploy
    from toolkit.device import resolve_device
    from toolkit.llamaedge import deploy_to_llamaedge
    from toolkit.ollama import install_on_device

    raise_on_sigterm()
    console = Console(as_json=as_json)
    report = Report(f"deploy {artifact.name} to {device}")
    push = Push(
        accept_unchecked=accept_unchecked, smoke=read_smoke(prompt, expect), carrier=carrier,
        bytes_per_s=limit_rate, dry_run=dry_run,
    )  # fmt: skip
    with rendering(console, report):
        if names_phone(device):
            push_with_adb(artifact, console, push, serial=read_serial(device), report=report)
            return
        there = resolve_device(device, devices)
        if runtime == "ollama":
            install_on_device(artifact, there, console, push, report=report, port=ollama_port)
        elif runtime == "llamaedge":
            deploy_to_llamaedge(artifact, there, console, push, report)
        else:
            deploy(artifact, there, console, push, report=report)


@click.command("rollback")
@click.argument("device")
@click.option("--to", help="Release to return to, as `phiship status` names it.")
@runtime_option
@ollama_option
@click.option(
    "--artifact", type=click.Path(path_type=Path, file_okay=False),
    help="With --runtime ollama: the artifact whose model is meant.",
)  # fmt: skip
@prompt_option
@expect_option
@devices_option
@json_option
def rollback_command(
    device: str, to: str | None, runtime: str, ollama_port: int, artifact: Path | None,
    prompt: str | None, expect: str | None, devices: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Put the previous release into use again, after the same tests as a new one."""
    from toolkit.deploy import roll_back
    from toolkit.device import resolve_device
    from toolkit.llamaedge import ask_there
    from toolkit.ollama import roll_back_on_device
    from toolkit.smoke import ask

    console, report = Console(as_json=as_json), Report(f"rollback {device}")
    if (runtime == "ollama") != (artifact is not None):
        raise click.UsageError("--runtime ollama and --artifact belong together")
    with rendering(console, report):
        smoke, there = read_smoke(prompt, expect), resolve_device(device, devices)
        if artifact:
            roll_back_on_device(artifact, there, report, smoke=smoke, port=ollama_port)
        else:
            asking = ask_there if runtime == "llamaedge" else ask
            roll_back(there, report, to=to, smoke=smoke, ask=asking)


@click.command("probe")
@click.argument("device")
@devices_option
@json_option
def probe_command(device: str, devices: Path | None, as_json: bool) -> None:
    """Show what a device is: system, memory, disk, Python, engines."""
    from toolkit.listing import show_probe

    show_probe(device, devices, Console(as_json=as_json))


@click.command("status")
@click.argument("device")
@devices_option
@json_option
def status_command(device: str, devices: Path | None, as_json: bool) -> None:
    """Show what is deployed on a device."""
    from toolkit.listing import show_status

    show_status(device, devices, Console(as_json=as_json))


@click.command("history")
@click.argument("device")
@devices_option
@json_option
def history_command(device: str, devices: Path | None, as_json: bool) -> None:
    """Show what happened on a device: pushes, switches, ways back."""
    from toolkit.listing import show_history

    show_history(device, devices, Console(as_json=as_json))


@click.command("logs")
@click.argument("device")
@devices_option
@json_option
def logs_command(device: str, devices: Path | None, as_json: bool) -> None:
    """Show the last words of the runners on a device."""
    from toolkit.listing import show_logs

    show_logs(device, devices, Console(as_json=as_json))


@click.command("unlock")
@click.argument("device")
@click.option("--force", is_flag=True, help="Kill the agent of the push that holds the lock.")
@devices_option
@json_option
def unlock_command(device: str, force: bool, devices: Path | None, as_json: bool) -> None:
    """Say which push holds a device's lock; with --force, end it."""
    from toolkit.listing import show_lock

    show_lock(device, devices, force, Console(as_json=as_json))


@click.command("uninstall")
@click.argument("device")
@click.option("--yes", is_flag=True, help="Do not ask.")
@devices_option
@json_option
def uninstall_command(device: str, yes: bool, devices: Path | None, as_json: bool) -> None:
    """Remove everything phiship has put on a device."""
    from toolkit.device import resolve_device
    from toolkit.remote import uninstall

    resolved = resolve_device(device, devices)
    if not yes:
        click.confirm(f"Remove every release from {device} ({resolved.root})?", abort=True)
    console, removed = Console(as_json=as_json), uninstall(resolved)
    console.event("uninstalled", device=device, removed=removed)
    console.result(f"{device}: {removed} is gone")


@click.command("trust")
@click.argument("device")
@click.option("--fingerprint", required=True, help="SHA256:... as the device's owner knows it.")
@devices_option
def trust_command(device: str, fingerprint: str, devices: Path | None) -> None:
    """Remember a device's host key, when its fingerprint is the one given."""
    from toolkit.device import resolve_device
    from toolkit.ssh.hostkeys import trust

    path = trust(resolve_device(device, devices), fingerprint)
    Console().note(f"{device}: host key {fingerprint} is now trusted, in {path}")
