"""Check: an artifact against its source, in its own runtime."""

from pathlib import Path

import msgspec

from toolkit import __version__, artifact, catalog, formats
from toolkit.artifact import Chat, Manifest, Quality
from toolkit.checkpoint import LOCAL_REVISION, Checkpoint
from toolkit.console import Console, format_bytes
from toolkit.errors import ArtifactError, CheckpointError
from toolkit.families import read_decoder
from toolkit.plan import Plan, make_plan
from toolkit.quality.gate import FailedGateError, run_gate
from toolkit.recipe import Recipe
from toolkit.report import Report, Step
from toolkit.source import open_source


def check_artifact(
    folder: Path, reference: str | None, console: Console, report: Report
) -> Quality:
    """Verify a sealed artifact's files and run the gate on it; GateError when it fails."""
    manifest = artifact.read_manifest(folder)
    with report.step("files") as step:
        with console.progress("verify", manifest.size_bytes) as advance:
            artifact.verify_files(folder, manifest.files, advance)
        step.measured = f"{len(manifest.files)} files, {format_bytes(manifest.size_bytes)}"
    recipe = _recipe_of(manifest, folder)
    with report.step("source") as step:
        checkpoint = open_source(reference or _source_of(manifest), console)
        decoder = read_decoder(checkpoint.config)
        checkpoint.check(decoder)
        if checkpoint.fingerprint() != manifest.source.digest:
            raise CheckpointError(
                f"{checkpoint.folder}: not the checkpoint that {folder} was made from "
                f"(its digest is not {manifest.source.digest[:12]}...)"
            )
        step.measured = str(checkpoint.folder)
    with report.step("gate") as step:
        plan = make_plan(recipe, decoder, context_length=manifest.context_length)
        return run_checks(folder, plan, checkpoint, manifest.chat, True, console, step)


def _source_of(manifest: Manifest) -> str:
    model = catalog.load_model(manifest.source.model)
    if manifest.source.revision == LOCAL_REVISION:
        raise CheckpointError(
            f"{manifest.name} was made from a local folder, which its manifest does not name",
            advice="give it with --checkpoint DIR",
        )
    return f"{model.id}@{manifest.source.revision}"


def _recipe_of(manifest: Manifest, folder: Path) -> Recipe:
    """The recipe as the manifest records it, so that a later edit of the file changes nothing."""
    if not manifest.plan:
        raise ArtifactError(
            f"{folder}: it was adopted: no recipe says how it was made",
            advice="compare it with its source: phiship adopt SOURCE --checkpoint CHECKPOINT",
        )
    kind = formats.get(manifest.format).RECIPE
    fields = {**manifest.plan, "name": manifest.name, "title": manifest.name}
    try:
        recipe: Recipe = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise ArtifactError(
            f"{folder}: phiship {manifest.tools.get('phiship', '?')} made it, by a recipe that "
            f"phiship {__version__} does not know: {error}",
            advice="build the artifact again, or check it with the version that made it",
        ) from error
    return msgspec.structs.replace(recipe, check=manifest.limits, smoke=manifest.smoke)


def run_checks(
    folder: Path, plan: Plan, checkpoint: Checkpoint, chat: Chat, check_logits: bool,
    console: Console, step: Step,
) -> Quality:  # fmt: skip
    """Run the gate and note in `step` what was measured, also when it fails."""
    recipe, decoder = plan.recipe, plan.decoder
    decoder = decoder.with_long_rope() if plan.needs.always_long_rope else decoder
    session = formats.get(recipe.format).open_session(folder)
    try:
        quality = run_gate(
            session, checkpoint, decoder, chat, recipe.check,
            check_logits=check_logits, smoke=recipe.smoke, console=console,
            context_length=plan.context_length,
            # Unchecked, a vendor's artifact is what the vendor makes; parity says how it differs.
            check_tokens=check_logits or recipe.engine == "native",
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
