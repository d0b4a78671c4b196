"""A model that sees, as mlx-vlm takes it: what a recipe may ask of the tower, and what it costs."""

from toolkit.decoder import Decoder
from toolkit.errors import PlanError
from toolkit.formats.mlx.recipe import MlxRecipe
from toolkit.formats.mlx.schemes import UNQUANTIZED, VISION_BITS
from toolkit.vision import VisionEncoder, check_precision

# Resident while a picture of 16 crops goes through layers of CLIP-L's width, on a CPU: 226 MB.
PICTURE_BYTES = 250_000_000
CLIP_L = (1024, 24, 16, 4096)  # width, layers, heads, intermediate: mlx-vlm knows no other tower


def check_vision(recipe: MlxRecipe, decoder: Decoder) -> None:
    """PlanError for what a recipe cannot ask of a model that sees, or of one that does not."""
    where, wanted = f"{recipe.name}: quantization.vision_bits", recipe.quantization.vision_bits
    is_low = (wanted or VISION_BITS) < VISION_BITS
    allowed = f"{VISION_BITS} (3 %), {UNQUANTIZED}"
    check_precision(where, wanted, decoder.vision, is_low=is_low, allowed=allowed)
    if decoder.vision is None:
        return
    size = recipe.quantization.group_size
    columns = (decoder.vision.width, decoder.vision.intermediate, decoder.vision.hidden)
    if wanted != UNQUANTIZED and any(count % size for count in columns):
        raise PlanError(
            f"{where}: {VISION_BITS} bits go in groups of group_size {size}, which do not divide "
            f"all of {', '.join(map(str, columns))}; allowed {UNQUANTIZED}"
        )


def describe_tower(vision: VisionEncoder) -> list[str]:
    """What to know of programs that are not the runner."""
    shape = (vision.width, vision.layers, vision.heads, vision.intermediate)
    if shape == CLIP_L:
        return []
    return ["its tower is not CLIP-L's: the runner reads it, mlx-vlm does not"]
