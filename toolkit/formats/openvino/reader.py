"""Read an artifact back with OpenVINO's own reader and dequantize it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.decoder import Decoder
from toolkit.errors import ArtifactError, require
from toolkit.formats.openvino.layout import MAIN_FILE as MAIN_FILE
from toolkit.formats.openvino.layout import factor_of, list_stacks
from toolkit.runner.sight import LANGUAGE, TEXT


def dequantize(folder: Path, decoder: Decoder) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (checkpoint name, float32 weights) for every tensor of the decoder.

    ArtifactError when one is missing.
    """
    constants = read_constants(folder)
    places = {
        name: (stack, number)
        for stack, names in list_stacks(decoder).items()
        for number, name in enumerate(names)
    }
    for name, shape in decoder.shapes().items():
        constant, part = places.get(name, (name, None))
        if constant not in constants:
            raise ArtifactError(f"{folder}: {name} is missing", advice="build the artifact again")
        values = decode(constants, constant, part).reshape(shape)
        yield name, values / np.float32(factor_of(decoder, name))


def decode(constants: dict[str, Any], name: str, part: int | None = None) -> NDArray[np.float32]:
    """The values of a constant or a part of it, with zero points and scales where it has any."""
    values = unpack(constants[name], part)
    if f"{name}/scale" in constants:
        if f"{name}/zero_point" in constants:
            values -= unpack(constants[f"{name}/zero_point"], part)
        values *= unpack(constants[f"{name}/scale"], part)
    return values


def read_constants(folder: Path) -> dict[str, Any]:
    """Constants of the networks that the decoder is made of, by name."""
    core, files = require("openvino").Core(), [folder / f"{one}.xml" for one in (LANGUAGE, TEXT)]
    paths = files if files[0].exists() else [folder / MAIN_FILE]
    return {
        node.get_friendly_name(): node
        for path in paths
        for node in core.read_model(path).get_ordered_ops()
        if node.get_type_name() == "Constant"
    }


def unpack(constant: Any, part: int | None = None) -> NDArray[np.float32]:
    """A constant's values as float32 in its own shape, or one part of its first axis."""
    shape = tuple(constant.get_output_shape(0))
    kind = constant.get_element_type().get_type_name()
    data = constant.get_data()
    if kind not in ("i4", "u4"):
        values: NDArray[np.float32] = (data if part is None else data[part]).astype(np.float32)
        return values
    pairs = data.view(np.uint8).reshape(-1)
    if part is not None:
        pairs, shape = pairs.reshape(shape[0], -1)[part], shape[1:]
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(shape)
    if kind == "i4":
        return ((codes ^ 8).astype(np.float32)) - 8
    return codes.astype(np.float32)
