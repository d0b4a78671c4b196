"""Ollama's HTTP API, as far as installing a model takes it (docs/api.md of ollama/ollama)."""

import http.client
import json
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from toolkit.artifact import Smoke
from toolkit.device import read_version
from toolkit.errors import PhishipError, PreflightError, RunnerError, UnreachableError
from toolkit.progress import Advance
from toolkit.smoke import ANSWER_TIMEOUT_S, Answer, quote

OLDEST = (0, 5, 5)  # the first whose /api/create takes `files`
FROM_SOURCE = (0, 0, 0)  # what a build without a version says
VERSION_PATH = "/api/version"
PIECE_BYTES = 1 << 20
TIMEOUT_S = 30
# Ollama hashes the upload and reads the file again before it answers.
SLOW_TIMEOUT_S = 1800
LINE_BYTES = 1 << 22
FULL_DISK = re.compile(r"no space left|not enough space|disk quota exceeded", re.IGNORECASE)


@dataclass(frozen=True)
class Ollama:
    """The Ollama of a device, reached at `base_url` (http://127.0.0.1:PORT through a tunnel).

    `address` is where it is in people's eyes.
    """

    device: str
    base_url: str
    address: str

    def read_version(self) -> str:
        """Its version; PreflightError when it is too old, UnreachableError when nobody answers."""
        found = self._ask("GET", VERSION_PATH, "say its version").get("version")
        if not isinstance(found, str):
            raise UnreachableError(
                f"{self.device}: what answers at {self.address} is not Ollama",
                advice="give the address of Ollama's API; its own port is 11434",
            )
        version = read_version(found.removeprefix("v"))
        if version < OLDEST and version != FROM_SOURCE:
            oldest = ".".join(map(str, OLDEST))
            raise PreflightError(
                f"{self.device}: Ollama {found} cannot create models from files; "
                f"allowed {oldest} or newer",
                advice="update Ollama on the device",
            )
        return found

    def list_tags(self) -> dict[str, str]:
        """Every model there as NAME:TAG, with its digest."""
        models = self._ask("GET", "/api/tags", "list its models").get("models") or []
        return {str(model["name"]): str(model["digest"]) for model in models}

    def has_blob(self, sha256: str) -> bool:
        """Whether a file of this content is there."""
        path = f"/api/blobs/sha256:{sha256}"
        with self._exchange("HEAD", path) as response:
            if response.status == HTTPStatus.NOT_FOUND:
                return False
            self._require_ok(response, "look for the weights")
        return True

    def send_blob(self, path: Path, sha256: str, advance: Advance) -> None:
        """Upload a file in pieces; Ollama compares the digest, and keeps nothing of a broken one.

        PreflightError when the device's disk is full.
        """
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(path.stat().st_size),
        }
        with self._exchange(
            "POST", f"/api/blobs/sha256:{sha256}", _read_pieces(path, advance), headers,
            timeout_s=SLOW_TIMEOUT_S,
        ) as response:  # fmt: skip
            self._require_ok(response, "take the weights")

    def create(
        self, tag: str, files: Mapping[str, str], template: str, parameters: Mapping[str, object]
    ) -> None:
        """Make a model of uploaded files (name -> hex sha256)."""
        request = {
            "model": tag,
            "files": {name: f"sha256:{sha256}" for name, sha256 in files.items()},
            "template": template,
            "parameters": parameters,
            "stream": True,
        }
        told = list(self._stream("/api/create", request, "create the model", SLOW_TIMEOUT_S))
        if not told or told[-1].get("status") != "success":
            raise RunnerError(f"{self.device}: Ollama broke off while it created {tag}")

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name, in place of what had it."""
        request = {"source": source, "destination": destination}
        self._ask("POST", "/api/copy", f"name {destination}", request)

    def delete(self, tag: str) -> None:
        """Take a name away, and what no other name needs; nothing when it is gone already."""
        with self._exchange("DELETE", "/api/delete", _encode({"model": tag})) as response:
            if response.status != HTTPStatus.NOT_FOUND:
                self._require_ok(response, f"delete {tag}")

    def ask(self, tag: str, smoke: Smoke, version: str) -> Answer:
        """Ask a question through /api/chat, greedily; RunnerError when the answer breaks off."""
        request = {
            "model": tag,
            "messages": [{"role": "user", "content": smoke.prompt}],
            "stream": True,
            "options": {
                "temperature": 0,
                "seed": 0,
                "repeat_penalty": 1,
                "num_predict": smoke.max_tokens,
            },
        }
        texts: list[str] = []
        last: dict[str, Any] = {}
        for last in self._stream("/api/chat", request, "answer", ANSWER_TIMEOUT_S):
            texts.append(last.get("message", {}).get("content", ""))
        if not last.get("done"):
            raise RunnerError(f"{self.device}: Ollama's answer broke off: {quote(''.join(texts))}")
        return _describe("".join(texts), last, self._find_loaded(tag), version)

    def _find_loaded(self, tag: str) -> dict[str, Any]:
        """What /api/ps says of a model; empty when it is not loaded any more."""
        models = self._ask("GET", "/api/ps", "list loaded models").get("models") or []
        return next((model for model in models if model.get("name") == tag), {})

    def _ask(
        self, method: str, path: str, what: str, request: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """One request, its answer as an object; empty when it has none."""
        body = None if request is None else _encode(request)
        with self._exchange(method, path, body) as response:
            self._require_ok(response, what)
            content = response.read()
        return self._decode(content) if content.strip() else {}

    def _stream(
        self, path: str, request: Mapping[str, object], what: str, timeout_s: float
    ) -> Iterator[dict[str, Any]]:
        """Objects of an answer in lines; RunnerError for one that says `error`."""
        with self._exchange("POST", path, _encode(request), timeout_s=timeout_s) as response:
            self._require_ok(response, what)
            while line := response.readline(LINE_BYTES):
                if not line.strip():
                    continue
                told = self._decode(line)
                if "error" in told:
                    raise self._refuse(what, str(told["error"]))
                yield told

    @contextmanager
    def _exchange(
        self, method: str, path: str, body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None, *, timeout_s: float = TIMEOUT_S,
    ) -> Iterator[http.client.HTTPResponse]:  # fmt: skip
        """Send a request; UnreachableError when the connection fails, at either end of it."""
        url = urllib.parse.urlsplit(self.base_url)
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=timeout_s)
        try:
            try:
                connection.request(method, url.path.rstrip("/") + path, body, dict(headers or {}))
            except (BrokenPipeError, ConnectionResetError):
                if connection.sock is None:
                    raise
                # It has answered before it read everything, such as for want of disk.
            yield connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self._explain(error, path) from error
        finally:
            connection.close()

    def _explain(self, error: Exception, path: str) -> UnreachableError:
        reason = str(error) or type(error).__name__
        # A tunnel takes every connection, and hangs up when nothing listens at its other end.
        if isinstance(error, ConnectionError) and path == VERSION_PATH:
            return UnreachableError(
                f"{self.device}: Ollama is not running: nothing answers at {self.address}",
                advice="start it on the device: ollama serve, or systemctl start ollama",
            )
        if isinstance(error, TimeoutError):
            reason = "it took too long to answer"
        return UnreachableError(
            f"{self.device}: the connection to Ollama at {self.address} broke: {reason}",
            advice="run the command again; nothing half-installed is in use",
        )

    def _require_ok(self, response: http.client.HTTPResponse, what: str) -> None:
        if response.status in (HTTPStatus.OK, HTTPStatus.CREATED):
            return
        content = response.read(LINE_BYTES)
        try:
            reason = str(json.loads(content)["error"])
        except (ValueError, KeyError, TypeError):
            reason = f"HTTP {response.status}"
        raise self._refuse(what, reason)

    def _refuse(self, what: str, reason: str) -> PhishipError:
        if FULL_DISK.search(reason):
            return PreflightError(
                f"{self.device}: the disk that holds Ollama's models is full: {quote(reason)}",
                advice="free space there (ollama list, ollama rm NAME), or set OLLAMA_MODELS",
            )
        return RunnerError(
            f"{self.device}: Ollama did not {what}: {quote(reason)}",
            advice="its log says more: journalctl -u ollama, or ~/.ollama/logs/server.log",
        )

    def _decode(self, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
            if isinstance(found, dict):
                return found
        except ValueError:
            pass
        raise UnreachableError(
            f"{self.device}: what answers at {self.address} is not Ollama, or its answer is cut "
            f"short: {quote(content[:80].decode('utf-8', 'replace'))}",
            advice="give the address of Ollama's API; its own port is 11434",
        )


def _encode(request: Mapping[str, object]) -> bytes:
    return json.dumps(request).encode()


def _read_pieces(path: Path, advance: Advance) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            yield piece
            advance(len(piece))


def _describe(
    text: str, last: Mapping[str, Any], loaded: Mapping[str, Any], version: str
) -> Answer:
    """An answer with Ollama's own measures, which are in nanoseconds."""

    def seconds(*names: str) -> float:
        return sum(int(last.get(name) or 0) for name in names) / 1e9

    new_tokens, answer_s = int(last.get("eval_count") or 0), seconds("eval_duration")
    return Answer(
        text=text,
        prompt_tokens=int(last.get("prompt_eval_count") or 0),
        new_tokens=new_tokens,
        tokens_per_second=new_tokens / answer_s if answer_s else 0.0,
        first_token_seconds=seconds("load_duration", "prompt_eval_duration"),
        load_seconds=seconds("load_duration"),
        peak_memory_bytes=int(loaded.get("size") or 0),
        provider="gpu" if loaded.get("size_vram") else "cpu",
        engine=f"Ollama {version}",
        stop_reason=str(last.get("done_reason", "")),
        token_ids=(),
    )
