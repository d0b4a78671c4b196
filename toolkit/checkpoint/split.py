"""Llama and Mistral checkpoints as Phi-3's: the same mathematics, with its projections fused.

LlamaForCausalLM and MistralForCausalLM store q_proj, k_proj, v_proj, gate_proj and up_proj apart.
Phi3ForCausalLM stores the first three as the rows of qkv_proj and the other two as those of
gate_up_proj. `FusedCheckpoint` reads the former as the latter, row by row, so that everything
above it knows one architecture. Sources: models/llama, models/mistral and models/phi3 of
transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

from numpy.typing import NDArray

from toolkit.checkpoint import PIECE_WEIGHTS, Checkpoint, to_float32
from toolkit.checkpoint.config import Config
from toolkit.checkpoint.rope import LONGROPE_NAMES, read_scaling
from toolkit.checkpoint.safetensors import TensorInfo
from toolkit.decoder import Decoder, Rows
from toolkit.errors import UnsupportedError

FUSED = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
# What a key that is absent stands for, by transformers' configuration of each architecture.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "MistralForCausalLM": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
}
# Settings of other layers than these two have by default.
WITHOUT = {"attention_bias": "biases", "mlp_bias": "biases", "qk_norm": "norms of queries and keys",
           "use_qk_norm": "norms of queries and keys"}  # fmt: skip
# Of no meaning to Phi-3, nor to the logits.
LEFT_OUT = ("mlp_bias", "pretraining_tp")
PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj.weight": (
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
    ),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}  # fmt: skip


def is_split(config: Config) -> bool:
    """Whether a checkpoint of this config stores its projections apart."""
    return config.architecture in DEFAULTS


def as_phi3(config: Config) -> Config:
    """The config of a Llama or Mistral as that of the same model with fused projections.

    UnsupportedError names what Phi-3's layers have not.
    """
    for key, what in WITHOUT.items():
        if config.flag(key):
            raise UnsupportedError(
                f"{config.where}: {key}: got True; supported: false, for Phi-3's layers have no "
                f"{what}"
            )
    defaults = DEFAULTS[config.architecture]
    kept = {key: value for key, value in config.fields.items() if key not in LEFT_OUT}
    missing = {key: value for key, value in defaults.items() if key not in kept}
    given = Config(config.where, {**kept, **missing})
    fields = {**given.fields, **FUSED}
    heads, hidden = given.integer("num_attention_heads"), given.integer("hidden_size")
    if given.integer("head_dim", hidden // heads) == hidden // heads:
        fields.pop("head_dim", None)
    context = given.integer("max_position_embeddings")
    window = fields.get("sliding_window") and given.integer("sliding_window")
    if config.architecture == "LlamaForCausalLM" and window and window < context:
        fields["sliding_window"] = None  # Llama has none, whatever its config says
    if _lacks_original(given):
        fields["original_max_position_embeddings"] = context
    return Config(config.where, fields)


def _lacks_original(given: Config) -> bool:
    """Whether it has LongRoPE without the context before, which is then the whole context."""
    scaling = read_scaling(given)
    shares = (one.fields.get("partial_rotary_factor") for one in (scaling, given))
    if share := next((share for share in shares if share not in (None, 1)), None):
        raise given.error("partial_rotary_factor", share, "1, for this architecture")
    kind = scaling.fields.get("rope_type") or scaling.fields.get("type")
    key = "original_max_position_embeddings"
    return kind in LONGROPE_NAMES and not (scaling.fields.get(key) or given.fields.get(key))


@dataclass
class FusedCheckpoint(Checkpoint):
    """A split checkpoint, read as Phi-3's: `parts` names what each fused matrix is made of.

    Rows of parts that are stored in several types come as float32, which holds each exactly.
    """

    base: Checkpoint = field(kw_only=True)
    parts: Mapping[str, tuple[str, ...]] = field(kw_only=True)

    @property
    def files(self) -> list[str]:
        """Names of the files that the weights lie in."""
        return self.base.files

    def reopen(self) -> "FusedCheckpoint":
        """The same with files and buffers of its own, for another thread."""
        return fuse(self.base.reopen())

    def close(self) -> None:
        """Close every file that was opened for reading."""
        self.base.close()

    def fingerprint(self) -> str:
        """That of the checkpoint as it is stored."""
        return self.base.fingerprint()

    def config_bytes(self) -> bytes:
        """config.json of the fused model."""
        return self.dump_config()

    def check(self, decoder: Decoder) -> None:
        """Compare names and shapes as they are stored; CheckpointError on any difference."""
        self.base.compare(decoder, partial(_list_shapes, decoder))

    def read_rows(
        self, name: str, start: int = 0, count: int | None = None, piece: int = PIECE_WEIGHTS
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """As the checkpoint's own; the rows of a fused matrix are those of its parts in order."""
        if name not in self.parts:
            yield from self.base.read_rows(name, start, count, piece)
            return
        total = self.tensors[name].shape[0]
        stop = total if count is None else start + count
        if not 0 <= start <= stop <= total:
            raise IndexError(f"{name}: rows {start} to {stop}; it has {total}")
        first = 0
        for part in self.parts[name]:
            info = self.base.tensors[part]
            begin, end = max(start - first, 0), min(stop - first, info.shape[0])
            if begin < end:
                is_wider = info.dtype != self.tensors[name].dtype
                for row, raw in self.base.read_rows(part, begin, end - begin, piece):
                    yield first + row, to_float32(raw) if is_wider else raw
            first += info.shape[0]


