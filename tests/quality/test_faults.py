"""The table of seeded faults: *correct* catches each, and refuses no artifact that is correct."""

import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.checkpoints import write_random_checkpoint
from tests.moe_checkpoints import write_moe_checkpoint
from tests.quality.artifacts import make_recipe
from tests.quality.faults import (
    EQUALIZED,
    EXPERT_FORMATS,
    EXPERTS,
    FORMATS,
    GRAPHS,
    TENSORS,
    Model,
    set_long_rope,
    set_window,
)
from tests.quality.file_faults import FILES, edit_file
from tests.quality.seeding import Case, configure
from tests.quality.test_calibrate import Source
from toolkit.checkpoint import Checkpoint
from toolkit.formats.gguf.recipe import Precision


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Random, 2 layers, 4 heads to 2."""
    return Checkpoint.open(write_random_checkpoint(tmp_path_factory.mktemp("source"), "gqa"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Phi-3.5-MoE with 8 experts."""
    return Checkpoint.open(write_moe_checkpoint(tmp_path_factory.mktemp("experts")))


def make_case(kind: str, checkpoint: Checkpoint, folder: Path, **quantization: Any) -> Case:
    return Case(make_recipe(kind, **quantization), checkpoint, folder / kind)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", TENSORS)
def test_a_wrong_tensor_is_caught(kind: str, name: str, source: Checkpoint, tmp_path: Path) -> None:
    case = make_case(kind, source, tmp_path)
    case.write(TENSORS[name](Model(case.checkpoint, case.plan.decoder)))
    caught = case.judge_tensors()
    assert caught
    assert caught.part == "tensors"


GRAPH_CASES = [(kind, name) for name, graph in GRAPHS.items() for kind in graph.formats]


@pytest.mark.parametrize(("kind", "name"), GRAPH_CASES)
def test_a_wrong_graph_is_caught(kind: str, name: str, source: Checkpoint, tmp_path: Path) -> None:
    graph = GRAPHS[name]
    case = make_case(kind, graph.make_source(source), tmp_path)
    wrong, decoder = graph.apply(case.checkpoint)
    assert decoder != case.plan.decoder
    case.write({}, wrong, decoder)
    caught, _ = case.judge(case.plan_of(decoder))
    assert caught


@pytest.mark.parametrize("kind", FORMATS)
def test_wrong_bytes_of_a_file_are_caught(kind: str, source: Checkpoint, tmp_path: Path) -> None:
    case = make_case(kind, source, tmp_path)
    case.write({})
    whole = shutil.copytree(case.folder, case.folder.with_name("whole"))
    for name, edit in FILES.items():
        shutil.copytree(whole, case.folder, dirs_exist_ok=True)
        assert case.judge_tensors() is None
        edit_file(kind, case.folder, edit)
        assert case.judge_tensors(), name


@pytest.mark.parametrize("kind", FORMATS)
def test_half_an_equalization_is_caught(kind: str, source: Checkpoint, tmp_path: Path) -> None:
    case = make_case(kind, source, tmp_path, equalize=True)
    for name, make in EQUALIZED.items():
        case.write(make(Model(source, case.plan.decoder)))
        caught = case.judge_tensors()
        assert caught, name
        assert caught.measure == "factors of columns"


@pytest.mark.parametrize("kind", EXPERT_FORMATS)
def test_wrong_experts_are_caught(kind: str, experts: Checkpoint, tmp_path: Path) -> None:
    case = make_case(kind, experts, tmp_path)
    case.write({})
    assert case.judge()[0] is None
    for name, make in EXPERTS.items():
        case.write(make(Model(experts, case.plan.decoder)))
        assert case.judge_tensors(), name


PRECISIONS: list[tuple[str, dict[str, Any]]] = [
    *(("onnx", {"precision": one}) for one in ("int4", "fp16", "fp32")),
    ("onnx", {"symmetric": False, "block_size": 128}),
    ("onnx", {"head": "int8", "embedding": "int8", "overrides": {"*.down_proj": "int8"}}),
    *(("openvino", {"precision": one}) for one in ("int8", "f16")),
    *(("openvino", {"group_size": one, "symmetric": False}) for one in (32, -1)),
    *(("mlx", {"bits": one, "group_size": 64}) for one in (2, 3, 4, 5, 6, 8, 16)),
    ("mlx", {"sensitive_bits": 6, "dtype": "fp16"}),
    *(("gguf", {"precision": one}) for one in get_args(Precision)),
]


def pass_in_hand(case: Case) -> None:
    """No fault, and of what the runtime's arithmetic may cost half at most."""
    caught, runtime = case.judge()
    assert caught is None
    assert runtime.value < runtime.limit / 2


@pytest.mark.parametrize(("kind", "quantization"), PRECISIONS)
def test_a_correct_artifact_passes(
    kind: str, quantization: dict[str, Any], source: Checkpoint, tmp_path: Path
) -> None:
    case = make_case(kind, source, tmp_path, **quantization)
    case.write({})
    pass_in_hand(case)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_correct_window_and_long_rope_pass(kind: str, source: Checkpoint, tmp_path: Path) -> None:
    for number, configured in enumerate((set_window(source), set_long_rope(source))):
        case = make_case(kind, configure(source, configured), tmp_path / str(number))
        case.write({})
        pass_in_hand(case)


def test_correct_codes_by_gptq_and_equalization_pass(source: Checkpoint, tmp_path: Path) -> None:
    made = Source(source.folder)
    recipes = [make_recipe(kind, method="gptq", equalize=True) for kind in FORMATS]
    recipes.append(make_recipe("mlx", method="gptq", equalize=True, bits=2))
    folders = [tmp_path / str(number) for number in range(len(recipes))]
    artifacts = [made.prepare(*one) for one in zip(recipes, folders, strict=True)]
    made.calibrate(artifacts, tmp_path / "states")
    for recipe, artifact, folder in zip(recipes, artifacts, folders, strict=True):
        made.tensors(recipe, artifact)
        pass_in_hand(Case(recipe, source, folder))
