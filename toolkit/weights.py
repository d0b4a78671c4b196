"""Weights: an artifact's quantization apart from its runtime, as a whole and matrix by matrix."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from toolkit import catalog
from toolkit.artifact import Measure, Quality, read_manifest
from toolkit.check import Asked, Opened, open_artifact
from toolkit.checkpoint.config import Config
from toolkit.console import Console
from toolkit.errors import ArtifactError
from toolkit.families import read_decoder
from toolkit.quality import sensitivity, weightonly
from toolkit.quality.details import TensorError, make_details, read_details, write_details
from toolkit.quality.folding import unfold
from toolkit.quality.measures import Comparison
from toolkit.quality.sensitivity import Sensitivity
from toolkit.quality.showing import show_measures
from toolkit.quality.tokens import read_tokenizer, split_text
from toolkit.quality.weightonly import Read, open_reader
from toolkit.report import Report

# Tokens on which every matrix is measured alone: so many variants of them are carried along.
TABLE_TOKENS = 128
SHOWN_MATRICES = 15
RUNTIME = "weights alone (reference)"


def check_weights(
    folder: Path, reference: str | None, console: Console, report: Report, asked: Asked
) -> Sensitivity:
    """Measure an artifact's weights on a text without its runtime; shows all, judges nothing.

    Into a details file of the same artifact on the same text, as `check` writes it, go the matrices
    alone.
    """
    _refuse_experts(read_manifest(folder).source.model)
    opened = open_artifact(folder, reference, console, report, asked)
    with report.step("weights") as step:
        try:
            found = _compare(opened)
        except ValueError as error:
            raise ArtifactError(f"{folder}: {error}", advice="build the artifact again") from error
        step.measured = f"mean KL {found.mean_kl:.3g}\ntop-1 agreement {found.top1:.3g}"
    with report.step("matrices") as step:
        table = _measure(opened)
        worst = table.worst[0]
        step.measured = f"{worst.name} costs most, {worst.kl:.3g} of {table.whole_kl:.3g}"
    _show(opened, found, table)
    if asked.details:
        _write(asked.details, opened, found, table)
    return table


def _refuse_experts(name: str) -> None:
    """PlanError for a bundled model with experts, before gigabytes are read; others show later."""
    if name in catalog.names("models"):
        model = catalog.load_model(name)
        sensitivity.check_experts(read_decoder(Config(model.name, model.config)))


def _open_reader(opened: Opened) -> Read:
    """The artifact's tensors; the vendor's converter has its own names for them."""
    plan = opened.plan
    return open_reader(plan.recipe.format, plan.recipe.engine, opened.folder, plan.decoder)


def _compare(opened: Opened) -> Comparison:
    """The measures of `check`, with the artifact's weights in the reference forward."""
    sequences = opened.compared.sequences
    source = opened.read_source(sequences, opened.plan.source_decoder)
    with opened.console.waiting("reading the text with the artifact's weights"):
        return weightonly.compare(_open_reader(opened), source, sequences)


def _measure(opened: Opened) -> Sensitivity:
    """What each matrix costs alone; what equalization folded in is undone for that."""
    checkpoint, decoder = opened.checkpoint, opened.plan.source_decoder
    text = opened.compared
    length = min(text.length, TABLE_TOKENS)
    sequences = [ids[:length] for ids in text.sequences[: TABLE_TOKENS // length]]
    total_bytes = sensitivity.bytes_to_read(checkpoint, decoder, length * len(sequences))
    read = _open_reader(opened)
    if opened.plan.recipe.quantization.equalize:
        read = unfold(read, checkpoint, decoder)
    with opened.console.progress("measuring every matrix", total_bytes) as advance:
        return sensitivity.measure(
            checkpoint, decoder, read, sequences,
            bits=sensitivity.measure_bits(opened.plan.data), advance=advance,
        )  # fmt: skip


def _show(opened: Opened, found: Comparison, table: Sensitivity) -> None:
    measured = tuple(
        Measure(name=name, value=one.value, limit=None, ok=True, error=one.error)
        for name, one in found.summarize().items()
    )
    quality = Quality(checked=False, runtime=RUNTIME, measures=measured)
    name, console = opened.manifest.name, opened.console
    console.event("weights", **msgspec.to_builtins(quality))
    title = f"{name}: weights alone, on {len(found.kl)} tokens of {opened.text.name}"
    show_measures(title, quality, console)
    for error in table.errors:
        console.event("matrix", **msgspec.to_builtins(error))
    total = sum(error.kl or 0.0 for error in table.errors)
    rows = [_describe(error, total) for error in table.worst[:SHOWN_MATRICES]]
    headers = ["matrix", "bits", "relative error", "KL alone", "share"]
    title = f"what each matrix costs alone, on {table.tokens} tokens"
    if len(table.errors) > SHOWN_MATRICES:
        title += f": the worst {SHOWN_MATRICES} of {len(table.errors)}"
    console.table(title, headers, rows)


def _describe(error: TensorError, total: float) -> Sequence[str]:
    kl, bits = error.kl or 0.0, "" if error.bits is None else f"{error.bits:.3g}"
    share = f"{kl / total:.1%}" if total else ""
    name = error.name.removesuffix(".weight")
    return [name, bits, f"{error.relative_error:.2e}", f"{kl:.2e}", share]


def _write(path: Path, opened: Opened, found: Comparison, table: Sensitivity) -> None:
    """Write all, or the matrices alone into what `check` wrote of the artifact in its runtime."""
    text, digest = opened.compared, opened.manifest_digest
    details = read_details(path, digest, text.digest)
    if details is None or details.runtime == RUNTIME:
        tokenizer = read_tokenizer(opened.checkpoint)
        texts = [split_text(tokenizer, ids) for ids in text.sequences]
        details = make_details(opened.manifest, digest, RUNTIME, text, found, texts, ())
    write_details(path, msgspec.structs.replace(details, tensors=table.errors))
