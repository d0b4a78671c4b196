"""The ONNX graph: operators of com.microsoft as onnxruntime-genai expects them.

Source: the operators' contracts in onnxruntime/docs/ContribOperators.md, and the graphs that
onnxruntime_genai.models.builder writes.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from toolkit.decoder import QUICK_GELU, Experts
from toolkit.formats.onnx import apart, routing, sparse
from toolkit.formats.onnx.layout import EMBEDDING, Layout, rope_rows
from toolkit.formats.onnx.nodes import MICROSOFT, Graph, make_proto

EMBEDDED = "inputs_embeds"  # instead of ids, where another graph puts pictures among the tokens


def make_model(layout: Layout, producer: str, adapted: Collection[str] = ()) -> Any:
    """Build the ModelProto: offsets into the data file, no weights.

    Matrices of these names get a branch for an adapter that stays apart.
    """
    graph = Graph.start(layout, adapted)
    _add_decoder(graph)
    return make_proto(graph, graph.decoder.family, _inputs(graph), _outputs(graph), producer)


def _add_decoder(graph: Graph) -> None:
    decoder = graph.decoder
    lengths = _add_lengths(graph)
    cos, sin = _add_rope(graph, lengths.total_int64)
    residual = EMBEDDED
    if not decoder.vision:
        residual = _scale_embedding(graph, add_embedding(graph, "input_ids"))
    branch = ""
    for layer in range(decoder.layers):
        prefix = f"model.layers.{layer}"
        normed, residual = _add_norm(graph, f"{prefix}.input_layernorm", residual, branch)
        branch = _add_attention(graph, layer, normed, lengths, cos, sin)
        normed, residual = _add_norm(graph, f"{prefix}.post_attention_layernorm", residual, branch)
        if decoder.experts:
            branch = _add_experts(graph, f"{prefix}.moe", normed, decoder.experts)
        else:
            branch = _add_mlp(graph, f"{prefix}.mlp", normed)
    normed, _ = _add_norm(graph, "model.norm", residual, branch)
    _add_linear(graph, "lm_head", normed, output="logits")


@dataclass(frozen=True)
class _Lengths:
    """What attention needs of the mask: int32 last positions, int32 and int64 total length.

    `counts`, int32, are the lengths of all sequences, where there is sparse attention.
    """

    last_positions: str
    total: str
    total_int64: str
    counts: str


def _add_lengths(graph: Graph) -> _Lengths:
    one = graph.integers(1)
    count = graph.add("ReduceSum", ["attention_mask", one], "/mask/count", keepdims=0)
    last = graph.add("Sub", [count, one], "/mask/last")
    shape = graph.add("Shape", ["attention_mask"], "/mask/shape")
    total = graph.add("Gather", [shape, graph.integers(1, scalar=True)], "/mask/total", axis=0)
    int32 = graph.elem("int32")
    counts = ""
    if graph.decoder.sparse:
        counts = graph.add("Cast", [count], "/mask/count_int32", to=int32)
    return _Lengths(
        graph.add("Cast", [last], "/mask/last_int32", to=int32),
        graph.add("Cast", [total], "/mask/total_int32", to=int32),
        total,
        counts,
    )


def _add_rope(graph: Graph, total: str) -> tuple[str, str]:
    """Names of cos and sin; with LongRoPE the long rows once the sequence outgrows the short."""
    rope = graph.decoder.rope
    short, long = rope_rows(rope, graph.layout.context_length)
    if not long:
        return "cos_table", "sin_table"
    limit = graph.integers(short, scalar=True)
    is_long = graph.add("Greater", [total, limit], "/rope/is_long")
    flag = graph.add("Cast", [is_long], "/rope/flag", to=graph.elem("int64"))
    start = graph.add("Mul", [flag, limit], "/rope/start")
    end = graph.add("Add", [start, total], "/rope/end")
    one = graph.integers(1)
    first = graph.add("Reshape", [start, one], "/rope/first")
    last = graph.add("Reshape", [end, one], "/rope/last")
    axis = graph.integers(0)
    cos = graph.add("Slice", ["cos_table", first, last, axis], "/rope/cos")
    sin = graph.add("Slice", ["sin_table", first, last, axis], "/rope/sin")
    return cos, sin


def add_embedding(graph: Graph, ids: str) -> str:
    """Rows of the embedding, in the type of the activations."""
    recipe, stored, node = graph.layout.recipe, graph.layout.stored, "/embed/gather"
    if bits := graph.layout.schemes.embedding:
        parts = (f"_Q{bits}", "_scales", "_zero_points")
        codes, *rest = [EMBEDDING + part for part in parts if EMBEDDING + part in stored]
        return graph.add(
            "GatherBlockQuantized", [codes, ids, *rest], node, MICROSOFT,
            bits=bits, block_size=recipe.quantization.block_size, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
    rows = graph.add("Gather", [EMBEDDING, ids], node)
    if stored[EMBEDDING].dtype == recipe.io_dtype:
        return rows
    return graph.add("Cast", [rows], "/embed/cast", to=graph.elem(recipe.io_dtype))


def _scale_embedding(graph: Graph, rows: str) -> str:
    if graph.decoder.embedding_scale == 1:
        return rows
    return graph.add("Mul", [rows, graph.active(graph.decoder.embedding_scale)], "/embed/scaled")


def _add_norm(graph: Graph, name: str, residual: str, branch: str) -> tuple[str, str]:
    """The norm of residual + branch; returns it and the new residual."""
    weights, node = [f"{name}.weight"], f"/{name.replace('.', '/')}"
    kind, epsilon = "SimplifiedLayerNormalization", graph.decoder.norm_epsilon
    if graph.decoder.norm == "layer":
        kind = "LayerNormalization"
        weights.append(f"{name}.bias")
    if not branch:
        normed = graph.add(kind, [residual, *weights], node, epsilon=epsilon, axis=-1, stash_type=1)
        return normed, residual
    is_final = name == "model.norm"
    outputs = [f"{node}/output"] + ([] if is_final else ["", "", f"{node}/residual"])
    normed = graph.add_many(
        f"Skip{kind}", [residual, branch, *weights], node, outputs, MICROSOFT, epsilon=epsilon
    )
    return normed, outputs[-1]


def _add_linear(graph: Graph, name: str, value: str, output: str = "") -> str:
    """The product with a matrix, its bias, and what an adapter apart adds to it."""
    node = f"/{name.replace('.', '/')}"
    output = output or f"{node}/output"
    parts = graph.layout.linears.get(name, ())
    if not parts or parts[0].tensor not in graph.adapted:
        return _add_product(graph, name, value, output)
    product = _add_product(graph, name, value, f"{node}/base")
    return apart.add_branch(graph, parts[0], value, product, output)


def _add_product(graph: Graph, name: str, value: str, output: str) -> str:
    """The product with a matrix, in the bits in which the layout stores it, and its bias."""
    recipe, stored = graph.layout.recipe, graph.layout.stored
    node = f"/{name.replace('.', '/')}"
    bits = next((n for n in (4, 8) if f"{name}.weight_Q{n}" in stored), 0)
    bias = f"{name}.bias" if f"{name}.bias" in stored else ""
    if not bits:
        product = f"{node}/product" if bias else output
        graph.add_many("MatMul", [value, f"{name}.weight"], node, [product])
        return graph.add_many("Add", [product, bias], f"{node}/sum", [output]) if bias else output
    codes = stored[f"{name}.weight_Q{bits}"]
    rows, blocks, _ = codes.shape
    size = recipe.quantization.block_size
    inputs = [value, codes.name, f"{name}.weight_scales"]
    if not recipe.quantization.symmetric:
        inputs.append(f"{name}.weight_zero_points")
    if bias:
        inputs += [""] * (5 - len(inputs)) + [bias]
    attributes = {"accuracy_level": level} if (level := recipe.accuracy_level) else {}
    return graph.add_many(
        "MatMulNBits", inputs, node, [output], MICROSOFT,
        K=blocks * size, N=rows, bits=bits, block_size=size, **attributes,
    )  # fmt: skip


def _add_attention(
    graph: Graph, layer: int, value: str, lengths: _Lengths, cos: str, sin: str
) -> str:
    decoder, prefix = graph.decoder, f"model.layers.{layer}.attn"
    qkv = _add_linear(graph, f"{prefix}.qkv_proj", value)
    past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
    present = [f"present.{layer}.{part}" for part in ("key", "value")]
    op, inputs = "GroupQueryAttention", [lengths.last_positions, lengths.total]
    node, own = f"/{prefix.replace('.', '/')}/gqa", {"local_window_size": decoder.window or -1}
    if pattern := decoder.sparse_of(layer):
        op, inputs = "SparseAttention", [sparse.ROWS, sparse.COLUMNS, lengths.total, lengths.counts]
        node, own = f"/{prefix.replace('.', '/')}/sparse", {"sparse_block_size": pattern.block}
    attended = graph.add_many(
        op,
        [qkv, "", "", *past, *inputs, cos, sin],
        node,
        [f"{node}/output", *present],
        MICROSOFT,
        num_heads=decoder.heads,
        kv_num_heads=decoder.kv_heads,
        scale=decoder.score_scale,
        **own,
        do_rotary=1,
        rotary_interleaved=0,
    )
    return _add_linear(graph, f"{prefix}.o_proj", attended)


def _add_mlp(graph: Graph, prefix: str, value: str) -> str:
    node = f"/{prefix.replace('.', '/')}"
    gate = _add_linear(graph, f"{prefix}.gate_proj", value)
    up = _add_linear(graph, f"{prefix}.up_proj", value)
    gated = _add_gate(graph, node, gate, up)
    return _add_linear(graph, f"{prefix}.down_proj", gated)


def _add_experts(graph: Graph, prefix: str, value: str, experts: Experts) -> str:
    """The routing is computed in float32, whatever the activations are."""
    recipe, node = graph.layout.recipe, f"/{prefix.replace('.', '/')}"
    wide = value
    if recipe.io_dtype != "float32":
        wide = graph.add("Cast", [value], f"{node}/wide", to=graph.elem("float32"))
    weights = routing.add_routing(graph, f"{node}/router", wide, f"{prefix}.router.weight", experts)
    if recipe.io_dtype != "float32":
        to = graph.elem(recipe.io_dtype)
        weights = graph.add("Cast", [weights], f"{node}/weights", to=to)
    bits = next(n for n in (4, 8) if f"{prefix}.fc1.weight_Q{n}" in graph.layout.stored)
    return routing.add_experts(
        graph, f"{node}/experts", value, weights, prefix, experts, bits,
        recipe.quantization.block_size, recipe.accuracy_level,
    )  # fmt: skip


def _add_gate(graph: Graph, node: str, gate: str, up: str) -> str:
    """SiLU of the gate by up, or gegelu."""
    limit = graph.decoder.gegelu_limit
    if limit is None:
        sigmoid = graph.add("Sigmoid", [gate], f"{node}/sigmoid")
        silu = graph.add("Mul", [gate, sigmoid], f"{node}/silu")
        return graph.add("Mul", [silu, up], f"{node}/gated")
    most, least = graph.active(limit), graph.active(-limit)
    low = graph.add("Min", [gate, most], f"{node}/limited_gate")
    gelu = graph.add("QuickGelu", [low], f"{node}/gelu", MICROSOFT, alpha=QUICK_GELU)
    near = graph.add("Clip", [up, least, most], f"{node}/limited_up")
    shifted = graph.add("Add", [near, graph.active(1.0)], f"{node}/shifted")
    return graph.add("Mul", [gelu, shifted], f"{node}/gated")


def _inputs(graph: Graph) -> list[Any]:
    info, int64 = graph.onnx.helper.make_tensor_value_info, graph.elem("int64")
    tokens = ["batch_size", "sequence_length"]
    return [
        graph.info(EMBEDDED, graph.layout.recipe.io_dtype, [*tokens, graph.decoder.hidden])
        if graph.decoder.vision
        else info("input_ids", int64, tokens),
        info("attention_mask", int64, ["batch_size", "total_sequence_length"]),
        *_cache(graph, "past_key_values", "past_sequence_length"),
    ]


def _outputs(graph: Graph) -> list[Any]:
    info = graph.onnx.helper.make_tensor_value_info
    elem = graph.elem(graph.layout.recipe.io_dtype)
    shape = ["batch_size", "sequence_length", graph.decoder.vocab]
    return [
        info("logits", elem, shape),
        *_cache(graph, "present", "total_sequence_length"),
    ]


def _cache(graph: Graph, prefix: str, length: str) -> list[Any]:
    decoder = graph.decoder
    elem = graph.elem(graph.layout.recipe.io_dtype)
    shape = ["batch_size", decoder.kv_heads, length, decoder.head_dim]
    return [
        graph.onnx.helper.make_tensor_value_info(f"{prefix}.{layer}.{part}", elem, shape)
        for layer in range(decoder.layers)
        for part in ("key", "value")
    ]
