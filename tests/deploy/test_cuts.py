"""A push that dies anywhere: the device serves the old or the new release, and the next one works.

The agent is killed before every single change that it makes to the device's files, and the
connection is cut after every step and in the middle of the transfer; the server is OpenSSH.
"""

import contextlib
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from tests.cli.commands import start
from tests.deploy.proxy import Proxy
from tests.deploy.sealed import seal_noise
from tests.deploy.sshd import OpenSSH
from toolkit.artifact import hash_file
from toolkit.console import Console
from toolkit.deploy import Push, deploy
from toolkit.device import Device
from toolkit.errors import RunnerError, StrandedError, UnreachableError
from toolkit.remote import generate, read_status
from toolkit.report import Report, Step
from toolkit.ssh import channel, session
from toolkit.ssh import openssh as openssh_module
from toolkit.ssh.carrier import Carrier

KILLER = Path(__file__).with_name("killer.py")
QUESTION, ANSWER = "What is the capital of France?", "Paris"
# One change of files a number; the first deploy of these artifacts makes fewer than this.
MOST_CHANGES = 120
GROUPS = 6
# After one kill in so many the next push is made and the model asked; the kills between are of the
# same kinds, and what they leave is looked at all the same.
HEALED_ONE_IN = 3


@pytest.fixture
def console() -> Console:
    """Says nothing: these tests deploy a hundred times."""
    return Console()


