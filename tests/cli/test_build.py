"""`phiship build` and `check`: what they publish, what they refuse, what they leave behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.commands import events, run, start
from toolkit import artifact, catalog
from toolkit.artifact import read_manifest
from toolkit.errors import (
    ArtifactError,
    BuildError,
    CheckpointError,
    GateError,
    MissingExtraError,
    PlanError,
    UnsupportedError,
)

RECIPES = ["tiny-phi3-onnx-cpu-int4", "tiny-phi3-gguf-q4_0"]


def build(
    recipe: str, checkpoint: Path, out: Path, *more: str
) -> "subprocess.CompletedProcess[str]":
    """Run a build with JSON events."""
    return run("build", recipe, "--checkpoint", str(checkpoint), "--out", str(out), "--json", *more)


def leftovers(out: Path) -> list[str]:
    """Everything in the output folder."""
    return sorted(path.name for path in out.iterdir()) if out.exists() else []


@pytest.fixture
def copied(example: Path, tmp_path: Path) -> Path:
    """A copy of the bundled checkpoint, to damage."""
    return Path(shutil.copytree(example, tmp_path / "checkpoint"))


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_an_artifact_says_what_every_byte_is(kind: str, artifacts: dict[str, Path]) -> None:
    folder = artifacts[kind]
    manifest = read_manifest(folder)
    artifact.verify_files(folder, manifest.files)
    on_disk = {path.name for path in folder.iterdir()}
    assert on_disk == {file.path for file in manifest.files} | {artifact.MANIFEST}
    assert manifest.quality.checked
    assert all(measure.ok for measure in manifest.quality.measures)
    assert manifest.smoke is not None
    assert manifest.smoke.expect == "Paris"
    assert manifest.tools["phiship"]
    assert str(folder) not in (folder / artifact.MANIFEST).read_text("utf-8")


@pytest.mark.parametrize("recipe", RECIPES)
def test_building_twice_keeps_what_is_there_and_gives_equal_bytes(
    recipe: str, example: Path, tmp_path: Path
) -> None:
    first = build(recipe, example, tmp_path)
    assert first.returncode == 0, first.stderr + first.stdout
    manifest = read_manifest(tmp_path / recipe)
    again = build(recipe, example, tmp_path)
    assert [e["name"] for e in events(again) if e["event"] == "step"] == ["plan", "keep"]
    elsewhere = tmp_path / "elsewhere"
    assert build(recipe, example, elsewhere, "--workers", "2").returncode == 0
    assert read_manifest(elsewhere / recipe).files == manifest.files


def test_another_artifact_in_the_same_place_is_never_overwritten_unasked(
    example: Path, tmp_path: Path
) -> None:
    recipe = RECIPES[0]
    assert build(recipe, example, tmp_path).returncode == 0
    before = read_manifest(tmp_path / recipe)
    other = build(recipe, example, tmp_path, "--context", "256")
    assert other.returncode == ArtifactError.exit_code
    assert read_manifest(tmp_path / recipe) == before
    assert build(recipe, example, tmp_path, "--context", "256", "--replace").returncode == 0
    assert read_manifest(tmp_path / recipe).context_length == 256
    assert leftovers(tmp_path) == [recipe]


def test_without_its_check_an_artifact_says_so_and_token_ids_are_still_compared(
    example: Path, tmp_path: Path
) -> None:
    done = build(RECIPES[0], example, tmp_path, "--no-check")
    assert done.returncode == 0
    quality = read_manifest(tmp_path / RECIPES[0]).quality
    assert not quality.checked
    assert any("token" in measure.name for measure in quality.measures)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_missed_limit_publishes_nothing(recipe: str, example: Path, tmp_path: Path) -> None:
    from toolkit import catalog

    strict = (catalog.folder("recipes") / f"{recipe}.yaml").read_text("utf-8")
    lines = [line for line in strict.splitlines() if "max_kl" not in line]
    index = lines.index("check:")
    path = tmp_path / "strict.yaml"
    path.write_text("\n".join([*lines[: index + 1], "  max_kl: 0.0000001", *lines[index + 1 :]]))
    out = tmp_path / "out"
    done = build(str(path), example, out)
    assert done.returncode == GateError.exit_code, done.stdout
    assert "1e-07" in events(done)[-1]["message"]
    assert leftovers(out) == []


def test_check_finds_a_changed_byte_and_another_source(
    artifacts: dict[str, Path], example: Path, copied: Path, tmp_path: Path
) -> None:
    assert run("check", str(artifacts["onnx"]), "--checkpoint", str(example)).returncode == 0
    damaged = Path(shutil.copytree(artifacts["onnx"], tmp_path / "damaged"))
    with (damaged / "model.onnx.data").open("r+b") as stream:
        stream.seek(100_000)
        byte = stream.read(1)
        stream.seek(100_000)
        stream.write(bytes([byte[0] ^ 1]))
    assert run("check", str(damaged), "--checkpoint", str(example)).returncode == 10
    config = json.loads((copied / "config.json").read_text("utf-8"))
    (copied / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    other = run("check", str(artifacts["onnx"]), "--checkpoint", str(copied))
    assert other.returncode == CheckpointError.exit_code
    assert "not the checkpoint" in other.stderr


def edit_config(checkpoint: Path, **changes: Any) -> None:
    """Change fields of config.json."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}))


