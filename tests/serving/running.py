"""A server as a process of its own, and plain requests to it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 60.0
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Reply:
    """What came back; `events` are those of a stream, without the last, [DONE]."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert list(self.json) == ["error"], self.body
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def text(self) -> str:
        choice = self.json["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])

    @property
    def events(self) -> list[dict[str, Any]]:
        *events, last, rest = self.body.decode().split("\n\n")
        assert (last, rest) == ("data: [DONE]", ""), self.body
        assert all(event.startswith("data: ") for event in events)
        return [json.loads(event[len("data: ") :]) for event in events]

    @property
    def streamed_text(self) -> str:
        choices = [event["choices"][0] for event in self.events if event["choices"]]
        return "".join(
            one["delta"].get("content", "") if "delta" in one else one["text"] for one in choices
        )


class Server:
    """A server that listens."""

    def __init__(self, process: "subprocess.Popen[str]", told: dict[str, Any]) -> None:
        self.process = process
        self.told = told
        self.port: int = told.get("port", 0)
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        connection: http.client.HTTPConnection | None = None,
    ) -> Reply:
        """Make one request; a body that is no bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        link = connection or self.connect()
        try:
            link.request(
                method, path, data, {**(JSON if data is not None else {}), **(headers or {})}
            )
            response = link.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, named, response.read())
        finally:
            if connection is None:
                link.close()

    def chat(self, prompt: str, **fields: Any) -> Reply:
        messages = [{"role": "user", "content": prompt}]
        return self.ask("POST", "/v1/chat/completions", {"messages": messages, **fields})

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)

    def open_socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S)

    def send_raw(self, data: bytes) -> bytes:
        """Send bytes as they are; returns all that comes until the server closes."""
        with self.open_socket() as link:
            link.sendall(data)
            return read_all(link)

    def measure(self, name: str, **labels: str) -> float:
        """Return a value of /metrics, 0 when it is not there yet."""
        texts = [f'{label}="{value}"' for label, value in labels.items()]
        wanted = f"phiship_{name}" + (f"{{{','.join(texts)}}}" if texts else "")
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        values = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return next((float(value) for title, _, value in values if title == wanted), 0.0)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        return code

    def _read_log(self) -> None:
        assert self.process.stderr
        self.log.extend(line.rstrip("\n") for line in self.process.stderr)


def read_all(link: socket.socket) -> bytes:
    """Return what comes until the other side closes, by whatever means."""
    data = b""
    try:
        while piece := link.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


@contextmanager
def serving(artifact: Path, token: str | None = None, **asked: Any) -> Iterator[Server]:
    """Run tests/serving/start.py for the length of the block."""
    command = [sys.executable, "-m", "tests.serving.start", str(artifact), json.dumps(asked)]
    environment = {**os.environ, **({"TEST_TOKEN": token} if token else {})}
    with running(command, environment) as server:
        assert "listening" in server.told, server.told
        yield server


@contextmanager
def running(command: list[str], environment: dict[str, str] | None = None) -> Iterator[Server]:
    """Run a server's command; `told` is the JSON of its first line."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment or dict(os.environ),
    )
    assert process.stdin and process.stdout
    try:
        line = process.stdout.readline()
        yield Server(process, json.loads(line) if line else {})
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
