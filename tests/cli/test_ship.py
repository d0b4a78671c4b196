"""`phiship ship`, `deploy`, `probe`, `status` from end to end, on the embedded device."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import events, run
from tests.quality.sources import edit_json
from toolkit.artifact import read_manifest
from toolkit.errors import ArtifactError, PreflightError, SmokeError

RECIPES = [
    "tiny-phi3-onnx-cpu-int4",
    "tiny-phi3-gguf-q4_0",
    "tiny-phi3-openvino-int4",
    "tiny-phi3-mlx-4bit",
]

SHORTER = {"max_position_embeddings": 256, "original_max_position_embeddings": 256}


def step(done: object, name: str) -> dict[str, object]:
    """The event of one step of a report."""
    found = [e for e in events(done) if e["event"] == "step" and e["name"] == name]  # type: ignore[arg-type]
    assert len(found) == 1, f"{name}: {found}"
    return found[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_ship_converts_checks_pushes_and_gets_the_right_answer(
    recipe: str, example: Path, tmp_path: Path
) -> None:
    place = {"PHISHIP_EMBEDDED_ROOT": str(tmp_path / "device")}
    arguments = ["ship", str(example), "embedded", "--recipe", recipe, "--out", str(tmp_path)]
    done = run(*arguments, "--json", **place)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "Paris" in str(step(done, "smoke test")["measured"])
    assert step(done, "gate")["ok"]
    status = events(run("status", "embedded", "--json", **place))[-1]
    assert status["current"].startswith(recipe)
    again = run(*arguments, "--json", **place)
    assert again.returncode == 0
    assert "0 B sent" in str(step(again, "transfer")["measured"])


def test_ship_without_a_recipe_chooses_one_that_fits(example: Path, tmp_path: Path) -> None:
    place = {"PHISHIP_EMBEDDED_ROOT": str(tmp_path / "device")}
    done = run("ship", str(example), "embedded", "--out", str(tmp_path), "--json", **place)
    assert done.returncode == 0, done.stderr + done.stdout
    assert str(step(done, "choose recipe")["measured"]).startswith("tiny-phi3-")


def test_the_life_of_a_device(example: Path, tmp_path: Path) -> None:
    """Two releases, back, forth, and away."""
    place = {"PHISHIP_EMBEDDED_ROOT": str(tmp_path / "device")}

    def go(*words: str, code: int = 0) -> list[dict[str, Any]]:
        done = run(*words, "--json", **place)
        assert done.returncode == code, done.stderr + done.stdout
        return events(done)

    for recipe in RECIPES[:2]:
        go("build", recipe, "--checkpoint", str(example), "--out", str(tmp_path))
        plan = go("deploy", str(tmp_path / recipe), "embedded", "--dry-run")
        assert any(event.get("name") == "compare" for event in plan)
        go("deploy", str(tmp_path / recipe), "embedded", "--limit-rate", "100MB")
    first, second = (go("status", "embedded")[-1][key] for key in ("previous", "current"))
    go("rollback", "embedded")
    assert go("status", "embedded")[-1]["current"] == first
    go("rollback", "embedded", "--to", second)
    go("rollback", "embedded", "--to", "nothing", code=PreflightError.exit_code)
    happened = [event["what"] for event in go("history", "embedded")]
    assert happened == ["staged", "switching", "confirmed"] * 2 + ["switching", "confirmed"] * 2
    assert [event["event"] for event in go("logs", "embedded")] == ["logs"]
    assert go("unlock", "embedded")[-1]["holder"] is None
    go("uninstall", "embedded", "--yes")
    assert go("status", "embedded")[-1]["current"] is None


def test_uninstall_asks_first(tmp_path: Path) -> None:
    place = {"PHISHIP_EMBEDDED_ROOT": str(tmp_path / "device")}
    done = run("uninstall", "embedded", **place)
    assert done.returncode == 130
    assert "Remove every release from embedded" in done.stdout + done.stderr


def test_a_model_that_is_not_bundled_takes_a_recipe_for_any_model(
    example: Path, tmp_path: Path
) -> None:
    fine_tune = Path(shutil.copytree(example, tmp_path / "fine-tune"))
    edit_json(fine_tune / "config.json", lambda config: config.update(SHORTER))
    place = {"PHISHIP_EMBEDDED_ROOT": str(tmp_path / "device")}
    done = run("ship", str(fine_tune), "embedded", "--out", str(tmp_path), "--json", **place)
    assert done.returncode == 0, done.stdout
    manifest = read_manifest(tmp_path / "fine-tune-onnx-cpu-int4")
    assert manifest.source.model == "fine-tune"
    assert manifest.context_length == 256  # the recipe's is longer
    built = run("build", "gguf-q8_0", "--checkpoint", str(fine_tune), "--out", str(tmp_path))
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "fine-tune-gguf-q8_0").is_dir()


def test_a_wrong_answer_leaves_the_device_as_it_was(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    place = {"PHISHIP_EMBEDDED_ROOT": str(tmp_path / "device")}
    assert run("deploy", str(artifacts["onnx"]), "embedded", **place).returncode == 0
    before = events(run("status", "embedded", "--json", **place))[-1]
    wrong = run(
        "deploy", str(artifacts["gguf"]), "embedded", "--prompt", "What is 2 plus 2?",
        "--expect", "five", "--json", **place,
    )  # fmt: skip
    assert wrong.returncode == SmokeError.exit_code
    assert events(run("status", "embedded", "--json", **place))[-1]["current"] == before["current"]


def test_an_unchecked_artifact_is_deployed_only_when_told(example: Path, tmp_path: Path) -> None:
    place = {"PHISHIP_EMBEDDED_ROOT": str(tmp_path / "device")}
    build = ["build", RECIPES[0], "--checkpoint", str(example), "--out", str(tmp_path)]
    assert run(*build, "--no-check").returncode == 0
    folder = str(tmp_path / RECIPES[0])
    refused = run("deploy", folder, "embedded", **place)
    assert refused.returncode == ArtifactError.exit_code
    assert "--accept-unchecked" in refused.stderr
    assert run("deploy", folder, "embedded", "--accept-unchecked", **place).returncode == 0


def test_half_a_question_is_a_usage_error(artifacts: dict[str, Path]) -> None:
    done = run("deploy", str(artifacts["onnx"]), "embedded", "--prompt", "What?")
    assert done.returncode == 2
    assert "--expect" in done.stderr


def test_probe_shows_facts(tmp_path: Path) -> None:
    done = run("probe", "embedded", "--json", PHISHIP_EMBEDDED_ROOT=str(tmp_path / "device"))
    facts = events(done)[-1]
    assert facts["word_bits"] == 64
    assert facts["disk_free_bytes"] > 0
