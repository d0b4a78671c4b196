"""Phi-3.5-MoE: PhiMoEForCausalLM in transformers (models/phimoe)."""

from toolkit.checkpoint.config import Config, normalize_rope
from toolkit.decoder import Decoder, Experts, Kind, Rows, TensorNames
from toolkit.families import Evidence

ARCHITECTURE = "PhiMoEForCausalLM"
MODELS = "Phi-3.5-MoE"
ATTENTION = "model.layers.{}.self_attn."
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}."
_WORDS = (
    "logits are those of a reference with float64 routing, which are transformers', given the "
    "artifact's own weights"
)
VERIFIED = {
    "onnx": Evidence(_WORDS, "tests/formats/test_moe.py"),
    "openvino": Evidence(_WORDS, "tests/formats/test_moe.py"),
    "mlx": Evidence(_WORDS, "tests/formats/test_moe.py"),
    "gguf": Evidence(
        "folded to come near: mean KL of a random model to its source measured, labelled and gated",
        "tests/formats/test_moe.py",
    ),
}
NAMES = TensorNames(
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    attention_norm="model.layers.{}.input_layernorm.weight",
    attention_out=f"{ATTENTION}o_proj.weight",
    mlp_norm="model.layers.{}.post_attention_layernorm.weight",
    down=f"{EXPERT}w2.weight",
    router="model.layers.{}.block_sparse_moe.gate.weight",
)
PER_TOKEN = 2  # sparsemixer is written for two


def read(config: Config) -> Decoder:
    """Describe the decoder of a PhimoeConfig; CheckpointError when its numbers cannot be."""
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    hidden, inner = config.integer("hidden_size"), config.integer("intermediate_size")
    head_dim = config.integer("head_dim", hidden // heads)
    context = config.integer("max_position_embeddings")
    window = config.fields.get("sliding_window") and config.integer("sliding_window")
    if heads % kv_heads:
        raise config.error("num_key_value_heads", kv_heads, f"a divisor of {heads}")
    if config.fields.get("hidden_act", "silu") != "silu":
        raise config.error("hidden_act", config.fields["hidden_act"], "'silu'")
    return Decoder(
        family="phimoe",
        layers=config.integer("num_hidden_layers"),
        hidden=hidden,
        intermediate=inner,
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
        norm="layer",
        biased=_list_biased(config),
        qkv_parts=(
            Rows(f"{ATTENTION}q_proj.weight", 0, heads * head_dim),
            Rows(f"{ATTENTION}k_proj.weight", 0, kv_heads * head_dim),
            Rows(f"{ATTENTION}v_proj.weight", 0, kv_heads * head_dim),
        ),
        gate_parts=(Rows(f"{EXPERT}w1.weight", 0, inner),),
        up_parts=(Rows(f"{EXPERT}w3.weight", 0, inner),),
        experts=_read_experts(config),
    )


def _list_biased(config: Config) -> tuple[Kind, ...]:
    attention: tuple[Kind, ...] = ("qkv", "attention_out") if config.flag("attention_bias") else ()
    head: tuple[Kind, ...] = ("head",) if config.flag("lm_head_bias") else ()
    return attention + head


def _read_experts(config: Config) -> Experts:
    count = config.integer("num_local_experts")
    per_token = config.integer("num_experts_per_tok", PER_TOKEN)
    if per_token != PER_TOKEN:
        raise config.error("num_experts_per_tok", per_token, str(PER_TOKEN))
    if count < PER_TOKEN:
        raise config.error("num_local_experts", count, f"{PER_TOKEN} or more")
    return Experts(count, per_token, config.number("router_jitter_noise", 0.01))
