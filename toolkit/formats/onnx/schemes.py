"""Which matrix gets how many bits; 0 leaves it in a float type."""

from dataclasses import dataclass

from toolkit.decoder import Decoder
from toolkit.errors import PlanError
from toolkit.formats.onnx.recipe import BITS, Kind, OnnxRecipe
from toolkit.overrides import check_patterns, list_matrices, path_of, resolve


@dataclass(frozen=True)
class Schemes:
    """Bits of the embedding's look-up, of the head, and of the layers' matrices by name."""

    embedding: int
    head: int
    layers: dict[str, int]

    def bits_of(self, name: str) -> int:
        """Bits of a matrix that is multiplied with: a layer's, or else the head."""
        return self.layers.get(name, self.head)


def choose_schemes(recipe: OnnxRecipe, decoder: Decoder) -> Schemes:
    """Bits of every matrix; an override of a tied embedding is one of the head too."""
    names = decoder.names
    overrides = resolve(recipe.quantization.overrides, decoder)
    chosen = {name: BITS[kind] for name, kind in overrides.items()}
    layers = dict.fromkeys(list_matrices(decoder), recipe.linear_bits) | chosen
    for name in (names.embedding, names.head):
        layers.pop(name, None)
    return Schemes(
        embedding=chosen.get(names.embedding, recipe.embedding_bits),
        head=chosen.get(decoder.head_name, recipe.head_bits),
        layers=layers,
    )


def list_choices(recipe: OnnxRecipe, decoder: Decoder) -> dict[str, tuple[Kind | None, ...]]:
    """What overrides can say of each matrix; a float embedding or head may stay one."""
    if recipe.linear_bits != BITS["int4"]:
        return {}
    found: dict[str, tuple[Kind | None, ...]]
    found = dict.fromkeys(list_matrices(decoder), ("int4", "int8"))
    if not decoder.is_tied:
        for name, bits in (
            (decoder.names.embedding, recipe.embedding_bits),
            (decoder.head_name, recipe.head_bits),
        ):
            found[name] += () if bits else (None,)
    return found


def check_schemes(recipe: OnnxRecipe, decoder: Decoder) -> None:
    """PlanError when overrides have nothing to apply to."""
    where = f"{recipe.name}: quantization.overrides"
    overrides, precision = recipe.quantization.overrides, recipe.quantization.precision
    if overrides and not recipe.linear_bits:
        raise PlanError(f"{where}: got precision {precision}; overrides go with int4; allowed none")
    check_patterns(where, overrides, decoder)
    _check_together(where, choose_schemes(recipe, decoder), decoder)


def _check_together(where: str, schemes: Schemes, decoder: Decoder) -> None:
    """PlanError when matrices that are stored as one would get different types."""
    count = decoder.experts.count if decoder.experts else 0
    for layer in range(decoder.layers):
        gated = [name for name in decoder.layer_matrices(layer) if decoder.kind_of(name) != "qkv"]
        qkv = [part.tensor for part in decoder.qkv(layer)]
        experts = [name for name in gated if decoder.kind_of(name) in ("gate_up", "down")]
        for names in (qkv, experts if count else []):
            if len({schemes.layers[name] for name in names}) > 1:
                raise PlanError(
                    f"{where}: {path_of(names[0])} and {path_of(names[-1])} are one operator's "
                    "operands here; allowed the same type for all of them"
                )
