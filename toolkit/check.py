"""Check: an artifact against its source, in its own runtime."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from toolkit import __version__, artifact, catalog, formats
from toolkit.artifact import ENGINE_TOKENIZER, Chat, Manifest, Quality, Source
from toolkit.checkpoint import LOCAL_REVISION, Checkpoint
from toolkit.checkpoint.merged import find_adapter
from toolkit.console import Console, format_bytes
from toolkit.decoder import Decoder
from toolkit.errors import (
    ArtifactError,
    CheckpointError,
    GateError,
    PhishipError,
    PlanError,
    SettingsError,
)
from toolkit.families import read_decoder
from toolkit.formats import Session
from toolkit.plan import Plan, make_plan
from toolkit.quality import agreement, comparing
from toolkit.quality.details import Details, Range, make_details, read_details, write_details
from toolkit.quality.folding import unfold
from toolkit.quality.gate import FailedGateError, run_gate
from toolkit.quality.measures import Comparison
from toolkit.quality.showing import show_measures, show_ranges
from toolkit.quality.texts import LEAST_TOKENS, Text, digest_ids, read_text
from toolkit.quality.tokenizing import Encode, choose_encode, tell_tokenizer
from toolkit.quality.tokens import read_tokenizer, split_text
from toolkit.quality.weightonly import Read, open_reader
from toolkit.recipe import Recipe
from toolkit.report import Report, Step
from toolkit.source import open_source

DEFAULT_TOKENS = 2048
DEFAULT_LENGTH = 512
# Behind the digest of a text that the source has read with LongRoPE's long factors though it is
# short: what was measured there does not compare with what the source as it is would show.
LONG_ROPE_MARK = "-long-rope"
UNTOUCHED = "its folder is as it was; the limits are those of the recipe that made it"


@dataclass(frozen=True)
class Asked:
    """What to compare on: a text (None: Python's manual), its tokens, how long a sequence is.

    `details` is a file to write everything to. `adapter` is merged into the checkpoint, as it was
    when the artifact was built.
    """

    text: Path | None = None
    tokens: int = DEFAULT_TOKENS
    length: int | None = None
    details: Path | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class Opened:
    """A sealed artifact whose files are whole, the checkpoint it was made of, a text for both."""

    folder: Path
    manifest: Manifest
    plan: Plan
    checkpoint: Checkpoint
    text: Text
    console: Console

    @property
    def compared(self) -> Text:
        """The text as far as the manifest says that the artifact agrees with its source."""
        last, decoder = self.manifest.valid_context[1], self.plan.decoder
        sequences = tuple(ids[:last] for ids in self.text.sequences)
        rope = decoder.rope
        is_short = rope.is_long and len(sequences[0]) <= rope.original_context
        is_other = is_short and self.plan.source_decoder != decoder
        digest = digest_ids(sequences) + (LONG_ROPE_MARK if is_other else "")
        return Text(self.text.name, digest, sequences)

    def read_source(self, sequences: comparing.Sequences, decoder: Decoder) -> comparing.Source:
        """Have the checkpoint read sequences, as such an architecture."""
        return comparing.read_source(self.checkpoint, decoder, sequences, self.console)

    @property
    def manifest_digest(self) -> str:
        """Hex sha256 of manifest.json: which build this is."""
        return artifact.hash_file(self.folder / artifact.MANIFEST)


def open_artifact(
    folder: Path, reference: str | None, console: Console, report: Report, asked: Asked
) -> Opened:
    """Verify a sealed artifact's files, and open its source and the text that is asked for."""
    manifest = artifact.read_manifest(folder)
    _check_paths(asked)
    with report.step("files") as step:
        with console.progress("verify", manifest.size_bytes) as advance:
            artifact.verify_files(folder, manifest.files, advance)
        step.measured = f"{len(manifest.files)} files, {format_bytes(manifest.size_bytes)}"
    recipe = _recipe_of(manifest, folder)
    with report.step("source") as step:
        if manifest.source.adapter and asked.adapter is None:
            raise CheckpointError(
                f"{manifest.name} was made with a LoRA adapter",
                advice="give it with --adapter DIR",
            )
        checkpoint = open_source(reference or _source_of(manifest), console, asked.adapter)
        decoder = read_decoder(checkpoint.config)
        checkpoint.check(decoder)
        _check_source(checkpoint, manifest.source, folder, asked.adapter)
        step.measured = str(checkpoint.folder)
    plan = make_plan(
        recipe, decoder, context_length=manifest.context_length, adapter=find_adapter(checkpoint)
    )
    with report.step("text") as step:
        text = _read_text(manifest, checkpoint, decoder, asked)
        step.measured = f"{text.name}: {len(text.sequences)} x {text.length} tokens"
        console.event("text", name=text.name, digest=text.digest, tokens=text.count)
    return Opened(folder, manifest, plan, checkpoint, text, console)


def _check_paths(asked: Asked) -> None:
    """SettingsError for a path that cannot be, before the artifact's files are read."""
    if asked.text and not asked.text.exists():
        raise SettingsError(f"--text {asked.text}: is not there", advice="give a text's path")
    if asked.details and not asked.details.absolute().parent.is_dir():
        raise SettingsError(f"--details {asked.details}: its folder is not there")


def _check_source(checkpoint: Checkpoint, made: Source, folder: Path, adapter: Path | None) -> None:
    """CheckpointError for another checkpoint, or another adapter, than the artifact was made of."""
    if checkpoint.adapter_digest != made.adapter:
        how = f"not the adapter that {folder} was made with"
        raise CheckpointError(
            f"{adapter}: {how if made.adapter else f'{folder} was made without an adapter'}"
        )
    if checkpoint.fingerprint() != made.digest:
        raise CheckpointError(
            f"{checkpoint.folder}: not the checkpoint that {folder} was made from "
            f"(its digest is not {made.digest[:12]}...)"
        )


def check_artifact(
    folder: Path, reference: str | None, console: Console, report: Report,
    asked: Asked = Asked(),
) -> Quality:  # fmt: skip
    """Verify a sealed artifact's files and measure it on a text; GateError when it fails."""
    opened = open_artifact(folder, reference, console, report, asked)
    with report.step("tokenizer") as step:
        step.measured = tell_tokenizer(opened.manifest.runtime.tokenizer)
    session = _open_session(folder, opened.plan)
    try:
        return _measure(_Reading(opened, session), report, asked.details)
    finally:
        session.close()


def _read_text(manifest: Manifest, checkpoint: Checkpoint, decoder: Decoder, asked: Asked) -> Text:
    """The text in sequences that the artifact can take; PlanError when it cannot."""
    # Runtimes want room for the token that would follow.
    most = manifest.context_length - 1
    if asked.length is not None and not LEAST_TOKENS <= asked.length <= most:
        raise PlanError(
            f"--length: got {asked.length}; {manifest.name} has a context of "
            f"{manifest.context_length} tokens: allowed {LEAST_TOKENS} to {most}"
        )
    length = asked.length or min(choose_length(decoder), most, manifest.valid_context[1])
    return read_text(
        checkpoint, manifest.chat, "evaluation", path=asked.text, tokens=asked.tokens,
        length=length,
    )  # fmt: skip


def choose_length(decoder: Decoder) -> int:
    """Tokens of a sequence unless others are asked for: half of them beyond local blocks."""
    return max(DEFAULT_LENGTH, 2 * decoder.sparse.local_tokens if decoder.sparse else 0)


@dataclass(frozen=True)
class _Reading:
    """An artifact in its runtime and its source, on one text; each length is read once."""

    opened: Opened
    session: Session
    known: dict[int, Comparison] = field(default_factory=dict)

    def compare(self) -> Comparison:
        """Compare the text as far as the manifest says that they agree."""
        text = self.opened.compared
        self.known[text.length] = self._compare(self.opened.plan.source_decoder, text.sequences)
        return self.found

    @property
    def found(self) -> Comparison:
        """What `compare` found."""
        return self.known[self.opened.compared.length]

    def compare_cut(self, length: int) -> Comparison:
        """Compare sequences cut at so many tokens."""
        if length not in self.known:
            cut = [ids[:length] for ids in self.opened.text.sequences]
            self.known[length] = self._compare(self.opened.plan.decoder, cut)
        return self.known[length]

    def _compare(self, decoder: Decoder, sequences: comparing.Sequences) -> Comparison:
        source = self.opened.read_source(sequences, decoder)
        return comparing.compare(self.session, source, sequences, self.opened.console)


def _measure(reading: _Reading, report: Report, path: Path | None) -> Quality:
    """Run the gate, look at lengths, show and write what was measured; fail only then.

    A missed limit comes before whatever else fails.
    """
    opened, errors = reading.opened, list[PhishipError]()
    tokenizer = opened.manifest.runtime.tokenizer
    encode = choose_encode(tokenizer, opened.folder, reading.session.encode)
    read = open_own_weights(opened.folder, opened.plan, opened.checkpoint)
    try:
        with report.step("gate") as step:
            quality = _run_gate(
                reading.session, opened.plan, opened.checkpoint, opened.manifest.chat, True,
                opened.console, step, encode, read, reading.compare,
            )  # fmt: skip
    except FailedGateError as error:
        quality, error.advice = error.quality, UNTOUCHED
        errors.append(error)
    if reading.known:
        title = f"{opened.manifest.name} on {len(reading.found.kl)} tokens of {opened.text.name}"
        show_measures(title, quality, opened.console)
        details = _make_details(reading, path) if path else None
        unwritten = _write(path, details)  # before lengths are read, which takes a while
        try:
            if ranges := _find_ranges(reading):
                show_ranges(ranges, opened.console)
                unwritten = _write(path, details, ranges)
            if ranges and not errors:
                _judge_ranges(ranges, opened.manifest, report)
        except PhishipError as error:
            errors.append(error)
        errors += [unwritten] if unwritten else []
    if errors:
        raise errors[0]
    return quality


def _find_ranges(reading: _Reading) -> tuple[Range, ...]:
    try:
        return agreement.measure_ranges(
            reading.compare_cut, reading.opened.plan.decoder, reading.opened.text.length,
            reading.opened.manifest.valid_context, reading.opened.manifest.limits,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:  # what native runtimes raise; NaN
        raise GateError(f"lengths: {reading.session.runtime}: {error}", advice=UNTOUCHED) from error


def _judge_ranges(ranges: tuple[Range, ...], manifest: Manifest, report: Report) -> None:
    """Note where it agreed; GateError when it does not where the manifest says so."""
    with report.step("lengths") as step:
        step.measured = agreement.tell_agreement(ranges)
        first, last = manifest.valid_context
        step.limit = f"the manifest says {first} to {last}"
        for one in ranges:
            if one.claimed and not one.agrees:
                raise GateError(
                    f"lengths: after {one.first} to {one.last} tokens the mean KL divergence from "
                    f"the source is {one.mean_kl:.4g} nats, top-1 agreement {one.top1:.1%}; the "
                    f"manifest says that it agrees at {first} to {last} tokens",
                    advice=UNTOUCHED,
                )


def _make_details(reading: _Reading, path: Path) -> Details:
    """What was found, without lengths; with the matrices that `path` has of the same comparison."""
    opened, text = reading.opened, reading.opened.compared
    tokenizer = read_tokenizer(opened.checkpoint)
    details = make_details(
        opened.manifest, opened.manifest_digest, reading.session.runtime, text, reading.found,
        [split_text(tokenizer, ids) for ids in text.sequences], (),
    )  # fmt: skip
    before = read_details(path, details.manifest_digest, details.text_digest)
    return msgspec.structs.replace(details, tensors=before.tensors) if before else details


def _write(
    path: Path | None, details: Details | None, ranges: tuple[Range, ...] = ()
) -> SettingsError | None:
    """Write details, if there are any; returns the error when they cannot be."""
    try:
        if path and details:
            write_details(path, msgspec.structs.replace(details, ranges=ranges))
    except SettingsError as error:
        return error
    return None


def _source_of(manifest: Manifest) -> str:
    name, revision = manifest.source.model, manifest.source.revision
    if revision == LOCAL_REVISION or name not in catalog.names("models"):
        raise CheckpointError(
            f"{manifest.name} was made from a checkpoint that its manifest does not name",
            advice="give it with --checkpoint DIR",
        )
    return f"{catalog.load_model(name).id}@{revision}"


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
    console: Console, step: Step, tokenizer: str = ENGINE_TOKENIZER,
) -> Quality:  # fmt: skip
    """Run the gate and note in `step` what was measured, also when it fails.

    `tokenizer` is which one answers, as manifests say it.
    """
    session = _open_session(folder, plan)
    read = open_own_weights(folder, plan, checkpoint)
    try:
        encode = choose_encode(tokenizer, folder, session.encode)
        return _run_gate(session, plan, checkpoint, chat, check_logits, console, step, encode, read)
    finally:
        session.close()


def open_own_weights(folder: Path, plan: Plan, checkpoint: Checkpoint) -> Read | None:
    """The artifact's tensors as the source has them; None where its runtime computes otherwise.

    llama.cpp's experts are others than the source's (docs/moe.md): only the distance is measured.
    """
    recipe, decoder = plan.recipe, plan.decoder
    if decoder.experts and recipe.format == "gguf":
        return None
    read = open_reader(recipe.format, recipe.engine, folder, decoder)
    return unfold(read, checkpoint, decoder) if recipe.quantization.equalize else read


def _open_session(folder: Path, plan: Plan) -> Session:
    return formats.get(plan.recipe.format).open_session(folder, **plan.needs.properties)


def _run_gate(
    session: Session, plan: Plan, checkpoint: Checkpoint, chat: Chat, check_logits: bool,
    console: Console, step: Step, encode: Encode, read: Read | None,
    compare: Callable[[], Comparison] | None = None,
) -> Quality:  # fmt: skip
    recipe = plan.recipe
    try:
        quality = run_gate(
            session, checkpoint, plan.source_decoder, chat, plan.limits,
            check_logits=check_logits, smoke=recipe.smoke, console=console,
            # Only where the artifact is to agree with its source.
            context_length=min(plan.context_length, plan.needs.valid_context[1] + 1),
            # Unchecked, a vendor's artifact is what the vendor makes; parity says how it differs.
            check_tokens=check_logits or recipe.engine == "native",
            compare=compare, encode=encode, read=read,
        )  # fmt: skip
    except FailedGateError as error:
        _note(step, error.quality, console)
        raise
    _note(step, quality, console)
    return quality


def _note(step: Step, quality: Quality, console: Console) -> None:
    limited = [measure for measure in quality.measures if measure.limit is not None]
    step.measured = "\n".join(f"{measure.name} {measure.value:.3g}" for measure in limited)
    step.limit = "\n".join(f"{measure.limit:g}" for measure in limited)
    console.event("quality", **msgspec.to_builtins(quality))
