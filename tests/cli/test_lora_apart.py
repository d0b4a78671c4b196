"""`phiship build --adapter-apart`: from the command line to the device, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.adapters import make_adapter, write_adapter, write_adapter_of
from tests.cli.commands import events, run
from toolkit.artifact import Manifest, read_manifest
from toolkit.checkpoint import Checkpoint
from toolkit.errors import (
    ArtifactError,
    CheckpointError,
    PlanError,
    SettingsError,
    UnsupportedError,
)

# The adapter moves the example by 2.5 nats: a gate that compared with the checkpoint
# alone, or an artifact whose adapter is not active, would miss this limit, which int8 keeps.
MAX_KL = 0.01
FIELDS = {"format": "onnx", "title": "x", "model": "tiny-phi3", "check": {"max_kl": MAX_KL},
          "quantization": {"precision": "int4", "overrides": {"*": "int8"}}}  # fmt: skip
FILE = "adapter.onnx_adapter"


def write_recipe(path: Path, **fields: Any) -> Path:
    """A recipe of eight bits, without a smoke question: the adapter's answers are noise."""
    path.write_text(yaml.safe_dump({**FIELDS, **fields}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the bundled example."""
    return write_adapter_of(example, tmp_path_factory.mktemp("lora") / "adapter", lora_alpha=12)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe."""
    return write_recipe(tmp_path_factory.mktemp("recipe") / "mine.yaml")


@pytest.fixture(scope="module")
def built(
    example: Path, adapter: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The artifact with its adapter apart, checked by the gate."""
    out = tmp_path_factory.mktemp("built")
    words = ("--checkpoint", str(example), "--adapter", str(adapter), "--out", str(out), "--json")
    done = run("build", str(recipe), *words, "--adapter-apart")
    assert done.returncode == 0, events(done)[-1]
    return out / "mine"


@pytest.fixture(scope="module")
def base(example: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of the checkpoint alone."""
    out = tmp_path_factory.mktemp("base")
    done = run("build", str(recipe), "--checkpoint", str(example), "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out / "mine"


def hashes(manifest: Manifest) -> dict[str, str]:
    """What a push calls each file's content."""
    return {file.path: file.sha256 for file in manifest.files}


def test_the_gate_compares_with_the_merged_source(built: Path) -> None:
    manifest = read_manifest(built)
    assert manifest.quality.checked
    kl = next(one for one in manifest.quality.measures if one.name == "mean KL")
    assert kl.value < MAX_KL
    assert len(manifest.source.adapter) == 64
    assert manifest.runtime.properties == {"adapter": FILE}
    assert manifest.plan["adapter_apart"] is True


def test_an_artifact_whose_adapter_is_another_fails_its_check(
    built: Path, example: Path, adapter: Path, tmp_path: Path
) -> None:
    words = ("--checkpoint", str(example), "--adapter", str(adapter), "--tokens", "64")
    done = run("check", str(built), *words)
    assert done.returncode == 0, done.stderr
    done = run("check", str(built), *words, "--weights", "--json")
    assert done.returncode == 0, done.stderr
    whole = next(one for one in events(done) if one["event"] == "weights")
    kl = next(one for one in whole["measures"] if one["name"] == "mean KL")
    assert kl["value"] < MAX_KL
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:-4000])
    done = run("check", str(copy), *words)
    assert FILE in done.stderr
    assert "other content" in done.stderr


def test_another_adapter_is_named_as_such(
    built: Path, base: Path, example: Path, adapter: Path, recipe: Path, tmp_path: Path
) -> None:
    """Two adapters of one recipe make artifacts of one name."""
    shapes = {name: info.shape for name, info in Checkpoint.open(example).tensors.items()}
    other = write_adapter(tmp_path / "other", make_adapter(shapes, seed=2), lora_alpha=12)
    words = ("--checkpoint", str(example), "--adapter")
    done = run("check", str(built), *words, str(other))
    assert done.returncode == CheckpointError.exit_code
    assert f"{other}: not the adapter that {built} was made with" in done.stderr
    done = run("check", str(base), *words, str(other))
    assert done.returncode == CheckpointError.exit_code
    assert f"{other}: {base} was made without an adapter" in done.stderr
    for there, given, text in (
        (built, (*words, str(other), "--adapter-apart"), "it was made with another adapter"),
        (built, words[:2], "it was made with an adapter"),
        (base, (*words, str(adapter)), "it was made without an adapter"),
    ):
        done = run("build", str(recipe), *given, "--out", str(there.parent))
        assert done.returncode == ArtifactError.exit_code
        assert f"{there} exists and differs: {text}\n" in done.stderr


def test_a_push_beside_the_base_sends_the_graph_and_the_adapter(
    built: Path, base: Path, tmp_path: Path
) -> None:
    """Content-addressed: of all else the device has the same bytes."""
    ours, theirs = hashes(read_manifest(built)), hashes(read_manifest(base))
    new = {path for path, digest in ours.items() if digest not in theirs.values()}
    assert new == {FILE, "model.onnx"}
    place = {"PHISHIP_EMBEDDED_ROOT": str(tmp_path / "device")}
    asked = ("--prompt", "What is the capital of France?", "--expect", "")
    for artifact in (base, built):
        done = run("deploy", str(artifact), "embedded", *asked, "--json", **place)
        assert done.returncode == 0, done.stderr + done.stdout
    steps = {one["name"]: one for one in events(done) if one["event"] == "step"}
    # And the manifest.
    assert steps["compare"]["measured"].startswith("3 of 9 files to send, 2")


def test_another_process_writes_the_same_bytes(
    built: Path, example: Path, adapter: Path, tmp_path: Path
) -> None:
    """By a recipe of its own that says the same."""
    shutil.copytree(adapter, tmp_path / "beside")
    mine = write_recipe(tmp_path / "mine.yaml", adapter="beside", adapter_apart=True)
    words = ("--checkpoint", str(example), "--out", str(tmp_path / "out"), "--no-check")
    done = run("build", str(mine), *words)
    assert done.returncode == 0, done.stderr
    found, expected = read_manifest(tmp_path / "out" / "mine"), read_manifest(built)
    assert found.files == expected.files
    assert found.plan_digest == expected.plan_digest


def ask_runner(command: str, artifact: Path, *words: str) -> dict[str, Any]:
    """What the runner, as it is pushed, prints."""
    argv = [sys.executable, "-m", "toolkit.runner", command, "--artifact", str(artifact), *words]
    done = subprocess.run(argv, capture_output=True, check=False, text=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_runner_has_the_adapter_active(built: Path, base: Path) -> None:
    assert ask_runner("info", built, "--json")["adapter"] == FILE
    assert "adapter" not in ask_runner("info", base, "--json")
    words = ("--prompt", "What is the capital of France?", "--max-tokens", "12", "--json")
    assert ask_runner("generate", base, *words)["text"].startswith("The capital of France")
    assert (
        ask_runner("generate", built, *words)["text"]
        != ask_runner("generate", base, *words)["text"]
    )


def test_a_damaged_adapter_is_a_sentence(built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    (copy / FILE).write_bytes(b"not an adapter")
    error = ask_runner("generate", copy, "--prompt", "Hello", "--json")["error"]
    assert error["kind"] == "model"
    assert f"its adapter {FILE} is damaged" in error["message"]


def test_the_plan_says_which_adapter_and_how(recipe: Path, adapter: Path) -> None:
    words = ("plan", str(recipe), "--adapter", str(adapter))
    for more, text in (((), "tensors, merged"), (("--adapter-apart",), "tensors, apart, ")):
        done = run(*words, *more, COLUMNS="300")
        assert done.returncode == 0, done.stderr
        assert f"{adapter}: 16 {text}" in done.stdout
    assert events(run(*words, "--adapter-apart", "--json"))[-1]["adapter_bytes"] > 0


# Refusals


def test_it_goes_with_an_adapter(recipe: Path, example: Path, tmp_path: Path) -> None:
    words = ("--checkpoint", str(example), "--out", str(tmp_path))
    done = run("build", str(recipe), *words, "--adapter-apart")
    assert done.returncode == SettingsError.exit_code
    assert "there is no adapter" in done.stderr
    mine = write_recipe(tmp_path / "mine.yaml", adapter_apart=True)
    for command in (("build", str(mine), *words), ("plan", str(mine))):
        done = run(*command)
        assert done.returncode == SettingsError.exit_code
        assert "mine: adapter_apart: there is no adapter" in done.stderr


def test_two_adapters_are_refused(example: Path, adapter: Path, tmp_path: Path) -> None:
    """The artifact would have the name of one and the weights of the other."""
    mine = write_recipe(tmp_path / "mine.yaml", adapter=str(adapter))
    other = shutil.copytree(adapter, tmp_path / "other")
    words = ("--checkpoint", str(example), "--adapter", str(other))
    done = run("build", str(mine), *words, "--out", str(tmp_path))
    assert done.returncode == SettingsError.exit_code
    assert f"mine names another adapter, {adapter}" in done.stderr
    done = run("ship", str(example), "embedded", "--recipe", str(mine), *words[2:])
    assert f"mine names another adapter, {adapter}" in done.stderr


def test_other_formats_and_a_budget_are_refused(
    example: Path, adapter: Path, recipe: Path, tmp_path: Path
) -> None:
    words = ("--checkpoint", str(example), "--adapter", str(adapter), "--out", str(tmp_path),
             "--adapter-apart")  # fmt: skip
    done = run("build", "tiny-phi3-gguf-q4_0", *words)
    assert done.returncode == PlanError.exit_code
    assert "leave it out to have the adapter merged" in done.stderr
    done = run("build", str(recipe), *words, "--max-size", "3MB")
    assert done.returncode == PlanError.exit_code
    assert "a budget would choose the bits" in done.stderr


def test_parity_has_nothing_to_compare_an_adapter_with(
    example: Path, adapter: Path, tmp_path: Path
) -> None:
    mine = write_recipe(tmp_path / "mine.yaml", adapter=str(adapter))
    done = run("parity", str(mine), str(example))
    assert done.returncode == PlanError.exit_code
    assert "the vendors' converters read none" in done.stderr


def test_a_bundle_for_apps_is_refused(built: Path, tmp_path: Path) -> None:
    done = run("bundle", str(built), "--out", str(tmp_path))
    assert done.returncode == UnsupportedError.exit_code
    assert f"only when loaded with adapter {FILE}" in done.stderr


def test_ship_takes_an_adapter(example: Path, adapter: Path, recipe: Path, tmp_path: Path) -> None:
    place = {"PHISHIP_EMBEDDED_ROOT": str(tmp_path / "device")}
    words = ("--recipe", str(recipe), "--adapter", str(adapter), "--out", str(tmp_path))
    asked = ("--prompt", "Hello", "--expect", "")
    done = run("ship", str(example), "embedded", *words, *asked, **place)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "mine")
    assert manifest.source.adapter
    assert not manifest.runtime.properties
