"""What a recipe for GGUF can say."""

from typing import Literal

import msgspec

from toolkit.recipe import Quantization, Recipe

Precision = Literal["iq4_xs", "q4_0", "q4_1", "q8_0", "q4_k_m", "q5_k_m", "q6_k", "f16", "bf16"]
TensorType = Literal[
    "iq4_nl", "iq4_xs", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "f16",
    "bf16",
]  # fmt: skip


class GgufQuantization(Quantization, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How weights are stored: the mixes of llama-quantize by their names, in lower case.

    `embedding` and `head` replace the mix's own choice for these two tensors; a tied embedding is
    the head. `overrides` do so for any: by module path as the checkpoint spells it, `*` stands for
    anything, the last match counts, also before `embedding` and `head`.
    """

    precision: Precision
    embedding: TensorType | None = None
    head: TensorType | None = None
    overrides: dict[str, TensorType] = msgspec.field(default_factory=dict)


class GgufRecipe(Recipe, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="gguf"):
    """An artifact for llama.cpp and what is built on it: Ollama, LlamaEdge, LM Studio.

    `rope_factors: long` belongs to checkpoints with LongRoPE and contexts beyond the original one:
    llama.cpp picks the factors by the context that is allocated, for texts of every length.
    """

    rope_factors: Literal["short", "long"] = "short"
    quantization: GgufQuantization
