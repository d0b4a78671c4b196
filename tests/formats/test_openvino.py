"""OpenVINO artifacts: equal to the vendor's weights, read back within bounds, reproducible."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest

from tests.checkpoints import VARIANTS, write_random_checkpoint, write_safetensors
from tests.formats.openvino_cases import SCHEMES, Artifacts, make_recipe
from tests.formats.writing import write_artifact
from tests.golden.make_openvino import GOLDEN, digest_constants
from toolkit import stream
from toolkit.checkpoint import Checkpoint
from toolkit.errors import BuildError, CheckpointError, PlanError, UnsupportedError
from toolkit.families import read_decoder
from toolkit.formats import openvino
from toolkit.formats.openvino import graph, tokenizer
from toolkit.formats.openvino.network import PRECISIONS
from toolkit.formats.openvino.recipe import OpenvinoQuantization

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Every variant in every scheme, written when first asked for."""
    return Artifacts(tmp_path_factory.mktemp("openvino"))


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """Digests of what optimum-intel with NNCF writes."""
    digests: dict[str, Any] = json.loads(GOLDEN.read_text("utf-8"))["digests"]
    return digests


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_the_vendors(
    variant: str, scheme: str, artifacts: Artifacts, golden: dict[str, Any]
) -> None:
    ours = digest_constants(artifacts.find(variant, scheme))
    vendor = golden[variant][scheme]
    # The exporter folds norms into nameless constants; reading back compares them with the source.
    ours = {name: digest for name, digest in ours.items() if "norm" not in name}
    assert ours == vendor


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_back_keeps_every_weight_within_its_step(
    variant: str, scheme: str, artifacts: Artifacts
) -> None:
    checkpoint = artifacts.checkpoint(variant)
    decoder = read_decoder(checkpoint.config)
    quantization = make_recipe(scheme).quantization
    names = []
    for name, weights in openvino.dequantize(artifacts.find(variant, scheme), decoder):
        names.append(name)
        source = checkpoint.read(name)
        bound = _bound(quantization, _kind(quantization, name), source)
        assert np.all(np.abs(weights - source) <= bound), name
    assert names == list(decoder.shapes())


def _kind(quantization: OpenvinoQuantization, name: str) -> str | None:
    if "norm" in name:
        return "f32"
    if "embed" in name:
        return quantization.embedding
    return quantization.head if "lm_head" in name else quantization.precision


def _bound(quantization: OpenvinoQuantization, kind: str | None, source: Any) -> Any:
    """Largest error of each weight: a quantization step, or float16's rounding."""
    if kind == "f32":
        return 0
    if kind == "f16":
        return np.abs(source) * 2.0**-11 + 2.0**-25
    size = quantization.group_size if kind == "int4" else -1
    groups = source.reshape(len(source), -1, source.shape[1] if size == -1 else size)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    if kind == "int4" and quantization.symmetric:
        # A weight opposite to the extreme is clipped at 7 steps of 8: one whole step off.
        farthest, step = 8, np.maximum(-low, high) / 8
    else:
        # The zero point is rounded too, so that the ends of the range are up to a step off.
        farthest = 15 if kind == "int4" else 255
        step = (np.maximum(high, 0) - np.minimum(low, 0)) / farthest
    # The scale is rounded to float16, by which the farthest code moves as many times as it counts.
    bound = step * (1.001 + farthest * 2.0**-11)
    return np.broadcast_to(bound, groups.shape).reshape(source.shape)


