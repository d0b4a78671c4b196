"""What the looking commands show: lists, plans, probes, status, vendors."""

import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from toolkit import catalog, formats, support
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.config import Config
from toolkit.checkpoint.lora import Adapter, read_adapter
from toolkit.checkpoint.merged import find_adapter
from toolkit.console import Console, format_bytes
from toolkit.decoder import Decoder
from toolkit.device import resolve_device
from toolkit.errors import SettingsError
from toolkit.families import read_decoder
from toolkit.plan import Plan, check_fit, make_plan, measure_tokenizer
from toolkit.recipe import Recipe
from toolkit.source import bind_recipe, choose_adapter, open_source
from toolkit.target import Target
from toolkit.vendor.environment import Found, cache_folder, look, setup


def show_list(kind: str, console: Console) -> None:
    """Show the bundled recipes, targets or models."""
    rows = []
    for name in catalog.names(kind):
        if kind == "targets":
            target = catalog.load_target(name)
            rows.append([name, target.title, ", ".join(target.runs), target.verified])
        elif kind == "recipes":
            rows.append([name, catalog.load_recipe(name).title])
        else:
            model = catalog.load_model(name)
            rows.append([name, model.title, f"{model.id}@{model.revision[:12]}"])
        console.event(kind.removesuffix("s"), name=name, title=rows[-1][1])
    headers = {
        "recipes": ["recipe", "what it makes"],
        "targets": ["target", "device", "runs", "verified"],
        "models": ["model", "what it is", "pinned revision"],
    }[kind]
    console.table("", headers, rows)


def show_support(console: Console, *, markdown: bool) -> None:
    """Show which model runs in what and where; or write the page of the docs."""
    if markdown:
        console.result(support.render_markdown().rstrip("\n"))
        return
    models = support.list_models()
    rows = []
    for cell in support.list_cells(models):
        console.event("support", **vars(cell))
        what = f"{len(cell.recipes)} recipes; {cell.verified}" if cell.recipes else cell.refusal
        rows.append([cell.model, cell.format, "yes" if cell.recipes else "no", what])
    for fit in support.list_fits(models):
        console.event("fit", **vars(fit))
    console.table("", ["model", "format", "", "recipes and what was verified, or why not"], rows)
    console.note("what fits which target: docs/support.md, or --json")


def show_plan(
    recipe_name: str, target_name: str | None, checkpoint: str | None, context: int | None,
    workers: int | None, memory_bytes: int | None, console: Console, *,
    adapter: Path | None = None, adapter_apart: bool = False,
) -> None:  # fmt: skip
    """Show the plan; PlanError when it does not fit the target."""
    recipe = catalog.load_recipe(recipe_name)
    adapter = choose_adapter(recipe, adapter, apart=adapter_apart)
    recipe = recipe.with_adapter_apart() if adapter_apart else recipe
    target = catalog.load_target(target_name) if target_name else None
    opened = open_source(checkpoint, console, adapter) if checkpoint else None
    if opened and checkpoint:
        recipe = bind_recipe(recipe, opened, checkpoint)
    decoder = _decoder(recipe, opened)
    found = find_adapter(opened) if opened else None
    if adapter and not opened:
        found = read_adapter(adapter, decoder.all_shapes(), recipe.model, is_tied=decoder.is_tied)
        is_tied = decoder.is_tied and not found.is_untied
        decoder = replace(decoder, vocab=found.vocab or decoder.vocab, is_tied=is_tied)
    plan = make_plan(
        recipe,
        decoder,
        context_length=context,
        workers=workers,
        memory_bytes=memory_bytes,
        tokenizer_bytes=measure_tokenizer(opened) if opened else None,
        adapter=found,
    )
    rows = _settings(plan) + _describe_adapter(plan, found) + _costs(plan, target)
    console.event(
        "plan",
        recipe=recipe.name,
        settings=recipe.settings(),
        context_length=plan.context_length,
        digest=plan.digest,
        artifact_bytes=plan.artifact_bytes,
        adapter=found.digest if found else None,
        adapter_bytes=plan.adapter_bytes,
        build_memory_bytes=plan.build_memory_bytes,
        gate_memory_bytes=plan.gate_memory_bytes,
        kv_bytes=plan.kv_bytes,
        device_memory_bytes=plan.device_memory_bytes,
        device_disk_bytes=plan.device_disk_bytes,
        notes=plan.needs.notes,
    )
    title = f"plan {recipe.name}" + (f" for {target.name}" if target else "")
    console.table(title, ["", ""], rows)
    for note in plan.needs.notes:
        console.note(f"note: {note}")
    if target:
        check_fit(plan, target)
        console.note(f"fits {target.name}")


