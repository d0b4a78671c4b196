"""What each way to choose codes is worth, by weights alone: no runtime, no vendor's environment.

    python -m bench.quality_codes --checkpoint FOLDER [--unrelated FOLDER] [--tokens N] [ROW ...]

Mean KL and top-1 agreement with the float32 source on two texts: the evaluation part of Python's
manual, whose other part calibrates, and all files of a folder that nothing calibrates on (Debian's
/usr/share/common-licenses by default), each plain, in sequences of 512 at even distances. `rtn`
rows are the vendors' defaults: their codes are the same bytes (tests/vendor). A ROW is a part of
its name. For checkpoints that fit into memory as float32.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, ClassVar
from unittest import mock

import msgspec
import numpy as np

from toolkit import calibrate as calibrating
from toolkit import fileio, formats
from toolkit.checkpoint import Checkpoint
from toolkit.coding import Calibrated, CodedWeights
from toolkit.decoder import Decoder
from toolkit.families import read_decoder
from toolkit.plan import make_plan
from toolkit.progress import ignore
from toolkit.quality import measures, reference, tokens
from toolkit.quality.rounding import read_rounded
from toolkit.quality.texts import Text, digest_ids, list_topics
from toolkit.stream import Output

LENGTH = 512
ROWS_AT_ONCE = 256  # of logits
GPTQ = {"method": "gptq"}
BOTH = {"method": "gptq", "equalize": True}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "onnx int4 32, rtn (default)": ("onnx", {"precision": "int4"}),
    "onnx int4 32, rtn, int8 head": ("onnx", {"precision": "int4", "head": "int8"}),
    "onnx int4 32, gptq": ("onnx", {"precision": "int4", **GPTQ}),
    "onnx int4 32, gptq equalized, int8 head": (
        "onnx",
        {"precision": "int4", "head": "int8", **BOTH},
    ),
    "openvino i4 64, rtn": ("openvino", {"precision": "int4", "group_size": 64}),
    "openvino i4 64, gptq equalized": (
        "openvino",
        {"precision": "int4", "group_size": 64, **BOTH},
    ),
    "mlx 4 bits 64, rtn (default)": ("mlx", {"bits": 4}),
    "mlx 4 bits 64, gptq equalized": ("mlx", {"bits": 4, **BOTH}),
    "mlx 4 bits 64, gptq equalized, 8-bit embedding": (
        "mlx",
        {"bits": 4, "embedding_bits": 8, **BOTH},
    ),
    "gguf q4_0, rtn (default)": ("gguf", {"precision": "q4_0"}),
    "gguf q4_0, gptq equalized": ("gguf", {"precision": "q4_0", **BOTH}),
    "gguf q4_k_m, rtn (default)": ("gguf", {"precision": "q4_k_m"}),
    "gguf q4_k_m, gptq equalized": ("gguf", {"precision": "q4_k_m", **BOTH}),
}
"""Format and quantization of each row; a tied head has the embedding's type, but in ONNX."""

Tensors = dict[str, Any]


class Weights:
    """Tensors in memory, for the reference forward."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = tensors

    def look_up(self, name: str, ids: Sequence[int]) -> Any:
        return self.tensors[name][list(ids)]

    def read(self, name: str) -> Any:
        return self.tensors[name]

    def project(self, name: str, inputs: Any) -> Any:
        return inputs @ self.tensors[name].T


class KeptWeights(CodedWeights):
    """An artifact's weights, which stay in memory; `kept` has them by the artifact."""

    kept: ClassVar[dict[int, Tensors]] = {}

    def code(self, name: str, inputs: Any) -> Iterator[tuple[slice, Any]]:
        if self._artifact.encoder_of(name) is None:  # rounded
            yield from super().code(name, inputs)
            return
        own = self.kept.setdefault(id(self._artifact), {})
        own[name] = np.empty(self._checkpoint.tensors[name].shape, np.float32)
        for rows, values in super().code(name, inputs):
            own[name][rows] = values
            yield rows, values


