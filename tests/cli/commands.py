"""Runs the command line as its users do: in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """Start phiship; output is piped."""
    return subprocess.Popen(
        [sys.executable, "-m", "toolkit", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run phiship to its end."""
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def events(done: "subprocess.CompletedProcess[str]") -> list[dict[str, Any]]:
    """The JSON events that a command with --json printed."""
    return [json.loads(line) for line in done.stdout.splitlines()]
