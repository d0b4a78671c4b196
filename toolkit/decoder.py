"""A decoder's architecture as data: what formats and the reference forward need to know."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from toolkit.vision import VisionEncoder


@dataclass(frozen=True)
class Rope:
    """Rotary embedding in the rotate-half (NeoX) layout.

    `short_factors` and `long_factors` (rotary_dim / 2 values each) are empty without LongRoPE.
    With it the long ones hold for every position once the sequence is longer than
    `original_context`, and cos and sin are multiplied by `short_scale` or `long_scale`.
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
class TensorNames:
    """Names of the checkpoint's tensors; `{}` stands for the layer."""

    embedding: str
    final_norm: str
    head: str
    attention_norm: str
    qkv: str
    attention_out: str
    mlp_norm: str
    gate_up: str
    down: str


@dataclass(frozen=True)
class Decoder:
    """A pre-norm RMSNorm decoder with fused qkv and a gated SiLU MLP.

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
    vision: VisionEncoder | None = None

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused projection: queries, then keys, then values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def head_name(self) -> str:
        """Tensor that makes the logits: the embedding itself when tied."""
        return self.names.embedding if self.is_tied else self.names.head

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor of the decoder with its shape ([out, in] for linears), in order of use."""
        return self._shapes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        names, hidden = self.names, self.hidden
        shapes: dict[str, tuple[int, ...]] = {names.embedding: (self.vocab, hidden)}
        for layer in range(self.layers):
            shapes |= {
                names.attention_norm.format(layer): (hidden,),
                names.qkv.format(layer): (self.qkv_rows, hidden),
                names.attention_out.format(layer): (hidden, self.heads * self.head_dim),
                names.mlp_norm.format(layer): (hidden,),
                names.gate_up.format(layer): (2 * self.intermediate, hidden),
                names.down.format(layer): (hidden, self.intermediate),
            }
        shapes[names.final_norm] = (hidden,)
        if not self.is_tied:
            shapes[names.head] = (self.vocab, hidden)
        return shapes

    def layer_matrices(self, layer: int) -> tuple[str, str, str, str]:
        """A layer's matrices in order of use: qkv, attention_out, gate_up, down."""
        names = self.names
        patterns = (names.qkv, names.attention_out, names.gate_up, names.down)
        qkv, out, gate_up, down = (pattern.format(layer) for pattern in patterns)
        return qkv, out, gate_up, down

    def with_long_rope(self) -> "Decoder":
        """The same with LongRoPE's long factors at every length."""
        return replace(self, rope=replace(self.rope, original_context=0))

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token adds to the cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes
