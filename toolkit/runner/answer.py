"""From messages to token ids, and from token ids to text: the same for every engine."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from .chat import render_chat
from .failure import Failure
from .loading import Loaded
from .pictures import split_pictures
from .settings import GREEDY, Sampling
from .stopping import StopTexts

if TYPE_CHECKING:
    from .chat import Message

ANSWER_TOKENS = 1024  # of a question that names no number


@dataclass(frozen=True)
class Question:
    """What is asked of a loaded model; no stop text appears in the answer.

    An answer in a chat begins with its first word; a text that is continued keeps its white space.
    `pixels` (images.Pixels) are what ids below 0 stand for.
    """

    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling = GREEDY
    stops: tuple[str, ...] = ()
    keeps_space: bool = False
    pixels: Any = None


@dataclass
class Answer:
    """What came of a question, growing while it is answered; `stop_reason` is stop or length."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    stop_reason: str = "length"
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """The rate after the first token, whose time is the prompt's."""
        count = len(self.token_ids) - 1
        return count / self.decode_seconds if count > 0 and self.decode_seconds > 0 else 0.0


def encode_chat(loaded: Loaded, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of messages and of the generation prompt."""
    return encode_text(loaded, render_chat(loaded.manifest.chat, messages))


def encode_text(loaded: Loaded, text: str) -> list[int]:
    """Return the token ids of a text, after the token that begins every text of this model."""
    bos_id = loaded.manifest.chat.bos_id
    return ([] if bos_id is None else [bos_id]) + list(loaded.model.encode(text))


def encode_pictures(loaded: Loaded, text: str, counts: Sequence[int]) -> list[int]:
    """Return the ids of a text with marks (pictures.PICTURE) for pictures of so many tokens."""
    return split_pictures(text, counts, partial(encode_text, loaded))


def count_context(loaded: Loaded) -> int:
    """Return how many tokens prompt and answer may have together, as this model was loaded."""
    return min(loaded.settings.context_tokens, loaded.manifest.valid_context[1])


def check_length(loaded: Loaded, prompt_tokens: int, new_tokens: int) -> None:
    """Raise Failure unless prompt and answer fit into the context this model was loaded with."""
    highest = count_context(loaded)
    if prompt_tokens + new_tokens > highest:
        raise Failure(
            "request",
            f"the prompt has {prompt_tokens} tokens and the answer may have {new_tokens}; "
            f"this artifact's context holds {highest}",
            "shorten the prompt or ask for fewer tokens",
        )


def find_room(loaded: Loaded, prompt_tokens: int, asked_tokens: int | None) -> int:
    """Return how many tokens an answer may have; Failure when what is asked does not fit."""
    left = count_context(loaded) - prompt_tokens
    new_tokens = max(1, min(ANSWER_TOKENS, left)) if asked_tokens is None else asked_tokens
    check_length(loaded, prompt_tokens, new_tokens)
    return new_tokens


def stream_answer(loaded: Loaded, question: Question, answer: Answer) -> Generator[str, None, None]:
    """Yield the text that each token adds, often none, and fill `answer`; closing ends the work."""
    stop_ids, stops = loaded.manifest.chat.stop_ids, StopTexts(question.stops)
    started_s = first_s = time.monotonic()
    seen = {} if question.pixels is None else {"pixels": question.pixels}
    stream = loaded.model.generate(
        question.prompt_ids, question.max_tokens, question.sampling, **seen
    )
    try:
        for token, piece in stream:
            now_s = time.monotonic()
            if not answer.token_ids:
                first_s = now_s
                answer.first_token_seconds = now_s - started_s
            if token in stop_ids:
                answer.stop_reason = "stop"
                break
            answer.token_ids.append(token)
            answer.decode_seconds = now_s - first_s
            text = _begin(stops.push(piece), question, answer)
            answer.text += text
            yield text  # also when it is empty: who asks can end the work at every token
            if stops.is_found:
                answer.stop_reason = "stop"
                return
        else:
            if len(answer.token_ids) < question.max_tokens:  # the engine's own end
                answer.stop_reason = "stop"
    finally:
        stream.close()
    if rest := _begin(stops.flush(), question, answer):
        answer.text += rest
        yield rest


def _begin(text: str, question: Question, answer: Answer) -> str:
    """Return a piece of text, without white space before the answer's first word."""
    return text if answer.text or question.keeps_space else text.lstrip()
