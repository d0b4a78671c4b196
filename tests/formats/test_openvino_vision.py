"""OpenVINO artifacts that see: features, logits and answers are the source's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.formats.seeing import Source, ask
from tests.formats.writing import write_artifact
from tests.vision_checkpoints import draw, write_vision_checkpoint
from toolkit.checkpoint import Checkpoint
from toolkit.errors import PlanError
from toolkit.formats import openvino as format_
from toolkit.formats.openvino.recipe import OpenvinoQuantization, OpenvinoRecipe
from toolkit.formats.openvino.session import EXACT, SeeingSession
from toolkit.formats.openvino.tokenizer import write_tokenizer
from toolkit.plan import make_plan
from toolkit.quality.vision import run_tower
from toolkit.runner.engines import openvino_genai as engine
from toolkit.runner.images import Pixels, prepare
from toolkit.runner.manifest import Vision
from toolkit.runner.settings import Settings
from toolkit.runner.sight import LANGUAGE, PROJECTOR, Sight

LYING, STANDING = draw(640, 300, 1), draw(300, 500, 2)


def make_recipe(*, provider: Any = "cpu", **changes: Any) -> OpenvinoRecipe:
    settings = {"precision": "f16", "embedding": "f16", "head": "f16", "vision": "f16", **changes}
    return OpenvinoRecipe(
        name="sees", model="x", title="x", context_length=4096, provider=provider,
        quantization=OpenvinoQuantization(**settings),
    )  # fmt: skip


def test_rotary_settings_that_transformers_cannot_read_do_not_matter(tmp_path: Path) -> None:
    """transformers is asked for the tokenizer alone; `longrope` of an unknown type stops it."""
    folder = write_vision_checkpoint(tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["rope_scaling"]["type"] = "longrope"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(Checkpoint.open(folder), out)
    assert {path.name for path in out.iterdir()} == {
        f"openvino_{part}tokenizer.{ending}" for part in ("", "de") for ending in ("xml", "bin")
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(tmp_path_factory.mktemp("vision") / "checkpoint")


@pytest.fixture(scope="module")
def written(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / "f16"
    folder.mkdir()
    write_artifact(make_recipe(), source.checkpoint, folder, workers=2)
    return folder


def open_sight(folder: Path) -> Sight:
    import openvino

    return Sight(openvino, folder, "CPU", EXACT)


def test_features_and_embeddings_are_the_sources(source: Source, written: Path) -> None:
    pixels = prepare([LYING, STANDING], source.vision)
    sight = open_sight(written)
    # Values up to 10 in float32, summed in another order: 9.5e-6 measured.
    np.testing.assert_allclose(sight.look(pixels), source.features(pixels), atol=1e-4)
    ids = [1, 300, 1999]
    expected = source.weights.look_up(source.decoder.names.embedding, ids)
    assert np.abs(sight.embed(ids) - expected).max() < 1e-6


def test_logits_are_the_sources(source: Source, written: Path) -> None:
    pixels = prepare([LYING, STANDING], replace(source.vision, crops=2))
    ids = ask(pixels)
    session = format_.open_session(written)
    assert isinstance(session, SeeingSession)
    found = session.picture_logits(ids, pixels)
    session.close()
    # Values up to 8 in float32: 1.3e-5 measured.
    np.testing.assert_allclose(found, source.logits(ids, pixels), atol=1e-4)


def test_the_projector_puts_right_what_the_pipeline_exchanges(
    source: Source, written: Path
) -> None:
    """VLMPipeline lays out a picture of r x c crops as if it had c rows of r."""
    import openvino

    vision = source.decoder.vision
    assert vision
    pixels = prepare([LYING], source.vision)
    (height, width), side = pixels.sizes[0] // 336, vision.side
    assert height != width
    patches = run_tower(source.weights, vision, pixels.values[0])
    blocks = patches.reshape(-1, side, 2, side, 2, vision.width).transpose(0, 1, 3, 2, 4, 5)
    blocks = blocks.reshape(-1, side, side, vision.merged_width)
    row = source.checkpoint.read(vision.names.row_separator).reshape(1, 1, -1)

    def lay_out(crops: Any, rows: int, columns: int) -> Any:
        grid = crops.reshape(rows, columns, side, side, -1).transpose(0, 2, 1, 3, 4)
        lines = grid.reshape(rows * side, columns * side, -1)
        ends = np.broadcast_to(row, (len(lines), 1, row.shape[-1]))
        return np.concatenate([lines, ends], axis=1).reshape(-1, row.shape[-1])

    end = source.checkpoint.read(vision.names.image_separator).reshape(1, -1)
    wrong = np.concatenate([lay_out(blocks[1:], width, height), end, lay_out(blocks[:1], 1, 1)])
    model = openvino.Core().compile_model(written / f"{PROJECTOR}.xml", "CPU", EXACT)
    found = model({"input": wrong[None]})["last_hidden_state"][0]
    np.testing.assert_allclose(found, source.features(pixels), atol=1e-4)


def test_an_answer_is_the_sources(source: Source, written: Path) -> None:
    pixels = prepare([LYING], replace(source.vision, crops=1))
    ids = [1, 300, *[-1] * pixels.counts[0], 1, 310]
    model = engine.load(written, f"{LANGUAGE}.xml", "cpu", Settings(4096))
    assert isinstance(model, engine.SeeingModel)
    found = [token for token, _ in model.generate(ids, 3, pixels=pixels)]
    model.close()
    assert found == source.answer(ids, pixels, len(found))


def test_an_answer_across_longropes_switch_is_the_sources(source: Source, tmp_path: Path) -> None:
    """Keys of the first 64 tokens are of short factors until all is computed anew."""
    rope = replace(source.decoder.rope, original_context=64)
    decoder = replace(source.decoder, rope=rope)
    write_artifact(make_recipe(), source.checkpoint, tmp_path, decoder=decoder)
    ids = np.random.default_rng(1).integers(3, 2000, 63).tolist()
    sight, seen = open_sight(tmp_path), []

    def choose(logits: Any) -> int:
        seen.append(logits)
        return int(logits.argmax())

    tokens = sight.write(ids, None, 64, choose)
    found = [next(tokens) for _ in range(3)]
    tokens.close()
    sight.forget()
    fresh = sight.extend(sight.embed(ids + found[:2]), 0)[-1]
    # The same network on the same rows; without computing anew 0.1 and more apart.
    np.testing.assert_allclose(seen[-1], fresh, atol=1e-4)


def test_openvino_genais_own_pipeline_answers_alike(tmp_path: Path) -> None:
    """A picture that is not square: where height and width stay exchanged, the answer is another.

    Its global crop is filtered otherwise, which this prompt's first tokens do not depend on.
    """
    import openvino
    import openvino_genai as genai

    # The pipeline takes separators of 4,096 columns only, which are four times CLIP-L's width.
    source = write_vision_checkpoint(tmp_path / "wide", crops=4, width=1024)
    checkpoint = Checkpoint.open(source)
    folder = tmp_path / "artifact"
    folder.mkdir()
    write_artifact(make_recipe(), checkpoint, folder)
    shown, how = draw(660, 300, 1), checkpoint.preprocessing
    pixels = prepare([shown], Vision(336, 12, 4, how.mean, how.std))
    session = format_.open_session(folder)
    tail = session.encode("where")
    sight = open_sight(folder)

    def answer(seen: Pixels) -> list[int]:
        ids = [1, *[-1] * len(sight.look(seen)), 1, *tail]
        tokens = sight.write(ids, seen, None, lambda logits: int(logits.argmax()))
        return [next(tokens) for _ in range(4)]

    expected = answer(pixels)
    assert expected != answer(replace(pixels, sizes=pixels.sizes[:, ::-1].copy()))
    pipeline = genai.VLMPipeline(str(folder), "CPU", ATTENTION_BACKEND="SDPA", **EXACT)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos = 4, False, True
    config.apply_chat_template = False
    image = openvino.Tensor(np.asarray(shown)[None])
    found = pipeline.generate("<|image_1|>where", images=[image], generation_config=config)
    assert found.texts[0] == genai.Tokenizer(str(folder)).decode(expected)


def test_an_int8_tower_sees_almost_the_same(source: Source, tmp_path: Path) -> None:
    pixels = prepare([LYING], replace(source.vision, crops=2))
    write_artifact(make_recipe(vision=None), source.checkpoint, tmp_path)
    found, expected = open_sight(tmp_path).look(pixels), source.features(pixels)
    # 1.5e-2 measured, one range a row.
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 0.03


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision": "int4"}, "4 bits move a picture's features"),
        ({"provider": "gpu"}, "was run on CPUs only"),
    ],
)
def test_what_cannot_be_is_refused_at_planning(
    changes: dict[str, Any], said: str, source: Source
) -> None:
    with pytest.raises(PlanError, match=said):
        make_plan(make_recipe(**changes), source.decoder)


def test_a_model_that_reads_text_only_has_no_kind_of_tower(source: Source) -> None:
    with pytest.raises(PlanError, match="reads no pictures: leave it out"):
        make_plan(make_recipe(), replace(source.decoder, vision=None))


def test_every_file_is_as_long_as_planned_and_every_tensor_stored(
    source: Source, written: Path
) -> None:
    plan = make_plan(make_recipe(), source.decoder)
    assert source.decoder.vision
    for name, _, size_bytes in plan.data.spans:
        assert (written / name).stat().st_size == size_bytes
    stored = {piece.tensor for piece in plan.data.pieces}
    unused = set(source.decoder.vision.shapes()) - set(source.decoder.vision.list_used())
    separator = source.decoder.vision.names.image_separator  # in config.json
    assert stored | unused | {separator} == set(source.checkpoint.tensors)


def test_weights_are_read_back(source: Source, written: Path) -> None:
    found = dict(format_.dequantize(written, source.decoder))
    assert set(source.decoder.shapes()) == set(found)
    for name, values in found.items():
        # The least float16 above 0 is 6e-8.
        np.testing.assert_allclose(values, source.checkpoint.read(name), atol=6e-8)
