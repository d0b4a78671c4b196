"""What `tune` needs where the artifact lies: proof that answers stay right, the winner's place."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .agent.durable import sync_folder, write_json
from .answer import (
    Answer,
    Question,
    check_length,
    count_context,
    encode_chat,
    encode_text,
    stream_answer,
)
from .engines import find_engine
from .failure import Failure
from .loading import Loaded
from .manifest import Manifest, read_manifest
from .settings import FILE, Settings, check_offered

# Read with growing context, this text shows what settings do to the next token.
PROBE_TEXT = (
    "The harbour town lies between two hills. Every morning the fishing boats return with the "
    "tide, and people from the valley come to buy fish, bread and salt. In winter the road over "
    "the pass is closed, so a small ferry brings letters, flour and news twice a week. The old "
    "lighthouse keeper writes down the wind, the temperature and each ship that passes: 3 "
    "steamers on Monday, 7 on Tuesday, none on Sunday. If the fog is thick, he rings the bell "
    "once a minute until the sun breaks through."
)
PREFIXES = 24


def judge(loaded: Loaded, prompt: str, max_tokens: int) -> dict[str, Any]:
    """Return the `text` answered to a prompt, and `next_ids`, the likeliest token after prefixes.

    PREFIXES prefixes of one fixed text, the longest its whole: comparing two settings' `next_ids`
    gives the share of positions at which both choose the same token, whatever was chosen before.
    """
    prompt_ids = encode_chat(loaded, [("user", prompt)])
    check_length(loaded, len(prompt_ids), max_tokens)
    answer = Answer()
    for _ in stream_answer(loaded, Question(prompt_ids, max_tokens), answer):
        pass
    return {"text": answer.text.strip(), "next_ids": _predict_next(loaded)}


def store_settings(artifact: Path, text: str) -> dict[str, Any]:
    """Keep `text`, {"settings": {...}, "measured": {...}}, beside the manifest, durably.

    Empty settings remove what was kept. Returns what is kept now; Failure when the artifact's
    engine has no such settings.
    """
    manifest, path = read_manifest(artifact), artifact / FILE
    try:
        asked = json.loads(text)
        settings, measured = dict(asked["settings"]), dict(asked["measured"])
    except (ValueError, KeyError, TypeError) as error:
        raise Failure("settings", f"what is to be kept is damaged: {error!r}") from None
    chosen = {name: value for name, value in settings.items() if value is not None}
    if not chosen:
        if path.exists():
            path.unlink()
            sync_folder(artifact)
        return {"settings": {}, "measured": {}}
    _check(manifest, chosen)
    kept = {"settings": chosen, "measured": measured}
    write_json(path, kept)
    return kept


def _predict_next(loaded: Loaded) -> list[int]:
    text_ids = encode_text(loaded, PROBE_TEXT)
    room = count_context(loaded) - 1
    longest = min(len(text_ids), room)
    lengths = [max(1, longest * number // PREFIXES) for number in range(1, PREFIXES + 1)]
    next_ids = []
    for length in lengths:
        stream = loaded.model.generate(text_ids[:length], 1)
        next_ids.append(next((token for token, _ in stream), -1))
        stream.close()
    return next_ids


def _check(manifest: Manifest, chosen: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(Settings)]
    for name, value in chosen.items():
        if name not in known:
            raise Failure("settings", f"{name} is no setting; allowed: {', '.join(known)}")
        if type(value) is not int or value < 1:
            raise Failure("settings", f"{name} is {value!r}; allowed are whole numbers from 1")
    lowest, highest = manifest.valid_context
    tokens = chosen.get("context_tokens", lowest)
    if not lowest <= tokens <= highest:
        allowed = f"{lowest} to {highest}"
        raise Failure("settings", f"context_tokens is {tokens}; {manifest.name} allows {allowed}")
    settings = Settings(**{"context_tokens": tokens, **chosen})
    check_offered(manifest.engine, settings, find_engine(manifest.engine).OFFERED)