def set_weight(checkpoint: Path, value: int) -> None:
    """Overwrite one bf16 weight near the end of the file by its bits."""
    with (checkpoint / "model.safetensors").open("r+b") as stream:
        stream.seek(-3001 * 2, os.SEEK_END)
        stream.write(np.array([value], "<u2").tobytes())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("bits", "name"), [(0x7FC0, "NaN"), (0x7F80, "Inf"), (0xFF80, "minus Inf")]
)
def test_a_weight_that_is_not_finite_is_named(
    bits: int, name: str, recipe: str, copied: Path, tmp_path: Path
) -> None:
    set_weight(copied, bits)
    done = build(recipe, copied, tmp_path / "out", "--no-check")
    assert done.returncode == CheckpointError.exit_code, name
    assert "finite" in events(done)[-1]["message"]
    assert ".weight" in events(done)[-1]["message"]
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"num_hidden_layers": 5}, CheckpointError, "model.layers.4.input_layernorm"),
        ({"num_hidden_layers": 3}, CheckpointError, "nothing is dropped silently"),
        ({"vocab_size": 2000}, CheckpointError, "embed_tokens"),
        ({"architectures": ["PhiForCausalLM"]}, UnsupportedError, "Phi3ForCausalLM"),
        ({"rope_scaling": {"type": "yarn"}}, UnsupportedError, "yarn"),
        ({"hidden_size": "256"}, CheckpointError, "hidden_size"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    changes: dict[str, Any], kind: type[Exception], text: str, copied: Path, tmp_path: Path
) -> None:
    edit_config(copied, **changes)
    done = build(RECIPES[0], copied, tmp_path / "out")
    assert done.returncode == kind.exit_code  # type: ignore[attr-defined]
    assert text in events(done)[-1]["message"]
    assert leftovers(tmp_path / "out") == []


def test_a_truncated_file_is_refused(copied: Path, tmp_path: Path) -> None:
    path = copied / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    done = build(RECIPES[0], copied, tmp_path / "out")
    assert done.returncode == CheckpointError.exit_code
    assert "truncated" in events(done)[-1]["message"]


