"""An artifact's weights in the reference forward: what its quantization alone costs.

Neither its runtime nor its device takes part, only the reader that dequantizes its tensors. They
come as a stream, and at most one layer of them is in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit import formats
from toolkit.decoder import Decoder
from toolkit.errors import ArtifactError
from toolkit.quality import comparing, measures, reference
from toolkit.quality.comparing import LOGIT_ROWS, Sequences, Source
from toolkit.quality.measures import Comparison
from toolkit.quality.reference import Array
from toolkit.recipe import Engine

# Starts to read an artifact from its beginning: (checkpoint name, float32), in the reader's order.
Read = Callable[[], Iterator[tuple[str, NDArray[Any]]]]


class ArtifactWeights:
    """An artifact's tensors as a forward pass uses them: `Weights` of reference.py.

    One layer, or one tensor of none, is held until another is asked for. A reader whose order is
    the model's is read once; of what another yields too early, tensors of the layer in use are kept
    and others read again. Of two tensors of one name, as a tied head may be stored apart from its
    embedding, each use takes the next. ArtifactError when a tensor is missing.
    """

    def __init__(self, read: Read, decoder: Decoder) -> None:
        self._read = read
        self._coming = read_ahead(read())
        self._layers = {
            name: layer for layer in range(decoder.layers) for name in decoder.layer_tensors(layer)
        }
        self._held: dict[str, Array] = {}
        self._in_use: int | str | None = None

    def look_up(self, name: str, ids: Sequence[int]) -> Array:
        """Rows of a matrix, one for each id: float32 [len(ids), columns]."""
        return self.read(name)[np.asarray(ids, np.intp)]

    def project(self, name: str, inputs: Array) -> Array:
        """Multiply [n, in] with the matrix [out, in]: float32 [n, out]."""
        outputs: Array = inputs @ self.read(name).T
        return outputs

    def read(self, name: str) -> Array:
        """A whole tensor, float32; not to be written to."""
        part = self._part_of(name)
        if part != self._in_use:
            self._held.clear()
            self._in_use = part
        if name not in self._held:
            self._read_until(name)
        return self._held[name]

    def _read_until(self, name: str) -> None:
        for _ in range(2):  # from here to the end, then from the beginning
            for found, weights in self._coming:
                if self._part_of(found) == self._in_use:
                    self._held[found] = weights
                if found == name:
                    return
            self._coming = read_ahead(self._read())
        raise ArtifactError(f"{name} is not in the artifact", advice="build the artifact again")

    def _part_of(self, name: str) -> int | str:
        """What is held together: a layer's tensors; another tensor by itself."""
        return self._layers.get(name, name)


def read_ahead(tensors: Iterator[tuple[str, Array]]) -> Iterator[tuple[str, Array]]:
    """The same, each made by a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, tensors, None)
        while (found := coming.result()) is not None:
            coming = thread.submit(next, tensors, None)
            yield found


def open_reader(format_name: str, engine: Engine, folder: Path, decoder: Decoder) -> Read:
    """The reader of an artifact that phiship's own converter, or the vendor's, has written."""
    is_native = engine == "native"
    module = formats.get(format_name) if is_native else formats.get_vendor(format_name)
    return partial(module.dequantize, folder, decoder)


def compare(read: Read, source: Source, sequences: Sequences) -> Comparison:
    """Compare an artifact's weights with the source that has read the same sequences.

    As many sequences as comparing.PASS_TOKENS allows go through the layers together; the next ones
    read the artifact again. ValueError as in reference.forward.
    """
    parts: list[Comparison] = []
    for some in comparing.split_passes(sequences):
        own = Source(source.checkpoint, source.decoder, source.states[some])
        parts += _compare_pass(ArtifactWeights(read, source.decoder), own, sequences[some])
    return measures.join(parts)


def _compare_pass(
    weights: ArtifactWeights, source: Source, sequences: Sequences
) -> Iterator[Comparison]:
    """Compare sequences that go through the layers together, LOGIT_ROWS positions at a time."""
    decoder = source.decoder
    states = reference.final_states_of(weights, decoder, sequences)
    for text, ids in enumerate(sequences):
        for start in range(0, len(ids), LOGIT_ROWS):
            rows = slice(start, min(start + LOGIT_ROWS, len(ids)))
            own = source.logits(text, rows)
            artifact = reference.project(weights, decoder, decoder.head_name, states[text, rows])
            next_id = ids[rows.stop] if rows.stop < len(ids) else None
            yield measures.compare_logits(own, artifact, ids[rows], next_id)
