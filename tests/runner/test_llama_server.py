"""llama-server as a child process: which one, with what rights, and that it dies with us."""

import http.client
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runner.models import (
    QUESTION,
    SERVER,
    ask_ids,
    chosen,
    find_llama_server,
    generate_ids,
    open_model,
    pass_over_missing,
)
from toolkit.runner import engines
from toolkit.runner.engines import _llama_server as child
from toolkit.runner.engines import llama_cpp
from toolkit.runner.failure import Failure
from toolkit.runner.loading import Loaded, import_engine
from toolkit.runner.manifest import read_manifest
from toolkit.runner.settings import Sampling, Settings

OLD = "version: 8146 (1a2b3c4)\nbuilt with cc (Debian) 12.2.0 for x86_64-linux-gnu\n"
NEW = "version: 0.5.0-dev (build 11549, commit 0c1e570)\nbuilt with GNU 12.2.0 for Linux x86_64\n"


@pytest.mark.parametrize(
    ("text", "build"),
    [
        (OLD, 8146),
        (NEW, 11549),
        ("version: 0 (unknown)\n", 0),
        ("version: 0.5.0 (build 0, commit unknown)", 0),
        ("ggml_cuda_init: found 1 CUDA devices\n" + OLD, 8146),
        ("llama-server 1.0", 0),
        ("", 0),
    ],
)
def test_build_numbers_are_read(text: str, build: int) -> None:
    assert child.read_build(text) == build


def write_program(path: Path, text: str, code: int = 0) -> Path:
    """A program that prints what a llama-server of some build would."""
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("version: 8145 (1a2b3c4)", 0, "is build 8145; the lowest that fits is 8146"),
        ("version: 0 (unknown)", 0, "of unknown build; the lowest that fits is 8146"),
        ("illegal instruction", 132, "--version fails"),
    ],
)
def test_a_program_that_does_not_fit_says_why(
    text: str, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = write_program(tmp_path / "llama-server", text, code)
    monkeypatch.setenv(child.VARIABLE, str(program))
    with pytest.raises(ImportError, match=words):
        engines.import_package(llama_cpp)
    monkeypatch.delenv(child.VARIABLE)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ImportError, match=words):
        child.find_program()


def test_a_program_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(child.VARIABLE, "/nowhere/llama-server")
    with pytest.raises(ImportError, match="/nowhere/llama-server: no such program"):
        engines.import_package(llama_cpp)
    monkeypatch.delenv(child.VARIABLE)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ImportError, match="is not in PATH"):
        child.find_program()


def test_devices_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names decide which providers are active."""
    program = tmp_path / "llama-server"
    devices = "Available devices:\n  CUDA0: NVIDIA Orin (30697 MiB, 20000 MiB free)"
    write_program(program, f"{OLD}{devices}")
    monkeypatch.setenv(child.VARIABLE, str(program))
    assert child.find_program() == child.Program(str(program), 8146, ("CUDA0",))
    with pytest.raises(Failure, match="has only CPU, CUDA0 here"):
        llama_cpp.load(tmp_path, "model.gguf", "vulkan", Settings(64))


@pytest.fixture
def without_wheel(artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A device where xllamacpp cannot be imported; the artifact was built elsewhere."""
    assert artifacts["gguf"]
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.delenv(child.VARIABLE, raising=False)


@pytest.mark.usefixtures("without_wheel")
def test_without_wheel_and_program_both_are_named(
    artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Failure, match=r"xllamacpp.*llama-server is not in PATH") as caught:
        import_engine(read_manifest(artifacts["gguf"]))
    assert caught.value.kind == "runtime"


