"""Bodies of requests, bounded together: many clients at once must not fill a small device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .refusal import Refusal

# Says that so many bytes of a body are about to come.
Announce = Callable[[int], None]


class Bodies:
    """What requests hold between their first byte and the end of their answer; one thread only.

    The first `free_bytes` of each do not count: who asks about a text is not kept waiting by those
    who send pictures, and connections are few.
    """

    def __init__(
        self, most_bytes: int, free_bytes: int, refuse_busy: Callable[[str, str], Refusal]
    ) -> None:
        self._most_bytes = most_bytes
        self._free_bytes = free_bytes
        self._refuse_busy = refuse_busy
        self.held_bytes = 0

    @contextmanager
    def holding(self) -> Iterator[Announce]:
        """Yield what has to be told before bytes are read; they count until the block ends.

        It raises Refusal 429 for those that do not fit beside what others hold.
        """
        announced = counted = 0

        def announce(count: int) -> None:
            nonlocal announced, counted
            more = max(0, announced + count - self._free_bytes) - counted
            if more and self.held_bytes + more > self._most_bytes:
                what = f"requests of {self.held_bytes} bytes are held already"
                raise self._refuse_busy(what, "bodies_full")
            self.held_bytes += more
            announced, counted = announced + count, counted + more

        try:
            yield announce
        finally:
            self.held_bytes -= counted
