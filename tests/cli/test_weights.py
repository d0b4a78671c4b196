"""`phiship check --weights`: what it shows, what it writes, and that no runtime takes part."""

import json
import shutil
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.checkpoints import write_random_checkpoint
from toolkit import artifact, catalog
from toolkit.build import build
from toolkit.check import Asked, check_artifact
from toolkit.checkpoint import Checkpoint
from toolkit.cli.building import check_command
from toolkit.console import Console
from toolkit.errors import ArtifactError
from toolkit.job import Options
from toolkit.quality.details import Details
from toolkit.quality.texts import digest_ids
from toolkit.report import Report
from toolkit.weights import RUNTIME, check_weights

RUNTIMES = ("onnxruntime", "onnxruntime_genai", "openvino_genai", "openvino_tokenizers",
            "transformers", "mlx_lm", "xllamacpp")  # fmt: skip
MATRICES = 18  # embedding, head, four in each of four layers


def check(folder: Path, example: Path, details: Path | None = None) -> Report:
    """Check an artifact's weights in this process."""
    report = Report("")
    asked = Asked(None, 256, 128, details)
    check_weights(folder, str(example), Console(), report, asked)
    return report


def run(folder: Path, example: Path, *more: str) -> Result:
    """Run the command in this process."""
    arguments = [str(folder), "--checkpoint", str(example), "--weights", *more]
    return CliRunner(env={"COLUMNS": "120"}).invoke(check_command, arguments)


def read_details(path: Path) -> Details:
    return msgspec.json.decode(path.read_bytes(), type=Details)


def test_it_needs_no_runtime(
    artifacts: dict[str, Path], example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The readers of all formats do without: tests/quality/test_weightonly.py."""
    folder = artifacts["gguf"]
    for module in RUNTIMES:
        monkeypatch.setitem(sys.modules, module, None)
    report = check(folder, example)
    assert report.ok
    assert [step.name for step in report.steps] == [
        "files",
        "source",
        "text",
        "weights",
        "matrices",
    ]


def test_every_matrix_is_an_event(artifacts: dict[str, Path], example: Path) -> None:
    done = run(artifacts["onnx"], example, "--tokens", "256", "--json")
    assert done.exit_code == 0, done.output
    events = [json.loads(line) for line in done.output.splitlines()]
    matrices = [event for event in events if event["event"] == "matrix"]
    assert len(matrices) == MATRICES
    assert max(matrices, key=lambda event: event["kl"])["name"] == "lm_head.weight"
    (weights,) = [event for event in events if event["event"] == "weights"]
    found = {measure["name"]: measure["value"] for measure in weights["measures"]}
    # What each costs alone adds up to what all cost, on another part of the text.
    assert found["mean KL"] == pytest.approx(sum(event["kl"] for event in matrices), rel=0.5)


def test_the_terminal_shows_the_worst(artifacts: dict[str, Path], example: Path) -> None:
    done = run(artifacts["onnx"], example, "--tokens", "128")
    assert "the worst 15 of 18" in done.output
    rows = [line.split() for line in done.output.splitlines() if line.strip().endswith("%")]
    rows = [row for row in rows if "." in row[0] or row[0] == "lm_head"]
    assert len(rows) == 15
    assert rows[0][0] == "lm_head"
    kls = [float(row[3]) for row in rows]
    assert kls == sorted(kls, reverse=True)


def test_a_file_of_its_own_has_tokens_and_matrices(
    artifacts: dict[str, Path], example: Path, tmp_path: Path
) -> None:
    path = tmp_path / "details.json"
    check(artifacts["gguf"], example, path)
    details = read_details(path)
    assert details.runtime == RUNTIME
    assert len(details.tensors) == MATRICES
    assert len(details.kl) == sum(details.sequences) == 256
    assert np.mean(details.kl) == pytest.approx(details.summary["mean KL"])


def test_matrices_go_into_the_file_of_a_check(
    artifacts: dict[str, Path], example: Path, tmp_path: Path
) -> None:
    path, console = tmp_path / "details.json", Console()
    asked = Asked(None, 256, 128, path)
    check_artifact(artifacts["onnx"], str(example), console, Report(""), asked)
    before = read_details(path)
    assert before.tensors == ()
    check(artifacts["onnx"], example, path)
    after = read_details(path)
    assert len(after.tensors) == MATRICES
    assert msgspec.structs.replace(after, tensors=()) == before
    assert before.runtime != RUNTIME
    check_artifact(artifacts["onnx"], str(example), console, Report(""), asked)
    assert read_details(path) == after  # they stay there
    other = msgspec.structs.replace(after, text_digest="of another text", tensors=())
    path.write_bytes(msgspec.json.encode(other))
    check(artifacts["onnx"], example, path)
    assert read_details(path).runtime == RUNTIME  # another text's file is not added to either
    assert read_details(path).text_digest == before.text_digest
    check(artifacts["gguf"], example, path)  # another artifact's file is not added to
    assert read_details(path).artifact == "tiny-phi3-gguf-q4_0"


def test_an_equalized_artifact_has_its_factors_undone(example: Path, tmp_path: Path) -> None:
    recipe = catalog.load_recipe("tiny-phi3-mlx-4bit")
    quantization = msgspec.structs.replace(
        recipe.quantization, equalize=True, calibration_tokens=128
    )
    recipe = msgspec.structs.replace(recipe, name="x", quantization=quantization)
    checkpoint, options = Checkpoint.open(example), Options(check=False)
    folder = build(recipe, checkpoint, tmp_path, options, Console(), Report(""))
    table = check_weights(folder, str(example), Console(), Report(""), Asked(None, 128, 128))
    total = sum(error.kl or 0.0 for error in table.errors)
    assert total == pytest.approx(table.whole_kl, rel=0.3)
    assert max(error.relative_error for error in table.errors) < 0.1


@pytest.mark.parametrize(
    ("variant", "factors", "last", "mark"),
    [("window", None, 32, ""), ("longrope", "long", 50, "-long-rope")],
)
def test_the_texts_digest_says_what_was_compared(
    variant: str, factors: str | None, last: int, mark: str, tmp_path: Path
) -> None:
    source = write_random_checkpoint(tmp_path / "source", variant)
    recipe = catalog.load_recipe("tiny-phi3-mlx-4bit")
    recipe = msgspec.structs.replace(recipe, name="x", rope_factors=factors)
    checkpoint, options = Checkpoint.open(source), Options(check=False)
    folder = build(recipe, checkpoint, tmp_path, options, Console(), Report(""))
    path = tmp_path / "details.json"
    check_weights(folder, str(source), Console(), Report(""), Asked(None, 100, 50, path))
    details = read_details(path)
    assert details.sequences == (last, last)
    assert len(details.kl) == 2 * last
    sequences = (details.ids[:last], details.ids[last:])
    assert details.text_digest == digest_ids(sequences) + mark


def test_weights_that_are_not_numbers_are_said_to_be(
    artifacts: dict[str, Path], example: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(artifacts["onnx"], tmp_path / "copy"))
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\xff" * 4096)  # scales of the head: NaN
    manifest = artifact.read_manifest(folder)
    changed = msgspec.structs.replace(manifest, files=artifact.list_files(folder))
    artifact.write_manifest(folder, changed)
    with pytest.raises(ArtifactError, match="the artifact's logits hold NaN or infinity"):
        check(folder, example)


def test_a_damaged_artifact_is_refused(
    artifacts: dict[str, Path], example: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(artifacts["onnx"], tmp_path / "copy"))
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\0" * 8)
    with pytest.raises(ArtifactError, match="bytes, other content"):
        check(folder, example)
