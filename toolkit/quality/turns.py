"""A chat template as data: text before and after each role's content.

The template is rendered with marks for contents, read off, and the result is held against the
template on whole conversations. Its code is read first: what it does with a content must not
depend on what the content says, which conversations could not show.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Protocol

import msgspec
from jinja2 import Environment, nodes
from jinja2.ext import loopcontrols

from toolkit.artifact import Chat
from toolkit.formats.gguf.stripping import unwrap_template
from toolkit.runner.chat import render_chat
from toolkit.runner.failure import Failure

Messages = Sequence[tuple[str, str]]

ROLES = ("system", "user", "assistant")
# Two contents that no template holds.
FIRST, SECOND = "first-mark-5c1d", "second-mark-5c1d"
# A content that must come through untouched, white space and all.
UNUSUAL = "  spaces \n{{ x }} <b>'\"\\ \n"
LONGEST = 3  # messages of the conversations that are tried in every order of roles
CONVERSATIONS: tuple[Messages, ...] = (
    (("user", "  spaces \n\nand lines\n"), ("assistant", "\n{{ x }} <b>'\" "), ("user", " ")),
    tuple((("user", "assistant")[place % 2], f"turn {place}") for place in range(9)),
    (("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"),
     ("user", "e"), ("assistant", "f"), ("user", "g")),
)  # fmt: skip
# What depends on more than the messages, or hides how contents are used.
FOREIGN_NAMES = ("strftime_now", "lipsum")
CONTENT = "content"
COUNTING = ("length", "count")
BLOCKS = (nodes.AssignBlock, nodes.CallBlock, nodes.FilterBlock, nodes.Macro)
PARTS = (nodes.Getattr, nodes.Getitem, nodes.Call)


class NotDataError(Exception):
    """Why a template cannot be expressed as data."""


class Render(Protocol):
    """Renders messages with the template itself; Failure as render_chat's."""

    def __call__(self, messages: Messages, *, is_open: bool = True) -> str:
        """The text of a chat."""


def derive(chat: Chat, text: str, render: Render, bos: str) -> tuple[Chat, bool]:
    """The chat with turns, and whether the bos token stands in front; NotDataError says why not.

    `chat` has the stop ids and no turns; `text` is the template, `bos` the bos token's text.
    """
    _check_code(unwrap_template(text))
    try:
        turns, generation, has_bos = _read_turns(render, bos)
    except Failure as failure:
        raise NotDataError(str(failure)) from None
    made = msgspec.structs.replace(chat, turns=turns, generation=generation)
    made = msgspec.structs.replace(
        made,
        skips_empty=tuple(_list_skipping(made, render)),
        open_after=tuple(_list_open(made, render)),
    )
    _verify(made, render, bos if has_bos else "")
    return made, has_bos


def _read_turns(render: Render, bos: str) -> tuple[dict[str, tuple[str, str]], str, bool]:
    """Turns by role, the generation prompt, and whether the bos token stands in front of all."""
    between = {role: _between(render, "user", role) for role in ROLES}
    if between["user"] is None or between["assistant"] is None:
        raise NotDataError("it leaves out contents, or refuses the order of roles")
    known = [role for role, text in between.items() if text is not None]
    for role in set(ROLES).difference(known):
        if _between(render, role, "user") is not None:
            raise NotDataError(f"a {role} message may stand in some places only")
    heads = {role: render([(role, FIRST)], is_open=False).partition(FIRST)[0] for role in known}
    has_bos = not between["user"].endswith(heads["user"])
    if has_bos and not (bos and heads["user"].startswith(bos)):
        raise NotDataError(f"it starts a conversation with {heads['user']!r}")
    befores = {r: h.removeprefix(bos) if has_bos else h for r, h in heads.items()}
    turns = {}
    for role, before in befores.items():
        gap = _between(render, role, "user") or ""
        if not gap.endswith(befores["user"]):
            raise NotDataError(f"what follows the {role}'s content depends on the next role")
        turns[role] = (before, gap[: len(gap) - len(befores["user"])])
    end = render([("user", FIRST)]).partition(FIRST)[2]
    if not end.startswith(turns["user"][1]):
        raise NotDataError("what follows the user's content depends on the generation prompt")
    return turns, end[len(turns["user"][1]) :], has_bos


def _between(render: Render, role: str, next_role: str) -> str | None:
    """What stands between contents of two roles; None when one of them is left out or refused."""
    try:
        text = render([(role, FIRST), (next_role, SECOND)], is_open=False)
    except Failure:
        return None
    if FIRST not in text or SECOND not in text:
        return None
    return text.partition(FIRST)[2].partition(SECOND)[0]


def _list_skipping(chat: Chat, render: Render) -> Iterator[str]:
    """Roles whose empty messages write nothing."""
    alone = render([("user", FIRST)])
    for role in chat.turns:
        if any(chat.turns[role]) and _try(render, [(role, ""), ("user", FIRST)]) == alone:
            yield role


