"""How a server is reached, and what it allows."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..failure import Failure

TOKEN_VARIABLE = "PHISHIP_TOKEN"
KIND = "serve"  # of this package's failures


@dataclass(frozen=True)
class Limits:
    """What one client may take of the device; a limit that is met is told to it."""

    connections: int = 64
    head_bytes: int = 16 << 10
    body_bytes: int = 1 << 20
    held_bytes: int = 64 << 20  # of all bodies together, until their answers end, but for
    free_bytes: int = 1 << 20  # the first of each
    # From its first byte to its last, so that a byte now and then does not hold a connection.
    head_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 30.0  # between two requests of a connection
    write_s: float = 30.0  # for a client that does not read its answer
    answer_tokens: int = 1024  # of a request that names no number


@dataclass(frozen=True)
class ServeOptions:
    """What `serve` is asked; `model` is the name it answers to, the artifact's own if None.

    `image_folder` is where file: URLs of pictures may point; None allows none.
    `until_eof` stops it when standard input ends, for a parent that may die.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    token: str | None = field(default=None, repr=False)
    model: str | None = None
    queue_size: int = 8
    cors_origin: str | None = None
    grace_s: float = 15.0  # for answers under way when the server is told to stop
    until_eof: bool = False
    as_json: bool = False
    image_folder: Path | None = None
    limits: Limits = Limits()


def check_options(options: ServeOptions) -> None:
    """Raise Failure for what cannot be served, before a model is loaded."""
    if not is_loopback(options.host) and options.token is None:
        raise Failure(
            KIND,
            f"host {options.host} can be reached by other machines, and there is no token",
            f"put a token into a file or into {TOKEN_VARIABLE}, or leave the host out",
        )
    if not 0 <= options.port <= 65535:
        raise Failure(KIND, f"port {options.port} is no port; allowed: 0 to 65535, 0 for any")
    if options.queue_size < 0:
        raise Failure(KIND, f"the queue's size is {options.queue_size}; allowed: 0 or more")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the token in a file, else the one in PHISHIP_TOKEN, else None.

    Never from the command line, which every user of the device can read.
    """
    if path is None:
        where, token = TOKEN_VARIABLE, environment.get(TOKEN_VARIABLE)
        if token is None:
            return None
    else:
        where = str(path)
        try:
            token = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Failure(KIND, f"{path}: the token cannot be read: {error}") from None
    if not token or not all("!" <= character <= "~" for character in token):
        raise Failure(
            KIND,
            f"{where}: a token is one line of visible ASCII characters without spaces",
            "make one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return token


def open_listener(options: ServeOptions) -> socket.socket:
    """Return a socket bound to host and port; Failure when that cannot be.

    To be called before the model is loaded: what is wrong shows at once.
    """
    check_options(options)
    where = f"port {options.port} of {options.host}"
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise Failure(KIND, f"{where}: {error.strerror or error}") from None
    try:
        # A port whose last connections linger is free again; one in use is still refused.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(options.limits.connections)
    except OSError as error:
        listener.close()
        raise Failure(
            KIND,
            f"{where} cannot be taken: {error.strerror or error}",
            "take another port, or 0 for a free one",
        ) from None
    return listener


def tell_url(listener: socket.socket) -> str:
    """Return the base URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
