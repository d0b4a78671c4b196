"""The vendor's way: llama.cpp's convert_hf_to_gguf.py and llama-quantize.

No wheel has both, so the environment unpacks llama.cpp's sources out of a pinned source package
(llama-cpp-python carries them) and builds llama-quantize: a C++ compiler is needed once.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.errors import PlanError
from toolkit.formats.gguf.layout import DATA_FILE
from toolkit.formats.gguf.reader import dequantize
from toolkit.formats.gguf.recipe import GgufQuantization, GgufRecipe
from toolkit.formats.gguf.stripping import name_model, texts_to_strip
from toolkit.formats.gguf.tokenizer import KNOWN_STOPS
from toolkit.formats.gguf.vocabulary import Token, read_vocabulary
from toolkit.recipe import Recipe
from toolkit.vendor import (
    LOCKS,
    Command,
    Export,
    Places,
    Vendor,
    binary_of,
    measure_bf16,
    python_of,
)

# The source package of gguf-sources.txt, as it names its archive and its folder.
SOURCE = "llama_cpp_python-0.3.36"
LLAMA_CPP = f"{SOURCE}/vendor/llama.cpp"
BUILD = f"{LLAMA_CPP}/build"
QUANTIZE = f"{BUILD}/bin/llama-quantize"
BASE_BYTES = 1_000_000_000  # both tools go tensor by tensor: 1.0 GB for 7.64 GB of weights
# The converter's lossless type of each checkpoint's.
LOSSLESS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
UNQUANTIZED = ("f16", "bf16")
EXTRA_STOPS = ("eom", "eot")  # what GGUF has room for besides the tokens llama.cpp knows by text


def list_steps(folder: Path) -> tuple[Command, ...]:
    """Fetch and unpack llama.cpp's sources, build llama-quantize."""
    python, cmake = str(python_of(folder)), str(binary_of(folder, "cmake"))
    path = os.pathsep.join([str(binary_of(folder, "x").parent), os.environ.get("PATH", "")])
    fetch = (
        python, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps",
        "--no-build-isolation", "--no-binary", ":all:", "--require-hashes",
        "--dest", str(folder), "--requirement", str(LOCKS / "gguf-sources.txt"),
    )  # fmt: skip
    unpack = (python, "-m", "tarfile", "-e", str(folder / f"{SOURCE.lower()}.tar.gz"), str(folder))
    configure = (
        cmake, "-G", "Ninja", "-S", str(folder / LLAMA_CPP), "-B", str(folder / BUILD),
        "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF",
        "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF",
    )  # fmt: skip
    compile_ = (cmake, "--build", str(folder / BUILD), "--target", "llama-quantize")
    return (
        Command("fetch llama.cpp's sources", fetch),
        Command("unpack llama.cpp's sources", unpack),
        Command("configure llama.cpp", configure, {"PATH": path}),
        Command("compile llama-quantize", compile_, {"PATH": path}),
    )


__all__ = ["VENDOR", "dequantize", "plan_export"]  # its files read back like ours

VENDOR = Vendor(
    name="gguf",
    title="llama.cpp's converter and llama-quantize",
    packages=("torch", "transformers", "sentencepiece"),
    uses_torch=True,
    modules=("torch", "transformers", "sentencepiece"),
    files=(f"{LLAMA_CPP}/convert_hf_to_gguf.py", QUANTIZE),
    steps=list_steps,
    versions={"llama.cpp": SOURCE},
)


