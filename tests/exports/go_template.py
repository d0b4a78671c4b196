"""The part of Go's text/template that a Modelfile of ours uses; anything else is an error.

Actions: {{ range .Messages }}, {{ .Role }}, {{ .Content }}, {{ if eq .Role "x" }}, {{ else if eq
.Role "x" }}, {{ end }}. White space stays, for no action has a trim marker.
"""

import re
from collections.abc import Mapping, Sequence

ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
COMPARE = re.compile(r'(else )?if eq \.Role "([a-z]+)"')

Message = Mapping[str, str]


def render(template: str, messages: Sequence[Message]) -> str:
    """Render a template; ValueError for what Go would refuse, or this subset has not."""
    head, loop, tail = _split_range(template)
    if ACTION.search(head + tail):
        raise ValueError(f"actions outside of range .Messages: {template!r}")
    return head + "".join(_render_message(loop, message) for message in messages) + tail


def _split_range(template: str) -> tuple[str, str, str]:
    """What stands before, in and after the one range."""
    start = template.index("{{ range .Messages }}")
    depth = 0
    for found in ACTION.finditer(template):
        action = found[1].strip()
        depth += action.startswith(("range ", "if ")) - (action == "end")
        if depth == 0:
            inner = template[start + len("{{ range .Messages }}") : found.start()]
            return template[:start], inner, template[found.end() :]
    raise ValueError(f"range without end: {template!r}")


def _render_message(loop: str, message: Message) -> str:
    texts: list[str] = []
    is_on, is_taken, depth, last = True, False, 0, 0
    for found in ACTION.finditer(loop):
        if is_on:
            texts.append(loop[last : found.start()])
        last = found.end()
        action = found[1].strip()
        if compared := COMPARE.fullmatch(action):
            depth += not compared[1]
            is_on = not is_taken and message["role"] == compared[2]
            is_taken = is_taken or is_on
        elif action == "end":
            depth, is_on, is_taken = depth - 1, True, False
        elif action in (".Role", ".Content"):
            if is_on:
                texts.append(message[action[1:].lower()])
        else:
            raise ValueError(f"{{{{{action}}}}} is not in the subset")
        if depth not in (0, 1):
            raise ValueError(f"blocks do not match: {loop!r}")
    return "".join([*texts, loop[last:]])
