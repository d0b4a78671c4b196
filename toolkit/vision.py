"""A vision encoder's architecture as data: the tower, its separators and its projector."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from toolkit.errors import PlanError

PICTURE_CROPS = 17  # as published: at most 16, and the whole
LEAST_TEXT = 160  # tokens beside a picture


@dataclass(frozen=True)
class VisionNames:
    """Tensors by full name, modules (with `.weight` and `.bias`) by path; `{}` is the layer."""

    class_embedding: str
    patch_embedding: str
    positions: str
    first_norm: str
    attention_norm: str
    queries: str
    keys: str
    values: str
    attention_out: str
    mlp_norm: str
    mlp_in: str
    mlp_out: str
    last_norm: str
    project_in: str
    project_out: str
    row_separator: str
    image_separator: str


@dataclass(frozen=True)
class VisionEncoder:
    """A CLIP tower over crops of a picture, 2 x 2 patches to a token, and an MLP that projects.

    `layers` are stored; `used_layers` run, the features are what the last of them gives, without
    the class token. `hidden` is the decoder's. A token of four patches is `merged_width` wide.
    """

    width: int
    layers: int
    used_layers: int
    heads: int
    intermediate: int
    patch: int
    image_size: int
    norm_epsilon: float
    hidden: int
    names: VisionNames

    @property
    def patches(self) -> int:
        """Patches on a crop's side."""
        return self.image_size // self.patch

    @property
    def side(self) -> int:
        """Tokens on a crop's side."""
        return self.patches // 2

    @property
    def merged_width(self) -> int:
        """Columns of four patches side by side."""
        return 4 * self.width

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor of the encoder with its shape, in order of use; those unused come last."""
        return self._shapes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        names, width = self.names, self.width
        shapes: dict[str, tuple[int, ...]] = {
            names.class_embedding: (width,),
            names.patch_embedding: (width, 3, self.patch, self.patch),
            names.positions: (self.patches**2 + 1, width),
            **_module(names.first_norm, width),
        }
        for layer in range(self.used_layers):
            shapes |= self._layer(layer)
        shapes[names.row_separator] = (1, 1, 1, self.merged_width)
        shapes[names.image_separator] = (1, 1, self.merged_width)
        shapes |= _module(names.project_in, self.hidden, self.merged_width)
        shapes |= _module(names.project_out, self.hidden, self.hidden)
        for layer in range(self.used_layers, self.layers):
            shapes |= self._layer(layer)
        return shapes | _module(names.last_norm, width)

    def _layer(self, layer: int) -> dict[str, tuple[int, ...]]:
        names, width = self.names, self.width
        shapes = _module(names.attention_norm.format(layer), width)
        for name in self.layer_attention(layer):
            shapes |= _module(name, width, width)
        shapes |= _module(names.mlp_norm.format(layer), width)
        shapes |= _module(names.mlp_in.format(layer), self.intermediate, width)
        return shapes | _module(names.mlp_out.format(layer), width, self.intermediate)

    def count_weights(self) -> int:
        """Numbers in the matrices that are used."""
        shapes = self.shapes()
        return sum(prod(shapes[name]) for name in self.list_used() if len(shapes[name]) == 2)

    def count_least(self) -> int:
        """Tokens of two crops, the whole picture, their separators, a text: the gate's question."""
        return 3 * self.side**2 + 3 * self.side + 1 + LEAST_TEXT

    def count_crops(self, context_length: int) -> int:
        """Most crops whose tokens so long a context holds; at least those of one picture.

        A picture as a whole is one of its crops.
        """
        return max(PICTURE_CROPS, context_length // self.side**2)

    def layer_attention(self, layer: int) -> tuple[str, str, str, str]:
        """A layer's attention modules: queries, keys, values, out."""
        names = self.names
        patterns = (names.queries, names.keys, names.values, names.attention_out)
        queries, keys, values, out = (pattern.format(layer) for pattern in patterns)
        return queries, keys, values, out

    def is_matrix(self, name: str) -> bool:
        """Whether a tensor is what rows are multiplied with; positions are looked up."""
        return len(self.shapes()[name]) == 2 and name != self.names.positions

    def list_used(self) -> list[str]:
        """Names of the tensors that a picture's features depend on, in order of use."""
        last = self.names.last_norm
        unused = {f"{last}.weight", f"{last}.bias"}
        for layer in range(self.used_layers, self.layers):
            unused |= set(self._layer(layer))
        return [name for name in self.shapes() if name not in unused]


def _module(path: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """A module's weight and its bias."""
    return {f"{path}.weight": shape, f"{path}.bias": shape[:1]}


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes crops: how many at most, and each channel's mean and deviation."""

    crops: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def check_precision(
    where: str, wanted: object, vision: VisionEncoder | None, *, is_low: bool, allowed: str
) -> None:
    """PlanError for a tower's precision of a model without one, or one in which it sees badly.

    `wanted` is what the recipe says at `where`, None for nothing; `is_low` when that is 4 bits or
    fewer a weight.
    """
    if vision is None and wanted is not None:
        raise PlanError(f"{where}: got {wanted}; this model reads no pictures: leave it out")
    if vision and is_low:
        raise PlanError(
            f"{where}: got {wanted}; 4 bits move a picture's features by about 31 %; allowed "
            f"{allowed}"
        )
