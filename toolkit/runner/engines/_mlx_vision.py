"""Phi-3-vision in mlx-lm: its phi3 with a tower, of modules that are called as in the checkpoint.

The tower is transformers' CLIPVisionModel, what comes behind it follows image_embedding_phi3_v.py
of the published remote code. It computes in float32, whatever its weights are stored in.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..images import Pixels

# What config.json of the published models leaves to the name of the tower, CLIP ViT-L/14 of 336
# pixels; other sizes stand in img_processor, under the keys of transformers' CLIPVisionConfig.
CLIP_L = {
    "image_dim_out": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "layer_idx": -2,
}  # fmt: skip
PATCH, PATCHES = 14, 24  # pixels of a patch's side, patches on a crop's
AT_ONCE = 4  # crops that the tower looks at together
STEEPNESS = 1.702  # of CLIP's quick GELU


def load_model(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load mlx-lm's model of a folder, and its configuration; with a tower where that has one."""
    from mlx_lm import utils  # type: ignore[import-not-found,import-untyped,unused-ignore]

    if "img_processor" in utils.load_config(folder):
        options["get_model_classes"] = _define_classes
    model, config = utils.load_model(folder, **options)
    return model, config


def load_tokenizer(folder: Path, stops: Any) -> Any:
    """Load mlx-lm's tokenizer of a folder, which ends answers on `stops`.

    transformers reads config.json for it, and does not know phi3_v; what it says of that is noise.
    """
    from mlx_lm import utils

    log = logging.getLogger("transformers")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        return utils.load_tokenizer(folder, eos_token_ids=stops)
    finally:
        log.setLevel(before)


def read_stops(config: Mapping[str, Any]) -> set[int]:
    """Return the ids on which an answer ends, as config.json has them: a list, or one number."""
    stops = config.get("eos_token_id")
    listed = stops if isinstance(stops, list) else [stops]
    return {int(token) for token in listed if token is not None}


