"""The source model itself: a float32 forward pass in NumPy, streamed from the checkpoint.

Follows transformers' Phi3ForCausalLM with eager attention in float32. One piece of one tensor is
in memory at a time, so memory is a few activations whatever the model's size.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import Checkpoint, to_float32
from toolkit.decoder import Decoder, Rope

Array = NDArray[np.float32]
Advance = Callable[[int], None]

# Weights held at once: 16 MB as float32. Larger pieces wake the BLAS threads less often.
PIECE_WEIGHTS = 1 << 22
# Queries whose scores are held at once. Few, so that a head's product of a short text stays in one
# thread: waking threads for each head costs more than the product, far more on a busy machine.
QUERY_ROWS = 16


def forward(
    checkpoint: Checkpoint,
    decoder: Decoder,
    ids: Sequence[int],
    *,
    advance: Advance | None = None,
) -> Array:
    """Return the logits after every position: float32 [len(ids), vocab].

    `advance` is told every byte of weights that was used, `bytes_to_read` in total. ValueError when
    there is no id, one lies outside the vocabulary, or there are more than the context holds.
    """
    _check_ids(decoder, ids)
    model = _Model(checkpoint, decoder, advance or (lambda _: None))
    rotation = rotary_tables(decoder.rope, len(ids))
    hidden = model.embed(ids)
    for layer in range(decoder.layers):
        hidden = model.run_layer(layer, hidden, rotation)
    names = decoder.names
    return model.project(decoder.head_name, model.normalize(names.final_norm, hidden))


def bytes_to_read(checkpoint: Checkpoint, decoder: Decoder) -> int:
    """Bytes of weights that one forward pass uses: every matrix but the embedding's lookup."""
    matrices = [name for name, shape in decoder.shapes().items() if len(shape) == 2]
    used = {*matrices, decoder.head_name} - (
        set() if decoder.is_tied else {decoder.names.embedding}
    )
    return sum(checkpoint.tensors[name].nbytes for name in used)


def rotary_tables(rope: Rope, length: int) -> tuple[Array, Array]:
    """Return cos and sin, each float32 [length, rotary_dim / 2], for a sequence of `length`.

    With LongRoPE the whole sequence takes the long factors once it exceeds the original context,
    as transformers' longrope update does in a forward pass without a cache.
    """
    # float32 at every step, as in transformers: far out its rounding is part of the model. Only the
    # power is rounded from float64, which is what torch's float32 power gives.
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    steps = np.power(rope.theta, exponents, dtype=np.float64).astype(np.float32)
    scale = 1.0
    if rope.is_long:
        is_beyond = length > rope.original_context
        factors = rope.long_factors if is_beyond else rope.short_factors
        steps = steps * np.array(factors, np.float32)
        scale = rope.long_scale if is_beyond else rope.short_scale
    frequencies = np.float32(1) / steps
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles) * np.float32(scale), np.sin(angles) * np.float32(scale)


def attend(queries: Array, keys: Array, values: Array, window: int | None) -> Array:
    """Causal attention: [n, heads, d] over [n, kv_heads, d] twice; returns [n, heads, d].

    Query i sees key j when i - window < j <= i, as in transformers' sliding window mask.
    """
    length, heads, width = queries.shape
    kv_heads = keys.shape[1]
    # Heads first: [kv_heads, heads that share a key, n, d].
    queries = (queries * np.float32(width**-0.5)).transpose(1, 0, 2)
    queries = queries.reshape(kv_heads, heads // kv_heads, length, width)
    keys, values = keys.transpose(1, 2, 0)[:, None], values.transpose(1, 0, 2)[:, None]
    out = np.empty((length, kv_heads, heads // kv_heads, width), np.float32)
    for start in range(0, length, QUERY_ROWS):
        stop = min(start + QUERY_ROWS, length)
        first = 0 if window is None else max(0, start - window + 1)
        scores = queries[:, :, start:stop] @ keys[..., first:stop]
        mask_hidden(scores, start - first, window)
        mixed = softmax(scores) @ values[:, :, first:stop]
        out[start:stop] = mixed.transpose(2, 0, 1, 3)
    return out.reshape(length, heads, width)


def mask_hidden(scores: Array, offset: int, window: int | None) -> None:
    """Set to -inf, in place, what row i (query i + offset) of [..., queries, keys] must not see."""
    query = np.arange(scores.shape[-2])[:, None] + offset
    key = np.arange(scores.shape[-1])
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    scores[..., hidden] = -np.inf


def softmax(scores: Array) -> Array:
    """Softmax over the last axis."""
    weights: Array = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def rotate(states: Array, rotation: tuple[Array, Array]) -> Array:
    """Apply rotary embedding, rotate-half layout, to the first 2 x pairs of [n, heads, d]."""
    cos, sin = (table[:, None, :] for table in rotation)
    pairs = cos.shape[-1]
    low, high = states[..., :pairs], states[..., pairs : 2 * pairs]
    rest = states[..., 2 * pairs :]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin, rest], axis=-1)


def silu(values: Array) -> Array:
    """x * sigmoid(x), without overflow at either end."""
    # tanh saturates where exp would overflow; the two forms of the sigmoid are identical.
    sigmoid: Array = np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * values))
    return values * sigmoid


