"""The source model itself: a float32 forward pass in NumPy, streamed from the checkpoint.

Follows transformers' Phi3ForCausalLM with eager attention in float32. One piece of one tensor is
in memory at a time, so memory is a few activations whatever the model's size. Where tensors come
from is the caller's: `Weights` of a checkpoint here, of an artifact or of a calibration elsewhere.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import Checkpoint, to_float32
from toolkit.decoder import MASKED_LOGIT, QUICK_GELU, BlockSparse, Decoder, Parts, Rope
from toolkit.quality.routing import route

Array = NDArray[np.float32]
Advance = Callable[[int], None]

# Weights held at once: 16 MB as float32. Larger pieces wake the BLAS threads less often.
PIECE_WEIGHTS = 1 << 22
# Queries whose scores are held at once. Few, so that a head's product of a short text stays in one
# thread: waking threads for each head costs more than the product, far more on a busy machine.
QUERY_ROWS = 16
# Tokens whose gates are computed at once: the temporary arrays stay small beside the activations.
GATED_ROWS = 256


class Weights(Protocol):
    """A model's tensors, by the checkpoint's names, as a forward pass uses them."""

    def look_up(self, name: str, ids: Sequence[int]) -> Array:
        """Rows of a matrix, one for each id: float32 [len(ids), columns]."""

    def read(self, name: str) -> Array:
        """A vector, float32."""

    def project(self, name: str, inputs: Array) -> Array:
        """Multiply [n, in] with the matrix [out, in]: float32 [n, out]."""


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
    weights = CheckpointWeights(checkpoint, advance or (lambda _: None))
    return project(weights, decoder, decoder.head_name, final_states(weights, decoder, ids))


def final_states(weights: Weights, decoder: Decoder, ids: Sequence[int]) -> Array:
    """Return what the head multiplies: float32 [len(ids), hidden]; errors as in `forward`."""
    states: Array = final_states_of(weights, decoder, [ids])[0]
    return states


def final_states_of(
    weights: Weights, decoder: Decoder, sequences: Sequence[Sequence[int]]
) -> Array:
    """The same for sequences of one length n, in one pass over the weights: [texts, n, hidden]."""
    for ids in sequences:
        check_ids(decoder, ids)
    hidden = np.stack([embed(weights, decoder, ids) for ids in sequences])
    return states_of_embedded(weights, decoder, hidden)


def states_of_embedded(weights: Weights, decoder: Decoder, hidden: Array) -> Array:
    """The same for what the first layer sees: [texts, n, hidden] to the same shape."""
    rotation = rotary_tables(decoder.rope, hidden.shape[1])
    for layer in range(decoder.layers):
        hidden = run_layer(weights, decoder, layer, hidden, rotation)
    return norm(weights, decoder, decoder.names.final_norm, hidden)


def embed(weights: Weights, decoder: Decoder, ids: Sequence[int]) -> Array:
    """What the first layer is given: float32 [len(ids), hidden]."""
    found = weights.look_up(decoder.names.embedding, ids)
    found *= np.float32(decoder.embedding_scale)
    return found


def run_layer(
    weights: Weights, decoder: Decoder, layer: int, hidden: Array, rotation: tuple[Array, Array]
) -> Array:
    """One decoder layer on texts of one length: [texts, n, hidden] to the same shape.

    Its matrices are projected once each, in the order of decoder.layer_matrices, with the tokens of
    all texts in one array [texts * n, in].
    """
    names, shape = decoder.names, hidden.shape
    states = hidden.reshape(-1, shape[-1])
    normed = norm(weights, decoder, names.attention_norm.format(layer), states)
    (fused,) = project_parts(weights, decoder, normed, decoder.qkv(layer))
    mixed = _mix(decoder, layer, fused.reshape(*shape[:2], -1), rotation)
    states = states + project(weights, decoder, names.attention_out.format(layer), mixed)
    normed = norm(weights, decoder, names.mlp_norm.format(layer), states)
    answer = run_experts if decoder.experts else run_mlp
    return (states + answer(weights, decoder, layer, normed)).reshape(shape)


def run_mlp(
    weights: Weights, decoder: Decoder, layer: int, normed: Array, expert: int = 0
) -> Array:
    """The gated MLP of a layer, or one of its experts: [n, hidden] to the same shape."""
    parts = decoder.gate(layer, expert), decoder.up(layer, expert)
    gate, up = project_parts(weights, decoder, normed, *parts)
    gated = apply_gate(gate, up, decoder.gegelu_limit)
    del gate, up  # large, and the next matrix may be at work for long
    return project(weights, decoder, decoder.down(layer, expert), gated)


def run_experts(weights: Weights, decoder: Decoder, layer: int, normed: Array) -> Array:
    """What the experts of a layer make of [n, hidden], each of the tokens that its router sends."""
    if decoder.experts is None:
        raise ValueError(f"layer {layer} of {decoder.family} has no experts")
    router = weights.read(decoder.names.router.format(layer)).astype(np.float64)
    picked, shares = route(normed.astype(np.float64) @ router.T, decoder.experts)
    mixed = np.zeros_like(normed)
    for expert in range(decoder.experts.count):
        tokens, places = np.nonzero(picked == expert)
        answers = run_mlp(weights, decoder, layer, normed[tokens], expert)
        mixed[tokens] += answers * shares[tokens, places, None].astype(np.float32)
    return mixed


def project(weights: Weights, decoder: Decoder, name: str, inputs: Array) -> Array:
    """Multiply [n, in] with a matrix [out, in] and add its bias, if any: [n, out].

    Of the head, tokens that are never said get MASKED_LOGIT besides.
    """
    outputs = weights.project(name, inputs)
    if bias := decoder.bias_of(name):
        outputs += weights.read(bias)
    if name == decoder.head_name and decoder.masked_tokens:
        outputs[:, decoder.masked_tokens] += np.float32(MASKED_LOGIT)
    return outputs


def project_parts(
    weights: Weights, decoder: Decoder, inputs: Array, *projections: Parts
) -> list[Array]:
    """What projections make of [n, in]: [n, rows] each; every tensor is multiplied with once."""
    names = dict.fromkeys(part.tensor for parts in projections for part in parts)
    outputs = {name: project(weights, decoder, name, inputs) for name in names}
    found = []
    for parts in projections:
        columns = [outputs[part.tensor][:, part.span] for part in parts]
        found.append(columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1))
    return found


def bytes_to_read(checkpoint: Checkpoint, decoder: Decoder) -> int:
    """Bytes of weights that a forward pass multiplies with: not an embedding's, nor a router's."""
    shapes = decoder.shapes()
    matrices = [n for n in shapes if len(shapes[n]) == 2 and decoder.kind_of(n) != "router"]
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
    if rope.short_factors:
        is_beyond = rope.is_long and length > rope.original_context
        factors = rope.long_factors if is_beyond else rope.short_factors
        steps = steps * np.array(factors, np.float32)
        scale = rope.long_scale if is_beyond else rope.short_scale
    frequencies = np.float32(1) / steps
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles) * np.float32(scale), np.sin(angles) * np.float32(scale)


def norm(weights: Weights, decoder: Decoder, name: str, hidden: Array) -> Array:
    """The decoder's kind of norm over the last axis; the last one times the logits' scale."""
    weight, epsilon = weights.read(name), decoder.norm_epsilon
    if decoder.norm == "rms":
        normed = normalize(weight, hidden, epsilon)
    else:
        normed = normalize_layer(weight, weights.read(decoder.bias_of(name)), hidden, epsilon)
    if name == decoder.names.final_norm:
        normed *= np.float32(decoder.logit_scale)
    return normed


def normalize_layer(weight: Array, bias: Array, hidden: Array, epsilon: float) -> Array:
    """LayerNorm over the last axis."""
    normed = normalize(weight, hidden - hidden.mean(axis=-1, keepdims=True), epsilon)
    normed += bias
    return normed


def normalize(weight: Array, hidden: Array, epsilon: float) -> Array:
    """RMSNorm over the last axis."""
    mean_square = np.mean(np.square(hidden), axis=-1, keepdims=True)
    normed: Array = hidden / np.sqrt(mean_square + np.float32(epsilon))
    normed *= weight
    return normed


def apply_gate(gate: Array, up: Array, gegelu_limit: float | None = None) -> Array:
    """SiLU of the gate by up, or gegelu of both, each [n, intermediate]: the same shape."""
    gated = np.empty(gate.shape, np.float32)
    for start in range(0, len(gate), GATED_ROWS):
        rows = slice(start, start + GATED_ROWS)
        gated[rows] = _gate_rows(gate[rows], up[rows], gegelu_limit)
    return gated


def _gate_rows(gate: Array, up: Array, gegelu_limit: float | None) -> Array:
    if gegelu_limit is None:
        return silu(gate) * up
    steep = np.float32(QUICK_GELU)
    gelu: Array = silu(np.minimum(gate, np.float32(gegelu_limit)) * steep) / steep
    return gelu * (np.clip(up, -np.float32(gegelu_limit), np.float32(gegelu_limit)) + 1)


def _mix(decoder: Decoder, layer: int, fused: Array, rotation: tuple[Array, Array]) -> Array:
    """Attention of each text by itself: [texts, n, qkv_rows] to [texts * n, heads * head_dim]."""
    texts, length, _ = fused.shape
    heads, kv_heads = decoder.heads, decoder.kv_heads
    mixed = np.empty((texts, length, heads, decoder.head_dim), np.float32)
    for text, states in enumerate(fused.reshape(texts, length, -1, decoder.head_dim)):
        queries, keys, values = np.split(states, [heads, heads + kv_heads], axis=1)
        queries = rotate(queries, rotation) * np.float32(decoder.score_scale)
        keys = rotate(keys, rotation)
        sparse = decoder.sparse_of(layer)
        mixed[text] = attend(queries, keys, values, decoder.window, sparse)
    return mixed.reshape(texts * length, -1)


def attend(
    queries: Array, keys: Array, values: Array, window: int | None,
    sparse: BlockSparse | None = None,
) -> Array:  # fmt: skip
    """Causal attention: [n, heads, d] over [n, kv_heads, d] twice; returns [n, heads, d].

    Queries are scaled already. Query i sees key j when i - window < j <= i, as in transformers'
    sliding window mask, and when `sparse` lets its block.
    """
    length, heads, width = queries.shape
    kv_heads = keys.shape[1]
    # Heads first: [kv_heads, heads that share a key, n, d].
    queries = queries.transpose(1, 0, 2).reshape(kv_heads, heads // kv_heads, length, width)
    keys, values = keys.transpose(1, 2, 0)[:, None], values.transpose(1, 0, 2)[:, None]
    out = np.empty((length, kv_heads, heads // kv_heads, width), np.float32)
    for start in range(0, length, QUERY_ROWS):
        stop = min(start + QUERY_ROWS, length)
        first = 0 if window is None else max(0, start - window + 1)
        scores = queries[:, :, start:stop] @ keys[..., first:stop]
        mask_hidden(scores, start - first, window)
        if sparse is not None:
            mask_blocks(scores, start, first, sparse)
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


def mask_blocks(scores: Array, query: int, key: int, sparse: BlockSparse) -> None:
    """Set to -inf, in place, what [kv_heads, heads that share, queries, keys] must not see.

    The first query is at position `query`, the first key at `key`.
    """
    groups, shared, queries, keys = scores.shape
    query_blocks = (np.arange(queries)[:, None] + query) // sparse.block
    key_blocks = (np.arange(keys) + key) // sparse.block
    shifts = np.array(sparse.shifts).reshape(groups, shared, 1, 1)
    scores[~sparse.sees(query_blocks, key_blocks, shifts)] = -np.inf


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


class CheckpointWeights:
    """The source's own tensors, read piece by piece; `advance` is told the bytes of matrices."""

    def __init__(self, checkpoint: Checkpoint, advance: Advance) -> None:
        self._checkpoint = checkpoint
        self._advance = advance

    def look_up(self, name: str, ids: Sequence[int]) -> Array:
        """Rows of a matrix, one for each id: float32 [len(ids), columns]."""
        found = np.empty((len(ids), self._checkpoint.tensors[name].shape[-1]), np.float32)
        for position, token in enumerate(ids):
            for _, raw in self._checkpoint.read_rows(name, token, 1):
                found[position] = to_float32(raw)[0]
        return found

    def read(self, name: str) -> Array:
        """A vector, float32."""
        return self._checkpoint.read(name)

    def project(self, name: str, inputs: Array) -> Array:
        """Multiply [n, in] with the tensor [out, in], piece by piece: [n, out]."""
        info = self._checkpoint.tensors[name]
        outputs = np.empty((len(inputs), info.shape[0]), np.float32)
        if not len(inputs):  # an expert that no token goes to
            self._advance(info.nbytes)
            return outputs
        for row, raw in self._checkpoint.read_rows(name, piece=PIECE_WEIGHTS):
            np.matmul(inputs, to_float32(raw).T, out=outputs[:, row : row + len(raw)])
            self._advance(raw.nbytes)
        return outputs


def check_ids(decoder: Decoder, ids: Sequence[int]) -> None:
    """ValueError when there is no id, too many, or one outside the vocabulary."""
    if not 0 < len(ids) <= decoder.context:
        raise ValueError(f"{len(ids)} tokens; allowed 1 to {decoder.context} (the context)")
    if outside := [token for token in ids if not 0 <= token < decoder.vocab]:
        raise ValueError(f"token {outside[0]}; allowed 0 to {decoder.vocab - 1} (the vocabulary)")
