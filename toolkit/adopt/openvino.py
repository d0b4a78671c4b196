"""An OpenVINO folder for openvino-genai, as optimum-intel writes it and OpenVINO publishes it."""

from pathlib import Path
from xml.etree import ElementTree

from toolkit.adopt.found import (
    CONFIGS,
    Found,
    Given,
    find_chat,
    list_tokenizer,
    read_config_file,
    read_ids,
    require_file,
)
from toolkit.errors import ArtifactError
from toolkit.families import read_decoder
from toolkit.formats.openvino import CACHE_BYTES, OVERHEAD_BYTES

MAIN = "openvino_model.xml"
PAIRS = ("openvino_model", "openvino_tokenizer", "openvino_detokenizer")


def inspect(given: Given) -> Found:
    """Read and check the folder; ArtifactError names file, key, found and allowed."""
    folder = given.path
    files = {}
    for stem in PAIRS:
        for suffix in (".xml", ".bin"):
            files[stem + suffix] = require_file(folder / (stem + suffix), "openvino-genai reads it")
        _check_network(folder / f"{stem}.xml")
    config = read_config_file(require_file(folder / "config.json", "it names the architecture"))
    decoder = read_decoder(config)
    generation = require_file(folder / "generation_config.json", "it names the stop ids")
    stops = read_ids(read_config_file(generation), "eos_token_id", decoder.vocab)
    chat, notes = find_chat(given, stops, decoder.vocab)
    context = given.choose_context(decoder.context, str(folder / "config.json"))
    return Found(
        format="openvino",
        engine="openvino_genai",
        provider=given.choose_provider(("cpu", "gpu", "npu")),
        package="openvino-genai",
        main_file=MAIN,
        files={**files, **{name: folder / name for name in CONFIGS}, **list_tokenizer(given)},
        chat=chat,
        context_length=context,
        valid_context=(1, context),
        data_bytes=(folder / "openvino_model.bin").stat().st_size,
        kv_bytes_per_token=decoder.kv_bytes_per_token(CACHE_BYTES),
        overhead_bytes=OVERHEAD_BYTES,
        notes=notes,
    )


def _check_network(path: Path) -> None:
    """ArtifactError unless the XML is a network whose constants lie within the .bin beside it."""
    data = path.with_suffix(".bin")
    end = 0
    try:
        for _, element in ElementTree.iterparse(path):
            if element.tag == "data" and "offset" in element.attrib:
                end = max(end, int(element.attrib["offset"]) + int(element.attrib["size"]))
            if element.tag == "layer":
                element.clear()
    except (ElementTree.ParseError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: not a network of OpenVINO: {error}") from error
    if not end:
        raise ArtifactError(f"{path}: not a network of OpenVINO: no constants in it")
    if data.stat().st_size < end:
        raise ArtifactError(
            f"{data}: found {data.stat().st_size} bytes; {path.name} reads {end}",
            advice="copy or download this file again",
        )
