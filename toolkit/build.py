"""Build: plan -> convert -> check -> seal; nothing appears at its final path before."""

import platform
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

from toolkit import __version__, artifact, formats
from toolkit.artifact import SOURCE_TOKENIZER, Calibration, Manifest, Quality, Runtime, Source
from toolkit.check import run_checks
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.merged import find_adapter
from toolkit.console import Console, format_bytes
from toolkit.convert import convert
from toolkit.errors import ArtifactError, BuildError, PhishipError, PlanError
from toolkit.export import (
    LOCK_KEY,
    check_disk,
    check_memory,
    digest_vendor,
    open_exporter,
    run_export,
)
from toolkit.job import Building, Job, Options, Result
from toolkit.plan import Plan, make_plan, measure_tokenizer
from toolkit.quality.tokenizing import compare_folder
from toolkit.recipe import Recipe
from toolkit.report import Report
from toolkit.runner.tokenizing import FILE as TOKENIZER_FILE
from toolkit.staging import Staging, check_free_disk, stage

OTHER_MADE = "another plan, source or calibration text made it"


@dataclass(frozen=True)
class Made:
    """What the engine that wrote the files adds to the manifest."""

    tools: dict[str, str] = field(default_factory=dict)
    last_context: int | None = None
    notes: tuple[str, ...] = ()


def build(
    recipe: Recipe, checkpoint: Checkpoint, out: Path, options: Options, console: Console,
    report: Report,
) -> Path:  # fmt: skip
    """Build the artifact `out`/<recipe name> and return its path.

    An artifact already there is kept when plan, source and check are the same; otherwise
    ArtifactError unless `options.replace`. On any error nothing appears at the final path and the
    temporary folder is gone.
    """
    result = build_all([recipe], checkpoint, out, options, console, report)[recipe.name]
    if isinstance(result, PhishipError):
        raise result
    return result


def build_all(
    recipes: Sequence[Recipe], checkpoint: Checkpoint, out: Path, options: Options,
    console: Console, report: Report,
) -> dict[str, Result]:  # fmt: skip
    """Build several artifacts in one pass over the checkpoint; by name each one's path or error.

    What is there already is kept. One artifact's error does not stop the others.
    """
    building = Building(checkpoint, out, options, console, report, is_alone=len(recipes) == 1)
    jobs = [job for recipe in recipes if (job := _prepare(recipe, building))]
    with ExitStack() as stages:
        staged = {
            job.name: stages.enter_context(stage(building.out, job.name, job.key)) for job in jobs
        }
        fresh = [job for job in jobs if not staged[job.name].is_resumed]
        check_free_disk(out, sum(job.plan.artifact_bytes for job in fresh))
        native = [job for job in jobs if job.plan.recipe.engine == "native"]
        convert(native, staged, building)
        for job in jobs:
            if job.name not in building.results:
                with building.attempt(job.name):
                    building.results[job.name] = _finish(job, staged[job.name], building)
            staged[job.name].discard()
    return {recipe.name: building.results[recipe.name] for recipe in recipes}


def require_all(results: Mapping[str, Result]) -> None:
    """Raise when an artifact was not built: its own error, or one that counts several."""
    errors = {name: found for name, found in results.items() if isinstance(found, PhishipError)}
    if len(errors) > 1:
        reasons = "\n".join(f"{name}: {error}" for name, error in errors.items())
        raise BuildError(f"{len(errors)} of {len(results)} artifacts were not built:\n{reasons}")
    for error in errors.values():
        raise error


def _prepare(recipe: Recipe, building: Building) -> Job | None:
    """Plan an artifact; None when it is there already, or cannot be made."""
    with building.attempt(recipe.name):
        with building.report.step(building.step_name("plan", recipe.name)) as step:
            job = _plan(recipe, building)
            step.measured = f"{format_bytes(job.plan.artifact_bytes)} to write"
            if job.plan.adapter:
                step.measured += f", of them {format_bytes(job.plan.adapter_bytes)} for the adapter"
        if not (job.final.exists() and _is_same(job, building.options)):
            return _compare_tokens(job, building)
        with building.report.step(building.step_name("keep", recipe.name)) as step:
            step.measured = f"{job.final} is already this artifact"
            building.results[recipe.name] = job.final
    return None


