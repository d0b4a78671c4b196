"""A real systemd for a user of its own, where this machine lets us start one (root, cgroups)."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

SYSTEMD = "/lib/systemd/systemd"
START_TIMEOUT_S = 30
# systemd asks whether the machine runs it; it is told so in a mount namespace of its own.
PROGRAM = """
mkdir -p /run/systemd && mount -t tmpfs tmpfs /run/systemd && mkdir /run/systemd/system &&
exec {systemd} --user
"""


@contextmanager
def user_systemd(home: Path) -> Iterator[Mapping[str, str]]:
    """Start it for a home folder; yields the environment in which systemctl --user finds it."""
    if os.getuid() != 0 or not shutil.which("unshare") or not Path(SYSTEMD).exists():
        pytest.skip("systemd --user needs root, unshare and the package systemd here")
    runtime = home / "run"
    runtime.mkdir(parents=True, mode=0o700)
    places = {"XDG_RUNTIME_DIR": runtime, "HOME": home, "XDG_CONFIG_HOME": home / ".config"}
    environment = {name: str(path) for name, path in places.items()}
    log = home / "systemd.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-ec", PROGRAM.format(systemd=SYSTEMD)],
            env={**os.environ, **environment}, stdout=stream, stderr=stream,
        )  # fmt: skip
    try:
        _wait(process, environment, log)
        yield environment
    finally:
        process.terminate()
        try:
            process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], environment: Mapping[str, str], log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    command = ["systemctl", "--user", "show-environment"]
    while process.poll() is None and time.monotonic() < deadline_s:
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, check=False
        )
        if done.returncode == 0:
            return
        time.sleep(0.1)
    text = log.read_text(errors="replace")
    pytest.skip(f"systemd --user does not start here: {text.strip().splitlines()[-1:]}")
