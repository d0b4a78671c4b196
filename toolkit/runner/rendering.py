"""Renders chat templates in a process of its own, so that one that misbehaves can be stopped.

template.py has this file's text run by a Python of its own, with MEMORY_BYTES as first argument.
Requests and answers are one line of JSON each. The environment is the one of transformers'
apply_chat_template (utils/chat_template_utils.py of transformers 5), which published templates are
written for.
"""

from __future__ import annotations

import datetime
import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OLDEST_JINJA = (3, 1, 6)  # older ones let templates out of the sandbox
MOST_COMPILED = 8
WORDS = 500  # characters of an error that are passed on


class Refused(Exception):
    """What raise_exception raises: the template's own words."""


class TooLong(Exception):
    """A template has written more characters than it may."""


class Dict:
    """dict as templates may call it: without its attributes, but for fromkeys."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Return a new dict."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return a new dict with these keys."""
        return dict.fromkeys(*args)


def raise_exception(message: Any) -> None:
    """Refuse a chat, in the template's own words."""
    raise Refused(str(message))


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """Return JSON as transformers' tojson does: nothing is escaped for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
        sort_keys=sort_keys,
    )  # fmt: skip


def make_environment(read_now: Callable[[], datetime.datetime]) -> Any:
    """Return transformers' environment; `read_now` gives strftime_now its time."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks an answer for training; here its content is written as it is."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own attribute)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_write")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _write(self, caller: Callable[[], str]) -> str:
            return caller()

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda layout: read_now().strftime(layout),
        dict=Dict(),
        namespace=_make_namespace(),
    )
    return environment


def _make_namespace() -> type:
    """Return Jinja's namespace that takes no names with an underscore in front."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: object) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace takes no attribute {name!r}")

    class Checked(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's, which takes self=... too
            self, *pairs = args
            for name in dict(*pairs, **kwargs):
                check(name)
            Namespace.__init__(self, *pairs, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    return Checked


class Compiler:
    """Compiled templates, the last few of them, and the time they see."""

    def __init__(self) -> None:
        self._now: float | None = None
        self._environment = make_environment(self._read_now)
        self._compiled: dict[str, Any] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return {"text": ...}, or what became of the template: refused, failed, syntax, bound."""
        import jinja2

        self._now = request.get("now")
        try:
            template = self._compile(request["template"])
        except jinja2.TemplateSyntaxError as error:
            return {"syntax": f"line {error.lineno}: {_quote(error)}"}
        except RecursionError:
            return {"syntax": "it is nested too deeply"}
        try:
            return {"text": _collect(template, request["variables"], request["characters"])}
        except Refused as error:
            return {"refused": _quote(error)}
        except TooLong:
            return {"bound": "characters"}
        except MemoryError:
            return {"bound": "memory"}
        except RecursionError:
            return {"failed": "it calls itself without an end"}
        except Exception as error:  # a template is a program: it may fail in any way
            return {"failed": f"{type(error).__name__}: {_quote(error)}"}

    def _compile(self, text: str) -> Any:
        if text not in self._compiled:
            while len(self._compiled) >= MOST_COMPILED:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[text] = self._environment.from_string(text)
        return self._compiled[text]

    def _read_now(self) -> datetime.datetime:
        if self._now is None:
            return datetime.datetime.now()
        start = datetime.datetime(1970, 1, 1)  # the same in every time zone
        return start + datetime.timedelta(seconds=self._now)


def _collect(template: Any, variables: dict[str, Any], characters: int) -> str:
    pieces, count = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        count += len(piece)
        if count > characters:
            raise TooLong
    return "".join(pieces)


def _quote(error: Exception) -> str:
    words = str(error)
    return words if len(words) <= WORDS else f"{words[:WORDS]}..."


def limit_memory(more_bytes: int) -> None:
    """Let this process map so much more than now, write no file, start no other process."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + more_bytes
        limits = {"RLIMIT_AS": most, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, name), (value, value))
    except (ImportError, OSError, ValueError):
        pass  # Windows and macOS: what then holds is the limit of time


def limit_time(seconds: int) -> None:
    """Have this process killed once it has used so many more seconds of a processor.

    The parent's own clock kills it too; this one also holds when the parent has ended.
    """
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        wanted = math.ceil(used.ru_utime + used.ru_stime) + seconds
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    except (ImportError, OSError, ValueError):
        pass


def find_fault() -> str:
    """Return why this Python cannot render templates; empty when it can."""
    try:
        import jinja2
    except ImportError as error:
        return f"jinja2 cannot be imported: {error}"
    numbers = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if numbers < OLDEST_JINJA:
        return f"jinja2 {jinja2.__version__} is too old"
    return ""


def main() -> None:
    """Answer requests until standard input ends; the first line says whether jinja2 is here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    fault = find_fault()
    print(json.dumps({"fault": fault}), flush=True)
    if fault:
        return
    compiler = Compiler()
    limit_memory(int(sys.argv[1]))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        limit_time(request["seconds"])
        answer = compiler.answer(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
