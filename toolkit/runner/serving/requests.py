"""A connection's requests, one after the other: who may ask, what went wrong, what is noted."""

from __future__ import annotations

import sys
import time
import traceback

from .exchange import Exchange, Page
from .refusal import Gone, Refusal, refuse_stopping
from .routes import Call, find_route
from .service import Service
from .wire import Connection, Head

CLIENT_LEFT = 499  # in counters and the log alone, as nginx has it


async def serve_connection(connection: Connection, service: Service) -> None:
    """Answer requests until the client or the server has enough."""
    lingers = False
    try:
        while await _serve_request(connection, service):
            pass
        lingers = True
    except Gone:
        pass
    finally:
        await connection.close(lingers=lingers)


async def refuse_connection(connection: Connection, service: Service) -> None:
    """Tell a client that there are too many."""
    limit = service.options.limits.connections
    refusal = Refusal(503, f"{limit} connections are open already", code="too_many_connections")
    try:
        await Exchange(connection, None, None).send_refusal(refusal)
    except Gone:
        pass
    finally:
        await connection.close(lingers=True)


async def _serve_request(connection: Connection, service: Service) -> bool:
    """Answer one request; returns whether another may follow. Gone when the client left."""
    try:
        head = await connection.read_head()
    except Refusal as refusal:  # what was sent is no request
        await Exchange(connection, None, None).send_refusal(refusal)
        service.metrics.requests.add(1, "none", str(refusal.status))
        return False
    exchange = Exchange(connection, head, service.options.cors_origin)
    started_s = time.monotonic()
    try:
        await _answer(exchange, head, service)
    except Gone:
        exchange.status = CLIENT_LEFT
        raise
    finally:
        _note(exchange, head, service, time.monotonic() - started_s)
    return exchange.keeps_alive


async def _answer(exchange: Exchange, head: Head, service: Service) -> None:
    """Answer a request, or say what is wrong with it."""
    try:
        await _check_and_answer(exchange, head, service)
    except Refusal as refusal:
        await exchange.send_refusal(refusal)
    except Gone:
        raise
    except Exception as error:
        # Only what failed where; a message could quote the request.
        frames = "".join(traceback.format_tb(error.__traceback__))
        print(f"{exchange.id}: {type(error).__name__}\n{frames}", file=sys.stderr, flush=True)
        exchange.keeps_alive = False
        await exchange.send_refusal(Refusal(500, "this server has a fault; its log says more"))


async def _check_and_answer(exchange: Exchange, head: Head, service: Service) -> None:
    """Answer a request, whose body is read when all else is right."""
    may_follow, exchange.keeps_alive = exchange.keeps_alive, False
    if not head.has_body:
        exchange.keeps_alive = may_follow
    service.check_host(head)
    route, name = find_route(head)
    exchange.route = route.name
    if head.method == "OPTIONS":
        await exchange.send_page(Page(status=204, headers=(("Allow", route.allowed),)))
        return
    if not route.is_open:
        service.check_token(head)
    route.check_method(head)
    with service.bodies.holding() as announce:
        body = await exchange.connection.read_body(head, announce)
        exchange.keeps_alive = may_follow and not service.is_stopping
        if service.is_stopping and not route.is_open:
            raise refuse_stopping()
        service.busy += 1
        try:
            await route.answer(Call(exchange, service, name, body))
        finally:
            service.busy -= 1


def _note(exchange: Exchange, head: Head, service: Service, seconds: float) -> None:
    """Count a request and write it down, without anything of what it says."""
    service.metrics.requests.add(1, exchange.route, str(exchange.status))
    if head.method != "POST" and exchange.status < 400:
        return  # who watches a server asks it every few seconds
    words = [exchange.id, head.method, exchange.route, str(exchange.status), f"{seconds:.3f} s"]
    print(*words, exchange.note, file=sys.stderr, flush=True)
