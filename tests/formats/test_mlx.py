"""MLX artifacts: mlx-lm's bytes, read back within bounds, whatever the workers and the spelling."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from tests.checkpoints import write_random_checkpoint, write_safetensors
from tests.formats.mlx_cases import SCHEMES, Checkpoints, make_recipe, write
from tests.golden.make_mlx import CASES, GOLDEN, describe, digest_tensors
from toolkit import errors, stream
from toolkit.checkpoint import Checkpoint
from toolkit.errors import ArtifactError, CheckpointError
from toolkit.families import read_decoder
from toolkit.formats import mlx
from toolkit.formats.mlx.schemes import Scheme, choose_schemes

EXPECTED: dict[str, Any] = json.loads(GOLDEN.read_text("utf-8"))["artifacts"]
PAIRS = [(case, scheme) for case, schemes in CASES.items() for scheme in schemes]
# mlx_lm.convert leaves rows that are no whole groups alone; a recipe says so.
AS_CONVERTED = {("narrow", "4bit-group64"): {"*.down_proj": {"bits": 16}}}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Checkpoints of all cases."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


# Against mlx_lm.convert


@pytest.mark.parametrize(("case", "scheme"), PAIRS)
def test_tensors_are_mlx_lms_byte_for_byte(
    case: str, scheme: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    checkpoint, theirs = checkpoints.get(case), EXPECTED[case][scheme]
    overrides = AS_CONVERTED.get((case, scheme), {})
    recipe = make_recipe(scheme, checkpoint, overrides=overrides)
    ours = describe(write(tmp_path / "out", recipe, checkpoint))
    assert ours["tensors"] == theirs["tensors"]
    assert ours["totals"] == theirs["totals"]
    if scheme.startswith("mixed"):
        assert _settle(ours["quantization"], theirs["quantization"]) == theirs["quantization"]
    else:
        assert ours["quantization"] == theirs["quantization"]


def _settle(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Our `quantization` with every module named that theirs names."""
    common = {key: ours[key] for key in ("group_size", "bits", "mode")}
    # mlx_lm.convert's common bits are its default, 4, though no module has them in mixed_3_6.
    settled = {key: theirs[key] for key in common}
    return settled | {path: ours.get(path, common) for path in theirs if path not in common}


def test_the_golden_schemes_are_these() -> None:
    assert {scheme for _, scheme in PAIRS} <= set(SCHEMES)
    assert {case: tuple(found) for case, found in EXPECTED.items()} == dict(CASES)


