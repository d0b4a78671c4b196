"""Pushing with the real adb program and its server, to a phone that speaks adb's protocol."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.deploy.sealed import seal_noise
from tests.exports.adbd import TMP, Phone
from toolkit import adb
from toolkit.adb import Folders, find_phone, push_with_adb
from toolkit.artifact import read_manifest, verify_files, write_manifest
from toolkit.console import Console
from toolkit.deploy import Push
from toolkit.errors import ArtifactError, PreflightError, RunnerError, UnreachableError
from toolkit.report import Report

ADB = shutil.which("adb")
needs_adb = pytest.mark.skipif(not ADB, reason="adb is not installed")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An adb server of this test's own, with its own keys."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    yield
    subprocess.run([str(ADB), "kill-server"], check=False, capture_output=True)


@pytest.fixture
def phone(tmp_path: Path, server: None) -> Iterator[Phone]:
    made = Phone(tmp_path / "phone")
    connect(made)
    yield made
    made.stop()


def connect(phone: Phone, *, is_trusted: bool = True) -> None:
    address = f"127.0.0.1:{phone.port}"
    waiting = [["-s", address, "wait-for-device"]] if is_trusted else []
    for command in (["disconnect", address], ["connect", address], *waiting):
        subprocess.run([str(ADB), *command], check=False, capture_output=True, timeout=60)


def lie_there(phone: Phone, name: str = "noise-0") -> Path:
    return phone.tmp / "phiship" / name


def run(folder: Path, console: Console, **options: object) -> Report:
    report = Report("adb")
    push_with_adb(folder, console, report=report, **options)  # type: ignore[arg-type]
    return report


@needs_adb
def test_a_push_arrives_and_again_sends_nothing(
    phone: Phone, tmp_path: Path, console: Console
) -> None:
    folder = seal_noise(tmp_path / "noise")
    report = run(folder, console)
    assert [step.name for step in report.steps] == [
        "check artifact", "connect", "compare", "preflight", "transfer", "switch",
    ]  # fmt: skip
    assert report.steps[1].measured == "Pixel 8, Android 14, arm64-v8a"
    there = lie_there(phone)
    verify_files(there, read_manifest(there).files)
    assert [path.name for path in there.parent.iterdir()] == ["noise-0"]
    phone.received.clear()
    again = run(folder, console)
    assert phone.received == []
    assert again.steps[2].measured == "0 of 4 files to send, 0 B"


@needs_adb
def test_it_says_what_an_app_has_to_load(phone: Phone, tmp_path: Path, console: Console) -> None:
    """No runner of ours is there to do so."""
    folder = seal_noise(tmp_path / "noise")
    manifest = read_manifest(folder)
    properties = {"adapter": "adapter.onnx_adapter"}
    runtime = msgspec.structs.replace(manifest.runtime, properties=properties)
    write_manifest(folder, msgspec.structs.replace(manifest, runtime=runtime))
    text = "; an app has to load it with adapter adapter.onnx_adapter"
    assert run(folder, console).steps[0].measured.endswith(text)
    plain = run(seal_noise(tmp_path / "plain", seed=1), console)
    assert "an app has to" not in plain.steps[0].measured


@needs_adb
def test_only_what_changed_is_sent(phone: Phone, tmp_path: Path, console: Console) -> None:
    run(seal_noise(tmp_path / "noise"), console)
    phone.received.clear()
    shutil.rmtree(tmp_path / "noise")
    folder = seal_noise(tmp_path / "noise", memory_bytes=2_000_000)
    run(folder, console)
    assert [Path(path).name for path in phone.received] == ["manifest.json"]
    there = lie_there(phone)
    assert read_manifest(there).device_memory_bytes == 2_000_000
    verify_files(there, read_manifest(there).files)
    assert [path.name for path in there.parent.iterdir()] == ["noise-0"]


@needs_adb
def test_a_push_that_was_cut_off_goes_on(phone: Phone, tmp_path: Path, console: Console) -> None:
    folder = seal_noise(tmp_path / "noise")
    phone.faults.break_after_files = 2
    with pytest.raises(UnreachableError, match="the connection through adb broke"):
        run(folder, console)
    assert not lie_there(phone).exists()
    phone.faults.break_after_files = None
    connect(phone)
    report = run(folder, console)
    assert len(phone.received) == 4
    assert report.steps[2].measured.startswith("2 of 4 files to send")
    verify_files(lie_there(phone), read_manifest(folder).files)


@needs_adb
def test_leftovers_of_another_version_are_removed(
    phone: Phone, tmp_path: Path, console: Console
) -> None:
    folder = seal_noise(tmp_path / "noise")
    growing = phone.tmp / "phiship" / ".noise-0.partial"
    (growing / "weights 1" / "part").mkdir(parents=True)
    (growing / "weights 1" / "part" / "old.bin").write_bytes(b"old")
    (growing / "-old.bin").write_bytes(b"old")
    (growing / "manifest.json").mkdir()
    run(folder, console, push=Push(dry_run=True))
    assert len(list(growing.iterdir())) == 3
    run(folder, console)
    there = lie_there(phone)
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in there.iterdir()) == names
    verify_files(there, read_manifest(there).files)


@needs_adb
def test_what_a_cut_off_push_left_goes_when_nothing_is_missing(
    phone: Phone, tmp_path: Path, console: Console
) -> None:
    folder = seal_noise(tmp_path / "noise")
    run(folder, console)
    growing = phone.tmp / "phiship" / ".noise-0.partial"
    growing.mkdir()
    (growing / "old.bin").write_bytes(b"old")
    phone.received.clear()
    run(folder, console)
    assert phone.received == []
    assert [path.name for path in growing.parent.iterdir()] == ["noise-0"]


@needs_adb
def test_a_dry_run_changes_nothing(phone: Phone, tmp_path: Path, console: Console) -> None:
    run(seal_noise(tmp_path / "noise"), console, push=Push(dry_run=True))
    assert list(phone.tmp.iterdir()) == []


@needs_adb
def test_a_full_phone(phone: Phone, tmp_path: Path, console: Console) -> None:
    phone.faults.full_after_bytes = 100_000
    with pytest.raises(PreflightError, match="its disk is full"):
        run(seal_noise(tmp_path / "noise"), console)
    assert not lie_there(phone).exists()


@needs_adb
def test_what_arrives_damaged(phone: Phone, tmp_path: Path, console: Console) -> None:
    phone.faults.spoil = True
    with pytest.raises(RunnerError, match="arrived with another content"):
        run(seal_noise(tmp_path / "noise"), console)
    assert not lie_there(phone).exists()
    phone.faults.spoil = False
    run(seal_noise(tmp_path / "again"), console)
    verify_files(lie_there(phone), read_manifest(lie_there(phone)).files)


@needs_adb
def test_too_little_memory(phone: Phone, tmp_path: Path, console: Console) -> None:
    folder = seal_noise(tmp_path / "noise", memory_bytes=9_000_000_000)
    with pytest.raises(PreflightError, match=r"it has 8\.19 GB of memory; noise 0 takes 9 GB"):
        run(folder, console)
    assert phone.received == []


@needs_adb
def test_an_unchecked_artifact(phone: Phone, tmp_path: Path, console: Console) -> None:
    folder = seal_noise(tmp_path / "noise", checked=False)
    with pytest.raises(ArtifactError, match="sealed as unchecked"):
        run(folder, console)
    run(folder, console, push=Push(accept_unchecked=True))
    assert lie_there(phone).is_dir()


@needs_adb
def test_no_phone(server: None) -> None:
    with pytest.raises(UnreachableError, match="adb sees no device; it sees none"):
        find_phone(str(ADB), None)


@needs_adb
def test_several_phones(phone: Phone, tmp_path: Path) -> None:
    other = Phone(tmp_path / "other")
    connect(other)
    with pytest.raises(UnreachableError, match=r"several devices: 127\.0\.0\.1:\d+ \(device\), "):
        find_phone(str(ADB), None)
    serial = f"127.0.0.1:{other.port}"
    assert find_phone(str(ADB), serial).serial == serial
    with pytest.raises(UnreachableError, match="adb sees no device nobody"):
        find_phone(str(ADB), "nobody")
    other.stop()


@needs_adb
def test_a_phone_that_does_not_trust_us(tmp_path: Path, server: None) -> None:
    made = Phone(tmp_path / "phone")
    made.faults.is_unauthorized = True
    connect(made, is_trusted=False)
    with pytest.raises(UnreachableError, match="adb says it is unauthor") as caught:
        find_phone(str(ADB), None)
    assert "allow USB debugging" in caught.value.advice
    made.stop()


def test_no_adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in adb.HOMES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PreflightError, match="adb is not installed"):
        run(seal_noise(tmp_path / "noise"), console)


@pytest.mark.parametrize(
    ("name", "safe"), [("a b; rm -rf ~", "a-b-rm--rf-"), ("../x", "x"), ("..", "artifact")]
)
def test_folders_are_safe(name: str, safe: str) -> None:
    folders = Folders.of(name)
    assert folders.final == f"{TMP}/phiship/{safe}"
    assert folders.growing == f"{TMP}/phiship/.{safe}.partial"


def test_how_a_phone_is_named() -> None:
    assert adb.names_phone("adb")
    assert adb.names_phone("adb:10.0.0.7:5555")
    assert not adb.names_phone("adbox")
    assert adb.read_serial("adb") is None
    assert adb.read_serial("adb:10.0.0.7:5555") == "10.0.0.7:5555"
