"""The decoder as OpenVINO operations, stateful, in the patterns that its plugins recognise.

The patterns (compressed weights, RMS norm, rotary embedding, cache, grouped attention, sliding
window) are those that optimum-intel's export leaves in a network, because the plugins' fusions and
the paged attention of openvino-genai are matched against them.
"""

from dataclasses import dataclass, replace

import numpy as np

from toolkit.decoder import MASKED_LOGIT, QUICK_GELU, Decoder, Experts, Parts, Rope, cut
from toolkit.formats.openvino import layout as layouts
from toolkit.formats.openvino.experts import Stacks, add_experts
from toolkit.formats.openvino.layout import Layout, stack_names
from toolkit.formats.openvino.network import Network, Value
from toolkit.formats.openvino.recipe import OpenvinoRecipe
from toolkit.formats.openvino.sparse import add_block_mask

LAST = -1
TO_END = (1 << 63) - 1
MASKED = -65504.0  # the least float16: the mask may be computed in half precision


def lay_out(recipe: OpenvinoRecipe, decoder: Decoder) -> Layout:
    """Place every constant. Behind the tensors stand small ones, which all layers share.

    Without overrides one layer has all of them; with, a shape may be that of another layer alone.
    """
    layout = layouts.lay_out(recipe, decoder)
    layers = decoder.layers if recipe.quantization.overrides else 1
    _connect(recipe, replace(decoder, layers=layers), layout)
    return layout


def make_network(recipe: OpenvinoRecipe, decoder: Decoder) -> Network:
    """The network over the data file that `lay_out` describes."""
    return _connect(recipe, decoder, layouts.lay_out(recipe, decoder))


def _connect(recipe: OpenvinoRecipe, decoder: Decoder, layout: Layout) -> Network:
    graph = _Graph(recipe, decoder, Network(decoder.family, layout))
    graph.add_model()
    return graph.net


@dataclass(frozen=True)
class _Inputs:
    """What every layer needs: cos and sin, masks, an empty cache, the beam each row continues."""

    cos: Value
    sin: Value
    mask: Value
    block_mask: Value
    empty: Value
    beam: Value


