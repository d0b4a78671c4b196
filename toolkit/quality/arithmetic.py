"""Does the runtime compute what the artifact says? Its logits beside those of its own weights.

The reference forward reads the artifact's own tensors, so nothing remains but the runtime's
arithmetic: how coarse the codes are does not show. Runtimes that can compute in float32 do so here.
Those that round activations, as llama.cpp does, are held against a second reference forward that
rounds them likewise: what rounding costs differs from model to model, what it costs more than that
is a fault.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from toolkit.decoder import Decoder
from toolkit.formats import Arithmetic, Session
from toolkit.quality import measures, reference
from toolkit.quality.measures import Estimate
from toolkit.quality.reference import Array
from toolkit.quality.weightonly import ArtifactWeights, Read

# Mean KL of float32 that sums in another order: 1e-9 at most on any model that was measured.
FLOAT_KL = 1e-6
# Rounding is not the runtime's to the last bit: measured are 0.3 to 1.6 of what the reference has.
SLACK = 4.0
INT8_BLOCK, INT8_LONG_BLOCK, INT8_STEPS = 32, 256, 127  # as ggml's Q8_0 and Q8_K


@dataclass(frozen=True)
class Found:
    """The mean KL of the runtime from the artifact's own weights, and the most it may be."""

    kl: Estimate
    limit: float


def compare_arithmetic(
    session: Session, read: Read, decoder: Decoder, sequences: Sequence[list[int]], first: int = 0
) -> Found:
    """Compare logits on sequences of one length, from token `first` on.

    ValueError names what cannot be compared.
    """
    rounding = ROUNDINGS[session.arithmetic]
    copies = 1 if rounding is None else 2
    has_outputs = session.arithmetic in WHOLE
    weights = RoundedWeights(ArtifactWeights(read, decoder), rounding, has_outputs)
    states = reference.final_states_of(weights, decoder, list(sequences) * copies)
    rows = states.reshape(-1, decoder.hidden)
    logits = reference.project(weights, decoder, decoder.head_name, rows)
    logits = logits.reshape(copies, len(sequences), -1, decoder.vocab)
    runtime = session.exact_logits(sequences)
    compared = measures.compare_sequences(logits[0], runtime, sequences, first)
    kl = compared.summarize()["mean KL"]
    if rounding is None:
        return Found(kl, FLOAT_KL)
    rounded = measures.compare_sequences(logits[0], logits[1], sequences, first).mean_kl
    return Found(kl, FLOAT_KL + SLACK * rounded)


class RoundedWeights:
    """Weights that are multiplied with rounded inputs in the second half of the rows.

    With `has_outputs` the products are rounded there too; a `rounding` of None rounds nothing.
    """

    def __init__(
        self,
        weights: ArtifactWeights,
        rounding: Callable[[Array], Array] | None,
        has_outputs: bool = False,
    ) -> None:
        self._weights, self._rounding, self._has_outputs = weights, rounding, has_outputs

    def look_up(self, name: str, ids: Sequence[int]) -> Array:
        """As the artifact's."""
        return self._weights.look_up(name, ids)

    def read(self, name: str) -> Array:
        """As the artifact's."""
        return self._weights.read(name)

    def project(self, name: str, inputs: Array) -> Array:
        """Multiply [n, in] with the matrix [out, in]: float32 [n, out]."""
        outputs = self._weights.project(name, self._round(inputs))
        return self._round(outputs) if self._has_outputs else outputs

    def _round(self, values: Array) -> Array:
        if self._rounding is None:
            return values
        half = len(values) // 2
        return np.concatenate([values[:half], self._rounding(values[half:])])


def round_to_int8(values: Array, block: int = INT8_BLOCK) -> Array:
    """Round [n, columns] to 8 bits in blocks with one scale each; of rows that have them."""
    sizes = (block, INT8_BLOCK, values.shape[1])
    size = next(size for size in sizes if values.shape[1] % size == 0)
    blocks = values.reshape(len(values), -1, size)
    steps = np.abs(blocks).max(axis=2, keepdims=True) / INT8_STEPS
    codes = np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0)
    rounded: Array = (np.rint(codes) * steps).reshape(values.shape)
    return rounded


def round_to_float16(values: Array) -> Array:
    """Round to float16, and back."""
    return values.astype(np.float16).astype(np.float32)


def round_to_bfloat16(values: Array) -> Array:
    """Round to the nearest bfloat16, ties to even, and back."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: Array = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded


ROUNDINGS: Mapping[Arithmetic, Callable[[Array], Array] | None] = {
    "float32": None,
    "float16": round_to_float16,
    "float16 inputs": round_to_float16,
    "bfloat16": round_to_bfloat16,
    "bfloat16 inputs": round_to_bfloat16,
    "int8 inputs": round_to_int8,
    "int8 inputs in long blocks": partial(round_to_int8, block=INT8_LONG_BLOCK),
}
WHOLE: tuple[Arithmetic, ...] = ("float16", "bfloat16")  # what they compute is rounded as well
