"""A decoder's architecture as data: what formats and the reference forward need to know."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

from toolkit.vision import VisionEncoder

Norm = Literal["rms", "layer"]
Kind = Literal["qkv", "attention_out", "router", "gate_up", "down", "head"]
Special = Literal[
    "layer norms", "biases", "split projections", "experts", "block-sparse attention", "gegelu",
    "multipliers", "masked tokens", "pictures",
]  # fmt: skip
# Added to the logits of tokens that are never said: the least float16, so that all formats hold it.
MASKED_LOGIT = -65504.0
QUICK_GELU = 1.702  # x * sigmoid(QUICK_GELU * x): of gegelu's gate, and of CLIP's towers


@dataclass(frozen=True)
class Rope:
    """Rotary embedding in the rotate-half (NeoX) layout.

    `short_factors` (rotary_dim / 2 values) divide the frequencies; empty, nothing does.
    `long_factors` (as many) are empty without LongRoPE. With it the long ones hold for every
    position once the sequence is longer than `original_context`, and cos and sin are multiplied by
    `short_scale` or `long_scale`.
    """

    theta: float
    rotary_dim: int
    original_context: int
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    short_scale: float = 1.0
    long_scale: float = 1.0

    @property
    def is_long(self) -> bool:
        """True when the checkpoint uses LongRoPE."""
        return bool(self.long_factors)


@dataclass(frozen=True)
class Rows:
    """`count` rows of a stored tensor, every `step`-th from `start` on; of its bias likewise.

    Projections are put together of such, one after the other.
    """

    tensor: str
    start: int
    count: int
    step: int = 1

    @property
    def span(self) -> slice:
        """The rows as an index of the stored tensor."""
        return slice(self.start, self.start + self.count * self.step, self.step)

    def at(self, layer: int, expert: int) -> "Rows":
        """The same in a layer, where the tensor's name is a pattern."""
        return replace(self, tensor=self.tensor.format(layer, expert))


Parts = tuple[Rows, ...]


@dataclass(frozen=True)
class TensorNames:
    """Names of the checkpoint's tensors; `{}` stands for the layer, a second one for the expert.

    `qkv` and `gate_up` are empty where no tensor is queries, keys and values, or gate and up, in
    this order: the decoder's parts say then what these are put together of. A bias is called as its
    matrix or norm, with `.bias` for `.weight`.
    """

    embedding: str
    final_norm: str
    head: str
    attention_norm: str
    attention_out: str
    mlp_norm: str
    down: str
    qkv: str = ""
    gate_up: str = ""
    router: str = ""


@dataclass(frozen=True)
class Experts:
    """`count` gated MLPs, of which a router picks `per_token` for each token by sparsemixer.

    An expert's weight is a softmax over itself and those that are within 2 x `jitter` of it:
    (max - s) / max(|s|, max) <= 2 x jitter. Those picked before are left out; no sum is 1.
    """

    count: int
    per_token: int
    jitter: float


@dataclass(frozen=True)
class BlockSparse:
    """Attention by blocks of `block` tokens, causal besides.

    A query sees the nearest `local` blocks, its own among them, and of those before the ones that
    its head looks at: every `stride`-th, from another one on in each head. `shifts` has one number
    a head. Every `dense_every`-th layer sees all.
    """

    block: int
    local: int
    stride: int
    shifts: tuple[int, ...]
    dense_every: int

    def sees(self, query: Any, key: Any, shift: Any) -> Any:
        """Whether a query of a block sees a key of a block, not after it; numbers or arrays."""
        return (query - key < self.local) | ((key + shift + 1) % self.stride == 0)

    @property
    def local_tokens(self) -> int:
        """Tokens of a text of which every layer sees all: the next one misses a block."""
        return self.local * self.block

    def is_dense(self, layer: int) -> bool:
        """True for a layer that sees all."""
        return (layer + 1) % self.dense_every == 0


