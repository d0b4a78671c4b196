"""Build: plan -> convert -> gate -> seal, in a temporary folder that one rename publishes."""

import os
import platform
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

from toolkit import __version__, artifact, catalog, fileio, formats
from toolkit.artifact import Chat, Manifest, Quality, Runtime, Source
from toolkit.checkpoint import LOCAL_REVISION, Checkpoint
from toolkit.checkpoint.hub import resolve
from toolkit.console import Console, format_bytes
from toolkit.decoder import Decoder
from toolkit.errors import ArtifactError, BuildError, CheckpointError, PlanError
from toolkit.families import read_decoder
from toolkit.plan import Plan, make_plan, measure_rest
from toolkit.quality.chat import read_chat
from toolkit.quality.gate import FailedGateError, run_gate
from toolkit.recipe import Recipe
from toolkit.report import Report, Step
from toolkit.stream import stream


@dataclass(frozen=True)
class Options:
    """How to build; nothing here changes the artifact's bytes but `context_length`."""

    context_length: int | None = None
    workers: int | None = None
    memory_bytes: int | None = None
    check: bool = True
    replace: bool = False


def open_checked(reference: str, console: Console) -> Checkpoint:
    """Open a folder or fetch a Hugging Face id; what cannot be built is refused before a fetch."""
    return resolve(reference, console, accept=read_decoder)


def build(
    recipe: Recipe, checkpoint: Checkpoint, out: Path, options: Options, console: Console,
    report: Report,
) -> Path:  # fmt: skip
    """Build the artifact `out`/<recipe name> and return its path.

    An artifact already there is kept when plan, source and check are the same; otherwise
    ArtifactError unless `options.replace`. On any error nothing appears at the final path and the
    temporary folder is gone.
    """
    with report.step("plan") as step:
        decoder = read_decoder(checkpoint.config)
        checkpoint.check(decoder)
        plan = make_plan(
            recipe, decoder, context_length=options.context_length, workers=options.workers,
            memory_bytes=options.memory_bytes,
            rest_bytes=measure_rest(checkpoint),
        )  # fmt: skip
        _check_gate_memory(plan, options)
        chat = read_chat(checkpoint)
        source = Source(
            model=recipe.model, revision=checkpoint.revision, digest=checkpoint.fingerprint()
        )
        step.measured = f"{format_bytes(plan.artifact_bytes)} to write"
    final = out / recipe.name
    if final.exists() and _is_same(final, plan, source, options):
        with report.step("keep") as step:
            step.measured = f"{final} is already this artifact"
        return final
    _check_free_disk(out, plan)
    with _temporary(out, recipe.name) as folder:
        _convert(plan, checkpoint, folder, console, report)
        manifest = _check_and_describe(
            plan, checkpoint, source, chat, folder, options, console, report
        )
        with report.step("seal") as step:
            sealed = msgspec.structs.replace(manifest, files=_sync_and_list(folder, console))
            artifact.write_manifest(folder, sealed)
            _publish(folder, final)
            step.measured = f"{len(sealed.files)} files, {format_bytes(sealed.size_bytes)}"
    return final


def _check_gate_memory(plan: Plan, options: Options) -> None:
    budget = options.memory_bytes
    if options.check and budget is not None and plan.gate_memory_bytes > budget:
        raise PlanError(
            f"--memory {format_bytes(budget)}: the gate loads the artifact, which takes "
            f"{format_bytes(plan.gate_memory_bytes)}",
            advice="give more --memory, or --no-check to seal the artifact as unchecked",
        )


def _convert(
    plan: Plan, checkpoint: Checkpoint, folder: Path, console: Console, report: Report
) -> None:
    recipe, decoder = plan.recipe, plan.decoder
    module = formats.get(recipe.format)
    read_bytes = sum(
        piece.weights * checkpoint.tensors[piece.tensor].item_bytes for piece in plan.data.pieces
    )
    cpu_before_s = _cpu_seconds()
    with report.step("convert") as step:
        header = module.header_bytes(recipe, decoder, checkpoint)
        path = folder / plan.data.name
        fileio.reserve(path, len(header) + plan.data.size_bytes)
        fileio.write_start(path, header)
        with console.progress(f"convert {recipe.name}", read_bytes) as advance:
            stream(checkpoint, plan.data, path, len(header), plan.workers, advance)
        module.write_rest(folder, recipe, decoder, checkpoint, plan.context_length)
        spent_s = _cpu_seconds() - cpu_before_s
        step.measured = f"{format_bytes(read_bytes)} read, {spent_s:.1f} s of CPU"


def _check_and_describe(
    plan: Plan, checkpoint: Checkpoint, source: Source, chat: Chat, folder: Path,
    options: Options, console: Console, report: Report,
) -> Manifest:  # fmt: skip
    recipe, needs = plan.recipe, plan.needs
    with report.step("gate" if options.check else "gate (token ids only)") as step:
        quality = _gate(
            folder, recipe, plan.decoder, checkpoint, chat, plan.context_length, options.check,
            console, step,
        )  # fmt: skip
    return Manifest(
        schema=artifact.SCHEMA,
        name=recipe.name,
        format=recipe.format,
        plan_digest=plan.digest,
        plan=recipe.settings(),
        source=source,
        tools=_tool_versions(recipe.format),
        runtime=Runtime(
            engine=needs.engine,
            provider=needs.provider,
            package=needs.package,
            version=_version(needs.package.removesuffix("-cuda")),
            main_file=needs.main_file,
        ),
        context_length=plan.context_length,
        valid_context=needs.valid_context,
        device_memory_bytes=plan.device_memory_bytes,
        chat=chat,
        limits=recipe.check,
        smoke=recipe.smoke,
        quality=quality,
        files=(),
        notes=needs.notes,
    )