def cut(checkpoint: Checkpoint, name: str, text: str, count: int) -> Text:
    """`count` tokens of a text, in sequences at even distances."""
    ids = tokens.encode(tokens.read_tokenizer(checkpoint), text)
    texts = count // LENGTH
    step = max(1, (len(ids) - LENGTH) // texts)
    sequences = tuple(tuple(ids[i * step : i * step + LENGTH]) for i in range(texts))
    return Text(name, digest_ids(sequences), sequences)


def make(
    checkpoint: Checkpoint, decoder: Decoder, chosen: Mapping[str, Any], text: Text, work: Path
) -> Iterator[tuple[str, Tensors, Any]]:
    """Yield each row's tensors and its head; those of one pass of the text are made together."""
    artifacts, plans = {}, {}
    for row, (format_, quantization) in chosen.items():
        recipe = {"format": format_, "model": "m", "title": row, "quantization": quantization}
        plans[row] = make_plan(msgspec.convert(recipe, formats.get(format_).RECIPE), decoder)
        if plans[row].recipe.quantization.is_calibrated:
            folder = work / str(len(artifacts))
            folder.mkdir()
            fileio.reserve(folder / "data", plans[row].data.size_bytes)
            output = Output(plans[row].data, folder / "data")
            artifacts[row] = Calibrated(output, plans[row].recipe.quantization, set())
    with mock.patch.object(calibrating, "CodedWeights", KeptWeights):
        made = list(artifacts.values())
        folders = [one.output.path.parent for one in made]
        calibrating.calibrate(checkpoint, decoder, text, made, folders, ignore)
    for row, plan in plans.items():
        rounded = list(read_rounded(plan.data, checkpoint))
        tensors = dict(reversed(rounded))  # of a tied head that is stored twice, the embedding
        head = dict(rounded)[decoder.head_name]
        if row in artifacts:
            if artifacts[row].error:
                raise SystemExit(f"{row}: {artifacts[row].error}")
            tensors |= KeptWeights.kept.pop(id(artifacts[row]), {})
            tensors |= {n: checkpoint.read(n) for n, s in decoder.shapes().items() if len(s) == 1}
        yield row, tensors, head


def measure(pairs: Sequence[Any], heads: tuple[Any, Any], text: Text) -> str:
    """Mean KL and top-1 of one text; `pairs` are the source's states and the artifact's."""
    found = []
    for own, states, ids in zip(*pairs, text.sequences, strict=True):
        for start in range(0, LENGTH, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            logits = [one[rows] @ head.T for one, head in zip((own, states), heads, strict=True)]
            found.append(measures.compare_logits(*logits, ids[rows]))
    numbers = measures.join(found).summarize()
    kl, top1 = numbers["mean KL"], numbers["top-1 agreement"]
    return f"{kl.value:.4f} ± {kl.error:.4f}, {top1.value:.1%}"


def main() -> None:
    """Print a table of the chosen rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW")
    add("--checkpoint", type=Path, required=True)
    add("--unrelated", type=Path, default=Path("/usr/share/common-licenses"))
    add("--tokens", type=int, default=2048, help="of each text to measure on")
    add("--calibration-tokens", type=int, default=8192)
    options = parser.parse_args()
    checkpoint = Checkpoint.open(options.checkpoint)
    decoder = read_decoder(checkpoint.config)
    files = sorted(path for path in options.unrelated.iterdir() if not path.is_symlink())
    plain = {
        "manual": " ".join(topics[name].strip() for name in list_topics("evaluation")),
        options.unrelated.name: "\n".join(path.read_text("utf-8") for path in files),
    }
    texts = [cut(checkpoint, name, text, options.tokens) for name, text in plain.items()]
    manual = " ".join(topics[name].strip() for name in list_topics("calibration"))
    calibration = cut(checkpoint, "calibration", manual, options.calibration_tokens)
    chosen = {
        row: how
        for row, how in ROWS.items()
        if not options.rows or any(word in row for word in options.rows)
    }
    source = {name: checkpoint.read(name) for name in decoder.shapes()}
    own = [reference.final_states_of(Weights(source), decoder, t.sequences) for t in texts]
    print("| |" + "|".join(text.name for text in texts) + "|\n|---" + "|---" * len(texts) + "|")
    with tempfile.TemporaryDirectory() as work:
        for row, tensors, head in make(checkpoint, decoder, chosen, calibration, Path(work)):
            cells = []
            for text, states in zip(texts, own, strict=True):
                after = reference.final_states_of(Weights(tensors), decoder, text.sequences)
                heads = source[decoder.head_name], head
                cells.append(measure((states, after), heads, text))
            print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
