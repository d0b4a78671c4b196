"""An OpenAI-compatible endpoint: one chat over HTTP, its answer and what it took.

What is asked and read follows OpenAI's API reference for chat completions, as far as GitHub Models,
Azure AI, NVIDIA NIM, llama.cpp's server and our own runner share it.
"""

import email.utils
import http.client
import ipaddress
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit import __version__
from toolkit.errors import PhishipError, RunnerError, UnreachableError

BODY_BYTES = 32 << 20  # more is no answer
SHOWN_CHARACTERS = 300
TRIES = 4
WAIT_S = 1.0  # before the second try, doubled for each further one
LONGEST_WAIT_S = 60.0  # a server that asks for more (a day's quota) is given up at once
BUSY = (429, 503)
AZURE_RESOURCES = (".services.ai.azure.com", ".openai.azure.com", ".cognitiveservices.azure.com")

Message = Mapping[str, Any]  # content is a text, or a list of parts: texts and pictures
TakeText = Callable[[str], None]


@dataclass(frozen=True)
class Endpoint:
    """A server and one of its models; `base_url` ends before /chat/completions."""

    base_url: str
    model: str
    key: str | None = field(default=None, repr=False)

    @property
    def host(self) -> str:
        """The server's name or address."""
        return urllib.parse.urlsplit(self.base_url).hostname or ""

    @property
    def is_local(self) -> bool:
        """Whether it is this machine itself."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class Reply:
    """An answer; counts are None where the server says nothing, `seconds` are those seen here."""

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float
    first_text_seconds: float | None = None


def chat(
    endpoint: Endpoint,
    messages: Sequence[Message],
    *,
    max_tokens: int | None,
    temperature: float = 0.0,
    seed: int | None = None,
    timeout_s: float,
) -> Reply:
    """Ask for one answer to messages of `role` and `content`; `timeout_s` bounds each try.

    A busy server is asked again when it says so. Raises UnreachableError when nobody answers or the
    key is refused, RunnerError for what is no answer.
    """
    request = _describe_request(endpoint, messages, max_tokens, temperature, seed)
    with _Asked(endpoint, request, timeout_s) as asked:
        data = asked.read_json()
        seconds = time.monotonic() - asked.started_s
    try:
        choice = data["choices"][0]
        text, reason = choice["message"].get("content") or "", choice.get("finish_reason") or ""
        return Reply(str(text), str(reason), *_read_usage(data), seconds)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _explain_nonsense(endpoint, json.dumps(data)) from None


def stream_chat(
    endpoint: Endpoint,
    messages: Sequence[Message],
    *,
    max_tokens: int | None,
    temperature: float = 0.0,
    seed: int | None = None,
    timeout_s: float,
    take_text: TakeText,
) -> Reply:
    """As `chat`; `take_text` gets each piece as it comes, and `timeout_s` bounds the whole."""
    request = _describe_request(endpoint, messages, max_tokens, temperature, seed)
    request |= {"stream": True, "stream_options": {"include_usage": True}}
    pieces: list[str] = []
    reason, first_s = "", None
    counts: tuple[int | None, int | None] = (None, None)
    with _Asked(endpoint, request, timeout_s) as asked:
        for data in asked.read_events():
            try:
                counts = _read_usage(data) if data.get("usage") else counts
                choice = (data.get("choices") or [{}])[0]
                reason = choice.get("finish_reason") or reason
                piece = str((choice.get("delta") or {}).get("content") or "")
            except (AttributeError, TypeError, KeyError):
                raise _explain_nonsense(endpoint, json.dumps(data)) from None
            if piece:
                first_s = first_s or time.monotonic() - asked.started_s
                pieces.append(piece)
                take_text(piece)
        seconds = time.monotonic() - asked.started_s
    return Reply("".join(pieces), reason, *counts, seconds, first_s)


class _Asked:
    """A request that was accepted; in the block its answer is read."""

    def __init__(self, endpoint: Endpoint, request: dict[str, Any], timeout_s: float) -> None:
        self._endpoint, self._timeout_s = endpoint, timeout_s
        self._request = _make_request(endpoint, request)
        self._opener = _make_opener(endpoint)
        self.started_s = 0.0  # of the try that was accepted

    def __enter__(self) -> "_Asked":
        for attempt in range(TRIES):
            self.started_s = time.monotonic()
            try:
                self._response = self._opener.open(self._request, timeout=self._timeout_s)
                return self
            except urllib.error.HTTPError as error:
                with error:
                    wait_s = _read_wait(error, attempt)
                    if wait_s is None or attempt == TRIES - 1:
                        raise _explain_status(self._endpoint, error) from None
                time.sleep(wait_s)
            except (OSError, http.client.HTTPException) as error:
                raise self._explain(error) from None
        raise AssertionError("the last try returns or raises")

    def __exit__(self, *_: object) -> None:
        self._response.close()

    def read_json(self) -> dict[str, Any]:
        """Return the answer, an object; RunnerError when it is none."""
        text = b"".join(self._read_pieces()).decode("utf-8", "replace")
        try:
            data = json.loads(text)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise _explain_nonsense(self._endpoint, text)
        return data

    def read_events(self) -> Iterator[dict[str, Any]]:
        """Yield the objects of server-sent events until [DONE]; RunnerError when it never comes."""
        for line in self._read_lines():
            text = line.decode("utf-8", "replace").strip()
            if text == "data: [DONE]":
                return
            if not text.startswith("data:"):
                continue
            try:
                data = json.loads(text[len("data:") :])
            except ValueError:
                data = None
            if not isinstance(data, dict) or "error" in data:
                raise _explain_nonsense(self._endpoint, text)
            yield data
        raise self._explain_end()

    def _read_lines(self) -> Iterator[bytes]:
        rest = b""
        for piece in self._read_pieces():
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
        yield rest

    def _read_pieces(self) -> Iterator[bytes]:
        """Yield the body as it comes, within the time and BODY_BYTES."""
        count = 0
        try:
            while piece := self._response.read1(1 << 16):
                count += len(piece)
                if count > BODY_BYTES:
                    raise RunnerError(f"{self._endpoint.host}: sends more than {BODY_BYTES} bytes")
                if time.monotonic() - self.started_s > self._timeout_s:
                    raise TimeoutError
                yield piece
        except (OSError, http.client.HTTPException) as error:
            raise self._explain(error) from None
        if self._response.length:  # bytes that were announced and never came
            raise self._explain_end()

    def _explain_end(self) -> RunnerError:
        return RunnerError(
            f"{self._endpoint.host}: the answer of {self._endpoint.model} broke off",
            advice="look into that server's log",
        )

    def _explain(self, error: Exception) -> UnreachableError:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return UnreachableError(
                f"{self._endpoint.host}: no whole answer within {self._timeout_s:g} s",
                advice="give it more time (--timeout), or ask for fewer tokens",
            )
        return UnreachableError(
            f"{self._endpoint.base_url}: cannot be reached: {str(reason) or repr(reason)}",
            advice="is the server up, and is this its address?",
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server."""

    def redirect_request(self, *_: object) -> None:
        """Follow none; it becomes an HTTPError."""


