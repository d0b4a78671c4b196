"""`phiship build` and `check` with a LoRA adapter merged in."""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.adapters import write_adapter_of
from tests.cli.commands import events, run
from toolkit.artifact import read_manifest
from toolkit.checkpoint import Checkpoint
from toolkit.errors import CheckpointError, PlanError

# The adapter moves the example by 0.13 nats: a gate that compared with the checkpoint alone, or an
# artifact without the adapter, would miss this limit, which eight bits keep.
MAX_KL = 0.01


@pytest.fixture(scope="module")
def adapter(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the bundled example."""
    return write_adapter_of(example, tmp_path_factory.mktemp("lora") / "adapter", lora_alpha=3)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe without a smoke question: the adapter's answers are noise."""
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    fields = {"format": "gguf", "title": "x", "model": "tiny-phi3",
              "quantization": {"precision": "q8_0"}, "check": {"max_kl": MAX_KL}}  # fmt: skip
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def built(
    example: Path, adapter: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The artifact, built with --adapter and checked."""
    out = tmp_path_factory.mktemp("built")
    words = ("--checkpoint", str(example), "--adapter", str(adapter), "--out", str(out), "--json")
    done = run("build", str(recipe), *words)
    assert done.returncode == 0, events(done)[-1]
    return out / "mine"


def test_the_manifest_names_the_adapter(built: Path, example: Path, adapter: Path) -> None:
    manifest = read_manifest(built)
    assert manifest.quality.checked
    assert len(manifest.source.adapter) == 64
    assert manifest.source.digest != Checkpoint.open(example).fingerprint()
    assert str(adapter) not in (built / "manifest.json").read_text("utf-8")


def test_check_wants_the_adapter_too(built: Path, example: Path, adapter: Path) -> None:
    words = ("check", str(built), "--checkpoint", str(example), "--tokens", "64")
    without = run(*words)
    assert without.returncode == CheckpointError.exit_code
    assert "give it with --adapter DIR" in without.stderr
    done = run(*words, "--adapter", str(adapter))
    assert done.returncode == 0, done.stderr


def test_the_artifact_is_not_the_checkpoints(built: Path, example: Path, recipe: Path) -> None:
    done = run("build", str(recipe), "--checkpoint", str(example), "--out", str(built.parent))
    assert done.returncode != 0
    assert "exists and differs: it was made with an adapter" in done.stderr


def test_a_recipe_names_an_adapter_beside_it(
    built: Path, example: Path, adapter: Path, recipe: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "mine-adapter")
    fields = {**yaml.safe_load(recipe.read_text("utf-8")), "adapter": "mine-adapter"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    words = ("--checkpoint", str(example), "--out", str(tmp_path / "out"), "--no-check")
    done = run("build", str(path), *words)
    assert done.returncode == 0, done.stderr
    found, expected = read_manifest(tmp_path / "out" / "mine"), read_manifest(built)
    assert found.source == expected.source
    assert found.plan_digest == expected.plan_digest
    assert found.files == expected.files


def test_a_vendors_engine_is_refused(
    example: Path, adapter: Path, recipe: Path, tmp_path: Path
) -> None:
    words = ("--checkpoint", str(example), "--adapter", str(adapter), "--out", str(tmp_path))
    done = run("build", str(recipe), *words, "--engine", "vendor")
    assert done.returncode == PlanError.exit_code
    assert "does not read adapters" in done.stderr
    mine = tmp_path / "mine.yaml"
    fields = {**yaml.safe_load(recipe.read_text("utf-8")), "engine": "vendor"}
    mine.write_text(yaml.safe_dump(fields), encoding="utf-8")
    done = run("plan", str(mine), "--adapter", str(adapter))
    assert done.returncode == PlanError.exit_code
    assert "does not read adapters" in done.stderr
