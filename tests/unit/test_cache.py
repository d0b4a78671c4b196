"""The cache of what takes minutes to make. These tests need nothing and always run."""

from pathlib import Path

import pytest

from tests import cache


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "cache")
    return tmp_path / "cache"


def test_made_once() -> None:
    first = cache.keep("disk", ["a"], lambda path: path.mkdir())
    assert cache.keep("disk", ["a"], lambda path: pytest.fail("made again")) == first
    assert first.is_dir()


def test_another_recipe_takes_the_place(folder: Path) -> None:
    other = cache.keep("kernel", ["a"], lambda path: path.mkdir())
    first = cache.keep("disk", ["a"], lambda path: path.mkdir())
    second = cache.keep("disk", ["b"], lambda path: path.touch())
    assert second != first
    assert {path for path in folder.iterdir() if path.suffix != ".lock"} == {other, second}


def test_interrupted() -> None:
    """Half of a thing is never found, and does not stand in the way."""

    def stop_halfway(path: Path) -> None:
        path.mkdir()
        (path / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.keep("disk", ["a"], stop_halfway)
    made = cache.keep("disk", ["a"], lambda path: path.mkdir())
    assert list(made.iterdir()) == []


def test_failed_command() -> None:
    with pytest.raises(RuntimeError, match=r"ls /nowhere: exit code 2\n.*cannot access"):
        cache.run_quietly(["ls", "/nowhere"])
