"""Block-sparse attention for OpenVINO: the mask of each head, computed from positions.

Only an attention that takes masks whole computes it: paged attention drops this one silently, and
beyond the local blocks sees more than the source does. Hence PROPERTIES.
"""

from toolkit.decoder import BlockSparse, Decoder
from toolkit.formats.openvino.network import Network, Value

PROPERTIES = {"ATTENTION_BACKEND": "SDPA"}
# Of a query and a key in a head, while a prompt is computed: resident memory grew by 7.4 bytes for
# 3,000 tokens and 8 heads, of which the mask itself is 4.
MASK_BYTES = 8


def count_mask_bytes(decoder: Decoder, context_length: int) -> int:
    """What the mask takes while a prompt as long as the context is computed."""
    return MASK_BYTES * decoder.heads * context_length**2


def add_block_mask(
    net: Network, mask: Value, ids: Value, attention: Value, sparse: BlockSparse, masked: float
) -> Value:
    """float32 [batch, heads, n, total]: `mask` [batch, 1, n, total], and `masked` by blocks."""
    count, total = (_count(net, value) for value in (ids, attention))
    first = net.add("Subtract", total, count)
    queries = _add_blocks(net, first, total, sparse.block, (0, 1, 3))
    keys = _add_blocks(net, net.integer(0), total, sparse.block, (0, 1, 2))
    distance = net.add("Subtract", queries, keys)
    near = net.add("Less", distance, net.integer(sparse.local), dtype="boolean")
    heads = net.integers(1, len(sparse.shifts), 1, 1)
    ahead = net.integers(*(shift + 1 for shift in sparse.shifts))
    ahead = net.add("Reshape", ahead, heads, special_zero=False)
    rest = net.add("FloorMod", net.add("Add", keys, ahead), net.integer(sparse.stride))
    looked_at = net.add("Equal", rest, net.integer(0), dtype="boolean")
    sees = net.add("LogicalOr", near, looked_at, dtype="boolean")
    return net.add("Select", sees, mask, net.number(masked), dtype="f32")


def _count(net: Network, value: Value) -> Value:
    shape = net.add("ShapeOf", value, dtype="i64", output_type="i64")
    return net.add("Gather", shape, net.integer(1), net.integer(0), batch_dims=0)


def _add_blocks(net: Network, first: Value, stop: Value, size: int, axes: tuple[int, ...]) -> Value:
    """The block of each position from `first` to `stop`, with `axes` added to its shape."""
    places = net.add("Range", first, stop, net.integer(1), dtype="i64", output_type="i64")
    blocks = net.add("Divide", places, net.integer(size))
    return net.add("Unsqueeze", blocks, net.integers(*axes))
