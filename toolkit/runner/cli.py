"""Answer, chat, serve and measure one artifact; the device side of a push."""

# A command imports what it needs itself: every module costs milliseconds, and on a small board
# tens of them, for it is compiled anew from the zipapp each time.

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from .failure import Failure
from .settings import Sampling

SETTINGS = {
    "threads": "threads of the engine, instead of its own choice",
    "kv_bits": "bits of a value in the KV cache",
    "batch_tokens": "tokens of a prompt that go through the network at once",
}


def main(arguments: list[str]) -> int:
    """Run one command; 0 when it succeeded, 1 on an expected failure, 2 on wrong usage.

    What follows `--` are the server's options, for `agent start`.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = _parse(arguments[:end])
    options.server = arguments[end + 1 :]
    try:
        code: int = options.run(options)
    except Failure as failure:
        _report(failure, as_json=options.command == "agent" or options.json)
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="runner", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, add_options, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        if name not in arguments:  # nobody sees its options
            continue
        if name != "agent":
            command.add_argument(
                "--artifact", type=Path, required=True, help="folder with a manifest.json"
            )
            command.add_argument("--json", action="store_true", help="print JSON, a line each")
        add_options(command)
    return parser.parse_args(arguments)


def _add_agent(command: argparse.ArgumentParser) -> None:
    command.add_argument("agent", choices=["serve", "recover", "start"])
    command.add_argument("--root", required=True, help="the device's folder")


def _add_generate(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompt", help="without it, the prompt is read from standard input")
    command.add_argument(
        "--image", type=Path, action="append", default=[],
        help="a picture that the prompt is about, in front of it; may be given more than once",
    )  # fmt: skip
    _add_answering(command)
    _add_settings(command)


def _add_chat(command: argparse.ArgumentParser) -> None:
    _add_answering(command)
    _add_settings(command)


def _add_serve(command: argparse.ArgumentParser) -> None:
    from .serving.options import TOKEN_VARIABLE

    command.add_argument("--host", default="127.0.0.1")
    command.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    command.add_argument("--model", help="the name it answers to, instead of the artifact's")
    command.add_argument(
        "--token-file", type=Path, help=f"bearer token of the clients, instead of ${TOKEN_VARIABLE}"
    )
    command.add_argument("--queue", type=int, default=8, help="requests that may wait")
    command.add_argument("--cors-origin", help="origin whose web pages may ask")
    command.add_argument(
        "--image-folder", type=Path, help="where file: URLs of pictures may point; else nowhere"
    )
    command.add_argument("--until-eof", action="store_true", help="end when standard input ends")
    _add_settings(command)


def _add_bench(command: argparse.ArgumentParser) -> None:
    from .bench_command import add_bench

    add_bench(command)
    _add_settings(command)


def _add_answering(command: argparse.ArgumentParser) -> None:
    command.add_argument("--system", default="", help="what the model is told before everything")
    command.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token"
    )
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument(
        "--max-tokens", type=_count, help="of one answer; else as many as there is room for"
    )
    command.add_argument("--seed", type=int)


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--context-tokens", type=_count, help="prompt and answer together")
    for name, about in SETTINGS.items():
        command.add_argument("--" + name.replace("_", "-"), type=_count, help=about)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _add_nothing(command: argparse.ArgumentParser) -> None:
    del command


def _given(options: argparse.Namespace) -> dict[str, int | None]:
    return {name: getattr(options, name) for name in ("context_tokens", *SETTINGS)}


def _sampling(options: argparse.Namespace) -> Sampling:
    return Sampling(options.temperature, options.top_p, options.seed)


def _run_agent(options: argparse.Namespace) -> int:
    """`serve` answers a push; `start` is what a service does: recover, then serve the release."""
    if options.agent == "serve":
        from .agent.serve import serve

        return serve(options.root)
    from .agent.child import SERVICE_LOG, build_command, trim_log
    from .agent.layout import open_layout
    from .agent.releases import start_trial

    layout = open_layout(options.root)
    trim_log(layout, SERVICE_LOG)
    print(json.dumps(start_trial(layout)), flush=True)
    if options.agent == "start":
        command = build_command(layout.current.resolve(), ["serve", *options.server])
        os.execv(command[0], command)
    return 0


def _run_generate(options: argparse.Namespace) -> int:
    from .generate import generate

    prompt = options.prompt
    if prompt is None:
        prompt = sys.stdin.buffer.read().decode("utf-8")
    take_text = _ignore if options.json else _stream
    answer = generate(
        options.artifact, prompt, options.max_tokens, take_text, _sampling(options),
        options.system, options.image, **_given(options),
    )  # fmt: skip
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


def _run_chat(options: argparse.Namespace) -> int:
    from .chatting import chat

    given = _given(options)
    return chat(options.artifact, _sampling(options), options.max_tokens, options.system, **given)


def _run_serve(options: argparse.Namespace) -> int:
    from .serving.command import serve_artifact

    return serve_artifact(options.artifact, options, _given(options))


def _run_bench(options: argparse.Namespace) -> int:
    from .bench_command import run_bench

    return run_bench(options, _given(options))


def _run_info(options: argparse.Namespace) -> int:
    from .describing import describe

    found = describe(options.artifact)
    if options.json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        print(f"{name:20} {json.dumps(value) if isinstance(value, (dict, list)) else value}")
    return 0


def _run_settings(options: argparse.Namespace) -> int:
    """Keep what standard input says: {"settings": {...}, "measured": {...}}."""
    from .tuning import store_settings

    print(json.dumps(store_settings(options.artifact, sys.stdin.read())))
    return 0


COMMANDS = {
    "generate": (_run_generate, _add_generate, "answer one prompt"),
    "chat": (_run_chat, _add_chat, "converse in the terminal"),
    "serve": (_run_serve, _add_serve, "answer OpenAI's API over HTTP"),
    "bench": (_run_bench, _add_bench, "measure what answers cost here"),
    "info": (_run_info, _add_nothing, "say what the artifact is, and whether it can run here"),
    "settings": (_run_settings, _add_nothing, "keep the settings that standard input names"),
    "agent": (_run_agent, _add_agent, "the device side of a push"),
}


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
