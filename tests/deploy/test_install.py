"""Runtimes on a device, from wheels that are there as blobs: real pip, real environments."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.deploy.wheelhouse import find_pip, make_wheel, serve
from toolkit.device import Facts
from toolkit.errors import PreflightError
from toolkit.runner.agent.facts import read_facts
from toolkit.runner.agent.install import find_runtimes, install_runtime
from toolkit.runner.agent.layout import QUOTA_VARIABLE, Layout, open_layout
from toolkit.runner.agent.releases import find_runtime, recover
from toolkit.runner.failure import Failure
from toolkit.wheels.collect import collect_wheels

ENGINE = "llama_cpp"
MODULE = "xllamacpp"  # of that engine: tiny wheels take its name
RUNTIME = "tiny-1.0-0123456789ab"
# An agent that does one thing and can be killed: the arguments are a root and a request.
AGENT = """
import json, sys
from toolkit.runner.agent.install import install_runtime
from toolkit.runner.agent.layout import open_layout
print(json.dumps(install_runtime(open_layout(sys.argv[1]), **json.loads(sys.argv[2]))))
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return open_layout(str(tmp_path / "device"))


def push(layout: Layout, *paths: Path) -> dict[str, str]:
    """Put files on the device as blobs, pip's wheel too; sha256 by name."""
    hashes = {}
    for path in (*paths, find_pip()):
        hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, layout.find_blob(hashes[path.name]))
    return hashes


def make_engine(folder: Path, code: str = "", **other: object) -> Path:
    return make_wheel(folder, MODULE, code=f"import tiny_part\n{code}", **other)  # type: ignore[arg-type]


@pytest.fixture
def wheels(layout: Layout, tmp_path: Path) -> dict[str, str]:
    """An engine and what it needs, on the device."""
    return push(layout, make_engine(tmp_path), make_wheel(tmp_path, "tiny_part"))


def run_python(path: str, program: str) -> str:
    done = subprocess.run([path, "-c", program], text=True, capture_output=True, check=True)
    return done.stdout.strip()


def list_all(layout: Layout) -> list[str]:
    return sorted(path.name for path in layout.runtimes.iterdir())


