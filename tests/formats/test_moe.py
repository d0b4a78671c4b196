"""A mixture of experts in each format that holds it: read back, and run in its own runtime."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from numpy.typing import NDArray

from tests.formats.writing import write_artifact
from tests.golden.cases import case_ids
from tests.golden.moe_cases import SEED
from tests.moe_checkpoints import moe_config, write_moe_checkpoint
from toolkit import formats
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.errors import CheckpointError, PlanError
from toolkit.families import read_decoder
from toolkit.formats import gguf, mlx
from toolkit.formats.gguf import layout as gguf_layout
from toolkit.formats.gguf.recipe import GgufQuantization, GgufRecipe
from toolkit.formats.mlx.recipe import MlxQuantization, MlxRecipe
from toolkit.formats.onnx.recipe import OnnxQuantization, OnnxRecipe
from toolkit.formats.openvino.layout import MAIN_FILE
from toolkit.formats.openvino.recipe import OpenvinoQuantization, OpenvinoRecipe
from toolkit.plan import make_plan
from toolkit.quality import reference
from toolkit.quality.measures import compare_logits
from toolkit.quality.weightonly import ArtifactWeights
from toolkit.recipe import Recipe

# Runtimes and the reference add in other orders, in float32: at most 3e-5 apart on logits that
# spread by 1.6. A wrong routing, bias or row moves them by 0.01 and more.
TOLERANCE = 2e-4
LENGTH = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_moe_checkpoint(tmp_path_factory.mktemp("moe"), seed=SEED))


def onnx_recipe(**changes: Any) -> OnnxRecipe:
    settings = {"precision": "int4", "block_size": 128, "accuracy_level": 0, **changes}
    return OnnxRecipe(name="x", model="x", title="x", quantization=OnnxQuantization(**settings))


def openvino_recipe(**changes: Any) -> OpenvinoRecipe:
    settings = {"precision": "int4", **changes}
    quantization = OpenvinoQuantization(**settings)
    return OpenvinoRecipe(name="x", model="x", title="x", quantization=quantization)


def mlx_recipe(**changes: Any) -> MlxRecipe:
    settings = {"bits": 4, "dtype": "fp32", **changes}
    return MlxRecipe(
        name="x", model="x", title="x", provider="cpu", rope_factors="short", context_length=64,
        quantization=MlxQuantization(**settings),
    )  # fmt: skip


def gguf_recipe(precision: Any = "q8_0", **changes: Any) -> GgufRecipe:
    quantization = GgufQuantization(precision=precision, **changes)
    return GgufRecipe(
        name="x", model="x", title="x", rope_factors="long", quantization=quantization
    )


RECIPES: dict[str, Recipe] = {
    "mlx-4bit": mlx_recipe(),
    "mlx-8bit": mlx_recipe(bits=8, group_size=128),
    "mlx-fp32": mlx_recipe(bits=16),
    "openvino-int4": openvino_recipe(),
    "openvino-int4-asym": openvino_recipe(symmetric=False, group_size=64),
    "openvino-int4-whole-rows": openvino_recipe(group_size=-1),
    "openvino-int8": openvino_recipe(precision="int8"),
    "openvino-f16": openvino_recipe(precision="f16"),
    "onnx-int4": onnx_recipe(),
    "onnx-int4-float-head": onnx_recipe(head="fp32", block_size=64),
}


def run_weights(folder: Path, recipe: Recipe, decoder: Decoder, ids: list[int]) -> NDArray[Any]:
    """The reference's logits with the artifact's own weights."""
    read = partial(formats.get(recipe.format).dequantize, folder, decoder)
    weights = ArtifactWeights(read, decoder)
    states = reference.final_states(weights, decoder, ids)
    return reference.project(weights, decoder, decoder.head_name, states)


@pytest.mark.parametrize("name", RECIPES)
def test_its_runtime_does_what_the_reference_does(
    checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    recipe, decoder = RECIPES[name], read_decoder(checkpoint.config)
    write_artifact(recipe, checkpoint, tmp_path, workers=2)
    ids = case_ids(checkpoint.folder, LENGTH)
    expected = run_weights(tmp_path, recipe, decoder, ids)
    logits = formats.get(recipe.format).open_session(tmp_path).logits(ids)
    assert np.abs(logits - expected).max() < TOLERANCE
    source = reference.forward(checkpoint, decoder, ids)
    # What 4 bits cost this random model: 0.09 to 0.21; of a wrong routing it is 1 and more.
    found = compare_logits(source, logits, ids, None)
    assert found.kl.mean() < 0.3


@pytest.mark.parametrize("name", ["openvino-int4", "openvino-int4-asym", "openvino-int8"])
def test_openvino_reads_only_the_picked_experts(
    checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    """Its plugin recognises the pattern: three products a layer that gather what is picked."""
    write_artifact(RECIPES[name], checkpoint, tmp_path)
    model = openvino.Core().compile_model(tmp_path / MAIN_FILE, "CPU")
    kinds = [node.get_rt_info()["layerType"] for node in model.get_runtime_model().get_ops()]
    layers = read_decoder(checkpoint.config).layers
    assert sum(kind.astype(str) == "GatherMatmul" for kind in kinds) == 3 * layers


@pytest.mark.parametrize("name", ["onnx-int4", "openvino-int4"])
def test_beyond_the_switch_and_token_by_token(
    checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    recipe, decoder = RECIPES[name], read_decoder(checkpoint.config)
    write_artifact(recipe, checkpoint, tmp_path)
    ids = case_ids(checkpoint.folder, 100)
    session = formats.get(recipe.format).open_session(tmp_path)
    expected = run_weights(tmp_path, recipe, decoder, ids)
    assert np.abs(session.logits(ids) - expected).max() < TOLERANCE
    answer = session.generate(ids[:10], 12)
    logits = run_weights(tmp_path, recipe, decoder, [*ids[:10], *answer])
    assert answer == logits[9 : 9 + len(answer)].argmax(axis=1).tolist()


@pytest.fixture(scope="module")
def one_scale(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """As published: LongRoPE's scale is the same for short and long texts; rows of 256."""
    rope = moe_config()["rope_scaling"]
    folder = write_moe_checkpoint(
        tmp_path_factory.mktemp("one-scale"), seed=SEED, intermediate_size=512,
        original_max_position_embeddings=256, max_position_embeddings=1024,
        rope_scaling={**rope, "long_mscale": rope["short_mscale"]},
    )  # fmt: skip
    return Checkpoint.open(folder)


