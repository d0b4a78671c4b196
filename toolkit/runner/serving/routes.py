"""What is answered where, and how."""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from .answers import DONE, Frame, describe_model, encode_event
from .api import Asked, read_chat, read_completion
from .exchange import Exchange, Page, make_page
from .jobs import Job
from .pictures import Eyes
from .refusal import Gone, Refusal
from .service import Service
from .strict import parse_object, show
from .wire import Head

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Call:
    """A request that may be made; `name` is the model that its path ends with."""

    exchange: Exchange
    service: Service
    name: str
    body: bytes


@dataclass(frozen=True)
class Route:
    """One path and what answers it."""

    name: str
    method: str
    answer: Callable[[Call], Awaitable[None]]
    is_open: bool = False  # needs no token, and is answered while the server stops

    @property
    def allowed(self) -> str:
        """The methods of this path."""
        return "GET, HEAD, OPTIONS" if self.method == "GET" else f"{self.method}, OPTIONS"

    def check_method(self, head: Head) -> None:
        """Raise Refusal for another method, or a POST of something else than JSON."""
        if head.method not in self.allowed.split(", "):
            message = f"{self.name} takes {self.allowed}; it was asked {head.method}"
            raise Refusal(405, message, headers=(("Allow", self.allowed),))
        kind = head.fields.get("content-type", "").partition(";")[0].strip().lower()
        # A web page can post text anywhere; for JSON its browser asks us first.
        if self.method == "POST" and kind != "application/json":
            raise Refusal(415, "the header Content-Type has to be application/json")


def find_route(head: Head) -> tuple[Route, str]:
    """Return what answers a path, with or without /v1, and the model a path ends with."""
    path = urllib.parse.unquote(head.target.partition("?")[0].partition("#")[0])
    path = path[len("/v1") :] if path.startswith("/v1/") else path
    path = path.rstrip("/")
    if path.startswith("/models/"):
        return MODEL, path[len("/models/") :]
    for route in ROUTES:
        if path == route.name:
            return route, ""
    known = ", ".join(route.name for route in ROUTES)
    raise Refusal(404, f"nothing is at {show(path)}; known: {known}")


async def _tell_health(call: Call) -> None:
    status, data = call.service.tell_health()
    await call.exchange.send_page(make_page(data, status))


async def _show_metrics(call: Call) -> None:
    await call.exchange.send_page(
        Page(call.service.show_metrics().encode(), content_type=PROMETHEUS)
    )


async def _list_models(call: Call) -> None:
    models = [describe_model(call.service.model, call.service.started, call.service.context_tokens)]
    await call.exchange.send_page(make_page({"object": "list", "data": models}))


async def _show_model(call: Call) -> None:
    call.service.check_model(call.name)
    model = describe_model(call.service.model, call.service.started, call.service.context_tokens)
    await call.exchange.send_page(make_page(model))


async def _chat(call: Call) -> None:
    manifest = call.service.loaded.manifest
    eyes = Eyes(call.service.options.image_folder) if manifest.vision else None
    asked = read_chat(parse_object(call.body), manifest.chat, eyes)
    await _generate(call.exchange, call.service, asked)


async def _complete(call: Call) -> None:
    await _generate(call.exchange, call.service, read_completion(parse_object(call.body)))


async def _generate(exchange: Exchange, service: Service, asked: Asked) -> None:
    """Stand in line, and send the answer as it comes or at its end; who leaves ends it."""
    if asked.model is not None:
        service.check_model(asked.model)
    job = service.line.submit(asked)
    watch = asyncio.ensure_future(exchange.connection.wait_gone())
    watch.add_done_callback(lambda _: service.line.cancel(job, Gone()))
    try:
        await job.take()  # its turn has come, and the prompt fits
        send = _send_stream if asked.streams else _send_whole
        await send(exchange, job, service.make_frame(asked))
    finally:
        exchange.note = f"{job.prompt_tokens} + {len(job.answer.token_ids)} tokens"
        watch.cancel()  # and the job with it, which is over unless the client left
        await asyncio.wait([watch])  # two must not read one connection, which is read next


async def _send_whole(exchange: Exchange, job: Job, frame: Frame) -> None:
    texts = []
    while (text := await job.take()) is not None:
        texts.append(text)
    answer = frame.describe_answer("".join(texts), job.answer, job.prompt_tokens)
    await exchange.send_page(make_page(answer))


async def _send_stream(exchange: Exchange, job: Job, frame: Frame) -> None:
    await exchange.start_stream()
    if frame.is_chat:
        await exchange.send_event(encode_event(frame.describe_role()))
    while (text := await job.take()) is not None:
        await exchange.send_event(encode_event(frame.describe_text(text)))
    await exchange.send_event(encode_event(frame.describe_end(job.answer)))
    if frame.includes_usage:
        usage = frame.describe_usage(job.answer, job.prompt_tokens)
        await exchange.send_event(encode_event(usage))
    await exchange.send_event(DONE)
    await exchange.end_stream()


ROUTES = (
    Route("/chat/completions", "POST", _chat),
    Route("/completions", "POST", _complete),
    Route("/models", "GET", _list_models),
    Route("/health", "GET", _tell_health, is_open=True),
    Route("/metrics", "GET", _show_metrics),
)
MODEL = Route("/models/{id}", "GET", _show_model)
