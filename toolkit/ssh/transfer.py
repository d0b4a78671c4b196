"""Sending blobs: only missing ones, in big pieces, checked on the device while they arrive."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import ArtifactError
from toolkit.ssh.agent import Agent

PIECE_BYTES = 256 << 10
# A device on a slow link (0.1 MB/s) still finishes; a dead one is found by the stall limit.
SLOWEST_BYTES_PER_S = 100_000
SLOWEST_HASH_BYTES_PER_S = 20_000_000
PATIENCE_S = 300


@dataclass(frozen=True)
class Blob:
    """A local file that has to be on the device."""

    name: str
    path: Path
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Missing:
    """What the device lacks; `corrupt` counts those that were there and damaged."""

    blobs: tuple[Blob, ...]
    corrupt: int
    free_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes to send."""
        return sum(blob.size_bytes for blob in self.blobs)


def find_missing(agent: Agent, blobs: Sequence[Blob]) -> Missing:
    """Ask which blobs the device lacks; it hashes those it has again."""
    unique = {blob.sha256: blob for blob in blobs}
    total_bytes = sum(blob.size_bytes for blob in unique.values())
    answer = agent.call(
        "missing",
        _announce(list(unique.values())),
        timeout_s=PATIENCE_S + total_bytes / SLOWEST_HASH_BYTES_PER_S,
    )
    missing = tuple(unique[sha256] for sha256 in answer["missing"])
    return Missing(missing, len(answer["corrupt"]), answer["free_bytes"])


def send_blobs(agent: Agent, blobs: Sequence[Blob], advance: Callable[[int], None]) -> None:
    """Send blobs one after the other in one command; `advance` gets the bytes of each piece.

    ArtifactError when a file is not what its sha256 says: nothing is kept of that file then.
    """
    if not blobs:
        return
    total_bytes = sum(blob.size_bytes for blob in blobs)
    agent.change(
        "receive",
        _read_pieces(blobs, advance),
        timeout_s=PATIENCE_S + total_bytes / SLOWEST_BYTES_PER_S,
    )


def _read_pieces(blobs: Sequence[Blob], advance: Callable[[int], None]) -> Iterator[bytes]:
    """Yield a line that announces the blobs, then the bytes of each."""
    yield _announce(blobs) + b"\n"
    for blob in blobs:
        left_bytes = blob.size_bytes
        with blob.path.open("rb") as stream:
            while piece := stream.read(min(PIECE_BYTES, left_bytes)):
                left_bytes -= len(piece)
                yield piece
                advance(len(piece))
        if left_bytes:
            raise ArtifactError(
                f"{blob.path}: {left_bytes} bytes are missing: it changed while it was sent",
                advice="build the artifact again",
            )


def _announce(blobs: Sequence[Blob]) -> bytes:
    entries = [{"sha256": blob.sha256, "size_bytes": blob.size_bytes} for blob in blobs]
    return json.dumps({"blobs": entries}).encode()
