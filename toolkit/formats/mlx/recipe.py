"""What a recipe for MLX can say."""

from typing import Literal

import msgspec

from toolkit.decoder import Decoder
from toolkit.recipe import Quantization, Recipe, fit_group

Bits = Literal[2, 3, 4, 5, 6, 8, 16]
GroupSize = Literal[32, 64, 128]


class MlxOverride(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How some modules are stored; without `group_size` it is the recipe's."""

    bits: Bits
    group_size: GroupSize | None = None


class MlxQuantization(Quantization, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How weights are stored; 16 bits leave a module in `dtype`, unquantized.

    What comes later in this list wins: `bits`; `sensitive_bits`, for the modules that mlx-lm's
    mixed recipes give more (see schemes.py); `embedding_bits` and `head_bits`; `overrides`, by
    module path as config.json spells it, where `*` stands for anything, the last match counting.
    `vision_bits` are those of a tower's matrices and its projector's, which the others leave alone;
    8 where it is left out.

    `dtype` is the type of scales, biases, norms and unquantized weights, and mlx-lm computes in it.
    A checkpoint in another type is rounded to it first.
    """

    bits: Bits
    group_size: GroupSize = 64
    sensitive_bits: Bits | None = None
    embedding_bits: Bits | None = None
    head_bits: Bits | None = None
    vision_bits: Bits | None = None
    overrides: dict[str, MlxOverride] = msgspec.field(default_factory=dict)
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"

    def fit(self, decoder: Decoder) -> Quantization:
        """The same with smaller groups where these do not divide the model's rows."""
        size = fit_group(self.group_size, decoder)
        return msgspec.structs.replace(self, group_size=size)


class MlxRecipe(Recipe, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="mlx"):
    """An artifact for mlx-lm: `metal` on Macs, `cpu` anywhere; the files are the same.

    `rope_factors` belongs to checkpoints with LongRoPE, and must be there: mlx-lm holds one list of
    factors for all lengths, so an artifact is for texts up to the original context, or beyond it.
    """

    provider: Literal["metal", "cpu"] = "metal"
    rope_factors: Literal["short", "long"] | None = None
    quantization: MlxQuantization

    def bind(self, model: str, decoder: Decoder) -> Recipe:
        """As every recipe; the short factors where the model has LongRoPE and nothing is said."""
        factors = self.rope_factors or ("short" if decoder.rope.is_long else None)
        return msgspec.structs.replace(super().bind(model, decoder), rope_factors=factors)
