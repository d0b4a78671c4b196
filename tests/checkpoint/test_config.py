"""config.json in every spelling gives the same Decoder; what cannot be is refused."""

import math
from typing import Any

import pytest

from toolkit.checkpoint.config import Config
from toolkit.decoder import Decoder, Rope
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.families import read_decoder

PAIRS = 48
SHORT = [1.0 + 0.01 * pair for pair in range(PAIRS)]
LONG = [1.0 + 0.5 * pair for pair in range(PAIRS)]
FACTORS = {"short_factor": SHORT, "long_factor": LONG}
# The shape of Phi-3-mini-128k, as published.
BASE: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
TOP = {"original_max_position_embeddings": 4096, "rope_theta": 10000.0}
# sqrt(1 + ln(131072 / 4096) / ln(4096)), as Phi-3's model card and transformers have it.
SCALE = 1.1902380714238083


def decode(**fields: Any) -> Decoder:
    return read_decoder(Config("config.json", {**BASE, **fields}))


def refusal(**fields: Any) -> str:
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        decode(**fields)
    return str(caught.value)


SPELLINGS: dict[str, dict[str, Any]] = {
    "first published": {**TOP, "rope_scaling": {"type": "su", **FACTORS}},
    "published now": {**TOP, "rope_scaling": {"type": "longrope", **FACTORS}},
    "rope_type only": {**TOP, "rope_scaling": {"rope_type": "longrope", **FACTORS}},
    "both, as transformers 5 leaves an old one": {
        **TOP,
        "rope_scaling": {"rope_type": "longrope", "type": "su", **FACTORS},
    },
    "transformers 5": {
        "original_max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 4096,
            **FACTORS,
        },
    },
    "all inside": {"rope_parameters": {"rope_type": "longrope", **TOP, **FACTORS}},
    "all inside, null beside it": {
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "longrope", **TOP, **FACTORS},
    },
    "factor": {**TOP, "rope_scaling": {"type": "longrope", "factor": 32.0, **FACTORS}},
    "attention_factor": {
        **TOP,
        "rope_scaling": {"type": "longrope", "attention_factor": SCALE, **FACTORS},
    },
    "default theta": {
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", **FACTORS},
    },
    "whole numbers": {
        **TOP,
        "rope_theta": 10000,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    },
}


@pytest.mark.parametrize("fields", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_longrope_is_the_same_decoder(fields: dict[str, Any]) -> None:
    decoder = decode(**fields)
    assert decoder == decode(**SPELLINGS["published now"])
    assert decoder.rope.is_long


def test_longrope_values() -> None:
    rope = decode(**SPELLINGS["published now"]).rope
    assert (rope.theta, rope.rotary_dim, rope.original_context) == (10000.0, 96, 4096)
    assert (rope.short_factors, rope.long_factors) == (tuple(SHORT), tuple(LONG))
    assert math.isclose(rope.short_scale, SCALE, rel_tol=1e-15)
    assert rope.long_scale == rope.short_scale


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_theta": 10000.0, "rope_scaling": None},
        {"rope_theta": 10000.0, "rope_scaling": {}},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_theta": 10000, "partial_rotary_factor": 1}},
    ],
)
def test_every_spelling_of_plain_rope_is_the_same_decoder(fields: dict[str, Any]) -> None:
    context = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    decoder = decode(**context, **fields)
    assert decoder.rope == Rope(10000.0, 96, 4096)
    assert not decoder.rope.is_long


def test_which_of_two_wins_is_as_in_transformers() -> None:
    decoder = decode(rope_theta=1.0, rope_parameters={"rope_theta": 500.0})
    assert decoder.rope.theta == 500.0
    scaling = {"rope_type": "longrope", "type": "linear", **FACTORS}
    assert decode(**TOP, rope_scaling=scaling) == decode(**SPELLINGS["published now"])
    decoder = decode(partial_rotary_factor=0.5, rope_parameters={"partial_rotary_factor": 0.75})
    assert decoder.rope.rotary_dim == 72


def test_rope_scaling_wins_over_rope_parameters() -> None:
    fields = {
        **TOP,
        "rope_scaling": {"type": "su", **FACTORS},
        "rope_parameters": {"rope_theta": 1},
    }
    assert decode(**fields) == decode(**SPELLINGS["published now"])


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"attention_factor": 1.5}, (1.5, 1.5)),
        ({"factor": 1.0}, (1.0, 1.0)),
        ({"short_mscale": 1.25, "long_mscale": 1.5}, (1.25, 1.5)),
    ],
)
def test_scales_that_the_config_gives(
    scaling: dict[str, Any], expected: tuple[float, float]
) -> None:
    rope = decode(**TOP, rope_scaling={"type": "longrope", **FACTORS, **scaling}).rope
    assert (rope.short_scale, rope.long_scale) == expected


def test_longrope_without_extension_keeps_its_scale() -> None:
    fields = {**SPELLINGS["published now"], "max_position_embeddings": 4096}
    assert decode(**fields).rope.long_scale == 1.0


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.75])
def test_partial_rotary(factor: float) -> None:
    assert decode(partial_rotary_factor=factor).rope.rotary_dim == round(96 * factor)


