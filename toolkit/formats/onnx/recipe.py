"""What a recipe for ONNX can say."""

from typing import Literal

import msgspec

from toolkit.decoder import Decoder
from toolkit.recipe import Quantization, Recipe, fit_group

BITS = {"int4": 4, "int8": 8}
Kind = Literal["int4", "int8"]


class OnnxQuantization(Quantization, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How weights are stored; the block fields matter for int4 only.

    `accuracy_level` 4 lets the CPU kernels multiply in int8; 0 leaves the choice to the runtime.
    `embedding` bf16 keeps the checkpoint's rows as they are, cast after the look-up; int4 and int8
    are blocks like the linears'. `head` fp16 or fp32 is the type of the activations, unquantized.
    `overrides` go with int4: by module path as the checkpoint spells it, `*` stands for anything,
    the last match counts, also before `embedding` and `head`. `vision` is the kind of the tower's
    matrices, where there is one: int8 unless it says fp16 or fp32.
    """

    precision: Literal["int4", "fp16", "fp32"]
    block_size: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool = True
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    embedding: Literal["int4", "int8", "bf16", "fp16", "fp32"] = "bf16"
    head: Literal["int4", "int8", "fp16", "fp32"] = "int4"
    vision: Literal["int4", "int8", "fp16", "fp32"] | None = None
    overrides: dict[str, Kind] = msgspec.field(default_factory=dict)

    def fit(self, decoder: Decoder) -> Quantization:
        """The same with smaller blocks where these do not divide the model's rows."""
        size = fit_group(self.block_size, decoder)
        return msgspec.structs.replace(self, block_size=size)


class OnnxRecipe(Recipe, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="onnx"):
    """An artifact for onnxruntime-genai. `cpu` serves phones too; `cuda` computes in float16."""

    provider: Literal["cpu", "cuda"] = "cpu"
    quantization: OnnxQuantization

    @property
    def io_dtype(self) -> str:
        """Type of activations, logits and cache: float16 on CUDA and for fp16, else float32."""
        is_half = self.provider == "cuda" or self.quantization.precision == "fp16"
        return "float16" if is_half else "float32"

    @property
    def accuracy_level(self) -> int:
        """What operators are told; CUDA's have one way only."""
        return 0 if self.provider == "cuda" else self.quantization.accuracy_level

    @property
    def linear_bits(self) -> int:
        """Bits of the layers' weights; 0 when they are not quantized."""
        return BITS.get(self.quantization.precision, 0)

    @property
    def head_bits(self) -> int:
        """Bits of the head's weights; 0 when they are not quantized."""
        return BITS.get(self.quantization.head, 0) if self.linear_bits else 0

    @property
    def embedding_bits(self) -> int:
        """Bits of the embedding's weights; 0 when they are not quantized."""
        return BITS.get(self.quantization.embedding, 0)
