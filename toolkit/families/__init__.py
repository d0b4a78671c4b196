"""One module per model_type; the folder is the registry."""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from toolkit.checkpoint.config import Config
from toolkit.checkpoint.rope import normalize_rope
from toolkit.decoder import Decoder, TensorNames
from toolkit.errors import UnsupportedError

# What layers much like Phi-3's have beside them, by architecture: said where one is refused.
UNLIKE: Mapping[str, str] = {
    "CohereForCausalLM": "layer norms, and attention beside the MLP",
    "Gemma2ForCausalLM": "norms behind attention and MLP, and caps on logits",
    "GemmaForCausalLM": "norms that add 1 to their weights, and GELU",
    "GraniteForCausalLM": "multipliers of embeddings, residuals and logits",
    "MixtralForCausalLM": "experts picked by softmax",
    "OlmoForCausalLM": "layer norms without weights",
    "Olmo2ForCausalLM": "norms of queries and keys, and norms behind attention and MLP",
    "PhiForCausalLM": "layer norms and biases",
    "Qwen2ForCausalLM": "biases of queries, keys and values",
    "Qwen3ForCausalLM": "norms of queries and keys",
    "StableLmForCausalLM": "layer norms and partial rotary embeddings",
    "Starcoder2ForCausalLM": "layer norms and biases",
}


@dataclass(frozen=True)
class Evidence:
    """What was compared with what, and the test that does it."""

    words: str
    test: str


class Family(Protocol):
    """What families/<name>.py offers; `VERIFIED` has every format that can hold the family."""

    ARCHITECTURES: Sequence[str]
    MODELS: str
    VERIFIED: Mapping[str, Evidence]

    def read(self, config: Config) -> Decoder:
        """Describe the decoder; CheckpointError when the config's numbers cannot be."""


def read_decoder(config: Config) -> Decoder:
    """Describe a checkpoint's decoder; UnsupportedError names the supported architectures."""
    return find_family(config).read(config)


def find_family(config: Config) -> Family:
    """The family of a checkpoint; UnsupportedError names the supported architectures."""
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    modules = [cast(Family, importlib.import_module(f"{__name__}.{name}")) for name in names]
    for module in modules:
        if config.architecture in module.ARCHITECTURES:
            return module
    supported = "; ".join(f"{', '.join(m.ARCHITECTURES)} ({m.MODELS})" for m in modules)
    unlike = UNLIKE.get(config.architecture)
    has = f", whose layers have {unlike}" if unlike else ""
    raise UnsupportedError(
        f"{config.where}: architectures: got {config.architecture or 'nothing'!r} "
        f"(model_type {config.model_type!r}){has}; supported: {supported}"
    )


def read_usual(config: Config, family: str, names: TensorNames) -> Decoder:
    """A decoder by the keys that transformers' Phi3Config and its relatives share, no more."""
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    kv_heads = config.integer("num_key_value_heads", heads)
    head_dim = config.integer("head_dim", hidden // heads)
    context = config.integer("max_position_embeddings")
    window = config.fields.get("sliding_window") and config.integer("sliding_window")
    if heads % kv_heads:
        raise config.error("num_key_value_heads", kv_heads, f"a divisor of {heads}")
    if config.fields.get("hidden_act", "silu") != "silu":
        raise config.error("hidden_act", config.fields["hidden_act"], "'silu'")
    return Decoder(
        family=family,
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
        names=names,
    )
