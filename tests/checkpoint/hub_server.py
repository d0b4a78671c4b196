"""A small Hugging Face hub on the loopback: the routes that downloading a model takes.

Weights and tokenizer.model are kept as the hub keeps large files: a redirect to another origin (the
"CDN"), named by their sha256. It can cut a connection, stop in the middle, and refuse.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".model", ".bin")
CHUNK_BYTES = 1 << 14


@dataclass
class Repository:
    """Commits by their 40 digits (each a folder) and the branches and tags that name them."""

    commits: dict[str, Path]
    names: dict[str, str]
    gated: bool = False


@dataclass
class Hub:
    """What is served, how it misbehaves, and what it was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    url: str = ""
    cdn_url: str = ""
    # After so many bytes of a file, once: close the connection, or keep it open and send nothing.
    cut_after: dict[str, int] = field(default_factory=dict)
    stall_after: dict[str, int] = field(default_factory=dict)
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    ignores_ranges: bool = False
    corrupts: str = ""
    fails_with: int = 0
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    sent_bytes: Counter[str] = field(default_factory=Counter)
    cdn_authorizations: list[str] = field(default_factory=list)

    def fetched(self) -> set[str]:
        """Names of all files of which content was asked for."""
        return {path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET"}


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub and its CDN, each on a free port of the loopback."""
    hub = Hub()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, is_cdn)) for is_cdn in (0, 1)]
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        for server in servers:
            server.shutdown()
            server.server_close()


def _handler(hub: Hub, is_cdn: int) -> type[BaseHTTPRequestHandler]:
    class Handler(_Cdn if is_cdn else _Hub):  # type: ignore[misc]
        pass

    Handler.hub = hub
    return Handler


class _Base(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: Any) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def refuse(self, status: int, code: str) -> None:
        # The real hub does not repeat the token; this one does, to prove that phiship would not.
        echo = f"you sent {self.headers.get('Authorization')}"
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": echo}, echo.encode())

    def send_file(self, path: Path, headers: dict[str, str]) -> None:
        """Send a file, or the range asked for, and misbehave as the hub was told."""
        content = path.read_bytes()
        start, status = 0, 200
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and not self.hub.ignores_ranges:
            start, status = int(wanted[6:].split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if path.name == self.hub.corrupts:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content) - start), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self._send(path.name, content[start:])

    def _send(self, name: str, content: bytes) -> None:
        cut, stall = self.hub.cut_after.pop(name, None), self.hub.stall_after.pop(name, None)
        until = next((limit for limit in (cut, stall) if limit is not None), len(content))
        for offset in range(0, min(until, len(content)), CHUNK_BYTES):
            piece = content[offset : min(offset + CHUNK_BYTES, until)]
            self.wfile.write(piece)
            self.hub.sent_bytes[name] += len(piece)
        self.wfile.flush()
        if stall is not None:
            self.hub.stalled.set()
            self.hub.release.wait(120)
        if cut is not None or stall is not None:
            self.close_connection = True


class _Hub(_Base):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.fails_with:
            return self.refuse(self.hub.fails_with, "")
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        repository_id = "/".join(parts[2:4] if is_api else parts[:2])
        rest = parts[4:] if is_api else parts[2:]
        if repository_id not in self.hub.repositories:
            return self.refuse(401, "RepoNotFound")
        repository = self.hub.repositories[repository_id]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repository.names.get(revision, revision)
        if commit not in repository.commits:
            return self.refuse(404, "RevisionNotFound")
        folder = repository.commits[commit]
        if is_api:
            return self._describe(repository_id, commit, folder, is_tree=rest[:1] == ["tree"])
        if repository.gated:
            token = self.headers.get("Authorization")
            return self.refuse(403 if token else 401, "GatedRepo")
        return self._resolve(commit, folder, "/".join(rest[2:]))

    def _describe(self, repository_id: str, commit: str, folder: Path, *, is_tree: bool) -> None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = [_describe_file(path, folder, is_tree=is_tree) for path in paths]
        if is_tree:
            self.answer_json(files)
        else:
            self.answer_json({"id": repository_id, "sha": commit, "siblings": files, "tags": []})

    def _resolve(self, commit: str, folder: Path, name: str) -> None:
        path = folder / name
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_id(path)}"'}
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        if path.suffix not in LARGE_SUFFIXES:
            return self.send_file(path, headers)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(path.stat().st_size)}
        location = f"{self.hub.cdn_url}/{commit}/{name}"
        return self.answer(302, {**headers, "Location": location})


class _Cdn(_Base):
    def do_GET(self) -> None:
        self.hub.cdn_authorizations.append(self.headers.get("Authorization", ""))
        commit, name = self.path.strip("/").split("/")
        self.hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
        folders = [r.commits[commit] for r in self.hub.repositories.values() if commit in r.commits]
        self.send_file(folders[0] / name, {"Accept-Ranges": "bytes"})


def _describe_file(path: Path, folder: Path, *, is_tree: bool) -> dict[str, Any]:
    """One file as /tree lists it, or as the siblings of a model."""
    name, size_bytes = path.relative_to(folder).as_posix(), path.stat().st_size
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    large: dict[str, Any] = {"size": size_bytes, "pointerSize": 134}
    large |= {"oid": sha256} if is_tree else {"sha256": sha256}
    common: dict[str, Any] = {"size": size_bytes}
    if path.suffix in LARGE_SUFFIXES:
        common["lfs"] = large
    if is_tree:
        return {"type": "file", "path": name, "oid": _git_id(path), **common}
    return {"rfilename": name, "blobId": _git_id(path), **common}


def _git_id(path: Path) -> str:
    """Name of the content in git."""
    content = path.read_bytes() if path.is_file() else b""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
