"""Adapters apart: an ONNX model with the base's own weights, and a file that makes it another."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import onnxruntime
import onnxruntime_genai
import pytest
from numpy.typing import NDArray

from tests import peft_adapters
from tests.adapters import make_adapter, write_adapter, write_case
from tests.checkpoints import write_random_checkpoint, write_safetensors
from tests.golden.cases import LORA_GOLDEN as GOLDEN
from tests.golden.cases import LORA_LENGTH as LENGTH
from tests.golden.cases import LORA_VARIANT as VARIANT
from tests.golden.cases import SEED, case_ids, select
from tests.moe_checkpoints import write_moe_checkpoint
from tests.quality.artifacts import FORMATS, make_recipe
from tests.small_checkpoints import write_small_checkpoint
from tests.vision_checkpoints import write_vision_checkpoint
from toolkit import formats
from toolkit.build import build
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint import merged as merging
from toolkit.checkpoint.merged import MergedCheckpoint
from toolkit.console import Console
from toolkit.errors import BuildError, CheckpointError, PlanError
from toolkit.families import read_decoder
from toolkit.formats.onnx import apart
from toolkit.formats.onnx.recipe import OnnxRecipe
from toolkit.job import Options
from toolkit.plan import make_plan
from toolkit.quality import reference
from toolkit.recipe import Recipe
from toolkit.report import Report
from toolkit.runner.engines.onnxruntime_genai import SWITCHES, load
from toolkit.runner.failure import Failure
from toolkit.runner.settings import Settings

# Two float32 forward passes that add in other orders (tests/quality/test_reference.py).
TOLERANCE = 1e-4
FLOAT = {"precision": "fp32", "embedding": "fp32"}
EXACT_INT4 = {"precision": "int4", "accuracy_level": 1}  # activations stay float32
ONNX = formats.get("onnx")
ACTIVE = {"adapter": apart.FILE}


def make(**changes: Any) -> Recipe:
    """A recipe for ONNX whose adapter stays apart."""
    return make_recipe("onnx", **changes).with_adapter_apart()


def write(recipe: Recipe, checkpoint: Checkpoint, out: Path) -> Path:
    """Build without the gate."""
    options, console = Options(check=False, workers=2), Console(as_json=True)
    return build(recipe, checkpoint, out, options, console, Report("x"))


def read_logits(folder: Path, ids: list[int], **properties: str) -> NDArray[np.float32]:
    """The artifact's logits, with properties of its runtime as its manifest has them."""
    session = ONNX.open_session(folder, **properties)
    try:
        return session.logits(ids)
    finally:
        session.close()


