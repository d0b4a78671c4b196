"""`runner agent COMMAND`: one JSON object on stdout for each; requests come as JSON on stdin."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import engines
from .blobs import find_missing, receive_blobs
from .child import ask_release, import_engine
from .facts import read_facts
from .layout import Layout, open_layout
from .lock import check_lock, hold_lock
from .releases import (
    confirm_release,
    discard_release,
    read_status,
    stage_release,
    switch_release,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the agent's commands."""
    commands = parser.add_subparsers(dest="agent", required=True)

    def add(name: str, *options: str) -> None:
        command = commands.add_parser(name)
        command.add_argument("--root", required=True)
        for option in options:
            command.add_argument(option, required=True)

    add("facts")
    commands.choices["facts"].add_argument("--engine", default="")
    add("status")
    add("missing")
    add("ask", "--release", "--max-tokens", "--answer-timeout-s")
    add("hold", "--owner", "--token")
    # Those below change the device: they work for the push that holds the lock.
    add("receive", "--token")
    add("stage", "--token")
    add("discard", "--token", "--release")
    add("switch", "--token", "--release")
    add("confirm", "--token", "--release")


def run_agent(options: argparse.Namespace) -> int:
    """Run one command and print its object; `hold` prints its own."""
    layout = open_layout(options.root)
    if options.agent == "hold":
        return hold_lock(layout, options.owner, options.token)
    if hasattr(options, "token"):
        check_lock(layout, options.token)
    print(json.dumps(_COMMANDS[options.agent](layout, options)))
    return 0


def _facts(layout: Layout, options: argparse.Namespace) -> dict[str, Any]:
    facts = read_facts(layout)
    if options.engine:
        engine = engines.find_engine(options.engine)
        facts["engine"] = {"package": engine.PACKAGE, **import_engine(engine.MODULE)}
    return facts


def _missing(layout: Layout, _: argparse.Namespace) -> dict[str, Any]:
    return find_missing(layout, json.load(sys.stdin)["blobs"])


def _stage(layout: Layout, _: argparse.Namespace) -> dict[str, Any]:
    request = json.load(sys.stdin)
    return stage_release(layout, request["release"], request["files"])


def _ask(layout: Layout, options: argparse.Namespace) -> dict[str, Any]:
    name = options.release
    folder: Path = layout.current if name == "current" else layout.releases / name
    prompt = sys.stdin.buffer.read()
    return ask_release(folder, prompt, int(options.max_tokens), float(options.answer_timeout_s))


_COMMANDS: dict[str, Callable[[Layout, argparse.Namespace], dict[str, Any]]] = {
    "facts": _facts,
    "status": lambda layout, _: read_status(layout),
    "missing": _missing,
    "receive": lambda layout, _: receive_blobs(layout, sys.stdin.buffer),
    "stage": _stage,
    "ask": _ask,
    "discard": lambda layout, options: discard_release(layout, options.release),
    "switch": lambda layout, options: switch_release(layout, options.release),
    "confirm": lambda layout, options: confirm_release(layout, options.release),
}
