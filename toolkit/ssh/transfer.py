"""Sending blobs: only missing ones, from where they broke off, hashed there while they arrive."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import ArtifactError, UnreachableError
from toolkit.progress import Advance, Bar, ignore
from toolkit.ssh.session import Session

PIECE_BYTES = 256 << 10
HASH_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Blob:
    """A local file that has to be on the device."""

    name: str
    path: Path
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Part:
    """What of a blob has to be sent: all from `from_bytes` on; before that it is there already."""

    blob: Blob
    from_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes to send."""
        return self.blob.size_bytes - self.from_bytes


@dataclass(frozen=True)
class Missing:
    """What the device lacks; `corrupt` counts files that were there and damaged."""

    parts: tuple[Part, ...]
    corrupt: int
    free_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes to send."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def resumed_bytes(self) -> int:
        """Bytes of unfinished files that need not be sent again."""
        return sum(part.from_bytes for part in self.parts)


def find_missing(session: Session, blobs: Sequence[Blob], advance: Advance = ignore) -> Missing:
    """Ask what the device lacks; it hashes what it has again, and tells `advance`."""
    unique = {blob.sha256: blob for blob in blobs}
    wanted = [{"sha256": blob.sha256, "size_bytes": blob.size_bytes} for blob in unique.values()]
    answer = session.call("survey", blobs=wanted, advance=advance)
    parts = tuple(
        Part(unique[entry["sha256"]], find_common(unique[entry["sha256"]], entry["prefixes"]))
        for entry in answer["missing"]
    )
    return Missing(parts, len(answer["corrupt"]), answer["free_bytes"])


def find_common(blob: Blob, prefixes: Sequence[tuple[int, str]]) -> int:
    """Return up to which offset a file that broke off is the beginning of ours.

    prefixes: (offset, hex sha256 of what is there up to it), ascending.
    """
    digest, common = hashlib.sha256(), 0
    with blob.path.open("rb") as stream:
        for offset, sha256 in prefixes:
            for piece in _read(stream, offset - stream.tell(), HASH_PIECE_BYTES):
                digest.update(piece)
            if digest.hexdigest() != sha256:
                break
            common = offset
    return common


def send_parts(
    session: Session, parts: Sequence[Part], bar: Bar, bytes_per_s: int | None = None
) -> None:
    """Send blobs one after the other in one request; `bar` gets their names and bytes.

    What arrives damaged is sent a second time. ArtifactError when a file is no longer what its
    sha256 says, UnreachableError when it arrives damaged again.
    """
    corrupt = _send(session, parts, bar, bytes_per_s)
    whole = [Part(part.blob, 0) for part in parts if part.blob.sha256 in corrupt]
    for part in whole:
        _check_source(part.blob)
    if whole and _send(session, whole, bar, bytes_per_s):
        raise UnreachableError(
            f"{session.device.name}: {whole[0].blob.name} arrived damaged twice",
            advice="check the device's memory and disk",
        )


def _send(session: Session, parts: Sequence[Part], bar: Bar, bytes_per_s: int | None) -> list[str]:
    if not parts:
        return []
    announced: list[dict[str, Any]] = [
        {
            "sha256": part.blob.sha256,
            "size_bytes": part.blob.size_bytes,
            "from_bytes": part.from_bytes,
        }
        for part in parts
    ]
    pieces = _pace(_read_pieces(parts, bar), bytes_per_s)
    corrupt: list[str] = session.call("receive", pieces, blobs=announced)["corrupt"]
    return corrupt


def _pace(pieces: Iterator[bytes], bytes_per_s: int | None) -> Iterator[bytes]:
    """Yield pieces no faster than asked, on average."""
    started_s, sent_bytes = time.monotonic(), 0
    for piece in pieces:
        yield piece
        sent_bytes += len(piece)
        if bytes_per_s:
            time.sleep(max(0.0, started_s + sent_bytes / bytes_per_s - time.monotonic()))


def _read_pieces(parts: Sequence[Part], bar: Bar) -> Iterator[bytes]:
    for number, part in enumerate(parts, 1):
        blob, left_bytes = part.blob, part.size_bytes
        bar.show(f"{blob.name} ({number} of {len(parts)})")
        with blob.path.open("rb") as stream:
            stream.seek(part.from_bytes)
            for piece in _read(stream, left_bytes, PIECE_BYTES):
                left_bytes -= len(piece)
                yield piece
                bar(len(piece))
        if left_bytes:
            raise ArtifactError(
                f"{blob.path}: {left_bytes} bytes are missing: it changed while it was sent",
                advice="build the artifact again",
            )


def _read(stream: Any, size_bytes: int, piece_bytes: int) -> Iterator[bytes]:
    """Yield `size_bytes`, or less when the file ends."""
    while size_bytes and (piece := stream.read(min(piece_bytes, size_bytes))):
        size_bytes -= len(piece)
        yield piece


def _check_source(blob: Blob) -> None:
    found = find_common(blob, [(blob.size_bytes, blob.sha256)])
    if found != blob.size_bytes:
        raise ArtifactError(
            f"{blob.path}: its sha256 is no longer {blob.sha256}: it changed while it was sent",
            advice="build the artifact again",
        )