def _make_opener(endpoint: Endpoint) -> urllib.request.OpenerDirector:
    """Proxies of the environment hold for everything but this machine itself."""
    handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
    if endpoint.is_local:
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def _make_request(endpoint: Endpoint, request: dict[str, Any]) -> urllib.request.Request:
    """The POST; a query in the base URL (Azure's api-version) stays at its end."""
    parts = urllib.parse.urlsplit(endpoint.base_url)
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    headers = {"Content-Type": "application/json", "User-Agent": f"phiship/{__version__}"}
    if endpoint.key:
        headers |= _describe_key(endpoint.host, endpoint.key)
    url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
    return urllib.request.Request(url, json.dumps(request).encode(), headers, method="POST")


def _describe_key(host: str, key: str) -> dict[str, str]:
    """The header for a key; Azure's resources take Bearer for tokens of Entra ID only, a JWT."""
    if host.endswith(AZURE_RESOURCES) and not key.startswith("eyJ"):
        return {"api-key": key}
    return {"Authorization": f"Bearer {key}"}


def _describe_request(
    endpoint: Endpoint,
    messages: Sequence[Message],
    max_tokens: int | None,
    temperature: float,
    seed: int | None,
) -> dict[str, Any]:
    asked = {"model": endpoint.model, "messages": [dict(message) for message in messages]}
    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    return {**asked, **sampling, **({} if seed is None else {"seed": seed})}


def _read_usage(data: dict[str, Any]) -> tuple[int | None, int | None]:
    usage = data.get("usage") or {}
    return usage.get("prompt_tokens"), usage.get("completion_tokens")


def _read_wait(error: urllib.error.HTTPError, attempt: int) -> float | None:
    """Seconds to wait before the next try; None when there is to be none."""
    if error.code not in BUSY:
        return None
    text = error.headers.get("Retry-After")
    wait_s = WAIT_S * 2**attempt if text is None else _parse_wait(text)
    return wait_s if wait_s is not None and wait_s <= LONGEST_WAIT_S else None


def _parse_wait(text: str) -> float | None:
    """Retry-After: seconds, or a date (RFC 9110, 10.2.3)."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _explain_status(endpoint: Endpoint, error: urllib.error.HTTPError) -> PhishipError:
    try:
        body = error.read(1 << 16).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        body = ""
    said = _shorten(endpoint, _find_message(body) or str(error.reason))
    what = f"{endpoint.host}: HTTP {error.code} for {endpoint.model}: {said}"
    if error.code in (401, 403):
        advice = "put its key into an environment variable, and name it: --key-env NAME"
        return UnreachableError(what, advice=advice)
    if error.code == 429:
        later = error.headers.get("Retry-After", "later")
        return UnreachableError(what, advice=f"its limit is used up; try again in: {later} s")
    if error.code == 404:
        advice = "check the model's name, and the base URL: most end in /v1"
    elif error.code in range(300, 400):
        advice = f"it points to {_shorten(endpoint, error.headers.get('Location', 'nowhere'))}"
    else:
        advice = "look into that server's log" if error.code >= 500 else ""
    return RunnerError(what, advice=advice)


def _find_message(body: str) -> str:
    """The sentence in an error body: OpenAI's {"error": {"message"}}, or one that is like it."""
    try:
        data = json.loads(body)
    except ValueError:
        return body
    found = data.get("error", data) if isinstance(data, dict) else body
    if isinstance(found, dict):
        found = found.get("message") or found.get("detail") or body
    return str(found)


def _explain_nonsense(endpoint: Endpoint, text: str) -> RunnerError:
    return RunnerError(
        f"{endpoint.host}: what it sent is no answer of a chat: {_shorten(endpoint, text)!r}",
        advice="is this the base URL of an OpenAI-compatible server?",
    )


def _shorten(endpoint: Endpoint, text: str) -> str:
    """A server's words without the key, and without what could steer a terminal."""
    if endpoint.key:
        text = text.replace(endpoint.key, "***")
    clean = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return clean if len(clean) <= SHOWN_CHARACTERS else clean[:SHOWN_CHARACTERS] + "..."
