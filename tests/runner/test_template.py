"""Carried chat templates: what a hostile one may take, and what is said of it."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from toolkit.runner.failure import Failure
from toolkit.runner.manifest import Chat, Template
from toolkit.runner.template import Limits, Renderer

GOOD = "{% for m in messages %}{{ m.content }}{% endfor %}"
MESSAGES = {"messages": [{"role": "user", "content": "hi"}], "tools": None}
LIMITS = Limits(seconds=1, clock_seconds=20, memory_bytes=64 << 20, characters=1 << 20)


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    made = Renderer(LIMITS)
    yield made
    made.close()


def render(renderer: Renderer, text: str, **more: object) -> str:
    return renderer.render(text, {**MESSAGES, **more})


def find_reason(renderer: Renderer, text: str) -> str:
    """The reason and the sentence of a template that fails; a good one still renders after it."""
    with pytest.raises(Failure) as caught:
        render(renderer, text)
    assert caught.value.kind == "request"
    assert str(caught.value).startswith("the model's chat template ")
    assert render(renderer, GOOD) == "hi"
    return f"{caught.value.details['reason']}: {caught.value}"


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x * 2 %}{% endfor %}"
)
HOSTILE = {
    "loops": (LOOPS, "time: the model's chat template takes more than 1 seconds: it may never end"),
    "number": ("{{ 7 ** 99999999 > 1 }}", "time: the model's"),
    "repeats": ("{{ messages[0].content * 10 ** 9 }}", "memory: the model's chat template needs"),
    "doubles": (DOUBLING, "memory: the model's chat template needs more than 64 MiB of memory"),
    "constant": ("{{ 'x' * 10 ** 9 }}", "memory: "),
    "center": ("{{ 'x' | center(10 ** 9) }}", "memory: "),
    "pads": ("{{ '%1000000000d' | format(1) }}", "memory: "),
    "format": ("{{ '{:>1000000000}'.format(1) }}", "memory: "),
    "list": ("{{ [0] * 10 ** 9 }}", "memory: "),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "failed: "),
    "includes": ("{% include 'x' %}", "failed: "),
    "prints": ("{% for i in range(9999) %}{{ 'x' * 999 }}{% endfor %}", "characters: "),
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "failed: "),
    "attr": ("{{ (messages | attr('__class__')).mro() }}", "failed: "),
    "format-map": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "failed: "),
    "globals": ("{{ cycler.__init__.__globals__.os.getpid() }}", "failed: "),
    "function": ("{{ raise_exception.__globals__.sys.exit() }}", "failed: "),
    "changes": ("{{ messages.append(1) }}", "failed: "),
    "namespace": ("{% set ns = namespace(__class__=1) %}", "failed: "),
    "undefined": ("{{ nothing.at.all }}", "failed: the model's chat template fails on this chat: "),
    "refuses": ("{{ raise_exception('No cats.') }}", "refused: the model's chat template refuses "),
    "refuses-oddly": ("{{ raise_exception(messages) }}", "refused: "),
    "open": ("{% if %}", "syntax: the model's chat template is not valid: line 1: "),
    "nested": ("(" * 9 + "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "syntax: "),
}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_with_a_sentence(renderer: Renderer, name: str) -> None:
    text, expected = HOSTILE[name]
    assert find_reason(renderer, text).startswith(expected)


def test_a_template_that_sleeps_is_ended_by_the_clock() -> None:
    """Where no limit of the processor's time holds, as on Windows."""
    renderer = Renderer(Limits(seconds=1000, clock_seconds=0.5))
    renderer.check()
    assert find_reason(renderer, LOOPS).startswith("time: ")
    renderer.close()


