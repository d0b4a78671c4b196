"""Phi-3-mini, Phi-3-medium, Phi-3.5-mini, Phi-4-mini: Phi3ForCausalLM in transformers."""

from toolkit.checkpoint.config import Config, normalize_rope
from toolkit.decoder import Decoder, TensorNames
from toolkit.families import Evidence

ARCHITECTURE = "Phi3ForCausalLM"
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
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    hidden = config.integer("hidden_size")
    head_dim = config.integer("head_dim", hidden // heads)
    context = config.integer("max_position_embeddings")
    window = config.fields.get("sliding_window") and config.integer("sliding_window")
    if heads % kv_heads:
        raise config.error("num_key_value_heads", kv_heads, f"a divisor of {heads}")
    if config.fields.get("hidden_act", "silu") != "silu":
        raise config.error("hidden_act", config.fields["hidden_act"], "'silu'")
    return Decoder(
        family="phi3",
        layers=config.integer("num_hidden_layers"),
        hidden=hidden,
        intermediate=config.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=config.integer("vocab_size"),
        context=context,
        norm_epsilon=config.number("rms_norm_eps", 1e-5),
        rope=normalize_rope(config, head_dim),
        window=window if window and window < context else None,
        is_tied=config.flag("tie_word_embeddings"),
        names=NAMES,
    )
