"""Where an artifact grows: taken over from a killed build, thrown away in any other case."""

import os
from pathlib import Path

import pytest

from toolkit import staging
from toolkit.errors import BuildError
from toolkit.staging import JOURNAL, check_free_disk, stage

KEY = "plan source"
DEAD = 999_999_999  # no process has this number


def leave_behind(
    out: Path,
    name: str,
    key: str,
    tasks: list[int],
    monkeypatch: pytest.MonkeyPatch,
    pid: int = DEAD,
) -> Path:
    """What a killed build leaves: its folder, with a journal and a file."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: pid)
        patch.setattr(staging.shutil, "rmtree", lambda *_, **__: None)
        with stage(out, name, key) as left:
            (left.folder / "data").write_bytes(b"half")
            for task in tasks:
                left.record([task])
    return left.folder


def test_a_killed_builds_work_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = leave_behind(tmp_path, "a", KEY, [0, 7, 3], monkeypatch)
    with stage(tmp_path, "a", KEY) as found:
        assert found.is_resumed
        assert found.done == {0, 3, 7}
        assert (found.folder / "data").read_bytes() == b"half"
        assert not stale.exists()
        found.record([4])
        assert (found.folder / JOURNAL).read_text().splitlines()[1:] == ["0", "3", "7", "4"]
    assert not list(tmp_path.iterdir())


def test_work_is_gone_on_with_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_behind(tmp_path, "a", KEY, [1], monkeypatch)
    leave_behind(tmp_path, "a", KEY, [2], monkeypatch, pid=DEAD + 1)
    with stage(tmp_path, "a", KEY) as found:
        assert found.done == {1, 2}


@pytest.mark.parametrize("change", ["key", "boot", "name", "journal", "empty"])
def test_any_other_leftover_is_not(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [] if change == "empty" else [1, 2]
    stale = leave_behind(tmp_path, "a", KEY, tasks, monkeypatch)
    if change == "boot":
        monkeypatch.setattr(staging, "_boot_id", lambda: "another")
    if change == "journal":
        (stale / JOURNAL).write_text("not json\n1\n")
    key = "another" if change == "key" else KEY
    with stage(tmp_path, "b" if change == "name" else "a", key) as found:
        assert not found.is_resumed
        assert [path.name for path in found.folder.iterdir()] == [JOURNAL]
    assert stale.exists() == (change == "name")


def test_a_line_that_was_cut_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Task 12 was being noted when the process was killed."""
    stale = leave_behind(tmp_path, "a", KEY, [5], monkeypatch)
    with (stale / JOURNAL).open("a") as journal:
        journal.write("1")
    with stage(tmp_path, "a", KEY) as found:
        assert found.done == {5}


def test_a_build_that_runs_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".a.{os.getppid()}.partial"
    other.mkdir()
    with stage(tmp_path, "a", KEY) as found:
        assert not found.is_resumed
    assert other.exists()


def test_an_error_of_the_disk_is_explained_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="the disk is full"), stage(tmp_path, "a", KEY):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_more_than_the_disk_holds_is_refused(tmp_path: Path) -> None:
    check_free_disk(tmp_path, 0)
    with pytest.raises(BuildError, match="free; to be written: "):
        check_free_disk(tmp_path, 1 << 60)
