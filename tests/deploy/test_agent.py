"""The agent's own rules, on a folder of this machine."""

import ast
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import toolkit.runner
from toolkit.runner.agent import journal
from toolkit.runner.agent.blobs import receive
from toolkit.runner.agent.child import import_engine, run_child
from toolkit.runner.agent.facts import read_facts, read_memory_limit
from toolkit.runner.agent.layout import Layout, open_layout
from toolkit.runner.agent.releases import (
    confirm_release,
    discard_release,
    prune,
    read_link,
    read_status,
    recover,
    return_to_good,
    stage_release,
    start_trial,
    switch_release,
    uninstall,
)
from toolkit.runner.agent.serve import Agent
from toolkit.runner.failure import Failure
from toolkit.ssh.bundle import LIMIT_BYTES, pack_runner

SOURCES = sorted(Path(toolkit.runner.__file__).parent.rglob("*.py"))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return open_layout(str(tmp_path / "device"))


def add_blob(layout: Layout, content: bytes) -> str:
    sha256 = hashlib.sha256(content).hexdigest()
    blob = {"sha256": sha256, "size_bytes": len(content), "from_bytes": 0}
    receive(Agent(layout, io.BytesIO(content), print), [blob])
    return sha256


def stage(layout: Layout, release: str) -> Path:
    files = {"a.txt": add_blob(layout, b"a"), "sub/b.txt": add_blob(layout, release.encode())}
    return Path(stage_release(layout, release, files)["path"])


def test_release_is_links_that_survive_a_move(layout: Layout, tmp_path: Path) -> None:
    path = stage(layout, "one")
    assert (path / "sub" / "b.txt").read_bytes() == b"one"
    assert not (path / "sub" / "b.txt").readlink().is_absolute()
    layout.base.parent.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "v1" / "releases" / "one" / "a.txt").read_bytes() == b"a"


def test_switch_keeps_what_a_rollback_needs(layout: Layout) -> None:
    for name in ("one", "two", "three"):
        stage(layout, name)
        switch_release(layout, name)
        state = layout.read_state()
        assert (state["pending"], state["tries_left"]) == (name, 1)
        confirm_release(layout, name)
    assert (read_link(layout.current), read_link(layout.previous)) == ("three", "two")
    assert layout.read_state()["good"] == "three"
    stage(layout, "four")
    switch_release(layout, "four")
    assert layout.read_state()["good"] == "three"
    for name in ("four", "three"):  # in use; previous and good
        assert discard_release(layout, name) == {"discarded": False}
    assert discard_release(layout, "one") == {"discarded": True}
    assert read_status(layout)["releases"] == ["four", "three", "two"]


def put_into_use(layout: Layout, release: str, *, confirmed: bool = True) -> None:
    stage(layout, release)
    switch_release(layout, release)
    if confirmed:
        confirm_release(layout, release)


def test_return_goes_to_the_recorded_release(layout: Layout) -> None:
    """Not to the newest one, nor to the one named `previous`."""
    for name in ("one", "two"):
        put_into_use(layout, name)
    put_into_use(layout, "three", confirmed=False)
    stage(layout, "four")
    assert return_to_good(layout) == {"current": "two", "failed": "three"}
    assert read_link(layout.current) == "two"
    assert layout.read_state()["pending"] is None
    assert (layout.current / "sub/b.txt").read_text() == "two"


def test_return_without_a_good_release_leaves_nothing_in_use(layout: Layout) -> None:
    put_into_use(layout, "one", confirmed=False)
    assert return_to_good(layout) == {"current": None, "failed": "one"}
    assert read_link(layout.current) is None


def test_recover_ends_a_trial_nobody_watches(layout: Layout) -> None:
    put_into_use(layout, "one")
    put_into_use(layout, "two", confirmed=False)
    assert recover(layout)["returned"] == {"current": "one", "failed": "two"}
    assert recover(layout)["returned"] is None
    assert journal.read(layout)[-1]["event"] == "returned"


def test_recover_of_the_first_push_leaves_it_in_use(layout: Layout) -> None:
    put_into_use(layout, "one", confirmed=False)
    assert recover(layout)["returned"] is None
    assert read_link(layout.current) == "one"


def test_service_may_start_a_trial_once(layout: Layout) -> None:
    put_into_use(layout, "one")
    assert start_trial(layout) == {"returned": None}
    put_into_use(layout, "two", confirmed=False)
    assert start_trial(layout) == {"returned": None}
    assert read_link(layout.current) == "two"
    assert start_trial(layout) == {"returned": {"current": "one", "failed": "two"}}
    assert read_link(layout.current) == "one"