@dataclass(frozen=True)
class Decoder:
    """A pre-norm decoder: attention of queries, keys and values, then a gated MLP.

    By default as Phi-3: RMSNorm, no biases, fused qkv and gate_up, no experts. `biased` names the
    kinds of matrices that have biases; layer norms have one always. Parts are in the order in which
    the projection's rows are used; empty, they are the rows of `names.qkv` or `names.gate_up`.
    The MLP is SiLU of the gate by up; with a `gegelu_limit` it is quick GELU of the gate, at most
    that, by up, within that at both ends, + 1. `embedding_scale` multiplies what is looked up,
    `logit_scale` the logits; `attention_scale` the scores (None: head_dim ** -0.5).
    `masked_tokens` are never said.

    `vision` makes it see: rows of a picture then stand in the place of token embeddings. All else
    here, `shapes` too, is the text decoder alone.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_epsilon: float
    rope: Rope
    window: int | None
    is_tied: bool
    names: TensorNames
    norm: Norm = "rms"
    biased: tuple[Kind, ...] = ()
    qkv_parts: Parts = ()
    gate_parts: Parts = ()
    up_parts: Parts = ()
    experts: Experts | None = None
    sparse: BlockSparse | None = None
    gegelu_limit: float | None = None
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    logit_scale: float = 1.0
    masked_tokens: tuple[int, ...] = ()
    vision: VisionEncoder | None = None

    @property
    def specials(self) -> tuple[Special, ...]:
        """In what, sizes apart, it is not Phi-3: what a format has to know to hold it."""
        found: dict[Special, bool] = {
            "layer norms": self.norm == "layer",
            "biases": bool(self.biased),
            "split projections": bool(self.qkv_parts or self.gate_parts or self.up_parts),
            "experts": self.experts is not None,
            "block-sparse attention": self.sparse is not None,
            "gegelu": self.gegelu_limit is not None,
            "multipliers": (self.embedding_scale, self.attention_scale, self.logit_scale)
            != (1.0, None, 1.0),
            "masked tokens": bool(self.masked_tokens),
            "pictures": self.vision is not None,
        }
        return tuple(special for special, is_so in found.items() if is_so)

    @property
    def score_scale(self) -> float:
        """What attention's scores are multiplied with."""
        return self.attention_scale or self.head_dim**-0.5

    def sparse_of(self, layer: int) -> BlockSparse | None:
        """Which blocks a layer's attention sees; None where it sees all."""
        return None if self.sparse is None or self.sparse.is_dense(layer) else self.sparse

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused projection: queries, then keys, then values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def head_name(self) -> str:
        """Tensor that makes the logits: the embedding itself when tied."""
        return self.names.embedding if self.is_tied else self.names.head

    def qkv(self, layer: int) -> Parts:
        """A layer's queries, then keys, then values."""
        return _at(self.qkv_parts or (Rows(self.names.qkv, 0, self.qkv_rows),), layer)

    def gate(self, layer: int, expert: int = 0) -> Parts:
        """What goes through the MLP's function, of a layer or of one of its experts."""
        whole = Rows(self.names.gate_up, 0, self.intermediate)
        return _at(self.gate_parts or (whole,), layer, expert)

    def up(self, layer: int, expert: int = 0) -> Parts:
        """What that is multiplied with."""
        whole = Rows(self.names.gate_up, self.intermediate, self.intermediate)
        return _at(self.up_parts or (whole,), layer, expert)

    def down(self, layer: int, expert: int = 0) -> str:
        """Name of the matrix behind the gated MLP."""
        return self.names.down.format(layer, expert)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor of the decoder with its shape ([out, in] for linears), in order of use."""
        return self._shapes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        names, hidden = self.names, self.hidden
        shapes: dict[str, tuple[int, ...]] = {names.embedding: (self.vocab, hidden)}
        for layer in range(self.layers):
            shapes |= self._layer_shapes(layer)
        shapes |= self._norm_shapes(names.final_norm)
        if not self.is_tied:
            shapes |= self._stored("head", hidden, Rows(names.head, 0, self.vocab))
        return shapes

    def all_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor of the checkpoint: those of `shapes`, then those of `vision`."""
        return {**self._shapes, **(self.vision.shapes() if self.vision else {})}

    def _layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        names, hidden = self.names, self.hidden
        out = Rows(names.attention_out.format(layer), 0, hidden)
        shapes = self._norm_shapes(names.attention_norm.format(layer))
        shapes |= self._stored("qkv", hidden, *self.qkv(layer))
        shapes |= self._stored("attention_out", self.heads * self.head_dim, out)
        shapes |= self._norm_shapes(names.mlp_norm.format(layer))
        if self.experts:
            router = Rows(names.router.format(layer), 0, self.experts.count)
            shapes |= self._stored("router", hidden, router)
        for expert in range(self.experts.count if self.experts else 1):
            gate_up = (*self.gate(layer, expert), *self.up(layer, expert))
            shapes |= self._stored("gate_up", hidden, *gate_up)
            down = Rows(self.down(layer, expert), 0, hidden)
            shapes |= self._stored("down", self.intermediate, down)
        return shapes

    def _norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {name: (self.hidden,)}
        return found | {name_bias(name): (self.hidden,)} if self.norm == "layer" else found

    def _stored(self, kind: Kind, columns: int, *parts: Rows) -> dict[str, tuple[int, ...]]:
        """The tensors that parts are rows of, and their biases; every row is part of one."""
        rows = dict.fromkeys((part.tensor for part in parts), 0)
        for part in parts:
            rows[part.tensor] += part.count
        found: dict[str, tuple[int, ...]] = {}
        for name, count in rows.items():
            found[name] = (count, columns)
            if kind in self.biased:
                found[name_bias(name)] = (count,)
        return found

    def bias_of(self, name: str) -> str:
        """Name of the bias of a matrix or norm; empty when it has none."""
        bias = name_bias(name)
        return bias if bias in self._shapes else ""

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """The patterns of the layers' matrices as stored, in order of use: what each one is."""
        names = self.names
        qkv = self.qkv_parts or (Rows(names.qkv, 0, 0),)
        gate_up = (*self.gate_parts, *self.up_parts) or (Rows(names.gate_up, 0, 0),)
        kinds: dict[str, Kind] = {part.tensor: "qkv" for part in qkv}
        kinds[names.attention_out] = "attention_out"
        if self.experts:
            kinds[names.router] = "router"
        return {**kinds, **{part.tensor: "gate_up" for part in gate_up}, names.down: "down"}

    def kind_of(self, name: str) -> Kind | None:
        """What a matrix of a layer is; None for any other tensor."""
        for pattern, kind in self.kinds.items():
            if fnmatchcase(name, pattern.replace("{}", "*")):
                return kind
        return None

    def layer_tensors(self, layer: int) -> tuple[str, ...]:
        """Names of all tensors of a layer, in order of use."""
        return tuple(self._layer_shapes(layer))

    def layer_matrices(self, layer: int) -> tuple[str, ...]:
        """A layer's matrices in order of use: qkv, attention_out, gate_up, down as stored."""
        return tuple(name for name, shape in self._layer_shapes(layer).items() if len(shape) == 2)

    def with_long_rope(self) -> "Decoder":
        """The same with LongRoPE's long factors at every length."""
        return replace(self, rope=replace(self.rope, original_context=0))

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token adds to the cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


def name_bias(name: str) -> str:
    """What the bias of a matrix or norm is called."""
    return f"{name.removesuffix('.weight')}.bias"


def cut(parts: Parts, first: int, last: int) -> Parts:
    """Rows `first` to `last`, not included, of what parts are put together to."""
    found, start = [], 0
    for part in parts:
        begin, end = max(first - start, 0), min(last - start, part.count)
        if begin < end:
            place = part.start + begin * part.step
            found.append(replace(part, start=place, count=end - begin))
        start += part.count
    return tuple(found)


def _at(parts: Parts, layer: int, expert: int = 0) -> Parts:
    return tuple(part.at(layer, expert) for part in parts)