def fail(layout: Layout, wheels: dict[str, str], runtime: str = RUNTIME) -> Failure:
    """Install in vain: nothing stays of it."""
    before = list_all(layout)
    with pytest.raises(Failure) as caught:
        install_runtime(layout, runtime, wheels, ENGINE)
    assert list_all(layout) == before
    return caught.value


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A device with a runtime; the wheels are gone, as prune leaves it. Not to be changed."""
    folder = tmp_path_factory.mktemp("installed")
    layout = open_layout(str(folder / "device"))
    wheels = push(layout, make_engine(folder), make_wheel(folder, "tiny_part"))
    assert install_runtime(layout, RUNTIME, wheels, ENGINE)["created"] is True
    for sha256 in wheels.values():
        layout.find_blob(sha256).unlink()
    return layout


def test_runtime_is_used_by_its_python(installed: Layout) -> None:
    assert list_all(installed) == [RUNTIME]
    folder = find_runtime(installed, RUNTIME)
    assert "wheels" not in [path.name for path in folder.iterdir()]
    # Its Python finds its packages, and no others, where the folder is now.
    python = str(folder / "bin" / "python")
    found = run_python(python, f"import {MODULE}; print({MODULE}.__file__)")
    assert found.startswith(str(folder))
    assert run_python(python, "import sys; print(sys.prefix)") == str(folder)
    with pytest.raises(subprocess.CalledProcessError):
        run_python(python, "import pip")
    lines = (folder / "pyvenv.cfg").read_text("utf-8").splitlines()
    settings = dict(line.split(" = ", 1) for line in lines)
    assert settings["include-system-site-packages"] == "false"
    assert (Path(settings["home"]) / "python3").exists()
    # The bytecode of what was imported is there before anybody is told that it is done.
    packages = [path.parent.parent.name for path in folder.rglob("*.pyc")]
    assert sorted(packages) == ["tiny_part", MODULE]


def test_runtime_that_is_there_stays(installed: Layout) -> None:
    number = find_runtime(installed, RUNTIME).stat().st_ino
    names = ["xllamacpp-1.0-py3-none-any.whl", find_pip().name]
    again = install_runtime(installed, RUNTIME, dict.fromkeys(names, "0" * 64), ENGINE)
    assert again["created"] is False
    assert (again["engine"]["importable"], again["engine"]["version"]) == (True, "1.0")
    assert again["path"] == str(find_runtime(installed, RUNTIME))
    assert find_runtime(installed, RUNTIME).stat().st_ino == number


def test_runtime_survives_a_move_of_the_root(installed: Layout, tmp_path: Path) -> None:
    shutil.copytree(installed.base, tmp_path / "moved" / "v1", symlinks=True)
    python = tmp_path / "moved" / "v1" / "runtimes" / RUNTIME / "bin" / "python"
    found = run_python(str(python), f"import {MODULE}; print({MODULE}.__file__)")
    assert found.startswith(str(tmp_path / "moved"))


def test_list_of_runtimes(installed: Layout, layout: Layout) -> None:
    assert find_runtimes(layout) == {"runtimes": {}}
    (layout.runtimes / "no-record").mkdir()
    shutil.copytree(find_runtime(installed, RUNTIME), layout.runtimes / RUNTIME, symlinks=True)
    shutil.copytree(find_runtime(installed, RUNTIME), layout.runtimes / ".half.tmp", symlinks=True)
    expected = {
        "packages": {MODULE: "1.0", "tiny-part": "1.0"},
        "python": sys.executable,
        "python_version": ".".join(str(number) for number in sys.version_info[:3]),
        "usable": True,
    }
    assert find_runtimes(layout) == {"runtimes": {RUNTIME: expected}}
    record = layout.runtimes / RUNTIME / "runtime.json"
    record.write_text(json.dumps({**expected, "python_version": "3.0.0"}))
    assert find_runtimes(layout)["runtimes"][RUNTIME]["usable"] is False
    # What an upgrade of the device's system does to it.
    record.write_text(json.dumps(expected))
    python = layout.runtimes / RUNTIME / "bin" / "python"
    python.unlink()
    python.symlink_to("/usr/bin/python0")
    assert find_runtimes(layout)["runtimes"][RUNTIME]["usable"] is False


def test_broken_runtime_is_made_again(
    installed: Layout, layout: Layout, wheels: dict[str, str]
) -> None:
    broken = layout.runtimes / RUNTIME
    shutil.copytree(find_runtime(installed, RUNTIME), broken, symlinks=True)
    (part,) = broken.glob("lib/*/site-packages/tiny_part")
    shutil.rmtree(part)
    fail(layout, {**wheels, "xllamacpp-1.0-py3-none-any.whl": "0" * 64})
    assert broken.is_dir()  # until there is a better one
    assert install_runtime(layout, RUNTIME, wheels, ENGINE)["created"] is True
    assert part.is_dir()
    assert list_all(layout) == [RUNTIME]


# --- no network


def test_nothing_is_asked_of_any_network(
    layout: Layout, wheels: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that would send pip out, all of which it must not see."""
    (tmp_path / "index").mkdir()
    with serve(tmp_path / "index") as index:
        proxy = index.url.removesuffix("/simple")
        config = tmp_path / "home" / ".config" / "pip" / "pip.conf"
        config.parent.mkdir(parents=True)
        config.write_text(f"[global]\nfind-links = {index.url}\ntarget = {tmp_path}/elsewhere\n")
        for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
            monkeypatch.setenv(name, index.url)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "PIP_PROXY"):
            monkeypatch.setenv(name, proxy)
        monkeypatch.setenv("PIP_NO_BINARY", ":all:")
        monkeypatch.setenv("PIP_USER", "1")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        assert install_runtime(layout, RUNTIME, wheels, ENGINE)["created"] is True
        assert index.visits == []


def test_without_any_interface(layout: Layout, wheels: dict[str, str]) -> None:
    alone = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"]).returncode != 0:
        pytest.skip("this user may not make network namespaces")
    done = run_agent(layout, wheels, alone)
    out, _ = done.communicate()
    assert json.loads(out)["created"] is True


def test_live_runtime_of_this_machine(layout: Layout, tmp_path: Path) -> None:
    """The real llama.cpp, from the user's index; skipped when that cannot be reached."""
    facts = msgspec.convert(read_facts(layout), Facts)
    try:
        found = collect_wheels("xllamacpp", "2026.10.11549", facts, tmp_path / "cache")
    except PreflightError as error:
        if "does not answer" in str(error):
            pytest.skip(str(error))
        raise
    files = push(layout, *(wheel.path for wheel in (*found.wheels, found.pip)))
    wheels = {name: files[name] for name in found.files}
    assert wheels == found.files
    made = install_runtime(layout, found.id, wheels, ENGINE)
    assert made["engine"]["version"] == "2026.10.11549"
    used_bytes = sum(it.stat().st_size for it in Path(made["path"]).rglob("*") if it.is_file())
    # The Python that its links lead to counts here; the environment's own files do not there.
    assert found.installed_bytes < used_bytes < found.installed_bytes + 50_000_000


# --- failures


def test_damaged_blob(layout: Layout, wheels: dict[str, str]) -> None:
    for name, sha256 in wheels.items():
        blob = layout.find_blob(sha256)
        content = blob.read_bytes()
        blob.chmod(0o600)
        blob.write_bytes(b"damaged" + content[7:])
        failure = fail(layout, wheels)
        assert (failure.kind, name in str(failure)) == ("corrupt", True)
        blob.write_bytes(content)


