"""After the switch: the health gate, the way back, rollback on request."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.deploy.sealed import seal_noise
from tests.deploy.sshd import OpenSSH
from toolkit.artifact import Smoke
from toolkit.console import Console
from toolkit.deploy import Push, deploy, roll_back
from toolkit.device import Device, Health
from toolkit.errors import (
    PhishipError,
    PreflightError,
    RolledBackError,
    RunnerError,
    SmokeError,
    StrandedError,
)
from toolkit.remote import generate, read_history, read_logs, read_status, uninstall
from toolkit.report import Report, Step
from toolkit.smoke import Answer, check_health
from toolkit.ssh.embedded import EmbeddedDevice

QUESTION, ANSWER = "What is the capital of France?", "Paris"
IMPOSSIBLE = Health(min_tokens_per_second=1e9)


def with_health(device: Device, **limits: object) -> Device:
    return msgspec.structs.replace(device, health=Health(**limits))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"min_tokens_per_second": 1e9}, r"tokens/s; at least 1e\+09 are asked for"),
        ({"max_memory": 1_000_000}, r"MB of memory; 1 MB are allowed"),
    ],
)
def test_unhealthy_release_is_left_for_the_good_one(
    artifacts: dict[str, Path], device: Device, console: Console, limits: dict[str, float],
    words: str,
) -> None:  # fmt: skip
    deploy(artifacts["onnx"], device, console)
    before = read_status(device)
    report = Report("deploy")
    with pytest.raises(RolledBackError, match=words) as caught:
        deploy(artifacts["gguf"], with_health(device, **limits), console, report=report)
    assert f"the device is back on {before.current}" in str(caught.value)
    assert [(step.name, step.ok) for step in report.steps[-2:]] == [
        ("health", False),
        ("return", True),
    ]
    after = read_status(device)
    assert (after.current, after.state.good) == (before.current, before.current)
    assert after.releases == before.releases
    assert ANSWER in generate(device, QUESTION, 24).text
    # The files stay: the next try sends nothing again.
    again = deploy(artifacts["gguf"], device, console)
    assert next(s for s in again.steps if s.name == "transfer").measured == "0 B sent"


def test_unhealthy_first_release_is_taken_out_of_use(
    artifacts: dict[str, Path], board: Device, console: Console
) -> None:
    with pytest.raises(RolledBackError, match="back on nothing, as before"):
        deploy(artifacts["gguf"], msgspec.structs.replace(board, health=IMPOSSIBLE), console)
    status = read_status(board)
    assert (status.current, status.releases) == (None, ())


def test_unhealthy_release_that_was_in_use_stays(
    artifacts: dict[str, Path], board: Device, console: Console
) -> None:
    """The device has become slow, not the release bad: there is nothing to go back to."""
    deploy(artifacts["gguf"], board, console)
    with pytest.raises(SmokeError, match="tokens/s"):
        deploy(artifacts["gguf"], msgspec.structs.replace(board, health=IMPOSSIBLE), console)
    assert ANSWER in generate(board, QUESTION, 24).text


def test_way_back_that_is_blocked(
    artifacts: dict[str, Path], board: Device, console: Console
) -> None:
    """Neither hidden nor half: exit code 17, the trial is on record, the next push ends it."""
    deploy(artifacts["onnx"], board, console)
    base = Path(read_status(board).root)

    class Blocking(Report):
        @contextlib.contextmanager
        def step(self, name: str, limit: str = "") -> Iterator[Step]:
            if name == "health":
                (base / "current.new").mkdir()
            with super().step(name, limit) as step:
                yield step

    sick = msgspec.structs.replace(board, health=IMPOSSIBLE)
    with pytest.raises(StrandedError, match="the way back failed"):
        deploy(artifacts["gguf"], sick, console, report=Blocking("deploy"))
    status = read_status(board)
    assert status.state.pending == status.current != status.state.good
    (base / "current.new").rmdir()
    deploy(artifacts["gguf"], board, console)
    assert read_status(board).state.pending is None


def test_answer_in_use_must_be_the_staged_one() -> None:
    fields = {
        "prompt_tokens": 1, "new_tokens": 1, "tokens_per_second": 1.0, "first_token_seconds": 1.0,
        "load_seconds": 1.0, "peak_memory_bytes": 1, "provider": "cpu", "engine": "x",
        "stop_reason": "stop",
    }  # fmt: skip
    staged = Answer(text="Paris", token_ids=(1,), **fields)
    other = Answer(text="Paris!", token_ids=(1, 2), **fields)
    check_health("board", staged, staged, Health(), ("under-voltage",))
    with pytest.raises(SmokeError, match="staged it had answered 'Paris'"):
        check_health("board", other, staged, Health(), ())
    with pytest.raises(SmokeError, match="throttled while it answers: under-voltage"):
        check_health("board", staged, staged, Health(refuse_throttling=True), ("under-voltage",))


def test_rollback_there_and_back(
    artifacts: dict[str, Path], device: Device, console: Console
) -> None:
    for name in ("onnx", "gguf"):
        deploy(artifacts[name], device, console)
    before = read_status(device)
    for current, previous in ((before.previous, before.current), (before.current, before.previous)):
        roll_back(device, Report("rollback"))
        after = read_status(device)
        assert (after.current, after.previous, after.state.good) == (current, previous, current)
        assert ANSWER in generate(device, QUESTION, 24).text
    roll_back(device, Report("rollback"), to=before.previous)
    assert read_status(device).current == before.previous
    events = [event["event"] for event in read_history(device)]
    assert events.count("confirmed") == 5


def test_rollback_to_what_is_not_there(
    artifacts: dict[str, Path], board: Device, console: Console
) -> None:
    with pytest.raises(PreflightError, match="no release before the one in use"):
        roll_back(board, Report("rollback"))
    deploy(artifacts["gguf"], board, console)
    with pytest.raises(PreflightError, match="no release nothing; besides it are there: none"):
        roll_back(board, Report("rollback"), to="nothing")


def test_rollback_that_answers_wrong_changes_nothing(
    artifacts: dict[str, Path], board: Device, console: Console
) -> None:
    for name in ("onnx", "gguf"):
        deploy(artifacts[name], board, console)
    before = read_status(board)
    with pytest.raises(SmokeError):
        wrong = Smoke(prompt=QUESTION, expect="Atlantis")
        roll_back(board, Report("rollback"), smoke=wrong)
    after = read_status(board)
    assert (after.current, after.releases) == (before.current, before.releases)


def test_dry_run_changes_nothing(
    artifacts: dict[str, Path], board: Device, console: Console
) -> None:
    report = deploy(artifacts["gguf"], board, console, Push(dry_run=True))
    steps = {step.name: step.measured for step in report.steps}
    assert steps["compare"].startswith("4 of 4 files to send")
    assert "transfer" not in steps
    status = read_status(board)
    assert (status.blobs, status.releases) == (1, ())  # the runner alone
    assert read_history(board) == []


def test_runner_s_last_words_are_kept(board: Device, tmp_path: Path, console: Console) -> None:
    assert read_logs(board) == ""
    with pytest.raises(RunnerError):
        deploy(seal_noise(tmp_path / "noise"), board, console)
    assert "noise-0-" in read_logs(board)


def test_uninstall(artifacts: dict[str, Path], board: Device, console: Console) -> None:
    deploy(artifacts["gguf"], board, console)
    base = Path(read_status(board).root)
    assert uninstall(board) == str(base)
    assert not base.exists()
    assert read_status(board).current is None  # and it can be used again


def test_two_deploys_at_once(
    artifacts: dict[str, Path], openssh: OpenSSH, tmp_path: Path, console: Console
) -> None:
    """One wins, the other is told so; the device has one whole release."""
    device = openssh.device(tmp_path / "root", host_key=openssh.fingerprint())
    ended: list[PhishipError | None] = []

    def run(name: str) -> None:
        try:
            deploy(artifacts[name], device, console)
            ended.append(None)
        except PhishipError as error:
            ended.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("onnx", "gguf")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [error for error in ended if error]
    # The slower one may also come when the faster one has finished.
    assert len(refused) <= 1
    assert all("another push is under way" in str(error) for error in refused)
    status = read_status(device)
    assert status.current == status.state.good
    assert ANSWER in generate(device, QUESTION, 24).text


def test_clock_that_is_wrong(
    artifacts: dict[str, Path], start_embedded: Callable[..., EmbeddedDevice], tmp_path: Path,
    console: Console,
) -> None:  # fmt: skip
    """A board without a battery starts in 1970; nothing here depends on its time."""
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(
        "import time\nreal = time.time\ntime.time = lambda: real() - 1.7e9\n"
    )
    device = start_embedded(environment={"PYTHONPATH": str(tmp_path / "clock")}).start()
    for name in ("onnx", "gguf"):
        assert deploy(artifacts[name], device, console).ok
    assert read_history(device)[0]["time"] < 1e9
    roll_back(device, Report("rollback"))
