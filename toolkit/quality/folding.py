"""Undo what equalization folded into an artifact's weights, so that they compare with the source's.

Equalization multiplies the columns of a matrix and divides what feeds them: a norm, the values, the
up projection. A norm's factors are read off the norm itself; those of rows are the ones that bring
them nearest to the source's rows.
"""

from collections.abc import Iterator

import numpy as np

from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.quality.reference import Array
from toolkit.quality.weightonly import ArtifactWeights, Read


def unfold(read: Read, checkpoint: Checkpoint, decoder: Decoder) -> Read:
    """The same tensors with the source's norms, and matrices that do with these what they did."""

    def start() -> Iterator[tuple[str, Array]]:
        weights, names = ArtifactWeights(read, decoder), decoder.names
        yield names.embedding, weights.read(names.embedding)
        for layer in range(decoder.layers):
            yield from _unfold_attention(weights, checkpoint, decoder, layer)
            yield from _unfold_mlp(weights, checkpoint, decoder, layer)
        yield names.final_norm, weights.read(names.final_norm)
        yield decoder.head_name, weights.read(decoder.head_name)

    return start


def _unfold_attention(
    weights: ArtifactWeights, checkpoint: Checkpoint, decoder: Decoder, layer: int
) -> Iterator[tuple[str, Array]]:
    norm, qkv, out = (
        name.format(layer)
        for name in (decoder.names.attention_norm, decoder.names.qkv, decoder.names.attention_out)
    )
    fused = weights.read(qkv) * _norm_factors(weights, checkpoint, norm)
    values = decoder.kv_heads * decoder.head_dim
    factors = _row_factors(fused[-values:], checkpoint.read(qkv)[-values:])
    fused[-values:] /= factors[:, None]
    yield norm, checkpoint.read(norm)
    yield qkv, fused
    # [kv_heads, heads that share values, head_dim]
    shape = (decoder.kv_heads, decoder.heads // decoder.kv_heads, decoder.head_dim)
    shared = np.broadcast_to(factors.reshape(shape[0], 1, shape[2]), shape)
    yield out, weights.read(out) * shared.reshape(-1)


def _unfold_mlp(
    weights: ArtifactWeights, checkpoint: Checkpoint, decoder: Decoder, layer: int
) -> Iterator[tuple[str, Array]]:
    norm, gate_up, down = (
        name.format(layer)
        for name in (decoder.names.mlp_norm, decoder.names.gate_up, decoder.names.down)
    )
    fused = weights.read(gate_up) * _norm_factors(weights, checkpoint, norm)
    inner = slice(decoder.intermediate, None)
    factors = _row_factors(fused[inner], checkpoint.read(gate_up)[inner])
    fused[inner] /= factors[:, None]
    yield norm, checkpoint.read(norm)
    yield gate_up, fused
    yield down, weights.read(down) * factors


def _norm_factors(weights: ArtifactWeights, checkpoint: Checkpoint, norm: str) -> Array:
    """What the artifact's norm multiplies its outputs by, over the source's; 1 where that is 0."""
    own, artifact = checkpoint.read(norm), weights.read(norm)
    factors: Array = np.divide(artifact, own, out=np.ones_like(own), where=own != 0)
    return factors


def _row_factors(rows: Array, own: Array) -> Array:
    """The factor of each of the source's rows that comes nearest; 1 where a row is 0."""
    products, squares = np.einsum("ij,ij->i", rows, own), np.einsum("ij,ij->i", own, own)
    is_known = (products != 0) & (squares != 0)
    factors: Array = np.divide(products, squares, out=np.ones_like(squares), where=is_known)
    return factors
