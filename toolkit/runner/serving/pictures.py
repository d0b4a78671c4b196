"""Pictures in a request: bytes in a data: URL, or files of a folder that the server may read.

Nothing is ever fetched from the network: a server that opens any address for its clients opens
those that they cannot reach themselves.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import urllib.parse
from base64 import b64decode
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..images import MOST_BYTES, MOST_PICTURES
from ..pictures import PICTURE
from .refusal import Refusal, refuse

BODY_BYTES = 32 << 20  # of a request to a model that reads pictures
DATA_URL = re.compile(r"data:image/[\w.+-]{1,60};base64,")
DETAILS = ("auto", "low", "high")  # crops are the model's own, whatever is asked


@dataclass(frozen=True)
class FolderFile:
    """A file of a folder, both without links; whether it is one shows when it is opened.

    `where` is the part of the request that names it.
    """

    folder: Path
    path: Path
    where: str

    def read(self) -> bytes:
        """Return it, or as much of it as shows that it is too large; Refusal for all else.

        Opened once, and what is open is judged: a name may have become another file's meanwhile.
        """
        try:
            with open(self.path, "rb", opener=_open_at_once) as stream:
                is_file = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
                if is_file and _find_path(stream.fileno()).is_relative_to(self.folder):
                    return stream.read(MOST_BYTES + 1)
        except OSError:
            pass
        raise _refuse_file(self.where)


@dataclass(frozen=True)
class Eyes:
    """What a request may show, and what it did, in order; `folder` None allows no files."""

    folder: Path | None = None
    found: list[bytes | FolderFile] = field(default_factory=list)

    def take(self, part: dict[str, Any], where: str) -> str:
        """Keep the picture of an image_url part; returns the mark that stands for it."""
        value = part.get("image_url")
        url = value.get("url") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(url, str):
            raise refuse(f"{where}.image_url has to be an object with a url", where)
        if unknown := set(value) - {"url", "detail"}:
            raise refuse(f"{where}.image_url has a field {min(unknown)!a:.60}", where)
        if value.get("detail", "auto") not in DETAILS:
            raise refuse(f"{where}.image_url.detail has to be one of {', '.join(DETAILS)}", where)
        if len(self.found) >= MOST_PICTURES:
            raise refuse(f"a request can have {MOST_PICTURES} pictures", where)
        self.found.append(self._read(url, where))
        return f"{PICTURE}\n"

    def _read(self, url: str, where: str) -> bytes | FolderFile:
        if found := DATA_URL.match(url):
            try:
                return b64decode(url[found.end() :], validate=True)
            except ValueError:
                raise refuse(f"{where}: its data: URL is not base64", where) from None
        if url.startswith("file:"):
            return self._find(url, where)
        raise _refuse_url(where, "can only be a data: URL of an image in base64")

    def _find(self, url: str, where: str) -> FolderFile:
        """The file of a URL inside the folder, links followed; Refusal tells nothing of others."""
        if self.folder is None:
            raise _refuse_url(where, "names a file, which this server does not read")
        try:
            parts = urllib.parse.urlsplit(url)
            path, folder = Path(urllib.parse.unquote(parts.path)).resolve(), self.folder.resolve()
            if path.is_relative_to(folder) and parts.netloc in ("", "localhost"):
                return FolderFile(folder, path, where)
        except (OSError, RuntimeError, ValueError):  # no URL, a name with NUL, a loop of links
            pass
        raise _refuse_file(where)


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for who would write into it, if it is a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _find_path(descriptor: int) -> Path:
    """The path, without links, of an open file, wherever it was found."""
    if sys.platform == "darwin":
        import fcntl

        found = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024))
        return Path(os.fsdecode(found.rstrip(b"\0")))
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _refuse_file(where: str) -> Refusal:
    return _refuse_url(where, "names no file of the folder that this server reads")


def _refuse_url(where: str, what: str) -> Refusal:
    message = f"{where}: its url {what}; nothing is fetched from the network"
    return refuse(message, where, "unsupported_content")
