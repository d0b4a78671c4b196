"""Vendors' environments: made by the real pip, found, kept, renewed; broken ones named."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.vendor.tools import NAME, VERSION, make_vendor, write_lock, write_wheel
from toolkit.console import Console
from toolkit.errors import BuildError, MissingExtraError
from toolkit.vendor import Command, Vendor, python_of
from toolkit.vendor.environment import (
    STAMP,
    cache_folder,
    list_steps,
    locate,
    look,
    setup,
)


def test_it_is_made_once_and_kept(tiny: Vendor) -> None:
    environment = locate(tiny)
    assert environment.versions[NAME] == VERSION
    stamped_ns = (environment.folder / STAMP).stat().st_mtime_ns
    assert setup(tiny, Console()) == environment
    assert (environment.folder / STAMP).stat().st_mtime_ns == stamped_ns
    done = subprocess.run(
        [python_of(environment.folder), "-m", NAME, "nothing"], capture_output=True, text=True
    )
    assert done.stdout == "about to nothing\n"


def test_what_is_there_is_listed(tiny: Vendor) -> None:
    found = look(tiny)
    assert (found.state, found.versions[NAME]) == ("ready", VERSION)
    assert found.size_bytes > 1_000_000  # pip alone is several
    assert found.folder == cache_folder() / "tiny"


def test_one_that_is_missing(locks: Path, own_cache: Path) -> None:
    vendor = make_vendor(locks)
    assert look(vendor).state == "missing"
    with pytest.raises(MissingExtraError, match="the environment of the tiny vendor is missing"):
        locate(vendor)


def test_another_lock_makes_it_anew(copied: Vendor, tmp_path: Path) -> None:
    first = locate(copied)
    (first.folder / "leftover").write_text("of the first")
    write_wheel(tmp_path)
    write_lock(tmp_path, "# another")
    vendor = make_vendor(tmp_path)
    assert look(vendor).state == "outdated"
    with pytest.raises(MissingExtraError, match="from another lock file"):
        locate(vendor)
    second = setup(vendor, Console())
    assert second.digest != first.digest
    assert not (second.folder / "leftover").exists()


def test_one_that_broke_is_named_and_made_anew(copied: Vendor) -> None:
    vendor = copied
    folder = locate(vendor).folder
    module = next(folder.rglob(f"{NAME}.py"))
    module.unlink()
    with pytest.raises(MissingExtraError, match=f"is broken: {NAME} cannot be imported") as caught:
        locate(vendor)
    assert "phiship vendor setup tiny --again" in caught.value.advice
    python_of(folder).unlink()
    with pytest.raises(MissingExtraError, match="does not run"):
        locate(vendor)
    setup(vendor, Console())
    assert next(folder.rglob(f"{NAME}.py")).is_file()


def test_a_missing_file_is_damage_too(tiny: Vendor, ready: Path) -> None:
    needs_more = Vendor(
        "tiny", "the tiny vendor", (NAME,), (NAME,), ("bin/converter",), locks=tiny.locks
    )
    with pytest.raises(MissingExtraError, match="bin/converter is missing"):
        locate(needs_more)


def test_what_pip_cannot_find_leaves_nothing(tmp_path: Path, own_cache: Path) -> None:
    write_wheel(tmp_path)
    write_lock(tmp_path, version="9.9")
    with pytest.raises(BuildError, match=r"tinyvendor==9\.9") as caught:
        setup(make_vendor(tmp_path), Console())
    assert "tiny.log" in caught.value.advice
    assert sorted(path.name for path in own_cache.iterdir()) == ["tiny.log"]


def test_what_does_not_import_is_not_finished(tmp_path: Path, own_cache: Path) -> None:
    write_wheel(tmp_path)
    write_lock(tmp_path)
    vendor = Vendor("tiny", "the tiny vendor", (NAME,), ("no_such_module",), locks=tmp_path)
    with pytest.raises(BuildError, match="No module named 'no_such_module'"):
        setup(vendor, Console())
    assert look(vendor).state == "missing"


def test_a_python_the_lock_was_not_made_for(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "tiny.txt").write_text("# python: 3.1 to 3.2\n")
    with pytest.raises(MissingExtraError, match=r"pinned for Python 3\.1 to 3\.2") as caught:
        setup(make_vendor(tmp_path), Console())
    assert "--python" in caught.value.advice
    with pytest.raises(MissingExtraError, match="not a Python that runs"):
        setup(make_vendor(tmp_path), Console(), python=str(tmp_path / "none"))


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGKILL])
def test_what_was_cut_short_is_never_taken_for_whole(
    which: signal.Signals, locks: Path, own_cache: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from toolkit.console import Console;"
        "from tests.vendor.tools import make_vendor; from toolkit.vendor.environment import setup;"
        "setup(make_vendor(Path(sys.argv[1])), Console())"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(locks)], stderr=subprocess.DEVNULL)
    folder = own_cache / "tiny"
    deadline_s = time.monotonic() + 30
    while not python_of(folder).exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    process.send_signal(which)
    process.wait(timeout=30)
    vendor = make_vendor(locks)
    assert look(vendor).state == ("missing" if which == signal.SIGINT else "half-made")
    with pytest.raises(MissingExtraError, match=r"is missing|is not finished"):
        locate(vendor)
    if which == signal.SIGKILL:  # a dead claim and half an environment are no obstacle
        assert setup(vendor, Console()).versions[NAME] == VERSION


def test_two_at_once_do_not_make_the_same_one(locks: Path, own_cache: Path) -> None:
    own_cache.mkdir(parents=True)
    (own_cache / "tiny.pid").write_text(str(os.getppid()))
    assert look(make_vendor(locks)).state == "being made"
    with pytest.raises(BuildError, match=f"being made by process {os.getppid()}"):
        setup(make_vendor(locks), Console())
    (own_cache / "tiny.pid").write_text("damaged")
    assert look(make_vendor(locks)).state == "missing"


def test_the_steps_as_values(locks: Path) -> None:
    more = Command("build it", ("cmake",))
    vendor = Vendor("tiny", "it", (NAME,), ("a", "b.c"), steps=lambda _: (more,), locks=locks)
    folder = Path("cache/tiny")
    python = str(python_of(folder))
    made, installed, built, tried = list_steps(vendor, folder, "python3.12")
    assert made.argv == ("python3.12", "-m", "venv", str(folder))
    assert installed.argv == (
        python, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps",
        "--requirement", str(locks / "tiny.txt"),
    )  # fmt: skip
    assert built is more
    assert tried.argv == (python, "-c", "import a; import b.c")


@pytest.mark.parametrize(
    ("system", "folder"),
    [("linux", ".cache/phiship/vendor"), ("darwin", "Library/Caches/phiship/vendor")],
)
def test_the_cache_is_where_the_system_has_it(
    system: str, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "phiship" / "vendor"