def embed(model: Any, ids: Sequence[int], pixels: Pixels, start: int = 0) -> Any:
    """What the first layer sees of ids from `start` on: [n, hidden], as token embeddings are.

    Ids below 0 stand for rows of the pictures, in order; a picture before `start` is not looked at.
    """
    import mlx.core as mx  # type: ignore[import-not-found,unused-ignore]

    rest = list(ids[start:])
    rows = model.model.embed_tokens(mx.array([max(0, token) for token in rest]))
    skipped, seen = sum(token < 0 for token in ids[:start]), []
    for picture, (height, width) in enumerate(pixels.sizes // (PATCH * PATCHES)):
        if skipped < pixels.counts[picture]:
            crops = pixels.values[picture, : 1 + height * width]
            found = _look(model.model.vision_embed_tokens, crops, int(height), int(width))
            seen.append(found[skipped:])
        skipped = max(0, skipped - pixels.counts[picture])
    if seen:
        places = mx.array([place for place, token in enumerate(rest) if token < 0])
        rows[places] = mx.concatenate(seen).astype(rows.dtype)
    return rows


def _define_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """The model and its arguments, as mlx_lm.utils.load_model asks for them."""
    from mlx_lm.models import base, phi3

    class Model(phi3.Model):  # type: ignore[misc,name-defined,unused-ignore]
        """`input_embeddings` [1, n, hidden] stand for the inputs where they are given."""

        def __init__(self, args: Any) -> None:
            super().__init__(args)
            tower = _make_tower({**CLIP_L, **config["img_processor"]}, args.hidden_size)
            self.model.vision_embed_tokens = tower

        def __call__(self, inputs: Any, cache: Any = None, input_embeddings: Any = None) -> Any:
            if input_embeddings is None:
                return super().__call__(inputs, cache)
            states, caches = input_embeddings, cache or [None] * len(self.layers)
            mask = base.create_attention_mask(states, caches[0])
            for layer, one in zip(self.layers, caches, strict=True):
                states = layer(states, mask, one)
            states = self.model.norm(states)
            if self.args.tie_word_embeddings:
                return self.model.embed_tokens.as_linear(states)
            return self.lm_head(states)

    return Model, phi3.ModelArgs


def _make_tower(fields: dict[str, Any], hidden: int) -> Any:
    """Separators, tower and projector, to be filled; `heads` and `used` layers are numbers."""
    import mlx.core as mx
    from mlx import nn  # type: ignore[import-not-found,unused-ignore]

    width, layers = fields["image_dim_out"], fields["num_hidden_layers"]
    inner = fields.get("intermediate_size", 4 * width)
    embeddings = _gather(
        class_embedding=mx.zeros(width),
        patch_embedding=nn.Conv2d(3, width, PATCH, stride=PATCH, bias=False),
        position_embedding=nn.Embedding(PATCHES**2 + 1, width),
    )
    clip = _gather(
        embeddings=embeddings,
        pre_layrnorm=nn.LayerNorm(width),
        encoder=_gather(layers=[_make_layer(width, inner) for _ in range(layers)]),
        post_layernorm=nn.LayerNorm(width),
    )
    return _gather(
        img_processor=_gather(vision_model=clip),
        sub_GN=mx.zeros((1, 1, 1, 4 * width)),
        glb_GN=mx.zeros((1, 1, 4 * width)),
        img_projection=[nn.Linear(4 * width, hidden), nn.GELU(), nn.Linear(hidden, hidden)],
        heads=fields["num_attention_heads"],
        used=layers + 1 + fields["layer_idx"],
    )


def _make_layer(width: int, inner: int) -> Any:
    from mlx import nn

    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    return _gather(
        layer_norm1=nn.LayerNorm(width),
        self_attn=_gather(**{name: nn.Linear(width, width) for name in parts}),
        layer_norm2=nn.LayerNorm(width),
        mlp=_gather(fc1=nn.Linear(width, inner), fc2=nn.Linear(inner, width)),
    )


def _gather(**parts: Any) -> Any:
    """A module that is no more than its parts."""
    from mlx import nn

    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def _look(tower: Any, crops: Any, height: int, width: int) -> Any:
    """What stands in the place of token embeddings: float32 [tokens of a picture, hidden].

    `crops` float32 [1 + height * width, 3, size, size], the global crop first.
    """
    import mlx.core as mx

    features = []
    for start in range(0, len(crops), AT_ONCE):
        features.append(_run_clip(tower, mx.array(crops[start : start + AT_ONCE])))
        mx.eval(features)  # or all crops are in memory at once
    patches = mx.concatenate(features)
    rows = mx.concatenate(
        [
            _lay_out(patches[1:], height, width, tower.sub_GN),
            tower.glb_GN[0],
            _lay_out(patches[:1], 1, 1, tower.sub_GN),
        ]
    )
    for module in tower.img_projection:
        rows = module(rows)
    mx.eval(rows)
    return rows


def _run_clip(tower: Any, crops: Any) -> Any:
    """Features of crops, without the class token: [n, patches, width]."""
    import mlx.core as mx

    clip = tower.img_processor.vision_model
    embeddings = clip.embeddings
    patches = embeddings.patch_embedding(crops.transpose(0, 2, 3, 1)).flatten(1, 2)
    count, _, width = patches.shape
    first = mx.broadcast_to(embeddings.class_embedding, (count, 1, width))
    states = mx.concatenate([first, patches], axis=1) + embeddings.position_embedding.weight
    states = clip.pre_layrnorm(states)
    for layer in clip.encoder.layers[: tower.used]:
        states = states + _attend(layer.self_attn, layer.layer_norm1(states), tower.heads)
        inner = layer.mlp.fc1(layer.layer_norm2(states))
        states = states + layer.mlp.fc2(inner * mx.sigmoid(STEEPNESS * inner))
    return states[:, 1:]


def _attend(part: Any, states: Any, heads: int) -> Any:
    """Attention of everything to everything in each crop: [n, tokens, width]."""
    import mlx.core as mx

    count, length, width = states.shape
    queries, keys, values = (
        project(states).reshape(count, length, heads, -1).transpose(0, 2, 1, 3)
        for project in (part.q_proj, part.k_proj, part.v_proj)
    )
    scale = (width // heads) ** -0.5
    mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale)
    return part.out_proj(mixed.transpose(0, 2, 1, 3).reshape(count, length, width))


def _lay_out(patches: Any, height: int, width: int, end: Any) -> Any:
    """Patches of height * width crops as lines of tokens, each with `end` behind it: [n, 4 * C]."""
    import mlx.core as mx

    side = PATCHES // 2
    blocks = patches.reshape(height, width, side, 2, side, 2, -1).transpose(0, 2, 1, 4, 3, 5, 6)
    lines = blocks.reshape(height * side, width * side, end.shape[-1])
    ends = mx.broadcast_to(end[0], (len(lines), 1, end.shape[-1]))
    return mx.concatenate([lines, ends], axis=1).reshape(-1, end.shape[-1])
