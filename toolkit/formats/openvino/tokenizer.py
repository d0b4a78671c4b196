"""The tokenizer as networks that openvino-genai runs, made by openvino_tokenizers."""

import multiprocessing
import os
import re
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from toolkit.checkpoint import Checkpoint
from toolkit.errors import BuildError, CheckpointError, require

COUNTED = re.compile(r"Result_\d+")
# The conversion takes 100 MB beside what a build has: a large vocabulary gets a process for it.
ALONE_FROM_BYTES = 1 << 20


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write openvino_tokenizer and openvino_detokenizer, .xml and .bin each.

    CheckpointError when the tokenizer cannot be read or has something that they cannot express.
    """
    contents, source = checkpoint.tokenizer_contents(), checkpoint.folder
    if checkpoint.made_tokenizer:
        checkpoint.write_tokenizer(folder)
        source = folder
    if sum(map(len, contents.values())) < ALONE_FROM_BYTES:
        _convert(source, folder)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            pool.submit(_convert, source, folder).result()
        except BrokenProcessPool as error:
            raise BuildError(
                "the process that converts the tokenizer was killed",
                advice="most likely memory ran out: it takes about 200 MB",
            ) from error


def _convert(source: Path, folder: Path) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss torch aloud
    openvino, converter = require("openvino"), require("openvino_tokenizers")
    tokenizer = _read(source)
    try:
        networks = converter.convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # whatever a tokenizer's part raises
        raise CheckpointError(
            f"{source}: openvino_tokenizers cannot convert the tokenizer: {error}"
        ) from error
    for network, name in zip(networks, ("tokenizer", "detokenizer"), strict=True):
        _rename(network)
        openvino.save_model(network, folder / f"openvino_{name}.xml")


def _rename(network: Any) -> None:
    """Number the nodes anew: their names count what this process has made before."""
    for number, node in enumerate(network.get_ordered_ops()):
        name = f"{node.get_type_name()}_{number}"
        node.set_friendly_name(name)
        if node.get_type_name() == "Parameter":
            node.output(0).set_names({name})
    for output in network.outputs:
        output.set_names({name for name in output.get_names() if not COUNTED.fullmatch(name)})


def _read(folder: Path) -> Any:
    transformers = require("transformers")
    transformers.logging.set_verbosity_error()  # it would say of phi3_v that it does not know it
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises nothing narrower
        raise CheckpointError(
            f"{folder}: transformers cannot read the tokenizer: {error}"
        ) from error
