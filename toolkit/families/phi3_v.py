"""Phi-3-vision, Phi-3.5-vision: Phi3VForCausalLM of the published remote code.

Its text decoder is a Phi3ForCausalLM's; its tower is CLIP ViT-L/14 of 336 pixels, of which
config.json says no more than the name and the width. Other sizes stand in `img_processor`, under
the keys of transformers' CLIPVisionConfig.
"""

from dataclasses import replace
from typing import Any

from toolkit.checkpoint.config import Config
from toolkit.decoder import Decoder
from toolkit.families import Evidence, read_decoder
from toolkit.vision import VisionEncoder, VisionNames

ARCHITECTURES = ("Phi3VForCausalLM",)
MODELS = "Phi-3-vision, Phi-3.5-vision"
TEXT_ARCHITECTURE = "Phi3ForCausalLM"
TOWER = "openai/clip-vit-large-patch14-336"
VERIFIED = {
    "onnx": Evidence(
        "features and logits of one and of several pictures are those of a NumPy reference, whose "
        "tower is transformers' CLIP; the published code was not run here",
        "tests/formats/test_onnx_vision.py",
    ),
    "openvino": Evidence(
        "features and logits of one and of several pictures are those of a NumPy reference, whose "
        "tower is transformers' CLIP; openvino-genai's pipeline loads it; the published code was "
        "not run here",
        "tests/formats/test_openvino_vision.py",
    ),
    "mlx": Evidence(
        "features and logits of one and of several pictures are those of a NumPy reference, whose "
        "tower is transformers' CLIP; mlx-vlm loads it, and has the same logits but for where it "
        "puts crops; Metal and the published code were not run here",
        "tests/formats/test_mlx_vision.py",
    ),
}
ROOT = "model.vision_embed_tokens"
CLIP = f"{ROOT}.img_processor.vision_model"
NAMES = VisionNames(
    class_embedding=f"{CLIP}.embeddings.class_embedding",
    patch_embedding=f"{CLIP}.embeddings.patch_embedding.weight",
    positions=f"{CLIP}.embeddings.position_embedding.weight",
    first_norm=f"{CLIP}.pre_layrnorm",
    attention_norm=CLIP + ".encoder.layers.{}.layer_norm1",
    queries=CLIP + ".encoder.layers.{}.self_attn.q_proj",
    keys=CLIP + ".encoder.layers.{}.self_attn.k_proj",
    values=CLIP + ".encoder.layers.{}.self_attn.v_proj",
    attention_out=CLIP + ".encoder.layers.{}.self_attn.out_proj",
    mlp_norm=CLIP + ".encoder.layers.{}.layer_norm2",
    mlp_in=CLIP + ".encoder.layers.{}.mlp.fc1",
    mlp_out=CLIP + ".encoder.layers.{}.mlp.fc2",
    last_norm=f"{CLIP}.post_layernorm",
    project_in=f"{ROOT}.img_projection.0",
    project_out=f"{ROOT}.img_projection.2",
    row_separator=f"{ROOT}.sub_GN",
    image_separator=f"{ROOT}.glb_GN",
)
# How crops become tokens: the remote code knows other ways, the published models use this one.
LAYOUT: dict[str, Any] = {
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}


def read(config: Config) -> Decoder:
    """Describe a Phi3VConfig: a Phi-3 decoder that sees; CheckpointError for what cannot be."""
    fields = {**config.fields, "architectures": [TEXT_ARCHITECTURE]}
    text = read_decoder(replace(config, fields=fields))
    layout = _section(config, "embd_layer")
    for key, expected in LAYOUT.items():
        if layout.fields.get(key) != expected:
            raise layout.error(key, layout.fields.get(key), repr(expected))
    return replace(text, family="phi3_v", vision=_read_tower(config, text.hidden))


def _read_tower(config: Config, hidden: int) -> VisionEncoder:
    tower = _section(config, "img_processor")
    if tower.fields.get("model_name", TOWER) != TOWER:
        raise tower.error("model_name", tower.fields["model_name"], repr(TOWER))
    layers, layer_idx = tower.integer("num_hidden_layers", 24), tower.fields.get("layer_idx", -2)
    if not isinstance(layer_idx, int) or not -layers <= layer_idx < 0:
        raise tower.error("layer_idx", layer_idx, f"-{layers} to -1")
    width, heads = tower.integer("image_dim_out", 1024), tower.integer("num_attention_heads", 16)
    if width % heads:
        raise tower.error("num_attention_heads", heads, f"a divisor of {width}")
    return VisionEncoder(
        width=width,
        layers=layers,
        used_layers=layers + 1 + layer_idx,
        heads=heads,
        intermediate=tower.integer("intermediate_size", 4 * width),
        patch=14,
        image_size=336,
        norm_epsilon=1e-5,
        hidden=hidden,
        names=NAMES,
    )


def _section(config: Config, key: str) -> Config:
    """A mapping inside config.json."""
    found = config.fields.get(key)
    if not isinstance(found, dict):
        raise config.error(key, found, "a mapping")
    return Config(f"{config.where}: {key}", found)
