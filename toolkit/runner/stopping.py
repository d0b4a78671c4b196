"""Stop texts, which may come in pieces: nothing of one is ever shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Holds back what may be the beginning of a stop text, until it is known."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.is_found = False

    def push(self, piece: str) -> str:
        """Take a piece of text; returns what may be shown now. At the first stop all else goes."""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.is_found, self._held = True, ""
            return text[: min(places)]
        size = self._count_open(text)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def flush(self) -> str:
        """Return what is still held back, for the answer is over."""
        held, self._held = self._held, ""
        return held

    def _count_open(self, text: str) -> int:
        """Characters at the end of `text` that begin a stop text, the most."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