@pytest.mark.usefixtures("without_wheel")
def test_the_program_in_path_takes_the_wheels_place(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pass_over_missing(SERVER)
    (tmp_path / "llama-server").symlink_to(str(find_llama_server()))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with open_model("gguf", artifacts, threads=1) as loaded:
        assert loaded.model.version.startswith("llama-server b")
        assert len(generate_ids(loaded, ask_ids(loaded), 3)) == 3


def test_program_and_wheel_answer_alike(models: dict[str, Loaded]) -> None:
    loaded = [models[SERVER], models["gguf"]]
    prompts = [ask_ids(one, QUESTION) for one in loaded]
    assert prompts[0] == prompts[1]
    answers = [list(one.model.generate(prompts[0], 24)) for one in loaded]
    assert answers[0] == answers[1]


def test_only_we_can_ask_it(models: dict[str, Loaded]) -> None:
    """The key is in no argument; without it there is no answer; nothing listens but loopback."""
    server = models[SERVER].model._server
    pid = _find_server(server._shell.pid)
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
    assert server.key.encode() not in arguments
    assert b".gguf" not in arguments
    environment = Path(f"/proc/{pid}/environ")
    assert server.key.encode() in environment.read_bytes()
    assert stat.S_IMODE(environment.stat().st_mode) == 0o400
    assert server.host == "127.0.0.1"
    for path in ("/completion", "/tokenize", "/slots", "/props"):
        connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
        connection.request("POST", path, b"{}")
        assert connection.getresponse().status == 401
        connection.close()


def test_users_own_settings_of_llama_server_are_not_taken_over(
    artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "64")
    monkeypatch.setenv("LLAMA_API_KEY", "known")
    monkeypatch.setenv("LLAMA_ARG_API_PREFIX", "/elsewhere")
    with open_model(SERVER, artifacts) as loaded:
        assert len(generate_ids(loaded, list(range(10, 110)), 2)) == 2


def _find_server(shell: int) -> int:
    """Return the process id of the shell's llama-server."""
    children = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
    names = {Path(f"/proc/{pid}/comm").read_text().strip(): int(pid) for pid in children}
    return names["llama-server"]


def is_running(pid: int) -> bool:
    """Whether a process is there and no corpse."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:4]
    except OSError:
        return False


def wait_for_end(pid: int) -> bool:
    """Return whether a process ends; a minute is for a machine that does much else."""
    deadline_s = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return not is_running(pid)


def test_closing_ends_it(artifacts: dict[str, Path]) -> None:
    with open_model(SERVER, artifacts) as loaded:
        pid = _find_server(loaded.model._server._shell.pid)
        assert is_running(pid)
    assert not is_running(pid)


LOAD = """
import sys, time
from pathlib import Path
from toolkit.runner.loading import loading
from toolkit.runner.settings import Sampling, Settings
with loading(Path(sys.argv[1]), Settings(64, threads=1)) as loaded:
    print(loaded.model._server._shell.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_its_parent(number: signal.Signals, artifacts: dict[str, Path]) -> None:
    pass_over_missing(SERVER)
    command = [sys.executable, "-c", LOAD, str(artifacts["gguf"])]
    with chosen(SERVER), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = _find_server(int(parent.stdout.readline()))
        assert is_running(pid)
        parent.send_signal(number)
    assert wait_for_end(pid)


def test_a_keyboards_interrupt_is_not_for_it(models: dict[str, Loaded]) -> None:
    shell = models[SERVER].model._server._shell.pid
    assert os.getpgid(_find_server(shell)) == os.getpgid(shell) != os.getpgid(0)


def test_a_server_that_dies_is_an_error_with_its_words(artifacts: dict[str, Path]) -> None:
    with open_model(SERVER, artifacts) as loaded:
        stream = loaded.model.generate(ask_ids(loaded), 400, Sampling(1e4, seed=5))
        next(stream)
        os.kill(_find_server(loaded.model._server._shell.pid), signal.SIGKILL)
        with pytest.raises(Failure, match="broke off"):
            list(stream)
        with pytest.raises(Failure, match="broke off /tokenize"):
            loaded.model.encode("x")


def test_what_it_says_of_a_bad_file_is_told(tmp_path: Path) -> None:
    pass_over_missing(SERVER)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with chosen(SERVER), pytest.raises(Failure, match=r"(?s)could not load .*gguf") as caught:
        llama_cpp.load(tmp_path, "model.gguf", "cpu", Settings(64))
    assert caught.value.kind == "model"


def test_a_taken_port_is_tried_again(
    artifacts: dict[str, Path], models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even by one that answers as a llama-server does: it never sees the key."""
    taken = models[SERVER].model._server.port
    ports = iter([taken, taken])
    find_port = child._find_port
    monkeypatch.setattr(child, "_find_port", lambda: next(ports, None) or find_port())
    with open_model(SERVER, artifacts) as loaded:
        assert loaded.model._server.port != taken
        assert len(generate_ids(loaded, ask_ids(loaded), 2)) == 2
