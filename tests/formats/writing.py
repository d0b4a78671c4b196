"""Writes an artifact's files without gate or seal, for tests that look at the format alone."""

from pathlib import Path

from toolkit import formats
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.families import read_decoder
from toolkit.plan import make_plan
from toolkit.progress import ignore
from toolkit.recipe import Recipe
from toolkit.stream import open_output, stream


def write_artifact(
    recipe: Recipe, checkpoint: Checkpoint, folder: Path, workers: int = 1,
    decoder: Decoder | None = None,
) -> None:  # fmt: skip
    """Write data file and everything beside it into `folder`; `decoder` instead of its family's."""
    decoder = decoder or read_decoder(checkpoint.config)
    plan = make_plan(recipe, decoder, workers=workers)
    module = formats.get(recipe.format)
    header = module.header_bytes(recipe, decoder, checkpoint)
    stream(checkpoint, [open_output(plan.data, folder, header)], workers, ignore)
    module.write_rest(folder, recipe, decoder, checkpoint, plan.context_length)