def longrope(**changes: Any) -> dict[str, Any]:
    return {**TOP, "rope_scaling": {"type": "longrope", **FACTORS, **changes}}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (longrope(short_factor=SHORT[:3]), "rope_scaling: short_factor: got 3 values; allowed a"),
        (
            longrope(long_factor=LONG * 2),
            "long_factor: got 96 values; allowed a list of 48 numbers",
        ),
        (longrope(long_factor=None), "long_factor: got None; allowed a list of 48 numbers"),
        (longrope(short_factor=1.0), "short_factor: got 1.0; allowed a list of 48 numbers"),
        (longrope(short_factor=[*SHORT[1:], 0]), "short_factor: got 0; allowed a list of 48 numb"),
        (longrope(short_factor=[*SHORT[1:], "1"]), "short_factor: got '1'"),
        (longrope(short_factor=[*SHORT[1:], math.nan]), "short_factor: got nan"),
        (longrope(short_factor=[*SHORT[1:], math.inf]), "short_factor: got inf"),
        (longrope(attention_factor="1"), "rope_scaling: attention_factor: got '1'"),
        (longrope(attention_factor=0), "rope_scaling: attention_factor: got 0"),
        (longrope(factor=-1), "rope_scaling: factor: got -1; allowed a number above 0"),
        (longrope(short_mscale=[]), "rope_scaling: short_mscale: got []"),
        ({**longrope(), "rope_theta": "1e4"}, "rope_theta: got '1e4'; allowed a number above 0"),
        ({**longrope(), "rope_theta": 0}, "rope_theta: got 0"),
        ({**longrope(), "rope_theta": True}, "rope_theta: got True"),
        ({"rope_parameters": {"rope_theta": []}}, "rope_parameters: rope_theta: got []"),
        ({"partial_rotary_factor": 0.01}, "partial_rotary_factor: got 0.01; allowed what makes 96"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor: got 2.0"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor: got 'half'"),
        ({"max_position_embeddings": 4096.0}, "max_position_embeddings: got 4096.0"),
        ({"rope_scaling": "longrope"}, "rope_scaling: got 'longrope'; allowed a mapping or null"),
        ({"rope_parameters": [1]}, "rope_parameters: got [1]; allowed a mapping or null"),
        (
            {"rope_scaling": {"type": "longrope", **FACTORS}},
            "original_max_position_embeddings: got",
        ),
        ({**longrope(), "original_max_position_embeddings": 1}, "embeddings: got 1; allowed 2 or"),
        ({**longrope(), "original_max_position_embeddings": "4k"}, "embeddings: got '4k'"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "rope_parameters: full_attention: got {'rope_theta': 1.0}; allowed one setting for all",
        ),
    ],
)
def test_impossible_rope(fields: dict[str, Any], says: str) -> None:
    message = refusal(**fields)
    assert message.startswith("config.json: ") and says in message


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "proportional", 3, ["su"]])
def test_unknown_scaling_is_named(kind: object) -> None:
    message = refusal(**TOP, rope_scaling={"type": kind, "factor": 2.0, **FACTORS})
    assert (
        message == f"config.json: rope_scaling: type: got {kind!r}; supported: none, linear, "
        "llama3, longrope, su"
    )


@pytest.mark.parametrize(
    ("window", "expected"), [(2047, 2047), (262144, None), (131072, None), (None, None)]
)
def test_window_counts_only_inside_the_context(window: int | None, expected: int | None) -> None:
    assert decode(**TOP, sliding_window=window).window == expected


def test_sizes() -> None:
    decoder = decode(num_key_value_heads=8, tie_word_embeddings=True)
    assert (decoder.head_dim, decoder.qkv_rows) == (96, (32 + 2 * 8) * 96)
    assert decoder.head_name == decoder.names.embedding
    shapes = decoder.shapes()
    assert len(shapes) == 2 + 6 * 32
    assert shapes["model.layers.31.self_attn.qkv_proj.weight"] == (4608, 3072)
    # Keys and values of 8 heads of 96 in 32 layers, 2 bytes each.
    assert decoder.kv_bytes_per_token(2) == 2 * 32 * 8 * 96 * 2


def test_missing_kv_heads_means_one_for_each_head() -> None:
    assert decode(num_key_value_heads=None).kv_heads == 32


@pytest.mark.parametrize(
    ("names", "model_type", "expected"),
    [
        (["LlamaForCausalLM"], "llama", "LlamaForCausalLM"),
        (None, "llama", "LlamaForCausalLM"),
        ([], "mistral", "MistralForCausalLM"),
        (["MyWrapper", "MistralForCausalLM"], "mistral", "MistralForCausalLM"),
        # transformers reads what model_type says, whatever architectures does.
        (["LlamaForCausalLM"], "mistral", "MistralForCausalLM"),
        (["LlamaForSequenceClassification"], "llama", "LlamaForSequenceClassification"),
        (["Phi3VForCausalLM"], "phi3_v", "Phi3VForCausalLM"),
        (["Phi3ForCausalLM"], "", "Phi3ForCausalLM"),
    ],
)
def test_the_architecture_is_the_one_that_transformers_chooses(
    names: list[str] | None, model_type: str, expected: str
) -> None:
    config = Config("config.json", {"architectures": names, "model_type": model_type})
    assert config.architecture == expected
