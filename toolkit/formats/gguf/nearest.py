"""What comes nearest to a carried chat template in programs with templates of their own.

What stands between two contents is read off for each pair of roles. That covers default system
prompts, a system message that goes into the first question, a start of its own for the first
message; not what a template does with a content, nor when it refuses a chat.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from toolkit.artifact import BUILD_TIME, Chat
from toolkit.runner.chat import render_chat
from toolkit.runner.failure import Failure

Messages = Sequence[tuple[str, str]]

START, END = "", "end"  # in place of a role
ROLES = ("system", "user", "assistant")
MARKS = ("first-mark-5c1d", "second-mark-5c1d", "third-mark-5c1d")
CHATML = {
    START: "<|im_start|>{}\n",
    END: "<|im_end|>\n<|im_start|>assistant\n",
}
USUAL: dict[str, Messages] = {
    "chats of several turns": (("user", "a"), ("assistant", "b"), ("user", "c"),
                               ("assistant", "d"), ("user", "e")),
    "chats with a system message": (("system", "s"), ("user", "a"), ("assistant", "b"),
                                    ("user", "c")),
}  # fmt: skip
UNUSUAL: dict[str, Messages] = {
    "white space around a content stays": (("user", "  a \n"),),
    "thoughts in earlier answers stay": (
        ("user", "a"), ("assistant", "<think>\nx\n</think>\n\nb"), ("user", "c"),
    ),
}  # fmt: skip
REFUSED: tuple[Messages, ...] = (
    (("user", "a"), ("user", "b")),
    (("assistant", "a"), ("user", "b")),
    (("system", "a"), ("user", "b")),
    (("user", "a"), ("system", "b"), ("user", "c")),
)


@dataclass(frozen=True)
class Pairs:
    """What stands between two contents by their roles, START and END among them.

    `differences` are what is not as the template has it, for people.
    """

    between: Mapping[tuple[str, str], str]
    differences: tuple[str, ...]

    def find(self, before: str, role: str) -> str:
        """The text between two roles; of a pair the template does not allow, a likely one."""
        usual = {"system": START, "user": "assistant", "assistant": "user", END: "user"}
        return self.between.get((before, role), self.between.get((usual[role], role), ""))

    def join(self, messages: Messages) -> str:
        """A chat that is open for an answer."""
        before, texts = START, []
        for role, content in messages:
            texts += [self.find(before, role), content]
            before = role
        return "".join([*texts, self.find(before, END)])


def find_pairs(chat: Chat) -> Pairs:
    """Read a chat's template off; ChatML's turns where it does not write its contents in turn."""
    between = dict(_read_pairs(chat))
    if not {(START, "user"), ("user", END)} <= set(between):
        made = {(a, b): CHATML[START].format(b) for a in (START, *ROLES) for b in ROLES}
        made = {(a, b): (f"<|im_end|>\n{text}" if a else text) for (a, b), text in made.items()}
        ends = {(role, END): CHATML[END] for role in ROLES}
        return Pairs({**made, **ends}, ("turns are ChatML's, not this model's",))
    pairs = Pairs(between, ())
    return Pairs(between, tuple(_list_differences(chat, pairs)))


def _read_pairs(chat: Chat) -> Iterator[tuple[tuple[str, str], str]]:
    """Every pair that some chat shows."""
    chats = [["user", "assistant", "user"], ["user"], ["user", "assistant"]]
    chats += [["system", "user"], ["system", "user", "assistant"], ["assistant", "user"]]
    chats += [[one, other] for one in ROLES for other in ROLES]
    seen = set()
    for roles in chats:
        if not all(role in chat.roles for role in roles):
            continue
        messages = list(zip(roles, MARKS, strict=False))
        rest = _render(chat, messages)
        if rest is None or any(rest.count(mark) != 1 for _, mark in messages):
            continue
        before = START
        for role, mark in messages:
            text, _, rest = rest.partition(mark)
            if (before, role) not in seen:
                seen.add((before, role))
                yield (before, role), text
            before = role
        if (before, END) not in seen:
            seen.add((before, END))
            yield (before, END), rest


def _list_differences(chat: Chat, pairs: Pairs) -> Iterator[str]:
    usual = [f"{what} differ" for what in USUAL if _differs(chat, pairs, USUAL[what])]
    yield from usual or [what for what in UNUSUAL if _differs(chat, pairs, UNUSUAL[what])]
    if any(_render(chat, messages) is None for messages in (*USUAL.values(), *REFUSED)):
        yield "chats that the template refuses are answered"
    if chat.template and "strftime_now" in chat.template.text:
        yield "the date stays 2025-01-01"


def _differs(chat: Chat, pairs: Pairs, messages: Messages) -> bool:
    text = _render(chat, messages)
    return text is not None and text != pairs.join(messages)


def _render(chat: Chat, messages: Messages) -> str | None:
    try:
        return render_chat(chat, messages, now=BUILD_TIME)
    except Failure:
        return None
