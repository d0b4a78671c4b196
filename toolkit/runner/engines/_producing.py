"""A thread of its own for an engine's work, which hands over what it makes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from ..failure import Failure

Item = TypeVar("Item")
Put = Callable[[Item], bool]


class Producer(Generic[Item]):
    """Runs one piece of work after the other, all in the same thread.

    For engines that speak by callback, and for those whose objects belong to a thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the thread and return what it returns, or raise what it raises."""
        return self._submit(function).result()

    def produce(self, work: Callable[[Put[Item]], None]) -> Generator[Item, None, None]:
        """Yield what `work` puts, as it comes; Failure when it fails.

        `put` says whether to go on. Closing makes it say no, and returns when the work has ended.
        """
        items: queue.Queue[tuple[Item] | BaseException | None] = queue.Queue()
        is_left = threading.Event()

        def put(item: Item) -> bool:
            items.put((item,))
            return not is_left.is_set()

        def run() -> None:
            try:
                work(put)
                items.put(None)
            except Exception as error:  # for the thread that waits
                items.put(error)

        running = self._submit(run)
        try:
            while (item := items.get()) is not None:
                if isinstance(item, BaseException):
                    raise Failure("engine", f"{self._name} failed: {item}") from None
                yield item[0]
        finally:
            is_left.set()
            running.result()

    def close(self) -> None:
        """End the thread when it has done what it was given."""
        self._calls.put(None)
        self._thread.join()

    def _submit(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.put((function, future))
        return future

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            function, future = call
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del call, function, future  # nothing of it is kept until the next one comes