def digest(path: Path) -> str:
    """Hex sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def merge(base: Checkpoint, folder: Path, *ends: str) -> MergedCheckpoint:
    """The checkpoint with an adapter of the matrices whose names end so."""
    shapes = {name: info.shape for name, info in base.tensors.items()}
    merged = merging.merge(base, write_adapter(folder, make_adapter(shapes, modules=ends)))
    found = {end for end in ends for name in merged.adapter.changes if f"{end}.weight" in name}
    assert found == {*ends}  # none is left out
    return merged


class Case:
    """A checkpoint, an adapter whose ranks differ, and artifacts of both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = Checkpoint.open(write_random_checkpoint(folder / "source", VARIANT, seed=SEED))
        self.shapes = {name: info.shape for name, info in self.base.tensors.items()}
        adapter = write_case(folder / "patterns", "patterns", self.shapes)
        self.merged = merging.merge(self.base, adapter)
        self.decoder = read_decoder(self.base.config)
        self.ids = case_ids(self.base.folder, LENGTH)
        self.plain = {
            kind: write(make_recipe("onnx", **fields), self.base, folder / f"plain-{kind}")
            for kind, fields in (("fp32", FLOAT), ("int4", EXACT_INT4))
        }
        self.apart = {
            kind: write(make(**fields), self.merged, folder / f"apart-{kind}")
            for kind, fields in (("fp32", FLOAT), ("int4", EXACT_INT4))
        }


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Artifacts with and without the adapter."""
    return Case(tmp_path_factory.mktemp("apart"))


def test_with_the_adapter_it_is_the_merged_checkpoint(case: Case) -> None:
    """Merged by PEFT, as transformers runs it; and by this project."""
    found = read_logits(case.apart["fp32"], case.ids, **ACTIVE)
    assert np.abs(select(found) - np.load(GOLDEN)["patterns"]).max() < TOLERANCE
    expected = reference.forward(case.merged, case.decoder, case.ids)
    assert np.abs(found - expected).max() < TOLERANCE
    assert np.abs(read_logits(case.plain["fp32"], case.ids) - expected).max() > 0.1


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_without_the_adapter_it_is_the_base(kind: str, case: Case) -> None:
    found = read_logits(case.apart[kind], case.ids)
    assert np.array_equal(found, read_logits(case.plain[kind], case.ids))


def test_updates_of_split_modules_are_one_branch(case: Case, tmp_path: Path) -> None:
    """q, k and v are rows of one matrix: their ranks together, B in blocks."""
    shapes = {
        f"model.layers.{layer}.{module}.weight": shape
        for layer in range(2)
        for module, shape in (
            ("self_attn.q_proj", (256, 256)),
            ("self_attn.v_proj", (128, 256)),
            ("mlp.up_proj", (512, 256)),
        )
    }
    arrays = make_adapter(shapes, modules=("q_proj", "v_proj", "up_proj"))
    merged = merging.merge(case.base, write_adapter(tmp_path / "adapter", arrays))
    found = read_logits(write(make(**FLOAT), merged, tmp_path / "out"), case.ids, **ACTIVE)
    expected = reference.forward(merged, case.decoder, case.ids)
    assert np.abs(found - expected).max() < TOLERANCE
    plan = make_plan(make(**FLOAT), case.decoder, adapter=merged.adapter)
    assert plan.adapter_bytes >= (tmp_path / "out" / "x" / "adapter.onnx_adapter").stat().st_size


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("dora", "has DoRA's magnitudes for it"),
        ("saved", "has a saved module for it"),
        ("embedding", "has LoRA of the embedding for it"),
        ("tokens", "has trained tokens for it"),
        ("tied_head", "a model that has one tensor for both"),
    ],
)
def test_what_no_branch_holds_is_refused(kind: str, says: str, tmp_path: Path) -> None:
    base = Checkpoint.open(peft_adapters.write_base(tmp_path / "base", kind))
    merged = merging.merge(base, peft_adapters.write_case(tmp_path / "adapter", kind))
    with pytest.raises(PlanError, match=says):
        make_plan(make(**FLOAT), read_decoder(merged.config), adapter=merged.adapter)


def test_int4_is_the_bases_codes_and_the_adapter(case: Case, tmp_path: Path) -> None:
    """Its logits are those of a checkpoint of what the base's artifact holds, plus B A."""
    weights = dict(ONNX.dequantize(case.plain["int4"], case.decoder))
    for name, a, b in case.merged.adapter.read_pairs():
        weights[name] = weights[name] + b @ a
    write_random_checkpoint(tmp_path, VARIANT)
    write_safetensors(tmp_path / "model.safetensors", weights, "f32")
    expected = reference.forward(Checkpoint.open(tmp_path), case.decoder, case.ids)
    assert np.abs(read_logits(case.apart["int4"], case.ids, **ACTIVE) - expected).max() < TOLERANCE