def fuse(base: Checkpoint) -> FusedCheckpoint:
    """A split checkpoint read as Phi-3's; UnsupportedError names what that has not.

    Projections with a part that is missing, or has other columns, stay apart: `check` names them.
    """
    config = as_phi3(base.config)
    parts = {fused: names for fused, names in _list_fused(base.tensors) if names}
    inner = {name for names in parts.values() for name in names}
    tensors = {name: info for name, info in base.tensors.items() if name not in inner}
    tensors |= {
        name: _join(name, [base.tensors[n] for n in names]) for name, names in parts.items()
    }
    return FusedCheckpoint(base.folder, config, tensors, base.revision, base=base, parts=parts)


def list_parts(fused: str) -> tuple[str, ...]:
    """Names of the matrices that a fused one is made of, in order of rows; none for others."""
    for end, parts in PROJECTIONS.items():
        if fused.endswith(end):
            return tuple(fused.removesuffix(end) + part for part in parts)
    return ()


def locate_parts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Rows]:
    """Which rows of a fused matrix each part is, by its name; `shapes` are a checkpoint's."""
    found = {}
    for name, shape in shapes.items():
        parts = list_parts(name)
        rows = [shape[0] // 2] * 2
        if len(parts) == 3:  # queries are as wide as what the output projection takes
            output = shapes.get(parts[0].replace("q_proj", "o_proj"), ())
            if len(output) != 2:
                continue  # a damaged checkpoint, as `check` says
            queries, keys = output[1], (shape[0] - output[1]) // 2
            rows = [queries, keys, keys]
        starts = accumulate(rows, initial=0)
        for part, start, count in zip(parts, starts, rows, strict=False):
            found[part] = Rows(name, start, count)
    return found


def _list_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint as it is stored."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in decoder.all_shapes().items():
        parts, rows = list_parts(name), _list_rows(decoder, name)
        shapes |= {part: (count, shape[1]) for part, count in zip(parts, rows, strict=True)}
        if not parts:
            shapes[name] = shape
    return shapes


def _list_rows(decoder: Decoder, name: str) -> tuple[int, ...]:
    """How many rows each part of a fused matrix has."""
    if name.endswith("qkv_proj.weight"):
        keys = decoder.kv_heads * decoder.head_dim
        return (decoder.heads * decoder.head_dim, keys, keys)
    return (decoder.intermediate,) * 2 if name.endswith("gate_up_proj.weight") else ()


def _list_fused(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Fused names and their parts, where all of these are there and have the same columns."""
    for end, (first, *_) in PROJECTIONS.items():
        for name in tensors:
            if name.endswith(first):
                fused = name.removesuffix(first) + end
                parts = list_parts(fused)
                shapes = [tensors[part].shape for part in parts if part in tensors]
                is_whole = len(shapes) == len(parts) and all(len(shape) == 2 for shape in shapes)
                if is_whole and len({shape[1] for shape in shapes}) == 1:
                    yield fused, parts


def _join(name: str, parts: Sequence[TensorInfo]) -> TensorInfo:
    """A fused matrix, as lying where its first part does."""
    dtypes = {part.dtype for part in parts}
    rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    return replace(parts[0], name=name, dtype=dtype, shape=(rows, columns))
