"""Experts in the network: sparsemixer as small operations, then the pattern that the CPU fuses.

The pattern is the one of optimum-intel's exports: every token through every expert, times a weight
that is zero for most. The plugin makes GatherMatmul of it, which reads only what is picked. The
routing follows toolkit/quality/routing.py, in float32.
"""

from dataclasses import dataclass

from toolkit.decoder import Experts
from toolkit.formats.openvino.network import Network, Value

LAST = -1


@dataclass(frozen=True)
class Stacks:
    """The experts' matrices [experts, out, in], as float32."""

    gate: Value
    up: Value
    down: Value


def add_experts(
    net: Network, normed: Value, router: Value, stacks: Stacks, experts: Experts, hidden: int
) -> Value:
    """What the picked experts make of float32 [batch, n, hidden]: the same shape."""
    count = experts.count
    rows = net.add("Reshape", normed, net.integers(-1, hidden), special_zero=False)
    logits = _multiply(net, rows, router)
    places, shares = _route(net, logits, experts)
    repeated = net.add("Tile", rows, net.integers(count, 1))
    tokens = net.add("Reshape", repeated, net.integers(count, -1, hidden), special_zero=False)
    gate = net.add("Swish", _multiply(net, tokens, stacks.gate))
    gated = net.add("Multiply", gate, _multiply(net, tokens, stacks.up))
    answers = _multiply(net, gated, stacks.down)
    answers = net.add("Reshape", answers, net.integers(count, 0, hidden), special_zero=True)
    zeros = _zeros(net, places, count)
    spread = net.add("ScatterElementsUpdate", zeros, places, shares, net.integer(1))
    turned = net.add("Transpose", spread, net.integers(1, 0))
    turned = net.add("Reshape", turned, net.integers(count, 0), special_zero=True)
    weights = net.add("Unsqueeze", turned, net.integer(LAST))
    weighted = net.add("Multiply", answers, weights)
    mixed = net.add("ReduceSum", weighted, net.integers(0), keep_dims=False)
    shape = net.add("ShapeOf", normed, dtype="i64", output_type="i64")
    return net.add("Reshape", mixed, shape, special_zero=False)


def _route(net: Network, logits: Value, experts: Experts) -> tuple[Value, Value]:
    """Which experts each token goes to, and how much each counts: int64 and float32 [n, k]."""
    picked = experts.per_token
    values, places = net.add_top(logits, picked)
    size = net.add("Abs", logits)
    numbers = net.integers(*range(experts.count))
    left_out: Value | None = None
    shares = []
    for turn in range(picked):
        top, place = (_column(net, found, turn) for found in (values, places))
        shares.append(_share(net, (logits, size, top), left_out, experts.jitter))
        is_this = net.add("Equal", numbers, place, dtype="boolean")
        left_out = net.add("LogicalOr", left_out, is_this) if left_out else is_this
    return places, net.add("Concat", *shares, axis=LAST)


def _share(
    net: Network, values: tuple[Value, Value, Value], left_out: Value | None, jitter: float
) -> Value:
    """One over the sum of exp(logit - top) of all that are near and not `left_out`: [n, 1]."""
    logits, size, top = values
    ratio = net.add("Divide", net.add("Subtract", top, logits), net.add("Maximum", size, top))
    dropped = net.add("Greater", ratio, net.number(2 * jitter), dtype="boolean")
    if left_out:
        dropped = net.add("LogicalOr", dropped, left_out)
    # Those left out are above the top: without a bound they would be infinite.
    above = net.add("Minimum", net.add("Subtract", logits, top), net.number(0.0))
    kept = net.add("Select", dropped, net.number(0.0), net.add("Exp", above), dtype="f32")
    total = net.add("ReduceSum", kept, net.integers(1), keep_dims=True)
    return net.add("Divide", net.floats((1.0,), (1, 1)), total)


def _column(net: Network, values: Value, turn: int) -> Value:
    ends = net.integers(turn), net.integers(turn + 1)
    return net.add("Slice", values, *ends, net.integers(1), net.integers(1))


def _zeros(net: Network, places: Value, count: int) -> Value:
    """float32 [n, count]."""
    shape = net.add("ShapeOf", places, dtype="i64", output_type="i64")
    rows = net.add("Gather", shape, net.integers(0), net.integer(0), batch_dims=0)
    sizes = net.add("Concat", rows, net.integers(count), axis=0)
    return net.add("Broadcast", net.number(0.0), sizes, mode="numpy")


def _multiply(net: Network, rows: Value, matrix: Value) -> Value:
    return net.add("MatMul", rows, matrix, transpose_a=False, transpose_b=True)