def plan_export(recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint, places: Places) -> Export:
    """Convert without loss, quantize, name the stop ids; PlanError where that cannot be done."""
    settings = cast(GgufRecipe, recipe).quantization
    if settings.overrides:
        raise PlanError(
            f"{recipe.name}: quantization.overrides: llama-quantize is not asked for them here",
            advice="use `engine: native`",
        )
    precision = settings.precision
    is_plain = precision in UNQUANTIZED and not (settings.embedding or settings.head)
    vocabulary = read_vocabulary(checkpoint.tokenizer_folder, decoder.vocab)
    if not vocabulary.is_byte_level:
        _check_tokenizer(recipe, checkpoint)
    tokens = vocabulary.tokens
    stops = _extra_stops(recipe, checkpoint, tokens)
    first, second = places.scratch / "lossless.gguf", places.scratch / "quantized.gguf"
    final = places.out / DATA_FILE
    if is_plain:
        made = first if stops else final
        commands = [_convert(recipe, checkpoint, tokens, places, precision, made)]
    else:
        lossless = LOSSLESS[checkpoint.tensors[decoder.names.embedding].dtype]
        made = second if stops else final
        commands = [
            _convert(recipe, checkpoint, tokens, places, lossless, first),
            _quantize(places, first, made, settings),
        ]
    if stops:
        commands.append(_name_stops(places, made, final, stops))
    strippers = texts_to_strip(tokens)
    return Export(
        commands=tuple(commands),
        memory_bytes=BASE_BYTES,
        scratch_bytes=2 * measure_bf16(checkpoint),
        notes=(_stripping_note(strippers),) if strippers else (),
    )


def _check_tokenizer(recipe: Recipe, checkpoint: Checkpoint) -> None:
    if not (checkpoint.folder / "tokenizer.model").is_file():
        raise PlanError(
            f"{recipe.name}: convert_hf_to_gguf.py needs tokenizer.model, which "
            f"{checkpoint.folder} lacks",
            advice="use `engine: native`, which reads tokenizer.json",
        )


def _extra_stops(
    recipe: Recipe, checkpoint: Checkpoint, tokens: Sequence[Token]
) -> list[tuple[str, int]]:
    """Stop ids that neither the converter nor llama.cpp knows, with the key that will name each."""
    others = [i for i in checkpoint.stop_ids if tokens[i].text not in KNOWN_STOPS]
    if len(others) > len(EXTRA_STOPS):
        raise PlanError(
            f"{recipe.name}: a GGUF file can name {len(EXTRA_STOPS)} more stop tokens; "
            f"this checkpoint has {len(others)}: {[tokens[i].text for i in others]}"
        )
    return list(zip(EXTRA_STOPS, others, strict=False))


def _convert(
    recipe: Recipe, checkpoint: Checkpoint, tokens: Sequence[Token], places: Places, kind: str,
    path: Path,
) -> Command:  # fmt: skip
    script = str(places.environment / LLAMA_CPP / "convert_hf_to_gguf.py")
    argv = (
        places.python, script, str(checkpoint.folder), "--outtype", kind, "--outfile", str(path),
        "--model-name", name_model(recipe.model, tokens),
    )  # fmt: skip
    return Command("convert_hf_to_gguf.py", argv)


def _quantize(places: Places, source: Path, path: Path, settings: GgufQuantization) -> Command:
    types: list[str] = []
    if settings.embedding:
        types += ["--token-embedding-type", settings.embedding]
    if settings.head:
        types += ["--output-tensor-type", settings.head]
    argv = (
        str(places.environment / QUANTIZE), *types, str(source), str(path),
        settings.precision.upper(),
    )  # fmt: skip
    return Command("llama-quantize", argv)


def _name_stops(places: Places, source: Path, path: Path, stops: list[tuple[str, int]]) -> Command:
    """llama.cpp's own tool for metadata: the converter names one end of generation only."""
    scripts = places.environment / LLAMA_CPP / "gguf-py" / "gguf" / "scripts"
    named = [word for key, token in stops for word in ("--special-token-by-id", key, str(token))]
    argv = (
        places.python, str(scripts / "gguf_new_metadata.py"), "--force", *named,
        str(source), str(path),
    )  # fmt: skip
    return Command("gguf_new_metadata.py", argv)


def _stripping_note(strippers: list[str]) -> str:
    return (
        f"llama.cpp keeps white space behind {', '.join(strippers)}, where the source drops it; "
        "the native engine writes a chat template that has none there"
    )