class _Model:
    """One forward pass: the checkpoint, its architecture, and whom to tell of progress."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, advance: Advance) -> None:
        self._checkpoint = checkpoint
        self._decoder = decoder
        self._advance = advance

    def embed(self, ids: Sequence[int]) -> Array:
        """Look the tokens up, one row each: float32 [n, hidden]."""
        hidden = np.empty((len(ids), self._decoder.hidden), np.float32)
        name = self._decoder.names.embedding
        for position, token in enumerate(ids):
            for _, raw in self._checkpoint.read_rows(name, token, 1):
                hidden[position] = to_float32(raw)[0]
        return hidden

    def run_layer(self, layer: int, hidden: Array, rotation: tuple[Array, Array]) -> Array:
        """One decoder layer: [n, hidden] to [n, hidden]."""
        names = self._decoder.names
        normed = self.normalize(names.attention_norm.format(layer), hidden)
        mixed = self._attention(layer, normed, rotation)
        hidden = hidden + self.project(names.attention_out.format(layer), mixed)
        normed = self.normalize(names.mlp_norm.format(layer), hidden)
        gate_up = self.project(names.gate_up.format(layer), normed)
        middle = self._decoder.intermediate
        gated = silu(gate_up[:, :middle]) * gate_up[:, middle:]
        return hidden + self.project(names.down.format(layer), gated)

    def _attention(self, layer: int, normed: Array, rotation: tuple[Array, Array]) -> Array:
        decoder = self._decoder
        fused = self.project(decoder.names.qkv.format(layer), normed)
        fused = fused.reshape(len(normed), -1, decoder.head_dim)
        heads, kv_heads = decoder.heads, decoder.kv_heads
        queries, keys, values = np.split(fused, [heads, heads + kv_heads], axis=1)
        mixed = attend(rotate(queries, rotation), rotate(keys, rotation), values, decoder.window)
        return mixed.reshape(len(normed), -1)

    def normalize(self, name: str, hidden: Array) -> Array:
        """RMSNorm over the last axis."""
        weight = self._checkpoint.read(name)
        mean_square = np.mean(np.square(hidden), axis=-1, keepdims=True)
        normed: Array = hidden / np.sqrt(mean_square + np.float32(self._decoder.norm_epsilon))
        return weight * normed

    def project(self, name: str, inputs: Array) -> Array:
        """Multiply [n, in] with the tensor [out, in], piece by piece: [n, out]."""
        rows = self._checkpoint.tensors[name].shape[0]
        # Transposed, so that a piece's output is contiguous: up to twice as fast in BLAS.
        outputs = np.empty((rows, len(inputs)), np.float32)
        for row, raw in self._checkpoint.read_rows(name, piece=PIECE_WEIGHTS):
            np.matmul(to_float32(raw), inputs.T, out=outputs[row : row + len(raw)])
            self._advance(raw.nbytes)
        return np.ascontiguousarray(outputs.T)


def _check_ids(decoder: Decoder, ids: Sequence[int]) -> None:
    if not 0 < len(ids) <= decoder.context:
        raise ValueError(f"{len(ids)} tokens; allowed 1 to {decoder.context} (the context)")
    if outside := [token for token in ids if not 0 <= token < decoder.vocab]:
        raise ValueError(f"token {outside[0]}; allowed 0 to {decoder.vocab - 1} (the vocabulary)")
