"""Writes vision.npz: what transformers' CLIPVisionModel and torch's bicubic make of drawn pictures.

Needs torch and transformers, which the project itself never installs. From the repository's root:

    PYTHON_WITH_TORCH -m tests.golden.make_vision

The versions used are stored in the file. Run it again when tests/vision_checkpoints.py changes.
"""

import numpy as np
import torch
import transformers

from tests.golden.vision_cases import GOLDEN, select, tower_input, wide_picture
from tests.vision_checkpoints import CLIP, HEADS, INNER, LAYERS, WIDTH, tower_weights

HIDDEN = 256


def run_clip(crops: torch.Tensor) -> torch.Tensor:
    """Last but one hidden state of transformers' own tower, without the class token, float32."""
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, image_size=336, patch_size=14, hidden_act="quick_gelu",
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.CLIPVisionModel(config)
    weights = {
        name.removeprefix(CLIP): torch.from_numpy(weight)
        for name, weight in tower_weights(HIDDEN).items()
        if name.startswith(CLIP)
    }
    wanted = [name for name in model.state_dict() if not name.endswith("position_ids")]
    prefix = "vision_model." if wanted[0].startswith("vision_model.") else ""
    model.load_state_dict({prefix + name: weight for name, weight in weights.items()})
    with torch.no_grad():
        return model(crops, output_hidden_states=True).hidden_states[-2][:, 1:]


def main() -> None:
    torch.set_num_threads(1)
    features = run_clip(torch.from_numpy(tower_input()))
    picture = torch.from_numpy(wide_picture())[None]
    small = torch.nn.functional.interpolate(picture, size=(336, 336), mode="bicubic")[0]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    np.savez_compressed(
        GOLDEN,
        versions=np.array(versions),
        features=select(features.numpy()),
        small=small.numpy()[:, ::16, ::16],
    )
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