def test_a_block_that_does_not_divide_the_rows_is_refused_with_those_that_do(
    copied: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("format: gguf\ntitle: x\nmodel: tiny-phi3\nquantization: {precision: q4_0}\n")
    edit_config(copied, hidden_size=250)
    done = build(str(recipe), copied, tmp_path / "out")
    assert done.returncode in (CheckpointError.exit_code, PlanError.exit_code)


def test_a_full_disk_leaves_nothing(example: Path, tmp_path: Path) -> None:
    """A limit on file size stands for a full disk: the same error class, without a mount."""
    out = tmp_path / "out"
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from toolkit.cli import main; sys.argv[0] = 'phiship'; main()"
    )
    arguments = ["build", RECIPES[0], "--checkpoint", str(example), "--out", str(out), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == BuildError.exit_code, done.stderr
    assert "disk is full" in events(done)[-1]["message"]
    assert leftovers(out) == []


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(
    which: signal.Signals, tmp_path: Path, large_checkpoint: Path
) -> None:
    out = tmp_path / "out"
    process = start(
        "build", "phi-3-mini-4k-onnx-cpu-int4", "--checkpoint", str(large_checkpoint),
        "--out", str(out), "--no-check", "--workers", "2", "--json",
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:  # wait until workers are writing
        if json.loads(line)["event"] == "progress":
            break
    process.send_signal(which)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert leftovers(out) == []


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory, example: Path) -> Path:
    """A random checkpoint of mini's shape with few layers: large enough for several workers."""
    from tests.cli.commands import ROOT

    folder = tmp_path_factory.mktemp("large") / "checkpoint"
    subprocess.run(
        [sys.executable, str(ROOT / "bench" / "make_checkpoint.py"), "--layers", "2",
         "--out", str(folder), "--tokenizer", str(example)],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


def test_dead_builds_folders_are_cleared(example: Path, tmp_path: Path) -> None:
    stale = tmp_path / f".{RECIPES[0]}.999999999.partial"
    stale.mkdir()
    (stale / "model.onnx.data").write_bytes(b"half")
    assert build(RECIPES[0], example, tmp_path).returncode == 0
    assert leftovers(tmp_path) == [RECIPES[0]]


def test_a_missing_extra_says_what_to_install(example: Path, tmp_path: Path) -> None:
    """onnx hidden from the import system, as in an environment without the extra."""
    code = (
        "import sys; sys.modules['onnx'] = None;"
        "from toolkit.cli import main; sys.argv[0] = 'phiship'; main()"
    )
    arguments = ["build", RECIPES[0], "--checkpoint", str(example), "--out", str(tmp_path / "o")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == MissingExtraError.exit_code
    assert "pip install 'phiship[onnx]'" in done.stderr
    assert leftovers(tmp_path / "o") == []


def test_all_recipes_of_a_model_in_one_pass(example: Path, tmp_path: Path) -> None:
    """Each as it is alone; what is there already is kept, and so is what a kill left finished."""
    arguments = ["build", "--all", "--checkpoint", str(example), "--out", str(tmp_path)]
    formats = ["--format", "onnx", "--format", "gguf"]
    done = run(*arguments, *formats, "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    built = {e["name"]: Path(e["path"]) for e in events(done) if e["event"] == "artifact"}
    expected = [
        n for n in catalog.names("recipes") if n.startswith(("tiny-phi3-onnx", "tiny-phi3-gguf"))
    ]
    assert sorted(built) == expected
    alone = build(RECIPES[1], example, tmp_path / "alone")
    assert alone.returncode == 0
    found, one = read_manifest(built[RECIPES[1]]), read_manifest(tmp_path / "alone" / RECIPES[1])
    assert found.files == one.files
    shutil.rmtree(built[RECIPES[0]])
    again = events(run(*arguments, *formats, "--json"))
    steps = [e["name"] for e in again if e["event"] == "step"]
    assert [s for s in steps if s.startswith("keep")] == [
        f"keep: {name}" for name in expected if name != RECIPES[0]
    ]
    assert f"seal: {RECIPES[0]}" in steps


def test_one_artifact_that_fails_does_not_stop_the_others(copied: Path, tmp_path: Path) -> None:
    """A weight that float16 cannot hold: GGUF's scales cannot either, ONNX's float32 ones can."""
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = 8 + int.from_bytes(content[:8], "little")
    offset = start + header["model.layers.0.mlp.down_proj.weight"]["data_offsets"][0]
    content[offset : offset + 2] = (0x4F00).to_bytes(2, "little")  # 2^31
    path.write_bytes(content)
    out = tmp_path / "out"
    done = run(
        "build", "--all", "--format", "onnx", "--format", "gguf", "--no-check",
        "--checkpoint", str(copied), "--out", str(out), "--json",
    )  # fmt: skip
    assert done.returncode == BuildError.exit_code
    assert "3 of 4 artifacts were not built" in events(done)[-1]["message"]
    assert leftovers(out) == ["tiny-phi3-onnx-cpu-int4"]


def test_a_killed_build_is_gone_on_with(example: Path, tmp_path: Path) -> None:
    """Tasks that the killed build finished are not done again; the bytes are the same."""
    out = tmp_path / "out"
    process = start("build", RECIPES[0], "--checkpoint", str(example), "--out", str(out))
    journal = None
    while journal is None or len(journal.read_text().splitlines()) < 5:
        assert process.poll() is None, "the build ended before it could be killed"
        journal = next(iter(out.glob(".*.partial/.journal")), None)
    process.kill()
    process.wait()
    assert leftovers(out)[0].endswith(".partial")
    resumed_build = build(RECIPES[0], example, out)
    assert resumed_build.returncode == 0
    (convert,) = [e for e in events(resumed_build) if e.get("name") == "convert"]
    assert "a killed build had finished" in convert["measured"]
    assert leftovers(out) == [RECIPES[0]]
    assert build(RECIPES[0], example, tmp_path / "fresh").returncode == 0
    resumed, fresh = (read_manifest(f / RECIPES[0]).files for f in (out, tmp_path / "fresh"))
    assert resumed == fresh


@pytest.mark.parametrize("arguments", [[], ["--all", RECIPES[0]], ["--format", "onnx", RECIPES[0]]])
def test_one_recipe_or_all(arguments: list[str], example: Path) -> None:
    done = run("build", *arguments, "--checkpoint", str(example))
    assert done.returncode == 2


@pytest.mark.parametrize("kind", ["onnx", "gguf", "openvino", "mlx"])
def test_the_predicted_size_is_the_artifacts_rounded_up(
    kind: str, artifacts: dict[str, Path], example: Path
) -> None:
    manifest = read_manifest(artifacts[kind])
    planned = run("plan", manifest.name, "--checkpoint", str(example), "--json")
    (plan,) = [e for e in events(planned) if "artifact_bytes" in e]
    # The small files of the model with the largest ones are counted for this one of 4 layers.
    assert manifest.size_bytes <= int(plan["artifact_bytes"]) <= manifest.size_bytes + 2_000_000
