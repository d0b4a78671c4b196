"""Equalization of a layer: scale that moves between its weights and leaves the model as it is.

It goes from a norm to what it feeds, from the values to the attention's output, and from the up
projection to the down projection. Values that several heads share have one scale for all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from toolkit.checkpoint import Checkpoint, to_float32
from toolkit.decoder import Decoder
from toolkit.quantize.equalize import find_stretch, make_foldable
from toolkit.quantize.grids import GridEncoder
from toolkit.quantize.kernels import Floats

SAMPLED_ROWS = 256  # of a matrix, to look for its columns' scales
SAMPLED_INPUTS = 1024  # of the calibration text


@dataclass(frozen=True)
class Scales:
    """A layer's equalization: by tensor, factors of columns and rows, and norms as written."""

    columns: dict[str, Floats] = field(default_factory=dict)
    rows: dict[str, Floats] = field(default_factory=dict)
    norms: dict[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Equalizer:
    """Finds the scales of a checkpoint's layers for the grids of one artifact.

    `encoder_of` tells the encoder of a matrix whose codes are chosen; None for any other.
    """

    checkpoint: Checkpoint
    decoder: Decoder
    encoder_of: Callable[[str], GridEncoder | None]

    def find(self, layer: int, inputs: Mapping[str, Floats]) -> Scales:
        """The scales of a layer, by the inputs [n, columns] of each of its matrices.

        ValueError when a weight does not fit into the artifact's type.
        """
        scales, decoder, names = Scales(), self.decoder, self.decoder.names
        qkv, out, gate_up, down = decoder.layer_matrices(layer)
        for pattern, matrix in ((names.attention_norm, qkv), (names.mlp_norm, gate_up)):
            norm = pattern.format(layer)
            stretch = self._stretch(matrix, inputs[matrix], _magnitudes(inputs[matrix]))
            exact, folded = make_foldable(stretch, self.checkpoint.read(norm))
            scales.columns[matrix], scales.norms[norm] = exact, folded
        # [kv_heads, heads that share values, head_dim]
        shape = (decoder.kv_heads, decoder.heads // decoder.kv_heads, decoder.head_dim)
        shared = _magnitudes(inputs[out]).reshape(shape).max(axis=1, keepdims=True)
        magnitudes = np.ascontiguousarray(np.broadcast_to(shared, shape)).reshape(-1)
        scales.columns[out] = self._stretch(out, inputs[out], magnitudes)
        values = scales.columns[out].reshape(shape)[:, 0].reshape(-1)
        scales.rows[qkv] = _divide_last(decoder.qkv_rows, values)
        scales.columns[down] = self._stretch(down, inputs[down], _magnitudes(inputs[down]))
        scales.rows[gate_up] = _divide_last(2 * decoder.intermediate, scales.columns[down])
        return scales

    def _stretch(self, matrix: str, inputs: Floats, magnitudes: Floats) -> Floats:
        """The factors of a matrix's columns; ones where its codes are not chosen."""
        encoder = self.encoder_of(matrix)
        if encoder is None:
            return np.ones(len(magnitudes), np.float32)
        rows = self.checkpoint.tensors[matrix].shape[0]
        sample = [
            to_float32(raw)
            for row in range(0, rows, max(1, rows // SAMPLED_ROWS))
            for _, raw in self.checkpoint.read_rows(matrix, row, 1)
        ]
        some = inputs[:: max(1, len(inputs) // SAMPLED_INPUTS)]
        return find_stretch(np.concatenate(sample), encoder, some, magnitudes)


def _magnitudes(inputs: Floats) -> Floats:
    """Mean |x| of each column."""
    found: Floats = np.abs(inputs).mean(axis=0)
    return found


def _divide_last(rows: int, factors: Floats) -> Floats:
    """Factors of a matrix's rows: those of the last ones are divided by."""
    scales = np.ones(rows, np.float32)
    scales[rows - len(factors) :] /= factors
    return scales
