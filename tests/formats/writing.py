"""Writes an artifact's files without gate or seal, for tests that look at the format alone."""

from pathlib import Path

from toolkit import fileio, formats
from toolkit.checkpoint import Checkpoint
from toolkit.families import read_decoder
from toolkit.plan import make_plan
from toolkit.recipe import Recipe
from toolkit.stream import stream


def write_artifact(recipe: Recipe, checkpoint: Checkpoint, folder: Path, workers: int = 1) -> None:
    """Write data file and everything beside it into `folder`."""
    decoder = read_decoder(checkpoint.config)
    plan = make_plan(recipe, decoder, workers=workers)
    module = formats.get(recipe.format)
    header = module.header_bytes(recipe, decoder, checkpoint)
    path = folder / plan.data.name
    fileio.reserve(path, len(header) + plan.data.size_bytes)
    fileio.write_start(path, header)
    stream(checkpoint, plan.data, path, len(header), workers, lambda _: None)
    module.write_rest(folder, recipe, decoder, checkpoint, plan.context_length)
