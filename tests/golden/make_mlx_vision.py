"""Writes mlx_vision.npz: what mlx-vlm makes of an artifact that this project writes.

Needs mlx-vlm beside this project's own dependencies. From the repository's root:

    PYTHON_WITH_MLX_VLM -m tests.golden.make_mlx_vision

The versions used are stored in the file. Run it again when tests/vision_checkpoints.py changes.
mlx-vlm loads the folder in its own way, strictly; only the number of its tower's layers, which it
has in its code, is that of the case. It is given our ids and crops, for it prepares others itself.
Of crops side by side mlx-vlm 0.7.10 makes other lines than the published code (see the test).
"""

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm import utils
from mlx_vlm.models.phi3_v.vision import VisionModel
from numpy.typing import NDArray

from tests.golden.mlx_vision_cases import GOLDEN, LAYERS_OF_TOWER, digest, select, write_case
from toolkit.runner.images import Pixels


def ask(model: Any, ids: list[int], pixels: Pixels) -> NDArray[np.float32]:
    """mlx-vlm's logits, float32 [len(ids), vocabulary]."""
    found = model(
        mx.array([ids]), pixel_values=mx.array(pixels.values), image_sizes=mx.array(pixels.sizes)
    )
    return np.array(found.logits[0].astype(mx.float32))


def main() -> None:
    mx.set_default_device(mx.cpu)
    VisionModel.CLIP_VIT_LARGE_PATCH14_336_CONFIG.num_hidden_layers = LAYERS_OF_TOWER
    with tempfile.TemporaryDirectory() as scratch:
        artifact, questions = write_case(Path(scratch))
        model = utils.load_model(artifact)
        np.savez_compressed(
            GOLDEN,
            versions=np.array(f"mlx-vlm {version('mlx-vlm')}, mlx {version('mlx')}"),
            digest=np.array(digest(artifact)),
            **{name: select(ask(model, *question)) for name, question in questions.items()},
        )
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes, {np.load(GOLDEN)['versions']}")


if __name__ == "__main__":
    main()