def _list_open(chat: Chat, render: Render) -> Iterator[str]:
    """Roles behind which the template writes no generation prompt."""
    for role, (_, after) in chat.turns.items():
        text = _try(render, [("user", FIRST), (role, SECOND)])
        if chat.generation and text is not None and text.endswith(SECOND + after):
            yield role


def _verify(chat: Chat, render: Render, bos: str) -> None:
    """Hold the data against the template; NotDataError on the first conversation that differs."""
    for messages in _list_conversations(tuple(chat.turns)):
        expected = _try(render, messages)
        found = bos + render_chat(chat, messages)
        if found != expected:
            roles = ", ".join(role for role, _ in messages)
            wrote = "refuses" if expected is None else f"writes {expected!r}, not {found!r}, for"
            raise NotDataError(f"it {wrote} a chat of {roles}")


def _list_conversations(roles: Sequence[str]) -> Iterator[Messages]:
    """Every order of roles up to three messages, with usual and unusual and empty contents."""
    for count in range(1, LONGEST + 1):
        for order in product(roles, repeat=count):
            yield [(role, f"{place} {role}") for place, role in enumerate(order)]
            if count < LONGEST:
                yield [(role, UNUSUAL) for role in order]
                for empty in range(count):
                    yield [(role, "" if i == empty else "x") for i, role in enumerate(order)]
    for messages in CONVERSATIONS:
        if all(role in roles for role, _ in messages):
            yield messages


def _try(render: Render, messages: Messages) -> str | None:
    """The template's text; None when it refuses the messages or fails."""
    try:
        return render(messages)
    except Failure:
        return None


def _check_code(text: str) -> None:
    """NotDataError unless contents are written as they are, or asked whether they are empty."""
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False
    )
    try:
        tree = environment.parse(text)
    except Exception as error:  # such as a tag that only transformers knows
        raise NotDataError(f"it has a tag of its own ({error})") from error
    if any(_is_content(one) for block in tree.find_all(BLOCKS) for one in block.find_all(PARTS)):
        raise NotDataError("it keeps what it has written, and may change that")
    names = {node.name for node in tree.find_all(nodes.Name)}
    if foreign := sorted(names.intersection(FOREIGN_NAMES)):
        raise NotDataError(f"it uses {foreign[0]}")
    wholes = {"messages", *(n.name for loop in tree.find_all(nodes.For) for n in _targets(loop))}
    _check(tree, wholes, may_write=False)


def _targets(loop: nodes.For) -> list[nodes.Name]:
    return [loop.target] if isinstance(loop.target, nodes.Name) else []


def _check(node: nodes.Node, wholes: set[str], *, may_write: bool) -> None:
    """Look at one node; `may_write` where a content is written out, or its emptiness asked."""
    if _may_reach_content(node) or (_is_content(node) and not may_write):
        raise NotDataError("what it does with a content may depend on what that says")
    if _is_content(node):
        may_write = False
    elif isinstance(node, nodes.Name) and node.name in wholes and node.ctx == "load":
        raise NotDataError(f"it uses {node.name} as a whole")
    passes = may_write and isinstance(
        node, nodes.Add | nodes.Concat | nodes.CondExpr | nodes.And | nodes.Or | nodes.Not
    )
    for child in node.iter_child_nodes():
        if _is_plain_use(node, child):
            continue
        writes = passes or isinstance(node, nodes.Output)
        asks = isinstance(node, nodes.If | nodes.CondExpr) and child is node.test
        _check(child, wholes, may_write=writes or asks)


def _is_content(node: nodes.Node) -> bool:
    """True for x.content, x['content'] and x.get('content')."""
    if isinstance(node, nodes.Getattr):
        return node.attr == CONTENT
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == CONTENT
    is_get = isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr)
    if not is_get or node.node.attr != "get":  # type: ignore[attr-defined]
        return False
    first = node.args[0] if node.args else None  # type: ignore[attr-defined]
    return isinstance(first, nodes.Const) and first.value == CONTENT


def _may_reach_content(node: nodes.Node) -> bool:
    """True for x[name], and for methods but x.get('name')."""
    if isinstance(node, nodes.Getitem):
        is_constant = isinstance(node.arg, nodes.Const | nodes.Slice | nodes.Neg)
        is_list = isinstance(node.node, nodes.Name) and node.node.name == "messages"
        return not is_constant and not is_list
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        return node.node.attr != "get" or not all(isinstance(one, nodes.Const) for one in node.args)
    return False


def _is_plain_use(node: nodes.Node, child: nodes.Node) -> bool:
    """True where a list of messages, or a message, is used for one part of it only."""
    if not isinstance(child, nodes.Name):
        return False
    if isinstance(node, nodes.For):
        return child is node.iter
    if isinstance(node, nodes.Getattr):
        return True
    if isinstance(node, nodes.Getitem):
        is_list = child.name == "messages"
        return child is node.node and (is_list or isinstance(node.arg, nodes.Const))
    if isinstance(node, nodes.Filter):
        return node.name in COUNTING
    # 'tools' in message; messages is defined
    return isinstance(node, nodes.Operand | nodes.Test)
