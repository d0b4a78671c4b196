"""Ollama's API as docs/api.md and server/routes.go of ollama/ollama describe it, kept strictly.

Not Ollama: a server that takes exactly the requests of that contract, checks digests against bytes,
answers in its shapes (NDJSON, errors before and inside a stream), and answers chats with the
uploaded weights in llama.cpp, through the template and parameters that it was given. Whatever the
contract does not know is refused and noted in `violations`.
"""

import functools
import hashlib
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.exports.go_template import render
from toolkit.runner.engines import llama_cpp
from toolkit.runner.settings import Settings

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,79})?")
FIELDS: dict[str, dict[str, type]] = {
    "/api/create": {
        "model": str, "files": dict, "template": str, "parameters": dict, "stream": bool,
    },
    "/api/chat": {"model": str, "messages": list, "stream": bool, "options": dict},
    "/api/copy": {"source": str, "destination": str},
    "/api/delete": {"model": str},
}  # fmt: skip
PARAMETERS = {"stop": list, "num_ctx": int}
OPTIONS = {"temperature", "seed", "repeat_penalty", "num_predict"}
CHUNK_BYTES = 1 << 16


@dataclass
class Faults:
    """What goes wrong: each is a switch of the server's."""

    version: str = "0.12.6"
    disk_bytes: int | None = None  # an upload larger than this ends as on a full disk
    drop_upload: bool = False  # the connection breaks in the middle of it
    create_error: str = ""
    chat_error: str = ""  # inside the stream
    is_cut: bool = False  # chats end without their last line
    spoil: Callable[[str, str], str] = lambda tag, text: text  # of an answer
    refuse_copies_from: str = ""


@dataclass
class Made:
    """A model: what /api/create was told."""

    files: dict[str, str]
    template: str
    parameters: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of the manifest, in Ollama's spelling: without the algorithm."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()


@dataclass
class State:
    """Blobs on disk, names of models, and what was asked."""

    folder: Path
    faults: Faults = field(default_factory=Faults)
    tags: dict[str, Made] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    largest_upload_chunk: int = 0
    loaded: dict[str, Any] = field(default_factory=dict)

    def blob(self, digest: str) -> Path:
        """Where a blob lies, or would."""
        return self.folder / digest.replace(":", "-")

    def drop_unused(self) -> None:
        """Blobs go with the last name that needs them."""
        used = {digest for made in self.tags.values() for digest in made.files.values()}
        for path in self.folder.glob("sha256-*"):
            if path.name.replace("-", ":") not in used:
                path.unlink()

    def generate(self, made: Made, messages: list[dict[str, str]], count: int) -> Iterator[str]:
        """Texts of the answer, up to a stop; greedily."""
        [digest] = made.files.values()
        if digest not in self.loaded:
            home = self.folder / f"run-{digest[7:19]}"
            home.mkdir(exist_ok=True)
            shutil.copyfile(self.blob(digest), home / "model.gguf")
            settings = Settings(context_tokens=made.parameters["num_ctx"])
            self.loaded[digest] = llama_cpp.load(home, "model.gguf", "cpu", settings)
        model = self.loaded[digest]
        said = ""
        for _, text in model.generate(model.encode(render(made.template, messages)), count):
            said += text
            if any(stop in said for stop in made.parameters["stop"]):
                return
            yield text


