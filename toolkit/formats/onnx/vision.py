"""The graphs of a model that sees: pictures to features, and features among token embeddings.

As onnxruntime-genai's type phi3v expects them: pixel_values and image_sizes in, image_features
out; then input_ids, below 0 where a picture stands, and image_features in, inputs_embeds out.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.decoder import Decoder
from toolkit.errors import PlanError
from toolkit.formats.onnx.algebra import Value, constant, count_to
from toolkit.formats.onnx.graph import add_embedding
from toolkit.formats.onnx.layout import Layout
from toolkit.formats.onnx.nodes import Graph, make_proto
from toolkit.formats.onnx.recipe import OnnxRecipe
from toolkit.formats.onnx.tower import BLOCK_SIZE, FLOAT, add_projector, add_tower
from toolkit.runner.engines.onnxruntime_genai import SWITCHES
from toolkit.runner.images import HALF_TAPS
from toolkit.vision import Preprocessing, VisionEncoder, check_precision

VISION_FILE = "vision.onnx"
TYPE = "phi3v"  # of model, for onnxruntime-genai
EMBEDDING_FILE = "embedding.onnx"
DEFAULT = "int8"  # of the tower's matrices
# Resident while crops go through layers of CLIP-L's width, for each: 650 MB for 16 and the whole.
# onnxruntime-genai gives the tower all pictures of a prompt at once.
CROP_BYTES = 39_000_000
EXTENSIONS = "com.microsoft.extensions"
TAPS = 4
WIDER_BYTES = 2  # of a weight that is float16 in the file and float32 in memory


def check_vision(recipe: OnnxRecipe, decoder: Decoder) -> None:
    """PlanError for what a recipe cannot ask of a model that sees, or of one that does not."""
    where, wanted = f"{recipe.name}: quantization.vision", recipe.quantization.vision
    vision = decoder.vision
    check_precision(
        where, wanted, vision, is_low=wanted == "int4", allowed="int8 (3 %), fp16, fp32"
    )
    if vision is None:
        return
    if recipe.io_dtype != FLOAT:
        raise PlanError(
            f"{recipe.name}: a model that reads pictures is written for provider cpu with "
            "precision int4 or fp32 only",
            advice="set provider: cpu and quantization.precision: int4",
        )
    columns = (vision.width, vision.intermediate, vision.hidden)
    if (wanted or DEFAULT) == "int8" and any(count % BLOCK_SIZE for count in columns):
        raise PlanError(
            f"{where}: int8 goes in blocks of {BLOCK_SIZE}, which do not divide all of "
            f"{', '.join(map(str, columns))}; allowed fp16, fp32"
        )


def count_memory(recipe: OnnxRecipe, decoder: Decoder, context_length: int) -> int:
    """Bytes that seeing takes beside the stored weights: as many pictures as the context holds.

    onnxruntime widens fp16 when it loads.
    """
    if decoder.vision is None:
        return 0
    is_widened = recipe.quantization.vision == "fp16"
    widened_bytes = WIDER_BYTES * decoder.vision.count_weights() if is_widened else 0
    return CROP_BYTES * decoder.vision.count_crops(context_length) + widened_bytes


def check_context(recipe: OnnxRecipe, decoder: Decoder, context_length: int) -> None:
    """PlanError for a context that hides LongRoPE's switch from the runner."""
    original, rope = decoder.rope.original_context, decoder.rope
    if decoder.vision and rope.is_long and context_length > original != SWITCHES[TYPE]:
        raise PlanError(
            f"{recipe.name}: context_length: got {context_length}; LongRoPE's long factors hold "
            f"beyond {original} tokens here, and the runner changes to them at {SWITCHES[TYPE]}",
            advice=f"set context_length to {original} or less, or give --context",
        )


def make_vision(layout: Layout, vision: VisionEncoder, producer: str) -> Any:
    """The graph from pixel_values [n, 1 + crops, 3, size, size] and image_sizes [n, 2]."""
    graph = Graph.start(layout)
    sizes = Value(graph, "image_sizes") // vision.image_size
    rows, columns = sizes.pick(0, axis=1), sizes.pick(1, axis=1)
    pixels = _rebuild_global(graph, vision, rows, columns)
    crops = _keep_real(vision, pixels, rows * columns + 1)
    features = add_tower(graph, vision, crops)
    table = add_projector(vision, _merge(graph, vision, features))
    places = _find_places(vision, crops.size(0), rows, columns)
    table.make("image_features", "Gather", places, axis=0)
    size = vision.image_size
    return make_proto(
        graph,
        "vision",
        [
            graph.info("pixel_values", FLOAT, ["num_images", "max_num_crops", 3, size, size]),
            graph.info("image_sizes", "int64", ["num_images", 2]),
        ],
        [graph.info("image_features", FLOAT, ["num_image_tokens", vision.hidden])],
        producer,
    )


