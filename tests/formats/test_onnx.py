"""ONNX artifacts: equal to the vendor's bytes, read back within bounds, run in their runtime."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import VARIANTS, write_random_checkpoint, write_safetensors
from tests.formats.writing import write_artifact
from tests.golden.make_onnx import GOLDEN, digest_initializers
from toolkit.checkpoint import Checkpoint
from toolkit.errors import PlanError
from toolkit.families import read_decoder
from toolkit.formats import onnx
from toolkit.formats.onnx.recipe import OnnxQuantization, OnnxRecipe
from toolkit.quality.reference import forward

SCHEMES: dict[str, dict[str, Any]] = {
    "cpu-int4": {"precision": "int4", "embedding": "fp32"},
    "cpu-int4-asym": {"precision": "int4", "symmetric": False, "embedding": "fp32"},
    "cpu-int4-block128": {"precision": "int4", "block_size": 128, "embedding": "fp32"},
    "cpu-int4-small": {"precision": "int4", "block_size": 128, "embedding": "int4"},
    "cpu-int4-asym-8bit-ends": {"precision": "int4", "symmetric": False, "embedding": "int8",
                                "head": "int8"},
    "cpu-int4-float-head": {"precision": "int4", "embedding": "int8", "head": "fp32"},
    "cpu-fp32": {"precision": "fp32", "embedding": "fp32"},
    "cuda-int4": {"precision": "int4", "embedding": "fp16"},
    "cuda-fp16": {"precision": "fp16", "embedding": "fp16"},
}  # fmt: skip
# The builder has no such schemes, or quantizes these parts by other rules.
WITHOUT_GOLDEN = ("cpu-int4-small", "cpu-int4-asym-8bit-ends", "cpu-int4-float-head")
# Tables of cos and sin: the vendor computes them in float32, ours are correctly rounded.
OURS_ALONE = {"cos_table", "sin_table"}


def make_recipe(scheme: str, **changes: Any) -> OnnxRecipe:
    """A recipe of one scheme."""
    return OnnxRecipe(
        name=scheme, model="x", title="x", provider=scheme.partition("-")[0],  # type: ignore[arg-type]
        quantization=OnnxQuantization(**{**SCHEMES[scheme], **changes}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """One small random checkpoint of each variant."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {v: Checkpoint.open(write_random_checkpoint(folder / v, v)) for v in VARIANTS}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """Digests of what the vendor's builder writes."""
    digests: dict[str, Any] = json.loads(GOLDEN.read_text("utf-8"))["digests"]
    return digests


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s not in WITHOUT_GOLDEN])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_the_vendors_byte_for_byte(
    variant: str, scheme: str, checkpoints: dict[str, Checkpoint], golden: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    write_artifact(make_recipe(scheme), checkpoints[variant], tmp_path)
    ours = digest_initializers(tmp_path)
    vendor = golden[variant][scheme]
    compared = [name for name in ours if name in vendor]
    assert {name: ours[name] for name in compared} == {name: vendor[name] for name in compared}
    # What only we have must be the tables; a tied embedding the vendor shares with its head.
    is_tied = read_decoder(checkpoints[variant].config).is_tied
    assert set(ours) - set(vendor) <= OURS_ALONE | (
        {"model.embed_tokens.weight"} if is_tied else set()
    )
    assert len(compared) >= len(vendor) - 4


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_back_keeps_every_weight_within_its_step(
    variant: str, scheme: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    checkpoint = checkpoints[variant]
    decoder = read_decoder(checkpoint.config)
    recipe = make_recipe(scheme)
    write_artifact(recipe, checkpoint, tmp_path)
    names = []
    for name, weights in onnx.dequantize(tmp_path, decoder):
        names.append(name)
        source = checkpoint.read(name)
        is_head = len(names) > 1 and name == decoder.head_name
        bound = _bound(recipe, source, _bits(recipe, decoder, name, is_head))
        assert np.all(np.abs(weights - source) <= bound), name
    assert set(names) == set(decoder.shapes())


def _bits(recipe: OnnxRecipe, decoder: Any, name: str, is_head: bool) -> int:
    if name.endswith("norm.weight"):
        return 0
    if is_head:
        return recipe.head_bits
    return recipe.embedding_bits if name == decoder.names.embedding else recipe.linear_bits


def _bound(recipe: OnnxRecipe, source: Any, bits: int) -> Any:
    """Largest error of each weight: a quantization step, or float16's rounding."""
    half_rounding = np.abs(source) * 2.0**-11 + 2.0**-25 if recipe.io_dtype == "float16" else 0.0
    if not bits:
        return half_rounding
    size, levels = recipe.quantization.block_size, 1 << bits
    blocks = source.reshape(len(source), -1, size)
    if recipe.quantization.symmetric:
        # A weight opposite to the extreme is clipped one step short of it.
        step = np.abs(blocks).max(-1, keepdims=True) / (levels // 2)
    else:
        # The zero point is rounded too, so that the ends of the range are up to half a step off.
        low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
        step = (np.maximum(high, 0) - np.minimum(low, 0)) / (levels - 1)
    return np.broadcast_to(step * 1.001, blocks.shape).reshape(source.shape) + half_rounding


@pytest.mark.parametrize("scheme", WITHOUT_GOLDEN)
@pytest.mark.parametrize("variant", ["longrope_gqa", "partial_rotary_tied"])
def test_quantized_ends_run_as_they_read_back(
    variant: str, scheme: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """Logits in onnxruntime are those of the reference forward over the dequantized weights."""
    checkpoint = checkpoints[variant]
    decoder = read_decoder(checkpoint.config)
    (tmp_path / "a").mkdir()
    write_artifact(make_recipe(scheme, accuracy_level=1), checkpoint, tmp_path / "a")
    weights = list(onnx.dequantize(tmp_path / "a", decoder))
    # A tied head may have other bits than the embedding: the reference gets a head of its own.
    decoder = replace(decoder, is_tied=False)
    config = {**checkpoint.config.fields, "tie_word_embeddings": False}
    tensors = {name: array.astype(np.float32) for name, array in weights[:-1]}
    tensors[decoder.names.head] = weights[-1][1]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(tmp_path / "b" / "model.safetensors", tensors, "f32")
    ids = np.random.default_rng(5).integers(0, 1900, 70).tolist()
    expected = forward(Checkpoint.open(tmp_path / "b"), decoder, ids)
    found = onnx.open_session(tmp_path / "a").logits(ids)
    # accuracy_level 1 multiplies in float32: the sums differ by their order only
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)


def test_a_tied_head_shares_the_embeddings_bytes(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    decoder = read_decoder(checkpoints["partial_rotary_tied"].config)
    sizes = [
        onnx.lay_out(make_recipe("cpu-int4", embedding="int4", head=head), decoder, 64).size_bytes
        for head in ("int4", "int8")
    ]
    head_bytes = decoder.vocab * decoder.hidden  # 8 bits a weight, and the scales
    assert sizes[1] - sizes[0] >= head_bytes


def test_a_head_in_another_type_than_the_activations_is_refused(
    checkpoints: dict[str, Checkpoint],
) -> None:
    decoder = read_decoder(checkpoints["mha"].config)
    with pytest.raises(PlanError, match=r"quantization.head: got fp16; activations are float32"):
        onnx.check_shape(make_recipe("cpu-int4", head="fp16"), decoder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_artifact_has_the_sources_logits(
    variant: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """Across the LongRoPE switch (64 tokens) and the window (32) too."""
    checkpoint = checkpoints[variant]
    decoder = read_decoder(checkpoint.config)
    write_artifact(make_recipe("cpu-fp32"), checkpoint, tmp_path)
    session = onnx.open_session(tmp_path)
    for length in (1, 60, 64, 65, 120):
        ids = np.random.default_rng(length).integers(0, 1900, length).tolist()
        # float32 sums in another order: 1e-4 is what two runs of transformers differ by at most
        np.testing.assert_allclose(
            session.logits(ids), forward(checkpoint, decoder, ids), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("scheme", ["cpu-int4", "cpu-int4-asym", "cuda-int4", "cuda-fp16"])
def test_decoding_token_by_token_equals_one_prefill(
    scheme: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """The cache works: greedy tokens are the argmax of a fresh prefill of all before them."""
    write_artifact(make_recipe(scheme), checkpoints["window"], tmp_path)
    session = onnx.open_session(tmp_path)
    prompt = np.random.default_rng(3).integers(0, 1900, 40).tolist()
    tokens = session.generate(prompt, 12)
    logits = session.logits(prompt + tokens)
    # int8 activations round differently in a prefill of 52 tokens than in steps of one token
    for position, token in enumerate(tokens, start=len(prompt) - 1):
        assert logits[position][token] >= logits[position].max() - 0.15


def test_bf16_embedding_is_the_checkpoints_own_bytes(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    checkpoint = checkpoints["mha"]
    write_artifact(make_recipe("cpu-int4", embedding="bf16"), checkpoint, tmp_path)
    decoder = read_decoder(checkpoint.config)
    weights = dict(onnx.dequantize(tmp_path, decoder))["model.embed_tokens.weight"]
    np.testing.assert_array_equal(weights, checkpoint.read("model.embed_tokens.weight"))


def test_config_names_every_stop_id(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    checkpoint = checkpoints["mha"]
    write_artifact(make_recipe("cpu-int4"), checkpoint, tmp_path)
    config = json.loads((tmp_path / "genai_config.json").read_text("utf-8"))
    assert config["model"]["eos_token_id"] == list(checkpoint.stop_ids)
    session = onnx.open_session(tmp_path)
    assert all(session.stops(token) for token in checkpoint.stop_ids)


@pytest.fixture(autouse=True)
def _no_leftovers(tmp_path: Path) -> Iterator[None]:
    """Artifacts of a test go with it: the matrix of variants and schemes is large."""
    yield
    shutil.rmtree(tmp_path)
