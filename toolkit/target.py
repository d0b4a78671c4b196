"""A target: a kind of device, without address, user or key."""

from typing import Literal

import msgspec

from toolkit.yamlfile import ByteSize


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a kind of device offers; `name` is the file's own name, never written in it.

    `runs` names what it can run, best first, as format/provider. `verified` says how and when it
    was tried, or "unverified".
    """

    name: str = ""
    title: str
    system: Literal["linux", "macos", "android", "ios", "windows"]
    arch: Literal["aarch64", "x86_64", "any"]
    memory: ByteSize
    reserved_memory: ByteSize
    disk: ByteSize
    runs: tuple[str, ...]
    push: Literal["ssh", "bundle"]
    verified: str
    notes: str = ""

    @property
    def usable_memory_bytes(self) -> int:
        """Memory left for a model beside the system and its services."""
        return self.memory - self.reserved_memory