def test_the_reader_adds_the_adapter(case: Case) -> None:
    base = dict(ONNX.dequantize(case.plain["int4"], case.decoder))
    found = dict(ONNX.dequantize(case.apart["int4"], case.decoder))
    pairs = {name: b @ a for name, a, b in case.merged.adapter.read_pairs()}
    assert len(pairs) == 8
    for name, weights in found.items():
        expected = base[name] + pairs[name] if name in pairs else base[name]
        # Sums of up to eight float32 products in another order.
        np.testing.assert_allclose(weights, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_all_but_the_graph_and_the_adapter_are_the_bases_files(kind: str, case: Case) -> None:
    folder, plain = case.apart[kind], case.plain[kind]
    names = {path.name for path in folder.iterdir()}
    assert names - {path.name for path in plain.iterdir()} == {apart.FILE}
    same = {name for name in names if (plain / name).is_file()}
    same = {name for name in same if digest(folder / name) == digest(plain / name)}
    assert names - same == {apart.FILE, "model.onnx", "manifest.json"}
    assert "model.onnx.data" in same


def test_adapters_of_the_same_modules_share_the_graph(case: Case, tmp_path: Path) -> None:
    """Whatever their ranks, scales and values."""
    arrays = make_adapter(case.shapes, {"qkv_proj": 16, "down_proj": 1}, seed=7)
    ranks = {"rank_pattern": {"qkv_proj": 16, "down_proj": 1}}
    merged = merging.merge(case.base, write_adapter(tmp_path / "other", arrays, **ranks))
    other = write(make(**FLOAT), merged, tmp_path)
    assert digest(other / "model.onnx") == digest(case.apart["fp32"] / "model.onnx")
    # So the first one's model takes the other's file.
    found = read_logits(case.apart["fp32"], case.ids, adapter=str(other / apart.FILE))
    expected = reference.forward(merged, case.decoder, case.ids)
    assert np.abs(found - expected).max() < TOLERANCE


def test_the_file_holds_what_onnxruntime_reads(case: Case) -> None:
    file = onnxruntime.AdapterFormat.read_adapter(str(case.apart["fp32"] / apart.FILE))
    values = {name: value.numpy() for name, value in file.get_parameters().items()}
    assert len(values) == 16
    for name, a, b in case.merged.adapter.read_pairs():
        module = name.removesuffix(".weight")
        assert np.array_equal(values[f"{module}.lora_A.weight"], a.T)
        assert np.array_equal(values[f"{module}.lora_B.weight"], b.T)
    assert {len(v.T) for n, v in values.items() if "lora_A" in n} == {2, 4, 8}


def test_answers_are_those_of_a_program_by_hand(case: Case) -> None:
    """As docs/lora.md shows it, without anything of ours."""
    folder, new_tokens = case.apart["int4"], 12
    model = onnxruntime_genai.Model(str(folder))
    adapters = onnxruntime_genai.Adapters(model)
    adapters.load(str(folder / apart.FILE), "mine")
    answers = {}
    for is_active in (True, False):
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=LENGTH + new_tokens, do_sample=False)
        generator = onnxruntime_genai.Generator(model, params)
        if is_active:
            generator.set_active_adapter(adapters, "mine")
        generator.append_tokens(case.ids)
        for _ in range(new_tokens):
            generator.generate_next_token()
        answers[is_active] = generator.get_sequence(0)[LENGTH:].tolist()
    runner = load(folder, "model.onnx", "cpu", Settings(64), adapter=apart.FILE)
    for _ in range(2):  # the second time by the generator that was kept
        assert [token for token, _ in runner.generate(case.ids, new_tokens)] == answers[True]
    assert runner.reused_tokens
    runner.close()
    assert answers[True] != answers[False]
    assert ONNX.open_session(folder).generate(case.ids, new_tokens) == answers[False]


def test_it_stays_active_where_the_engine_computes_anew(tmp_path: Path) -> None:
    """Beyond LongRoPE's switch, in the middle of an answer: as with the adapter merged."""
    source = write_random_checkpoint(tmp_path / "source", "longrope_gqa")
    switch = SWITCHES["phi3"]
    longer = {"original_max_position_embeddings": switch, "max_position_embeddings": 2 * switch}
    config = json.loads((source / "config.json").read_text("utf-8"))
    (source / "config.json").write_text(json.dumps({**config, **longer}), encoding="utf-8")
    merged = merge(Checkpoint.open(source), tmp_path / "adapter", "qkv_proj", "gate_up_proj")
    answers = []
    for name, recipe in (("apart", make(**FLOAT)), ("merged", make_recipe("onnx", **FLOAT))):
        folder = write(recipe, merged, tmp_path / name)
        properties = ACTIVE if recipe.adapter_apart else {}
        runner = load(folder, "model.onnx", "cpu", Settings(2 * switch), **properties)
        prompt = case_ids(source, switch - 4)
        answers.append([token for token, _ in runner.generate(prompt, 12)])
        runner.close()
    assert len(answers[0]) == 12
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("variant", "length", "ends"),
    [
        ("phi4_mini", 100, ("qkv_proj", "gate_up_proj")),  # beyond LongRoPE's switch, tied
        ("mha", LENGTH, ("down_proj", "lm_head")),
        ("window", 60, ("o_proj",)),
    ],
)
def test_other_shapes_and_modules(
    variant: str, length: int, ends: tuple[str, ...], tmp_path: Path
) -> None:
    base = Checkpoint.open(write_random_checkpoint(tmp_path / "source", variant))
    merged = merge(base, tmp_path / "adapter", *ends)
    ids, decoder = case_ids(base.folder, length), read_decoder(base.config)
    folder = write(make(**FLOAT), merged, tmp_path)
    expected = reference.forward(merged, decoder, ids)
    assert np.abs(read_logits(folder, ids, **ACTIVE) - expected).max() < TOLERANCE
    assert np.abs(reference.forward(base, decoder, ids) - expected).max() > 0.1


