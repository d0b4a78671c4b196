"""A model of the family: its id, pinned revision and the shape that plans are made from."""

from typing import Any

import msgspec


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A published model; `config` repeats the shape of its config.json for plans without one."""

    name: str = ""
    id: str
    revision: str
    title: str
    config: dict[str, Any]
