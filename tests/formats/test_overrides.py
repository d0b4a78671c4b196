"""Overrides in every format: what they say, what the runtimes make of it, what is refused."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.checkpoints import write_random_checkpoint
from tests.formats.gguf_cases import write_case
from tests.formats.writing import write_artifact
from toolkit import formats
from toolkit.checkpoint import Checkpoint
from toolkit.errors import PlanError
from toolkit.families import read_decoder
from toolkit.plan import make_plan
from toolkit.quality import measures, reference
from toolkit.recipe import Recipe
from toolkit.vendor import Places

FORMATS = ("onnx", "openvino", "mlx", "gguf")
# The lowest type of each format, with the head in 8 bits as well or as good.
BASE: Mapping[str, dict[str, Any]] = {
    "onnx": {"precision": "int4", "head": "int8"},
    "openvino": {"precision": "int4", "group_size": 32},
    "mlx": {"bits": 4, "group_size": 32, "head_bits": 8, "embedding_bits": 8},
    "gguf": {"precision": "q4_0"},
}
EIGHT = {"onnx": "int8", "openvino": "int8", "mlx": {"bits": 8}, "gguf": "q8_0"}
FOUR = {"onnx": "int4", "openvino": "int4", "mlx": {"bits": 4}, "gguf": "q4_0"}
# In the first layer: the others are not like it.
GATE_UP = "model.layers.0.mlp.gate_up_proj"


def make_recipe(kind: str, overrides: Mapping[str, Any] | None = None, **changes: Any) -> Recipe:
    """A recipe of a format with overrides, read as a YAML file's content is."""
    fields = {
        "format": kind,
        "name": "x",
        "model": "tiny-phi3",
        "title": "x",
        "quantization": {**BASE[kind], "overrides": overrides or {}, **changes},
    }
    if kind == "mlx":
        fields["provider"] = "cpu"
    recipe: Recipe = msgspec.convert(fields, formats.get(kind).RECIPE)
    return recipe


class Cases:
    """One small checkpoint, its logits, and artifacts of it by format and overrides."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source = write_random_checkpoint(folder / "source", "gqa")
        self.checkpoint = Checkpoint.open(source)
        self.decoder = read_decoder(self.checkpoint.config)
        self.ids = [7 + 13 * place % 1900 for place in range(40)]
        self.logits = reference.forward(self.checkpoint, self.decoder, self.ids)
        self.write = cache(self._write)

    def _write(self, kind: str, *pattern: str) -> Path:
        folder = self.folder / "-".join([kind, *pattern]).replace("*", "all")
        folder.mkdir()
        recipe = make_recipe(kind, dict.fromkeys(pattern, EIGHT[kind]))
        write_artifact(recipe, self.checkpoint, folder)
        return folder

    def read(self, folder: Path, kind: str) -> dict[str, Any]:
        return dict(formats.get(kind).dequantize(folder, self.decoder))

    def measure(self, folder: Path, kind: str) -> float:
        """Mean KL of the artifact in its own runtime."""
        session = formats.get(kind).open_session(folder)
        try:
            found = session.logits(self.ids)
        finally:
            session.close()
        return measures.compare_logits(self.logits, found, self.ids).mean_kl


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Shared by the tests of this file."""
    return Cases(tmp_path_factory.mktemp("overrides"))


@pytest.mark.parametrize("kind", FORMATS)
def test_an_override_changes_its_matrix_alone(kind: str, cases: Cases) -> None:
    """Also where ONNX stores the matrix as two: both halves are finer."""
    plain = cases.read(cases.write(kind), kind)
    mixed = cases.read(cases.write(kind, GATE_UP), kind)
    name = f"{GATE_UP}.weight"
    for other in plain:
        assert np.array_equal(plain[other], mixed[other]) == (other != name), other
    source = cases.checkpoint.read(name)
    for half in np.split(np.arange(len(source)), 2):
        errors = [np.square(found[name][half] - source[half]).sum() for found in (plain, mixed)]
        # 16 times the levels: 256 times less squared error, or less where groups are whole rows.
        assert errors[1] < errors[0] / 50


@pytest.mark.parametrize("kind", FORMATS)
def test_the_runtime_loads_it_and_is_nearer_to_the_source(kind: str, cases: Cases) -> None:
    every = cases.measure(cases.write(kind, "model.layers.*"), kind)
    one = cases.measure(cases.write(kind, GATE_UP), kind)
    none = cases.measure(cases.write(kind), kind)
    # One of eight matrices carries more than a twentieth of the error of all.
    assert every < one < 0.95 * none


