"""What mlx-lm calls the tensors, and which of the checkpoint's each one is made of.

As the checkpoint does, but for experts: mlx_lm/models/phimoe.py holds all of a layer's in one.
"""

from toolkit.decoder import Decoder

EXPERT = ".experts.{}."  # in a name, between the module of all experts and one expert's matrix


def list_tensors(decoder: Decoder) -> dict[str, tuple[str, ...]]:
    """Names for mlx-lm, in order of use, and the tensors behind each, one for each expert."""
    stacked: dict[str, tuple[str, ...]] = {}
    for layer in range(decoder.layers if decoder.experts else 0):
        stacked |= _list_stacks(decoder, layer)
    behind = {source: name for name, sources in stacked.items() for source in sources}
    names = dict.fromkeys(behind.get(source, source) for source in decoder.shapes())
    return {name: stacked.get(name, (name,)) for name in names}


def _list_stacks(decoder: Decoder, layer: int) -> dict[str, tuple[str, ...]]:
    count = decoder.experts.count if decoder.experts else 0
    (gate,), (up,), down = decoder.gate_parts, decoder.up_parts, decoder.names.down
    found = {}
    for module, pattern in (("gate", gate.tensor), ("up", up.tensor), ("down", down)):
        outer, _, _ = pattern.partition(EXPERT)
        name = f"{outer.format(layer)}.switch_mlp.{module}_proj.weight"
        found[name] = tuple(pattern.format(layer, expert) for expert in range(count))
    return found