def _compare_tokens(job: Job, building: Building) -> Job:
    """The job with how its engine's tokenizer compares, before anything else is done for it.

    A vendor's converter brings its own, which is compared when it is there.
    """
    if job.plan.recipe.engine == "vendor":
        return job
    with building.report.step(building.step_name("tokenizer", job.name)) as step:
        found = building.compare_tokens(job.plan.recipe)
        step.measured = str(found)
    return replace(job, tokens=found)


def _compare_made(job: Job, folder: Path, building: Building) -> Job:
    """The same of a vendor's artifact; unchecked it is what the vendor makes."""
    if not building.options.check:
        return job
    with building.report.step(building.step_name("tokenizer", job.name)) as step:
        found = compare_folder(
            job.plan.recipe.format, folder, job.plan.decoder, building.checkpoint, job.chat
        )
        step.measured = str(found)
    return replace(job, tokens=found)


def _plan(recipe: Recipe, building: Building) -> Job:
    checkpoint, options = building.checkpoint, building.options
    if options.accept_kl is not None:
        recipe = recipe.with_limit(options.accept_kl)
    plan = make_plan(
        recipe, building.decoder, context_length=options.context_length, workers=options.workers,
        memory_bytes=options.memory_bytes, tokenizer_bytes=measure_tokenizer(checkpoint),
        adapter=find_adapter(checkpoint),
    )  # fmt: skip
    _check_gate_memory(plan, options)
    _check_adapter(recipe, checkpoint)
    source = Source(
        model=recipe.model, revision=checkpoint.revision, digest=building.digest,
        adapter=checkpoint.adapter_digest,
    )  # fmt: skip
    quantization = recipe.quantization
    text = None
    if quantization.is_calibrated:
        text = building.read_calibration(quantization.calibration_tokens)
    final = building.out / recipe.name
    return Job(plan, source, building.chat, final, text, building.vision)


