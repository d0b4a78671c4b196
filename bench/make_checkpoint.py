"""Write a random Phi-3 checkpoint of full size, for benchmarks: real shapes, invented weights.

    python bench/make_checkpoint.py --out /big/disk/mini --tokenizer ~/Phi-3-mini-4k-instruct

Needs numpy alone, at most 200 MB of memory, and as much time as the disk takes to write the file.
A converter cannot tell the result from a trained checkpoint: bf16 normal weights of spread 0.02, in
shards with an index, with block extremes that differ. The answers of such a model mean nothing.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
STOP_IDS = [32000, 32001, 32007]
SHARD_LIMIT_BYTES = 5_000_000_000
BF16_BYTES = 2


@dataclass(frozen=True)
class Shape:
    """The sizes in which the published models differ."""

    hidden: int = 3072
    inner: int = 8192
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    context: int = 4096
    sliding_window: int = 2047
    vocabulary: int = 32064
    experts: int = 0
    has_tower: bool = False

    @property
    def is_long(self) -> bool:
        return self.context > 4096


ROOT = "model.vision_embed_tokens."  # of pictures, in Phi-3.5-vision
TOWER_WIDTH, TOWER_INNER, TOWER_LAYERS = 1024, 4096, 24  # CLIP ViT-L/14 of 336 pixels

SHAPES = {
    "mini": Shape(),
    "medium": Shape(hidden=5120, inner=17920, layers=40, heads=40, kv_heads=10),
    "phi-3.5-mini": Shape(context=131072, sliding_window=262144),
    "phi-3.5-vision": Shape(context=131072, sliding_window=131072, has_tower=True),
    "phi-3.5-moe": Shape(
        hidden=4096, inner=6400, kv_heads=8, context=131072, sliding_window=131072, experts=16
    ),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint and where it stands in its shard, in bytes after the header."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.start + self.size * BF16_BYTES


class Noise:
    """Bf16 normal values without end, cut from one drawn block.

    A piece takes magnitudes from a random place of one of several scaled copies, and signs from
    another random place: drawing 3.8 G normals would take minutes, this takes seconds.
    """

    PIECE = 1 << 19
    SCALES = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)
    NORM_STD = 0.05

    def __init__(self, std: float, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        block = np.abs(self._rng.standard_normal(2 * self.PIECE, np.float32))
        self._magnitudes = [to_bf16(block * np.float32(std * scale)) for scale in self.SCALES]
        self._signs = self._rng.choice(np.array([0, 0x8000], np.uint16), 2 * self.PIECE)

    def weights(self, count: int) -> Iterator[Bits]:
        """Yield `count` values of mean 0 in pieces."""
        for done in range(0, count, self.PIECE):
            piece = min(self.PIECE, count - done)
            first, sign = self._rng.integers(0, self.PIECE, 2)
            magnitudes = self._magnitudes[self._rng.integers(len(self._magnitudes))]
            yield np.bitwise_xor(
                magnitudes[first : first + piece], self._signs[sign : sign + piece]
            )

    def norms(self, count: int) -> Bits:
        """Return `count` values near 1."""
        noise = self._rng.standard_normal(count, np.float32)
        return to_bf16(1 + np.float32(self.NORM_STD) * noise)


def to_bf16(values: NDArray[np.float32]) -> Bits:
    """Round finite float32 values to the nearest bf16, ties to even; returns their 16 bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def write_checkpoint(folder: Path, shape: Shape, std: float, seed: int) -> int:
    """Write the shards, their index and the configs; returns the bytes of all weights."""
    shards = plan_shards(shape)
    noise = Noise(std, seed)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            write_shard(file, tensors, noise)
        weight_map |= {tensor.name: name for tensor in tensors}
        print(f"{name}  {tensors[-1].end / 1e9:.2f} GB", file=sys.stderr)
    total_bytes = sum(tensors[-1].end for tensors in shards)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "generation_config.json", generation_config())
    write_json(folder / "config.json", model_config(shape))
    if shape.has_tower:
        write_json(folder / "preprocessor_config.json", preprocessor_config())
    return total_bytes


def plan_shards(shape: Shape) -> list[list[Tensor]]:
    """Fill shards with the tensors in model order, as the published checkpoints do."""
    shards: list[list[Tensor]] = [[]]
    end = 0
    for name, tensor_shape in tensor_shapes(shape):
        tensor = Tensor(name, tensor_shape, end)
        if tensor.end > SHARD_LIMIT_BYTES:
            tensor = replace(tensor, start=0)
            shards.append([])
        shards[-1].append(tensor)
        end = tensor.end
    return shards


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor of a Phi-3, a Phi-3.5-vision or a Phi-3.5-MoE."""
    if shape.experts:
        yield from moe_shapes(shape)
        return
    if shape.has_tower:
        yield from tower_shapes(shape)
    hidden, inner = shape.hidden, shape.inner
    qkv = (shape.heads + 2 * shape.kv_heads) * (hidden // shape.heads)
    yield "model.embed_tokens.weight", (shape.vocabulary, hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
        yield prefix + "mlp.gate_up_proj.weight", (2 * inner, hidden)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.qkv_proj.weight", (qkv, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocabulary, hidden)


def tower_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the same of what looks at pictures: CLIP, two separators and a projector."""
    clip, width = f"{ROOT}img_processor.vision_model.", TOWER_WIDTH
    yield f"{clip}embeddings.class_embedding", (width,)
    yield f"{clip}embeddings.patch_embedding.weight", (width, 3, 14, 14)
    yield f"{clip}embeddings.position_embedding.weight", (577, width)
    modules: dict[str, tuple[int, ...]] = {f"{clip}pre_layrnorm": (width,)}
    for layer in range(TOWER_LAYERS):
        prefix = f"{clip}encoder.layers.{layer}."
        modules |= {f"{prefix}layer_norm{number}": (width,) for number in (1, 2)}
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            modules[f"{prefix}self_attn.{part}"] = (width, width)
        modules[f"{prefix}mlp.fc1"] = (TOWER_INNER, width)
        modules[f"{prefix}mlp.fc2"] = (width, TOWER_INNER)
    modules[f"{clip}post_layernorm"] = (width,)
    modules[f"{ROOT}img_projection.0"] = (shape.hidden, 4 * width)
    modules[f"{ROOT}img_projection.2"] = (shape.hidden, shape.hidden)
    for module, sizes in modules.items():
        yield f"{module}.weight", sizes
        yield f"{module}.bias", sizes[:1]
    yield f"{ROOT}glb_GN", (1, 1, 4 * width)
    yield f"{ROOT}sub_GN", (1, 1, 1, 4 * width)


