"""The runner's `bench`: options in, measurements out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from .benching import Work, bench
from .failure import Failure

PROMPT_TOKENS = "64,512,2048"
NEW_TOKENS = 64
REPEAT = 3
ASKED_TOKENS = 48


def add_bench(command: argparse.ArgumentParser) -> None:
    """Add what `bench` takes besides settings."""
    command.add_argument("--prompt-tokens", default=PROMPT_TOKENS, help="lengths, with commas")
    command.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="of each answer")
    command.add_argument("--repeat", type=int, default=REPEAT, help="runs of each length")
    command.add_argument("--ask", help="a question whose answer is to be reported as well")
    command.add_argument("--ask-tokens", type=int, default=ASKED_TOKENS, help="of that answer")
    command.add_argument(
        "--floor", type=float, nargs=2, default=(0.0, 0.0), metavar=("DECODE", "PROMPT"),
        help="tokens/s below which one round is enough",
    )  # fmt: skip
    command.add_argument("--fresh", action="store_true", help="without the settings that are kept")


def run_bench(options: argparse.Namespace, given: Mapping[str, int | None]) -> int:
    """Measure and print; with --json progress as lines of their own, the result last."""
    question = None if options.ask is None else (options.ask, options.ask_tokens)
    decode, prompt = options.floor
    work = Work(
        _parse_lengths(options.prompt_tokens), options.new_tokens, options.repeat, question,
        (decode, prompt), options.fresh,
    )  # fmt: skip
    if options.json:
        print(json.dumps(bench(options.artifact, work, given, _tell)))
    else:
        _show(bench(options.artifact, work, given, lambda _: None))
    return 0


def _parse_lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise Failure(
            "request", f"--prompt-tokens is {text!r}; allowed are numbers with commas: 64,512"
        ) from None


def _tell(progress: dict[str, Any]) -> None:
    print(json.dumps({"progress": progress}), flush=True)


def _show(found: dict[str, Any]) -> None:
    for length in found["lengths"]:
        first, rate = length["first_token_seconds"], length["tokens_per_second"]
        decode = f"{rate['median']:.1f} tokens/s" if rate else "one token only"
        print(f"{length['prompt_tokens']:6} tokens: first after {first['median']:.2f} s, {decode}")
    print(
        f"loaded in {found['load_seconds']:.1f} s, peak memory "
        f"{found['peak_memory_bytes'] / 1e6:.0f} MB, {found['engine']} on {found['provider']}"
    )
