"""Power cuts of a Raspberry Pi 5, emulated as a whole machine: `make test-powercut`.

PHISHIP_TEST_POWERCUT=1 runs it; see README.md.
"""

import contextlib
import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.emulated.identity import MODEL
from tests.emulated.machine import Machine
from tests.emulated.needs import MACHINE, check_needs
from toolkit.artifact import list_files, read_manifest, write_manifest
from toolkit.console import Console
from toolkit.deploy import deploy
from toolkit.errors import UnreachableError
from toolkit.report import Report, Step

pytestmark = pytest.mark.skipif(
    os.environ.get("PHISHIP_TEST_POWERCUT") != "1",
    reason="PHISHIP_TEST_POWERCUT is not 1: needs root, qemu-system-arm, minutes",
)
# A part of each step: of its bytes for a transfer, of its time for the others. When all bytes are
# sent the device is still writing, hashing and sealing.
CUTS = (
    ("transfer", 0.5),
    ("transfer", 1.0),
    ("switch", 0.1),
    ("switch", 0.5),
    ("switch", 0.9),
    ("health", 0.5),
)
# What may be in use after the cut. Of a switch that was called done nothing may be lost.
ALLOWED = {"transfer": {"old"}, "switch": {"old", "new"}, "health": {"new"}}
NOISE_BYTES = 6_000_000


@dataclass
class Found:
    """What lies on a board: its release in use, unfinished transfers, the recorded state."""

    current: str
    incoming: int
    state: dict[str, Any]


class Fuse(Report):
    """A report that pulls the plug some time after a step has begun."""

    def __init__(self, machine: Machine, where: str, after_s: float) -> None:
        super().__init__(f"cut after {after_s:.3f} s of {where}")
        self.where = where
        self.timer = threading.Timer(after_s, machine.cut)

    @contextlib.contextmanager
    def step(self, name: str, limit: str = "") -> Iterator[Step]:
        """As Report.step; from here on it burns when this is the step."""
        if name == self.where:
            self.timer.start()
        with super().step(name, limit) as step:
            yield step


class Meter(Console):
    """A console that pulls the plug when a part of the bytes is sent."""

    def __init__(self, machine: Machine, part: float) -> None:
        super().__init__(as_json=True)
        self.machine, self.part = machine, part

    def event(self, name: str, /, **fields: object) -> None:
        """As Console.event."""
        super().event(name, **fields)
        if name == "progress" and str(fields["label"]).startswith("sending"):
            done, total = (int(str(fields[key])) for key in ("done_bytes", "total_bytes"))
            if done >= self.part * total:
                self.machine.cut()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    check_needs(MACHINE)
    board = Machine(tmp_path_factory.mktemp("machine"))
    print(f"login after {board.boot():.1f} s")
    yield board
    board.cut()


@pytest.fixture(scope="module")
def seconds(machine: Machine, artifacts: dict[str, Path]) -> dict[str, float]:
    """How long each step of a push takes; the board serves a release afterwards."""
    report = deploy(artifacts["gguf"], machine.device, Console(as_json=True))
    return {step.name: step.seconds for step in report.steps}


def test_a_cut_takes_what_was_not_synced(machine: Machine) -> None:
    """Otherwise the tests below would prove nothing."""
    assert machine.run("cat /proc/device-tree/model").rstrip("\0") == MODEL
    machine.run("head -c 4000000 /dev/urandom > synced && sync synced . && cp synced lost")
    machine.run("cmp synced lost")
    machine.cut()
    machine.boot()
    assert machine.run("stat -c %s synced") == "4000000\n"
    assert machine.run("cmp -s synced lost && echo the same || echo lost") == "lost\n"


def test_cut_of_the_first_push(
    machine: Machine, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    """With nothing to return to, the release on trial stays; it has passed its smoke test."""
    artifact = write_variant(artifacts["gguf"], tmp_path / "first")
    push_until_cut(machine, artifact, Fuse(machine, "health", 1.0))
    machine.boot()
    found = look_at(machine)
    assert found.current.startswith("first-")
    assert (found.state["good"], found.state["pending"]) == (None, found.current)
    check_service(machine, artifact)


def test_cut_after_a_push(machine: Machine, artifacts: dict[str, Path], tmp_path: Path) -> None:
    """What phiship has called done is on the disk."""
    artifact = write_variant(artifacts["gguf"], tmp_path / "done")
    deploy(artifact, machine.device, Console(as_json=True))
    machine.cut()
    machine.boot()
    found = look_at(machine)
    assert found.current.startswith("done-")
    assert (found.state["good"], found.state["pending"]) == (found.current, None)
    check_service(machine, artifact)


@pytest.mark.parametrize(("where", "part"), CUTS)
def test_cut(
    where: str,
    part: float,
    machine: Machine,
    seconds: dict[str, float],
    artifacts: dict[str, Path],
    tmp_path: Path,
) -> None:
    """The board serves the old release or the new one, and the next push succeeds."""
    artifact = write_variant(artifacts["gguf"], tmp_path / f"cut-in-{where}-{part}")
    old, new = look_at(machine).current, artifact.name
    if where == "transfer":
        with pytest.raises(UnreachableError):
            deploy(artifact, machine.device, Meter(machine, part))
    else:
        push_until_cut(machine, artifact, Fuse(machine, where, part * seconds[where]))
    machine.boot()

    found = look_at(machine)
    print(found)
    assert found.current == old or found.current.startswith(f"{new}-")
    assert ("old" if found.current == old else "new") in ALLOWED[where]
    check_service(machine, artifact)

    again = deploy(artifact, machine.device, Console(as_json=True))
    print({step.name: step.measured for step in again.steps})
    after = look_at(machine)
    assert after.current.startswith(f"{new}-")
    assert (after.state["good"], after.state["pending"]) == (after.current, None)
    assert after.incoming == 0


def push_until_cut(machine: Machine, artifact: Path, fuse: Fuse) -> None:
    """Push; whatever comes of it, the board is off afterwards."""
    with contextlib.suppress(UnreachableError):
        deploy(artifact, machine.device, Console(as_json=True), report=fuse)
    print({step.name: step.ok for step in fuse.steps}, fuse.title)
    fuse.timer.join()


def look_at(machine: Machine) -> Found:
    """Read phiship's folder without phiship."""
    told = machine.run(
        "cd .phiship/v1 && readlink current && ls incoming | wc -l && cat state.json"
    )
    current, incoming, state = told.split("\n", 2)
    return Found(Path(current).name, int(incoming), json.loads(state))


def check_service(machine: Machine, artifact: Path) -> None:
    """Do what a service does when it starts: recover, then answer; the answer must be right."""
    smoke = read_manifest(artifact).smoke
    assert smoke
    runner = f"{machine.device.python} .phiship/v1/current/runner.pyz"
    machine.run(f"{runner} agent recover --root .phiship")
    ask = f"--prompt '{smoke.prompt}' --max-tokens {smoke.max_tokens} --json"
    told = machine.run(f"{runner} generate --artifact .phiship/v1/current {ask}")
    assert smoke.expect in json.loads(told)["text"]


def write_variant(artifact: Path, folder: Path) -> Path:
    """Copy an artifact under the name of its new folder, with noise that has to be sent too."""
    shutil.copytree(artifact, folder)
    (folder / "noise.bin").write_bytes(random.Random(folder.name).randbytes(NOISE_BYTES))
    manifest = read_manifest(folder)
    named = msgspec.structs.replace(manifest, name=folder.name, files=list_files(folder))
    write_manifest(folder, named)
    return folder
