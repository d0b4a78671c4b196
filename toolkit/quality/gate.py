"""The gate: what an artifact must show, in its own runtime, before it is published."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from toolkit.artifact import Chat, Limits, Measure, Quality, Smoke
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.decoder import Decoder
from toolkit.errors import GateError
from toolkit.formats import Session
from toolkit.quality import chat as chats
from toolkit.quality import comparing, picture, tokenizing, tokens
from toolkit.quality.arithmetic import compare_arithmetic
from toolkit.quality.measures import Comparison
from toolkit.quality.ordinary import CHATS
from toolkit.quality.probe import count_shared, read_probe
from toolkit.quality.stored import Watch
from toolkit.quality.weightonly import Read

EXACT_SEQUENCES = 1  # of the probe, on which the runtime's arithmetic is compared
PICTURE = "picture: "
SHORT = ("max KL", "perplexity ratio")  # of a picture beside what has a limit
NOT_PUBLISHED = "nothing was published"
WRONG = "nothing was published: the artifact is wrong, not coarse; please report it"
TOO_FAR = (
    "nothing was published; choose better codes (--method gptq) or more bits, or accept the "
    "distance: --accept-kl {}"
)


class FailedGateError(GateError):
    """A measure missed its limit; `quality` holds everything that was measured until then."""

    def __init__(self, message: str, quality: Quality, *, advice: str = NOT_PUBLISHED) -> None:
        super().__init__(message, advice=advice)
        self.quality = quality


@dataclass(frozen=True)
class _Gate:
    """What every check needs, and the measures so far."""

    session: Session
    checkpoint: Checkpoint
    decoder: Decoder
    chat: Chat
    context_length: int
    measured: list[Measure] = field(default_factory=list)

    def add(
        self,
        name: str,
        value: float,
        limit: float | None,
        *,
        ok: bool = True,
        error: float | None = None,
    ) -> bool:
        """Note one measure; returns `ok`."""
        self.measured.append(Measure(name=name, value=value, limit=limit, ok=ok, error=error))
        return ok

    def quality(self, *, checked: bool) -> Quality:
        """Everything measured so far."""
        measured = tuple(self.measured)
        return Quality(checked=checked, runtime=self.session.runtime, measures=measured)

    def fail(self, sentence: str, advice: str = NOT_PUBLISHED) -> FailedGateError:
        """The error for a missed limit, with the measures so far."""
        return FailedGateError(sentence, self.quality(checked=False), advice=advice)

    def read_probe(self) -> list[list[int]]:
        """The sequences of the gate's text."""
        return read_probe(self.checkpoint, self.chat, self.decoder, self.context_length)


def run_gate(
    session: Session,
    checkpoint: Checkpoint,
    decoder: Decoder,
    chat: Chat,
    limits: Limits,
    *,
    check_logits: bool,
    smoke: Smoke | None,
    console: Console,
    context_length: int | None = None,
    check_tokens: bool = True,
    compare: Callable[[], Comparison] | None = None,
    encode: Callable[[str], list[int]] | None = None,
    read: Read | None = None,
) -> Quality:
    """Measure an artifact against its source; FailedGateError on the first limit it misses.

    First whether it is correct: `read` yields the artifact's own tensors, which have to be the
    checkpoint's and to give the runtime's logits; None leaves that out. Then how near it is.

    With `check_logits` False the logits and the smoke question are left out, and the result says
    `checked=False`; token ids are compared all the same, unless `check_tokens` is False too.
    `context_length` is the artifact's, where it is shorter than the checkpoint's. `compare` stands
    for the comparison on the probe text; its ValueError says why nothing can be compared. `encode`
    is the tokenizer that answers, where it is not the session's.
    """
    gate = _Gate(session, checkpoint, decoder, chat, context_length or decoder.context)
    try:
        if check_tokens:
            _check_tokens(gate, encode or session.encode)
        _check_stops(gate)
        if check_logits:
            if read:
                _check_correctness(gate, read)
            _check_logits(gate, limits, compare or partial(_compare_probe, gate, console))
            if decoder.vision:
                _check_logits(gate, limits, partial(_compare_picture, gate, console), PICTURE)
            if smoke is not None:
                _check_smoke(gate, smoke)
    except RuntimeError as error:  # what native runtimes raise
        raise gate.fail(f"{session.runtime} failed: {error}") from error
    return gate.quality(checked=check_logits)


