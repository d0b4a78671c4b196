"""Phi-3-small: Phi3SmallForCausalLM, in modeling_phi3_small.py beside the published checkpoints."""

from dataclasses import replace

from toolkit.checkpoint.config import Config
from toolkit.checkpoint.rope import normalize_rope
from toolkit.decoder import BlockSparse, Decoder, Parts, Rows, TensorNames
from toolkit.families import Evidence

ARCHITECTURES = ("Phi3SmallForCausalLM",)
MODELS = "Phi-3-small"
QKV = "model.layers.{}.self_attn.query_key_value.weight"
UP = "model.layers.{}.mlp.up_proj.weight"
_WORDS = (
    "logits with float weights are those of a float64 forward written apart from the reference, "
    "beyond the local blocks too; its published code was not run here"
)
VERIFIED = {
    "onnx": Evidence(_WORDS, "tests/formats/test_small.py"),
    "openvino": Evidence(_WORDS, "tests/formats/test_small.py"),
}
NAMES = TensorNames(
    embedding="model.embed_tokens.weight",
    final_norm="model.final_layernorm.weight",
    head="lm_head.weight",
    attention_norm="model.layers.{}.input_layernorm.weight",
    attention_out="model.layers.{}.self_attn.dense.weight",
    mlp_norm="model.layers.{}.post_attention_layernorm.weight",
    down="model.layers.{}.mlp.down_proj.weight",
)


def read(config: Config) -> Decoder:
    """Describe the decoder of a Phi3SmallConfig; CheckpointError when its numbers cannot be."""
    _check_fixed(config)
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", kv_heads, f"a divisor of {heads}")
    if hidden % heads:
        raise config.error("num_attention_heads", heads, f"a divisor of {hidden}")
    head_dim, inner = hidden // heads, config.integer("ff_intermediate_size")
    vocab, is_scaled = config.integer("vocab_size"), config.flag("mup_use_scaling", True)
    # What its own code calls the base of the rotary embedding.
    turning = replace(config, fields={**config.fields, "rope_theta": _read_base(config)})
    return Decoder(
        family="phi3small",
        layers=config.integer("num_hidden_layers"),
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        context=config.integer("max_position_embeddings"),
        norm_epsilon=config.number("layer_norm_epsilon", 1e-5),
        rope=normalize_rope(turning, head_dim),
        window=None,
        is_tied=config.flag("tie_word_embeddings", True),
        names=NAMES,
        norm="layer",
        biased=("qkv", "attention_out", "gate_up", "down"),
        qkv_parts=_list_groups(heads, kv_heads, head_dim),
        # Even rows go through GELU, odd ones do not.
        gate_parts=(Rows(UP, 0, inner, 2),),
        up_parts=(Rows(UP, 1, inner, 2),),
        sparse=_read_sparse(config, heads),
        gegelu_limit=config.number("gegelu_limit"),
        embedding_scale=config.number("mup_embedding_multiplier", 10.0),
        attention_scale=config.number("mup_attn_multiplier", 1.0) / head_dim if is_scaled else None,
        logit_scale=1 / config.number("mup_width_multiplier", 8.0),
        masked_tokens=_read_masked(config, vocab),
    )


def _check_fixed(config: Config) -> None:
    """What the published checkpoints all have; nothing else is known to work."""
    if config.fields.get("hidden_act", "gegelu") != "gegelu":
        raise config.error("hidden_act", config.fields["hidden_act"], "'gegelu'")
    if config.number("rope_position_scale", 1.0) != 1:
        raise config.error("rope_position_scale", config.fields["rope_position_scale"], "1.0")


def _read_base(config: Config) -> float:
    return config.number("rope_embedding_base", 1_000_000.0)


def _list_groups(heads: int, kv_heads: int, head_dim: int) -> Parts:
    """Queries, keys, values: stored as groups, one a key head, of its query heads, it, its value.

    Query heads stay in order, for group after group has them so.
    """
    shared = heads // kv_heads
    group = (shared + 2) * head_dim
    queries = [Rows(QKV, g * group, shared * head_dim) for g in range(kv_heads)]
    keys = [Rows(QKV, g * group + shared * head_dim, head_dim) for g in range(kv_heads)]
    values = [Rows(QKV, (g + 1) * group - head_dim, head_dim) for g in range(kv_heads)]
    return (*queries, *keys, *values)


def _read_sparse(config: Config, heads: int) -> BlockSparse | None:
    """The pattern; None where every layer is dense."""
    every = config.integer("dense_attention_every_n_layers")
    stride = config.integer("blocksparse_vert_stride")
    is_alike = config.flag("blocksparse_homo_head_pattern")
    step = 0 if is_alike else max(1, stride // heads)
    if every == 1:
        return None
    return BlockSparse(
        block=config.integer("blocksparse_block_size"),
        local=config.integer("blocksparse_num_local_blocks"),
        stride=stride,
        shifts=tuple(head * step for head in range(heads)),
        dense_every=every,
    )


def _read_masked(config: Config, vocab: int) -> tuple[int, ...]:
    found = config.fields.get("dummy_token_indices") or []
    allowed = f"a list of token ids, 0 to {vocab - 1}"
    if not isinstance(found, list):
        raise config.error("dummy_token_indices", found, allowed)
    for token in found:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab:
            raise config.error("dummy_token_indices", token, allowed)
    return tuple(found)
