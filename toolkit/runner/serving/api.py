"""What OpenAI's requests ask, checked field by field; what cannot be done here is refused.

Fields are those of https://platform.openai.com/docs/api-reference. One that nobody knows is
refused, as OpenAI does: a misspelt limit that is passed over costs minutes on a small device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..manifest import Chat
from ..settings import GREEDY, Sampling
from .pictures import Eyes, FolderFile
from .refusal import refuse
from .strict import show

MOST_STOPS = 4
STOP_CHARACTERS = 256
# Dividing logits by less overflows in the engines, and changes nothing.
LOWEST_TEMPERATURE = 1e-3

TAKEN = {
    *("model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"),
}
# Said to the provider of a service, nothing about the answer.
PASSED_OVER = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
}
# Taken only with a value that asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
}
NEUTRAL_COMPLETION: dict[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
}
NEUTRAL_MESSAGE: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "annotations": ([],),
    "refusal": (),
    "function_call": (),
    "audio": (),
}


@dataclass(frozen=True)
class Asked:
    """A request that can be answered; of a chat the messages, or else `text`, the whole prompt.

    `model` and `max_tokens` are None when the request names none. `pictures` are what the marks in
    the text stand for.
    """

    model: str | None
    text: str
    max_tokens: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    is_chat: bool
    streams: bool
    includes_usage: bool
    pictures: tuple[bytes | FolderFile, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def prompt_field(self) -> str:
        """The field that the prompt came in."""
        return "messages" if self.is_chat else "prompt"


def read_chat(data: dict[str, Any], chat: Chat, eyes: Eyes | None = None) -> Asked:
    """Check a body of /chat/completions; Refusal names the first field at fault.

    Pictures go to `eyes`, which a model that reads text only has not.
    """
    taken = TAKEN | {"messages", "max_completion_tokens"}
    body = _take_known(data, taken, NEUTRAL_CHAT)
    messages = tuple(_read_messages(body.get("messages"), chat, eyes))
    asked = replace(_read_common(body, "", is_chat=True), messages=messages)
    return replace(asked, pictures=tuple(eyes.found)) if eyes else asked


def read_completion(data: dict[str, Any]) -> Asked:
    """Check a body of /completions, whose prompt goes to the model as it is."""
    body = _take_known(data, TAKEN | {"prompt"}, NEUTRAL_COMPLETION)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise refuse("prompt has to be one text; token ids are not taken", "prompt")
    return _read_common(body, prompt, is_chat=False)


def _read_common(body: dict[str, Any], text: str, *, is_chat: bool) -> Asked:
    streams = _read(body, "stream", bool, False)
    return Asked(
        _read(body, "model", str),
        text,
        _read_max_tokens(body),
        _read_sampling(body),
        _read_stops(body.get("stop")),
        is_chat,
        streams,
        _read_usage_wish(body.get("stream_options"), streams=streams),
    )


def _take_known(
    data: dict[str, Any], taken: set[str], neutral: dict[str, tuple[Any, ...]], where: str = ""
) -> dict[str, Any]:
    """Return what of an object is taken, without nulls; Refusal for what cannot be done."""
    for name, value in data.items():
        if name in taken or name in PASSED_OVER or (name in neutral and value is None):
            continue
        if name not in neutral:
            message = f"{where}{show(name)} is unknown; known: {', '.join(sorted(taken))}"
            raise refuse(message, where + name[:60], "unknown_parameter")
        if not any(_is_same(value, one) for one in neutral[name]):
            values = " or ".join(repr(one) for one in neutral[name])
            rest = f"; it can only be {values}" if values else ""
            message = f"{where}{name} asks for what this server does not do{rest}"
            raise refuse(message, where + name[:60], "unsupported_parameter")
    return {name: value for name, value in data.items() if name in taken and value is not None}


def _is_same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _read_messages(messages: Any, chat: Chat, eyes: Eyes | None) -> list[tuple[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise refuse("messages has to be a list of at least one message", "messages")
    return [
        _read_message(one, f"messages[{place}]", chat, eyes) for place, one in enumerate(messages)
    ]


def _read_message(message: Any, where: str, chat: Chat, eyes: Eyes | None) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise refuse(f"{where} has to be an object", where)
    body = _take_known(message, {"role", "content", "name"}, NEUTRAL_MESSAGE, f"{where}.")
    role, roles = body.get("role"), chat.roles
    if role == "developer" and role not in roles:
        role = "system"  # what developers' messages were called, and are in Phi's template
    # A template that is carried says itself why it refuses a role.
    if not isinstance(role, str) or (role not in roles and chat.template is None):
        found = show(role) if isinstance(role, str) else "no text"
        message = f"{where}.role is {found}; this model knows {', '.join(sorted(roles))}"
        raise refuse(message, f"{where}.role")
    return role, _read_content(body.get("content"), f"{where}.content", eyes)


def _read_content(content: Any, where: str, eyes: Eyes | None) -> str:
    """Return a message's text; its parts follow one another with nothing in between."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise refuse(f"{where} has to be a text, or a list of text parts", where)
    texts = []
    for place, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise refuse(f"{where}[{place}] has to be an object with a type", where)
        if part["type"] == "image_url" and eyes:
            _take_known(part, {"type", "image_url"}, {}, f"{where}[{place}].")
            texts.append(eyes.take(part, f"{where}[{place}]"))
            continue
        if part["type"] != "text":
            message = f"{where}[{place}] is of type {show(part['type'])}; this model reads text"
            raise refuse(message, where, "unsupported_content")
        body = _take_known(part, {"type", "text"}, {}, f"{where}[{place}].")
        if not isinstance(body.get("text"), str):
            raise refuse(f"{where}[{place}].text has to be a text", where)
        texts.append(body["text"])
    return "".join(texts)


