"""Which tensors hurt: what each one alone, as an artifact holds it, costs the source.

One pass through the checkpoint carries many variants of the hidden states. At each matrix one more
branches off in which this matrix alone is the artifact's; from there on it meets the source's
weights, as all others do. A last variant has everything replaced: the artifact itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import Checkpoint, to_float32
from toolkit.decoder import Decoder
from toolkit.errors import PlanError
from toolkit.progress import Advance, ignore
from toolkit.quality import reference
from toolkit.quality.details import TensorError
from toolkit.quality.measures import log_softmax
from toolkit.quality.reference import Array, CheckpointWeights, Weights
from toolkit.quality.weightonly import ArtifactWeights, Read
from toolkit.stream import DataFile

# Tokens of all variants that are projected at once. The widest product, Phi-3-medium's gate_up, is
# then 2 x 290 MB; rows of the checkpoint are read anew for each such part, from the system's cache.
PART_TOKENS = 2048


@dataclass(frozen=True)
class Sensitivity:
    """Every use of a matrix in order; a tied one has two, as embedding and as head.

    An error's `bits` a weight are those in the data file, scales included, None when not known;
    `relative_error` is |W' - W|^2 / |W|^2; `kl` the mean KL(source || source with this one
    replaced), in nats a token. `whole_kl` is that with all tensors replaced.
    """

    tokens: int
    whole_kl: float
    errors: tuple[TensorError, ...]

    @property
    def worst(self) -> list[TensorError]:
        """Those that hurt most first."""
        return sorted(self.errors, key=lambda error: -(error.kl or 0.0))


@dataclass(frozen=True)
class _Use:
    name: str
    kind: str
    layer: int | None
    relative_error: float


def measure(
    checkpoint: Checkpoint,
    decoder: Decoder,
    read: Read,
    sequences: Sequence[Sequence[int]],
    *,
    bits: Mapping[str, float] | None = None,
    advance: Advance = ignore,
) -> Sensitivity:
    """Measure the tensors that `read` yields on sequences of one length.

    `advance` is told the bytes of source weights used, `bytes_to_read` in total. ValueError as in
    reference.forward; ArtifactError when a tensor is missing; PlanError as in `check_experts`.
    """
    check_experts(decoder)
    for ids in sequences:
        reference.check_ids(decoder, ids)
    pass_ = _Pass(checkpoint, decoder, ArtifactWeights(read, decoder), sequences, advance)
    for layer in range(decoder.layers):
        pass_.run_layer(layer)
    *kls, whole_kl = pass_.compare()
    errors = tuple(
        TensorError(
            name=use.name,
            kind=use.kind,
            layer=use.layer,
            bits=(bits or {}).get(use.name),
            relative_error=use.relative_error,
            kl=kl,
        )
        for use, kl in zip(pass_.uses, kls, strict=True)
    )
    return Sensitivity(pass_.tokens, whole_kl, errors)


def check_experts(decoder: Decoder) -> None:
    """PlanError for a model with experts: what one matrix moves, the routers behind it magnify."""
    if decoder.experts:
        raise PlanError(
            f"this model ({decoder.family}) has experts: matrices cannot be measured one by one, "
            "nor mixes of types chosen by that",
            advice="give types by overrides; `phiship check` measures the whole artifact",
        )


def bytes_to_read(checkpoint: Checkpoint, decoder: Decoder, tokens: int) -> int:
    """Bytes of source weights that `measure` uses; late layers, which more variants meet, more."""
    kinds = len(decoder.layer_matrices(0))
    each = _variants_per_part(tokens)
    nbytes = {name: info.nbytes for name, info in checkpoint.tensors.items()}
    total = -(-(2 + kinds * decoder.layers) // each) * nbytes[decoder.head_name]
    for layer in range(decoder.layers):
        matrices = sum(nbytes[name] for name in decoder.layer_matrices(layer))
        parts = -(-(2 + kinds * layer) // each) + -(-kinds // each)
        total += parts * matrices
    return total


class _Pass:
    """The hidden states of all variants on their way through the layers.

    `hidden` is [variants, texts, n, hidden]: the source first, then one for each of `uses`, but for
    the head's, which parts from the source at the very end.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        replaced: ArtifactWeights,
        sequences: Sequence[Sequence[int]],
        advance: Advance,
    ) -> None:
        self.checkpoint, self.decoder, self.replaced = checkpoint, decoder, replaced
        self.source = CheckpointWeights(checkpoint, advance)
        self.uses: list[_Use] = []
        ids = np.asarray(sequences, np.intp)
        self.tokens = ids.size
        self.rotation = reference.rotary_tables(decoder.rope, ids.shape[1])
        name = decoder.names.embedding
        own, self.whole = (
            reference.embed(weights, decoder, ids.reshape(-1).tolist()).reshape(*ids.shape, -1)
            for weights in (self.source, replaced)
        )
        variants = 2 + len(decoder.layer_matrices(0)) * decoder.layers
        self.hidden = np.empty((variants, *own.shape), np.float32)
        self.hidden[:2] = own, self.whole
        self._note(name, "embedding")

    def run_layer(self, layer: int) -> None:
        """Take all variants through a layer; one for each of its matrices joins them."""
        count = len(self.uses) + 1
        branches = list(self.decoder.layer_matrices(layer))
        start = np.repeat(self.hidden[:1], len(branches), axis=0)
        for part in self._parts(len(branches)):
            weights = _Branching(self.source, self.replaced, branches[part], self.tokens)
            joined = slice(count + part.start, count + part.stop)
            self.hidden[joined] = self._run(weights, layer, start[part])
        for part in self._parts(count):
            self.hidden[part] = self._run(self.source, layer, self.hidden[part])
        self.whole = self._run(self.replaced, layer, self.whole[None])[0]
        for name in branches:
            self._note(name, self.decoder.kind_of(name) or "", layer)

    def compare(self) -> Iterator[float]:
        """The KL of every use of a matrix, the head's last, then of the whole artifact."""
        decoder, name = self.decoder, self.decoder.head_name
        norm, replaced = decoder.names.final_norm, self.replaced
        logits: NDArray[np.float64]
        for part in self._parts(len(self.hidden)):
            states = reference.norm(self.source, decoder, norm, self.hidden[part])
            states = states.reshape(-1, decoder.hidden)
            outputs = reference.project(self.source, decoder, name, states)
            variants = outputs.reshape(-1, self.tokens, decoder.vocab)
            if part.start == 0:
                first, variants = states[: self.tokens], variants[1:]
                logits = log_softmax(outputs[: self.tokens])
            yield from (_mean_kl(logits, variant) for variant in variants)
        whole = reference.norm(replaced, decoder, norm, self.whole).reshape(self.tokens, -1)
        for last in (first, whole):
            yield _mean_kl(logits, reference.project(replaced, decoder, name, last))
        self._note(name, "head")

    def _run(self, weights: Weights, layer: int, hidden: Array) -> Array:
        texts = hidden.reshape(-1, *hidden.shape[2:])
        found = reference.run_layer(weights, self.decoder, layer, texts, self.rotation)
        return found.reshape(hidden.shape)

    def _parts(self, count: int) -> Iterator[slice]:
        each = _variants_per_part(self.tokens)
        yield from (slice(first, min(first + each, count)) for first in range(0, count, each))

    def _note(self, name: str, kind: str, layer: int | None = None) -> None:
        error = relative_error(self.checkpoint, name, self.replaced.read(name))
        self.uses.append(_Use(name, kind, layer, error))


