"""Preflight: whether a device can take and run an artifact, from its facts, before it is sent.

Every refusal says the number found, the number needed and what would fit instead.
"""

import time
from collections.abc import Callable, Iterable

import msgspec

from toolkit import catalog, formats
from toolkit.artifact import Manifest
from toolkit.checkpoint.config import Config
from toolkit.console import format_bytes
from toolkit.device import Facts
from toolkit.errors import PhishipError, PreflightError
from toolkit.families import read_decoder
from toolkit.plan import Plan, make_plan, what_fits
from toolkit.preflight.checks import (
    check_accelerator,
    check_clock,
    check_health,
    check_machine,
    check_memory,
    check_processor,
    check_storage,
)
from toolkit.preflight.finding import Finding
from toolkit.preflight.runtime import check_engine, check_python, check_wheels
from toolkit.target import Target
from toolkit.yamlfile import ByteSize

__all__ = [
    "DISK_RESERVE_BYTES",
    "WAYS",
    "Finding",
    "check_disk",
    "check_facts",
    "describe_facts",
    "describe_needs",
    "describe_target",
    "inspect",
    "list_ways",
    "rebuild_plan",
    "suggest",
]

# What stays free on the device, for logs and for the system itself.
DISK_RESERVE_BYTES = 64_000_000
UNKNOWN_BYTES = 1 << 60  # memory of a device that does not tell; it is not judged
# Where another artifact may pass; another folder or another system does not help otherwise.
ARTIFACT_CHECKS = ("python", "wheels", "processor", "accelerator", "memory")
# What a target calls `runs`, with the package it takes.
WAYS = {
    "onnx/cuda": "onnxruntime-genai-cuda",
    "mlx/metal": "mlx-lm",
    "openvino/npu": "openvino-genai",
    "openvino/gpu": "openvino-genai",
    "onnx/cpu": "onnxruntime-genai",
    "openvino/cpu": "openvino-genai",
    "gguf/cpu": "xllamacpp",
    "mlx/cpu": "mlx-lm",
}


def check_facts(
    device: str,
    facts: Facts,
    manifest: Manifest,
    *,
    installs: bool = False,
    has_engine: bool = False,
    now_s: float | None = None,
) -> list[Finding]:
    """Return what was checked; PreflightError, with every refusal, when the artifact cannot run.

    `installs`: a missing runtime is no obstacle, for this push brings it. `has_engine`: it runs in
    a program that is not ours, of which nothing is known. `now_s` is this machine's clock when the
    facts were read, by default now.
    """
    findings = inspect(facts, manifest, installs=installs, has_engine=has_engine, now_s=now_s)
    refused = [finding for finding in findings if finding.verdict == "refused"]
    if refused:
        is_about_artifact = any(finding.name in ARTIFACT_CHECKS for finding in refused)
        raise _refuse(device, refused, suggest(facts, manifest) if is_about_artifact else ())
    return findings


def inspect(
    facts: Facts,
    manifest: Manifest,
    *,
    installs: bool = False,
    has_engine: bool = False,
    now_s: float | None = None,
) -> list[Finding]:
    """Check everything a facts call tells; nothing more when the machine itself is impossible."""
    machine = check_machine(facts)
    if machine.verdict == "refused":
        return [machine]
    return [
        machine,
        *([] if has_engine else _inspect_engine(facts, manifest, installs=installs)),
        check_memory(facts, manifest),
        *check_storage(facts, manifest),
        *check_health(facts),
        *check_clock(facts, time.time() if now_s is None else now_s),
    ]


def _inspect_engine(facts: Facts, manifest: Manifest, *, installs: bool) -> list[Finding]:
    runtime = manifest.runtime
    return [
        check_python(facts, runtime.package),
        check_engine(facts, manifest, installs=installs),
        *check_processor(facts, runtime.package),
        *check_accelerator(facts, runtime.provider),
    ]