def _check_adapter(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """PlanError where an adapter would be left out."""
    if recipe.adapter and not checkpoint.adapter_digest:
        raise PlanError(
            f"{recipe.name}: adapter: {recipe.adapter} does not come with the checkpoint",
            advice="`phiship build` and `ship` read it",
        )


def _check_gate_memory(plan: Plan, options: Options) -> None:
    budget = options.memory_bytes
    if options.check and budget is not None and plan.gate_memory_bytes > budget:
        raise PlanError(
            f"--memory {format_bytes(budget)}: the gate loads the artifact, which takes "
            f"{format_bytes(plan.gate_memory_bytes)}",
            advice="give more --memory, or --no-check to seal the artifact as unchecked",
        )


def _is_same(job: Job, options: Options) -> bool:
    """True when the artifact there is what would be built; ArtifactError when it is not."""
    try:
        found = artifact.read_manifest(job.final)
    except ArtifactError:
        found = None
    made = found and (found.plan_digest, found.source, _digest(found.calibration))
    if found and made == (job.plan.digest, job.source, _digest(job.calibration)):
        if not _has_same_vendor(found, job.plan.recipe):
            difference = "another version of the vendor's tools made it"
        elif found.quality.checked and found.limits != job.plan.limits:
            difference = "it was checked against other limits"
        elif found.quality.checked or not options.check:
            return True
        else:
            difference = "it was sealed without its check"
    elif found:
        difference = _tell_other(found.source, job.source)
    else:
        difference = "it is not a sealed artifact"
    if options.replace:
        return False
    raise ArtifactError(
        f"{job.final} exists and differs: {difference}",
        advice="choose another --out or remove it, as `phiship build --replace` does",
    )


def _tell_other(found: Source, wanted: Source) -> str:
    """Why an artifact is not what would be built; two adapters make artifacts of one name."""
    if found.adapter == wanted.adapter:
        return OTHER_MADE
    if not (found.adapter and wanted.adapter):
        return f"it was made {'with' if found.adapter else 'without'} an adapter"
    return "it was made with another adapter"


def _digest(calibration: Calibration | None) -> str:
    """What of a calibration text decides the codes: its ids, whatever the file is called."""
    return calibration.digest if calibration else ""


def _has_same_vendor(found: Manifest, recipe: Recipe) -> bool:
    """False when the vendor's pinned tools are others than those that made the artifact."""
    if recipe.engine == "native":
        return True
    return found.tools.get(LOCK_KEY) == digest_vendor(recipe.format)


def _finish(job: Job, staging: Staging, building: Building) -> Path:
    """Write the other files (a vendor's engine: all), check, seal and publish."""
    plan, report, options = job.plan, building.report, building.options
    made = Made()
    if plan.recipe.engine == "vendor":
        made = _export(job, staging.folder, building)
        job = _compare_made(job, staging.folder, building)
    else:
        with report.step(building.step_name("files", job.name)):
            formats.get(plan.recipe.format).write_rest(
                staging.folder, plan.recipe, plan.decoder, building.checkpoint, plan.context_length
            )
            made = Made(notes=_write_chat(job, staging.folder))
    if job.tokenizer == SOURCE_TOKENIZER:
        content = building.checkpoint.tokenizer_contents()[TOKENIZER_FILE]
        (staging.folder / TOKENIZER_FILE).write_bytes(content)
        job = replace(job, tokenizer_bytes=len(content))
    gate = "gate" if options.check else "gate (token ids only)"
    with report.step(building.step_name(gate, job.name)) as step:
        quality = run_checks(
            staging.folder, plan, building.checkpoint, job.chat, options.check, building.console,
            step, job.tokenizer,
        )  # fmt: skip
    with report.step(building.step_name("seal", job.name)) as step:
        sealed = staging.publish(_describe(job, made, quality), building.console)
        step.measured = f"{len(sealed.files)} files, {format_bytes(sealed.size_bytes)}"
    return job.final


def _write_chat(job: Job, folder: Path) -> tuple[str, ...]:
    """Have the format tell other programs of the chat; returns what is to be known of it."""
    notes = formats.get(job.plan.recipe.format).write_chat(
        folder, job.name, job.chat, job.plan.context_length
    )
    if job.chat.template is None:
        return notes
    why = job.chat.template.why
    return (f"the device renders the chat template with jinja2, for data cannot: {why}", *notes)


def _export(job: Job, folder: Path, building: Building) -> Made:
    """Have the vendor's converter write the artifact's files."""
    options = building.options
    with open_exporter(job.plan, building.checkpoint, folder) as exporter:
        log = building.out / f"{job.name}.vendor.log"
        with building.report.step(building.step_name("export", job.name)) as step:
            check_memory(exporter, options.memory_bytes, options.force_memory)
            check_disk(exporter, job.plan)
            cost = run_export(exporter, log, building.console)
            step.measured = (
                f"{exporter.vendor.title}: {cost.cpu_s:.1f} s of CPU, "
                f"{format_bytes(cost.peak_memory_bytes)} of memory; its log: {log}"
            )
        return Made(exporter.tools, exporter.export.last_context, exporter.export.notes)


def _describe(job: Job, made: Made, quality: Quality) -> Manifest:
    """The manifest, but for the list of files."""
    plan, recipe, needs = job.plan, job.plan.recipe, job.plan.needs
    first, last = needs.valid_context
    return Manifest(
        schema=artifact.SCHEMA,
        name=recipe.name,
        format=recipe.format,
        plan_digest=plan.digest,
        plan=recipe.settings(),
        source=job.source,
        tools={**_tool_versions(recipe.format), **made.tools},
        runtime=Runtime(
            engine=needs.engine,
            provider=needs.provider,
            package=needs.package,
            version=_version(needs.package.removesuffix("-cuda")),
            main_file=needs.main_file,
            properties=dict(needs.properties),
            companions=job.companions,
            tokenizer=job.tokenizer,
        ),
        context_length=plan.context_length,
        valid_context=(first, last if made.last_context is None else min(last, made.last_context)),
        device_memory_bytes=job.device_memory_bytes,
        chat=job.chat,
        limits=plan.limits,
        smoke=recipe.smoke,
        quality=quality,
        files=(),
        notes=job.notes + made.notes,
        calibration=job.calibration,
        vision=job.vision,
    )


def _tool_versions(format_name: str) -> dict[str, str]:
    packages = ("numpy", *formats.get(format_name).PACKAGES)
    found = {name: _version(name) for name in packages}
    return {"phiship": __version__, "python": platform.python_version(), **found}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def raise_on_sigterm() -> None:
    """Let SIGTERM end a command as Ctrl-C does, so that temporary folders go."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if sys.platform != "win32":
        signal.signal(signal.SIGTERM, interrupt)
