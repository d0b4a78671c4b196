"""A recipe: what to build. Each format adds its own fields in formats/<name>/recipe.py."""

from typing import Any

import msgspec

from toolkit.artifact import Limits, Smoke


class Recipe(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="format"
):
    """What every recipe has; `name` is the file's own name, never written in it."""

    name: str = ""
    model: str
    title: str
    context_length: int | None = None
    check: Limits = Limits()
    smoke: Smoke | None = None

    @property
    def format(self) -> str:
        """Name of the output format."""
        return str(self.__struct_config__.tag)

    def settings(self) -> dict[str, Any]:
        """The fields that change the artifact's bytes, defaults filled in."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return {k: v for k, v in fields.items() if k not in ("name", "title", "check", "smoke")}