def test_the_child_is_started_once_and_ends_with_its_parent() -> None:
    program = (
        "import os, sys\n"
        "from toolkit.runner.template import Renderer\n"
        "from toolkit.runner import template\n"
        "one = Renderer(template.Limits(seconds=1))\n"
        f"print(one.render({GOOD!r}, {MESSAGES!r}))\n"
        "first = one._process.pid\n"
        f"one.render({GOOD!r}, {MESSAGES!r})\n"
        "assert one._process.pid == first\n"
        "print(first, flush=True)\n"
        "os._exit(0)\n"  # as if killed: nothing is tidied up
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    pid = int(done.stdout.split()[-1])
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").exists() and " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        threading.Event().wait(0.05)
    raise AssertionError("the child outlives its parent")


def test_the_child_writes_no_file_and_starts_no_process(renderer: Renderer) -> None:
    render(renderer, GOOD)
    assert renderer._process
    limits = Path(f"/proc/{renderer._process.pid}/limits").read_text()
    rows = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()[1:]}
    assert (
        rows["Max file size"] == rows["Max processes"] == rows["Max core file size"] == ["0", "0"]
    )
    assert rows["Max address space"] != ["unlimited", "unlimited"]


def test_a_child_that_was_killed_is_replaced(renderer: Renderer) -> None:
    render(renderer, GOOD)
    assert renderer._process
    renderer._process.kill()
    renderer._process.wait()
    assert render(renderer, GOOD) == "hi"


def test_chats_from_several_threads(renderer: Renderer) -> None:
    found: list[str] = []

    def ask(number: int) -> None:
        messages = [{"role": "user", "content": str(number)}]
        found.append(renderer.render(GOOD, {"messages": messages}))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [str(number) for number in range(8)]


def test_the_time_of_a_template_is_the_devices_or_the_one_that_is_given(
    renderer: Renderer,
) -> None:
    import datetime

    text = "{{ strftime_now('%Y-%m-%d %H:%M %A') }}"
    assert renderer.render(text, {}, 1735732800.0) == "2025-01-01 12:00 Wednesday"
    year = datetime.datetime.now().year
    assert renderer.render("{{ strftime_now('%Y') }}", {}) in (str(year), str(year + 1))


def test_any_character_goes_through(renderer: Renderer) -> None:
    content = "\0 \ud800 \u2028 \r\n é 😀 </s>"
    assert render(renderer, GOOD, messages=[{"content": content}]) == content


@pytest.mark.parametrize("version", ["", "3.1.5"])
def test_jinja2_that_is_missing_or_old_is_named(version: str, tmp_path: Path) -> None:
    """A Python without site-packages; the old one is a module that calls itself 3.1.5."""
    if version:
        (tmp_path / "jinja2.py").write_text(f"__version__ = {version!r}\n", "utf-8")
    root = Path(__file__).parents[2]
    program = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "from toolkit.runner.failure import Failure\n"
        "from toolkit.runner.template import RENDERER\n"
        "try: RENDERER.check()\n"
        "except Failure as failure: print(failure.kind, failure, failure.advice)\n"
    )
    base = Path(sys.base_prefix) / "bin" / "python3"
    done = subprocess.run(
        [str(base), "-S", "-c", program], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1"},
    )  # fmt: skip
    fault = "jinja2 3.1.5 is too old" if version else "jinja2 cannot be imported"
    assert done.stdout.startswith(
        f"runtime this artifact's chat template is rendered by jinja2: {fault}"
    )
    assert "-m pip install 'jinja2>=3.1.6'" in done.stdout


def test_a_chat_with_tools_takes_its_own_template() -> None:
    from toolkit.runner.chat import render_chat

    template = Template(text="plain", tool_use="tools: {{ tools | tojson }}", roles=("user",))
    chat = Chat({}, "", (1,), None, template=template)
    assert render_chat(chat, [("user", "x")]) == "plain"
    assert render_chat(chat, [("user", "x")], [{"name": "<a>"}]) == 'tools: [{"name": "<a>"}]'


def test_a_role_that_a_template_passes_over_is_refused() -> None:
    from toolkit.runner.chat import render_chat

    chat = Chat({}, "", (1,), None, template=Template(text=GOOD, roles=("user",)))
    with pytest.raises(Failure, match="role 'robot' is unknown to this model; allowed: user"):
        render_chat(chat, [("robot", "x")])


def test_build_and_device_ask_for_the_same_jinja2() -> None:
    from toolkit import artifact
    from toolkit.runner import rendering, template

    assert artifact.REQUIREMENT == template.REQUIREMENT
    assert "jinja2>=" + ".".join(map(str, rendering.OLDEST_JINJA)) == template.REQUIREMENT
