"""What a recipe for OpenVINO can say."""

from typing import Literal

import msgspec

from toolkit.decoder import Decoder
from toolkit.recipe import Quantization, Recipe, fit_group

Kind = Literal["int4", "int8", "f16"]


class OpenvinoQuantization(Quantization, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How weights are stored; `group_size` and `symmetric` matter for int4 only.

    `group_size` -1 is one group a row. int8 is always one range a row, with a zero point. What
    `embedding` and `head` leave out is f16 beside f16 and int8 beside the others. `overrides`: by
    module path as the checkpoint spells it, `*` stands for anything, the last match counts, also
    before `embedding` and `head`. `vision` is the kind of the tower's matrices and the projector's,
    int8 where it is left out.
    """

    precision: Kind
    group_size: Literal[-1, 32, 64, 128] = 128
    symmetric: bool = True
    embedding: Kind | None = None
    head: Kind | None = None
    overrides: dict[str, Kind] = msgspec.field(default_factory=dict)
    vision: Kind | None = None

    def __post_init__(self) -> None:
        """Fill in what depends on the precision."""
        default = "f16" if self.precision == "f16" else "int8"
        for field in ("embedding", "head"):
            if getattr(self, field) is None:
                msgspec.structs.force_setattr(self, field, default)

    @property
    def has_int4(self) -> bool:
        """True when any tensor is stored in 4 bits."""
        return "int4" in (self.precision, self.embedding, self.head, *self.overrides.values())

    def fit(self, decoder: Decoder) -> Quantization:
        """The same with smaller groups where these do not divide the model's rows."""
        size = fit_group(self.group_size, decoder)
        return msgspec.structs.replace(self, group_size=size)


class OpenvinoRecipe(Recipe, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="openvino"):
    """An artifact for openvino-genai. `npu` allows only what NPU drivers take."""

    provider: Literal["cpu", "gpu", "npu"] = "cpu"
    quantization: OpenvinoQuantization

    def bind(self, model: str, decoder: Decoder) -> Recipe:
        """As every recipe; NPUs take groups of 128 or whole rows."""
        bound = super().bind(model, decoder)
        quantization = bound.quantization
        if self.provider == "npu" and quantization != self.quantization:
            quantization = msgspec.structs.replace(self.quantization, group_size=-1)
        return msgspec.structs.replace(bound, quantization=quantization)