@dataclass(frozen=True)
class _Graph:
    recipe: OpenvinoRecipe
    decoder: Decoder
    net: Network

    def add_model(self) -> None:
        """Inputs to logits. Float weights ask for a float16 cache, as their exporter does."""
        net, names = self.net, self.decoder.names
        quantization = self.recipe.quantization
        if self.decoder.vision:  # pictures stand among the embeddings
            ids = net.parameter("inputs_embeds", "f32", f"?,?,{self.decoder.hidden}")
        else:
            ids = net.parameter("input_ids", "i64", "?,?")
        attention, positions = (
            net.parameter(name, "i64", "?,?") for name in ("attention_mask", "position_ids")
        )
        beam = net.parameter("beam_idx", "i32", "?")
        embedding, hidden = None, ids
        if not self.decoder.vision:
            embedding = net.matrix(names.embedding)
            hidden = look_up(net, self.decoder, embedding, ids)
        cos, sin = _add_rotation(net, self.decoder.rope, positions)
        mask = _add_mask(net, ids, attention, self.decoder.window)
        block_mask = mask
        if sparse := self.decoder.sparse:
            block_mask = add_block_mask(net, mask, ids, attention, sparse, MASKED)
        inputs = _Inputs(cos, sin, mask, block_mask, self._empty_cache(ids), beam)
        for layer in range(self.decoder.layers):
            hidden = self._add_layer(layer, hidden, inputs)
        hidden = self._norm(hidden, names.final_norm)
        if self.decoder.is_tied:
            logits = self._multiply(hidden, embedding or net.matrix(names.embedding))
        else:
            logits = self._linear(hidden, names.head)
        if self.decoder.masked_tokens:
            logits = net.add("Add", logits, self._mask_tokens())
        net.give(logits, "logits")
        net.set_runtime_option("ACTIVATIONS_SCALE_FACTOR", "8.0")
        if quantization.precision == "f16":
            net.set_runtime_option("KV_CACHE_PRECISION", "f16")

    def _mask_tokens(self) -> Value:
        """float32 [vocabulary]: nothing, but for tokens that are never said."""
        name, layout = "masked_tokens", self.net.layout
        if name not in layout.stored:
            bias = [0.0] * self.decoder.vocab
            for token in self.decoder.masked_tokens:
                bias[token] = MASKED_LOGIT
            layout.add_values(name, "f32", (self.decoder.vocab,), tuple(bias))
        return self.net.constant(name)

    def _add_layer(self, layer: int, hidden: Value, inputs: _Inputs) -> Value:
        net, names = self.net, self.decoder.names
        normed = self._norm(hidden, names.attention_norm.format(layer))
        attended = self._attention(layer, normed, inputs)
        out = self._linear(attended, names.attention_out.format(layer))
        hidden = net.add("Add", hidden, out)
        normed = self._norm(hidden, names.mlp_norm.format(layer))
        if self.decoder.experts:
            answer = self._mix(layer, normed, self.decoder.experts)
        else:
            answer = self._mlp(layer, normed)
        return net.add("Add", hidden, answer)

    def _attention(self, layer: int, normed: Value, inputs: _Inputs) -> Value:
        net, decoder = self.net, self.decoder
        heads, kv_heads, width = decoder.heads, decoder.kv_heads, decoder.head_dim
        ends = [n * width for n in (0, heads, heads + kv_heads, heads + 2 * kv_heads)]
        parts = decoder.qkv(layer)
        products = self._multiply_parts(normed, parts)
        query, key, value = (
            self._split_heads(self._take(products, cut(parts, first, last)), count)
            for first, last, count in zip(ends, ends[1:], (heads, kv_heads, kv_heads), strict=False)
        )
        query, key = self._rotate(query, inputs), self._rotate(key, inputs)
        keys = self._cache(layer, "key", key, inputs)
        values = self._cache(layer, "value", value, inputs)
        mask = inputs.block_mask if decoder.sparse_of(layer) else inputs.mask
        attended = net.add(
            "ScaledDotProductAttention", query, keys, values, mask,
            net.number(decoder.score_scale), causal=False,
        )  # fmt: skip
        rows = net.add("Transpose", attended, net.integers(0, 2, 1, 3))
        return net.add("Reshape", rows, net.integers(0, 0, heads * width), special_zero=True)

    def _multiply_parts(self, rows: Value, *projections: Parts) -> dict[str, Value]:
        """The products with every tensor that projections are put together of."""
        names = dict.fromkeys(part.tensor for parts in projections for part in parts)
        return {name: self._linear(rows, name) for name in names}

    def _take(self, products: dict[str, Value], parts: Parts) -> Value:
        """The columns [batch, n, rows] that parts of a projection name, of its products."""
        taken = []
        for part in parts:
            value = products[part.tensor]
            if part.count < self.decoder.shapes()[part.tensor][0]:
                value = _slice(self.net, value, part.span.start, part.span.stop, 2, part.step)
            taken.append(value)
        return taken[0] if len(taken) == 1 else self.net.add("Concat", *taken, axis=2)

    def _mix(self, layer: int, normed: Value, experts: Experts) -> Value:
        """The experts; the router stays float32."""
        gate, up, down = (
            self.net.matrix(pattern.format(layer, "*")) for pattern in stack_names(self.decoder)
        )
        router = self.net.constant(self.decoder.names.router.format(layer))
        stacks = Stacks(gate, up, down)
        return add_experts(self.net, normed, router, stacks, experts, self.decoder.hidden)

    def _split_heads(self, rows: Value, heads: int) -> Value:
        """[batch, n, heads x width] to [batch, heads, n, width]."""
        net = self.net
        shape = net.integers(0, 0, heads, self.decoder.head_dim)
        split = net.add("Reshape", rows, shape, special_zero=True)
        return net.add("Transpose", split, net.integers(0, 2, 1, 3))

    def _rotate(self, states: Value, inputs: _Inputs) -> Value:
        """Rotate-half over the first `rotary_dim` of each head."""
        net, rotary = self.net, self.decoder.rope.rotary_dim
        rest = None
        if rotary < self.decoder.head_dim:
            rest = _slice(net, states, rotary, TO_END, 3)
            states = _slice(net, states, 0, rotary, 3)
        low = _slice(net, states, 0, rotary // 2, 3)
        high = _slice(net, states, rotary // 2, TO_END, 3)
        half = net.add("Concat", net.add("Multiply", high, net.number(-1.0)), low, axis=-1)
        rotated = net.add(
            "Add", net.add("Multiply", states, inputs.cos), net.add("Multiply", half, inputs.sin)
        )
        return rotated if rest is None else net.add("Concat", rotated, rest, axis=-1)

    def _empty_cache(self, ids: Value) -> Value:
        """float32 [batch, kv_heads, 0, width]."""
        net = self.net
        batch = self._gather(_shape(net, ids), net.integers(0), net.integer(0))
        sizes = [net.integers(n) for n in (self.decoder.kv_heads, 0, self.decoder.head_dim)]
        shape = net.add("Concat", batch, *sizes, axis=0)
        return net.add("Broadcast", net.number(0.0), shape, mode="numpy")

    def _cache(self, layer: int, part: str, new: Value, inputs: _Inputs) -> Value:
        """Append to a state variable; keys or values of all positions, one for each query head."""
        net, decoder = self.net, self.decoder
        heads, kv_heads, width = decoder.heads, decoder.kv_heads, decoder.head_dim
        variable = f"past_key_values.{layer}.{part}present.{layer}.{part}"
        old = net.add(
            "ReadValue", inputs.empty, variable_id=variable, variable_type="f32",
            variable_shape=f"?,{kv_heads},?,{width}",
        )  # fmt: skip
        kept = self._gather(old, inputs.beam, net.integer(0))
        grown = net.add("Concat", kept, new, axis=-2)
        net.add("Assign", grown, variable_id=variable)
        if kv_heads == heads:
            return grown
        each = net.add("Unsqueeze", grown, net.integer(2))
        shape = net.integers(1, 1, heads // kv_heads, 1, 1)
        repeated = net.add("Broadcast", each, shape, mode="bidirectional")
        return net.add("Reshape", repeated, net.integers(0, heads, -1, width), special_zero=True)

    def _mlp(self, layer: int, normed: Value) -> Value:
        net, inner = self.net, self.decoder.intermediate
        parts = self.decoder.gate(layer), self.decoder.up(layer)
        products = self._multiply_parts(normed, *parts)
        if self.decoder.gate_parts:
            gate, up = (self._take(products, some) for some in parts)
        else:
            (gate_up,) = products.values()
            gate, up = net.add_many(
                "VariadicSplit", gate_up, net.integer(LAST), net.integers(inner, inner), outputs=2
            )
        return self._linear(self._gate(gate, up), self.decoder.down(layer))

    def _gate(self, gate: Value, up: Value) -> Value:
        """SiLU of the gate by up, or gegelu."""
        net, limit = self.net, self.decoder.gegelu_limit
        if limit is None:
            return net.add("Multiply", up, net.add("Swish", gate))
        low = net.add("Minimum", gate, net.number(limit))
        gelu = net.add("Swish", low, net.number(QUICK_GELU))
        near = net.add("Clamp", up, min=str(-limit), max=str(limit))
        return net.add("Multiply", gelu, net.add("Add", near, net.number(1.0)))

    def _norm(self, hidden: Value, name: str) -> Value:
        """The decoder's kind of norm with float32 weights."""
        net = self.net
        if self.decoder.norm == "layer":
            normed = net.add(
                "MVN", hidden, net.integers(LAST), normalize_variance=True,
                eps=str(self.decoder.norm_epsilon), eps_mode="inside_sqrt",
            )  # fmt: skip
            scaled = net.add("Multiply", normed, net.constant(name))
            return net.add("Add", scaled, net.constant(self.decoder.bias_of(name)))
        square = net.add("Power", hidden, net.floats((2.0,), (1, 1, 1)))
        mean = net.add("ReduceMean", square, net.integers(LAST), keep_dims=True)
        epsilon = net.floats((self.decoder.norm_epsilon,), (1, 1, 1))
        root = net.add("Sqrt", net.add("Add", mean, epsilon))
        inverse = net.add("Divide", net.floats((1.0,), (1, 1, 1)), root)
        return net.add("Multiply", net.add("Multiply", hidden, inverse), net.constant(name))

    def _linear(self, rows: Value, name: str) -> Value:
        """The product with a matrix, and its bias, if any."""
        product = self._multiply(rows, self.net.matrix(name))
        bias = self.decoder.bias_of(name)
        return self.net.add("Add", product, self.net.constant(bias)) if bias else product

    def _multiply(self, rows: Value, matrix: Value) -> Value:
        return self.net.add("MatMul", rows, matrix, transpose_a=False, transpose_b=True)

    def _gather(self, values: Value, indices: Value, axis: Value) -> Value:
        return self.net.add("Gather", values, indices, axis, batch_dims=0)


def look_up(net: Network, decoder: Decoder, embedding: Value, ids: Value) -> Value:
    """Embeddings of int64 ids [batch, n]: float32 [batch, n, hidden]."""
    rows = net.add("Convert", ids, dtype="i32", destination_type="i32")
    hidden = net.add("Gather", embedding, rows, net.integer(0, "i32"), batch_dims=0)
    if decoder.embedding_scale != 1:
        hidden = net.add("Multiply", hidden, net.number(decoder.embedding_scale))
    return hidden


def _slice(net: Network, value: Value, start: int, stop: int, axis: int, step: int = 1) -> Value:
    steps = net.integers(step)
    ends = net.integers(start), net.integers(stop)
    return net.add("Slice", value, *ends, steps, net.integers(axis))


def _shape(net: Network, value: Value) -> Value:
    return net.add("ShapeOf", value, dtype="i64", output_type="i64")


def _add_rotation(net: Network, rope: Rope, positions: Value) -> tuple[Value, Value]:
    """cos and sin, float32 [batch, 1, n, rotary_dim]."""
    frequencies, scale = _add_frequencies(net, rope, positions)
    places = net.add("Unsqueeze", positions, net.integer(1))
    places = net.add("Convert", places, dtype="f32", destination_type="f32")
    angles = net.add("MatMul", frequencies, places, transpose_a=False, transpose_b=False)
    angles = net.add("Transpose", angles, net.integers(0, 2, 1))
    angles = net.add("Concat", angles, angles, axis=-1)
    cos, sin = net.add("Cos", angles), net.add("Sin", angles)
    if scale is not None:
        cos, sin = net.add("Multiply", cos, scale), net.add("Multiply", sin, scale)
    axis = net.integer(1)
    return net.add("Unsqueeze", cos, axis), net.add("Unsqueeze", sin, axis)


def _add_frequencies(net: Network, rope: Rope, positions: Value) -> tuple[Value, Value | None]:
    """Radians a position, [1, rotary_dim / 2, 1], and what to scale cos and sin by, if anything.

    With LongRoPE the long factors hold for all once any position lies beyond the original context.
    """
    shape = (1, rope.rotary_dim // 2, 1)
    short = net.floats(_frequencies(rope, rope.short_factors), shape)
    if not rope.is_long:
        return short, None
    last = net.add("ReduceMax", positions, net.integers(0, 1), keep_dims=False)
    limit = net.integer(rope.original_context)
    is_long = net.add("GreaterEqual", last, limit, dtype="boolean")
    long = net.floats(_frequencies(rope, rope.long_factors), shape)
    frequencies = net.add("Select", is_long, long, short, dtype="f32")
    scales = (rope.long_scale, rope.short_scale)
    if scales[0] == scales[1]:
        return frequencies, None if scales[0] == 1 else net.number(scales[0])
    values = [net.number(scale) for scale in scales]
    return frequencies, net.add("Select", is_long, *values, dtype="f32")


def _frequencies(rope: Rope, factors: tuple[float, ...]) -> tuple[float, ...]:
    """Radians a position, float32 at every step as in transformers; only the power is exact."""
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    steps = np.power(rope.theta, exponents, dtype=np.float64).astype(np.float32)
    wide = np.array(factors or (1.0,) * len(steps), np.float32)
    return tuple(map(float, np.float32(1) / (wide * steps)))


def _add_mask(net: Network, ids: Value, attention: Value, window: int | None) -> Value:
    """float32 [batch, 1, n, total]: 0 where a query sees a key, MASKED where not.

    The window is "key > query + (-window)" inside the chain of BitwiseAnd: paged attention finds it
    in this form only, and drops any other one silently.
    """
    batch, count, total = (
        net.add("Gather", _shape(net, value), net.integer(axis), net.integer(0), batch_dims=0)
        for value, axis in ((ids, 0), (ids, 1), (attention, 1))
    )
    keys = net.add("Unsqueeze", _range(net, net.integer(0), total), net.integers(0, 1, 2))
    first = net.add("Subtract", total, count)
    queries = net.add("Unsqueeze", _range(net, first, total), net.integers(0, 1, 3))
    sees = net.add("LessEqual", keys, queries, dtype="boolean")
    if window is not None:
        oldest = net.add("Add", queries, net.integer(-window))
        near = net.add("Greater", keys, oldest, dtype="boolean")
        always = net.integer(1, "boolean")
        near = net.add("BitwiseAnd", always, near)
        sees = net.add("BitwiseAnd", always, net.add("BitwiseAnd", near, sees))
    present = net.add("Convert", attention, dtype="boolean", destination_type="boolean")
    sees = net.add("BitwiseAnd", sees, net.add("Unsqueeze", present, net.integers(1, 2)))
    zero = net.integer(0)
    batch, count, total = (net.add("Unsqueeze", size, zero) for size in (batch, count, total))
    shape = net.add("Concat", batch, net.integers(1), count, total, axis=0)
    sees = net.add("Broadcast", sees, shape, mode="bidirectional")
    mask = net.add("Select", sees, net.number(0.0), net.number(MASKED), dtype="f32")
    # Does nothing here; paged attention's pattern has it.
    return net.add("Slice", mask, net.integers(0), total, net.integers(1), net.integers(3))


def _range(net: Network, first: Value, stop: Value) -> Value:
    return net.add("Range", first, stop, net.integer(1), dtype="i64", output_type="i64")
