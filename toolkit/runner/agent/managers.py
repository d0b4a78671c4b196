"""What starts services of this user: systemd --user on Linux, launchd on macOS.

Units: https://www.freedesktop.org/software/systemd/man/systemd.service.html
macOS: launchd.plist(5)
"""

from __future__ import annotations

import hashlib
import os
import plistlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..failure import Failure
from .child import SERVICE_LOG
from .durable import make_folder, replace_text
from .layout import Layout
from .releases import RUNNER

COMMAND_TIMEOUT_S = 60
STOP_TIMEOUT_S = 40
POLL_S = 0.2
DEFAULT_BASE = "~/.phiship/v1"
UNIT = """[Unit]
Description=phiship: answers OpenAI's API
StartLimitIntervalSec=600
StartLimitBurst=5

[Service]
ExecStart={command}
Restart=on-failure
RestartSec=5
KillSignal=SIGTERM
TimeoutStopSec=30
StandardOutput=append:{log}
StandardError=append:{log}

[Install]
WantedBy=default.target
"""


class Systemd:
    """systemd's manager of this user."""

    def __init__(self, layout: Layout) -> None:
        self.name = f"{name_service(layout)}.service"
        self._layout = layout
        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        self._path = config / "systemd" / "user" / self.name

    def write(self, arguments: Sequence[str]) -> None:
        """Write the unit and have it start at boot."""
        make_folder(self._path.parent)
        command = " ".join(quote_unit(word) for word in build_start(self._layout, arguments))
        log = str(self._layout.logs / SERVICE_LOG).replace("%", "%%")
        replace_text(self._path, UNIT.format(command=command, log=log))
        self._call("daemon-reload")
        self._call("enable", self.name)

    def remove(self) -> None:
        """Stop it and remove the unit."""
        self.stop()
        self._call("disable", self.name, check=False)
        self._path.unlink(missing_ok=True)
        self._call("daemon-reload", check=False)

    def stop(self) -> None:
        """Stop it; nothing happens when it does not run, or when there is no systemd any more."""
        self._call("stop", self.name, check=False)

    def restart(self) -> None:
        """Start it anew, whatever it has tried before."""
        self._call("reset-failed", self.name, check=False)
        self._call("restart", self.name)

    def has_failed(self) -> bool:
        """Whether it has ended since `restart`, even if it starts again by itself."""
        properties = ("--property=ActiveState", "--property=NRestarts")
        found = self._call("show", *properties, self.name, check=False).splitlines()
        return "NRestarts=0" not in found or not {
            "ActiveState=active", "ActiveState=activating", "ActiveState=reloading",
        }.intersection(found)  # fmt: skip

    def find_pid(self) -> int | None:
        """Return its process; None when it does not run."""
        text = self._call("show", "--property=MainPID", "--value", self.name, check=False)
        return int(text) if text.isdigit() and int(text) else None

    def _call(self, *words: str, check: bool = True) -> str:
        return run_manager(["systemctl", "--user", *words], check=check)


class Launchd:
    """launchd's domain of this user's session."""

    def __init__(self, layout: Layout) -> None:
        self.name = f"io.{name_service(layout)}.server"
        self._layout = layout
        self._domain = f"gui/{os.getuid()}"
        self._path = Path.home() / "Library" / "LaunchAgents" / f"{self.name}.plist"

    def write(self, arguments: Sequence[str]) -> None:
        """Write the property list; it starts when the user logs in."""
        make_folder(self._path.parent)
        replace_text(self._path, self.describe(arguments))

    def describe(self, arguments: Sequence[str]) -> str:
        """Return the property list."""
        return plistlib.dumps(
            {
                "Label": self.name,
                "ProgramArguments": build_start(self._layout, arguments),
                "RunAtLoad": True,
                "KeepAlive": {"SuccessfulExit": False},
                "ThrottleInterval": 5,
                "StandardOutPath": str(self._layout.logs / SERVICE_LOG),
                "StandardErrorPath": str(self._layout.logs / SERVICE_LOG),
            }
        ).decode()

    def remove(self) -> None:
        """Stop it and remove the property list."""
        self.stop()
        self._path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Stop it, and wait until launchd has forgotten it."""
        run_manager(["launchctl", "bootout", f"{self._domain}/{self.name}"], check=False)
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while self._print() and time.monotonic() < deadline_s:
            time.sleep(POLL_S)

    def restart(self) -> None:
        """Start it anew."""
        self.stop()
        run_manager(["launchctl", "bootstrap", self._domain, str(self._path)], check=True)

    def has_failed(self) -> bool:
        """Whether launchd no longer knows it; what crashes it starts again by itself."""
        return not self._print()

    def find_pid(self) -> int | None:
        """Return its process; None when it does not run."""
        found = [line.split("=")[1] for line in self._print().splitlines() if "\tpid =" in line]
        return int(found[0]) if found else None

    def _print(self) -> str:
        return run_manager(["launchctl", "print", f"{self._domain}/{self.name}"], check=False)


def choose_manager(layout: Layout) -> Systemd | Launchd:
    """Return what starts services of this user on such a system."""
    return Launchd(layout) if sys.platform == "darwin" else Systemd(layout)


def find_manager(layout: Layout) -> Systemd | Launchd:
    """Return what starts services of this user; Failure when it does not answer."""
    manager = choose_manager(layout)
    if isinstance(manager, Launchd):
        return manager
    if run_manager(["systemctl", "--user", "show-environment"], check=False):
        return manager
    raise Failure(
        "service",
        "this system has no systemd for its users, which the service needs",
        "log in through PAM, or start it by your own means: runner.pyz agent start --root ROOT",
    )


def name_service(layout: Layout) -> str:
    """Return `phiship`; with a part of the folder's digest when that is not the usual one."""
    if layout.base == Path(DEFAULT_BASE).expanduser():
        return "phiship"
    return f"phiship-{hashlib.sha256(str(layout.base).encode()).hexdigest()[:8]}"


def build_start(layout: Layout, arguments: Sequence[str]) -> list[str]:
    """Return the service's command; links in it are followed at each start."""
    runner = str(layout.current / RUNNER)
    root = str(layout.base.parent)
    return [sys.executable, "-B", runner, "agent", "start", "--root", root, "--", *arguments]


def quote_unit(word: str) -> str:
    """Quote a word of ExecStart: no specifier, no variable, one word."""
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"'


def run_manager(command: list[str], *, check: bool) -> str:
    """Run systemctl or launchctl; returns its output, Failure when it must succeed and does not."""
    folder = f"/run/user/{os.getuid()}"
    # Set by PAM at a login, which not every SSH server asks.
    runtime = {} if "XDG_RUNTIME_DIR" in os.environ else {"XDG_RUNTIME_DIR": folder}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False,
            timeout=COMMAND_TIMEOUT_S, env={**os.environ, **runtime},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        if check:
            raise Failure("service", f"{command[0]} failed: {error}") from None
        return ""
    if check and done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip()
        raise Failure("service", f"{' '.join(command)} failed: {words or done.returncode}")
    return done.stdout.decode("utf-8", "replace").strip()