def check_disk(
    device: str,
    send_bytes: int,
    free_bytes: int,
    *,
    wheel_bytes: int = 0,
    list_fits: Callable[[], Iterable[str]] = tuple,
) -> None:
    """Raise PreflightError when what has to be sent and unpacked does not fit on the device.

    `wheel_bytes` is what a runtime takes there, packed and unpacked; `list_fits` says what would
    fit instead (`suggest`).
    """
    need_bytes = send_bytes + wheel_bytes + DISK_RESERVE_BYTES
    if not send_bytes + wheel_bytes or free_bytes >= need_bytes:
        return
    wheels = f", {format_bytes(wheel_bytes)} more for the runtime" if wheel_bytes else ""
    text = (
        f"{format_bytes(free_bytes)} of disk are free; {format_bytes(send_bytes)} have to be sent"
        f"{wheels} and {format_bytes(DISK_RESERVE_BYTES)} must stay free"
    )
    advice = "free some space there, or choose a folder on another disk: `root:` in devices.yaml"
    raise _refuse(device, [Finding("disk", "refused", text, advice)], list_fits())


def suggest(facts: Facts, manifest: Manifest) -> list[str]:
    """Say which shorter context, and which bundled recipes of this model, the device could hold.

    Nothing for an artifact whose plan is not that of a bundled model.
    """
    plan = rebuild_plan(manifest)
    if plan is None:
        return []
    return what_fits(plan, describe_target(facts, list_ways(facts)))


def describe_target(facts: Facts, runs: tuple[str, ...]) -> Target:
    """Return a device as a target: what is free there now, and the ways it can run."""
    memory_bytes = facts.usable_memory_bytes
    return Target(
        name="it",
        title="the device",
        system="linux",
        arch="any",
        memory=ByteSize(UNKNOWN_BYTES if memory_bytes is None else memory_bytes),
        reserved_memory=ByteSize(0),
        disk=ByteSize(max(0, facts.disk_free_bytes - DISK_RESERVE_BYTES)),
        runs=runs,
        push="ssh",
        verified="",
    )


def list_ways(facts: Facts) -> tuple[str, ...]:
    """Ways, as format/provider, for which there are wheels and an accelerator."""
    ways = []
    for way, package in WAYS.items():
        findings = [
            check_python(facts, package),
            check_wheels(facts, package),
            *check_processor(facts, package),
            *check_accelerator(facts, way.partition("/")[2]),
        ]
        if all(finding.verdict != "refused" for finding in findings):
            ways.append(way)
    return tuple(ways)


def rebuild_plan(manifest: Manifest) -> Plan | None:
    """Return the plan an artifact was built with; None when this version would plan otherwise."""
    if manifest.format not in formats.names():
        return None
    fields = {**manifest.plan, "name": manifest.name, "title": manifest.name}
    try:
        recipe = msgspec.convert(fields, formats.get(manifest.format).RECIPE)
        model = catalog.load_model(recipe.model)
        decoder = read_decoder(Config(f"models/{model.name}.yaml", model.config))
        plan = make_plan(recipe, decoder, context_length=manifest.context_length)
    except (PhishipError, msgspec.ValidationError):
        return None
    return plan if plan.device_memory_bytes == manifest.device_memory_bytes else None


def describe_needs(manifest: Manifest) -> str:
    """What the artifact needs, for the report."""
    memory = format_bytes(manifest.device_memory_bytes)
    return f"{manifest.runtime.package}, {memory} of memory"


def describe_facts(facts: Facts, findings: Iterable[Finding] = ()) -> str:
    """What was found, for the report, with the warnings among the findings."""
    memory_bytes = facts.usable_memory_bytes
    memory = "unknown memory" if memory_bytes is None else f"{format_bytes(memory_bytes)} free"
    engine = f"{facts.engine.package} {facts.engine.version}" if facts.engine else ""
    names = (
        facts.board or facts.system,
        facts.machine,
        facts.libc if facts.libc != "none" else facts.system_version,
        f"Python {facts.python}",
        engine.strip(),
        memory,
    )
    warnings = [f"; warning: {one.text}" for one in findings if one.verdict == "warning"]
    return ", ".join(name for name in names if name) + "".join(warnings)


def _refuse(device: str, refused: list[Finding], fits: Iterable[str]) -> PreflightError:
    advice = [*(finding.advice for finding in refused), *fits]
    return PreflightError(
        f"{device}: {'; '.join(finding.text for finding in refused)}",
        advice="; ".join(dict.fromkeys(text for text in advice if text)),
    )
