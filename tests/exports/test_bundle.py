"""Bundles for apps: what is in them, what is refused, and that their bytes repeat."""

import json
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from tests.deploy.sealed import seal_noise
from tests.exports.elsewhere import strip, write_genie
from toolkit.adopt import Wish, adopt
from toolkit.artifact import Vision, hash_file, read_manifest, write_manifest
from toolkit.bundle import MEMORY, PLATFORMS, bundle, choose_platform, list_memory
from toolkit.cli.exporting import PLATFORMS as OFFERED
from toolkit.cli.exporting import adopt_command, bundle_command
from toolkit.console import Console, format_bytes
from toolkit.errors import ArtifactError, UnsupportedError
from toolkit.preflight import rebuild_plan
from toolkit.progress import Bar
from toolkit.report import Report


def make(artifact: Path, out: Path, **options: object) -> Path:
    return bundle(artifact, out, Console(as_json=True), Report("bundle"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "platform", "words"),
    [
        ("onnx", "android", ("import ai.onnxruntime.genai.*", '"max_length", 512.0')),
        ("onnx", "ios", ("OGAGenerator", 'before = @"<|user|>"', "doubleValue:512")),
        ("onnx", "macos", ("OGAGenerator", "shasum -a 256 -c SHA256SUMS")),
        ("mlx", "ios", ("LLMModelFactory", "ChatSession(")),
        ("mlx", "macos", ("LLMModelFactory",)),
    ],
)
def test_a_bundle_has_the_artifact_sums_memory_and_howto(
    kind: str, platform: str, words: tuple[str, ...], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    artifact = artifacts[kind]
    folder = make(artifact, tmp_path / "out", platform=platform)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [folder.name]
    assert folder.name == f"{artifact.name}-{platform}"
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True)
    assert done.returncode == 0
    listed = {line[66:] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.relative_to(folder).as_posix() for path in (folder / "model").rglob("*")}
    howto = (folder / "HOWTO.md").read_text("utf-8")
    assert all(word in howto for word in words)
    assert "`<|end|>`" in howto
    assert "{{" not in howto


def test_the_memory_table_is_that_of_the_plans(artifacts: dict[str, Path], tmp_path: Path) -> None:
    manifest = read_manifest(artifacts["onnx"])
    table = dict(list_memory(artifacts["onnx"], manifest))
    assert list(table) == [256, 512]
    assert table[512] == manifest.device_memory_bytes
    plan = rebuild_plan(manifest)
    assert plan
    assert table[512] - table[256] == 256 * plan.needs.kv_bytes_per_token
    folder = make(artifacts["onnx"], tmp_path)
    assert f"| 256 | {format_bytes(table[256])} |" in (folder / MEMORY).read_text("utf-8")