class Handler(BaseHTTPRequestHandler):
    """One request; `state` is the server's."""

    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._note()
        digest = self.path.removeprefix("/api/blobs/")
        if not DIGEST.fullmatch(digest):
            return self._violate(f"HEAD {self.path}")
        self._answer(200 if self.state.blob(digest).exists() else 404, None)
        return None

    def do_GET(self) -> None:
        self._note()
        if self.path == "/api/version":
            return self._answer(200, {"version": self.state.faults.version})
        if self.path == "/api/tags":
            models = [
                {"name": tag, "model": tag, "digest": made.digest, "size": 1, "details": {}}
                for tag, made in self.state.tags.items()
            ]
            return self._answer(200, {"models": models})
        if self.path == "/api/ps":
            models = [
                {"name": tag, "model": tag, "size": 3_000_000, "size_vram": 0}
                for tag, made in self.state.tags.items()
                if set(made.files.values()) & set(self.state.loaded)
            ]
            return self._answer(200, {"models": models})
        return self._violate(f"GET {self.path}")

    def do_DELETE(self) -> None:
        self._note()
        request = self._read_request()
        if request is None:
            return None
        if request["model"] not in self.state.tags:
            return self._answer(404, {"error": f"model '{request['model']}' not found"})
        del self.state.tags[request["model"]]
        self.state.drop_unused()
        self._answer(200, None)
        return None

    def do_POST(self) -> None:
        self._note()
        if self.path.startswith("/api/blobs/"):
            return self._take_blob(self.path.removeprefix("/api/blobs/"))
        request = self._read_request()
        if request is None:
            return None
        if self.path == "/api/create":
            return self._create(request)
        if self.path == "/api/copy":
            return self._copy(request)
        return self._chat(request)

    def _note(self) -> None:
        self.state.requests.append(f"{self.command} {self.path[:80]}")

    def _take_blob(self, digest: str) -> None:
        if not DIGEST.fullmatch(digest) or "Content-Length" not in self.headers:
            return self._violate(f"POST {self.path}: {dict(self.headers)}")
        faults, left = self.state.faults, int(self.headers["Content-Length"])
        hashed, path = hashlib.sha256(), self.state.folder / f"upload-{threading.get_ident()}"
        written = 0
        try:
            with path.open("wb") as stream:
                while left and (piece := self.rfile.read(min(left, CHUNK_BYTES))):
                    if faults.drop_upload and written:
                        return self._hang_up()
                    if faults.disk_bytes is not None and written + len(piece) > faults.disk_bytes:
                        error = f"write {path}: no space left on device"
                        self._answer(500, {"error": error}, is_last=True)
                        return self._hang_up()
                    hashed.update(piece)
                    stream.write(piece)
                    written, left = written + len(piece), left - len(piece)
            if left:
                return self._hang_up()
            if f"sha256:{hashed.hexdigest()}" != digest:
                found = f"sha256:{hashed.hexdigest()}"
                error = f'digest mismatch, expected "{digest}", got "{found}"'
                return self._answer(400, {"error": error})
            path.rename(self.state.blob(digest))
            return self._answer(201, None)
        finally:
            path.unlink(missing_ok=True)

    def _hang_up(self) -> None:
        self.close_connection = True

    def _create(self, request: dict[str, Any]) -> None:
        wrong = [k for k, v in request["parameters"].items() if type(v) is not PARAMETERS.get(k)]
        if wrong or not NAME.fullmatch(request["model"]) or len(request["files"]) != 1:
            return self._violate(f"create {request}")
        [(name, digest)] = request["files"].items()
        if not name.endswith(".gguf") or "/" in name or not DIGEST.fullmatch(digest):
            return self._violate(f"create {request['files']}")
        if not self.state.blob(digest).exists():
            return self._violate(f"create from a blob that was not sent: {digest}")
        if self.state.blob(digest).read_bytes()[:4] != b"GGUF":
            return self._answer(400, {"error": "supplied file was not in GGUF format"})
        render(request["template"], [{"role": "user", "content": ""}])
        self._begin_stream()
        self._tell({"status": "parsing GGUF"})
        if self.state.faults.create_error:
            self._tell({"error": self.state.faults.create_error})
            return self._end_stream()
        self._tell({"status": f"using existing layer {digest}"})
        self._tell({"status": "writing manifest"})
        made = Made(request["files"], request["template"], request["parameters"])
        self.state.tags[_full(request["model"])] = made
        self._tell({"status": "success"})
        return self._end_stream()

    def _copy(self, request: dict[str, Any]) -> None:
        source, destination = request["source"], request["destination"]
        if not NAME.fullmatch(source) or not NAME.fullmatch(destination):
            return self._violate(f"copy {request}")
        fault = self.state.faults.refuse_copies_from
        if source not in self.state.tags or (fault and source.endswith(fault)):
            return self._answer(404, {"error": f'model "{source}" not found'})
        self.state.tags[_full(destination)] = self.state.tags[source]
        return self._answer(200, None)

    def _chat(self, request: dict[str, Any]) -> None:
        roles = [set(message) == {"role", "content"} for message in request["messages"]]
        if not roles or not all(roles) or not set(request["options"]) <= OPTIONS:
            return self._violate(f"chat {request}")
        made = self.state.tags.get(request["model"])
        if made is None:
            return self._answer(404, {"error": f"model '{request['model']}' not found"})
        faults = self.state.faults
        count = request["options"]["num_predict"]
        texts = list(self.state.generate(made, request["messages"], count))
        self._begin_stream()
        for text in faults.spoil(request["model"], "".join(texts)).split(" "):
            self._tell(self._say(request["model"], f"{text} ", done=False))
        if faults.chat_error:
            self._tell({"error": faults.chat_error})
        elif not faults.is_cut:
            last = self._say(request["model"], "", done=True)
            durations = {
                "total_duration": 3_000_000, "load_duration": 1_000_000,
                "prompt_eval_duration": 1_000_000, "eval_duration": 1_000_000,
            }  # fmt: skip
            counts = {"prompt_eval_count": 9, "eval_count": len(texts), "done_reason": "stop"}
            self._tell(last | durations | counts)
        self._end_stream()
        return None

    def _say(self, model: str, text: str, *, done: bool) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {
            "model": model, "created_at": "2026-11-21T14:00:00Z", "message": message, "done": done,
        }  # fmt: skip

    def _read_request(self) -> dict[str, Any] | None:
        """The body when it is what the contract says, field by field; else it is refused."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        known = FIELDS.get(self.path)
        try:
            request = json.loads(body)
        except ValueError:
            request = None
        if known is None or not isinstance(request, dict) or set(request) != set(known):
            self._violate(f"{self.command} {self.path}: {body!r}")
            return None
        for name, kind in known.items():
            if not isinstance(request[name], kind):
                self._violate(f"{self.path}: {name}: {request[name]!r}")
                return None
        return request

    def _violate(self, what: str) -> None:
        self.state.violations.append(what)
        self._answer(400, {"error": f"not in the contract: {what}"}, is_last=True)

    def _answer(self, status: int, content: object, *, is_last: bool = False) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if is_last:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _tell(self, content: object) -> None:
        line = json.dumps(content).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

    def _end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")


def _full(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


class _Server(ThreadingHTTPServer):
    """Quiet about clients that hang up."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class OllamaServer:
    """The server on a port of loopback, until `stop`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.state = State(folder)
        handler = type("BoundHandler", (Handler,), {"state": self.state})
        self._server = _Server(("127.0.0.1", 0), handler)
        serve = functools.partial(self._server.serve_forever, poll_interval=0.02)
        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        """End the server and free its models."""
        self._server.shutdown()
        self._server.server_close()
        for model in self.state.loaded.values():
            model.close()
