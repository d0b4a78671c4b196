"""MLX recipes: what becomes of them in config.json, which contexts hold, what is refused."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.checkpoints import VARIANTS
from tests.formats.mlx_cases import Checkpoints, make_recipe, write
from tests.golden.make_mlx import write_case
from toolkit.checkpoint import Checkpoint
from toolkit.errors import PlanError
from toolkit.families import read_decoder
from toolkit.formats import mlx
from toolkit.plan import make_plan


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Checkpoints of all cases."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


# config.json


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "longrope"}},
        {"rope_scaling": {"type": "su"}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "longrope", "rope_theta": 5000.0}},
        {"original_max_position_embeddings": None,
         "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 64}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("factors", ["short", "long"])
def test_every_spelling_of_longrope_becomes_mlx_lms(
    factors: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    wanted = VARIANTS["longrope"]["rope_scaling"]
    numbers = {key: wanted[key] for key in ("short_factor", "long_factor")}
    changes = {k: {**numbers, **v} if isinstance(v, dict) else v for k, v in changes.items()}
    checkpoint = Checkpoint.open(write_case(tmp_path / "source", "longrope", **changes))
    recipe = make_recipe("4bit-group64", checkpoint, factors)
    folder = write(tmp_path / "out", recipe, checkpoint)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["rope_scaling"] == {
        "type": "longrope",
        "factor": 4.0,
        "short_factor": numbers["short_factor"],
        "long_factor": numbers[f"{factors}_factor"],
    }
    assert config["original_max_position_embeddings"] == 64
    assert config["max_position_embeddings"] == 256
    assert config["rope_theta"] == read_decoder(checkpoint.config).rope.theta
    assert "rope_parameters" not in config
    session = mlx.open_session(folder)
    assert session._model.layers[0].self_attn.rope._scale == pytest.approx(
        read_decoder(checkpoint.config).rope.long_scale
    )


def test_settings_of_transformers_5_come_to_the_top(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    changes = {"rope_parameters": rope, "rope_theta": None, "dtype": "bfloat16"}
    checkpoint = Checkpoint.open(write_case(tmp_path / "source", "mha", **changes))
    folder = write(tmp_path / "out", make_recipe("bf16", checkpoint), checkpoint)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (5000.0, 0.5)
    assert config["rope_scaling"] is None
    assert not {"rope_parameters", "dtype", "quantization"} & set(config)


@pytest.mark.parametrize("has_generation", [False, True])
def test_every_stop_id_is_mlx_lms(has_generation: bool, tmp_path: Path) -> None:
    """Also <|end|>, where a fine-tune names <|endoftext|> only; code is not referred to."""
    changes = {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "_name_or_path": "x"}
    source = write_case(tmp_path / "source", "mha", **changes)
    path = source / "generation_config.json"
    path.unlink(missing_ok=True)
    if has_generation:  # for mlx-lm it wins over config.json
        path.write_text(json.dumps({"eos_token_id": 1984, "max_length": 9}), encoding="utf-8")
    checkpoint = Checkpoint.open(source)
    folder = write(tmp_path / "out", make_recipe("4bit-group64", checkpoint), checkpoint)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert len(checkpoint.stop_ids) > 1
    assert config["eos_token_id"] == list(checkpoint.stop_ids)
    assert not {"auto_map", "_name_or_path"} & set(config)
    generation = json.loads((folder / "generation_config.json").read_text("utf-8"))
    assert generation.get("max_length") == (9 if has_generation else None)
    session = mlx.open_session(folder)
    assert all(session.stops(token) for token in checkpoint.stop_ids)
    assert not session.stops(5)


# Plans


@pytest.mark.parametrize(
    ("factors", "context", "valid"),
    [("short", 64, (1, 64)), ("short", 40, (1, 40)), ("long", 256, (65, 256)),
     ("long", 65, (65, 65))],
)  # fmt: skip
def test_valid_context_with_longrope(
    factors: str, context: int, valid: tuple[int, int], checkpoints: Checkpoints
) -> None:
    checkpoint = checkpoints.get("longrope_gqa")
    decoder = read_decoder(checkpoint.config)
    needs = mlx.needs(make_recipe("4bit-group64", checkpoint, factors), decoder, context)
    assert needs.valid_context == valid
    assert any("shorter texts differ" in note for note in needs.notes) == (factors == "long")
    assert needs.always_long_rope == (factors == "long")
    # 2 layers x (keys + values) x 2 heads x 64 x 2 bytes
    assert needs.kv_bytes_per_token == 2 * 2 * 2 * 64 * 4  # float32 on a CPU
    assert (needs.engine, needs.provider) == ("mlx_lm", "cpu")


def test_valid_context_ends_with_the_window(checkpoints: Checkpoints) -> None:
    checkpoint = checkpoints.get("window")
    decoder = read_decoder(checkpoint.config)
    needs = mlx.needs(make_recipe("4bit-group64", checkpoint), decoder, 128)
    assert needs.valid_context == (1, 32)
    assert "beyond 32 tokens" in needs.notes[0]
    assert mlx.needs(make_recipe("4bit-group64", checkpoint), decoder, 30).valid_context == (1, 30)


@pytest.mark.parametrize(("factors", "context", "word"), [("short", 65, "long"),
                                                          ("long", 64, "short")])  # fmt: skip
def test_a_context_that_the_factors_do_not_hold_is_refused(
    factors: str, context: int, word: str, checkpoints: Checkpoints
) -> None:
    checkpoint = checkpoints.get("longrope")
    recipe = make_recipe("4bit-group64", checkpoint, factors)
    with pytest.raises(PlanError, match=f"context_length: got {context}") as caught:
        make_plan(recipe, read_decoder(checkpoint.config), context_length=context)
    assert f"rope_factors: {word}" in caught.value.advice


@pytest.mark.parametrize(
    ("case", "source", "settings", "message"),
    [
        ("mha", {"intermediate_size": 544}, {},
         r"64 does not divide the 544 inputs of model\.layers\.0\.mlp\.down_proj; allowed 32$"),
        ("mha", {"intermediate_size": 500}, {"group_size": 32}, "500 inputs .* allowed none$"),
        ("mha", {}, {"overrides": {"*.v_proj": {"bits": 6}}},
         r"'\*\.v_proj' matches no module; this model has model\.embed_tokens, lm_head, "),
        ("partial_rotary_tied", {}, {"head_bits": 8}, "head_bits: got 8; .* head is its embedding"),
        ("mha", {"head_dim": 32, "partial_rotary_factor": 1.0}, {}, "4 x 32 and 256"),
        ("longrope", {"rope_scaling": {**VARIANTS["longrope"]["rope_scaling"],
                                       "attention_factor": 1.5}}, {},
         r"scale from the contexts, 1\.15\d*; this model has 1\.5 for its short factors"),
    ],
)  # fmt: skip
def test_what_mlx_lm_cannot_hold_is_refused(
    case: str, source: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(write_case(tmp_path / "source", case, **source))
    recipe = make_recipe("4bit-group64", checkpoint, **settings)
    with pytest.raises(PlanError, match=message):
        make_plan(recipe, read_decoder(checkpoint.config))


@pytest.mark.parametrize(
    ("case", "factors", "message"),
    [("mha", "short", "got 'short'; this model has no LongRoPE; allowed none"),
     ("longrope", None, r"missing; .* allowed short \(up to 64 tokens\) or long \(beyond\)")],
)  # fmt: skip
def test_rope_factors_belong_to_longrope(
    case: str, factors: Any, message: str, checkpoints: Checkpoints
) -> None:
    checkpoint = checkpoints.get(case)
    recipe = make_recipe("4bit-group64", checkpoint)
    recipe = msgspec.structs.replace(recipe, rope_factors=factors)
    with pytest.raises(PlanError, match=message):
        make_plan(recipe, read_decoder(checkpoint.config))
