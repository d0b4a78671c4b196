"""One answer of a deployed artifact, with what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .answer import (
    ANSWER_TOKENS,
    Answer,
    Question,
    encode_pictures,
    encode_text,
    find_room,
    stream_answer,
)
from .chat import prepare_template, render_chat
from .images import prepare_files
from .loading import Loaded, loading
from .manifest import read_manifest
from .memory import read_peak_memory_bytes
from .pictures import mark_pictures
from .settings import GREEDY, Sampling, read_settings

TakeText = Callable[[str], None]


def generate(
    artifact: Path,
    prompt: str,
    max_tokens: int | None,
    take_text: TakeText,
    sampling: Sampling = GREEDY,
    system: str = "",
    images: Sequence[Path] = (),
    **given: int | None,
) -> dict[str, Any]:
    """Answer `prompt`, about `images` if any; `take_text` gets each piece. Returns --json's object.

    The context is as large as this answer may need, unless `given` says otherwise.
    """
    manifest = read_manifest(artifact)
    prepare_template(manifest.chat)
    highest = manifest.valid_context[1]
    room = min(given.get("context_tokens") or highest, highest)
    pixels = prepare_files(images, manifest.vision, manifest.name, room) if images else None
    counts = pixels.counts if pixels else ()
    before = [("system", system)] if system else []
    content = mark_pictures(prompt, len(images))
    text = render_chat(manifest.chat, [*before, ("user", content)])
    new_tokens = ANSWER_TOKENS if max_tokens is None else max_tokens
    seen_tokens = sum(counts) + 2 * len(counts)  # a text behind a picture begins as any text
    context_tokens = bound_context(text, new_tokens + seen_tokens, manifest.valid_context)
    if given.get("context_tokens") is None:
        given["context_tokens"] = context_tokens
    settings = read_settings(artifact, context_tokens, **given)
    with loading(artifact, settings) as loaded:
        encode = partial(encode_pictures, counts=counts) if counts else encode_text
        prompt_ids = encode(loaded, text)
        new_tokens = find_room(loaded, len(prompt_ids), max_tokens)
        question, answer = Question(prompt_ids, new_tokens, sampling, pixels=pixels), Answer()
        for piece in stream_answer(loaded, question, answer):
            take_text(piece)
        return describe_answer(loaded, len(prompt_ids), answer)


def describe_answer(loaded: Loaded, prompt_tokens: int, answer: Answer) -> dict[str, Any]:
    """Return an answer and its costs as JSON."""
    return {
        "text": answer.text.strip(),
        "token_ids": answer.token_ids,
        "new_tokens": len(answer.token_ids),
        "stop_reason": answer.stop_reason,
        "first_token_seconds": answer.first_token_seconds,
        "tokens_per_second": answer.tokens_per_second,
        "prompt_tokens": prompt_tokens,
        "load_seconds": loaded.load_seconds,
        "peak_memory_bytes": read_peak_memory_bytes(),
        "provider": loaded.model.provider,
        "engine": loaded.engine,
    }


def bound_context(text: str, new_tokens: int, valid_context: tuple[int, int]) -> int:
    """Return a context that surely holds the text and the answer, within `valid_context`.

    No token is shorter than a byte; eight more cover bos and a tokenizer's own prefix.
    """
    lowest, highest = valid_context
    return max(lowest, min(highest, len(text.encode("utf-8")) + 8 + new_tokens))
