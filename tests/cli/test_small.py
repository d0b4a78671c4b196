"""Phi-3-small from the command line: built with its gate, checked, planned, refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import events, run
from tests.small_checkpoints import write_small_checkpoint
from toolkit import artifact as artifacts
from toolkit import catalog
from toolkit.check import choose_length
from toolkit.checkpoint.config import Config
from toolkit.families import read_decoder

# Int4 moves a random model by a KL of 0.1; a wrong block by more than 1.
LIMITS = "check: {max_kl: 0.3, min_top1: 0.4}"
RECIPES = {
    "onnx": "quantization: {precision: int4, method: gptq, calibration_tokens: 1024}",
    "openvino": "quantization: {precision: int4, group_size: 32}",
}
PROPERTIES = {"onnx": {}, "openvino": {"ATTENTION_BACKEND": "SDPA"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("kind", RECIPES)
def test_build_and_check(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    recipe = tmp_path / f"tiny-small-{kind}.yaml"
    lines = [f"format: {kind}", "title: x", "model: phi-3-small-8k", "context_length: 384"]
    recipe.write_text("\n".join([*lines, RECIPES[kind], LIMITS]) + "\n")
    out = tmp_path / "out"
    built = run("build", str(recipe), "--checkpoint", str(checkpoint), "--out", str(out))
    assert built.returncode == 0, built.stderr
    artifact = out / recipe.stem
    assert (artifact / "tokenizer.json").is_file()
    assert not (artifact / "cl100k_base.tiktoken").exists()
    assert artifacts.read_manifest(artifact).runtime.properties == PROPERTIES[kind]
    asked = ("--artifact", str(artifact), "--prompt", "Hello", "--max-tokens", "4")
    said = subprocess.run(
        [sys.executable, "-m", "toolkit.runner", "generate", *asked],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    checked = run("check", str(artifact), "--checkpoint", str(checkpoint), "--weights")
    assert checked.returncode == 0, checked.stderr
    checked = run("check", str(artifact), "--checkpoint", str(checkpoint), "--json")
    assert checked.returncode == 0, checked.stderr
    lengths = next(one for one in events(checked) if one.get("name") == "lengths")
    assert lengths["measured"] == "agrees at 1 to 32 and 33 to 383 tokens"


def test_sequences_go_beyond_the_local_blocks() -> None:
    small = catalog.load_model("phi-3-small-8k")
    assert choose_length(read_decoder(Config(small.name, small.config))) == 2048
    other = catalog.load_model("phi-3-mini-4k")
    assert choose_length(read_decoder(Config(other.name, other.config))) == 512


@pytest.mark.parametrize("model", ["phi-3-small-8k", "phi-3-small-128k"])
@pytest.mark.parametrize("kind", ["mlx-4bit", "gguf-q4_0"])
def test_formats_without_it_say_what_can(tmp_path: Path, model: str, kind: str) -> None:
    recipe = tmp_path / "x.yaml"
    text = (Path(__file__).parents[2] / "recipes" / f"phi-3-mini-4k-{kind}.yaml").read_text("utf-8")
    recipe.write_text(text.replace("phi-3-mini-4k", model), encoding="utf-8")
    planned = run("plan", str(recipe), "--for", "mac-apple-silicon")
    assert planned.returncode == 6
    assert "block-sparse attention" in planned.stderr
    assert "onnx" in planned.stderr
