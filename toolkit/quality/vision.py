"""The source's eyes: CLIP's tower and Phi-3-vision's projector in float32 NumPy, streamed.

Follows transformers' CLIPVisionModel with eager attention, and image_embedding_phi3_v.py of the
published remote code for what comes behind the tower.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.decoder import QUICK_GELU
from toolkit.quality.reference import Array, Weights, normalize_layer, silu, softmax
from toolkit.vision import VisionEncoder


def run_tower(weights: Weights, vision: VisionEncoder, crops: Array) -> Array:
    """Features of crops [n, 3, size, size]: float32 [n, patches ** 2, width]."""
    names, states = vision.names, _embed(weights, vision, crops)
    states = _normalize(weights, vision, names.first_norm, states)
    for layer in range(vision.used_layers):
        states = _run_layer(weights, vision, layer, states)
    return states[:, 1:]


def make_features(weights: Weights, vision: VisionEncoder, pixels: Any, sizes: Any) -> Array:
    """What stands in the place of token embeddings: float32 [tokens of all pictures, hidden].

    `pixels` and `sizes` as in runner.images.Pixels.
    """
    names, rows = vision.names, []
    row_separator = weights.read(names.row_separator).reshape(1, -1)
    image_separator = weights.read(names.image_separator).reshape(1, -1)
    for crops, (height, width) in zip(pixels, sizes // vision.image_size, strict=True):
        features = run_tower(weights, vision, crops[: 1 + height * width])
        rows += [
            _lay_out(vision, features[1:], (int(height), int(width)), row_separator),
            image_separator,
            _lay_out(vision, features[:1], (1, 1), row_separator),
        ]
    inner = _project(weights, names.project_in, np.concatenate(rows))
    return _project(weights, names.project_out, _gelu(inner))


def _embed(weights: Weights, vision: VisionEncoder, crops: Array) -> Array:
    """Patches and the class token in front, with positions: [n, patches ** 2 + 1, width]."""
    names, patch, count = vision.names, vision.patch, vision.patches
    cut = crops.reshape(len(crops), 3, count, patch, count, patch).transpose(0, 2, 4, 1, 3, 5)
    kernel = weights.read(names.patch_embedding).reshape(vision.width, -1)
    states = np.empty((len(crops), count**2 + 1, vision.width), np.float32)
    states[:, 0] = weights.read(names.class_embedding)
    states[:, 1:] = cut.reshape(len(crops), count**2, -1) @ kernel.T
    states += weights.read(names.positions)
    return states


def _run_layer(weights: Weights, vision: VisionEncoder, layer: int, states: Array) -> Array:
    names, shape = vision.names, states.shape
    queries, keys, values, out = vision.layer_attention(layer)
    normed = _normalize(weights, vision, names.attention_norm.format(layer), states)
    flat = normed.reshape(-1, vision.width)
    parts = [_project(weights, name, flat).reshape(shape) for name in (queries, keys, values)]
    mixed = np.concatenate(
        [_attend(vision.heads, *(part[crop] for part in parts)) for crop in range(len(states))]
    )
    states = states + _project(weights, out, mixed).reshape(shape)
    normed = _normalize(weights, vision, names.mlp_norm.format(layer), states)
    inner = _project(weights, names.mlp_in.format(layer), normed.reshape(-1, vision.width))
    steep = np.float32(QUICK_GELU)
    for start in range(0, len(inner), shape[1]):
        part = inner[start : start + shape[1]]
        part[...] = silu(steep * part) / steep
    return states + _project(weights, names.mlp_out.format(layer), inner).reshape(shape)


def _attend(heads: int, queries: Array, keys: Array, values: Array) -> Array:
    """Attention of everything to everything: [n, width] three times to [n, width]."""
    length, width = queries.shape
    split = (length, heads, width // heads)
    q, k, v = (part.reshape(split).transpose(1, 0, 2) for part in (queries, keys, values))
    mixed = np.empty((length, heads, width // heads), np.float32)
    for head in range(heads):
        scores = (q[head] * np.float32((width // heads) ** -0.5)) @ k[head].T
        mixed[:, head] = softmax(scores) @ v[head]
    return mixed.reshape(length, width)


def _lay_out(
    vision: VisionEncoder, features: Array, grid: tuple[int, int], row_separator: Array
) -> Array:
    """Crops [rows * columns, patches ** 2, width] to lines of tokens: [tokens, merged_width]."""
    (rows, columns), side = grid, vision.side
    lines = features.reshape(rows, columns, side, 2, side, 2, vision.width)
    lines = lines.transpose(0, 2, 1, 4, 3, 5, 6)
    lines = lines.reshape(rows * side, columns * side, vision.merged_width)
    ends = np.broadcast_to(row_separator, (rows * side, 1, vision.merged_width))
    return np.concatenate([lines, ends], axis=1).reshape(-1, vision.merged_width)


def _project(weights: Weights, module: str, inputs: Array) -> Array:
    outputs = weights.project(f"{module}.weight", inputs)
    outputs += weights.read(f"{module}.bias")
    return outputs


def _normalize(weights: Weights, vision: VisionEncoder, module: str, states: Array) -> Array:
    weight, bias = weights.read(f"{module}.weight"), weights.read(f"{module}.bias")
    return normalize_layer(weight, bias, states, vision.norm_epsilon)


def _gelu(values: Array) -> Array:
    """x * Phi(x), by the error function; NumPy has none, and a token's row is short."""
    scaled = (values.astype(np.float64) * math.sqrt(0.5)).reshape(-1)
    erf = np.fromiter(map(math.erf, scaled), np.float64, len(scaled)).reshape(values.shape)
    gelu: NDArray[np.float32] = (0.5 * values * (1 + erf)).astype(np.float32)
    return gelu


def place_features(hidden: Array, ids: Sequence[int], features: Array) -> None:
    """Put features, in order, where ids are below 0, in place; ValueError when counts differ."""
    places = np.flatnonzero(np.asarray(ids) < 0)
    if len(places) != len(features):
        raise ValueError(f"{len(places)} places for {len(features)} rows of pictures")
    hidden[places] = features