def _decoder(recipe: Recipe, checkpoint: Checkpoint | None) -> Decoder:
    """The checkpoint's architecture; without one, that of the recipe's model."""
    if checkpoint is None:
        if not recipe.model:
            raise SettingsError(
                f"{recipe.name}: this recipe is for any model", advice="give --checkpoint DIR"
            )
        model = catalog.load_model(recipe.model)
        return read_decoder(Config(f"models/{model.name}.yaml", model.config))
    decoder = read_decoder(checkpoint.config)
    checkpoint.check(decoder)
    return decoder


def _settings(plan: Plan) -> list[list[str]]:
    rows = [["recipe", plan.recipe.name]]
    settings = plan.recipe.settings()
    nested = settings.pop("quantization", {})
    settings["context_length"] = plan.context_length
    rows += [[key, _text(value)] for key, value in settings.items()]
    rows += [[f"quantization.{key}", _text(value)] for key, value in nested.items()]
    limits = msgspec.to_builtins(plan.recipe.check)
    rows += [[f"check.{k}", _text(value)] for k, value in limits.items() if value is not None]
    first, last = plan.needs.valid_context
    rows.append(["agrees with the source at", f"{first} to {last} tokens"])
    return rows


def _describe_adapter(plan: Plan, adapter: Adapter | None) -> list[list[str]]:
    """Which adapter the artifact has, and how."""
    if adapter is None:
        return []
    way = f"apart, {format_bytes(plan.adapter_bytes)}" if plan.adapter else "merged"
    return [["adapter", f"{adapter.folder}: {len(adapter.changes)} tensors, {way}"]]


def _costs(plan: Plan, target: Target | None) -> list[list[str]]:
    has = f" of {format_bytes(target.usable_memory_bytes)} on {target.name}" if target else ""
    conversion = f"{format_bytes(plan.build_memory_bytes)} with {plan.workers} workers"
    parts = (
        f"weights {format_bytes(plan.weight_bytes)} + cache {format_bytes(plan.kv_bytes)} "
        f"+ engine {format_bytes(plan.needs.overhead_bytes)}"
    )
    return [
        ["artifact", format_bytes(plan.artifact_bytes)],
        ["build: disk", format_bytes(plan.artifact_bytes)],
        ["build: memory", f"{conversion}; the gate {format_bytes(plan.gate_memory_bytes)}"],
        ["device: memory", f"{format_bytes(plan.device_memory_bytes)}{has} = {parts}"],
        ["device: disk", format_bytes(plan.device_disk_bytes)],
    ]


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def show_probe(device_name: str, devices_file: Path | None, console: Console) -> None:
    """Show the facts of a device."""
    from toolkit.remote import probe

    facts = msgspec.to_builtins(probe(resolve_device(device_name, devices_file)))
    console.event("facts", device=device_name, **facts)
    console.table(f"probe {device_name}", ["fact", "found"], _rows(facts))


def show_status(device_name: str, devices_file: Path | None, console: Console) -> None:
    """Show what is deployed on a device."""
    from toolkit.remote import read_status

    found = read_status(resolve_device(device_name, devices_file))
    console.event("status", device=device_name, **msgspec.to_builtins(found))
    shown = {
        "in use": found.current or "nothing",
        "before it": found.previous,
        "good": found.state.good,
        "on trial": found.state.pending,
        "releases": found.releases,
        "runtimes": found.runtimes,
        "files": f"{found.blobs}, {format_bytes(found.blob_bytes)}",
        "arriving": found.incoming,
        "free_bytes": found.free_bytes,
        "root": found.root,
    }
    console.table(f"status {device_name}", ["", ""], _rows(shown))


