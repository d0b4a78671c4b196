"""A device's service, by a real systemd: asked for, restarted by a push, left when it fails."""

import json
import os
import plistlib
import random
import shlex
import signal
import socket
import stat
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.deploy.proxy import Proxy
from tests.deploy.sshd import OpenSSH
from tests.deploy.systemd import user_systemd
from toolkit.artifact import Smoke
from toolkit.console import Console
from toolkit.deploy import deploy, roll_back
from toolkit.device import Device
from toolkit.endpoint import chat
from toolkit.errors import RolledBackError, RunnerError, SettingsError, UnreachableError
from toolkit.place import open_device, open_place
from toolkit.remote import Service, read_facts, read_service, read_status, uninstall
from toolkit.report import Report
from toolkit.runner.agent.layout import open_layout
from toolkit.runner.agent.managers import Launchd, quote_unit
from toolkit.serve import install_service, remove_service, serve_device
from toolkit.ssh.embedded import EmbeddedDevice
from toolkit.ssh.session import open_session
from toolkit.trial import Trial, put_into_use

WAIT_S = 60
SMOKE = Smoke(prompt="What is the capital of France?", expect="Paris")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "embedded" / "home"


@pytest.fixture
def served(home: Path, start_embedded: Callable[..., EmbeddedDevice]) -> Iterator[Device]:
    """A device whose user has a systemd."""
    with user_systemd(home) as environment:
        yield start_embedded(environment=environment).start()


@pytest.fixture
def port() -> int:
    """A free one that no other test's server is given: below what systems choose from."""
    while True:
        number = random.randrange(20_000, 30_000)
        with suppress(OSError), socket.socket() as free:
            free.bind(("0.0.0.0", number))
            return number


def ask_model(port: int, token: str = "") -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=10) as response:
        found: list[dict[str, Any]] = json.load(response)["data"]
    return str(found[0]["id"])


def look(device: Device) -> Service:
    with open_session(device) as session:
        return read_service(session)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError("it has not come true")


def test_service_serves_whatever_release_is_in_use(
    artifacts: dict[str, Path], served: Device, home: Path, port: int, console: Console
) -> None:
    deploy(artifacts["onnx"], served, console)
    install_service(served, port, "127.0.0.1", None, [], console)
    assert ask_model(port) == artifacts["onnx"].name
    found = look(served)
    assert (found.active, found.name, found.port) == (True, "phiship.service", port)
    # More than Python's own, less than all there is.
    assert 5_000_000 < found.memory_bytes < 1_000_000_000
    report = deploy(artifacts["gguf"], served, console)
    assert ask_model(port) == artifacts["gguf"].name
    names = [step.name for step in report.steps]
    assert names.index("health") < names.index("service") < names.index("confirm")
    roll_back(served, Report("rollback"))
    assert ask_model(port) == artifacts["onnx"].name
    remove_service(served, console)
    assert not look(served).installed
    assert not list(home.rglob("*.service"))
    with pytest.raises(OSError, match="refused"):
        ask_model(port)


def test_service_starts_again_after_a_crash(
    artifacts: dict[str, Path], served: Device, port: int, console: Console
) -> None:
    deploy(artifacts["onnx"], served, console)
    install_service(served, port, "127.0.0.1", None, [], console)
    process = subprocess.run(
        ["pgrep", "-f", f"serve --artifact .* --port {port}"], capture_output=True, check=True
    )
    first = int(process.stdout)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: look(served).active and ask_model(port) == artifacts["onnx"].name)