@pytest.fixture(scope="session")
def served(
    artifacts: dict[str, Path], openssh: OpenSSH, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A device's folder with one release in use, to be copied."""
    root = tmp_path_factory.mktemp("served") / "root"
    device = openssh.device(root, host_key=openssh.fingerprint())
    deploy(artifacts["onnx"], device, Console(as_json=True))
    return root


def copy(served: Path, openssh: OpenSSH, root: Path, **changes: object) -> Device:
    shutil.copytree(served, root, symlinks=True)
    return openssh.device(root, host_key=openssh.fingerprint(), **changes)


def require_service(root: Path, allowed: set[str]) -> str:
    """The release in use is whole: every file is there and has its sha256. Returns its name."""
    current = root / "v1" / "current"
    name = current.readlink().name
    assert name in allowed
    manifest = json.loads((current / "manifest.json").read_text())
    for file in manifest["files"]:
        assert hash_file(current / file["path"]) == file["sha256"]
    assert (current / "runner.pyz").is_file()
    return name


@dataclass(frozen=True)
class Unharmed:
    """A push that nothing disturbed: its changes, the release it left and the one before."""

    changes: list[str]
    current: str
    previous: str


@pytest.fixture(scope="session")
def unharmed(
    served: Path, openssh: OpenSSH, artifacts: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Unharmed:  # fmt: skip
    """Deploy under the killer's eyes."""
    root = tmp_path_factory.mktemp("unharmed") / "root"
    device = copy(served, openssh, root, python=name_killer(root, None))
    deploy(artifacts["gguf"], device, Console())
    status = read_status(openssh.device(root, host_key=openssh.fingerprint()))
    changes = root.with_suffix(".json.log").read_text().splitlines()
    return Unharmed(changes, str(status.current), str(status.previous))


def name_killer(root: Path, kill_at: int | None) -> str:
    state = root.with_suffix(".json")
    state.write_text(json.dumps({"kill_at": kill_at}))
    return f"{sys.executable} {KILLER} {state}"


@pytest.mark.parametrize("group", range(GROUPS))
def test_agent_killed_before_every_change(
    served: Path, openssh: OpenSSH, artifacts: dict[str, Path], tmp_path: Path, console: Console,
    unharmed: Unharmed, group: int,
) -> None:  # fmt: skip
    artifact, changes = artifacts["gguf"], unharmed.changes
    assert GROUPS < len(changes) < MOST_CHANGES
    both = {unharmed.current, unharmed.previous}
    for number in range(1 + group, len(changes) + 1, GROUPS):
        root = tmp_path / str(number)
        device = copy(served, openssh, root, python=name_killer(root, number))
        with pytest.raises((RunnerError, UnreachableError, StrandedError)):
            deploy(artifact, device, console)
        require_service(root, both)
        if number // GROUPS % HEALED_ONE_IN == group % HEALED_ONE_IN:
            healed = msgspec.structs.replace(device, python=sys.executable)
            assert ANSWER in generate(healed, QUESTION, 24).text
            deploy(artifact, healed, console)
            after = read_status(healed)
            assert after.current == after.state.good == unharmed.current, changes[number - 1]
            assert (after.incoming, after.state.pending) == ((), None)
            require_service(root, both)
        shutil.rmtree(root)


class CuttingReport(Report):
    """Cuts the connection when a step has ended."""

    def __init__(self, after: str, proxy: Proxy) -> None:
        super().__init__("deploy")
        self._after, self._proxy = after, proxy

    @contextlib.contextmanager
    def step(self, name: str, limit: str = "") -> Iterator[Step]:
        with super().step(name, limit) as step:
            yield step
        if name == self._after:
            self._proxy.cut()


STEPS = (
    "connect", "preflight", "lock", "compare", "disk", "transfer", "stage", "smoke test", "switch",
    "health", "confirm",
)  # fmt: skip


@pytest.mark.parametrize("after", STEPS)
def test_connection_cut_after_every_step(
    served: Path, openssh: OpenSSH, artifacts: dict[str, Path], tmp_path: Path, console: Console,
    after: str,
) -> None:  # fmt: skip
    device = copy(served, openssh, tmp_path / "root")
    before = read_status(device).current
    with Proxy(openssh.port) as proxy, pytest.raises(UnreachableError, match="connection was lost"):
        behind = msgspec.structs.replace(device, port=proxy.port)
        deploy(artifacts["gguf"], behind, console, report=CuttingReport(after, proxy))
    require_service(tmp_path / "root", {str(before), str(read_status(device).current)})
    assert ANSWER in generate(device, QUESTION, 24).text
    report = deploy(artifacts["gguf"], device, console)
    after_that = read_status(device)
    assert after_that.current == after_that.state.good != before
    lock = next(step for step in report.steps if step.name == "lock")
    # Between switch and confirm a release is on trial; the next push takes note.
    assert ("back to" in lock.measured) == (after in ("switch", "health"))


@pytest.mark.parametrize("carrier", ["paramiko", "openssh"])
def test_cut_near_the_end_costs_little(
    openssh: OpenSSH, tmp_path: Path, console: Console, carrier: Carrier
) -> None:
    """Killed at 90 %, a push sends at most 11 % again; unchanged, next to nothing.

    The artifact is noise that no runtime loads: each push ends at the smoke test. What is in the
    buffers of the kernels when the line is cut, up to 1 MB, is the part beyond the last 10 %.
    """
    artifact = seal_noise(tmp_path / "noise", size_bytes=300_000_000)
    push = Push(carrier=carrier)
    device = openssh.device(tmp_path / "root", host_key=openssh.fingerprint())
    with Proxy(openssh.port, cut_after=270_000_000) as proxy, pytest.raises(UnreachableError):
        deploy(artifact, msgspec.structs.replace(device, port=proxy.port), console, push)
    with Proxy(openssh.port) as proxy:
        behind = msgspec.structs.replace(device, port=proxy.port)
        with pytest.raises(RunnerError, match="cannot load"):
            deploy(artifact, behind, console, push)
        assert proxy.sent_bytes <= 0.11 * 300_000_000
        before = proxy.sent_bytes
        with pytest.raises(RunnerError, match="cannot load"):
            deploy(artifact, behind, console, push)
        assert proxy.sent_bytes - before < 50_000


@pytest.mark.parametrize("carrier", ["paramiko", "openssh"])
def test_slow_network(
    openssh: OpenSSH, artifacts: dict[str, Path], tmp_path: Path, console: Console, carrier: Carrier
) -> None:
    """A far device on a thin line: 50 ms a packet, 5 MB/s."""
    device = openssh.device(tmp_path / "root", host_key=openssh.fingerprint())
    with Proxy(openssh.port, delay_s=0.05, bytes_per_s=5e6) as proxy:
        behind = msgspec.structs.replace(device, port=proxy.port)
        push = Push(carrier=carrier)
        assert deploy(artifacts["gguf"], behind, console, push).ok


@pytest.mark.parametrize("carrier", ["paramiko", "openssh"])
def test_network_that_falls_silent(
    openssh: OpenSSH, artifacts: dict[str, Path], tmp_path: Path, console: Console,
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """No hang: the stall is found, the lock is free for the next push."""
    for module in (channel, openssh_module):
        monkeypatch.setattr(module, "STALL_TIMEOUT_S", 2)
    monkeypatch.setattr(session, "SILENCE_TIMEOUT_S", 2)
    device = openssh.device(tmp_path / "root", host_key=openssh.fingerprint())
    with Proxy(openssh.port, stall_after=500_000) as proxy:
        behind = msgspec.structs.replace(device, port=proxy.port)
        with pytest.raises(UnreachableError, match="no answer in time"):
            push = Push(carrier=carrier)
            deploy(artifacts["onnx"], behind, console, push)
    assert deploy(artifacts["onnx"], device, console).ok


@pytest.mark.parametrize("carrier", ["paramiko", "openssh"])
def test_interrupt_while_sending(
    openssh: OpenSSH, tmp_path: Path, console: Console, carrier: Carrier
) -> None:
    """Ctrl-C: exit code 130, the lock is free at once, and what has arrived is not sent again."""
    artifact = seal_noise(tmp_path / "noise", size_bytes=20_000_000)
    device = openssh.device(tmp_path / "root", host_key=openssh.fingerprint())
    fields = msgspec.to_builtins(device)
    del fields["name"]
    devices = tmp_path / "devices.yaml"
    devices.write_text(json.dumps({"board": fields}))  # JSON is YAML
    process = start(
        "deploy", str(artifact), "board", "--devices", str(devices), "--carrier", carrier,
        "--limit-rate", "5MB", "--json",
    )  # fmt: skip
    assert process.stdout
    for line in process.stdout:
        if json.loads(line).get("done_bytes", 0) > 5_000_000:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    with pytest.raises(RunnerError, match="cannot load"):
        report = Report("deploy")
        deploy(artifact, device, console, report=report)
    steps = {step.name: step.measured for step in report.steps}
    assert "have arrived before" in steps["compare"]
