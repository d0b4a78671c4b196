"""The runner's command line: `generate` for answers, `agent` for the device side of a push."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .agent.layout import open_layout
from .agent.releases import start_trial
from .agent.serve import serve
from .failure import Failure
from .generate import generate


def main(arguments: list[str]) -> int:
    """Run one command; 0 when it succeeded, 1 on an expected failure, 2 on wrong usage."""
    parser = argparse.ArgumentParser(prog="runner", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ask = commands.add_parser("generate", help="answer one prompt")
    ask.add_argument("--artifact", type=Path, required=True, help="folder with a manifest.json")
    ask.add_argument("--prompt", help="without it, the prompt is read from standard input")
    ask.add_argument("--max-tokens", type=int, default=256)
    ask.add_argument("--json", action="store_true", help="print one JSON object at the end")
    agent = commands.add_parser("agent", help="the device side of a push")
    agent.add_argument("agent", choices=["serve", "recover"])
    agent.add_argument("--root", required=True, help="the device's folder")
    options = parser.parse_args(arguments)
    try:
        return _agent(options) if options.command == "agent" else _generate(options)
    except Failure as failure:
        _report(failure, as_json=options.command == "agent" or options.json)
        return 1


def _agent(options: argparse.Namespace) -> int:
    """`serve` answers a push; `recover` is what a service runs before it starts a release."""
    if options.agent == "serve":
        return serve(options.root)
    print(json.dumps(start_trial(open_layout(options.root))))
    return 0


def _generate(options: argparse.Namespace) -> int:
    prompt = options.prompt
    if prompt is None:
        prompt = sys.stdin.buffer.read().decode("utf-8")
    answer = generate(
        options.artifact,
        prompt,
        options.max_tokens,
        _ignore if options.json else _stream,
    )
    if options.json:
        print(json.dumps(answer))
    else:
        print()
        print(
            f"{answer['new_tokens']} tokens, {answer['tokens_per_second']:.1f} tokens/s, "
            f"loaded in {answer['load_seconds']:.1f} s, "
            f"peak memory {answer['peak_memory_bytes'] / 1e6:.0f} MB, "
            f"{answer['engine']} on {answer['provider']}",
            file=sys.stderr,
        )
    return 0


def _ignore(piece: str) -> None:
    del piece


def _stream(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _report(failure: Failure, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": failure.to_json()}))
    else:
        print(f"error: {failure}\n  {failure.advice}".rstrip(), file=sys.stderr)