def test_token_is_kept_from_others(
    artifacts: dict[str, Path], served: Device, home: Path, port: int, console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    deploy(artifacts["onnx"], served, console)
    with pytest.raises(SettingsError, match="there is no token"):
        install_service(served, port, "0.0.0.0", None, [], console)
    with pytest.raises(SettingsError, match="MY_TOKEN holds no token"):
        install_service(served, port, "0.0.0.0", "MY_TOKEN", [], console)
    monkeypatch.setenv("MY_TOKEN", "between-you-and-me")
    install_service(served, port, "0.0.0.0", "MY_TOKEN", [], console)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask_model(port)
    assert ask_model(port, "between-you-and-me") == artifacts["onnx"].name
    holders = [path for path in home.rglob("*") if path.is_file() and not path.is_symlink()]
    holders = [path for path in holders if b"between-you-and-me" in path.read_bytes()]
    assert [(path.name, stat.S_IMODE(path.stat().st_mode)) for path in holders] == [
        ("token", 0o600)
    ]
    uninstall(served)
    assert not list(home.rglob("*.service")) and not (home / ".phiship").exists()


def test_release_whose_service_fails_is_left_for_the_good_one(
    artifacts: dict[str, Path], served: Device, port: int, console: Console
) -> None:
    """It answers a question; its engine has no setting that the service was installed with."""
    deploy(artifacts["gguf"], served, console)
    install_service(served, port, "127.0.0.1", None, ["--kv-bits", "8"], console)
    before = read_status(served).current
    with pytest.raises(RolledBackError, match="has no setting kv_bits") as caught:
        deploy(artifacts["onnx"], served, console)
    assert f"the device is back on {before}" in str(caught.value)
    wait_for(lambda: ask_model(port) == artifacts["gguf"].name)
    assert read_status(served).state.good == before


def test_trial_that_nobody_watches_ends_with_the_next_start(
    artifacts: dict[str, Path], served: Device, home: Path, port: int, console: Console
) -> None:
    """As after a power cut: the release on trial may start once; then the good one serves."""
    deploy(artifacts["onnx"], served, console)
    install_service(served, port, "127.0.0.1", None, [], console)
    good = read_status(served).current
    deploy(artifacts["gguf"], served, console)
    layout = open_layout(str(home / ".phiship"))
    trial = read_status(served).current
    layout.write_state(good=good, pending=trial, tries_left=1)
    for expected in (trial, good):
        subprocess.run(
            ["systemctl", "--user", "restart", "phiship.service"], check=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(home / "run")},
        )  # fmt: skip
        assert expected
        wait_for(lambda expected=expected: ask_model(port) in str(expected))
    assert layout.read_state()["good"] == good


def test_paused_service_comes_back_with_the_end_of_the_push(
    artifacts: dict[str, Path], served: Device, port: int, console: Console
) -> None:
    deploy(artifacts["onnx"], served, console)
    install_service(served, port, "127.0.0.1", None, [], console)
    with open_session(served) as session:
        session.lock()
        session.call("pause_service")
        assert not read_service(session).active
    wait_for(lambda: ask_model(port) == artifacts["onnx"].name)


def test_paused_service_comes_back_when_the_push_is_cut(
    artifacts: dict[str, Path], openssh: OpenSSH, tmp_path: Path, port: int, console: Console
) -> None:
    """In the middle of work of the agent's, which only its beats tell that nobody is there."""
    with user_systemd(tmp_path / "user") as environment:
        device = openssh.device(tmp_path / "root", host_key=openssh.fingerprint())
        variables = shlex.join(f"{name}={value}" for name, value in environment.items())
        device = msgspec.structs.replace(device, python=f"env {variables} {device.python}")
        deploy(artifacts["onnx"], device, console)
        install_service(device, port, "127.0.0.1", None, [], console)
        with suppress(UnreachableError), Proxy(device.port) as proxy:
            behind = msgspec.structs.replace(device, port=proxy.port)
            with open_session(behind) as session:
                session.lock()
                session.call("pause_service")
                assert not look(device).active
                threading.Timer(2, proxy.cut).start()
                words = ["serve", "--port", "0"]
                session.call("run", release="current", arguments=words, stdin="", timeout_s=600)
        wait_for(lambda: ask_model(port) == artifacts["onnx"].name)
        remove_service(device, console)


