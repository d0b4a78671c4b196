"""MLX artifacts that see: features, logits and answers are the source's."""

import json
import shutil
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.formats.seeing import Source, ask, expect_blame_on_pictures
from tests.formats.writing import write_artifact
from tests.golden.mlx_vision_cases import GOLDEN, digest, select, write_case
from tests.quality.sources import edit_json
from tests.vision_checkpoints import draw
from toolkit import artifact
from toolkit.artifact import Limits
from toolkit.build import build
from toolkit.console import Console
from toolkit.errors import PlanError
from toolkit.formats import mlx as format_
from toolkit.formats.mlx.recipe import MlxQuantization, MlxRecipe
from toolkit.job import Options
from toolkit.plan import make_plan
from toolkit.quality.picture import encode_pictures
from toolkit.report import Report
from toolkit.runner.engines import _mlx_vision
from toolkit.runner.engines import mlx_lm as engine
from toolkit.runner.failure import Failure
from toolkit.runner.generate import generate
from toolkit.runner.images import Pixels, prepare
from toolkit.runner.pictures import PICTURE
from toolkit.runner.settings import Settings

LYING, STANDING = draw(640, 300, 1), draw(300, 500, 2)
LIMITS = Limits(max_kl=1e-6, min_top1=1.0)


def make_recipe(*, rope_factors: Any = "short", **changes: Any) -> MlxRecipe:
    settings = {"bits": 16, "vision_bits": 16, "dtype": "fp32", **changes}
    return MlxRecipe(
        name="sees", model="x", title="x", provider="cpu", rope_factors=rope_factors,
        context_length=4096 if rope_factors == "short" else 8192, check=LIMITS,
        quantization=MlxQuantization(**settings),
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(tmp_path_factory.mktemp("vision") / "checkpoint", crops=2)


def write(source: Source, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    write_artifact(make_recipe(**changes), source.checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def built(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Through the gate, all in float32."""
    out, report = tmp_path_factory.mktemp("built"), Report("sees")
    return build(make_recipe(), source.checkpoint, out, Options(), Console(as_json=True), report)


@pytest.fixture(scope="module")
def model(built: Path) -> Iterator[engine.Model]:
    """As the runner loads it."""
    found = engine.load(built, "model.safetensors", "cpu", Settings(4096))
    yield found
    found.close()


def look(folder: Path, ids: list[int], pixels: Pixels, start: int = 0) -> Any:
    loaded, _ = _mlx_vision.load_model(folder)
    return np.array(_mlx_vision.embed(loaded, ids, pixels, start).astype(mx.float32))


def test_features_are_the_sources(source: Source, built: Path) -> None:
    """Of one picture that lies and one that stands, and where a prompt's beginning is known."""
    pixels = prepare([LYING, STANDING], source.vision)
    ids, features = ask(pixels), source.features(pixels)
    places = np.array(ids) < 0
    found = look(built, ids, pixels)
    # Values up to 10 in float32, summed in another order: 1e-5 measured.
    np.testing.assert_allclose(found[places], features, atol=1e-4)
    words = source.weights.look_up(source.decoder.names.embedding, [max(0, one) for one in ids])
    np.testing.assert_array_equal(found[~places], words[~places])
    start = len(ids) - pixels.counts[1]  # amid the second picture
    np.testing.assert_allclose(look(built, ids, pixels, start), found[start:], atol=1e-5)


@pytest.mark.parametrize("pictures", [[LYING], [LYING, STANDING]], ids=["one", "two"])
def test_logits_are_the_sources(pictures: list[Any], source: Source, built: Path) -> None:
    pixels = prepare(pictures, replace(source.vision, crops=2))
    session = format_.open_session(built)
    found = session.picture_logits(ask(pixels), pixels)
    session.close()
    # Values up to 8 in float32: 1.3e-5 measured.
    np.testing.assert_allclose(found, source.logits(ask(pixels), pixels), atol=1e-4)


def test_logits_are_mlx_vlms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-vlm loaded these very files (tests/golden/make_mlx_vision.py), of a CLIP-L's width.

    Of crops beside each other it makes other lines than the source; with its lines they are equal.
    """
    folder, questions = write_case(tmp_path)
    expected = np.load(GOLDEN)
    assert digest(folder) == expected["digest"]
    session = format_.open_session(folder)
    for name, question in questions.items():
        if name == "wide":
            assert np.abs(select(session.picture_logits(*question)) - expected[name]).max() > 1
            monkeypatch.setattr(_mlx_vision, "_lay_out", lay_out_as_mlx_vlm)
        # Values up to 8 in float32, summed in another order: 1.3e-5 measured.
        found = select(session.picture_logits(*question))
        np.testing.assert_allclose(found, expected[name], atol=1e-4)
    session.close()


def lay_out_as_mlx_vlm(patches: Any, height: int, width: int, end: Any) -> Any:
    """One crop's lines before the next crop's, cut where the picture's lines end."""
    side = _mlx_vision.PATCHES // 2
    blocks = patches.reshape(-1, side, 2, side, 2, patches.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
    lines = blocks.reshape(height * side, width * side, end.shape[-1])
    ends = mx.broadcast_to(end[0], (len(lines), 1, end.shape[-1]))
    return mx.concatenate([lines, ends], axis=1).reshape(-1, end.shape[-1])


def test_long_factors_are_the_sources(source: Source, tmp_path: Path) -> None:
    """At every length, as mlx-lm has it: the source's beyond 4,096 tokens."""
    folder = write(source, tmp_path / "long", rope_factors="long")
    pixels = prepare([LYING], replace(source.vision, crops=1))
    session = format_.open_session(folder)
    found = session.picture_logits(ask(pixels), pixels)
    always, rope = copy(source), source.decoder.rope
    long_rope = replace(rope, short_factors=rope.long_factors)
    always.decoder = replace(source.decoder, rope=long_rope)
    np.testing.assert_allclose(found, always.logits(ask(pixels), pixels), atol=1e-4)


# Answers


def test_an_answer_is_the_sources(source: Source, model: engine.Model) -> None:
    pixels = prepare([LYING], replace(source.vision, crops=2))
    ids = ask(pixels)
    found = [token for token, _ in model.generate(ids, 3, pixels=pixels)]
    assert found == source.answer(ids, pixels, len(found))


def test_what_is_known_of_a_picture_is_not_computed_again(
    source: Source, model: engine.Model
) -> None:
    """Another picture of as many tokens has the same ids, and is another all the same."""
    vision, other = replace(source.vision, crops=2), draw(640, 300, 7)

    def answer(pictures: list[Any], last: int) -> int:
        pixels = prepare(pictures, vision)
        ids = ask(pixels, last)
        found = [token for token, _ in model.generate(ids, 2, pixels=pixels)]
        assert found == source.answer(ids, pixels, len(found))
        return model.reused_tokens

    (count,) = prepare([LYING], vision).counts
    answer([other], 320)
    assert answer([LYING], 320) == 2  # what stands before it
    assert answer([LYING], 321) == 2 + count + 1  # the picture, and <s> behind it
    assert answer([LYING, other], 322) == 2 + count + 1


@pytest.mark.parametrize("settings", [{"batch_tokens": 100}, {"kv_bits": 8}])
def test_the_engines_settings_hold_with_pictures(
    settings: dict[str, int], source: Source, built: Path
) -> None:
    pixels = prepare([LYING], replace(source.vision, crops=1))
    found = engine.load(built, "model.safetensors", "cpu", Settings(4096, **settings))
    answer = [token for token, _ in found.generate(ask(pixels), 2, pixels=pixels)]
    found.close()
    assert answer == source.answer(ask(pixels), pixels, len(answer))


def test_the_runner_answers_about_a_file(source: Source, built: Path, tmp_path: Path) -> None:
    """What `phiship run --image` answers: files, ids, prompt and runtime together."""
    path = tmp_path / "lying.png"
    LYING.save(path)
    found = generate(built, "What is shown?", 3, lambda _: None, images=[path])
    chat = artifact.read_manifest(built).chat
    pixels = prepare([LYING], replace(source.vision, crops=2))
    before, after = chat.turns["user"]
    text = f"{before}{PICTURE}\nWhat is shown?{after}{chat.generation}"
    ids = encode_pictures(source.checkpoint, chat, text, pixels.counts)
    assert found["prompt_tokens"] == len(ids)
    assert found["token_ids"] == source.answer(ids, pixels, 3)


# The gate


def test_the_gate_asks_about_a_picture(built: Path) -> None:
    manifest = artifact.read_manifest(built)
    found = {one.name: one for one in manifest.quality.measures}
    assert manifest.quality.checked
    assert found["picture: mean KL"].limit == LIMITS.max_kl
    assert found["picture: top-1 agreement"].value == 1
    assert manifest.runtime.companions == ("pillow",)
    assert any("CLIP-L" in note for note in manifest.notes)


@pytest.mark.parametrize("part", ["sub_GN", "img_projection.2.bias", "layers.1.mlp.fc2.bias"])
def test_the_gate_sees_a_tower_that_is_wrong(
    part: str, source: Source, built: Path, tmp_path: Path
) -> None:
    """One tensor of the vision part negated in the artifact; the text alone would pass."""
    broken = Path(shutil.copytree(built, tmp_path / "broken"))
    negate(broken / "model.safetensors", part)
    session = format_.open_session(broken)
    expect_blame_on_pictures(
        session, source.checkpoint, source.decoder, artifact.read_manifest(built).chat,
        Limits(max_kl=0.01, min_top1=0.9),
    )  # fmt: skip


def negate(path: Path, part: str) -> None:
    tensors = mx.load(str(path))
    name = next(one for one in tensors if one.endswith(part))
    tensors[name] = -tensors[name]
    mx.save_safetensors(str(path), tensors)


# What is stored


def test_every_tensor_is_read_back(source: Source, built: Path) -> None:
    found = dict(format_.dequantize(built, source.decoder))
    assert set(found) == set(source.checkpoint.tensors)  # unused ones too: mlx-vlm wants them
    for name, values in found.items():
        np.testing.assert_array_equal(values, source.checkpoint.read(name))


def test_names_and_shapes_are_mlx_vlms(source: Source, built: Path) -> None:
    tensors = mx.load(str(built / "model.safetensors"))
    assert source.decoder.vision
    names = source.decoder.vision.names
    assert tensors[names.patch_embedding].shape == (64, 14, 14, 3)
    assert tensors[names.row_separator].shape == (1, 1, 1, 256)
    config = json.loads((built / "config.json").read_text("utf-8"))
    assert config["model_type"] == "phi3_v"
    assert config["vision_config"] == {}
    rope = config["rope_scaling"]
    assert rope["short_factor"] == rope["long_factor"]
    expected = (source.checkpoint.folder / "preprocessor_config.json").read_bytes()
    assert (built / "preprocessor_config.json").read_bytes() == expected


@pytest.mark.parametrize(
    ("dtype", "vision_bits", "limit"),
    [("fp16", None, 0.02), ("bf16", None, 0.04), ("fp16", 16, 1e-3)],
)
def test_a_smaller_tower_sees_almost_the_same(
    dtype: str, vision_bits: int | None, limit: float, source: Source, tmp_path: Path
) -> None:
    """8 bits where the recipe says nothing, whatever the text has."""
    folder = write(source, tmp_path / "small", bits=4, vision_bits=vision_bits, dtype=dtype)
    quantization = json.loads((folder / "config.json").read_text("utf-8"))["quantization"]
    path = "model.vision_embed_tokens.img_projection.0"
    stored = quantization.get(path)
    assert stored == (None if vision_bits else {"group_size": 64, "bits": 8, "mode": "affine"})
    pixels = prepare([LYING], replace(source.vision, crops=2))
    ids = [-1] * pixels.counts[0]
    found, expected = look(folder, ids, pixels), source.features(pixels)
    # 1.4e-2, 2.7e-2 and 2e-4 measured: bf16 rounds the scales of 8 bits by as much as a step.
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < limit


def test_a_tower_that_config_json_contradicts_is_not_loaded(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "other"))
    edit_json(
        folder / "config.json", lambda fields: fields["img_processor"].update(num_hidden_layers=2)
    )
    with pytest.raises(Failure, match=r"layers\.2"):
        engine.load(folder, "model.safetensors", "cpu", Settings(4096))


# Planning


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_bits": 4}, r"got 4; 4 bits move .* allowed 8 \(3 %\), 16"),
        ({"vision_bits": None, "group_size": 128}, "group_size 128, which do not divide all of 64"),
        ({"rope_factors": None}, "rope_factors: missing"),
    ],
)
def test_what_cannot_be_is_refused_at_planning(
    changes: dict[str, Any], said: str, source: Source
) -> None:
    with pytest.raises(PlanError, match=said):
        make_plan(make_recipe(**changes), source.decoder)


def test_a_model_that_reads_text_only_has_no_tower_to_store(source: Source) -> None:
    with pytest.raises(PlanError, match="reads no pictures: leave it out"):
        make_plan(make_recipe(), replace(source.decoder, vision=None))