def make_embedding(layout: Layout, vision: VisionEncoder, producer: str) -> Any:
    """The graph from input_ids [batch, n] and image_features to inputs_embeds [batch, n, hidden].

    Ids below 0 take the features in order of position, whatever their number says.
    """
    graph = Graph.start(layout)
    ids = Value(graph, "input_ids")
    known = ids.apply("Max", 0)
    rows = Value(graph, add_embedding(graph, known.name))
    places = (ids < 0).apply("NonZero").transpose(1, 0)
    rows.make("inputs_embeds", "ScatterND", places, "image_features")
    io_dtype = layout.recipe.io_dtype
    tokens = ["batch_size", "sequence_length"]
    return make_proto(
        graph,
        "embedding",
        [
            graph.info("input_ids", "int64", tokens),
            graph.info("image_features", FLOAT, ["num_image_tokens", vision.hidden]),
        ],
        [graph.info("inputs_embeds", io_dtype, [*tokens, vision.hidden])],
        producer,
    )


def _keep_real(vision: VisionEncoder, pixels: Value, owned: Value) -> Value:
    """Crops that pictures have, without those that only fill up: [crops, 3, size, size]."""
    slots = count_to(pixels.size(1))
    is_real = (slots.expand(0) < owned.expand(1)).shape(-1)
    size = vision.image_size
    return pixels.shape(-1, 3, size, size).apply("Compress", is_real, axis=0)


def _merge(graph: Graph, vision: VisionEncoder, features: Value) -> Value:
    """Four patches to a row, then the two separators as rows: [crops * side ** 2 + 2, merged]."""
    side, names, merged = vision.side, vision.names, vision.merged_width
    rows = features.shape(-1, side, 2, side, 2, vision.width).transpose(0, 1, 3, 2, 4, 5)
    separators = (names.row_separator, names.image_separator)
    ends = [Value(graph, name).shape(1, -1) for name in separators]
    return rows.shape(-1, merged).apply("Concat", *ends, axis=0)


