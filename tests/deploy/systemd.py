"""A real systemd for a user of its own, where this machine lets us start one (root, cgroups)."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

SYSTEMD = "/lib/systemd/systemd"
START_TIMEOUT_S = 30
# Where version 2 of control groups is mounted, by which systemd knows what it has started.
CONTROL_GROUPS = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
# In a control group of its own and a namespace that begins there: managers that share groups stop
# each other's services. And in a mount namespace, in which systemd finds that the machine runs it.
PROGRAM = """
echo $$ >{group}/cgroup.procs
exec unshare --mount --cgroup sh -ec '
umount {top} && mount -t cgroup2 none {top}
mkdir -p /run/systemd && mount -t tmpfs tmpfs /run/systemd && mkdir /run/systemd/system
exec {systemd} --user
'
"""
EXIT_AT_ONCE = signal.SIGRTMIN + 24  # systemd(1), for managers of users


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
    with control_group() as group, log.open("wb") as stream:
        program = PROGRAM.format(systemd=SYSTEMD, group=group, top=group.parent)
        process = subprocess.Popen(
            ["sh", "-ec", program],
            env={**os.environ, **environment}, stdout=stream, stderr=stream,
        )  # fmt: skip
        try:
            _wait(process, environment, log)
            yield environment
        finally:
            process.send_signal(EXIT_AT_ONCE)
            try:
                process.wait(START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def control_group() -> Iterator[Path]:
    """Make a group for the block; whatever is left in it then is killed."""
    tops = [top for top in CONTROL_GROUPS if (top / "cgroup.procs").exists()]
    if not tops:
        pytest.skip("systemd --user needs control groups")
    group = tops[0] / f"phiship-test-{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"systemd --user needs control groups that can be written: {error}")
    try:
        yield group
    finally:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while group.exists() and time.monotonic() < deadline_s:
            for listed in group.rglob("cgroup.procs"):
                for pid in listed.read_text().split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            for folder in sorted((p for p in group.rglob("*") if p.is_dir()), reverse=True):
                with suppress(OSError):
                    folder.rmdir()
            with suppress(OSError):
                group.rmdir()
            time.sleep(0.05)


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
