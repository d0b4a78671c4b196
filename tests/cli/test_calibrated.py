"""`build --method gptq`: names, the manifest, other texts, a kill, what cannot be."""

import time
from pathlib import Path

import pytest

from tests.cli.commands import events, run, start
from toolkit.artifact import read_manifest
from toolkit.errors import ArtifactError, PlanError, SettingsError

RECIPE = "tiny-phi3-mlx-4bit"
NAME = f"{RECIPE}-gptq"
BUILD = ("build", RECIPE, "--method", "gptq", "--no-check", "--checkpoint")


def test_the_manifest_says_on_which_text(example: Path, tmp_path: Path) -> None:
    arguments = (*BUILD, str(example), "--out", str(tmp_path / "out"))
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "out" / NAME)
    assert manifest.name == NAME
    assert manifest.plan["quantization"]["method"] == "gptq"  # type: ignore[index]
    assert manifest.plan["quantization"]["equalize"] is True  # type: ignore[index]
    assert manifest.calibration is not None
    assert manifest.calibration.tokens == 8192
    (step,) = [e for e in events(done) if e.get("name") == "calibrate"]
    assert "8192 tokens" in step["measured"]
    kept = events(run(*arguments, "--json"))
    assert [e["name"] for e in kept if e["event"] == "step"] == ["plan", "keep"]

    other = tmp_path / "other.txt"
    other.write_text("All work and no play makes Jack a dull boy.\n" * 400)
    refused = run(*arguments, "--calibration", str(other))
    assert refused.returncode == ArtifactError.exit_code
    assert "another plan, source or calibration text made it" in refused.stderr
    changed = run(*arguments, "--calibration", str(other), "--replace")
    assert changed.returncode == 0
    found = read_manifest(tmp_path / "out" / NAME)
    assert found.calibration is not None
    assert found.calibration.text == "other.txt"
    assert found.calibration.digest != manifest.calibration.digest
    assert found.files != manifest.files


def test_a_killed_calibration_is_gone_on_with(example: Path, tmp_path: Path) -> None:
    """Killed at a layer boundary: the layers before it are not done again; the bytes are equal."""
    out = tmp_path / "out"
    arguments = (*BUILD, str(example), "--out", str(out))
    process = start(*arguments)
    state = None
    while state is None:
        assert process.poll() is None, "the build ended before it could be killed"
        state = next(iter(out.glob(".*.partial/.calibration-[12].npy")), None)
        time.sleep(0.001)
    process.kill()
    process.wait()
    resumed = run(*arguments, "--json")
    assert resumed.returncode == 0, resumed.stderr
    (convert,) = [e for e in events(resumed) if e.get("name") == "convert"]
    assert "a killed build had finished" in convert["measured"]
    assert [path.name for path in out.iterdir()] == [NAME]
    fresh = run(*BUILD, str(example), "--out", str(tmp_path / "fresh"))
    assert fresh.returncode == 0
    one, other = (read_manifest(folder / NAME).files for folder in (out, tmp_path / "fresh"))
    assert one == other


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("tiny-phi3-gguf-q8_0", "--method", "gptq"), "no codes of 6 bits or fewer"),
        (("tiny-phi3-openvino-int8", "--equalize"), "no codes of 6 bits or fewer"),
        (
            (RECIPE, "--method", "gptq", "--engine", "vendor"),
            "the vendor's engine chooses its own codes",
        ),
    ],
)
def test_what_has_no_codes_to_choose(
    arguments: tuple[str, ...], sentence: str, example: Path, tmp_path: Path
) -> None:
    done = run("build", *arguments, "--checkpoint", str(example), "--out", str(tmp_path / "out"))
    assert done.returncode == PlanError.exit_code
    assert sentence in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_text_that_cannot_be_used(example: Path, tmp_path: Path) -> None:
    text = tmp_path / "chats.jsonl"
    text.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n{"messages": 3}\n')
    out = tmp_path / "out"
    done = run(*BUILD, str(example), "--out", str(out), "--calibration", str(text))
    assert done.returncode == SettingsError.exit_code
    assert "chats.jsonl:2" in done.stderr
    assert not out.exists() or list(out.iterdir()) == []