def test_every_port_says_the_type_that_the_runtime_infers(artifacts: Artifacts) -> None:
    """The runtime does not read them; other programs do."""
    core = pytest.importorskip("openvino").Core()
    for variant, scheme in (("window", "int4-asym"), ("longrope_gqa", "f16"), ("gqa", "int4")):
        path = artifacts.find(variant, scheme) / "openvino_model.xml"
        nodes = {node.get_friendly_name(): node for node in core.read_model(path).get_ops()}
        for layer in ElementTree.parse(path).iterfind("layers/layer"):
            node = nodes.pop(layer.attrib["name"])
            said = [port.attrib["precision"] for port in layer.iterfind("output/port")]
            found = [value.get_element_type().get_type_name() for value in node.outputs()]
            if layer.attrib["type"] not in ("Result", "Assign"):
                assert said == [PRECISIONS[dtype] for dtype in found], layer.attrib
        assert not nodes


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plan_lays_out_what_the_network_points_to(variant: str, artifacts: Artifacts) -> None:
    """Planning connects one layer only, for the small constants that all layers share."""
    decoder = read_decoder(artifacts.checkpoint(variant).config)
    for scheme in SCHEMES:
        recipe = make_recipe(scheme)
        planned = graph.lay_out(recipe, decoder)
        assert planned.stored == graph.make_network(recipe, decoder).layout.stored