def show_history(device_name: str, devices_file: Path | None, console: Console) -> None:
    """Show what happened on a device, oldest first."""
    from toolkit.remote import read_history

    rows = []
    for event in read_history(resolve_device(device_name, devices_file)):
        what = event.pop("event")
        console.event("history", device=device_name, what=what, **event)
        when = datetime.fromtimestamp(event.pop("time")).astimezone()
        event.pop("boot_id", None)
        name = event.pop("release", None) or event.pop("runtime", None) or ""
        rest = [f"{key} {_text(value)}" for key, value in event.items() if value]
        rows.append([when.isoformat(" ", "seconds"), what, ", ".join([_text(name), *rest])])
    console.table(f"history {device_name}", ["when, by the device's clock", "what", ""], rows)


def show_logs(device_name: str, devices_file: Path | None, console: Console) -> None:
    """Show the end of what runners wrote to stderr."""
    from toolkit.remote import read_logs

    text = read_logs(resolve_device(device_name, devices_file))
    console.event("logs", device=device_name, text=text)
    for line in text.splitlines():
        # Nothing that a model or a library printed there may steer this terminal.
        console.result("".join(c if c.isprintable() or c == "\t" else "?" for c in line))


def show_lock(device_name: str, devices_file: Path | None, force: bool, console: Console) -> None:
    """Say who holds a device's lock; with `force`, that the push was ended."""
    from toolkit.remote import unlock

    found = unlock(resolve_device(device_name, devices_file), force=force)
    console.event("lock", device=device_name, **found)
    if found["holder"] is None:
        console.result(f"{device_name}: no push holds the lock")
    elif found["unlocked"]:
        console.result(f"{device_name}: ended the push {found['holder']}")
    else:
        console.result(f"{device_name}: a push holds the lock {found['holder']}")


def _rows(fields: dict[str, Any]) -> list[list[str]]:
    """What was found, for people: without what is unknown or empty, sizes readable."""
    rows = []
    for key, value in fields.items():
        if key.endswith("_bytes") and value is not None:
            rows.append([key.removesuffix("_bytes").replace("_", " "), format_bytes(value)])
        elif value not in (None, "", (), [], {}):
            rows.append([key.replace("_", " "), _text(value)])
    return rows


def show_vendors(console: Console) -> None:
    """Show each vendor's environment: is it there, how large, which versions."""
    rows = []
    for name in formats.names_with_vendor():
        vendor = formats.get_vendor(name).VENDOR
        found = look(vendor)
        versions = {n: found.versions[n] for n in vendor.packages if n in found.versions}
        console.event("vendor", name=name, versions=versions, **_fields(found))
        tools = ", ".join(f"{package} {version}" for package, version in versions.items())
        rows.append([name, found.state, format_bytes(found.size_bytes), tools or vendor.title])
    console.table("", ["vendor", "state", "size", "tools"], rows)
    console.note(f"in {cache_folder()}; remove a folder there to free its space")


def setup_vendor(name: str, python: str | None, again: bool, console: Console) -> None:
    """Make a vendor's environment, or say that it is there; SettingsError for an unknown name."""
    if name not in formats.names_with_vendor():
        raise SettingsError(
            f"{name!r} is no vendor; allowed {', '.join(formats.names_with_vendor())}"
        )
    vendor = formats.get_vendor(name).VENDOR
    made = setup(vendor, console, python=python or sys.executable, again=again)
    found = look(vendor)
    console.event("vendor", name=name, **_fields(found))
    console.result(f"{vendor.title}: {made.folder}, {format_bytes(found.size_bytes)}")


def _fields(found: Found) -> dict[str, object]:
    return {"state": found.state, "folder": str(found.folder), "size_bytes": found.size_bytes}
