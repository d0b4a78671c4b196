"""Ship: probe the device, choose the recipe, build, check, deploy."""

from pathlib import Path

import msgspec

from toolkit import catalog
from toolkit.build import Options, build
from toolkit.console import Console, format_bytes
from toolkit.decoder import Decoder
from toolkit.deploy import Push, deploy
from toolkit.device import Device, Facts, resolve_device
from toolkit.errors import PhishipError, PlanError
from toolkit.families import read_decoder
from toolkit.plan import Plan, make_plan
from toolkit.preflight import DISK_RESERVE_BYTES, list_ways
from toolkit.recipe import Recipe
from toolkit.remote import probe
from toolkit.report import Report
from toolkit.source import find_model, open_source

# Best way first, for a device whose target is not named in devices.yaml. On ARM llama.cpp repacks
# Q4_0 for the processor's dot products; on x86-64 onnxruntime's int8 kernels are the faster ones.
X86_WAYS = ("onnx/cpu", "openvino/cpu", "gguf/cpu")
ARM_WAYS = ("gguf/cpu", "onnx/cpu")
MAC_WAYS = ("mlx/metal", "gguf/cpu", "onnx/cpu")


def ship(
    reference: str, device_name: str, console: Console, report: Report, *, out: Path,
    recipe_name: str | None, options: Options, push: Push, devices_file: Path | None,
) -> None:  # fmt: skip
    """Do it all; every step goes into `report`. Raises what the failing step raises."""
    device = resolve_device(device_name, devices_file)
    with report.step("read checkpoint") as step:
        checkpoint = open_source(reference, console)
        decoder = read_decoder(checkpoint.config)
        step.measured = f"{checkpoint.folder}: {decoder.layers} layers x {decoder.hidden}"
    with report.step("probe device") as step:
        facts = probe(device)
        memory_bytes = facts.usable_memory_bytes
        memory = "unknown" if memory_bytes is None else format_bytes(memory_bytes)
        step.measured = f"{facts.board or facts.machine}, {memory} of memory free"
    with report.step("choose recipe") as step:
        if recipe_name:
            recipe = catalog.load_recipe(recipe_name)
            step.measured = f"{recipe.name}, as asked"
        else:
            recipe = choose(find_model(decoder, reference), decoder, device, facts, options)
            step.measured = recipe.name
    if push.smoke:
        recipe = msgspec.structs.replace(recipe, smoke=push.smoke)
    artifact = build(recipe, checkpoint, out, options, console, report)
    deploy(artifact, device, console, push, report=report)


def choose(model: str, decoder: Decoder, device: Device, facts: Facts, options: Options) -> Recipe:
    """The best way's recipe that fits the device, its first choice or else the smallest.

    PlanError says why none fits.
    """
    installable = list_ways(facts) if device.runtime == "auto" else ()
    engines: dict[str, bool] = {}
    obstacles = []
    for way in _ways(device, facts):
        candidates = sorted(
            _candidates(model, way, decoder, options),
            key=lambda plan: (not plan.recipe.first_choice, plan.device_memory_bytes),
        )
        for plan in candidates:
            engine = plan.needs.engine
            if engine not in engines:
                found = probe(device, engine).engine
                engines[engine] = bool(found and found.importable)
            has_engine = engines[engine] or way in installable
            obstacle = _find_obstacle(plan, facts, has_engine)
            if not obstacle:
                return plan.recipe
            obstacles.append(f"{plan.recipe.name}: {obstacle}")
    raise PlanError(
        f"{device.name}: no bundled recipe of {model} fits: {'; '.join(obstacles) or 'none'}",
        advice="name one with --recipe, or shorten the cache with --context",
    )


def _ways(device: Device, facts: Facts) -> tuple[str, ...]:
    if device.target:
        return catalog.load_target(device.target).runs
    if facts.machine.lower() in ("x86_64", "amd64"):
        return X86_WAYS
    return MAC_WAYS if facts.system == "Darwin" else ARM_WAYS


def _candidates(model: str, way: str, decoder: Decoder, options: Options) -> list[Plan]:
    plans = []
    for recipe in catalog.load_recipes(model):
        if recipe.format != way.partition("/")[0]:
            continue
        try:
            plan = make_plan(recipe, decoder, context_length=options.context_length)
        except PhishipError:
            continue
        if plan.needs.provider == way.partition("/")[2]:
            plans.append(plan)
    return plans


def _find_obstacle(plan: Plan, facts: Facts, has_engine: bool) -> str:
    if not has_engine:
        return f"{plan.needs.package} cannot be imported there, and has no wheels for it"
    memory_bytes = facts.usable_memory_bytes
    if memory_bytes is not None and memory_bytes < plan.device_memory_bytes:
        need, have = format_bytes(plan.device_memory_bytes), format_bytes(memory_bytes)
        return f"needs {need} of memory, {have} are free"
    need_bytes = plan.device_disk_bytes + DISK_RESERVE_BYTES
    if facts.disk_free_bytes < need_bytes:
        need, have = format_bytes(need_bytes), format_bytes(facts.disk_free_bytes)
        return f"needs {need} of disk, {have} are free"
    return ""
