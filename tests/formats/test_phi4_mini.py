"""Phi-4-mini in every format: a byte-level BPE, partial rotary under LongRoPE, a tied embedding."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from tests.bytelevel import write_phi4_checkpoint
from tests.cli.commands import events, run
from tests.formats.gguf_cases import make_recipe
from tests.formats.test_gguf_tokenizer import (
    ASCII_SPACES,
    CONVERSATION,
    OTHER_SPACES,
    mix_texts,
)
from tests.formats.writing import write_artifact
from tests.golden.make_gguf import GOLDEN, read_metadata
from toolkit import formats
from toolkit.artifact import read_manifest
from toolkit.checkpoint import Checkpoint
from toolkit.formats.gguf.encoding import GgufTokenizer
from toolkit.quality import tokens
from toolkit.runner.engines import llama_cpp
from toolkit.runner.settings import Settings

CONTEXT = 256
USUAL_SPACES = (" ", "\n", "\t", "\r", "  \n")
# As the bundled recipes say it, with groups that divide rows of 384.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "onnx": {"provider": "cpu", "quantization": {"precision": "int4"}},
    "openvino": {"quantization": {"precision": "int4", "group_size": 32}},
    "mlx": {"provider": "cpu", "rope_factors": "long", "quantization": {"bits": 4}},
    "gguf": {"rope_factors": "long", "quantization": {"precision": "q4_0"}},
}
# Four bits move these random weights by 0.1 to 0.16 nats; a wrong
# factor, rotary width or vocabulary moves them by 1 and more.
CHECK = {"max_kl": 0.26, "min_top1": 0.3}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer as Phi-4-mini's."""
    return write_phi4_checkpoint(tmp_path_factory.mktemp("phi4") / "source")


@pytest.fixture(scope="module", params=sorted(RECIPES))
def artifact(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The artifact of each format, built by the command line with its gate."""
    kind, out = request.param, tmp_path_factory.mktemp(request.param)
    recipe = {"format": kind, "title": "x", "model": "phi-4-mini", "check": CHECK,
              "context_length": CONTEXT, **RECIPES[kind]}  # fmt: skip
    path = out / f"mine-{kind}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = run("build", str(path), "--checkpoint", str(source), "--out", str(out), "--json")
    assert done.returncode == 0, events(done)[-1]
    return out / f"mine-{kind}"


def test_the_gate_finds_the_sources_ids_and_logits(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    found = {measure.name: measure.value for measure in manifest.quality.measures}
    assert manifest.quality.checked
    assert found["token id mismatches"] == found["stop ids ignored"] == 0
    assert 1e-3 < found["mean KL"] < CHECK["max_kl"]
    assert manifest.chat.turns["user"] == ("<|user|>", "<|end|>")
    assert manifest.chat.generation == "<|assistant|>"
    assert manifest.chat.stop_texts == ("<|end|>", "<|endoftext|>")


def test_ids_of_any_text_are_the_sources(artifact: Path, source: Path) -> None:
    checkpoint = Checkpoint.open(source)
    tokenizer = tokens.read_tokenizer(checkpoint)
    specials = sorted(added.content for added in tokenizer.get_added_tokens_decoder().values())
    kind = read_manifest(artifact).format
    # onnxruntime-genai keeps other spaces behind added tokens (docs/quality.md).
    spaces = USUAL_SPACES if kind == "onnx" else ASCII_SPACES + OTHER_SPACES
    texts = [*tokens.PROBES, *mix_texts(specials, spaces, 1000)]
    session = formats.get(kind).open_session(artifact)
    try:
        different = tokens.compare_ids(
            lambda text: tokens.encode(tokenizer, text), session.encode, texts
        )
    finally:
        session.close()
    assert not different, different[0]


# GGUF


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF artifact in float16."""
    folder = tmp_path_factory.mktemp("written")
    write_artifact(
        make_recipe("f16", model="phi-4-mini", is_long=True), Checkpoint.open(source), folder
    )
    return folder


def test_metadata_is_the_converters_but_for_the_splitting(written: Path) -> None:
    ours, theirs = read_metadata(written / "model.gguf"), json.loads(GOLDEN.read_text("utf-8"))
    theirs = theirs["byte_level"]
    # The converter leaves out that <|end|> ends a turn, and white space behind added tokens.
    added = {"tokenizer.ggml.eot_token_id", "phiship.tokenizer.strip_after"}
    assert set(ours) - set(theirs) == added
    assert set(theirs) <= set(ours)
    different = {key for key in theirs if ours[key] != theirs[key]}
    assert different == {"general.name", "tokenizer.ggml.pre"}
    assert theirs["tokenizer.ggml.pre"] == ["STRING", "gpt-4o"]
    assert ours["tokenizer.ggml.pre"] == ["STRING", "granite-embed-multi-97m"]


def test_the_converters_splitting_has_other_ids_for_letters_with_marks(
    source: Path, written: Path
) -> None:
    """Why ours is another: when llama.cpp mends gpt-4o, this fails, and the name can change."""
    tokenizer = tokens.read_tokenizer(Checkpoint.open(source))
    encoder = GgufTokenizer(written / "model.gguf", pre="gpt-4o")
    different = tokens.compare_ids(
        lambda text: tokens.encode(tokenizer, text), encoder.encode, tokens.PROBES
    )
    encoder.close()
    assert any("नमस्ते" in mismatch.text for mismatch in different)


def test_llama_servers_chat_has_the_sources_ids(
    source: Path, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "CHAT_TEMPLATE", "")  # the file's
    checkpoint = Checkpoint.open(source)
    template = jinja2.Template(checkpoint.tokenizer_config["chat_template"])
    text = template.render(messages=CONVERSATION, add_generation_prompt=True)
    expected = tokens.encode(tokens.read_tokenizer(checkpoint), text)
    model = llama_cpp.load(written, "model.gguf", "cpu", Settings(256))
    try:
        with model._posting("/apply-template", {"messages": CONVERSATION}) as response:
            prompt = json.load(response)["prompt"]
        assert prompt == text
        # White space that a message begins with is dropped by the source behind <|user|>.
        assert model.encode(prompt.replace("> Why", ">Why")) == expected
    finally:
        model.close()


def test_the_modelfile_writes_turns_without_line_ends(written: Path) -> None:
    text = (written / "Modelfile").read_text("utf-8")
    turns = "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"
    assert f'TEMPLATE """{turns}"""' in text
    for stop in ("<|end|>", "<|endoftext|>", "<|user|>", "<|system|>", "<|assistant|>"):
        assert f'PARAMETER stop "{stop}"' in text