def moe_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the same of a PhiMoEForCausalLM, whose norms and projections have biases."""
    hidden, inner = shape.hidden, shape.inner
    keys = shape.kv_heads * (hidden // shape.heads)
    yield "model.embed_tokens.weight", (shape.vocabulary, hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        moe = f"{prefix}block_sparse_moe."
        yield f"{moe}gate.weight", (shape.experts, hidden)
        for expert in range(shape.experts):
            yield f"{moe}experts.{expert}.w1.weight", (inner, hidden)
            yield f"{moe}experts.{expert}.w2.weight", (hidden, inner)
            yield f"{moe}experts.{expert}.w3.weight", (inner, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", (hidden,)
            yield f"{prefix}{norm}.bias", (hidden,)
        for part, rows in (("k", keys), ("o", hidden), ("q", hidden), ("v", keys)):
            yield f"{prefix}self_attn.{part}_proj.weight", (rows, hidden)
            yield f"{prefix}self_attn.{part}_proj.bias", (rows,)
    for name in ("model.norm.weight", "model.norm.bias", "lm_head.bias"):
        yield name, (shape.vocabulary if name == "lm_head.bias" else hidden,)
    yield "lm_head.weight", (shape.vocabulary, hidden)


def write_shard(file: BinaryIO, tensors: list[Tensor], noise: Noise) -> None:
    """Write one safetensors file: header length, header, then each tensor in pieces."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor in tensors:
        offsets = [tensor.start, tensor.end]
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust((len(text) + 7) // 8 * 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        if len(tensor.shape) == 1 and not tensor.name.endswith(".bias"):
            file.write(noise.norms(tensor.size).data)
            continue
        for piece in noise.weights(tensor.size):
            file.write(piece.data)


def model_config(shape: Shape) -> dict[str, Any]:
    """Return config.json with the keys and spellings of the published one."""
    more = moe_config(shape) if shape.experts else vision_config() if shape.has_tower else {}
    return {**phi3_config(shape), **more}


def vision_config() -> dict[str, Any]:
    """What Phi-3.5-vision says beside or instead."""
    return {
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
            "image_dim_out": TOWER_WIDTH,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": 144,
        },
    }


def preprocessor_config() -> dict[str, Any]:
    return {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Phi3VImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "num_crops": 4,
        "num_img_tokens": 144,
        "processor_class": "Phi3VProcessor",
    }


def moe_config(shape: Shape) -> dict[str, Any]:
    """What Phi-3.5-MoE says beside or instead."""
    scale = 1.243163121016122
    return {
        "architectures": ["PhiMoEForCausalLM"],
        "model_type": "phimoe",
        "attention_bias": True,
        "lm_head_bias": True,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.01,
        "rope_scaling": {**long_rope(shape), "short_mscale": scale, "long_mscale": scale},
    }


def phi3_config(shape: Shape) -> dict[str, Any]:
    """The same of a Phi-3."""
    return {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.inner,
        "max_position_embeddings": shape.context,
        "model_type": "phi3",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": long_rope(shape) if shape.is_long else None,
        "rope_theta": 10000.0,
        "sliding_window": shape.sliding_window,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.2",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }


def long_rope(shape: Shape) -> dict[str, Any]:
    """Return LongRoPE factors of the right number; their values are invented like the weights."""
    pairs = shape.hidden // shape.heads // 2
    return {
        "long_factor": [round(1 + 63 * pair / (pairs - 1), 4) for pair in range(pairs)],
        "short_factor": [round(1 + 2 * pair / (pairs - 1), 4) for pair in range(pairs)],
        "type": "su" if shape.has_tower else "longrope",  # as published
    }


def generation_config() -> dict[str, Any]:
    return {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": STOP_IDS,
        "pad_token_id": 32000,
        "transformers_version": "4.40.2",
    }


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files; SystemExit names the ones that are missing."""
    missing = [name for name in TOKENIZER_FILES if not (source / name).is_file()]
    if missing:
        sys.exit(f"{source}: {', '.join(missing)} not found; give --tokenizer a Phi-3 folder")
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a Phi-3 tokenizer")
    parser.add_argument("--shape", choices=SHAPES, default="mini")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--std", type=float, default=0.02, help="spread of the weights")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    shape = replace(shape, layers=options.layers or shape.layers)
    try:
        options.out.mkdir(parents=True)
    except FileExistsError:
        sys.exit(f"{options.out} exists already; remove it or name another folder")
    start_s = time.perf_counter()
    copy_tokenizer(options.tokenizer, options.out)
    total_bytes = write_checkpoint(options.out, shape, options.std, options.seed)
    print(f"{options.out}: {total_bytes:,} bytes in {time.perf_counter() - start_s:.0f} s")


if __name__ == "__main__":
    main()
