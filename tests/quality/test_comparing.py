"""The source is read once, kept on disk, and compared in pieces as if in one."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import write_random_checkpoint
from tests.quality.sources import SourceSession, copy_with_scaled_tensor
from toolkit.checkpoint import Checkpoint, safetensors
from toolkit.console import Console
from toolkit.decoder import Decoder
from toolkit.families import read_decoder
from toolkit.quality import cache, comparing, measures, reference
from toolkit.quality.comparing import Sequences

QUIET = Console(as_json=True)
IDS = np.random.default_rng(0).integers(0, 2000, (5, 24)).tolist()


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "phiship" / "reference"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("source"), "gqa")


@pytest.fixture
def source(folder) -> tuple[Checkpoint, Decoder]:
    checkpoint = Checkpoint.open(folder)
    return checkpoint, read_decoder(checkpoint.config)


def read(source: tuple[Checkpoint, Decoder], ids: Sequences = IDS) -> comparing.Source:
    return comparing.read_source(*source, ids, QUIET)


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """How many sequences went through the layers together, each time."""
    seen: list[int] = []
    run = reference.final_states_of
    monkeypatch.setattr(
        reference, "final_states_of", lambda w, d, ids: seen.append(len(ids)) or run(w, d, ids)
    )
    return seen


def test_the_logits_are_those_of_the_forward_pass(source, monkeypatch):
    monkeypatch.setattr(comparing, "PASS_TOKENS", 50)  # two sequences at once
    found = read(source)
    for text, ids in enumerate(IDS):
        logits = found.logits(text, slice(5, 20))
        expected = reference.forward(*source, ids)[5:20]
        # Sums of 256 products in another order.
        assert np.abs(logits - expected).max() < 1e-4


def test_what_was_read_is_not_read_again(source, reads, capsys):
    first = read(source)
    events = capsys.readouterr().out
    assert '"done_bytes"' in events
    assert read(source).states.tobytes() == first.states.tobytes()
    assert reads == [5]
    assert capsys.readouterr().out == ""


def test_progress_comes_to_its_end(source, monkeypatch, capsys):
    monkeypatch.setattr(comparing, "PASS_TOKENS", 50)
    read(source)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["done_bytes"] == last["total_bytes"]


@pytest.mark.parametrize("what", ["weights", "middle", "ids", "cut", "decoder", "code", "format"])
def test_anything_else_is_read_anew(source, reads, what, folder, tmp_path, monkeypatch):
    read(source)
    other, ids = source, IDS
    if what == "weights":
        changed = copy_with_scaled_tensor(folder, tmp_path / "other", "model.norm.weight", 2.0)
        other = (Checkpoint.open(changed), source[1])
    elif what == "middle":
        other = (copy_with_another_middle(folder, tmp_path / "other"), source[1])
        assert other[0].fingerprint() == source[0].fingerprint()
    elif what == "ids":
        ids = [[*IDS[0][:-1], 6], *IDS[1:]]
    elif what == "cut":
        ids = [[token for one in IDS for token in one]]
    elif what == "decoder":
        other = (source[0], source[1].with_long_rope())
    else:
        module = {"code": reference, "format": safetensors}[what]
        edited = tmp_path / "edited.py"
        edited.write_text(Path(module.__file__).read_text("utf-8") + "# changed\n", "utf-8")
        monkeypatch.setattr(module, "__file__", str(edited))
    read(other, ids)
    assert len(reads) == 2


def copy_with_another_middle(folder: Path, target: Path) -> Checkpoint:
    """A copy in which one byte differs that a fingerprint does not look at."""
    shutil.copytree(folder, target)
    info = max(Checkpoint.open(target).tensors.values(), key=lambda one: one.nbytes)
    with (target / info.file).open("r+b") as file:
        file.seek(info.offset + info.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return Checkpoint.open(target)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "words", "shape"])
def test_a_damaged_file_is_made_again(source, reads, cache_home, damage):
    whole = read(source).states
    (path,) = cache_home.glob("*.npz")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    elif damage == "shape":
        np.savez(path, states=whole[:2])
        content = bytearray(path.read_bytes())
    else:
        content = {"cut": content[:-100], "empty": bytearray(), "words": bytearray(b"words")}[
            damage
        ]
    path.write_bytes(content)
    assert read(source).states.tobytes() == whole.tobytes()
    assert len(reads) == 2
    read(source)
    assert len(reads) == 2


def test_only_the_newest_are_kept(cache_home):
    states = np.zeros((1, 4, 8), np.float32)
    for place in range(cache.MOST_FILES + 3):
        assert cache.store(f"name{place}", states)
        os.utime(cache_home / f"name{place}.npz", (place, place))
        if place == 5:
            assert cache.load("name0", states.shape) is not None  # in use: it stays
    assert cache.store("last", states)
    kept = {path.stem for path in cache_home.iterdir()}
    newest = {f"name{place}" for place in range(5, cache.MOST_FILES + 3)}
    assert kept == {"name0", "last"} | set(sorted(newest, key=lambda n: int(n[4:]))[-6:])


def test_large_ones_push_out_others(cache_home, monkeypatch):
    monkeypatch.setattr(cache, "MOST_BYTES", 3000)
    for place in range(3):
        assert cache.store(f"name{place}", np.zeros((1, 64, 8), np.float32))
        os.utime(cache_home / f"name{place}.npz", (place, place))
    assert {path.stem for path in cache_home.iterdir()} == {"name2"}


def test_one_that_is_too_large_is_not_kept(cache_home, monkeypatch):
    monkeypatch.setattr(cache, "MOST_BYTES", 3000)
    assert cache.store("small", np.zeros((1, 64, 8), np.float32))
    assert cache.store("large", np.zeros((1, 128, 8), np.float32))
    assert {path.stem for path in cache_home.iterdir()} == {"small"}


def test_what_another_process_removes_meanwhile_is_no_failure(cache_home, monkeypatch):
    states = np.zeros((1, 4, 8), np.float32)
    cache.store("name", states)
    glob = Path.glob
    monkeypatch.setattr(
        Path, "glob", lambda self, pattern: [*glob(self, pattern), self / "gone.npz"]
    )
    assert cache.store("other", states)
    assert {path.stem for path in cache_home.iterdir()} == {"name", "other"}


def test_what_killed_runs_left_goes(cache_home):
    for name, age_s in (("part-old", cache.PART_LIFE_S + 60), ("part-new", 60)):
        (cache_home / name).mkdir(parents=True)
        (cache_home / name / "states.npz").write_bytes(b"half")
        then_s = cache_home.stat().st_mtime - age_s
        os.utime(cache_home / name, (then_s, then_s))
    cache.store("name", np.zeros((1, 4, 8), np.float32))
    assert {path.name for path in cache_home.iterdir()} == {"part-new", "name.npz"}


def test_without_a_cache_it_works_all_the_same(source, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder", "utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = comparing.read_source(*source, IDS, Console())
    assert found.states.shape == (5, 24, 256)
    assert "cannot be written" in " ".join(capsys.readouterr().err.split())


def test_pieces_compare_as_the_whole(source, folder, tmp_path, monkeypatch):
    name = "model.layers.0.mlp.down_proj.weight"
    session = SourceSession(copy_with_scaled_tensor(folder, tmp_path / "other", name, 0.5))
    found = read(source)
    monkeypatch.setattr(comparing, "LOGIT_ROWS", 7)
    pieces = comparing.compare(session, found, IDS, QUIET)
    whole = measures.join(
        [
            measures.compare_logits(reference.forward(*source, ids), session.logits(ids), ids)
            for ids in IDS
        ]
    )
    assert pieces.ids.tolist() == [token for ids in IDS for token in ids]
    # Logits differ by rounding only, and divergences are quadratic in that.
    assert pieces.kl == pytest.approx(whole.kl, abs=1e-5)
    assert pieces.losses == pytest.approx(whole.losses, abs=1e-4, nan_ok=True)
    assert pieces.mean_kl > 1e-3


@pytest.mark.parametrize("rows", [0, 1, 23, 25])
def test_logits_of_another_shape_are_refused(source, folder, rows):
    session = SourceSession(folder)
    logits = session.logits
    session.logits = lambda ids: np.resize(logits(ids), (rows, source[1].vocab))
    with pytest.raises(ValueError, match="logits of 24 tokens: the source's are"):
        comparing.compare(session, read(source), IDS, QUIET)


def test_logits_of_another_vocabulary_are_refused(source, folder):
    session = SourceSession(folder)
    logits = session.logits
    session.logits = lambda ids: logits(ids)[:, :-1]
    with pytest.raises(ValueError, match="logits of 24 tokens: the source's are"):
        comparing.compare(session, read(source), IDS, QUIET)