def test_push_pauses_a_service_when_memory_holds_one_model(
    artifacts: dict[str, Path], served: Device, port: int, console: Console
) -> None:
    """Need is set between what is free now and what is free without the service."""
    deploy(artifacts["onnx"], served, console)
    install_service(served, port, "127.0.0.1", None, [], console)
    status, report = read_status(served), Report("trial")
    with open_session(served) as session:
        session.lock()
        free_bytes = read_facts(session).usable_memory_bytes
        assert free_bytes and status.current
        trial = Trial(status.current, SMOKE, free_bytes + (1 << 40), is_new=False)
        put_into_use(session, trial, report)
    assert [step.name for step in report.steps] == [
        "pause service", "smoke test", "switch", "health", "service", "confirm",
    ]  # fmt: skip
    assert ask_model(port) == artifacts["onnx"].name


def test_push_starts_a_service_that_is_down(
    artifacts: dict[str, Path], served: Device, home: Path, port: int, console: Console
) -> None:
    deploy(artifacts["onnx"], served, console)
    install_service(served, port, "127.0.0.1", None, [], console)
    subprocess.run(
        ["systemctl", "--user", "stop", "phiship.service"], check=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(home / "run")},
    )  # fmt: skip
    assert not look(served).active
    deploy(artifacts["gguf"], served, console)
    assert ask_model(port) == artifacts["gguf"].name


def test_failed_change_of_a_service_leaves_the_one_that_works(
    artifacts: dict[str, Path], served: Device, port: int, console: Console
) -> None:
    deploy(artifacts["onnx"], served, console)
    install_service(served, port, "127.0.0.1", None, [], console)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RunnerError, match="does not answer"):
            install_service(served, taken.getsockname()[1], "127.0.0.1", None, [], console)
    wait_for(lambda: ask_model(port) == artifacts["onnx"].name)
    assert look(served).port == port


def test_port_of_another_server(
    artifacts: dict[str, Path], served: Device, console: Console
) -> None:
    """Whose /health is well, as llama-server's would be."""
    deploy(artifacts["onnx"], served, console)
    with open_place(str(artifacts["onnx"])) as place, place.serving() as other:
        number = int(other.base_url.rpartition(":")[2].removesuffix("/v1"))
        with pytest.raises(RunnerError, match=f"another program answers on port {number}"):
            install_service(served, number, "127.0.0.1", None, [], console)
    assert not look(served).installed


def test_settings_and_address_of_a_service(
    artifacts: dict[str, Path], served: Device, port: int, console: Console
) -> None:
    deploy(artifacts["onnx"], served, console)
    install_service(served, port, "127.0.0.2", None, ["--context-tokens", "64"], console)
    with (
        open_device(served) as place,
        place.serving() as endpoint,
        pytest.raises(RunnerError, match="context holds 64"),
    ):
        chat(endpoint, [{"role": "user", "content": "Hi"}], max_tokens=100, timeout_s=60)
    with pytest.raises(SettingsError, match="its service is active"):
        serve_device(served, 0, ["--threads", "1"], console)


def test_service_that_cannot_start_is_not_installed(
    artifacts: dict[str, Path], served: Device, home: Path, console: Console
) -> None:
    deploy(artifacts["onnx"], served, console)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RunnerError, match=r"does not answer: .*port"):
            install_service(served, taken.getsockname()[1], "127.0.0.1", None, [], console)
    assert not look(served).installed
    assert not list(home.rglob("*.service"))


def test_device_without_systemd_says_so(
    artifacts: dict[str, Path], board: Device, port: int, console: Console
) -> None:
    deploy(artifacts["onnx"], board, console)
    with pytest.raises(RunnerError, match="no systemd for its users"):
        install_service(board, port, "127.0.0.1", None, [], console)
    assert not look(board).installed


def test_property_list_of_launchd(tmp_path: Path) -> None:
    """Read back by Python's own reader; no Mac was at hand."""
    layout = open_layout(str(tmp_path / "a & b"))
    data = plistlib.loads(Launchd(layout).describe(["--port", "1"]).encode())
    assert data["ProgramArguments"][-3:] == ["--", "--port", "1"]
    assert data["ProgramArguments"][3:5] == ["agent", "start"]
    assert data["KeepAlive"] == {"SuccessfulExit": False}
    assert data["RunAtLoad"] is True


def test_words_of_a_unit_are_words() -> None:
    assert quote_unit('a "b" $HOME 50% \\') == '"a \\"b\\" $$HOME 50%% \\\\"'
