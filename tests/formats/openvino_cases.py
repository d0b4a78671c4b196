"""Schemes of OpenVINO artifacts and the artifacts of small checkpoints, each written once."""

from functools import cache
from pathlib import Path
from typing import Any

from tests.checkpoints import write_random_checkpoint
from tests.formats.writing import write_artifact
from toolkit.checkpoint import Checkpoint
from toolkit.formats.openvino.recipe import OpenvinoQuantization, OpenvinoRecipe

EVERYWHERE = {"embedding": "int4", "head": "int4"}
# As tests/golden/make_openvino.py asks the vendor for them.
SCHEMES: dict[str, dict[str, Any]] = {
    "int4": {"precision": "int4"},
    "int4-row": {"precision": "int4", "group_size": -1},
    "int4-everywhere": {"precision": "int4", "group_size": 32, **EVERYWHERE},
    "int4-asym": {"precision": "int4", "symmetric": False, "group_size": 64},
    "int4-asym-row": {"precision": "int4", "symmetric": False, "group_size": -1},
    "int8": {"precision": "int8"},
    "f16": {"precision": "f16"},
}


def make_recipe(scheme: str, provider: Any = "cpu", **changes: Any) -> OpenvinoRecipe:
    """A recipe of one scheme."""
    quantization = OpenvinoQuantization(**{**SCHEMES[scheme], **changes})
    return OpenvinoRecipe(
        name=scheme, model="x", title="x", provider=provider, quantization=quantization
    )


class Artifacts:
    """Small checkpoints by variant, and artifacts of them by scheme, in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.checkpoint = cache(self._write_checkpoint)
        self.find = cache(self._write)

    def _write_checkpoint(self, variant: str) -> Checkpoint:
        return Checkpoint.open(write_random_checkpoint(self._folder / variant, variant))

    def _write(self, variant: str, scheme: str) -> Path:
        folder = self._folder / f"{variant}-{scheme}"
        folder.mkdir()
        write_artifact(make_recipe(scheme), self.checkpoint(variant), folder)
        return folder
