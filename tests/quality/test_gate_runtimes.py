"""The gate against real artifacts in their real runtimes, whole and broken."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import pytest

from tests.quality.file_faults import FILES, edit_file
from tests.quality.sources import edit_json
from toolkit import artifact, catalog, formats
from toolkit.artifact import Quality
from toolkit.build import build
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.families import read_decoder
from toolkit.formats import Session
from toolkit.formats.openvino.tokenizer import write_tokenizer
from toolkit.job import Options
from toolkit.quality import chat as chats
from toolkit.quality import tokens
from toolkit.quality.gate import FailedGateError, run_gate
from toolkit.quality.weightonly import open_reader
from toolkit.report import Report
from toolkit.runner.engines import llama_cpp
from toolkit.runner.settings import Settings

FORMATS = ("onnx", "gguf", "openvino", "mlx")


@contextmanager
def opened(name: str, folder: Path) -> Iterator[Session]:
    session = formats.get(name).open_session(folder)
    try:
        yield session
    finally:
        session.close()


def gate(name: str, folder: Path, example: Path) -> Quality:
    manifest = artifact.read_manifest(folder)
    checkpoint = Checkpoint.open(example)
    decoder = read_decoder(checkpoint.config)
    with opened(name, folder) as session:
        return run_gate(
            session,
            checkpoint,
            decoder,
            manifest.chat,
            manifest.limits,
            check_logits=True,
            smoke=manifest.smoke,
            console=Console(as_json=True),
            read=open_reader(name, "native", folder, decoder),
        )


@pytest.fixture
def broken(artifacts, tmp_path) -> Callable[[str], Path]:
    """Copies an artifact, to be broken."""
    return lambda name: Path(shutil.copytree(artifacts[name], tmp_path / name))


@pytest.mark.parametrize("name", FORMATS)
def test_the_artifact_passes_and_the_manifest_says_so(name, artifacts, example):
    recorded = artifact.read_manifest(artifacts[name]).quality
    assert recorded.checked
    assert all(measure.ok for measure in recorded.measures)
    measured = gate(name, artifacts[name], example)
    assert [m.name for m in measured.measures] == [m.name for m in recorded.measures]
    found = {measure.name: measure.value for measure in measured.measures}
    # 4 bits cannot be lossless: a divergence of zero would mean that nothing was compared.
    assert 1e-4 < found["mean KL"] < 0.05
    assert found["smoke answer"] == 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_perturbed_tensor_fails(name, broken, example):
    folder = broken(name)
    edit_file(name, folder, FILES["file: scales negated"])
    with pytest.raises(
        FailedGateError, match=r"1 of \d+ stored tensors are not the checkpoint's: \S+down_proj"
    ):
        gate(name, folder, example)


@pytest.mark.parametrize("name", FORMATS)
def test_shifted_tokens_fail(name, broken, example):
    folder = broken(name)
    first, second = neighbours_of_equal_length(example)
    if name == "gguf":
        swap_bytes(next(folder.glob("*.gguf")), first.encode(), second.encode())
    else:
        edit_json(folder / "tokenizer.json", lambda c: swap(c["model"]["vocab"], first, second))
    if name == "openvino":  # its networks are made of that file
        other = Path(shutil.copytree(example, folder.with_name("other")))
        shutil.copyfile(folder / "tokenizer.json", other / "tokenizer.json")
        write_tokenizer(Checkpoint.open(other), folder)
    with pytest.raises(FailedGateError, match=r"token ids: .* encodes \d+ of \d+ probe texts"):
        gate(name, folder, example)


def test_an_onnx_artifact_without_one_stop_id_fails(broken, example):
    folder = broken("onnx")
    lost = Checkpoint.open(example).stop_ids[-1]
    edit_json(
        folder / "genai_config.json", lambda config: config["model"]["eos_token_id"].remove(lost)
    )
    with pytest.raises(FailedGateError, match=rf"stop ids: .* \[{lost}\]"):
        gate("onnx", folder, example)


def test_a_gguf_artifact_without_one_stop_id_fails(broken, example):
    # The other stop tokens llama.cpp also knows by their texts.
    folder = broken("gguf")
    lost = redirect_gguf_key(folder, "tokenizer.ggml.eom_token_id")
    assert lost in Checkpoint.open(example).stop_ids
    with pytest.raises(FailedGateError, match=rf"stop ids: .* \[{lost}\]"):
        gate("gguf", folder, example)


def test_the_runner_gives_the_sources_ids_to_a_chat(example, tmp_path):
    # Phi-3.5's tokenizer drops white space behind <|assistant|> only, which GGUF cannot say: the
    # gate's session and the device's runner must both come to the source's ids all the same.
    source = Path(shutil.copytree(example, tmp_path / "source"))

    def strip_behind_assistant(content: dict[str, Any]) -> None:
        added = content.get("added_tokens") or content["added_tokens_decoder"].values()
        for entry in added:
            entry["rstrip"] = entry["content"] == "<|assistant|>"

    for file in ("tokenizer.json", "tokenizer_config.json"):
        edit_json(source / file, strip_behind_assistant)
    checkpoint = Checkpoint.open(source)
    recipe = catalog.load_recipe("tiny-phi3-gguf-q4_0")
    # The model was trained with other ids, so only these are checked.
    options = Options(check=False)
    console = Console(as_json=True)
    folder = build(recipe, checkpoint, tmp_path / "out", options, console, Report(""))
    manifest = artifact.read_manifest(folder)
    messages = [("user", " Hi\n"), ("assistant", "Hello."), ("user", "2 + 2?")]
    template = checkpoint.tokenizer_config["chat_template"]
    text = jinja2.Template(template).render(
        messages=[{"role": role, "content": content} for role, content in messages],
        add_generation_prompt=True,
    )
    expected = tokens.encode(tokens.read_tokenizer(checkpoint), text)
    model = llama_cpp.load(folder, manifest.runtime.main_file, "cpu", Settings(256))
    try:
        assert model.encode(chats.render(manifest.chat, messages)) == expected
    finally:
        model.close()


def redirect_gguf_key(folder: Path, key: str) -> int:
    """Set a token id of the header to 0; returns what it was."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(next(folder.glob("*.gguf")), "r+")
    value = reader.fields[key].parts[-1]
    before = int(value[0])
    value[0] = 0
    reader.data.flush()
    return before


def neighbours_of_equal_length(example: Path) -> tuple[str, str]:
    """Two pieces of the vocabulary that probes use, as long as each other."""
    tokenizer = tokens.read_tokenizer(Checkpoint.open(example))
    ids = tokens.encode(tokenizer, " ".join(tokens.PLAIN_PROBES))
    pieces = {tokenizer.id_to_token(i) for i in ids}
    words = sorted(p for p in pieces if len(p) == 4 and p.isascii())
    return words[0], words[1]


def swap(vocabulary: dict[str, int], first: str, second: str) -> None:
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def swap_bytes(path: Path, first: bytes, second: bytes) -> None:
    """Swap two GGUF strings of equal length in place; a string is its length and its bytes."""
    content = bytearray(path.read_bytes())
    length = len(first).to_bytes(8, "little")
    places = {text: content.find(length + text) + 8 for text in (first, second)}
    for text, other in ((first, second), (second, first)):
        if places[text] >= 8:
            content[places[text] : places[text] + len(text)] = other
    path.write_bytes(content)