def _find_places(vision: VisionEncoder, crops: Value, rows: Value, columns: Value) -> Value:
    """For each token of all pictures, its row of the merged table: int64 [tokens].

    A picture is its lines of crops with a separator behind each line, the separator of pictures,
    and the global crop's lines. Whole numbers all the way: there is no loop over pictures.
    """
    side, one = vision.side, vision.side**2
    row_end, picture_end = crops * one, crops * one + 1
    line = columns * side + 1
    lines = rows * side * line
    counts = lines + 1 + side * (side + 1)
    ends = counts.apply("CumSum", 0)
    token = count_to(ends.pick(-1))
    picture = _count_below(ends, token)
    place = token - (ends - counts).pick(picture)
    owned = rows * columns + 1
    first = (owned.apply("CumSum", 0) - owned).pick(picture)
    lines, line = lines.pick(picture), line.pick(picture)
    y, x = place // line, place % line
    crop = first + 1 + (y // side) * columns.pick(picture) + x // side
    in_grid = x.equals(line - 1).choose(row_end, crop * one + (y % side) * side + x % side)
    rest = place - lines - 1
    y, x = rest // (side + 1), rest % (side + 1)
    in_global = x.equals(side).choose(row_end, first * one + y * side + x)
    behind = place.equals(lines).choose(picture_end, in_global)
    return (place < lines).choose(in_grid, behind)


def _count_below(ends: Value, token: Value) -> Value:
    """Which picture a token belongs to: the number of pictures that end at or before it."""
    graph = ends.graph
    is_past = token.expand(1).apply("GreaterOrEqual", ends.expand(0))
    number = is_past.apply("Cast", to=graph.elem("int64"))
    return number.apply("ReduceSum", graph.integers(1), keepdims=0)


def _rebuild_global(graph: Graph, vision: VisionEncoder, rows: Value, columns: Value) -> Value:
    """Pixels with the global crop made anew of the others, as the model was trained.

    onnxruntime-genai's own processor widens the filter where a picture shrinks; the source takes
    four pixels a side. A picture is a whole number of crops, so they lie at the same places
    everywhere, exactly on a pixel where that number is odd.
    """
    pixels, size = Value(graph, "pixel_values"), vision.image_size
    across, down = _find_taps(graph, size, columns, "x"), _find_taps(graph, size, rows, "y")
    crop_values = 3 * size * size
    first = count_to(pixels.size(0)) * pixels.size(1) + 1
    # Axes: picture, channel, y, its tap, x, its tap.
    channels = constant(graph, "channels", np.arange(3).reshape(1, 3, 1, 1, 1, 1) * size * size)
    down_crop = (down.place // size) * columns.expand(1, 2)
    rows_at = down_crop * crop_values + (down.place % size) * size
    columns_at = (across.place // size) * crop_values + across.place % size
    starts = (first * crop_values).expand(1, 2, 3, 4, 5) + channels
    places = (starts + rows_at.expand(1, 4, 5)) + columns_at.expand(1, 2, 3)
    taken = pixels.shape(-1).pick(places)
    weighted = taken * down.weight.expand(1, 2, 4, 5) * across.weight.expand(1, 2, 3, 4)
    summed = weighted.apply("ReduceSum", graph.integers(3, 5), keepdims=0)
    rest = pixels.cut(1, np.iinfo(np.int64).max, 1)
    return summed.expand(1).apply("Concat", rest, axis=1)


@dataclass(frozen=True)
class _Taps:
    """Where a filter takes its pixels along an axis: place [n, size, 4], weight [n, 4]."""

    place: Value
    weight: Value


def _find_taps(graph: Graph, size: int, scale: Value, axis: str) -> _Taps:
    steps = constant(graph, f"steps_{axis}", np.arange(-1, TAPS - 1).reshape(1, 1, TAPS))
    outputs = constant(graph, f"outputs_{axis}", np.arange(size).reshape(1, size, 1))
    on_pixel = constant(graph, f"on_pixel_{axis}", np.array([[0, 1, 0, 0]], np.float32))
    between = constant(graph, f"between_{axis}", np.array([HALF_TAPS], np.float32))
    wide = scale.expand(1, 2)
    place = outputs * wide + (wide - 1) // 2 + steps
    place = place.apply("Max", 0).apply("Min", wide * size - 1)
    is_odd = (scale % 2).equals(1).expand(1)
    return _Taps(place, is_odd.choose(on_pixel, between))


def extend_config(config: dict[str, Any]) -> None:
    """Make genai_config.json that of a model that sees, in place."""
    model = config["model"]
    model["type"] = TYPE
    # Programs that do not know of the switch stay below it.
    longest = min(model["context_length"], SWITCHES[TYPE])
    config["search"]["max_length"] = longest
    inputs = {k: v for k, v in model["decoder"]["inputs"].items() if k != "input_ids"}
    model["decoder"]["inputs"] = {"inputs_embeds": "inputs_embeds", **inputs}
    model["embedding"] = {
        "filename": EMBEDDING_FILE,
        "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
        "outputs": {"inputs_embeds": "inputs_embeds"},
    }
    model["vision"] = {
        "filename": VISION_FILE,
        "inputs": {"pixel_values": "pixel_values", "image_sizes": "image_sizes"},
        "outputs": {"image_features": "image_features"},
    }


def make_processor(vision: VisionEncoder, preprocessing: Preprocessing) -> dict[str, Any]:
    """processor_config.json, for programs that leave pictures to onnxruntime-genai."""
    return {
        "processor": {
            "name": "image_processing",
            "transforms": [
                _operation("decode_image", "DecodeImage", color_space="BGR"),
                _operation("convert_to_rgb", "ConvertRGB"),
                _operation(
                    "phi3_image_transform", "Phi3ImageTransform",
                    num_crops=preprocessing.crops, num_img_tokens=vision.side**2,
                ),
            ],
        }
    }  # fmt: skip


def _operation(name: str, kind: str, **attributes: Any) -> dict[str, Any]:
    inner = {"name": name, "domain": EXTENSIONS, "type": kind}
    return {"operation": {**inner, "attrs": attributes} if attributes else inner}
