"""The part of Go's text/template that a Modelfile of ours uses; anything else is an error.

Actions: {{ range .Messages }}, {{ .Role }}, {{ .Content }}, {{ $last := "" }}, {{ $last = .Role }},
{{ if eq .Role "x" }} or {{ if eq $last "x" }}, {{ else if eq ... }}, {{ end }}, and a constant such
as {{ "{{" }}. White space stays, for no action has a trim marker.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

PIECE = re.compile(r'\{\{ ("(?:[^"\\]|\\.)*"|[^"{}]*(?:"[a-z]*")?) \}\}', re.DOTALL)
COMPARE = re.compile(r'(?:else )?if eq (\.Role|\$last) "([a-z]*)"')

Message = Mapping[str, str]
Node = str | tuple[str, list["Node"]]


def render(template: str, messages: Sequence[Message]) -> str:
    """Render a template; ValueError for what Go would refuse, or this subset has not."""
    pieces = PIECE.split(template)
    if any("{{" in text for text in pieces[::2]):
        raise ValueError(f"not in the subset: {template!r}")
    state = {"$last": "?"}
    items = iter(enumerate(pieces))
    text = "".join(_run(_read(items, template), messages, state))
    if next(items, None):
        raise ValueError(f"end without a block: {template!r}")
    return text


def _read(items: Iterator[tuple[int, str]], template: str, *, nested: bool = False) -> list[Node]:
    """Nodes up to the end of a block: texts, and actions with what is in them."""
    nodes: list[Node] = []
    for place, piece in items:
        if place % 2 == 0:
            nodes.append(piece)
        elif piece == "end":
            if not nested:
                raise ValueError(f"end without a block: {template!r}")
            return nodes
        elif piece.startswith("else"):
            nodes.append((piece, []))
        elif piece.startswith(("if ", "range ")):
            nodes.append((piece, _read(items, template, nested=True)))
        else:
            nodes.append((piece, []))
    if nested:
        raise ValueError(f"a block without end: {template!r}")
    return nodes


def _run(
    nodes: list[Node],
    messages: Sequence[Message],
    state: dict[str, str],
    message: Message | None = None,
) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
            continue
        action, inner = node
        if action == "range .Messages" and message is None:
            for one in messages:
                yield from _run(inner, messages, state, one)
        elif action.startswith("if "):
            yield from _run(_choose(action, inner, state, message), messages, state, message)
        elif action in (".Role", ".Content") and message:
            yield message[action[1:].lower()]
        elif action == '$last := ""':
            state["$last"] = ""
        elif action == "$last = .Role" and message:
            state["$last"] = message["role"]
        elif action.startswith('"'):
            yield json.loads(action)
        else:
            raise ValueError(f"{{{{ {action} }}}} is not in the subset")


def _choose(
    action: str, inner: list[Node], state: dict[str, str], message: Message | None
) -> list[Node]:
    """The branch of an if that holds."""
    chosen: list[Node] = []
    is_on = _holds(action, state, message)
    for node in inner:
        if isinstance(node, tuple) and node[0].startswith("else"):
            if is_on:
                break
            is_on = _holds(node[0], state, message)
        elif is_on:
            chosen.append(node)
    return chosen


def _holds(action: str, state: dict[str, str], message: Message | None) -> bool:
    compared = COMPARE.fullmatch(action)
    if not compared or (compared[1] == ".Role" and message is None):
        raise ValueError(f"{{{{ {action} }}}} is not in the subset")
    value = state["$last"] if compared[1] == "$last" else (message or {})["role"]
    return value == compared[2]
