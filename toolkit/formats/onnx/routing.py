"""Experts in the graph: sparsemixer as small operators, then QMoE with the weights it gives.

QMoE's own `use_sparse_mixer` is ignored by its CPU kernel. Source: QMoE's contract in
onnxruntime/docs/ContribOperators.md; the routing as in toolkit/quality/routing.py.
"""

from toolkit.decoder import Experts
from toolkit.formats.onnx.nodes import MICROSOFT, Graph


def add_routing(graph: Graph, node: str, normed: str, router: str, experts: Experts) -> str:
    """Weights of all experts for each token, float32 [n, count]: zero for those not picked.

    `normed` is float32 [batch, sequence, hidden], `router` the name of a matrix [hidden, count].
    """
    product = graph.add("MatMul", [normed, router], f"{node}/product")
    logits = graph.add("Reshape", [product, graph.integers(-1, experts.count)], f"{node}/logits")
    size = graph.add("Abs", [logits], f"{node}/size")
    picked = experts.per_token
    tops = [f"{node}/top_{place}" for place in range(picked)]
    places = [f"{node}/place_{place}" for place in range(picked)]
    found = [f"{node}/top_values", f"{node}/top_places"]
    graph.add_many(
        "TopK", [logits, graph.integers(picked)], f"{node}/top", found, axis=-1, largest=1, sorted=1
    )
    for parts, whole in ((tops, found[0]), (places, found[1])):
        graph.add_many("Split", [whole], f"{whole}/split", parts, axis=-1, num_outputs=picked)
    numbers = graph.integers(*range(experts.count))
    left_out, total = "", ""
    for turn, (top, place) in enumerate(zip(tops, places, strict=True)):
        prefix = f"{node}/{turn}"
        is_this = graph.add("Equal", [numbers, place], f"{prefix}/is_this")
        share = _add_share(graph, prefix, (logits, size, top), left_out, experts.jitter)
        own = graph.add("Where", [is_this, share, graph.number(0.0)], f"{prefix}/own")
        total = graph.add("Add", [total, own], f"{prefix}/total") if total else own
        left_out = graph.add("Or", [left_out, is_this], f"{prefix}/out") if left_out else is_this
    return total


def _add_share(
    graph: Graph, prefix: str, values: tuple[str, str, str], left_out: str, jitter: float
) -> str:
    """One over the sum of exp(logit - top) of all that are near and not `left_out`: [n, 1]."""
    logits, size, top = values
    below = graph.add("Sub", [top, logits], f"{prefix}/below")
    scale = graph.add("Max", [size, top], f"{prefix}/scale")
    ratio = graph.add("Div", [below, scale], f"{prefix}/ratio")
    dropped = graph.add("Greater", [ratio, graph.number(2 * jitter)], f"{prefix}/is_far")
    if left_out:
        dropped = graph.add("Or", [dropped, left_out], f"{prefix}/dropped")
    above = graph.add("Neg", [below], f"{prefix}/above")
    exponential = graph.add("Exp", [above], f"{prefix}/exp")
    kept = graph.add("Where", [dropped, graph.number(0.0), exponential], f"{prefix}/kept")
    total = graph.add("ReduceSum", [kept, graph.integers(1)], f"{prefix}/sum", keepdims=1)
    return graph.add("Reciprocal", [total], f"{prefix}/share")


def add_experts(
    graph: Graph, node: str, normed: str, weights: str, prefix: str, experts: Experts,
    bits: int, block_size: int, accuracy_level: int,
) -> str:  # fmt: skip
    """The picked experts' answers, by their weights; zero weights are never picked."""
    fc1, fc2 = (
        [f"{prefix}.{kind}.weight_Q{bits}", f"{prefix}.{kind}.weight_scales"]
        for kind in ("fc1", "fc2")
    )
    attributes = {"accuracy_level": accuracy_level} if accuracy_level else {}
    return graph.add(
        "QMoE", [normed, weights, *fc1, "", *fc2, *[""] * 7, weights], node, MICROSOFT,
        k=experts.per_token, activation_type="swiglu", activation_alpha=1.0, activation_beta=0.0,
        swiglu_fusion=1, normalize_routing_weights=0, expert_weight_bits=bits,
        block_size=block_size, weights_prepacked=0, **attributes,
    )  # fmt: skip
