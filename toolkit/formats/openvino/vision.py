"""A model that sees, as openvino-genai's VLMPipeline takes it: four networks, a data file each.

openvino_vision_embeddings_model is the tower, openvino_vision_projection_model the projector,
openvino_text_embeddings_model the embedding, openvino_language_model the rest of the decoder. The
pipeline lays the tower's tokens out itself, with the separators that config.json holds.
"""

import json
from pathlib import Path

from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.errors import BuildError, PlanError, require
from toolkit.formats.openvino import graph
from toolkit.formats.openvino.layout import ALIGN_BYTES, Layout
from toolkit.formats.openvino.network import Network, Value
from toolkit.formats.openvino.recipe import Kind, OpenvinoRecipe
from toolkit.formats.openvino.tower import add_projector, add_tower, place_module
from toolkit.runner.sight import LANGUAGE, PROJECTOR, TEXT, TOWER
from toolkit.stream import DataFile
from toolkit.vision import VisionEncoder, check_precision

DEFAULT: Kind = "int8"  # of the tower's matrices
# openvino-genai's versions that exchange a picture's height and width where they lay out its crops:
# seen with these. The projector puts that right, and would put a right layout wrong.
EXCHANGING = ("2026.4.1",)
# Measured with CLIP-L's width. The runner looks at one crop at a time, which takes 61 MB; of each
# it keeps pixels, merged patches and features, 7.2 MB, and some copies.
LOOKING_BYTES = 70_000_000
CROP_BYTES = 10_000_000
WIDER_BYTES = 2  # of a weight of the tower that is float16 in the file and float32 in memory
NOTE = (
    f"the projector undoes what VLMPipeline of openvino-genai {', '.join(EXCHANGING)} does to "
    "crops; for that pipeline take no other version"
)


def check_vision(recipe: OpenvinoRecipe, decoder: Decoder) -> None:
    """PlanError for what a recipe cannot ask of a model that sees, or of one that does not."""
    where, wanted = f"{recipe.name}: quantization.vision", recipe.quantization.vision
    is_low = wanted == "int4"
    check_precision(where, wanted, decoder.vision, is_low=is_low, allowed="int8 (3 %), f16")
    if decoder.vision and recipe.provider != "cpu":
        raise PlanError(
            f"{recipe.name}: provider: got {recipe.provider}; a model that reads pictures was run "
            "on CPUs only; allowed cpu"
        )


def count_memory(recipe: OpenvinoRecipe, decoder: Decoder, context_length: int) -> int:
    """Bytes that seeing takes beside the stored weights: as many pictures as the context holds."""
    vision = _eyes(decoder)
    is_widened = recipe.quantization.vision == "f16"
    widened_bytes = WIDER_BYTES * vision.count_weights() if is_widened else 0
    return LOOKING_BYTES + CROP_BYTES * vision.count_crops(context_length) + widened_bytes


def lay_out(recipe: OpenvinoRecipe, decoder: Decoder) -> DataFile:
    """Place every tensor: the language model's first, then each other network's file."""
    first = graph.lay_out(recipe, decoder)
    layouts = {LANGUAGE: first}
    layouts |= {name: net.layout for name, net in _connect(recipe, decoder, first).items()}
    *_, last = layouts.values()
    others = [(f"{name}.bin", one.start) for name, one in layouts.items() if one.start]
    return DataFile(
        f"{LANGUAGE}.bin",
        last.start + last.end,
        tuple(piece for one in layouts.values() for piece in one.pieces),
        tuple(constant for one in layouts.values() for constant in one.constants),
        tuple(others),
    )


def write_networks(
    folder: Path, recipe: OpenvinoRecipe, decoder: Decoder, checkpoint: Checkpoint
) -> None:
    """Write the four networks, config.json with the separators, preprocessor_config.json."""
    _check_runtime()
    graph.make_network(recipe, decoder).write(folder / f"{LANGUAGE}.xml")
    first = graph.lay_out(recipe, decoder)
    for name, net in _connect(recipe, decoder, first).items():
        net.write(folder / f"{name}.xml")
    fields = dict(checkpoint.config.fields)
    names = _eyes(decoder).names
    fields["sub_GN"] = checkpoint.read(names.row_separator).tolist()
    fields["glb_GN"] = checkpoint.read(names.image_separator).tolist()
    _write_json(folder / "config.json", fields)
    preprocessor = (checkpoint.folder / "preprocessor_config.json").read_bytes()
    (folder / "preprocessor_config.json").write_bytes(preprocessor)


def _check_runtime() -> None:
    """BuildError for a runtime that may lay out a picture otherwise than the projector expects."""
    found = str(require("openvino_genai").get_version())
    if not found.startswith(EXCHANGING):
        raise BuildError(
            f"openvino-genai {found}: whether it lays out a picture's crops with height and width "
            f"exchanged, as the projector has to put right, is known of {', '.join(EXCHANGING)}",
            advice=f"install openvino-genai=={EXCHANGING[-1]} to build",
        )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _eyes(decoder: Decoder) -> VisionEncoder:
    if decoder.vision is None:
        raise ValueError("this model reads no pictures")
    return decoder.vision


