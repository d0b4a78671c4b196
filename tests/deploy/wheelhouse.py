"""Tiny wheels made by hand, and an index on loopback that serves them and counts its visitors."""

import base64
import ensurepip
import hashlib
import os
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

LOOPBACK = "127.0.0.1"


def make_wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    *,
    tag: str = "py3-none-any",
    needs: Sequence[str] = (),
    python: str = ">=3.8",
    code: str = "",
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a wheel with one package, whose __init__.py is its version and `code`."""
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Python: {python}", *(f"Requires-Dist: {need}" for need in needs)]
    info = f"{name}-{version}.dist-info"
    content = {
        f"{name}/__init__.py": f"__version__ = {version!r}\n{code}".encode(),
        **{f"{name}/{path}": data for path, data in (files or {}).items()},
        f"{info}/METADATA": ("\n".join(metadata) + "\n").encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    }
    record = "".join(f"{path},{_digest(data)},{len(data)}\n" for path, data in content.items())
    content[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in content.items():
            archive.writestr(entry, data)
    return path


def find_pip() -> Path:
    """Return the wheel of pip that comes with Python; skips where there is none."""
    places = [Path(ensurepip.__file__).parent / "_bundled", Path("/usr/share/python-wheels")]
    found = [path for place in places for path in sorted(place.glob("pip-*.whl"))]
    if not found:
        pytest.skip("this Python comes without pip's wheel")
    return found[0]


@dataclass
class Index:
    """A simple index (PEP 503) of the wheels in a folder; `visits` are the paths asked for."""

    folder: Path
    url: str = ""
    visits: list[str] = field(default_factory=list)

    def read(self, path: str) -> bytes | None:
        """Return a page of links or a file; None for what is not there."""
        self.visits.append(path)
        parts = path.strip("/").split("/")
        if parts[0] == "files":
            return (self.folder / parts[-1]).read_bytes()
        wheels = [
            it for it in self.folder.iterdir() if parse_wheel_filename(it.name)[0] == parts[1]
        ]
        return "".join(map(self._link, wheels)).encode() if wheels else None

    def _link(self, wheel: Path) -> str:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            lines = archive.read(name).decode().splitlines()
        (python,) = (
            line.partition(": ")[2] for line in lines if line.startswith("Requires-Python")
        )
        python = python.replace(">", "&gt;").replace("<", "&lt;")
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        href = f"/files/{wheel.name}#sha256={sha256}"
        return f'<a href="{href}" data-requires-python="{python}">{wheel.name}</a><br>\n'


@contextmanager
def serve(folder: Path) -> Iterator[Index]:
    """Serve a folder's wheels on a loopback port."""
    index = Index(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = index.read(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def do_CONNECT(self) -> None:
            index.visits.append(self.path)
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
    index.url = f"http://{LOOPBACK}:{server.server_port}/simple"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_index(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make pip know this index and nothing else, and remember nothing."""
    for name in [name for name in os.environ if name.upper().startswith(("PIP_", "HTTP"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", url)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", LOOPBACK)


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