def measure_gguf(checkpoint: Checkpoint, folder: Path, precision: str) -> float:
    """Mean KL of the source and llama.cpp."""
    recipe, decoder = gguf_recipe(precision), read_decoder(checkpoint.config)
    write_artifact(recipe, checkpoint, folder)
    ids = case_ids(checkpoint.folder, 60)
    source = reference.forward(checkpoint, decoder, ids)
    logits = formats.get("gguf").open_session(folder).logits(ids)
    return float(compare_logits(source, logits, ids, None).kl.mean())


def test_gguf_is_folded_to_come_near(
    one_scale: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.004 on this model, where llama.cpp's own rule gives 0.5."""
    for name in ("folded", "as it is"):
        (tmp_path / name).mkdir()
    assert measure_gguf(one_scale, tmp_path / "folded", "f16") < 0.02
    monkeypatch.setattr(gguf_layout, "list_folds", lambda _: {})
    assert measure_gguf(one_scale, tmp_path / "as it is", "f16") > 0.3


def test_gguf_reads_back_what_the_source_computes(one_scale: Checkpoint, tmp_path: Path) -> None:
    """Folding takes means away that a layer norm takes away anyway; scales are undone."""
    recipe, decoder = gguf_recipe("f16"), read_decoder(one_scale.config)
    write_artifact(recipe, one_scale, tmp_path, workers=2)
    ids = case_ids(one_scale.folder, 60)
    source = reference.forward(one_scale, decoder, ids)
    assert np.abs(run_weights(tmp_path, recipe, decoder, ids) - source).max() < 0.02


def test_experts_may_have_eight_bits(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """QMoE multiplies 8-bit weights with 8-bit activations only, which costs 1 % of the logits."""
    decoder = read_decoder(checkpoint.config)
    recipe = onnx_recipe(overrides={"*.experts.*": "int8"})
    write_artifact(recipe, checkpoint, tmp_path)
    ids = case_ids(checkpoint.folder, LENGTH)
    expected = run_weights(tmp_path, recipe, decoder, ids)
    logits = formats.get("onnx").open_session(tmp_path).logits(ids)
    assert compare_logits(expected, logits, ids, None).kl.mean() < 0.01


def test_read_back_is_near_the_source(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Every tensor once, with its own shape; codes of 4 bits are 10 % off."""
    decoder = read_decoder(checkpoint.config)
    for name, recipe in RECIPES.items():
        (folder := tmp_path / name).mkdir()
        write_artifact(recipe, checkpoint, folder)
        found = dict(formats.get(recipe.format).dequantize(folder, decoder))
        assert found.keys() == decoder.shapes().keys()
        for tensor, weights in found.items():
            own = checkpoint.read(tensor)
            assert weights.shape == own.shape
            assert np.linalg.norm(weights - own) < 0.12 * np.linalg.norm(own), tensor


REFUSED: dict[str, tuple[Recipe, str]] = {
    "precision": (onnx_recipe(precision="fp32"), "got fp32; onnxruntime's operator for experts"),
    "symmetric": (onnx_recipe(symmetric=False), "experts are stored without zero points"),
    "one of many": (onnx_recipe(overrides={"*.0.*.experts.3.w1": "int8"}), "the same type for all"),
    "keys alone": (openvino_recipe(overrides={"*.experts.3.w1": "int8"}), "the same type for all"),
    "two scales": (gguf_recipe(), "one scale for LongRoPE; this model has short_mscale 1.243"),
    "a mix": (gguf_recipe("q4_k_m"), "a mix for Phi-3's own layers; allowed with experts q4_0"),
    "sensitive": (mlx_recipe(sensitive_bits=6), "this model .phimoe. has experts; allowed none"),
    "gptq": (onnx_recipe(method="gptq"), "a text shows each expert too few tokens"),
    "equalize": (openvino_recipe(equalize=True), "knows Phi-3's own layers only"),
    "router": (onnx_recipe(overrides={"*.gate": "int8"}), "matches no module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(checkpoint: Checkpoint, case: str) -> None:
    recipe, reason = REFUSED[case]
    with pytest.raises(PlanError, match=reason):
        make_plan(recipe, read_decoder(checkpoint.config))


@pytest.mark.parametrize("module", [gguf, mlx])
def test_a_format_that_cannot_hold_it_names_those_that_can(
    checkpoint: Checkpoint, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HOLDS", frozenset())
    recipe = gguf_recipe() if module is gguf else mlx_recipe()
    with pytest.raises(PlanError, match=r"split projections and experts; .*openvino can"):
        make_plan(recipe, read_decoder(checkpoint.config))


@pytest.mark.parametrize(
    ("changes", "dropped", "reason"),
    [
        ({"num_experts_per_tok": 3}, "", r"num_experts_per_tok: got 3; allowed 2"),
        ({"num_local_experts": 1}, "", "num_local_experts: got 1; allowed 2 or more"),
        ({"router_jitter_noise": "a"}, "", "router_jitter_noise: got 'a'; allowed a number above"),
        ({"num_local_experts": 9}, "", r"gate.weight: found \[8, 256\]; expected \[9, 256\]"),
        ({}, "experts.5.w3.weight", r"experts.5.w3.weight \[384, 256\] is missing"),
        ({}, "k_proj.bias", r"k_proj.bias \[128\] is missing"),
        ({"attention_bias": False}, "", "k_proj.bias is not part of PhiMoEForCausalLM"),
        ({"intermediate_size": 448}, "", r"w1.weight: found \[384, 256\]; expected \[448, 256\]"),
    ],
)
def test_a_checkpoint_that_contradicts_its_config(
    checkpoint: Checkpoint, changes: dict[str, Any], dropped: str, reason: str
) -> None:
    fields = {**checkpoint.config.fields, **changes}
    tensors = {n: one for n, one in checkpoint.tensors.items() if not dropped or dropped not in n}
    bad = replace(checkpoint, config=replace(checkpoint.config, fields=fields), tensors=tensors)
    with pytest.raises(CheckpointError, match=reason):
        bad.check(read_decoder(bad.config))
