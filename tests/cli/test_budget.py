"""`phiship build --max-size` and `--max-kl`: what is built, what is refused."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from toolkit.artifact import read_manifest
from toolkit.cli.building import build_command
from toolkit.errors import PlanError


def build(recipe: str, checkpoint: Path, out: Path, *more: str) -> Result:
    """Run a build in this process."""
    arguments = [recipe, "--checkpoint", str(checkpoint), "--out", str(out), *more]
    return CliRunner().invoke(build_command, arguments)


def test_a_size_is_kept_and_the_manifest_says_how(example: Path, tmp_path: Path) -> None:
    name = "tiny-phi3-gguf-q4_0"
    done = build(name, example, tmp_path, "--max-size", "2.6MB", "--json")
    assert done.exit_code == 0, done.output
    manifest = read_manifest(tmp_path / name)
    (mix,) = [event for event in map(json.loads, done.output.splitlines()) if "gate_kl" in event]
    assert manifest.size_bytes <= mix["size_bytes"] <= 2_600_000
    overrides = manifest.plan["quantization"]["overrides"]  # type: ignore[index]
    assert overrides == mix["overrides"]
    assert {"q5_k", "q6_k"} & set(overrides.values())
    measured = {measure.name: measure.value for measure in manifest.quality.measures}
    # The runtime's own rounding (measured 1e-4), and sequences of 256 tokens instead of 128.
    assert measured["mean KL"] == pytest.approx(mix["gate_kl"], rel=0.25)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("tiny-phi3-gguf-q4_0", ["--max-size", "1MB", "--max-kl", "0.1"],
         "give either --max-size or --max-kl"),
        ("--all", ["--max-size", "1GB"], "--max-size and --max-kl go with one RECIPE"),
        ("tiny-phi3-gguf-q4_0", ["--max-kl", "0"], "0.0 is not in the range x>0"),
        ("tiny-phi3-gguf-q4_0", ["--max-size", "much"], "got 'much'"),
    ],
)  # fmt: skip
def test_options_that_contradict_are_refused(
    recipe: str, options: list[str], message: str, example: Path, tmp_path: Path
) -> None:
    done = build(recipe, example, tmp_path, *options)
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize(
    ("recipe", "options", "message", "advice"),
    [
        ("tiny-phi3-gguf-q4_0", ["--max-size", "1MB"],
         "--max-size 1 MB: the smallest mix of tiny-phi3-gguf-q4_0 takes 2", "give --max-size 2"),
        ("tiny-phi3-gguf-q8_0", ["--max-size", "1GB"], "it leaves no type to choose", ""),
        ("tiny-phi3-mlx-4bit", ["--max-kl", "0.1", "--engine", "vendor"],
         "engine: got vendor, which takes no overrides", "--engine native"),
        ("tiny-phi3-mlx-4bit", ["--max-kl", "1e-7"],
         "--max-kl 1e-07: the finest mix of tiny-phi3-mlx-4bit, ", "give --max-kl "),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_is_refused(
    recipe: str, options: list[str], message: str, advice: str, example: Path, tmp_path: Path
) -> None:
    done = build(recipe, example, tmp_path, *options)
    assert isinstance(done.exception, PlanError)
    assert message in str(done.exception)
    assert advice in done.exception.advice
    assert not list(tmp_path.iterdir())