def _check_tokens(gate: _Gate, encode: Callable[[str], list[int]]) -> None:
    runtime = gate.session.runtime
    found = tokenizing.compare(runtime, encode, gate.checkpoint, gate.decoder, gate.chat)
    differing = found.mismatches
    if not gate.add("token id mismatches", len(differing), 0, ok=not differing):
        raise gate.fail(f"token ids: {found.difference}; limit 0; the first is {differing[0]}")


def _check_stops(gate: _Gate) -> None:
    missing = [token for token in gate.checkpoint.stop_ids if not gate.session.stops(token)]
    if not gate.add("stop ids ignored", len(missing), 0, ok=not missing):
        raise gate.fail(
            f"stop ids: {gate.session.runtime} does not end an answer on {missing}; limit: every "
            f"one of the checkpoint's {list(gate.checkpoint.stop_ids)}"
        )


def _check_correctness(gate: _Gate, read: Read) -> None:
    """Hold stored tensors against the checkpoint's, and the runtime against the stored tensors."""
    watch = Watch(gate.checkpoint)
    probe = gate.read_probe()
    try:
        found = compare_arithmetic(
            gate.session, watch.over(read), gate.decoder, probe[:EXACT_SEQUENCES],
            count_shared(probe),
        )  # fmt: skip
    except ValueError as error:
        _judge_stored(gate, watch)
        gate.add("comparable logits", 0, 1, ok=False)
        raise gate.fail(f"runtime: {error}", WRONG) from error
    _judge_stored(gate, watch)
    is_met = found.kl.value <= found.limit
    if not gate.add("runtime KL", found.kl.value, found.limit, ok=is_met, error=found.kl.error):
        raise gate.fail(
            f"runtime: the mean KL divergence of {gate.session.runtime} from the artifact's own "
            f"weights is {found.kl.value:.3g} nats per token; limit {found.limit:.3g}",
            WRONG,
        )


def _judge_stored(gate: _Gate, watch: Watch) -> None:
    if not gate.add("stored tensors off", len(watch.faults), 0, ok=not watch.faults):
        name, fault = next(iter(watch.faults.items()))
        raise gate.fail(
            f"weights: {len(watch.faults)} of {len(watch.seen)} stored tensors are not the "
            f"checkpoint's: {name}: {fault}",
            WRONG,
        )


def _compare_probe(gate: _Gate, console: Console) -> Comparison:
    sequences = gate.read_probe()
    source = comparing.read_source(gate.checkpoint, gate.decoder, sequences, console)
    return comparing.compare(gate.session, source, sequences, console, count_shared(sequences))


def _compare_picture(gate: _Gate, console: Console) -> Comparison:
    asked = picture.ask_probe(gate.checkpoint, gate.decoder, gate.chat, CHATS[0][1])
    session = cast(picture.SeeingSession, gate.session)
    with console.waiting("source and artifact look at a picture"):
        return picture.compare_picture(session, gate.checkpoint, gate.decoder, asked)


def _check_logits(
    gate: _Gate, limits: Limits, compare: Callable[[], Comparison], about: str = ""
) -> None:
    """Hold a comparison against the limits; `about` stands before the names of its measures."""
    try:
        found = compare()
    except ValueError as error:
        gate.add("comparable logits", 0, 1, ok=False)
        raise gate.fail(f"{about}logits: {error}") from error
    demands = {demand.measure: demand for demand in list_demands(limits)}
    missed = []
    for name, estimate in found.summarize().items():
        demand = demands.get(name)
        if about and demand is None and name not in SHORT:
            continue
        ok = demand is None or demand.is_met(estimate.value)
        limit = None if demand is None else demand.limit
        gate.add(about + name, estimate.value, limit, ok=ok, error=estimate.error)
        if demand and not ok:
            missed.append(demand.sentence.format(estimate.value, len(found.kl), demand.limit))
    if missed:
        accepted = TOO_FAR.format(round_up(found.mean_kl))
        raise gate.fail(f"{about}logits: {missed[0]}", accepted)


