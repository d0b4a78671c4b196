"""Which module gets how many bits, in groups of which size.

`sensitive_bits` follows mlx-lm's mixed recipes (mlx_lm/convert.py), which follow llama-quantize's
Q4_K_M: the head, and in the first and last eighth of the layers and every third between the down
projection and the values, which in Phi-3 are part of qkv_proj. With `bits` 4 and `sensitive_bits` 6
the tensors are those of mixed_4_6. A tied head is the embedding; mlx-lm gives that no more bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from toolkit.decoder import Decoder
from toolkit.errors import PlanError
from toolkit.formats.mlx.recipe import MlxRecipe

UNQUANTIZED = 16
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Scheme:
    """A module's bits and group size, as mlx.core.quantize takes them."""

    bits: int
    group_size: int

    @property
    def is_quantized(self) -> bool:
        """False for 16 bits: the weights stay floats."""
        return self.bits != UNQUANTIZED


def choose_schemes(recipe: MlxRecipe, decoder: Decoder) -> dict[str, Scheme]:
    """Scheme of every matrix, by module path, in order of use; norms have none."""
    settings = recipe.quantization
    bits = dict.fromkeys(_matrices(decoder), int(settings.bits))
    embedding, head = (path_of(n) for n in (decoder.names.embedding, decoder.head_name))
    if settings.sensitive_bits:
        bits |= dict.fromkeys(_sensitive(decoder), int(settings.sensitive_bits))
    if settings.embedding_bits:
        bits[embedding] = settings.embedding_bits
    if settings.head_bits:
        bits[head] = settings.head_bits
    schemes = {path: Scheme(count, settings.group_size) for path, count in bits.items()}
    for pattern, override in settings.overrides.items():
        size = override.group_size or settings.group_size
        found = dict.fromkeys(_match(pattern, schemes), Scheme(override.bits, size))
        schemes |= found
    return schemes


def check_schemes(recipe: MlxRecipe, decoder: Decoder) -> None:
    """PlanError when a group does not divide a row, or a setting has nothing to apply to.

    mlx-lm's converter leaves a matrix whose rows are no whole groups in its float type and says
    nothing; here that is said with an override of 16 bits.
    """
    settings = recipe.quantization
    where = f"{recipe.name}: quantization"
    if decoder.is_tied and settings.head_bits and settings.embedding_bits != settings.head_bits:
        raise PlanError(
            f"{where}.head_bits: got {settings.head_bits}; this model's head is its embedding; "
            "allowed the same number as embedding_bits, or none"
        )
    widths = {path_of(name): shape[-1] for name, shape in decoder.shapes().items()}
    for pattern in settings.overrides:
        if not any(_match(pattern, _matrices(decoder))):
            raise PlanError(
                f"{where}.overrides: {pattern!r} matches no module; this model has "
                f"{', '.join(_spell(decoder))}"
            )
    for path, scheme in choose_schemes(recipe, decoder).items():
        if scheme.is_quantized and widths[path] % scheme.group_size:
            fits = [str(size) for size in GROUP_SIZES if widths[path] % size == 0]
            raise PlanError(
                f"{where}.group_size: {scheme.group_size} does not divide the {widths[path]} "
                f"inputs of {path}; allowed {', '.join(fits) or 'none'}",
                advice=f"to leave it unquantized, add overrides: {{{path}: {{bits: 16}}}}",
            )


def path_of(name: str) -> str:
    """The module that a tensor of the checkpoint belongs to."""
    return name.removesuffix(".weight")


def _matrices(decoder: Decoder) -> list[str]:
    return [path_of(name) for name, shape in decoder.shapes().items() if len(shape) == 2]


def _sensitive(decoder: Decoder) -> Iterator[str]:
    names, layers = decoder.names, decoder.layers
    eighth = layers // 8
    for layer in range(layers):
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            yield path_of(names.qkv.format(layer))
            yield path_of(names.down.format(layer))
    yield path_of(decoder.head_name)


def _match(pattern: str, paths: Iterator[str] | list[str] | dict[str, Scheme]) -> list[str]:
    return [path for path in paths if fnmatchcase(path, pattern)]


def _spell(decoder: Decoder) -> list[str]:
    """Every kind of matrix once, `*` for the layer."""
    names = decoder.names
    per_layer = (names.qkv, names.attention_out, names.gate_up, names.down)
    outer = dict.fromkeys((names.embedding, decoder.head_name))
    return [path_of(name.format("*")) for name in (*outer, *per_layer)]