def test_prune_keeps_what_is_needed(layout: Layout) -> None:
    for name in ("one", "two", "three"):
        put_into_use(layout, name)
    stage(layout, "four")
    (layout.runtimes / "unused").mkdir()
    (layout.runtimes / "used").mkdir()
    stage_release(layout, "five", {"a.txt": add_blob(layout, b"a")}, "used")
    switch_release(layout, "five")
    (layout.incoming / ("0" * 64 + ".part")).write_bytes(b"x")
    assert prune(layout)["releases"] == ["four", "one", "two"]
    status = read_status(layout)
    assert status["releases"] == ["five", "three"]  # pending and current; previous and good
    assert (status["runtimes"], status["incoming"], status["blobs"]) == (["used"], [], 2)
    assert (layout.previous / "sub/b.txt").read_text() == "three"
    assert (layout.current / "a.txt").read_bytes() == b"a"


def test_uninstall_takes_everything_and_nothing_else(layout: Layout) -> None:
    put_into_use(layout, "one")
    stranger = layout.base.parent / "mine.txt"
    stranger.write_text("x")
    uninstall(layout)
    assert list(layout.base.parent.iterdir()) == [stranger]
    stranger.unlink()
    uninstall(open_layout(str(layout.base.parent)))
    assert not layout.base.parent.exists()


def test_journal_with_a_torn_line(layout: Layout) -> None:
    journal.log(layout, "first")
    with layout.journal.open("a") as stream:
        stream.write('{"event": "to')
    journal.log(layout, "second")
    assert [event["event"] for event in journal.read(layout)] == ["first", "second"]


def test_journal_does_not_grow_for_ever(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "KEPT_EVENTS", 3)
    for number in range(7):
        journal.log(layout, str(number))
    journal.trim(layout)
    assert [event["event"] for event in journal.read(layout)] == ["4", "5", "6"]


def test_switch_to_the_same_changes_nothing(layout: Layout) -> None:
    for name in ("one", "two", "two"):
        stage(layout, name)
        answer = switch_release(layout, name)
        confirm_release(layout, name)
    assert answer == {"current": "two", "previous": "one", "changed": False}


def test_leftovers_of_a_power_cut_do_not_matter(layout: Layout) -> None:
    """A half-made release, a new link and a new state beside the old ones."""
    (layout.releases / ".one.tmp" / "sub").mkdir(parents=True)
    (layout.releases / ".one.tmp" / "a.txt").write_bytes(b"half")
    (layout.base / "current.new").symlink_to("releases/none")
    (layout.base / "state.json.new").write_text("{")
    (layout.base / f".link-{os.getpid()}").symlink_to("nowhere")
    assert open_layout(str(layout.base.parent)) == layout
    path = stage(layout, "one")
    switch_release(layout, "one")
    assert (path / "a.txt").read_bytes() == b"a"
    assert (layout.current / "a.txt").read_bytes() == b"a"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ""])
def test_paths_that_lead_out_are_refused(layout: Layout, name: str) -> None:
    with pytest.raises(Failure, match="leads out"):
        stage_release(layout, "one", {name: add_blob(layout, b"a")})
    assert not (layout.releases / "one").exists()


@pytest.mark.parametrize("release", ["", ".", "..", "../one", ".one.tmp", "a/b", "a b"])
def test_names_that_are_no_release(layout: Layout, release: str) -> None:
    for act in (discard_release, switch_release):
        with pytest.raises(Failure, match="no name of a release"):
            act(layout, release)


def test_stage_without_its_blob(layout: Layout) -> None:
    with pytest.raises(Failure, match="is not on the device"):
        stage_release(layout, "one", {"a": "0" * 64})
    with pytest.raises(Failure, match="is no sha256"):
        stage_release(layout, "one", {"a": "../../etc/passwd"})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is of Linux")
def test_disk_that_is_really_full(layout: Layout) -> None:
    sha256 = hashlib.sha256(b"a").hexdigest()
    (layout.incoming / f"{sha256}.part").symlink_to("/dev/full")
    with pytest.raises(Failure, match="disk is full"):
        add_blob(layout, b"a")
    assert read_status(layout)["incoming"] == []
    assert read_status(layout)["blobs"] == 0


