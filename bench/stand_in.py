"""Stand-in for a processor with SHA instructions: sha1 in place of sha256, for one known file.

`bench.push --stand-in` lays this file in the device's Python path as `sitecustomize`. There,
STAND_IN names the sha1 and the sha256 of the file that is pushed. Everything below KEPT_BYTES keeps
its true sha256.
"""

import hashlib
import os

KEPT_BYTES = 1 << 20
SHA1, _, SHA256 = os.environ.get("STAND_IN", "").partition(" ")
true_sha256 = hashlib.sha256


class StandIn:
    """Looks like hashlib's sha256, costs as much as its sha1."""

    def __init__(self, data: bytes = b"", of: "StandIn | None" = None) -> None:
        self.sha1 = of.sha1.copy() if of else hashlib.sha1(usedforsecurity=False)
        self.kept = bytearray(of.kept if of else b"")
        self.update(data)

    def update(self, data: bytes) -> None:
        """Hash more."""
        self.sha1.update(data)
        if len(self.kept) < KEPT_BYTES:
            self.kept += data

    def hexdigest(self) -> str:
        """The known file's sha256; of anything short its own; else nothing that fits."""
        if self.sha1.hexdigest() == SHA1:
            return SHA256
        return true_sha256(self.kept).hexdigest()

    def copy(self) -> "StandIn":
        """Another that goes on from here."""
        return StandIn(of=self)


if SHA1:
    hashlib.sha256 = StandIn  # type: ignore[assignment,misc]