def test_two_builds_are_byte_for_byte_the_same(artifacts: Artifacts, tmp_path: Path) -> None:
    """Another process, with another order of hashes."""
    checkpoint = artifacts.checkpoint("longrope_gqa")
    script = (
        "import sys; from pathlib import Path\n"
        "from tests.formats.openvino_cases import make_recipe\n"
        "from tests.formats.writing import write_artifact\n"
        "from toolkit.checkpoint import Checkpoint\n"
        "source, out = map(Path, sys.argv[1:])\n"
        "write_artifact(make_recipe('int4-asym'), Checkpoint.open(source), out)\n"
    )
    command = [sys.executable, "-c", script, str(checkpoint.folder), str(tmp_path)]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
    assert _read_all(artifacts.find("longrope_gqa", "int4-asym")) == _read_all(tmp_path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_may_be_written_one_by_one(
    scheme: str, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers take any rows in any order, so no two rows may share a byte."""
    expected = _read_all(artifacts.find("gqa", scheme))
    monkeypatch.setattr(stream, "TASK_WEIGHTS", 1)
    write_artifact(make_recipe(scheme), artifacts.checkpoint("gqa"), tmp_path)
    assert _read_all(tmp_path) == expected


def _read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_tied_head_is_stored_once(artifacts: Artifacts) -> None:
    tied = openvino.dequantize(
        artifacts.find("partial_rotary_tied", "int4"),
        read_decoder(artifacts.checkpoint("partial_rotary_tied").config),
    )
    assert "lm_head.weight" not in dict(tied)
    big = [
        path.joinpath("openvino_model.bin").stat().st_size
        for path in (artifacts.find("partial_rotary_tied", "int4"), artifacts.find("mha", "int4"))
    ]
    # 2048 rows of 256 codes, a scale and a zero point each.
    assert big[1] - big[0] == pytest.approx(2048 * (256 + 3), abs=4096)


def test_the_float_artifact_asks_for_a_float_cache(artifacts: Artifacts) -> None:
    for scheme, expected in (("f16", "f16"), ("int8", None)):
        path = artifacts.find("mha", scheme) / "openvino_model.xml"
        option = ElementTree.parse(path).find("rt_info/runtime_options/KV_CACHE_PRECISION")
        assert (None if option is None else option.attrib["value"]) == expected


def test_config_names_every_stop_id(artifacts: Artifacts) -> None:
    checkpoint, folder = artifacts.checkpoint("mha"), artifacts.find("mha", "int4")
    written = json.loads((folder / "generation_config.json").read_text("utf-8"))
    assert written["eos_token_id"] == list(checkpoint.stop_ids)


@pytest.mark.parametrize(
    ("variant", "scheme", "provider", "changes", "sentence"),
    [
        ("mha", "int4", "npu", {"symmetric": False}, "symmetric: got false.*allowed true"),
        ("mha", "int4", "npu", {"group_size": 64}, "group_size: got 64.*allowed -1, 128"),
        ("mha", "int8", "npu", {}, "precision: got int8.*allowed int4, f16"),
        ("partial_rotary_tied", "int4", "cpu", {"head": "f16"}, "one tensor; allowed int8"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    variant: str, scheme: str, provider: str, changes: dict[str, Any], sentence: str,
    artifacts: Artifacts,
) -> None:  # fmt: skip
    decoder = read_decoder(artifacts.checkpoint(variant).config)
    with pytest.raises(PlanError, match=sentence):
        openvino.check_shape(make_recipe(scheme, provider, **changes), decoder)


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_npu_takes_symmetric_int4_of_two_group_sizes(group_size: int, artifacts: Artifacts) -> None:
    decoder = read_decoder(artifacts.checkpoint("mha").config)
    recipe = make_recipe("int4", "npu", group_size=group_size)
    if group_size in (-1, 128):
        openvino.check_shape(recipe, decoder)
    else:
        with pytest.raises(PlanError):
            openvino.check_shape(recipe, decoder)


@pytest.mark.parametrize(
    ("key", "width", "allowed"),
    [("hidden", 192, "-1, 32, 64"), ("intermediate", 96, "-1, 32"), ("hidden", 255, "none")],
)
def test_groups_that_do_not_fill_a_row_are_refused(
    key: str, width: int, allowed: str, artifacts: Artifacts
) -> None:
    decoder = read_decoder(artifacts.checkpoint("mha").config)
    narrow = replace(decoder, **{key: width})
    with pytest.raises(PlanError, match=rf"128 does not divide \w+ {width}; allowed {allowed}"):
        openvino.check_shape(make_recipe("int4"), narrow)
    openvino.check_shape(make_recipe("int8"), narrow)


def test_what_is_left_out_follows_the_precision() -> None:
    for precision, expected in (("int4", "int8"), ("int8", "int8"), ("f16", "f16")):
        found = msgspec.convert({"precision": precision}, OpenvinoQuantization)
        assert (found.embedding, found.head) == (expected, expected)


@pytest.mark.parametrize("scheme", ["int4", "int4-asym", "int8", "f16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_weight_that_no_type_holds_is_named(scheme: str, value: float, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "source", "mha", dtype="f32")
    checkpoint = Checkpoint.open(folder)
    names = list(read_decoder(checkpoint.config).shapes())
    weights = {name: checkpoint.read(name) for name in names}
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    write_safetensors(folder / "model.safetensors", weights, "f32")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: a "):
        write_artifact(make_recipe(scheme), Checkpoint.open(folder), out)


@pytest.mark.parametrize("alone_from_bytes", [0, 1 << 30])
def test_a_tokenizer_that_cannot_be_read_is_named(
    alone_from_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "ALONE_FROM_BYTES", alone_from_bytes)
    folder = write_random_checkpoint(tmp_path / "source", "mha")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UnsupportedError, match=f"{folder}: .*tokenizer"):
        tokenizer.write_tokenizer(Checkpoint.open(folder), tmp_path)


def test_a_process_of_its_own_writes_the_same_tokenizer(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Phi-3's own tokenizer is converted, which is larger than the example's."""
    monkeypatch.setattr(tokenizer, "ALONE_FROM_BYTES", 0)
    tokenizer._made.clear()
    tokenizer.write_tokenizer(artifacts.checkpoint("gqa"), tmp_path)
    expected = _read_all(artifacts.find("gqa", "int4"))
    found = _read_all(tmp_path)
    assert len(found) == 4
    assert {name: expected[name] for name in found} == found


def die(*_: object) -> None:
    """End the process as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_conversion_is_explained(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "ALONE_FROM_BYTES", 0)
    monkeypatch.setattr(tokenizer, "_convert", die)
    tokenizer._made.clear()
    with pytest.raises(BuildError, match="converts the tokenizer was killed"):
        tokenizer.write_tokenizer(artifacts.checkpoint("gqa"), tmp_path)
