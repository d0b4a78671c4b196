"""The server's life: it listens, answers, and stops when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

from ..loading import Loaded
from .jobs import Line
from .metrics import Metrics
from .options import ServeOptions, open_listener, tell_url
from .refusal import refuse_stopping
from .requests import refuse_connection, serve_connection
from .service import Service
from .wire import PIECE_BYTES, Connection

POLL_S = 0.05
ENGINE_S = 2.0  # for an engine that is told to end in the middle of a token
CLOSING_S = 1.0  # for connections whose clients do not read
REFUSALS = 16  # connections beyond the limit that are told so; the rest are dropped


def serve(loaded: Loaded, options: ServeOptions, listener: socket.socket | None = None) -> int:
    """Answer OpenAI's API until SIGTERM or SIGINT; returns 0. Failure when it cannot listen.

    `listener` is what `open_listener` made, before the model was loaded.
    """
    listener = listener or open_listener(options)
    metrics = Metrics()
    line = Line(loaded, metrics, options.queue_size, options.limits.answer_tokens)
    server = Server(Service(loaded, options, metrics, line), listener)
    asyncio.run(server.run())
    if not line.close(ENGINE_S):
        # Freeing a model that is at work would crash; the system frees it as well.
        print("the engine did not end in time, and is left", file=sys.stderr, flush=True)
        os._exit(0)
    return 0


class Server:
    """Takes connections, and waits for the word to stop."""

    def __init__(self, service: Service, listener: socket.socket) -> None:
        self._service = service
        self._listener = listener
        self._tasks: set[asyncio.Task[None]] = set()
        self._signals = 0

    async def run(self) -> None:
        """Serve until told to stop, then let what is being answered come to its end."""
        self._stopped = asyncio.Event()
        self._await_word()
        server = await asyncio.start_server(self._take, sock=self._listener, limit=PIECE_BYTES)
        print(self._tell(), flush=True)
        await self._stopped.wait()
        await self._finish()
        server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSING_S)

    async def _finish(self) -> None:
        """Refuse those who wait, and wait for the rest; a second signal ends that at once."""
        service, patience_s = self._service, self._service.options.grace_s
        service.is_stopping = True
        service.line.clear(refuse_stopping())
        while service.busy and patience_s > 0 and self._signals < 2:
            await asyncio.sleep(POLL_S)
            patience_s -= POLL_S
        service.line.cancel_running(refuse_stopping())
        for _ in range(int(1 / POLL_S)):  # the last words have to be sent
            if not service.busy:
                return
            await asyncio.sleep(POLL_S)

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        limit = self._service.options.limits.connections
        if len(self._tasks) >= limit + REFUSALS:
            writer.transport.abort()
            return
        task = asyncio.ensure_future(self._converse(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        service = self._service
        connection = Connection(reader, writer, service.options.limits)
        if service.connections >= service.options.limits.connections:
            await refuse_connection(connection, service)
            return
        service.connections += 1
        try:
            await serve_connection(connection, service)
        finally:
            service.connections -= 1

    def _stop(self) -> None:
        self._signals += 1
        self._stopped.set()

    def _await_word(self) -> None:
        """Have `_stop` called by signals, and where asked by the end of standard input."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C ends it at once
                loop.add_signal_handler(number, self._stop)
        if self._service.options.until_eof:
            threading.Thread(target=_wait_eof, args=(loop, self._stop), daemon=True).start()

    def _tell(self) -> str:
        service, url = self._service, tell_url(self._listener)
        engine, provider = service.loaded.engine, str(service.loaded.model.provider)
        if not service.options.as_json:
            return f"{service.model} answers at {url}/v1 ({engine} on {provider})"
        told = {"listening": url, "port": self._listener.getsockname()[1], "model": service.model}
        context_tokens = service.context_tokens
        return json.dumps(
            {**told, "engine": engine, "provider": provider, "context_tokens": context_tokens}
        )


def _wait_eof(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
    while os.read(sys.stdin.fileno(), PIECE_BYTES):
        pass
    with contextlib.suppress(RuntimeError):  # it ended by itself
        loop.call_soon_threadsafe(stop)
