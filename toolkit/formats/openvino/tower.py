"""The tower and the projector as OpenVINO operations, and where their tensors lie."""

from toolkit.decoder import QUICK_GELU
from toolkit.formats.openvino.layout import Layout
from toolkit.formats.openvino.network import Network, Value
from toolkit.formats.openvino.recipe import Kind
from toolkit.vision import VisionEncoder

TO_END = (1 << 63) - 1


def place_module(layout: Layout, vision: VisionEncoder, name: str, kind: Kind) -> None:
    """Place one tensor: a matrix as `kind` says, all else in float32."""
    if vision.is_matrix(name):
        layout.add_matrix(name, kind)
    else:
        layout.add_plain(name, "f32")


def add_tower(net: Network, vision: VisionEncoder, pixels: Value) -> Value:
    """Features of crops [n, 3, size, size]: [n, patches ** 2, width]."""
    states = _add_norm(net, vision, vision.names.first_norm, _add_patches(net, vision, pixels))
    for layer in range(vision.used_layers):
        states = _add_layer(net, vision, layer, states)
    first, stop, step, axis = (net.integers(n) for n in (1, TO_END, 1, 1))
    return net.add("Slice", states, first, stop, step, axis)


def add_projector(net: Network, vision: VisionEncoder, rows: Value) -> Value:
    """The MLP from [1, n, merged_width] to [1, n, hidden]."""
    inner = _add_linear(net, vision.names.project_in, rows)
    inner = net.add("Gelu", inner, approximation_mode="ERF")
    return _add_linear(net, vision.names.project_out, inner)


def _add_patches(net: Network, vision: VisionEncoder, pixels: Value) -> Value:
    """Patches and the class token in front, with positions."""
    names, patch, width = vision.names, vision.patch, vision.width
    patches = net.add(
        "Convolution", pixels, net.constant(names.patch_embedding), strides=f"{patch},{patch}",
        dilations="1,1", pads_begin="0,0", pads_end="0,0", auto_pad="explicit",
    )  # fmt: skip
    flat = net.add("Reshape", patches, net.integers(0, width, -1), special_zero=True)
    flat = net.add("Transpose", flat, net.integers(0, 2, 1))
    shape = net.add("ShapeOf", pixels, dtype="i64", output_type="i64")
    count = net.add("Gather", shape, net.integers(0), net.integer(0), batch_dims=0)
    shape = net.add("Concat", count, net.integers(1, width), axis=0)
    first = net.add("Broadcast", net.constant(names.class_embedding), shape, mode="numpy")
    return net.add("Add", net.add("Concat", first, flat, axis=1), net.constant(names.positions))


def _add_layer(net: Network, vision: VisionEncoder, layer: int, states: Value) -> Value:
    names = vision.names
    *inputs, out = vision.layer_attention(layer)
    normed = _add_norm(net, vision, names.attention_norm.format(layer), states)
    query, key, value = (
        _split_heads(net, vision, _add_linear(net, name, normed)) for name in inputs
    )
    mixed = net.add("ScaledDotProductAttention", query, key, value, causal=False)
    mixed = net.add("Transpose", mixed, net.integers(0, 2, 1, 3))
    mixed = net.add("Reshape", mixed, net.integers(0, 0, vision.width), special_zero=True)
    states = net.add("Add", states, _add_linear(net, out, mixed))
    normed = _add_norm(net, vision, names.mlp_norm.format(layer), states)
    inner = _add_linear(net, names.mlp_in.format(layer), normed)
    inner = net.add("Swish", inner, net.number(QUICK_GELU))
    return net.add("Add", states, _add_linear(net, names.mlp_out.format(layer), inner))


def _split_heads(net: Network, vision: VisionEncoder, rows: Value) -> Value:
    """[n, patches, width] to [n, heads, patches, width / heads]."""
    shape = net.integers(0, 0, vision.heads, vision.width // vision.heads)
    split = net.add("Reshape", rows, shape, special_zero=True)
    return net.add("Transpose", split, net.integers(0, 2, 1, 3))


def _add_norm(net: Network, vision: VisionEncoder, module: str, states: Value) -> Value:
    """LayerNorm over the last axis."""
    normed = net.add(
        "MVN", states, net.integers(-1), normalize_variance=True,
        eps=str(vision.norm_epsilon), eps_mode="inside_sqrt",
    )  # fmt: skip
    scaled = net.add("Multiply", normed, net.constant(f"{module}.weight"))
    return net.add("Add", scaled, net.constant(f"{module}.bias"))


def _add_linear(net: Network, module: str, rows: Value) -> Value:
    """The product with a matrix, and its bias."""
    matrix = net.matrix(f"{module}.weight")
    product = net.add("MatMul", rows, matrix, transpose_a=False, transpose_b=True)
    return net.add("Add", product, net.constant(f"{module}.bias"))
