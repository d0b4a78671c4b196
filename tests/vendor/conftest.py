"""A cache folder of the test's own, and the tiny vendor."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vendor.tools import make_vendor, write_lock, write_wheel
from toolkit.console import Console
from toolkit.vendor import Vendor
from toolkit.vendor.environment import Environment, setup


@pytest.fixture(scope="session")
def locks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny vendor's lock and its wheel."""
    folder = tmp_path_factory.mktemp("locks")
    write_wheel(folder)
    write_lock(folder)
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "phiship" / "vendor"


@pytest.fixture(scope="session")
def ready(locks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder in which the tiny vendor is set up; tests must leave it so."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        setup(make_vendor(locks), Console())
    yield folder


@pytest.fixture
def tiny(ready: Path, locks: Path, monkeypatch: pytest.MonkeyPatch) -> Vendor:
    """The tiny vendor, set up."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(ready))
    return make_vendor(locks)


@pytest.fixture
def environment(tiny: Vendor) -> Environment:
    """The tiny vendor's environment."""
    return setup(tiny, Console())


@pytest.fixture
def copied(ready: Path, own_cache: Path, locks: Path) -> Vendor:
    """The tiny vendor with a copy of its environment, to damage."""
    shutil.copytree(ready / "phiship" / "vendor", own_cache, symlinks=True)
    return make_vendor(locks)
