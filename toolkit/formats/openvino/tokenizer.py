"""The tokenizer as networks that openvino-genai runs, made by openvino_tokenizers."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from toolkit.checkpoint import Checkpoint
from toolkit.errors import BuildError, UnsupportedError, require

TOKENIZER, DETOKENIZER = "openvino_tokenizer", "openvino_detokenizer"
COUNTED = re.compile(r"Result_\d+")
# The conversion takes 100 MB beside what a build has: a large vocabulary gets a process for it.
ALONE_FROM_BYTES = 1 << 20
# All that transformers reads of config.json: with it a tokenizer.json is taken as it is. What a
# checkpoint's own says may be a type, or rotary settings, that transformers stumbles over.
CONFIG = {"model_type": "phi3"}
# What the last tokenizer became, by the digest of its files: an artifact's is asked for twice, once
# to look at its ids and once to be written.
_made: dict[str, dict[str, bytes]] = {}


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write openvino_tokenizer and openvino_detokenizer, .xml and .bin each.

    UnsupportedError when transformers cannot read the tokenizer, or openvino_tokenizers has nothing
    for a part of it.
    """
    contents = checkpoint.tokenizer_contents()
    lines = [f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in contents.items()]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if digest not in _made:
        made = _make(checkpoint, sum(map(len, contents.values())))
        _made.clear()
        _made[digest] = made
    for name, data in _made[digest].items():
        (folder / name).write_bytes(data)


def _make(checkpoint: Checkpoint, size_bytes: int) -> dict[str, bytes]:
    """The networks' files, made in this process or, of a large tokenizer, in another."""
    with tempfile.TemporaryDirectory() as name:
        scratch, made = Path(name) / "source", Path(name) / "made"
        scratch.mkdir()
        made.mkdir()
        checkpoint.write_tokenizer(scratch)
        (scratch / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        convert = _convert if size_bytes < ALONE_FROM_BYTES else _convert_alone
        convert(scratch, made, str(checkpoint.tokenizer_folder))
        return {path.name: path.read_bytes() for path in sorted(made.iterdir())}


def _convert_alone(source: Path, folder: Path, where: str) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            pool.submit(_convert, source, folder, where).result()
        except BrokenProcessPool as error:
            raise BuildError(
                "the process that converts the tokenizer was killed",
                advice="most likely memory ran out: it takes about 200 MB",
            ) from error


def _convert(source: Path, folder: Path, where: str) -> None:
    """Convert the files in `source`; errors speak of `where`."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss torch aloud
    openvino, converter = require("openvino"), require("openvino_tokenizers")
    tokenizer = _read(source, where)
    try:
        networks = converter.convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # whatever a tokenizer's part raises
        raise UnsupportedError(
            f"{where}: openvino_tokenizers cannot convert the tokenizer: {error}"
        ) from error
    for network, name in zip(networks, (TOKENIZER, DETOKENIZER), strict=True):
        _rename(network)
        openvino.save_model(network, folder / f"{name}.xml")


def _rename(network: Any) -> None:
    """Number the nodes anew: their names count what this process has made before."""
    for number, node in enumerate(network.get_ordered_ops()):
        name = f"{node.get_type_name()}_{number}"
        node.set_friendly_name(name)
        if node.get_type_name() == "Parameter":
            node.output(0).set_names({name})
    for output in network.outputs:
        output.set_names({name for name in output.get_names() if not COUNTED.fullmatch(name)})


def _read(folder: Path, where: str) -> Any:
    transformers = require("transformers")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises nothing narrower
        raise UnsupportedError(
            f"{where}: transformers cannot read the tokenizer: {error}"
        ) from error
