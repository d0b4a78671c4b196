"""Phi-3.5-MoE: PhiMoEForCausalLM in transformers (models/phimoe)."""

from dataclasses import replace

from toolkit.checkpoint.config import Config
from toolkit.decoder import Decoder, Experts, Kind, Rows, TensorNames
from toolkit.families import Evidence, read_usual

ARCHITECTURES = ("PhiMoEForCausalLM",)
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
    usual = read_usual(config, "phimoe", NAMES)
    keys = usual.kv_heads * usual.head_dim
    return replace(
        usual,
        norm="layer",
        biased=_list_biased(config),
        qkv_parts=(
            Rows(f"{ATTENTION}q_proj.weight", 0, usual.heads * usual.head_dim),
            Rows(f"{ATTENTION}k_proj.weight", 0, keys),
            Rows(f"{ATTENTION}v_proj.weight", 0, keys),
        ),
        gate_parts=(Rows(f"{EXPERT}w1.weight", 0, usual.intermediate),),
        up_parts=(Rows(f"{EXPERT}w3.weight", 0, usual.intermediate),),
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