def check_artifact(
    folder: Path, reference: str | None, console: Console, report: Report
) -> Quality:
    """Verify a sealed artifact's files and run the gate on it; GateError when it fails."""
    manifest = artifact.read_manifest(folder)
    with report.step("files") as step:
        with console.progress("verify", manifest.size_bytes) as advance:
            artifact.verify_files(folder, manifest.files, advance)
        step.measured = f"{len(manifest.files)} files, {format_bytes(manifest.size_bytes)}"
    recipe = _recipe_of(manifest)
    with report.step("source") as step:
        checkpoint = open_checked(reference or _source_of(manifest), console)
        decoder = read_decoder(checkpoint.config)
        checkpoint.check(decoder)
        if checkpoint.fingerprint() != manifest.source.digest:
            raise CheckpointError(
                f"{checkpoint.folder}: not the checkpoint that {folder} was made from "
                f"(its digest is not {manifest.source.digest[:12]}...)"
            )
        step.measured = str(checkpoint.folder)
    with report.step("gate") as step:
        return _gate(
            folder, recipe, decoder, checkpoint, manifest.chat, manifest.context_length, True,
            console, step,
        )  # fmt: skip


def _source_of(manifest: Manifest) -> str:
    model = catalog.load_model(manifest.source.model)
    if manifest.source.revision == LOCAL_REVISION:
        raise CheckpointError(
            f"{manifest.name} was made from a local folder, which its manifest does not name",
            advice="give it with --checkpoint DIR",
        )
    return f"{model.id}@{manifest.source.revision}"


def _recipe_of(manifest: Manifest) -> Recipe:
    """The recipe as the manifest records it, so that a later edit of the file changes nothing."""
    kind = formats.get(manifest.format).RECIPE
    fields = {**manifest.plan, "name": manifest.name, "title": manifest.name}
    recipe: Recipe = msgspec.convert(fields, kind)
    return msgspec.structs.replace(recipe, check=manifest.limits, smoke=manifest.smoke)


def _gate(
    folder: Path, recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint, chat: Chat,
    context_length: int, check_logits: bool, console: Console, step: Step,
) -> Quality:  # fmt: skip
    """Run the gate and note in `step` what was measured, also when it fails."""
    session = formats.get(recipe.format).open_session(folder)
    try:
        quality = run_gate(
            session, checkpoint, decoder, chat, recipe.check,
            check_logits=check_logits, smoke=recipe.smoke, console=console,
            context_length=context_length,
        )  # fmt: skip
    except FailedGateError as error:
        _note(step, error.quality, console)
        raise
    finally:
        session.close()
    _note(step, quality, console)
    return quality


def _note(step: Step, quality: Quality, console: Console) -> None:
    limited = [measure for measure in quality.measures if measure.limit is not None]
    step.measured = "\n".join(f"{measure.name} {measure.value:.3g}" for measure in limited)
    step.limit = "\n".join(f"{measure.limit:g}" for measure in limited)
    console.event("quality", **msgspec.to_builtins(quality))


def _is_same(final: Path, plan: Plan, source: Source, options: Options) -> bool:
    """True when the artifact at `final` is what would be built; ArtifactError when it is not."""
    try:
        found = artifact.read_manifest(final)
    except ArtifactError:
        found = None
    if found and (found.plan_digest, found.source) == (plan.digest, source):
        if found.quality.checked or not options.check:
            return True
        difference = "it was sealed without its check"
    else:
        difference = "another plan or source made it" if found else "it is not a sealed artifact"
    if options.replace:
        return False
    raise ArtifactError(
        f"{final} exists and differs: {difference}",
        advice="choose another --out, remove it, or give --replace",
    )


def _check_free_disk(out: Path, plan: Plan) -> None:
    out.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(out).free
    if free_bytes < plan.artifact_bytes:
        raise BuildError(
            f"{out}: {format_bytes(free_bytes)} free; the artifact takes "
            f"{format_bytes(plan.artifact_bytes)}",
            advice="free space or choose another --out",
        )


@contextmanager
def _temporary(out: Path, name: str) -> Iterator[Path]:
    """A folder beside the final one, gone again however the block ends; clears dead builds'."""
    for stale in out.glob(f".{name}.*.partial"):
        pid = stale.name.split(".")[-2]
        if not (pid.isdigit() and psutil.pid_exists(int(pid))):
            shutil.rmtree(stale, ignore_errors=True)
    folder = out / f".{name}.{os.getpid()}.partial"
    folder.mkdir()
    try:
        yield folder
    except OSError as error:
        raise fileio.explain_write_error(error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync_and_list(folder: Path, console: Console) -> tuple[artifact.File, ...]:
    """Make the content durable and hash it."""
    paths = artifact.content_paths(folder)
    with console.progress("seal", sum(path.stat().st_size for path in paths)) as advance:
        for path in paths:
            fileio.sync(path)
        return artifact.list_files(folder, advance)


def _publish(folder: Path, final: Path) -> None:
    """Move the sealed folder to its final path; an artifact to replace steps aside first."""
    fileio.sync_folder(folder)
    aside = final.with_name(f".{final.name}.{os.getpid()}.old.partial")
    if final.exists():
        final.rename(aside)
    folder.rename(final)
    fileio.sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _tool_versions(format_name: str) -> dict[str, str]:
    packages = ("numpy", *formats.get(format_name).PACKAGES)
    found = {name: _version(name) for name in packages}
    return {"phiship": __version__, "python": platform.python_version(), **found}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def raise_on_sigterm() -> None:
    """Let SIGTERM end a command as Ctrl-C does, so that temporary folders go."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if sys.platform != "win32":
        signal.signal(signal.SIGTERM, interrupt)