@pytest.mark.parametrize(
    ("write_source", "changes", "ends"),
    [
        (write_moe_checkpoint, EXACT_INT4, ("o_proj", "lm_head")),
        (write_small_checkpoint, FLOAT, ("self_attn.dense", "down_proj")),
    ],
)
def test_matrices_of_other_families_that_are_one_operand(
    write_source: Callable[[Path], Path], changes: Mapping[str, Any], ends: tuple[str, ...],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Beside biases, experts and sparse attention; against the base's artifact read back."""
    base = Checkpoint.open(write_source(tmp_path / "source"))
    merged = merge(base, tmp_path / "adapter", *ends)
    ids, decoder = case_ids(base.folder, LENGTH), read_decoder(base.config)
    folder = write(make(**changes), merged, tmp_path)
    weights = dict(ONNX.dequantize(folder, decoder))
    read_back = Path(shutil.copytree(base.folder, tmp_path / "read-back"))
    for path in read_back.glob("*.safetensors*"):
        path.unlink()
    write_safetensors(read_back / "model.safetensors", weights, "f32")
    expected = reference.forward(Checkpoint.open(read_back), decoder, ids)
    found = read_logits(folder, ids, **ACTIVE)
    # Phi-3-small's tokens that are none have logits of -65504: one step of float32.
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=2**-23)
    assert np.abs(read_logits(folder, ids) - expected).max() > 0.01


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_half_precision(provider: str, case: Case, tmp_path: Path) -> None:
    recipe = msgspec.structs.replace(make(precision="fp16"), provider=provider)
    notes = make_plan(recipe, case.decoder, adapter=case.merged.adapter).needs.notes
    assert any("never run on CUDA" in note for note in notes) == (provider == "cuda")
    folder = write(recipe, case.merged, tmp_path)
    values = onnxruntime.AdapterFormat.read_adapter(str(folder / apart.FILE)).get_parameters()
    assert {value.data_type() for value in values.values()} == {"tensor(float16)"}
    expected = reference.forward(case.merged, case.decoder, case.ids)
    # Logits up to 8 whose layers round to 11 bits.
    assert np.abs(read_logits(folder, case.ids, **ACTIVE) - expected).max() < 0.1


