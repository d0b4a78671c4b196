"""One answer of a deployed artifact, with what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import engines
from .chat import render_chat
from .failure import Failure
from .manifest import Manifest, read_manifest
from .memory import read_peak_memory_bytes

TakeText = Callable[[str], None]


def generate(artifact: Path, prompt: str, max_tokens: int, take_text: TakeText) -> dict[str, Any]:
    """Answer `prompt` greedily; `take_text` gets each piece. Returns the object of --json."""
    manifest = read_manifest(artifact)
    text = render_chat(manifest.chat, [("user", prompt)])
    engine = engines.find_engine(manifest.engine)
    started_s = time.monotonic()
    context_tokens = bound_context(text, max_tokens, manifest.valid_context)
    model = engine.load(artifact, manifest.main_file, manifest.provider, context_tokens)
    load_seconds = time.monotonic() - started_s
    try:
        prompt_ids = _encode(model, manifest, text)
        _check_length(len(prompt_ids), max_tokens, manifest.valid_context[1])
        answer = _answer(model, manifest, prompt_ids, max_tokens, take_text)
    finally:
        model.close()
    return {
        **answer,
        "prompt_tokens": len(prompt_ids),
        "load_seconds": load_seconds,
        "peak_memory_bytes": read_peak_memory_bytes(),
        "provider": model.provider,
        "engine": f"{engine.PACKAGE} {model.version}",
    }


def bound_context(text: str, new_tokens: int, valid_context: tuple[int, int]) -> int:
    """Return a context that surely holds the text and the answer, within `valid_context`.

    No token is shorter than a byte; eight more cover bos and a tokenizer's own prefix.
    """
    lowest, highest = valid_context
    return max(lowest, min(highest, len(text.encode("utf-8")) + 8 + new_tokens))


def _encode(model: Any, manifest: Manifest, text: str) -> list[int]:
    bos_id = manifest.chat.bos_id
    return ([] if bos_id is None else [bos_id]) + list(model.encode(text))


def _check_length(prompt_tokens: int, new_tokens: int, highest: int) -> None:
    if prompt_tokens + new_tokens > highest:
        raise Failure(
            "request",
            f"the prompt has {prompt_tokens} tokens and the answer may have {new_tokens}; "
            f"this artifact's context holds {highest}",
            "shorten the prompt or ask for fewer tokens",
        )


def _answer(
    model: Any, manifest: Manifest, prompt_ids: list[int], max_tokens: int, take_text: TakeText
) -> dict[str, Any]:
    """Run the model until a stop id, the engine's own end, or `max_tokens`."""
    started_s = first_s = last_s = time.monotonic()
    token_ids: list[int] = []
    pieces: list[str] = []
    stop_reason = "length"
    stream = model.generate(prompt_ids, max_tokens)
    try:
        for token, piece in stream:
            last_s = time.monotonic()
            first_s = first_s if token_ids else last_s
            if token in manifest.chat.stop_ids:
                break
            token_ids.append(token)
            pieces.append(piece)
            take_text(piece)
    finally:
        stream.close()
    if len(token_ids) < max_tokens:
        stop_reason = "stop"
    # The first token's time is the prompt's; the rate is of the tokens after it.
    decode_seconds = last_s - first_s
    rate = (len(token_ids) - 1) / decode_seconds if decode_seconds > 0 else 0.0
    return {
        "text": "".join(pieces).strip(),
        "token_ids": token_ids,
        "new_tokens": len(token_ids),
        "stop_reason": stop_reason,
        "first_token_seconds": first_s - started_s,
        "tokens_per_second": max(0.0, rate),
    }
