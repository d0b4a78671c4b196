"""Ship: probe the device, choose the recipe, build, check, deploy."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from toolkit import catalog
from toolkit.build import build
from toolkit.console import Console, format_bytes
from toolkit.decoder import Decoder
from toolkit.deploy import Push, deploy
from toolkit.device import Device, Facts, resolve_device
from toolkit.errors import PhishipError, PlanError
from toolkit.families import read_decoder
from toolkit.job import Options
from toolkit.plan import Plan, find_problem, make_plan
from toolkit.preflight import describe_target, list_ways
from toolkit.quality.chat import read_chat
from toolkit.recipe import Recipe
from toolkit.remote import read_facts
from toolkit.report import Report
from toolkit.source import bind_recipe, choose_adapter, list_recipes, open_source
from toolkit.ssh.embedded import running
from toolkit.ssh.session import Session, open_session

# Best way first, for a device whose target is not named in devices.yaml. On ARM llama.cpp repacks
# Q4_0 for the processor's dot products; on x86-64 onnxruntime's int8 kernels are the faster ones.
X86_WAYS = ("onnx/cpu", "openvino/cpu", "gguf/cpu")
ARM_WAYS = ("gguf/cpu", "onnx/cpu")
MAC_WAYS = ("mlx/metal", "gguf/cpu", "onnx/cpu")


def ship(
    reference: str, device_name: str, console: Console, report: Report, *, out: Path,
    recipe_name: str | None, options: Options, push: Push, devices_file: Path | None,
    adapter: Path | None = None,
) -> None:  # fmt: skip
    """Do it all; every step goes into `report`. Raises what the failing step raises.

    `adapter` is merged, unless the recipe says that it stays apart.
    """
    device = resolve_device(device_name, devices_file)
    with report.step("read checkpoint") as step:
        asked = catalog.load_recipe(recipe_name) if recipe_name else None
        adapter = choose_adapter(asked, adapter, apart=False)
        checkpoint = open_source(reference, console, adapter)
        decoder = read_decoder(checkpoint.config)
        step.measured = f"{checkpoint.folder}: {decoder.layers} layers x {decoder.hidden}"
    with running(device) as started, open_session(started) as session:
        with report.step("probe device") as step:
            facts = read_facts(session)
            memory_bytes = facts.usable_memory_bytes
            memory = "unknown" if memory_bytes is None else format_bytes(memory_bytes)
            step.measured = f"{facts.board or facts.machine}, {memory} of memory free"
        with report.step("choose recipe") as step:
            if asked:
                recipe = bind_recipe(asked, checkpoint, reference)
                step.measured = f"{recipe.name}, as asked"
            else:
                recipes = list_recipes(checkpoint, reference, ())
                chat = read_chat(checkpoint, sees=decoder.vision is not None)
                recipe = choose(recipes, decoder, session, facts, options, chat.companions)
                step.measured = recipe.name
    if push.smoke:
        recipe = msgspec.structs.replace(recipe, smoke=push.smoke)
    artifact = build(recipe, checkpoint, out, options, console, report)
    deploy(artifact, device, console, push, report=report)


def choose(
    recipes: Sequence[Recipe],
    decoder: Decoder,
    session: Session,
    facts: Facts,
    options: Options,
    companions: tuple[str, ...] = (),
) -> Recipe:
    """The best way's recipe that fits the device, its first choice or else the smallest.

    `companions` are packages that the artifact will need there whatever its format. PlanError says
    why none fits.
    """
    plans = {
        way: _plan_way(recipes, way, decoder, options) for way in _order_ways(session.device, facts)
    }
    there = describe_target(facts, tuple(_find_runnable(session, facts, plans, companions)))
    problems = []
    for plan in (plan for candidates in plans.values() for plan in candidates):
        problem = find_problem(plan, there)
        if not problem:
            return plan.recipe
        problems.append(problem)
    raise PlanError(
        f"{session.device.name}: no bundled recipe of {recipes[0].model} fits: "
        f"{'; '.join(dict.fromkeys(problems)) or 'none'}",
        advice="name one with --recipe, or shorten the cache with --context",
    )


def _find_runnable(
    session: Session,
    facts: Facts,
    plans: Mapping[str, Sequence[Plan]],
    companions: tuple[str, ...],
) -> Iterator[str]:
    """Ways whose engine can be brought to the device, or is there already."""
    installable = list_ways(facts) if session.device.runtime == "auto" else ()
    for way, candidates in plans.items():
        if way in installable:
            yield way
        elif candidates:
            needs = candidates[0].needs
            beside = (*needs.companions, *companions)
            engine = read_facts(session, needs.engine, beside).engine
            if engine and engine.importable and not engine.list_missing(beside):
                yield way


def _order_ways(device: Device, facts: Facts) -> tuple[str, ...]:
    if device.target:
        return catalog.load_target(device.target).runs
    if facts.machine.lower() in ("x86_64", "amd64"):
        return X86_WAYS
    return MAC_WAYS if facts.system == "Darwin" else ARM_WAYS


def _plan_way(
    recipes: Sequence[Recipe], way: str, decoder: Decoder, options: Options
) -> list[Plan]:
    """Plans of the recipes for a way: first choices first, then the smallest."""
    plans = []
    for recipe in recipes:
        if recipe.format != way.partition("/")[0]:
            continue
        with suppress(PhishipError):
            plans.append(make_plan(recipe, decoder, context_length=options.context_length))
    fitting = [plan for plan in plans if plan.needs.provider == way.partition("/")[2]]
    return sorted(
        fitting, key=lambda plan: (not plan.recipe.first_choice, plan.device_memory_bytes)
    )