@dataclass(frozen=True)
class Demand:
    """A limit on a measure; `sentence` takes what was found, the number of tokens, the limit."""

    measure: str
    limit: float
    sentence: str
    is_lowest: bool = False

    def is_met(self, value: float) -> bool:
        """True when the measure keeps the limit."""
        return value >= self.limit if self.is_lowest else value <= self.limit


def list_demands(limits: Limits) -> list[Demand]:
    """The limits that are set, the most telling first."""
    demands = []
    if limits.max_kl is not None:
        sentence = (
            "the mean KL divergence from the source is {:.4g} nats per token on {} tokens; "
            "limit {:g}"
        )
        demands.append(Demand("mean KL", limits.max_kl, sentence))
    if limits.min_top1 is not None:
        sentence = "the most likely token is the source's for {:.1%} of {} tokens; limit {:.1%}"
        demands.append(Demand("top-1 agreement", limits.min_top1, sentence, is_lowest=True))
    if limits.max_kl_99 is not None:
        sentence = "99 % of the KL divergences are up to {:.4g} nats on {} tokens; limit {:g}"
        demands.append(Demand("99 % KL", limits.max_kl_99, sentence))
    if limits.max_perplexity_ratio is not None:
        sentence = "the perplexity is {:.4g} times the source's on {} tokens; limit {:g}"
        demands.append(Demand("perplexity ratio", limits.max_perplexity_ratio, sentence))
    return demands


def round_up(value: float) -> str:
    """Two digits that are no less than a positive value."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / step) * step:.2g}"


def _check_smoke(gate: _Gate, smoke: Smoke) -> None:
    tokenizer = tokens.read_tokenizer(gate.checkpoint)
    start = [] if gate.chat.bos_id is None else [gate.chat.bos_id]
    prompt = start + tokens.encode(tokenizer, chats.render(gate.chat, [("user", smoke.prompt)]))
    generated = gate.session.generate(prompt, smoke.max_tokens)
    answer, fault = _read_answer(gate, generated, smoke.max_tokens)
    text = tokenizer.decode(answer, skip_special_tokens=False).strip()
    if not fault and not (text and smoke.expect in text):
        fault = f"expected a text with {smoke.expect!r}" if smoke.expect else "expected a text"
    if not gate.add("smoke answer", float(not fault), 1, ok=not fault):
        raise gate.fail(f"smoke: {smoke.prompt!r} was answered {text!r}: {fault}")


def _read_answer(gate: _Gate, generated: list[int], max_tokens: int) -> tuple[list[int], str]:
    """Cut the generated ids at the first stop id; also what is wrong with them, if anything."""
    stop_ids = gate.chat.stop_ids
    ends = [place for place, token in enumerate(generated) if token in stop_ids]
    answer = generated[: ends[0]] if ends else generated
    if ends and generated[ends[0]] in gate.checkpoint.stop_ids and ends[0] + 1 < len(generated):
        return answer, f"{gate.session.runtime} went on after stop id {generated[ends[0]]}"
    if not ends and len(generated) < max_tokens:
        return answer, f"it ended after {len(generated)} tokens without a stop id"
    special = _special_ids(gate.checkpoint)
    if leaked := [token for token in answer if token in special]:
        return answer, f"special token {leaked[0]} is in it"
    return answer, ""


def _special_ids(checkpoint: Checkpoint) -> set[int]:
    added = tokens.read_tokenizer(checkpoint).get_added_tokens_decoder()
    return {token for token, entry in added.items() if entry.special}
