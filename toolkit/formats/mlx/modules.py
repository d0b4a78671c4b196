"""What mlx-lm calls the tensors, and which of the checkpoint's each one is made of.

As the checkpoint does, but for experts: mlx_lm/models/phimoe.py holds all of a layer's in one. A
tower has the names of the checkpoint for mlx-vlm too, and the kernel of its patches lies channels
last.
"""

from toolkit.decoder import Decoder

EXPERT = ".experts.{}."  # in a name, between the module of all experts and one expert's matrix


def list_tensors(decoder: Decoder) -> dict[str, tuple[str, ...]]:
    """Names for mlx-lm, in order of use, and the tensors behind each, one for each expert."""
    stacked: dict[str, tuple[str, ...]] = {}
    for layer in range(decoder.layers if decoder.experts else 0):
        stacked |= _list_stacks(decoder, layer)
    behind = {source: name for name, sources in stacked.items() for source in sources}
    names = dict.fromkeys(behind.get(source, source) for source in decoder.all_shapes())
    return {name: stacked.get(name, (name,)) for name in names}


def list_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """The shape that each of `list_tensors` has unquantized."""
    shapes, found = decoder.all_shapes(), {}
    for name, sources in list_tensors(decoder).items():
        shape = shapes[sources[0]]
        if is_kernel(decoder, name):
            out, channels, height, width = shape
            shape = (out, height, width, channels)
        found[name] = shape if name in sources else (len(sources), *shape)
    return found


def is_kernel(decoder: Decoder, name: str) -> bool:
    """Whether a tensor is the kernel of a tower's patches."""
    return decoder.vision is not None and name == decoder.vision.names.patch_embedding


def _list_stacks(decoder: Decoder, layer: int) -> dict[str, tuple[str, ...]]:
    count = decoder.experts.count if decoder.experts else 0
    (gate,), (up,), down = decoder.gate_parts, decoder.up_parts, decoder.names.down
    found = {}
    for module, pattern in (("gate", gate.tensor), ("up", up.tensor), ("down", down)):
        outer, _, _ = pattern.partition(EXPERT)
        name = f"{outer.format(layer)}.switch_mlp.{module}_proj.weight"
        found[name] = tuple(pattern.format(layer, expert) for expert in range(count))
    return found
