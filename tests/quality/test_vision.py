"""Models that see: the tower is transformers', the gate sees what an artifact sees."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.formats.seeing import expect_blame_on_pictures
from tests.golden.vision_cases import GOLDEN, select, tower_input
from tests.quality.sources import edit_json
from tests.vision_checkpoints import draw, write_vision_checkpoint
from toolkit import artifact, catalog
from toolkit.artifact import Limits
from toolkit.build import build
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.errors import CheckpointError, PlanError
from toolkit.families import read_decoder
from toolkit.formats.onnx.recipe import OnnxQuantization, OnnxRecipe
from toolkit.formats.onnx.session import OnnxSession
from toolkit.job import Options
from toolkit.plan import make_plan
from toolkit.progress import ignore
from toolkit.quality import picture
from toolkit.quality.reference import CheckpointWeights, states_of_embedded
from toolkit.quality.vision import place_features, run_tower
from toolkit.report import Report
from toolkit.runner.generate import generate
from toolkit.runner.images import prepare_files
from toolkit.runner.manifest import read_manifest
from toolkit.runner.pictures import PICTURE

RECIPE = OnnxRecipe(
    name="sees", model="phi-3-vision", title="sees", context_length=4096,
    quantization=OnnxQuantization(precision="fp32", head="fp32", vision="fp32"),
    check=Limits(max_kl=1e-6, min_top1=1.0),
)  # fmt: skip
LIMITS = Limits(max_kl=0.01, min_top1=0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_checkpoint(tmp_path_factory.mktemp("vision") / "sees", crops=2)


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, report = tmp_path_factory.mktemp("built"), Report("sees")
    return build(RECIPE, Checkpoint.open(folder), out, Options(), Console(as_json=True), report)


def test_the_tower_is_transformers(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_vision_checkpoint(tmp_path / "f32", dtype="f32"))
    vision = read_decoder(checkpoint.config).vision
    assert vision
    found = run_tower(CheckpointWeights(checkpoint, ignore), vision, tower_input())
    # float32 in another order, values up to 8: 8e-6 measured.
    np.testing.assert_allclose(select(found), np.load(GOLDEN)["features"], atol=5e-5)


def test_the_gate_asks_about_a_picture(built: Path) -> None:
    manifest = artifact.read_manifest(built)
    found = {one.name: one for one in manifest.quality.measures}
    assert manifest.quality.checked
    assert found["picture: mean KL"].limit == RECIPE.check.max_kl
    assert found["picture: top-1 agreement"].value == 1
    assert manifest.vision
    assert manifest.vision.crops == 2
    assert manifest.chat.bos_id == 1  # as the source's processor begins every text


@pytest.mark.parametrize("part", ["sub_GN", "img_projection.2.bias", "layers.1.mlp.fc2.bias"])
def test_the_gate_sees_a_tower_that_is_wrong(
    part: str, built: Path, folder: Path, tmp_path: Path
) -> None:
    """One tensor of the vision part negated in the artifact; the text alone would pass."""
    broken = Path(shutil.copytree(built, tmp_path / "broken"))
    negate(broken, part)
    checkpoint = Checkpoint.open(folder)
    session = OnnxSession(broken)
    chat = artifact.read_manifest(built).chat
    decoder = read_decoder(checkpoint.config)
    expect_blame_on_pictures(session, checkpoint, decoder, chat, LIMITS)


def negate(folder: Path, part: str) -> None:
    import onnx

    graph = onnx.load(str(folder / "vision.onnx"), load_external_data=False).graph
    tensor = next(one for one in graph.initializer if one.name.endswith(part))
    place = {entry.key: entry.value for entry in tensor.external_data}
    data = np.memmap(
        folder / place["location"], np.float32, "r+", int(place["offset"]), tuple(tensor.dims)
    )
    data *= -1
    data.flush()


@pytest.mark.parametrize("number", [1, 2])
def test_an_answer_about_pictures_is_the_sources(
    number: int, built: Path, folder: Path, tmp_path: Path
) -> None:
    """What `phiship run --image` answers: files, processor, ids and runtime together."""
    paths = [tmp_path / f"{place}.png" for place in range(number)]
    for seed, path in enumerate(paths):
        draw(640 - 300 * seed, 300 + 200 * seed, seed).save(path)
    found = generate(built, "What is shown?", 5, lambda _: None, images=paths)
    manifest = artifact.read_manifest(built)
    pixels = prepare_files(paths, read_manifest(built).vision, "sees")
    checkpoint = Checkpoint.open(folder)
    before, after = manifest.chat.turns["user"]
    marks = f"{PICTURE}\n" * number
    text = f"{before}{marks}What is shown?{after}{manifest.chat.generation}"
    ids = picture.encode_pictures(checkpoint, manifest.chat, text, pixels.counts)
    assert found["prompt_tokens"] == len(ids)
    assert ids.count(1) == 1 + number  # <s> in front of every part
    answer = continue_greedily(checkpoint, ids, pixels, 5)
    assert found["token_ids"] == answer


def continue_greedily(checkpoint: Checkpoint, ids: list[int], pixels: Any, count: int) -> list[int]:
    decoder, weights = read_decoder(checkpoint.config), CheckpointWeights(checkpoint, ignore)
    hidden, answer = picture.embed(weights, decoder, ids, pixels), list[int]()
    while len(answer) < count:
        states = states_of_embedded(weights, decoder, hidden[None])[0]
        answer.append(int(weights.project(decoder.head_name, states[-1:])[0].argmax()))
        row = weights.look_up(decoder.names.embedding, answer[-1:])
        hidden = np.concatenate([hidden, row])
    return answer


def test_text_alone_is_answered_too(built: Path) -> None:
    found = generate(built, "What?", 4, lambda _: None)
    assert found["new_tokens"] == 4
    assert found["prompt_tokens"] < 16


def test_counts_of_pictures_have_to_fit() -> None:
    with pytest.raises(ValueError, match="2 places for 3 rows"):
        place_features(np.zeros((4, 8), np.float32), [1, -1, -1, 2], np.zeros((3, 8), np.float32))


def test_a_format_that_cannot_see_refuses_at_planning(folder: Path) -> None:
    recipe = next(
        one
        for one in map(catalog.load_recipe, catalog.names("recipes"))
        if one.format == "gguf" and one.engine == "native"
    )
    said = r"gguf cannot hold this model \(phi3_v\), for its pictures \(.*\); .*onnx.* can"
    with pytest.raises(PlanError, match=said):
        make_plan(recipe, read_decoder(Checkpoint.open(folder).config))


def test_the_vendors_converter_is_not_asked(folder: Path) -> None:
    with pytest.raises(PlanError, match=r"got vendor; .* has pictures; allowed native"):
        make_plan(RECIPE.with_engine("vendor"), read_decoder(Checkpoint.open(folder).config))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def check(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.check(read_decoder(checkpoint.config))


def test_without_its_preprocessor_nothing_is_built(copied: Path) -> None:
    (copied / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: missing: a vision"):
        check(copied)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_crops", 0, "num_crops: got 0"),
        ("num_crops", 65, "num_crops: got 65; allowed 1 to 64"),
        ("image_mean", [0.5], "image_mean: got 1 values"),
        ("image_std", [0.5, 0.5, 0], "image_std: got"),
    ],
)
def test_a_preprocessor_that_cannot_be(key: str, value: Any, said: str, copied: Path) -> None:
    edit_json(copied / "preprocessor_config.json", lambda fields: fields.update({key: value}))
    with pytest.raises(CheckpointError, match=said):
        check(copied)


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("embd_layer", "hd_transform_order", "glb_sub", "allowed 'sub_glb'"),
        ("embd_layer", "use_hd_transform", False, "allowed True"),
        ("img_processor", "model_name", "google/siglip", "allowed 'openai/clip"),
        ("img_processor", "layer_idx", -9, "allowed -3 to -1"),
        ("img_processor", "num_attention_heads", 7, "a divisor of 64"),
        ("img_processor", "image_dim_out", 32, "class_embedding: found"),
        ("img_processor", "num_hidden_layers", 4, "layers.3"),
        ("img_processor", "num_hidden_layers", 2, "layers.2"),
    ],
)
def test_a_config_that_its_tensors_contradict(
    section: str, key: str, value: Any, said: str, copied: Path
) -> None:
    edit_json(copied / "config.json", lambda fields: fields[section].update({key: value}))
    with pytest.raises(CheckpointError, match=said):
        check(copied)


def test_a_config_without_its_tower(copied: Path) -> None:
    edit_json(copied / "config.json", lambda fields: fields.pop("img_processor"))
    with pytest.raises(CheckpointError, match="img_processor: got None; allowed a mapping"):
        check(copied)


def test_the_preprocessor_belongs_to_the_fingerprint(folder: Path, copied: Path) -> None:
    before = Checkpoint.open(folder).fingerprint()
    assert Checkpoint.open(copied).fingerprint() == before
    edit_json(copied / "preprocessor_config.json", lambda fields: fields.update({"num_crops": 4}))
    assert Checkpoint.open(copied).fingerprint() != before


def test_the_manifest_tells_the_runner(built: Path) -> None:
    vision = read_manifest(built).vision
    assert vision
    manifest = json.loads((built / "manifest.json").read_text("utf-8"))
    assert manifest["vision"]["mean"] == list(vision.mean)
    assert (vision.image_size, vision.side, vision.crops) == (336, 12, 2)
