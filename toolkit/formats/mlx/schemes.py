"""Which module gets how many bits, in groups of which size.

`sensitive_bits` follows mlx-lm's mixed recipes (mlx_lm/convert.py), which follow llama-quantize's
Q4_K_M: the head, and in the first and last eighth of the layers and every third between the down
projection and the values, which in Phi-3 are part of qkv_proj. With `bits` 4 and `sensitive_bits` 6
the tensors are those of mixed_4_6. A tied head is the embedding; mlx-lm gives that no more bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from toolkit.decoder import Decoder
from toolkit.errors import PlanError
from toolkit.formats.mlx.recipe import Bits, MlxOverride, MlxRecipe
from toolkit.overrides import check_patterns, list_matrices, path_of, resolve

UNQUANTIZED = 16
GROUP_SIZES = (32, 64, 128)
QUANTIZED: tuple[Bits, ...] = (2, 3, 4, 5, 6, 8)
VISION_BITS = 8  # of a tower's matrices


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
    bits = dict.fromkeys(map(path_of, list_matrices(decoder)), int(settings.bits))
    embedding, head = (path_of(n) for n in (decoder.names.embedding, decoder.head_name))
    if settings.sensitive_bits:
        bits |= dict.fromkeys(_sensitive(decoder), int(settings.sensitive_bits))
    if settings.embedding_bits:
        bits[embedding] = settings.embedding_bits
    if settings.head_bits:
        bits[head] = settings.head_bits
    schemes = {path: Scheme(count, settings.group_size) for path, count in bits.items()}
    for name, override in resolve(settings.overrides, decoder).items():
        size = override.group_size or settings.group_size
        schemes[path_of(name)] = Scheme(override.bits, size)
    if decoder.vision:
        matrices = filter(decoder.vision.is_matrix, decoder.vision.shapes())
        scheme = Scheme(settings.vision_bits or VISION_BITS, settings.group_size)
        schemes |= dict.fromkeys(map(path_of, matrices), scheme)
    return schemes


def list_choices(recipe: MlxRecipe, decoder: Decoder) -> dict[str, tuple[MlxOverride, ...]]:
    """What overrides can say of each matrix: the recipe's bits and more, up to 8."""
    bits = [count for count in QUANTIZED if count >= recipe.quantization.bits]
    if len(bits) < 2:
        return {}
    choices = tuple(MlxOverride(bits=count) for count in bits)
    return dict.fromkeys(list_matrices(decoder), choices)


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
    widths = {path_of(name): shape[-1] for name, shape in decoder.all_shapes().items()}
    check_patterns(f"{where}.overrides", settings.overrides, decoder)
    for path, scheme in choose_schemes(recipe, decoder).items():
        if scheme.is_quantized and widths[path] % scheme.group_size:
            fits = [str(size) for size in GROUP_SIZES if widths[path] % size == 0]
            raise PlanError(
                f"{where}.group_size: {scheme.group_size} does not divide the {widths[path]} "
                f"inputs of {path}; allowed {', '.join(fits) or 'none'}",
                advice=f"to leave it unquantized, add overrides: {{{path}: {{bits: 16}}}}",
            )


def _sensitive(decoder: Decoder) -> Iterator[str]:
    names, layers = decoder.names, decoder.layers
    eighth = layers // 8
    for layer in range(layers):
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            yield path_of(names.qkv.format(layer))
            yield path_of(names.down.format(layer))
    yield path_of(decoder.head_name)