def _connect(recipe: OpenvinoRecipe, decoder: Decoder, first: Layout) -> dict[str, Network]:
    """The networks beside the language model, their files one behind the other."""
    found: dict[str, Network] = {}
    end = first.end
    for name, make in ((TEXT, _make_text), (TOWER, _make_tower), (PROJECTOR, _make_projector)):
        layout = Layout(recipe.quantization, dict(decoder.all_shapes()))
        layout.start = -(-end // ALIGN_BYTES) * ALIGN_BYTES
        found[name] = make(recipe, decoder, Network(name, layout))
        end = layout.start + layout.end
    return found


def _make_text(recipe: OpenvinoRecipe, decoder: Decoder, net: Network) -> Network:
    """input_ids [batch, n] to inputs_embeds [batch, n, hidden]."""
    name = decoder.names.embedding
    net.layout.add_matrix(name, recipe.quantization.embedding or DEFAULT)
    ids = net.parameter("input_ids", "i64", "?,?")
    net.give(graph.look_up(net, decoder, net.matrix(name), ids), "inputs_embeds")
    return net


def _make_tower(recipe: OpenvinoRecipe, decoder: Decoder, net: Network) -> Network:
    """pixel_values [n, 3, size, size] to last_hidden_state [n, patches ** 2, width]."""
    vision = _eyes(decoder)
    names = vision.names
    elsewhere = (names.row_separator, names.image_separator, names.project_in, names.project_out)
    for name in vision.list_used():
        if not name.startswith(elsewhere):
            place_module(net.layout, vision, name, recipe.quantization.vision or DEFAULT)
    pixels = net.parameter("pixel_values", "f32", f"?,3,{vision.image_size},{vision.image_size}")
    net.give(add_tower(net, vision, pixels), "last_hidden_state")
    return net


def _make_projector(recipe: OpenvinoRecipe, decoder: Decoder, net: Network) -> Network:
    """input [1, n, merged_width], a picture's tokens, to last_hidden_state [1, n, hidden]."""
    vision, layout = _eyes(decoder), net.layout
    layout.add_plain(vision.names.row_separator, "f32")
    for module in (vision.names.project_in, vision.names.project_out):
        for name in (f"{module}.weight", f"{module}.bias"):
            place_module(layout, vision, name, recipe.quantization.vision or DEFAULT)
    rows = net.parameter("input", "f32", f"?,?,{vision.merged_width}")
    net.give(add_projector(net, vision, _reorder(net, vision, rows)), "last_hidden_state")
    return net


def _reorder(net: Network, vision: VisionEncoder, tokens: Value) -> Value:
    """A picture's tokens in the model's order, where the runtime exchanged height and width.

    Its lines are as long as the first separator says: `found` crops, which are the rows of the
    picture, not its columns. Where both are the same number, nothing moves. All in whole numbers.
    """
    side = vision.side
    zero, one, wide = net.integer(0), net.integer(1), net.integer(side)

    def divide(value: Value, by: Value) -> Value:
        return net.add("Divide", value, by)

    def rest(value: Value, by: Value) -> Value:
        return net.add("FloorMod", value, by)

    def span(value: Value) -> Value:
        return net.add("Range", zero, value, one, dtype="i64", output_type="i64")

    def add(left: Value, right: Value) -> Value:
        return net.add("Add", left, right)

    def multiply(left: Value, right: Value) -> Value:
        return net.add("Multiply", left, right)

    shape = net.add("ShapeOf", tokens, dtype="i64", output_type="i64")
    count = net.add("Gather", shape, one, zero, batch_dims=0)
    apart = net.add("Abs", net.add("Subtract", tokens, net.constant(vision.names.row_separator)))
    apart = net.add("ReduceMax", apart, net.integers(0, 1, 3), keep_dims=False)
    is_end = net.add("Equal", apart, net.number(0.0), dtype="boolean")
    places = net.add("Select", is_end, span(count), count, dtype="i64")
    line = net.add("ReduceMin", places, net.integers(0), keep_dims=False)
    tail_size = net.integer(side * (side + 1) + 1)
    tail = net.add("Subtract", count, tail_size)
    rows, columns = divide(line, wide), divide(divide(tail, add(line, one)), wide)
    width = multiply(columns, wide)
    size = multiply(multiply(rows, wide), add(width, one))
    token = span(add(size, tail_size))
    y, x = divide(token, add(width, one)), rest(token, add(width, one))
    crop = add(multiply(divide(y, wide), columns), divide(x, wide))
    down = add(multiply(divide(crop, rows), wide), rest(y, wide))
    across = add(multiply(rest(crop, rows), wide), rest(x, wide))
    is_separator = net.add("Equal", x, width, dtype="boolean")
    inside = add(multiply(down, add(line, one)), across)
    inside = net.add("Select", is_separator, line, inside, dtype="i64")
    behind = add(net.add("Subtract", token, size), tail)
    is_inside = net.add("Less", token, size, dtype="boolean")
    source = net.add("Select", is_inside, inside, behind, dtype="i64")
    return net.add("Gather", tokens, source, one, batch_dims=0)
