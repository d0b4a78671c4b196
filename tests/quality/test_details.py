"""The details file: whole or not at all, and whose it is."""

import os
import threading
from pathlib import Path

import msgspec
import pytest

from toolkit.errors import SettingsError
from toolkit.quality.details import Details, read_details, write_details

DETAILS = Details(
    schema=1, artifact="a", format="gguf", size_bytes=1, manifest_digest="m", plan_digest="p",
    runtime="r", text="t", text_digest="d", sequences=(), summary={}, errors={}, ids=(), texts=(),
    kl=(), delta_p=(), same_top=(),
)  # fmt: skip


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path, link = tmp_path / "details.json", tmp_path / "link.json"
    write_details(path, DETAILS)
    link.symlink_to(path)
    with path.open("rb") as before:  # who reads it meanwhile has the old one, not a half
        write_details(link, msgspec.structs.replace(DETAILS, artifact="b"))
        assert msgspec.json.decode(before.read(), type=Details) == DETAILS
    assert link.is_symlink()
    assert msgspec.json.decode(path.read_bytes(), type=Details).artifact == "b"
    assert {one.name for one in tmp_path.iterdir()} == {"details.json", "link.json"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    path, found = tmp_path / "pipe", list[bytes]()
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    reader.start()
    assert read_details(path, "m", "d") is None
    write_details(path, DETAILS)
    reader.join(timeout=60)
    assert msgspec.json.decode(found[0], type=Details) == DETAILS
    assert path.is_fifo()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "details.json"):
        with pytest.raises(SettingsError, match=r"--details .*: cannot be written: "):
            write_details(path, DETAILS)


@pytest.mark.parametrize(
    ("manifest", "text", "is_known"),
    [("m", "d", True), ("other", "d", False), ("m", "d-long-rope", False)],
)
def test_what_was_written_is_of_one_artifact_and_text(
    manifest: str, text: str, is_known: bool, tmp_path: Path
) -> None:
    path = tmp_path / "details.json"
    assert read_details(path, manifest, text) is None
    write_details(path, DETAILS)
    assert read_details(path, manifest, text) == (DETAILS if is_known else None)
    path.write_bytes(b"{")
    assert read_details(path, manifest, text) is None