# Reading back


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", ["longrope_gqa", "partial_rotary_tied"])
def test_reading_back_keeps_every_weight_within_a_step(
    variant: str, scheme: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    checkpoint = checkpoints.get(variant)
    decoder = read_decoder(checkpoint.config)
    recipe = make_recipe(scheme, checkpoint)
    folder = write(tmp_path / "out", recipe, checkpoint)
    schemes = choose_schemes(recipe, decoder)
    names = []
    for name, weights in mlx.dequantize(folder, decoder):
        names.append(name)
        source = checkpoint.read(name)
        bound = _bound(source, schemes.get(name.removesuffix(".weight")))
        assert np.all(np.abs(weights - source) <= bound), name
    assert names == list(decoder.shapes())


def _bound(source: NDArray[np.float32], scheme: Scheme | None) -> Any:
    """Largest error of each weight: one step, and the rounding of scale and bias to bf16.

    The step is stretched so that 0 is a code, by up to half a step over all codes: the end that is
    nearer to 0 may be a step beyond the last code.
    """
    if scheme is None or not scheme.is_quantized:
        return 0
    top = (1 << scheme.bits) - 1
    groups = source.reshape(len(source), -1, scheme.group_size)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    rounding = 2.0**-9 * (1.25 * (high - low) + np.maximum(np.abs(low), np.abs(high)))
    error = (high - low) / top * 1.001 + rounding
    return np.broadcast_to(error, groups.shape).reshape(source.shape)


def test_mlx_and_safetensors_read_the_header(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.get("mha")
    folder = write(tmp_path / "out", make_recipe("3bit-group32", checkpoint), checkpoint)
    # Hugging Face's own library, unlike mlx, also refuses gaps and a file that is too long.
    with safe_open(folder / "model.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "mlx"}
    tensors, metadata = mx.load(str(folder / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "mlx"}
    found = tensors["model.layers.0.mlp.down_proj.weight"]
    assert (found.dtype, found.shape) == (mx.uint32, (256, 512 * 3 // 32))
    assert tensors["model.layers.0.mlp.down_proj.scales"].dtype == mx.bfloat16


@pytest.mark.parametrize("stored", ["fp16", "fp32", "bf16"])
@pytest.mark.parametrize("source", ["bf16", "f16", "f32"])
def test_a_checkpoint_in_another_type_is_rounded_first(
    source: str, stored: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """As mlx_lm.convert --dtype does it: cast, then quantize."""
    checkpoint = checkpoints.get("mha", source)
    recipe = make_recipe("4bit-group64", checkpoint, dtype=stored)
    folder = write(tmp_path / "out", recipe, checkpoint)
    kind = {"bf16": mx.bfloat16, "fp16": mx.float16, "fp32": mx.float32}[stored]
    tensors = mx.load(str(folder / "model.safetensors"))
    for name in ("model.embed_tokens", "model.layers.1.self_attn.qkv_proj"):
        weights = mx.array(checkpoint.read(f"{name}.weight")).astype(kind)
        parts = mx.quantize(weights, group_size=64, bits=4, stream=mx.cpu)
        for part, theirs in zip(("weight", "scales", "biases"), parts, strict=True):
            ours = tensors[f"{name}.{part}"]
            assert ours.dtype == theirs.dtype
            assert mx.array_equal(ours, theirs)
    norm = mx.array(checkpoint.read("model.norm.weight")).astype(kind)
    assert mx.array_equal(tensors["model.norm.weight"], norm)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["torch_dtype"] == str(kind).removeprefix("mlx.core.")


def test_a_damaged_artifact_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.get("mha")
    decoder = read_decoder(checkpoint.config)
    folder = write(tmp_path / "out", make_recipe("4bit-group64", checkpoint), checkpoint)
    tensors = mx.load(str(folder / "model.safetensors"))
    mx.eval(tensors)
    for change, words in (("pop", "lm_head is incomplete"), ("add", "unknown tensors: other")):
        changed = {k: v for k, v in tensors.items() if change != "pop" or k != "lm_head.scales"}
        changed |= {"other": mx.zeros(1)} if change == "add" else {}
        mx.save_safetensors(str(folder / "model.safetensors"), changed)
        with pytest.raises(ArtifactError, match=words):
            list(mlx.dequantize(folder, decoder))


# How it is written


def test_workers_and_shards_do_not_change_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Checkpoint.open(write_random_checkpoint(tmp_path / "one", "longrope_gqa"))
    three = Checkpoint.open(write_random_checkpoint(tmp_path / "three", "longrope_gqa", shards=3))
    recipe = make_recipe("mixed_3_6", one)
    write(tmp_path / "alone", recipe, one)
    monkeypatch.setattr(stream, "TASK_WEIGHTS", 10_000)
    write(tmp_path / "two", recipe, three, workers=2)
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes(), path.name


def test_writing_needs_no_mlx(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.get("longrope")
    recipe = make_recipe("4bit-group64", checkpoint)
    here = write(tmp_path / "here", recipe, checkpoint)
    (tmp_path / "there").mkdir()
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['mlx', 'mlx_lm', 'transformers']))\n"
        "import pathlib, msgspec\n"
        "from tests.formats.writing import write_artifact\n"
        "from toolkit.checkpoint import Checkpoint\n"
        "from toolkit.formats.mlx.recipe import MlxRecipe\n"
        "recipe = msgspec.json.decode(sys.argv[1], type=MlxRecipe)\n"
        "source, out = map(pathlib.Path, sys.argv[2:])\n"
        "write_artifact(recipe, Checkpoint.open(source), out)\n"
    )
    arguments = [
        msgspec.json.encode(recipe).decode(),
        str(checkpoint.folder),
        str(tmp_path / "there"),
    ]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    for path in here.iterdir():
        assert (tmp_path / "there" / path.name).read_bytes() == path.read_bytes(), path.name


def test_reading_without_mlx_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] in ("mlx", "mlx_lm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlx", None)
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(errors.MissingExtraError) as caught:
        mlx.open_session(tmp_path)
    assert caught.value.advice == "install it with: pip install 'phiship[mlx]'"


@pytest.mark.parametrize("scheme", ["4bit-group64", "bf16"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_nothing_is_built_of_weights_that_are_not_finite(
    bad: float, scheme: str, tmp_path: Path
) -> None:
    folder = write_random_checkpoint(tmp_path / "source", "mha")
    checkpoint = Checkpoint.open(folder)
    weights = {name: checkpoint.read(name).copy() for name in checkpoint.tensors}
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][200, 7] = bad
    write_safetensors(folder / "model.safetensors", weights, "f32")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=f"{name}: a weight is not finite"):
        write(tmp_path / "out", make_recipe(scheme, checkpoint), checkpoint)


# Mixed precision


def test_sensitive_modules_are_those_of_mlx_lms_mix_and_the_fused_values(
    checkpoints: Checkpoints,
) -> None:
    checkpoint = checkpoints.get("deep")
    decoder = read_decoder(checkpoint.config)
    found = choose_schemes(make_recipe("mixed_4_6", checkpoint), decoder)
    high = {path for path, scheme in found.items() if scheme.bits == 6}
    # 12 layers: the first eighth is layer 0, the last ones 10 and 11, every third from 3 on.
    layers = (0, 3, 6, 9, 10, 11)
    parts = ("self_attn.qkv_proj", "mlp.down_proj")
    assert high == {f"model.layers.{n}.{part}" for n in layers for part in parts} | {"lm_head"}
    assert {scheme.bits for path, scheme in found.items() if path not in high} == {4}


def test_later_settings_win(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.get("mha")
    overrides = {
        "model.layers.*": {"bits": 5},
        "*.down_proj": {"bits": 8, "group_size": 128},
        "model.layers.1.mlp.down_proj": {"bits": 16},
    }
    recipe = make_recipe(
        "mixed_4_6", checkpoint, embedding_bits=2, head_bits=8, overrides=overrides
    )
    folder = write(tmp_path / "out", recipe, checkpoint)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["quantization"] == config["quantization_config"]
    found = config["quantization"]
    assert (found.pop("bits"), found.pop("group_size"), found.pop("mode")) == (4, 64, "affine")
    assert {path: (s["bits"], s["group_size"]) for path, s in found.items()} == {
        "model.embed_tokens": (2, 64),
        "model.layers.0.self_attn.qkv_proj": (5, 64),
        "model.layers.0.self_attn.o_proj": (5, 64),
        "model.layers.0.mlp.gate_up_proj": (5, 64),
        "model.layers.0.mlp.down_proj": (8, 128),
        "model.layers.1.self_attn.qkv_proj": (5, 64),
        "model.layers.1.self_attn.o_proj": (5, 64),
        "model.layers.1.mlp.gate_up_proj": (5, 64),
        "lm_head": (8, 64),
    }
    assert "model.layers.1.mlp.down_proj.scales" not in digest_tensors(folder / "model.safetensors")
    session = mlx.open_session(folder)
    assert np.isfinite(session.logits([1, 2, 3])).all()


def test_only_one_module_quantized(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Then `bits` of config.json are that module's, for 16 is nothing mlx knows."""
    checkpoint = checkpoints.get("mha")
    folder = write(tmp_path / "out", make_recipe("bf16", checkpoint, embedding_bits=8), checkpoint)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert np.isfinite(mlx.open_session(folder).logits([1, 2, 3])).all()


def test_a_tied_head_is_the_embedding(checkpoints: Checkpoints) -> None:
    checkpoint = checkpoints.get("partial_rotary_tied")
    decoder = read_decoder(checkpoint.config)
    found = choose_schemes(make_recipe("mixed_4_6", checkpoint), decoder)
    assert found["model.embed_tokens"].bits == 6
    assert "lm_head" not in found
