"""A recipe: what to build. Each format adds its own fields in formats/<name>/recipe.py."""

from typing import Annotated, Any, Literal

import msgspec

from toolkit.artifact import Limits, Smoke
from toolkit.decoder import Decoder

Engine = Literal["native", "vendor"]
Method = Literal["rtn", "gptq"]
# An adapter changes bytes, but not by where it lies: its digest is part of the source's.
LEAST_GROUP = 32  # of weights with one scale; all formats have it
BESIDE_THE_BYTES = ("name", "title", "first_choice", "check", "smoke", "adapter")


class Quantization(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How codes are chosen; each format's own struct says on which grid.

    `method` gptq takes the codes that keep the outputs of each matrix on a calibration text
    nearest to the source's; rtn rounds each weight to the nearest. `equalize` first moves scale
    between weights, exactly, so that channels with outliers lose less. `calibration_tokens` is
    the length of the text for both, in tokens.
    """

    method: Method = "rtn"
    equalize: bool = False
    calibration_tokens: Annotated[int, msgspec.Meta(ge=2)] = 8192

    def fit(self, decoder: Decoder) -> "Quantization":
        """The same for a model whose rows the groups may not divide: with smaller groups then."""
        del decoder
        return self

    @property
    def is_calibrated(self) -> bool:
        """True when building takes a calibration text."""
        return self.method != "rtn" or self.equalize


def fit_group(size: int, decoder: Decoder) -> int:
    """The largest group of `size`, a half, a quarter and so on that divides the layers' rows."""
    columns = (decoder.hidden, decoder.heads * decoder.head_dim, decoder.intermediate)
    while size > LEAST_GROUP and any(count % size for count in columns):
        size //= 2
    return size


class Recipe(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="format"
):
    """What every recipe has; `name` is the file's own name, never written in it.

    `model` is empty in a recipe for any model; `bind` then gives it the checkpoint's.
    `engine` vendor has the vendor's own converter make the artifact, in an environment of its own.
    `first_choice` recipes are what `ship` takes before the others of their format. `adapter` is a
    folder with a LoRA adapter to merge into the checkpoint, seen from the recipe's own file; with
    `adapter_apart` it stays a file of its own beside the checkpoint's unchanged weights.
    """

    name: str = ""
    model: str = ""
    title: str
    quantization: Quantization
    engine: Engine = "native"
    first_choice: bool = False
    adapter: str | None = None
    adapter_apart: bool = False
    context_length: int | None = None
    check: Limits = Limits()
    smoke: Smoke | None = None

    @property
    def format(self) -> str:
        """Name of the output format."""
        return str(self.__struct_config__.tag)

    def bind(self, model: str, decoder: Decoder) -> "Recipe":
        """A recipe for any model as one of this model; its context is the model's at most."""
        return msgspec.structs.replace(
            self,
            name=f"{model}-{self.name}",
            model=model,
            context_length=min(self.context_length or decoder.context, decoder.context),
            quantization=self.quantization.fit(decoder),
        )

    def with_engine(self, engine: Engine) -> "Recipe":
        """The same recipe, made by another engine."""
        return msgspec.structs.replace(self, engine=engine)

    def with_limit(self, max_kl: float) -> "Recipe":
        """The same recipe, with another limit on the mean KL from the source."""
        check = msgspec.structs.replace(self.check, max_kl=max_kl)
        return msgspec.structs.replace(self, check=check)

    def with_adapter_apart(self) -> "Recipe":
        """The same recipe, with its adapter in a file of its own."""
        return msgspec.structs.replace(self, adapter_apart=True)

    def with_codes(self, method: Method | None, equalize: bool | None) -> "Recipe":
        """The same recipe with codes chosen another way, which its name then says; None keeps."""
        old = self.quantization
        new = msgspec.structs.replace(
            old,
            method=method or old.method,
            equalize=old.equalize if equalize is None else equalize,
        )
        if new == old:
            return self
        words = [self.name, new.method, *(["equalized"] if new.equalize else [])]
        return msgspec.structs.replace(self, quantization=new, name="-".join(words))

    def with_equalization(self) -> "Recipe":
        """The same recipe with equalization, under the same name: gptq's companion by default."""
        return msgspec.structs.replace(
            self, quantization=msgspec.structs.replace(self.quantization, equalize=True)
        )

    def settings(self) -> dict[str, Any]:
        """The fields that change the artifact's bytes, defaults filled in."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        if not self.adapter_apart:  # as in artifacts that were made before there was a choice
            del fields["adapter_apart"]
        return {key: value for key, value in fields.items() if key not in BESIDE_THE_BYTES}