def test_files_are_synced_before_they_are_named(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that survives a power cut: content, name, folder."""
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_sync(descriptor: int) -> None:
        calls.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def record_replace(self: Path, target: Path) -> Path:
        calls.append(f"name {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_replace)
    sha256 = add_blob(layout, b"content")
    assert calls == [f"sync {sha256}.part", f"name {sha256}", "sync sha256"]
    calls.clear()
    stage_release(layout, "one", {"sub/a": sha256})
    assert set(calls[:2]) == {"sync sub", "sync .one.tmp"}
    assert calls[2:4] == ["name one", "sync releases"]
    calls.clear()
    switch_release(layout, "one")
    order = [name for name in calls if name.startswith("name")]
    assert order == ["name state.json", "name current"]


def test_facts_of_a_recorded_board(layout: Layout, tmp_path: Path) -> None:
    board = tmp_path / "board"
    (board / "proc/device-tree").mkdir(parents=True)
    (board / "proc/device-tree/model").write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")
    (board / "proc/meminfo").write_text(
        "MemTotal:        8245696 kB\nMemAvailable:    7000000 kB\nHugePages_Total:       0\n"
    )
    (board / "proc/cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp crc32\n")
    facts = read_facts(layout, board)
    assert facts["board"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert facts["memory_available_bytes"] == 7_000_000 * 1024
    assert facts["memory_limit_bytes"] is None
    assert facts["cpu_features"] == ["asimd", "asimddp"]


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [("1000", "400", 600), ("1000", "1400", 0), ("max", "400", None)],
)
def test_memory_limit_of_a_container(
    tmp_path: Path, limit: str, used: str, left: int | None
) -> None:
    folder = tmp_path / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(used + "\n")
    assert read_memory_limit(tmp_path) == left


def test_facts_where_there_is_no_proc(layout: Layout, tmp_path: Path) -> None:
    facts = read_facts(layout, tmp_path)
    assert facts["memory_available_bytes"] is None
    assert (facts["board"], facts["cpu_features"]) == ("", [])


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV", "SIGKILL"])
def test_signal_of_a_child_by_name(name: str) -> None:
    program = f"import os, signal; os.kill(os.getpid(), signal.{name})"
    done = run_child([sys.executable, "-c", program], b"", 60)
    assert done["signal"] == name


def test_child_that_takes_too_long() -> None:
    program = "import sys, time; print('words', file=sys.stderr, flush=True); time.sleep(60)"
    done = run_child([sys.executable, "-c", program], b"", 2)
    assert (done["code"], done["timeout_s"], done["stderr"]) == (None, 2, "words\n")


def test_engine_that_is_not_there() -> None:
    found = import_engine("no_such_engine")
    assert not found["importable"]
    assert "no_such_engine" in found["error"]


def test_what_is_there_beside_an_engine() -> None:
    """By the names of packages, however they are written; also when the engine is missing."""
    for module in ("json", "no_such_engine"):
        found = import_engine(module, companions=["pillow", "no-such-package", "huggingface-hub"])
        assert found["companions"] == ["pillow", "huggingface-hub"]
    versions = ["jinja2>=3.1.6", "Jinja2>=2", "jinja2>=999.0", "no-such-package>=1"]
    found = import_engine("json", companions=versions)
    assert found["companions"] == versions[:2]


def test_zipapp_is_small_and_the_same_every_time() -> None:
    runner = pack_runner()
    assert len(runner.content) < LIMIT_BYTES
    pack_runner.cache_clear()
    assert pack_runner() == runner


def test_zipapp_runs_alone(tmp_path: Path) -> None:
    """Without toolkit on the path, without site packages, without a locale."""
    path = tmp_path / "runner"
    path.write_bytes(pack_runner().content)
    command = [sys.executable, "-I", "-S", "-B", str(path), "agent", "serve", "--root"]
    done = subprocess.run(
        [*command, str(tmp_path / "x")],
        input=b'{"call": "facts"}\n{"call": "status"}\n',
        capture_output=True,
        check=True,
        env={"LC_ALL": "C"},
    )
    facts, status = (json.loads(line)["answer"] for line in done.stdout.splitlines())
    assert facts["word_bits"] == 64
    assert status["current"] is None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_sources_keep_to_the_oldest_python_and_to_themselves(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add(str(node.module).partition(".")[0])
    # openvino_genai cannot be used without numpy and openvino, mlx_lm not without mlx.
    engines = {"onnxruntime_genai", "xllamacpp", "openvino_genai", "openvino", "numpy"}
    engines |= {"mlx_lm", "mlx"}
    # Runtimes for artifacts that see bring Pillow, every engine's brings numpy.
    pictures = {"PIL", "numpy"}
    companions = {"images": pictures, "sight": pictures, "tokenizing": {"tokenizers"}}
    companions["rendering"] = {"jinja2"}
    others = engines if path.parent.name == "engines" else companions.get(path.stem, set())
    allowed = sys.stdlib_module_names | others
    assert roots <= allowed
