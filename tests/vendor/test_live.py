"""The vendors themselves: build with each, compare with ours. Gigabytes; `make test-vendor`.

PHISHIP_TEST_VENDOR=1 runs them; the environments must be there (phiship vendor setup NAME). A
format whose environment is missing fails: what was asked for is not skipped.
"""

import json
import os
import time
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import VARIANTS, write_random_checkpoint
from tests.cli.commands import events, run, start
from toolkit import catalog
from toolkit.artifact import read_manifest
from toolkit.errors import BuildError, PlanError

pytestmark = pytest.mark.skipif(
    os.environ.get("PHISHIP_TEST_VENDOR") != "1",
    reason="PHISHIP_TEST_VENDOR is not 1: needs the vendors' environments, gigabytes",
)
RECIPES = (
    "tiny-phi3-onnx-cpu-int4",
    "tiny-phi3-openvino-int4",
    "tiny-phi3-mlx-4bit",
    "tiny-phi3-gguf-q4_k_m",
)
LONG = ("longrope", "longrope_gqa")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_vendors_artifact_passes_the_gate(recipe: str, example: Path, tmp_path: Path) -> None:
    words = ("build", recipe, "--checkpoint", str(example), "--out", str(tmp_path), "--json")
    done = run(*words, "--engine", "vendor")
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = read_manifest(tmp_path / recipe)
    assert manifest.quality.checked
    assert manifest.plan["engine"] == "vendor"
    assert manifest.tools["engine"].startswith("vendor: ")
    assert len(manifest.tools["vendor lock"]) == 12
    assert (tmp_path / recipe / manifest.runtime.main_file).is_file()
    assert not list((tmp_path / recipe).rglob("*.py"))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [recipe, f"{recipe}.vendor.log"]
    again = run(*words, "--engine", "vendor")
    assert [e["name"] for e in events(again) if e["event"] == "step"] == ["plan", "keep"]
    native = run(*words)
    assert "another plan" in native.stderr + native.stdout


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_parity(recipe: str, variant: str, tmp_path: Path) -> None:
    """Every tensor class of every architecture variant, and the logits."""
    name = recipe
    if "mlx" in recipe and variant in LONG:
        name = write_recipe(tmp_path, recipe, "rope_factors: long\ncontext_length: 256\n")
    checkpoint = write_random_checkpoint(tmp_path / variant, variant)
    done = run("parity", name, str(checkpoint), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {e["kind"]: e for e in events(done) if e["event"] == "tensors"}
    assert set(found) >= {"embedding", "qkv", "o", "gate_up", "down", "norms"}
    for kind, difference in found.items():
        assert difference["equal_tensors"] == difference["tensors"], (kind, difference)
    (logits,) = (e for e in events(done) if e["event"] == "logits")
    # Equal weights, but another graph: the order of float32 sums. A quantization step is 0.06.
    assert float(str(logits["kl"])) < 0.001


def test_onnx_shares_a_quantized_embedding(tmp_path: Path) -> None:
    lines = "  embedding: int4\n"
    text = (catalog.folder("recipes") / f"{RECIPES[0]}.yaml").read_text("utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("  precision: int4\n", "  precision: int4\n" + lines))
    checkpoint = write_random_checkpoint(tmp_path / "tied", "partial_rotary_tied")
    done = run("parity", str(path), str(checkpoint), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    for event in events(done):
        if event["event"] == "tensors":
            assert event["equal_tensors"] == event["tensors"], event


def test_mlx_lm_has_no_short_factors(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "tiny-phi3-mlx-4bit", "rope_factors: short\n")
    checkpoint = write_random_checkpoint(tmp_path / "longrope", "longrope")
    done = run(
        "build", recipe, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"),
        "--engine", "vendor", "--context", "64",
    )  # fmt: skip
    assert done.returncode == PlanError.exit_code, done.stderr
    assert "always takes the long ones" in done.stderr


def test_a_vendor_that_is_killed(example: Path, tmp_path: Path) -> None:
    """As the kernel does when memory runs out: while it works, from outside."""
    recipe, out = RECIPES[1], tmp_path / "out"
    process = start(
        "build", recipe, "--checkpoint", str(example), "--out", str(out), "--engine", "vendor",
        "--json",
    )  # fmt: skip
    deadline_s = time.monotonic() + 120
    while not (children := psutil.Process(process.pid).children()):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    children[0].kill()
    told, _ = process.communicate(timeout=60)
    assert process.returncode == BuildError.exit_code
    error = json.loads(told.splitlines()[-1])
    assert "run out of memory" in error["message"]
    assert "engine: native" in error["advice"]
    assert [path.name for path in out.iterdir()] == [f"{recipe}.vendor.log"]


def write_recipe(folder: Path, name: str, lines: str) -> str:
    """A copy of a bundled recipe with more lines; returns its path."""
    path = folder / "mine.yaml"
    path.write_text((catalog.folder("recipes") / f"{name}.yaml").read_text("utf-8") + lines)
    return str(path)
