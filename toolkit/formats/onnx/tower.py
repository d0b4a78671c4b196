"""The tower and the projector: where their tensors lie, and their part of the graph.

Matrices are blocks of 8 bits, or transposed floats that the graph widens; all else is float32.
"""

from math import prod

from toolkit.decoder import QUICK_GELU
from toolkit.formats.onnx.algebra import Value
from toolkit.formats.onnx.encoders import Blocks, Plain, Transposed
from toolkit.formats.onnx.layout import FLOATS, Layout
from toolkit.formats.onnx.nodes import Graph
from toolkit.stream import Piece
from toolkit.vision import VisionEncoder

BITS = 8
BLOCK_SIZE = 32
FLOAT = "float32"


def place_vision(layout: Layout, vision: VisionEncoder, kind: str) -> None:
    """Place what a picture's features depend on; `kind` is that of matrices: int8, fp16, fp32."""
    shapes = vision.shapes()
    for name in vision.list_used():
        if vision.is_matrix(name):
            _place_matrix(layout, name, shapes[name], kind)
        else:
            _place_plain(layout, name, shapes[name])


def _place_matrix(layout: Layout, name: str, shape: tuple[int, ...], kind: str) -> None:
    rows, columns = shape
    if kind in FLOATS:
        dtype = FLOATS[kind]
        offset = layout.place(name, dtype, (columns, rows))
        piece = Piece(name, 0, rows, columns, Transposed(dtype, rows), (offset,))
    else:
        blocks = columns // BLOCK_SIZE
        codes = layout.place(f"{name}_Q{BITS}", "uint8", (rows, blocks, BLOCK_SIZE))
        scales = layout.place(f"{name}_scales", FLOAT, (rows, blocks))
        encoder = Blocks(BITS, BLOCK_SIZE, True, FLOAT)
        piece = Piece(name, 0, rows, columns, encoder, (codes, scales))
    layout.pieces.append(piece)


def _place_plain(layout: Layout, name: str, shape: tuple[int, ...]) -> None:
    offset = layout.place(name, FLOAT, shape)
    piece = Piece(name, 0, prod(shape[:-1]), shape[-1], Plain(FLOAT), (offset,))
    layout.pieces.append(piece)


def add_tower(graph: Graph, vision: VisionEncoder, crops: Value) -> Value:
    """Features of crops [n, 3, size, size]: [n, patches ** 2, width]."""
    states = _add_norm(vision, vision.names.first_norm, _add_embedding(graph, vision, crops))
    for layer in range(vision.used_layers):
        states = _add_layer(vision, layer, states)
    return states.cut(1, vision.patches**2 + 1, 1)


def add_projector(vision: VisionEncoder, merged: Value) -> Value:
    """The MLP from [n, merged_width] to [n, hidden]."""
    inner = _add_linear(vision.names.project_in, merged).apply("Gelu")
    return _add_linear(vision.names.project_out, inner)


def _add_embedding(graph: Graph, vision: VisionEncoder, crops: Value) -> Value:
    names, patch = vision.names, [vision.patch, vision.patch]
    patches = crops.apply("Conv", names.patch_embedding, kernel_shape=patch, strides=patch)
    patches = patches.shape(0, 0, -1).transpose(0, 2, 1)
    count = crops.apply("Shape", start=0, end=1)
    rest = graph.integers(1, vision.width)
    shape = count.apply("Concat", rest, axis=0)
    first = Value(graph, names.class_embedding).shape(1, 1, -1).apply("Expand", shape)
    return first.apply("Concat", patches, axis=1).apply("Add", names.positions)


def _add_layer(vision: VisionEncoder, layer: int, states: Value) -> Value:
    names = vision.names
    queries, keys, values, out = vision.layer_attention(layer)
    normed = _add_norm(vision, names.attention_norm.format(layer), states)
    q, k, v = (_add_linear(name, normed) for name in (queries, keys, values))
    mixed = q.apply_microsoft("MultiHeadAttention", k, v, num_heads=vision.heads)
    states = states + _add_linear(out, mixed)
    normed = _add_norm(vision, names.mlp_norm.format(layer), states)
    inner = _add_linear(names.mlp_in.format(layer), normed)
    inner = inner.apply_microsoft("QuickGelu", alpha=QUICK_GELU)
    return states + _add_linear(names.mlp_out.format(layer), inner)


def _add_norm(vision: VisionEncoder, module: str, states: Value) -> Value:
    return states.apply(
        "LayerNormalization", f"{module}.weight", f"{module}.bias",
        axis=-1, epsilon=vision.norm_epsilon,
    )  # fmt: skip


def _add_linear(module: str, inputs: Value) -> Value:
    """The product with a matrix, as the layout stores it, and the bias."""
    graph, weight, bias = inputs.graph, f"{module}.weight", f"{module}.bias"
    stored = graph.layout.stored
    if codes := stored.get(f"{weight}_Q{BITS}"):
        rows, blocks, size = codes.shape
        level = graph.layout.recipe.quantization.accuracy_level
        attributes = {"accuracy_level": level} if level else {}
        return inputs.apply_microsoft(
            "MatMulNBits", codes.name, f"{weight}_scales", "", "", bias,
            K=blocks * size, N=rows, bits=BITS, block_size=size, **attributes,
        )  # fmt: skip
    matrix = Value(graph, weight)
    if stored[weight].dtype != FLOAT:
        matrix = matrix.apply("Cast", to=graph.elem(FLOAT))
    return inputs.apply("MatMul", matrix).apply("Add", bias)
