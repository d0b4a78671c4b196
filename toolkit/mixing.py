"""Mixes of types: what each matrix of a checkpoint could be, with its bytes and its cost.

One pass says what every matrix costs in the smallest type that the recipe's overrides can give it
(quality/sensitivity.py); what it costs in a larger one follows from the weights' squared errors, to
which a small divergence is proportional. Weights are rounded to the nearest throughout; what GPTQ
makes better is known as a factor, what equalization does is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from toolkit import formats
from toolkit.checkpoint import Checkpoint, to_float32
from toolkit.console import Console
from toolkit.decoder import Decoder
from toolkit.errors import CheckpointError, PlanError
from toolkit.overrides import overrides_of, path_of, resolve, with_overrides
from toolkit.plan import Plan, make_plan, measure_tokenizer
from toolkit.quality import comparing, sensitivity, weightonly
from toolkit.quality.chat import read_chat
from toolkit.quality.comparing import Sequences
from toolkit.quality.probe import count_shared, read_probe
from toolkit.quality.rounding import read_rounded, round_trip
from toolkit.quality.texts import read_text
from toolkit.quantize.grids import is_choosable
from toolkit.recipe import Recipe
from toolkit.stream import Encoder

# Tokens on which matrices are compared, and those on which a mix is.
CHOICE_TOKENS = 128
PREDICTION_TOKENS = 512
LENGTH = 128
GPTQ_GAIN = 0.35  # 0.26 to 0.27 by weights alone (docs/decisions/0012-gptq.md), and some caution
SAMPLE_ROWS, SAMPLES = 64, 8  # of each matrix, to compare the errors of types


@dataclass(frozen=True)
class Option:
    """A type that a matrix can have: what an override says, and what it takes and costs.

    `kl` is the cost by the recipe's method, `rounded_kl` that of rounding to the nearest.
    """

    choice: Any
    size_bytes: int
    kl: float
    rounded_kl: float


@dataclass(frozen=True)
class Mix:
    """A recipe whose overrides say a mix, its exact size, and its mean KL by weights alone.

    `kl` is that on the text for choosing, `gate_kl` that on the gate's.
    """

    recipe: Recipe
    size_bytes: int
    kl: float
    gate_kl: float

    @property
    def worst_kl(self) -> float:
        """The greater of the two."""
        return max(self.kl, self.gate_kl)


Options = Mapping[str, Sequence[Option]]
Steps = list[tuple[str, Option]]  # from a matrix's smallest type to another, by its name


@dataclass(frozen=True)
class Mixture:
    """A recipe and a checkpoint, and every mix that overrides can make of them.

    What the recipe's own overrides name stays as it is. `text` is the user's, instead of a part of
    Python's manual. PlanError when there is nothing to choose.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    decoder: Decoder
    context_length: int | None
    text: Path | None
    console: Console
    known: dict[str, Mix] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to choose."""
        name, engine = self.recipe.name, self.recipe.engine
        if engine != "native":
            raise PlanError(
                f"{name}: engine: got {engine}, which takes no overrides; --max-size and --max-kl "
                "need native",
                advice="use `engine: native` (--engine native)",
            )
        sensitivity.check_experts(self.decoder)
        if all(len(choices) < 2 for choices in self.choices.values()):
            raise PlanError(
                f"{name}: quantization: it leaves no type to choose; --max-size and --max-kl need "
                "a recipe of less than 8 bits, whose overrides do not name every matrix"
            )

    @cached_property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """What overrides may say of each matrix, smallest first; None leaves the recipe's own."""
        module = formats.get(self.recipe.format)
        found = dict(module.list_choices(self.recipe, self.decoder))
        named = resolve(overrides_of(self.recipe), self.decoder)
        return {**found, **dict.fromkeys(named, (None,))} if found else {}

    @cached_property
    def smallest(self) -> Plan:
        """The plan with every matrix in its smallest type."""
        return self.plan_of([])

    @cached_property
    def options(self) -> Options:
        """Every matrix's types with their bytes and what each costs."""
        distinct = dict.fromkeys(one for choices in self.choices.values() for one in choices)
        plans = {choice: self._plan_with(choice) for choice in distinct}
        taken = {choice: sensitivity.measure_bytes(plan.data) for choice, plan in plans.items()}
        costs = self._measure_each()
        found = {}
        for name, choices in self.choices.items():
            encoders = [_encoders_of(plans[choice], name)[0] for choice in choices]
            shares = self._compare_errors(name, encoders) if len(choices) > 1 else [1.0]
            found[name] = [
                Option(
                    choice,
                    taken[choice][name],
                    share * costs[name] * self._gain(name, encoder),
                    share * costs[name],
                )
                for choice, encoder, share in zip(choices, encoders, shares, strict=True)
            ]
        return found

    def plan_of(self, steps: Steps) -> Plan:
        """The plan after some steps from the smallest types; a matrix's last one counts."""
        first = {name: choices[0] for name, choices in self.choices.items()}
        return self._plan(first | {name: option.choice for name, option in steps})

    def predict(self, steps: Steps) -> Mix:
        """The mix after some steps, measured by weights alone."""
        plan = self.plan_of(steps)
        if plan.digest not in self.known:
            kl, gate_kl = self._compare_weights(plan)
            recipe, gain = self._without_needless(plan), self._total_gain(steps)
            self.known[plan.digest] = Mix(recipe, plan.artifact_bytes, gain * kl, gain * gate_kl)
        return self.known[plan.digest]

    @cached_property
    def _texts(self) -> tuple[Sequences, Sequences]:
        """Sequences of one length: of the text for choosing, and of the gate's."""
        chat = read_chat(self.checkpoint, sees=self.decoder.vision is not None)
        probe = read_probe(self.checkpoint, chat, self.decoder, self.smallest.context_length)
        own = read_text(
            self.checkpoint, chat, "calibration", path=self.text, tokens=PREDICTION_TOKENS,
            length=min(LENGTH, len(probe[0])),
        )  # fmt: skip
        return own.sequences, [ids[: own.length] for ids in probe]

    def _gain(self, name: str, encoder: Encoder) -> float:
        """What the recipe's method leaves of a matrix's cost; an embedding is looked up only."""
        if self.recipe.quantization.method == "rtn" or name == self.decoder.names.embedding:
            return 1.0
        return GPTQ_GAIN if is_choosable(encoder) else 1.0

    def _total_gain(self, steps: Steps) -> float:
        """The same for all matrices of a mix."""
        chosen = {name: some[0] for name, some in self.options.items()} | dict(steps)
        rounded = sum(option.rounded_kl for option in chosen.values())
        return sum(option.kl for option in chosen.values()) / rounded if rounded else 1.0

    def _measure_each(self) -> dict[str, float]:
        """What each matrix costs alone in its smallest type; a tied one in both its uses."""
        plan, decoder, (sequences, _) = self.smallest, self.smallest.source_decoder, self._texts
        sequences = sequences[: max(1, CHOICE_TOKENS // len(sequences[0]))]
        tokens = sum(map(len, sequences))
        total_bytes = sensitivity.bytes_to_read(self.checkpoint, decoder, tokens)
        with self.console.progress("measuring every matrix", total_bytes) as advance:
            found = sensitivity.measure(
                self.checkpoint,
                decoder,
                lambda: read_rounded(plan.data, self.checkpoint),
                sequences,
                advance=advance,
            )
        costs: dict[str, float] = {}
        for error in found.errors:
            costs[error.name] = costs.get(error.name, 0.0) + (error.kl or 0.0)
        return costs

    def _compare_errors(self, name: str, encoders: Sequence[Encoder]) -> list[float]:
        """Squared error of each encoder over that of the first, on a sample of rows."""
        last = max(0, self.checkpoint.tensors[name].shape[0] - SAMPLE_ROWS)
        errors = np.zeros(len(encoders))
        for start in sorted({last * sample // (SAMPLES - 1) for sample in range(SAMPLES)}):
            rows = min(SAMPLE_ROWS, self.checkpoint.tensors[name].shape[0])
            for _, raw in self.checkpoint.read_rows(name, start, rows):
                weights = to_float32(raw)
                for index, encoder in enumerate(encoders):
                    difference = round_trip(encoder, weights) - weights
                    errors[index] += np.vdot(difference, difference)
        return [float(error / errors[0]) if errors[0] else 0.0 for error in errors]

    def _compare_weights(self, plan: Plan) -> tuple[float, float]:
        """Mean KL by weights alone on the text for choosing and on the gate's, in one pass."""
        own, gate = self._texts
        sequences = [*own, *gate]
        source = comparing.read_source(
            self.checkpoint, self.smallest.source_decoder, sequences, self.console
        )
        with self.console.waiting("reading the text with rounded weights"):
            try:
                found = weightonly.compare(
                    lambda: read_rounded(plan.data, self.checkpoint), source, sequences
                )
            except ValueError as error:
                raise CheckpointError(f"{self.checkpoint.folder}: {error}") from error
        count = sum(map(len, own))
        told = found.kl[count:].reshape(len(gate), -1)[:, count_shared(gate) :]
        return float(found.kl[:count].mean()), float(told.mean())

    @cached_property
    def _rounded(self) -> Recipe:
        """The recipe with codes rounded to the nearest: of the same size, and tried in all bits."""
        own = self.recipe.quantization
        quantization = msgspec.structs.replace(own, method="rtn", equalize=False)
        return msgspec.structs.replace(self.recipe, quantization=quantization)

    def _plan_with(self, choice: Any) -> Plan:
        """The plan with one choice wherever it can be made, the smallest elsewhere."""
        return self._plan(
            {n: choice if choice in some else some[0] for n, some in self.choices.items()}
        )

    def _plan(self, chosen: Mapping[str, Any]) -> Plan:
        added = {path_of(name): choice for name, choice in chosen.items() if choice is not None}
        return make_plan(
            with_overrides(self._rounded, {**overrides_of(self.recipe), **added}),
            self.decoder,
            context_length=self.context_length,
            tokenizer_bytes=measure_tokenizer(self.checkpoint),
        )

    def _without_needless(self, plan: Plan) -> Recipe:
        """The plan's recipe less overrides of matrices that would be the same without them."""
        chosen, own, plain = overrides_of(plan.recipe), overrides_of(self.recipe), self._plan({})
        needless = {
            path_of(name)
            for name in self.choices
            if _encoders_of(plan, name) == _encoders_of(plain, name)
        }
        kept = {path: one for path, one in chosen.items() if path in own or path not in needless}
        return with_overrides(self.recipe, kept)


def _encoders_of(plan: Plan, name: str) -> list[Encoder]:
    return [piece.encoder for piece in plan.data.pieces if piece.tensor == name]
