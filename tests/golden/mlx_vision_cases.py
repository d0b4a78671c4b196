"""What mlx_vision.npz holds: one artifact's logits about two pictures, as mlx-vlm has them."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.formats.seeing import Source, ask
from tests.formats.writing import write_artifact
from tests.vision_checkpoints import CLIP_L, LAYERS, draw
from toolkit.formats.mlx.recipe import MlxQuantization, MlxRecipe
from toolkit.runner.images import Pixels, prepare

GOLDEN = Path(__file__).with_name("mlx_vision.npz")
LAYERS_OF_TOWER = LAYERS
CROPS = 2  # one above the other, one beside the other
PICTURES = {"tall": (300, 640), "wide": (640, 300)}
# Scales in float32, so that nothing but the order of sums differs.
RECIPE = MlxRecipe(
    name="sees", model="x", title="x", provider="cpu", rope_factors="short", context_length=4096,
    quantization=MlxQuantization(bits=4, vision_bits=8, dtype="fp32"),
)  # fmt: skip


def write_case(folder: Path) -> tuple[Path, dict[str, tuple[list[int], Pixels]]]:
    """An artifact with a tower of CLIP-L's width, in `folder`, and a question a picture."""
    source = Source(folder / "checkpoint", **CLIP_L)
    artifact = folder / "artifact"
    artifact.mkdir()
    write_artifact(RECIPE, source.checkpoint, artifact)
    questions = {}
    for name, (width, height) in PICTURES.items():
        pixels = prepare([draw(width, height, 1)], replace(source.vision, crops=CROPS))
        questions[name] = ask(pixels), pixels
    return artifact, questions


def digest(artifact: Path) -> str:
    """Of the weights and of config.json: what was loaded there is what is loaded here."""
    names = ("model.safetensors", "config.json")
    return hashlib.sha256(b"".join((artifact / name).read_bytes() for name in names)).hexdigest()


def select(logits: NDArray[Any]) -> NDArray[Any]:
    """Every 23rd position and the last ones, every 11th token."""
    return np.concatenate([logits[:-4:23], logits[-4:]])[:, ::11]