def _read_max_tokens(body: dict[str, Any]) -> int | None:
    counts = [
        _read(body, name, int)
        for name in ("max_completion_tokens", "max_tokens")
        if body.get(name) is not None
    ]
    if any(count < 1 for count in counts) or len(set(counts)) > 1:
        raise refuse("max_tokens has to be one number, 1 or more", "max_tokens")
    return counts[0] if counts else None


def _read_sampling(body: dict[str, Any]) -> Sampling:
    """Greedy unless the request says otherwise; top_p alone asks for temperature 1."""
    top_p = _read_number(body, "top_p", 1.0, 1.0)
    temperature = _read_number(body, "temperature", 0.0 if top_p == 1 else 1.0, 2.0)
    seed = _read(body, "seed", int)
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise refuse("seed has to be a number of 64 bits", "seed")
    if temperature < LOWEST_TEMPERATURE or top_p == 0:
        return GREEDY
    return Sampling(temperature, top_p, seed)


def _read_stops(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise refuse(f"stop has to be a text, or a list of at most {MOST_STOPS}", "stop")
    for one in stops:
        if not isinstance(one, str) or not 0 < len(one) <= STOP_CHARACTERS:
            message = f"each stop has to be a text of 1 to {STOP_CHARACTERS} characters"
            raise refuse(message, "stop")
    return tuple(stops)


def _read_usage_wish(options: Any, *, streams: bool) -> bool:
    if options is None:
        return False
    if not streams:
        raise refuse("stream_options is for answers with stream alone", "stream_options")
    if not isinstance(options, dict):
        raise refuse("stream_options has to be an object", "stream_options")
    known = _take_known(options, {"include_usage", "include_obfuscation"}, {}, "stream_options.")
    return bool(_read(known, "include_usage", bool, False))


def _read(body: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = body.get(name, default)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # JSON has but one kind of number
    if value is not default and type(value) is not kind:
        names = {str: "a text", bool: "true or false", int: "a whole number"}
        raise refuse(f"{name} has to be {names[kind]}", name)
    return value


def _read_number(body: dict[str, Any], name: str, default: float, highest: float) -> float:
    value = body.get(name, default)
    if type(value) not in (int, float) or not 0 <= value <= highest:
        raise refuse(f"{name} has to be a number from 0 to {highest:g}", name)
    return float(value)