def test_values_beyond_float16_are_refused(case: Case, tmp_path: Path) -> None:
    arrays = make_adapter(case.shapes)
    name = next(name for name in arrays if "lora_B" in name)
    arrays[name] = arrays[name] + np.float32(70_000)
    merged = merging.merge(case.base, write_adapter(tmp_path / "large", arrays))
    with pytest.raises(
        CheckpointError, match=r"lora_B\.weight: a weight is not finite \(NaN, Inf or"
    ):
        write(make(precision="fp16"), merged, tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_a_sentence(case: Case) -> None:
    with pytest.raises(BuildError, match="/dev/full: onnxruntime cannot write it") as caught:
        apart.write(Path("/dev/full"), cast(OnnxRecipe, make()), case.merged.adapter)
    assert "free space" in caught.value.advice


def test_memory_and_disk_count_the_adapter(case: Case) -> None:
    plan = make_plan(make(), case.decoder, adapter=case.merged.adapter)
    plain = make_plan(make_recipe("onnx"), case.decoder)
    folder = case.apart["int4"]
    grown = (folder / "model.onnx").stat().st_size
    grown -= (case.plain["int4"] / "model.onnx").stat().st_size
    grown += (folder / apart.FILE).stat().st_size
    assert grown <= plan.adapter_bytes < 2 * grown
    for figure in ("artifact_bytes", "device_memory_bytes", "gate_memory_bytes"):
        assert getattr(plan, figure) - getattr(plain, figure) == plan.adapter_bytes
    assert plan.data.size_bytes == plain.data.size_bytes
    assert plan.digest != plain.digest


def test_little_memory_for_a_build_is_refused(case: Case) -> None:
    recipe, adapter = make(), case.merged.adapter
    needed = make_plan(recipe, case.decoder, workers=1, adapter=adapter).build_memory_bytes
    assert needed == 170_000_000  # A and B are small here
    tensors = {
        name: replace(info, shape=(3000, *info.shape[1:])) for name, info in adapter.tensors.items()
    }
    large = replace(adapter, tensors=tensors)
    with pytest.raises(PlanError, match=r"--memory 170 MB: writing the adapter's file takes"):
        make_plan(recipe, case.decoder, memory_bytes=needed, adapter=large)


# Refusals


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "onnx"])
def test_other_formats_have_no_adapter_beside_them(kind: str, case: Case) -> None:
    recipe = make_recipe(kind).with_adapter_apart()
    with pytest.raises(PlanError, match=f"runtimes of {kind} are given no adapter") as caught:
        make_plan(recipe, case.decoder, adapter=case.merged.adapter)
    assert caught.value.advice == "leave it out to have the adapter merged"


def test_equalized_weights_are_refused(case: Case) -> None:
    with pytest.raises(PlanError, match="equalize moves scale between the checkpoint's weights"):
        make_plan(make(equalize=True), case.decoder, adapter=case.merged.adapter)


def test_a_recipe_without_its_adapter_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="adapter_apart: there is no adapter"):
        write(make(), case.base, tmp_path)


@pytest.mark.parametrize(
    ("write_source", "ends", "name"),
    [
        (write_moe_checkpoint, ("experts.3.w1",), "experts.3.w1"),
        (write_moe_checkpoint, ("o_proj", "k_proj"), "k_proj"),
        (write_moe_checkpoint, ("block_sparse_moe.gate",), "block_sparse_moe.gate"),
        (write_small_checkpoint, ("query_key_value",), "query_key_value"),
        (write_small_checkpoint, ("up_proj",), "up_proj"),
    ],
)
def test_matrices_that_share_an_operand_are_refused(
    write_source: Callable[[Path], Path], ends: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    base = Checkpoint.open(write_source(tmp_path / "source"))
    merged = merge(base, tmp_path / "adapter", *ends)
    with pytest.raises(PlanError, match=rf"{name}\.weight: .* its rows go into one operator"):
        make_plan(make(), read_decoder(base.config), adapter=merged.adapter)


def test_a_model_that_sees_is_refused(tmp_path: Path) -> None:
    base = Checkpoint.open(write_vision_checkpoint(tmp_path / "source"))
    merged = merge(base, tmp_path / "adapter", "qkv_proj")
    with pytest.raises(PlanError, match="is for models that read text alone"):
        make_plan(make(), read_decoder(base.config), adapter=merged.adapter)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda path: path.unlink(), "its adapter adapter.onnx_adapter is missing"),
        (lambda path: path.write_bytes(b""), "is damaged: The buffer does not appear"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is damaged: The buffer fails"),
    ],
)
def test_a_damaged_adapter_is_never_left_out(
    change: Callable[[Path], Any], text: str, case: Case, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(case.apart["int4"], tmp_path / "copy"))
    change(folder / apart.FILE)
    with pytest.raises(Failure, match=text):
        load(folder, "model.onnx", "cpu", Settings(64), adapter=apart.FILE)


def test_plans_of_recipes_without_adapters_are_as_they_were() -> None:
    """A key that an artifact need not have would change the digests of all."""
    recipe = make_recipe("onnx")
    assert "adapter_apart" not in recipe.settings()
    assert make().settings()["adapter_apart"] is True
    assert msgspec.structs.replace(make(), adapter_apart=False).settings() == recipe.settings()
