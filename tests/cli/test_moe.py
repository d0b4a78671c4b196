"""A mixture of experts from the command line: built with its gate, checked, planned, refused."""

import json
from pathlib import Path

import pytest

from tests.cli.commands import run
from tests.golden.moe_cases import SEED
from tests.moe_checkpoints import moe_config, write_moe_checkpoint

# Int4 moves a random model by a KL of 0.1 to 0.2; one routed wrongly moves by 1 and more.
LIMITS = "check: {max_kl: 0.4, min_top1: 0.3}"
RECIPES = {
    "onnx": "quantization: {precision: int4, block_size: 128}",
    "openvino": "quantization: {precision: int4, group_size: 128}",
    "mlx": "quantization: {bits: 4}\nrope_factors: short\nprovider: cpu",
    "gguf": "quantization: {precision: q4_0}",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rope = moe_config()["rope_scaling"]
    folder = tmp_path_factory.mktemp("moe")
    one_scale = {**rope, "long_mscale": rope["short_mscale"]}
    return write_moe_checkpoint(
        folder, seed=SEED, intermediate_size=512, rope_scaling=one_scale,
        original_max_position_embeddings=256, max_position_embeddings=1024,
    )  # fmt: skip


@pytest.mark.parametrize("kind", RECIPES)
def test_build_and_check(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    recipe = tmp_path / f"tiny-moe-{kind}.yaml"
    lines = [f"format: {kind}", "title: x", "model: phi-3.5-moe", "context_length: 64"]
    recipe.write_text("\n".join([*lines, RECIPES[kind], LIMITS]) + "\n")
    out = tmp_path / "out"
    built = run("build", str(recipe), "--checkpoint", str(checkpoint), "--out", str(out))
    assert built.returncode == 0, built.stderr
    checked = run("check", str(out / recipe.stem), "--checkpoint", str(checkpoint))
    assert checked.returncode == 0, checked.stderr
    manifest = json.loads((out / recipe.stem / "manifest.json").read_text("utf-8"))
    assert manifest["quality"]["checked"]
    weights = run("check", str(out / recipe.stem), "--checkpoint", str(checkpoint), "--weights")
    assert "matrices cannot be measured one by one" in weights.stderr
    assert weights.returncode not in (0, 1)
    assert "verify" not in weights.stdout and "files" not in weights.stdout  # nothing was read


def test_mixes_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    recipe = "phi-3.5-moe-onnx-cpu-int4"
    where = ("--checkpoint", str(checkpoint), "--out", str(tmp_path))
    built = run("build", recipe, *where, "--max-size", "5MB")
    assert "has experts: matrices cannot be measured one by one" in built.stderr
    assert "Traceback" not in built.stderr


@pytest.mark.parametrize(
    ("recipe", "target", "fits"),
    [
        ("phi-3.5-moe-onnx-cpu-int4", "intel-cpu", False),
        ("phi-3.5-moe-onnx-cuda-int4", "jetson-agx-orin", True),
        ("phi-3.5-moe-openvino-int4", "intel-core-ultra", True),
    ],
)
def test_plan_says_which_devices_hold_it(recipe: str, target: str, fits: bool) -> None:
    planned = run("plan", recipe, "--for", target)
    assert (planned.returncode == 0) == fits, planned.stdout + planned.stderr
