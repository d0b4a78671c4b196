"""Small random Phi-3-vision checkpoints with the real names, and pictures drawn by code.

    folder = write_vision_checkpoint(tmp_path / "vision")

The text decoder is that of tests/checkpoints.py with Phi-3-vision's LongRoPE; the tower is CLIP's,
narrow and of three layers, of which two run. Its spreads are chosen so that a picture's tokens
differ from each other and from the text's about as much as embeddings do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import (
    Dtype,
    Weights,
    random_weights,
    variant_config,
    write_random_checkpoint,
    write_safetensors,
)

if TYPE_CHECKING:
    from PIL.Image import Image

ROOT = "model.vision_embed_tokens."
CLIP = ROOT + "img_processor.vision_model."
WIDTH, LAYERS, HEADS, INNER = 64, 3, 2, 128
CLIP_L = {"width": 1024, "heads": 16, "inner": 4096}  # but for its layers
ORIGINAL_CONTEXT, CONTEXT = 4096, 8192
PREPROCESSOR: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Phi3VImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "num_crops": 16,
    "num_img_tokens": 144,
    "processor_class": "Phi3VProcessor",
}


def write_vision_checkpoint(
    folder: Path, *, dtype: Dtype = "bf16", crops: int = 16, seed: int = 0, width: int = WIDTH,
    heads: int = HEADS, inner: int = INNER,
) -> Path:  # fmt: skip
    """Write the checkpoint into `folder` and return `folder`."""
    write_random_checkpoint(folder, "mha", dtype=dtype)
    config = vision_config(dtype, width, heads, inner)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    preprocessor = {**PREPROCESSOR, "num_crops": crops}
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(preprocessor, indent=2), encoding="utf-8")
    weights = random_weights(config, seed) | tower_weights(
        config["hidden_size"], seed, width, inner
    )
    write_safetensors(folder / "model.safetensors", weights, dtype)
    return folder


def vision_config(
    dtype: Dtype = "bf16", width: int = WIDTH, heads: int = HEADS, inner: int = INNER
) -> dict[str, Any]:
    """Return config.json; the keys are those of Phi-3-vision-128k, and the small tower's."""
    pairs = 32
    return {
        **variant_config("mha", dtype),
        "architectures": ["Phi3VForCausalLM"],
        "model_type": "phi3_v",
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "img_processor": {
            "image_dim_out": width,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": 144,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": heads,
            "intermediate_size": inner,
        },
        "max_position_embeddings": CONTEXT,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
        "rope_scaling": {
            "type": "su",
            "short_factor": [round(1 + 0.02 * pair, 4) for pair in range(pairs)],
            "long_factor": [round(1 + 0.9 * pair, 4) for pair in range(pairs)],
        },
        "sliding_window": CONTEXT,
    }


def tower_weights(hidden: int, seed: int = 0, width: int = WIDTH, inner: int = INNER) -> Weights:
    """Return the tower, the separators and the projector as float32."""
    rng = np.random.default_rng(seed + 1)
    weights: Weights = {}

    def noise(name: str, *shape: int, std: float) -> None:
        weights[name] = rng.standard_normal(shape, np.float32) * np.float32(std)

    def linear(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        noise(f"{name}.weight", rows, columns, std=gain / columns**0.5)
        noise(f"{name}.bias", rows, std=0.1)

    def norm(name: str) -> None:
        noise(f"{name}.weight", width, std=0.1)
        weights[f"{name}.weight"] += 1
        noise(f"{name}.bias", width, std=0.1)

    noise(f"{CLIP}embeddings.class_embedding", width, std=1.0)
    noise(f"{CLIP}embeddings.patch_embedding.weight", width, 3, 14, 14, std=588**-0.5)
    noise(f"{CLIP}embeddings.position_embedding.weight", 577, width, std=0.5)
    norm(f"{CLIP}pre_layrnorm")
    for layer in range(LAYERS):
        prefix = f"{CLIP}encoder.layers.{layer}."
        norm(f"{prefix}layer_norm1")
        norm(f"{prefix}layer_norm2")
        for part in ("q", "k", "v"):
            linear(f"{prefix}self_attn.{part}_proj", width, width, gain=1.5)
        linear(f"{prefix}self_attn.out_proj", width, width)
        linear(f"{prefix}mlp.fc1", inner, width, gain=1.5)
        linear(f"{prefix}mlp.fc2", width, inner)
    norm(f"{CLIP}post_layernorm")
    noise(f"{ROOT}sub_GN", 1, 1, 1, 4 * width, std=1.0)
    noise(f"{ROOT}glb_GN", 1, 1, 4 * width, std=1.0)
    linear(f"{ROOT}img_projection.0", hidden, 4 * width, gain=1.5)
    linear(f"{ROOT}img_projection.2", hidden, hidden, gain=0.8)
    return weights


def draw(width: int, height: int, seed: int = 0) -> Image:
    """A picture with waves, a ramp and discs: no two crops of it are alike."""
    from PIL import Image, ImageDraw  # not where goldens are made with torch

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = 127 + 120 * np.sin(x / 17 + seed), 127 + 120 * np.cos(y / 23)
    channels = [*waves, (x * 3 + y * 2 + seed * 40) % 256]
    pixels: NDArray[np.uint8] = np.stack(channels, -1).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    for _ in range(25):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        right, bottom = left + int(rng.integers(5, 80)), top + int(rng.integers(5, 80))
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        pen.ellipse([left, top, right, bottom], fill=color)
    return picture
