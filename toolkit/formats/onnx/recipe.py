"""What a recipe for ONNX can say."""

from typing import Literal

import msgspec

from toolkit.recipe import Recipe


class OnnxQuantization(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How weights are stored; the block fields matter for int4 only.

    `accuracy_level` 4 lets the CPU kernels multiply in int8; 0 leaves the choice to the runtime.
    `embedding` bf16 keeps the checkpoint's rows as they are, cast after the look-up.
    """

    precision: Literal["int4", "fp16", "fp32"]
    block_size: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool = True
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    head_bits: Literal[4, 8] = 4
    embedding: Literal["bf16", "fp16", "fp32"] = "bf16"


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
    def is_quantized(self) -> bool:
        """True for int4."""
        return self.quantization.precision == "int4"
