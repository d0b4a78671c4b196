"""A chat template that an artifact carries, rendered by jinja2 in a child process with limits.

A template is a program that came with a model: it may loop for ever or ask for all memory. The
child (rendering.py) is started when a template is first needed, stays for the next one, and is
replaced when it had to be stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import pkgutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .failure import Failure

if TYPE_CHECKING:
    from .chat import Message

# What decides where this Python finds its packages.
FLAGS = {"-I": sys.flags.isolated, "-S": sys.flags.no_site}
# Reads the program from standard input, where no list of processes shows it.
BOOT = "import sys; exec(sys.stdin.buffer.read(int(sys.argv[2])))"
REQUIREMENT = "jinja2>=3.1.6"


class Carried(Protocol):
    """What of a manifest's template is needed to render a chat."""

    @property
    def text(self) -> str:
        """Jinja, for chats without tools."""

    @property
    def tool_use(self) -> str:
        """Jinja, for chats with tools; empty where it is the same."""

    @property
    def tokens(self) -> Mapping[str, str]:
        """Special tokens by their names in the template."""

    @property
    def strippers(self) -> Sequence[str]:
        """Tokens behind which white space is dropped."""


@dataclass(frozen=True)
class Limits:
    """What rendering one chat may take; `seconds` of a processor, `clock_seconds` in all.

    `memory_bytes` are beside what the child has at its start.
    """

    seconds: int = 5
    clock_seconds: float = 30.0
    memory_bytes: int = 256 << 20
    characters: int = 4 << 20


class Renderer:
    """The child process, one for all templates of this process; for any thread."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    def start(self) -> None:
        """Start the child without waiting for it, so that it is ready when it is needed."""
        with self._lock:
            self._find_process()

    def check(self) -> None:
        """Raise Failure `runtime` where jinja2 is missing or too old."""
        with self._lock:
            self._await_ready(self._find_process())

    def render(self, text: str, variables: Mapping[str, Any], now: float | None = None) -> str:
        """Return what a template writes; Failure `request` says what it did instead.

        Its detail `reason` is refused, failed, syntax, time, memory, characters or crash. `now`
        stands for the time that strftime_now sees, in seconds since 1970.
        """
        limits = self._limits
        request = {
            "template": text, "variables": variables, "now": now, "seconds": limits.seconds,
            "characters": limits.characters,
        }  # fmt: skip
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            process = self._find_process()
            self._await_ready(process)
            answer = self._ask(process, line)
            if answer.get("bound") == "memory":
                self._stop()  # a fresh process has all of it again
        if isinstance(rendered := answer.get("text"), str):
            return rendered
        raise self._explain(answer)

    def close(self) -> None:
        """End the child, also in the middle of its work; a later template starts another."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _find_process(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            source = pkgutil.get_data(__package__, "rendering.py") or b""
            flags = [name for name, is_on in FLAGS.items() if is_on]
            command = [sys.executable, *flags, "-B", "-c", BOOT]
            self._process = subprocess.Popen(
                [*command, str(self._limits.memory_bytes), str(len(source))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self._is_ready = False
            assert self._process.stdin
            with contextlib.suppress(OSError):  # what became of the child is asked later
                self._process.stdin.write(source)  # a pipe holds all of it
                self._process.stdin.flush()
        return self._process

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        if self._is_ready:
            return
        fault = self._ask(process, b"").get("fault", "the child process of jinja2 ended")
        if fault:
            self._stop()
            raise Failure(
                "runtime",
                f"this artifact's chat template is rendered by jinja2: {fault}",
                f"install it: {sys.executable} -m pip install '{REQUIREMENT}'",
            )
        self._is_ready = True

    def _ask(self, process: subprocess.Popen[bytes], line: bytes) -> dict[str, Any]:
        """Return the answer to a line; what became of the child when there is none."""
        assert process.stdin and process.stdout
        timer = threading.Timer(self._limits.clock_seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            found = process.stdout.readline()
        except OSError:
            found = b""
        finally:
            is_late = not timer.is_alive()
            timer.cancel()
        if found.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(found)
            return answer
        code = process.wait()
        self._stop()
        late = is_late or code == -getattr(signal, "SIGXCPU", 0)
        return {"bound": "time"} if late else {"crash": code}

    def _explain(self, answer: dict[str, Any]) -> Failure:
        limits = self._limits
        bounds = {
            "time": f"takes more than {limits.seconds} seconds: it may never end",
            "memory": f"needs more than {limits.memory_bytes >> 20} MiB of memory",
            "characters": f"writes more than {limits.characters} characters",
        }
        if "refused" in answer:
            reason, text = "refused", f"refuses this chat: {answer['refused']}"
        elif "failed" in answer:
            reason, text = "failed", f"fails on this chat: {answer['failed']}"
        elif "syntax" in answer:
            reason, text = "syntax", f"is not valid: {answer['syntax']}"
        elif "bound" in answer:
            reason = str(answer["bound"])
            text = bounds[reason]
        else:
            reason, text = "crash", f"ends the process that renders it ({answer['crash']})"
        return Failure("request", f"the model's chat template {text}", reason=reason)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream:
                with contextlib.suppress(OSError):  # what was still to be written is lost
                    stream.close()
        process.wait()


RENDERER = Renderer()
atexit.register(RENDERER.close)


def render_template(
    template: Carried,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    is_open: bool,
    now: float | None,
) -> str:
    """Return the text of a chat as transformers' apply_chat_template writes it."""
    text = template.tool_use if tools and template.tool_use else template.text
    variables = {
        **template.tokens,
        "messages": [_describe(message) for message in messages],
        "tools": None if tools is None else list(tools),
        "documents": None,
        "add_generation_prompt": is_open,
    }
    return RENDERER.render(text, variables, now)


def _describe(message: Message) -> dict[str, Any]:
    """Return a message as templates see it: without what is None."""
    if isinstance(message, tuple):
        return {"role": message[0], "content": message[1]}
    return {key: value for key, value in message.items() if value is not None}
