"""What happened on this device, a line of JSON each."""

from __future__ import annotations

import json
import time
from typing import Any

from .durable import append_json, replace_text
from .layout import Layout, read_boot_id

KEPT_EVENTS = 1000


def log(layout: Layout, event: str, **fields: Any) -> None:
    """Append an event durably."""
    entry = {"time": time.time(), "boot_id": read_boot_id(), "event": event, **fields}
    append_json(layout.journal, entry)


def read(layout: Layout) -> list[dict[str, Any]]:
    """Return all events, oldest first; a line that a power cut tore is left out."""
    events = []
    for line in _read_lines(layout):
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def trim(layout: Layout) -> None:
    """Keep the newest events, when there are twice as many as are kept."""
    lines = _read_lines(layout)
    if len(lines) > 2 * KEPT_EVENTS:
        replace_text(layout.journal, "".join(line + "\n" for line in lines[-KEPT_EVENTS:]))


def _read_lines(layout: Layout) -> list[str]:
    if not layout.journal.exists():
        return []
    return layout.journal.read_text(encoding="utf-8", errors="replace").splitlines()
