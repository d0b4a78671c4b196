"""Phi-3-mini, Phi-3-medium, Phi-3.5-mini, Phi-4-mini: Phi3ForCausalLM in transformers."""

from toolkit.checkpoint.config import Config
from toolkit.decoder import Decoder, TensorNames
from toolkit.families import Evidence, read_usual

ARCHITECTURES = ("Phi3ForCausalLM",)
MODELS = "Phi-3-mini, Phi-3-medium, Phi-3.5-mini, Phi-4-mini"
_CONTEXTS = "tests/formats/test_published_contexts.py"
VERIFIED = {
    "onnx": Evidence(
        "logits in float32 are transformers', on both sides of 2,047 and of 4,096 tokens; int4 "
        "codes are those of onnxruntime-genai's builder", _CONTEXTS,
    ),
    "openvino": Evidence(
        "logits in float16 are transformers', on both sides of 2,047 and of 4,096 tokens; int4 "
        "and int8 codes are those of optimum-intel with NNCF", _CONTEXTS,
    ),
    "gguf": Evidence(
        "logits in float16 are transformers' up to the window, and on either side of 4,096 tokens "
        "by profile; every byte is llama-quantize's", _CONTEXTS,
    ),
    "mlx": Evidence(
        "logits in float32 are transformers' up to the window, and on either side of 4,096 tokens "
        "by profile; every byte is mlx_lm.convert's", _CONTEXTS,
    ),
}  # fmt: skip
NAMES = TensorNames(
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    attention_norm="model.layers.{}.input_layernorm.weight",
    qkv="model.layers.{}.self_attn.qkv_proj.weight",
    attention_out="model.layers.{}.self_attn.o_proj.weight",
    mlp_norm="model.layers.{}.post_attention_layernorm.weight",
    gate_up="model.layers.{}.mlp.gate_up_proj.weight",
    down="model.layers.{}.mlp.down_proj.weight",
)


def read(config: Config) -> Decoder:
    """Describe the decoder of a Phi3Config; CheckpointError when its numbers cannot be."""
    return read_usual(config, "phi3", NAMES)