def test_the_memory_table_of_an_adopted_artifact(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    source = strip(artifacts["mlx"], tmp_path / "source")
    console, report = Console(as_json=True), Report("")
    folder = adopt(source, tmp_path / "build", Wish(provider="cpu"), console, report)
    table = dict(list_memory(folder, read_manifest(folder)))
    own = dict(list_memory(artifacts["mlx"], read_manifest(artifacts["mlx"])))
    # A safetensors header is counted beside the weights.
    assert all(0 <= table[context] - own[context] < 60_000 for context in (256, 512))


def test_a_zip_has_the_same_bytes_every_time(artifacts: dict[str, Path], tmp_path: Path) -> None:
    paths = [make(artifacts["onnx"], tmp_path / name, as_zip=True) for name in ("a", "b")]
    assert hash_file(paths[0]) == hash_file(paths[1])
    folder = make(artifacts["onnx"], tmp_path / "c")
    with zipfile.ZipFile(paths[0]) as archive:
        assert archive.testzip() is None
        found = {name: archive.read(name) for name in archive.namelist()}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert found == {
        path.relative_to(folder.parent).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("kind", "platform", "text"),
    [
        ("gguf", "android", "it is gguf/cpu; android runs onnx/cpu, genie/npu"),
        ("mlx", "android", "it is mlx/metal; android runs onnx/cpu"),
        ("openvino", None, "it is openvino/cpu; android runs .*; ios runs .*; macos runs"),
    ],
)
def test_what_a_platform_cannot_run(
    kind: str, platform: str | None, text: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=text):
        make(artifacts[kind], tmp_path / "out", platform=platform)
    assert not (tmp_path / "out").exists()


def test_a_cuda_artifact_is_for_no_app(tmp_path: Path) -> None:
    folder = seal_noise(tmp_path / "noise")
    manifest = read_manifest(folder)
    runtime = msgspec.structs.replace(manifest.runtime, provider="cuda")
    with pytest.raises(UnsupportedError, match="it is onnx/cuda"):
        choose_platform(msgspec.structs.replace(manifest, runtime=runtime), None)


def test_an_artifact_that_sees_is_for_no_app(tmp_path: Path) -> None:
    manifest = read_manifest(seal_noise(tmp_path / "noise"))
    vision = Vision(image_size=336, side=12, crops=16, mean=(0, 0, 0), std=(1, 1, 1))
    sees = msgspec.structs.replace(manifest, format="mlx", vision=vision)
    with pytest.raises(UnsupportedError, match="it reads pictures; what an app loads MLX with"):
        choose_platform(sees, None)
    sees = msgspec.structs.replace(manifest, format="onnx", vision=vision)
    with pytest.raises(UnsupportedError, match="it reads pictures, of which a bundle's how-to"):
        choose_platform(sees, None)


def test_nothing_half_written_is_left(artifacts: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    noise = seal_noise(tmp_path / "noise")  # its memory is in no plan, and its files tell nothing
    for as_zip in (False, True):
        with pytest.raises(ArtifactError):
            make(noise, out, as_zip=as_zip)
    assert list(out.iterdir()) == []
    make(artifacts["onnx"], out)
    with pytest.raises(ArtifactError, match="exists"):
        make(artifacts["onnx"], out)


def test_damaged_and_unchecked_artifacts(artifacts: dict[str, Path], tmp_path: Path) -> None:
    folder = strip(artifacts["onnx"], tmp_path / "copy")
    manifest = read_manifest(artifacts["onnx"])
    unchecked = msgspec.structs.replace(manifest.quality, checked=False)
    write_manifest(folder, msgspec.structs.replace(manifest, quality=unchecked))
    with pytest.raises(ArtifactError, match="sealed as unchecked"):
        make(folder, tmp_path / "out")
    made = make(folder, tmp_path / "out", accept_unchecked=True)
    assert "Sealed as unchecked" in (made / "HOWTO.md").read_text("utf-8")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: found 2 bytes, other content"):
        make(folder, tmp_path / "other", accept_unchecked=True)


class Meddler(Console):
    """Changes a file between its verification and its copy."""

    def __init__(self, path: Path) -> None:
        super().__init__(as_json=True)
        self._path = path

    @contextmanager
    def progress(self, label: str, total_bytes: int) -> Iterator[Bar]:
        if label == "bundle":
            self._path.write_bytes(b"x" * self._path.stat().st_size)
        with super().progress(label, total_bytes) as bar:
            yield bar


def test_the_sums_are_the_manifests_not_those_of_the_copy(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    for as_zip in (False, True):
        artifact = tmp_path / f"artifact-{as_zip}"
        shutil.copytree(artifacts["onnx"], artifact)
        meddler = Meddler(artifact / "tokenizer.json")
        made = bundle(artifact, tmp_path / "out", meddler, Report("bundle"), as_zip=as_zip)
        if as_zip:
            shutil.unpack_archive(made, tmp_path / "unpacked")
            made = tmp_path / "unpacked" / made.stem
        done = subprocess.run(
            ["sha256sum", "-c", "SHA256SUMS"], cwd=made, capture_output=True, text=True
        )
        assert [line for line in done.stdout.splitlines() if not line.endswith(": OK")] == [
            "model/tokenizer.json: FAILED"
        ]


def test_a_genie_bundle_is_for_android(example: Path, tmp_path: Path) -> None:
    source = write_genie(example, tmp_path / "genie")
    wish, console = Wish(tokenizer=example), Console(as_json=True)
    folder = adopt(source, tmp_path / "build", wish, console, Report(""))
    made = make(folder, tmp_path / "out", accept_unchecked=True)
    assert made.name == "genie-android"
    assert "genie-t2t-run -c genie_config.json" in (made / "HOWTO.md").read_text("utf-8")


def test_the_commands(artifacts: dict[str, Path], tmp_path: Path) -> None:
    assert set(OFFERED) == set(PLATFORMS)
    source = strip(artifacts["onnx"], tmp_path / "source")
    arguments = [str(source), "--out", str(tmp_path / "build"), "--name", "mine", "--json"]
    done = CliRunner().invoke(adopt_command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    last = json.loads(done.output.splitlines()[-1])
    assert last == {"event": "adopted", "path": str(tmp_path / "build" / "mine")}
    arguments = [last["path"], "--platform", "android", "--zip", "--accept-unchecked"]
    done = CliRunner().invoke(
        bundle_command, [*arguments, "--out", str(tmp_path / "bundles")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert (tmp_path / "bundles" / "mine-android.zip").is_file()