class _Branching:
    """The source's weights, but for one matrix in each variant: `branches` says which, in order."""

    def __init__(
        self, source: Weights, replaced: Weights, branches: list[str], tokens: int
    ) -> None:
        self._source, self._replaced = source, replaced
        self._branches, self._tokens = branches, tokens

    def look_up(self, name: str, ids: Sequence[int]) -> Array:
        """Rows of the source's matrix."""
        return self._source.look_up(name, ids)

    def read(self, name: str) -> Array:
        """The source's vector."""
        return self._source.read(name)

    def project(self, name: str, inputs: Array) -> Array:
        """Multiply [n, in] with the source's matrix, one variant's rows with the other one."""
        outputs = self._source.project(name, inputs)
        if name in self._branches:
            start = self._branches.index(name) * self._tokens
            rows = slice(start, start + self._tokens)
            outputs[rows] = self._replaced.project(name, inputs[rows])
        return outputs


def relative_error(checkpoint: Checkpoint, name: str, replaced: Array) -> float:
    """|W' - W|^2 / |W|^2 of a tensor; 0 for two tensors of zeros."""
    error = total = 0.0
    for row, raw in checkpoint.read_rows(name):
        own = to_float32(raw)
        difference = replaced[row : row + len(raw)] - own
        error += float(np.vdot(difference, difference))
        total += float(np.vdot(own, own))
    return error / total if total else error


def measure_bits(data: DataFile) -> dict[str, float]:
    """Bits that a weight of each tensor takes in a data file, scales and padding included."""
    weights: dict[str, int] = {}
    for piece in data.pieces:
        for name in piece.sources:
            weights[name] = weights.get(name, 0) + piece.weights // len(piece.sources)
    return {name: 8 * size / weights[name] for name, size in measure_bytes(data).items()}


def measure_bytes(data: DataFile) -> dict[str, int]:
    """Bytes that each tensor takes in a data file.

    A region ends where the next one begins; what is stored once for two uses counts once. Pieces
    that share a region have their weights' part of it.
    """
    pieces = data.pieces
    starts = {offset for piece in pieces for offset in piece.offsets}
    ends = sorted({*starts, *(c.offset for c in data.constants), data.size_bytes})
    sizes = dict(zip(ends, np.diff(ends).tolist(), strict=False))
    weights: dict[int, int] = {}
    for piece in pieces:
        for offset in piece.offsets:
            weights[offset] = weights.get(offset, 0) + piece.weights
    taken: dict[str, int] = {}
    for piece in pieces:
        size = sum(sizes[offset] * piece.weights // weights[offset] for offset in piece.offsets)
        for name in piece.sources:
            taken[name] = taken.get(name, 0) + size // len(piece.sources)
    return taken


def _variants_per_part(tokens: int) -> int:
    return max(1, PART_TOKENS // tokens)


def _mean_kl(source: NDArray[np.float64], logits: Array) -> float:
    """Mean KL over the tokens, of the source's log-probabilities and a variant's logits."""
    found = log_softmax(logits)
    kl = np.einsum("tv,tv->t", np.exp(source), source - found)
    # Rounding may leave a divergence of zero at -1e-17.
    return float(np.maximum(kl, 0.0).mean())
