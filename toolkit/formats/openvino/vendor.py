"""The vendor's way: optimum-intel's export with NNCF's weight compression (optimum-cli)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.errors import ArtifactError, PlanError, require
from toolkit.formats.openvino.reader import MAIN_FILE, decode, unpack
from toolkit.formats.openvino.recipe import OpenvinoRecipe
from toolkit.recipe import Recipe
from toolkit.vendor import Command, Export, Places, Vendor, measure_bf16

VENDOR = Vendor(
    name="openvino",
    title="optimum-intel with NNCF",
    packages=("optimum-intel", "optimum", "nncf", "openvino", "torch", "transformers"),
    uses_torch=True,
    modules=("torch", "nncf", "openvino_tokenizers", "optimum.intel.openvino"),
    # NNCF reports its use to Google Analytics unasked, but not from CI jobs.
    variables={"CI": "true"},
)
# 9.9 to 10.2 GB for 7.64 GB of bf16 weights.
MEMORY_FACTOR = 1.25
NORM = re.compile(r"__module\.(.*norm)/")
WEIGHTS = ("_openvino_orig_weight", "weight")  # what the constant of a linear is called
BASE_BYTES = 800_000_000  # Python with torch, transformers and NNCF imported
WEIGHT_FORMATS = {"int4": "int4", "int8": "int8", "f16": "fp16"}


def plan_export(recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint, places: Places) -> Export:
    """optimum's command; PlanError when it has no option for what the recipe asks."""
    recipe = cast(OpenvinoRecipe, recipe)
    del decoder
    argv = (
        places.python, "-m", "optimum.commands.optimum_cli", "export", "openvino",
        "--model", str(checkpoint.folder), "--task", "text-generation-with-past",
        *_quantization_options(recipe), str(places.out),
    )  # fmt: skip
    return Export(
        commands=(Command("optimum-cli export openvino", argv),),
        memory_bytes=BASE_BYTES + round(MEMORY_FACTOR * measure_bf16(checkpoint)),
        scratch_bytes=measure_bf16(checkpoint),  # the float16 network, before it is compressed
    )


def dequantize(folder: Path, decoder: Decoder) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Read optimum's artifact back: (checkpoint name, float32); norms go by where they are used."""
    operations = require("openvino").Core().read_model(folder / MAIN_FILE).get_ordered_ops()
    constants = {o.get_friendly_name(): o for o in operations if o.get_type_name() == "Constant"}
    norms = _find_norms(operations)
    for name, shape in decoder.shapes().items():
        module = name.removesuffix(".weight")
        found = next((n for n in (f"self.{module}.{w}" for w in WEIGHTS) if n in constants), "")
        if module in norms:
            yield name, unpack(norms[module]).reshape(shape)
        elif found:
            yield name, decode(constants, found).reshape(shape)
        else:
            raise ArtifactError(f"{folder / MAIN_FILE}: {module} is not there")


def _find_norms(operations: list[Any]) -> dict[str, Any]:
    """The constants without a name of their own: by the module whose operation takes one."""
    found = {}
    for operation in operations:
        module = NORM.match(operation.get_friendly_name())
        for port in operation.inputs() if module else ():
            source = port.get_source_output().get_node()
            if source.get_type_name() == "Constant" and source.get_output_shape(0)[-1] > 1:
                found[module[1]] = source  # type: ignore[index]
    return found


def _quantization_options(recipe: OpenvinoRecipe) -> list[str]:
    wanted = recipe.quantization
    outer = (wanted.embedding, wanted.head)
    if wanted.overrides:
        raise _beyond(recipe, "quantization.overrides")
    options = ["--weight-format", WEIGHT_FORMATS[wanted.precision]]
    if wanted.precision != "int4":
        if outer != (wanted.precision, wanted.precision):
            raise _beyond(recipe, f"{wanted.precision} has embedding and head in the same type")
        return options
    options += ["--ratio", "1.0", "--group-size", str(wanted.group_size)]
    if wanted.symmetric:
        options.append("--sym")
    if outer == ("int4", "int4"):
        options.append("--all-layers")
    elif outer != ("int8", "int8"):
        raise _beyond(recipe, "with int4, embedding and head are both int8 or both int4")
    return options


def _beyond(recipe: OpenvinoRecipe, what: str) -> PlanError:
    wanted = recipe.quantization
    return PlanError(
        f"{recipe.name}: optimum cannot do this: {what}; got quantization.embedding: "
        f"{wanted.embedding}, head: {wanted.head}",
        advice="use `engine: native`",
    )