@pytest.mark.parametrize("kind", FORMATS)
def test_the_last_match_counts(kind: str, cases: Cases) -> None:
    sizes = [
        make_plan(make_recipe(kind, overrides), cases.decoder).data.size_bytes
        for overrides in (
            {},
            {"*": EIGHT[kind], "model.*": FOUR[kind], "lm_head": FOUR[kind]},
            {"model.layers.*": FOUR[kind], "*.down_proj": EIGHT[kind]},
            {"*.down_proj": EIGHT[kind], "model.layers.*": FOUR[kind]},
        )
    ]
    assert sizes[1] <= sizes[3] == sizes[0] < sizes[2]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_pattern_that_matches_nothing_is_refused(kind: str, cases: Cases) -> None:
    recipe = make_recipe(kind, {"*.down_proj": EIGHT[kind], "*.v_proj": EIGHT[kind]})
    message = r"quantization\.overrides: '\*\.v_proj' matches no module; this model has model\.emb"
    with pytest.raises(PlanError, match=message):
        make_plan(recipe, cases.decoder)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_type_that_is_none_is_refused(kind: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"overrides"):
        make_recipe(kind, {"lm_head": {"bits": 7} if kind == "mlx" else "int5"})


@pytest.mark.parametrize("kind", FORMATS)
def test_the_vendor_is_not_asked_for_what_it_cannot(kind: str, cases: Cases) -> None:
    recipe = make_recipe(kind, {"lm_head": EIGHT[kind]})
    places = Places(cases.folder, cases.folder, cases.folder)
    exporter = formats.get_vendor(kind)
    with pytest.raises(PlanError, match=r"quantization\.overrides") as caught:
        exporter.plan_export(recipe, cases.decoder, cases.checkpoint, places)
    assert caught.value.advice == "use `engine: native`"


def test_a_tied_matrix_of_onnx_is_stored_once(tmp_path: Path) -> None:
    """Other than with `embedding` and `head`, which are set apart, an override is for both."""
    source = write_random_checkpoint(tmp_path / "source", "partial_rotary_tied")
    checkpoint = Checkpoint.open(source)
    decoder = read_decoder(checkpoint.config)
    recipe = make_recipe("onnx", {"model.embed_tokens": "int8"}, head="int4")
    tensors = [piece.tensor for piece in make_plan(recipe, decoder).data.pieces]
    assert tensors.count(decoder.names.embedding) == 1
    folder = tmp_path / "out"
    folder.mkdir()
    write_artifact(recipe, checkpoint, folder)
    found = [w for name, w in formats.get("onnx").dequantize(folder, decoder) if "embed" in name]
    assert len(found) == 2
    assert np.array_equal(*found)
    ids = list(range(9, 40))
    session = formats.get("onnx").open_session(folder)
    expected = reference.forward(checkpoint, decoder, ids)
    assert measures.compare_logits(expected, session.logits(ids), ids).mean_kl < 0.2
    session.close()


@pytest.mark.parametrize(
    ("kind", "overrides", "changes", "message"),
    [
        ("onnx", {"lm_head": "int8"}, {"precision": "fp32", "head": "fp32"},
         "overrides: got precision fp32; overrides go with int4; allowed none"),
        ("gguf", {"*.o_proj": "q4_k"}, {},
         r"q4_k needs .* multiples of 256; .*o_proj\.weight has rows of 192; allowed f16, .*q8_0"),
        ("openvino", {"*.o_proj": "int4"}, {"precision": "int8", "group_size": 128},
         "group_size: 128 does not divide hidden_size 192; allowed -1, 32, 64"),
        ("mlx", {"*.down_proj": {"bits": 8, "group_size": 128}}, {},
         r"128 does not divide the 288 inputs of model\.layers\.0\.mlp\.down_proj; allowed 32"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_refused(
    kind: str, overrides: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(write_case(tmp_path / "source", "narrow"))
    recipe = make_recipe(kind, overrides, **changes)
    with pytest.raises(PlanError, match=message):
        make_plan(recipe, read_decoder(checkpoint.config))


def test_an_npu_takes_no_zero_points(cases: Cases) -> None:
    recipe = make_recipe("openvino", {"*.o_proj": "int8"}, group_size=128)
    recipe = msgspec.structs.replace(recipe, provider="npu")  # type: ignore[call-arg]
    with pytest.raises(PlanError, match=r"overrides: got int8, .* allowed int4, f16"):
        make_plan(recipe, cases.decoder)