def test_missing_blob(layout: Layout, wheels: dict[str, str]) -> None:
    name = next(name for name in wheels if name.startswith("tiny_part"))
    layout.find_blob(wheels[name]).unlink()
    failure = fail(layout, wheels)
    assert failure.kind == "request"
    assert name in str(failure)


@pytest.mark.parametrize(
    "names",
    [
        ["xllamacpp-1.0-py3-none-any.whl"],
        ["PIP"],
        ["PIP", "../xllamacpp-1.0-py3-none-any.whl"],
        ["PIP", "xllamacpp.whl"],
        ["PIP", "xllamacpp-1.0-py3-none-any.zip"],
    ],
)
def test_requests_that_cannot_be(layout: Layout, wheels: dict[str, str], names: list[str]) -> None:
    sha256 = wheels[find_pip().name]
    failure = fail(layout, {name.replace("PIP", find_pip().name): sha256 for name in names})
    assert failure.kind == "request"


@pytest.mark.parametrize("runtime", ["", ".hidden", "..", "a/b", "../a", "-x", "ä"])
def test_name_of_a_runtime(layout: Layout, wheels: dict[str, str], runtime: str) -> None:
    assert "no name of a runtime" in str(fail(layout, wheels, runtime))


def test_dependency_that_was_forgotten(layout: Layout, tmp_path: Path) -> None:
    failure = fail(layout, push(layout, make_engine(tmp_path)))
    assert failure.kind == "runtime"
    assert str(failure) == (
        "xllamacpp cannot be imported from its wheels (xllamacpp-1.0): "
        "ModuleNotFoundError: No module named 'tiny_part'"
    )


def test_signal_of_the_import(layout: Layout, tmp_path: Path) -> None:
    """As wheels do that were built for a newer processor."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    engine = make_engine(tmp_path, code)
    failure = fail(layout, push(layout, engine, make_wheel(tmp_path, "tiny_part")))
    assert "importing xllamacpp is killed by SIGILL" in str(failure)
    assert "(tiny-part-1.0, xllamacpp-1.0)" in str(failure)


def test_wheel_of_another_machine(layout: Layout, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, tag="cp311-cp311-manylinux_2_17_s390x")
    failure = fail(layout, push(layout, engine, make_wheel(tmp_path, "tiny_part")))
    assert str(failure) == (
        f"installing the runtime failed: {engine.name} is not a supported wheel on this platform."
    )


def test_quota(layout: Layout, wheels: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QUOTA_VARIABLE, str(layout.count_used_bytes() + 5_000_000))
    failure = fail(layout, wheels)
    assert failure.kind == "disk_full"
    assert "5000000 bytes are free, the runtime needs 8" in str(failure)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system whose bytes suffice and whose inodes do not: it fills up in the middle."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = "size=64m,nr_inodes=60"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("this user may not mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_fills_up_while_pip_writes(small_disk: Path, tmp_path: Path) -> None:
    layout = open_layout(str(small_disk))
    files = {f"data/{number}": b"x" for number in range(100)}
    part = make_wheel(tmp_path, "tiny_part", files=files)
    wheels = push(layout, make_engine(tmp_path), part)
    failure = fail(layout, wheels)
    assert failure.kind == "disk_full"
    assert "No space left on device" in str(failure)


# --- kill -9


def run_agent(
    layout: Layout, wheels: dict[str, str], prefix: list[str] | None = None
) -> "subprocess.Popen[bytes]":
    request = json.dumps({"runtime": RUNTIME, "wheels": wheels, "engine": ENGINE})
    root = str(layout.base.parent)
    command = [*(prefix or []), sys.executable, "-c", AGENT, root, request]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    "mark",
    [".*.tmp/wheels/pip-*", ".*.tmp/lib/*/*/tiny_part", ".*.tmp/runtime.json"],
)
def test_killed_in_the_middle(layout: Layout, tmp_path: Path, mark: str) -> None:
    """What pip still does after its parent's end is no part of the next attempt."""
    files = {f"data/{number}": b"x" for number in range(300)}
    part = make_wheel(tmp_path, "tiny_part", files=files)
    wheels = push(layout, make_engine(tmp_path), part)
    process = run_agent(layout, wheels)
    while process.poll() is None and not list(layout.runtimes.glob(mark)):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert find_runtimes(layout) == {"runtimes": {}}
    made = install_runtime(layout, RUNTIME, wheels, ENGINE)
    assert made["created"] is True
    assert len(list(Path(made["path"]).glob("lib/*/site-packages/tiny_part/data/*"))) == 300
    recover(layout)
    assert [name for name in list_all(layout) if not name.startswith(".")] == [RUNTIME]
