"""What cannot be adopted: errors name the file, the key, what was found and what is allowed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.exports.elsewhere import Change, cut, drop, put, rewrite_gguf, strip, take, write_genie
from tests.vision_checkpoints import vision_config
from toolkit.errors import ArtifactError, SettingsError, UnsupportedError

GENAI, CONFIG = "genai_config.json", "config.json"
SEES = json.dumps(vision_config())
BAD: list[tuple[str, Change, str]] = [
    ("onnx", drop("model.onnx.data"), r"model\.onnx\.data: is missing; .*model\.onnx: .*names it"),
    ("onnx", cut("model.onnx.data"), r"model\.onnx\.data: found \d+ bytes; model\.onnx reads \d+"),
    ("onnx", drop("model.onnx"), r"model\.onnx: is missing; .*genai_config\.json: model\.decoder"),
    ("onnx", cut("model.onnx", 9), r"model\.onnx: not an ONNX graph"),
    ("onnx", drop("tokenizer.json"), r"tokenizer\.json: missing"),
    ("onnx", put(GENAI, "model", "type", value="llama"), "type: got 'llama'; supported: phi3"),
    ("onnx", put(GENAI, "model", "vision", value={}), "vision: supported are models of text alone"),
    ("onnx", put(GENAI, "model", "eos_token_id", value=9999),
     r"genai_config\.json: model: eos_token_id: got 9999; allowed ids from 0 to 2047"),
    ("onnx", put(GENAI, "model", "eos_token_id", value=None), "eos_token_id: got null; allowed"),
    ("onnx", put(GENAI, "model", "vocab_size", value=1993), r"tokenizer\.json has id 1994"),
    ("onnx", put(GENAI, "model", "context_length", value="4k"),
     "context_length: got '4k'; allowed a whole number above 0"),
    ("onnx", put(GENAI, "model", "decoder", "filename", value="../model.onnx"),
     r"model\.decoder\.filename: got '\.\./model\.onnx'; allowed a file within the folder"),
    ("onnx", put(GENAI, "model", "decoder", "filename", value="/etc/passwd"), "allowed a file"),
    ("onnx", put(GENAI, "model", "decoder", "session_options", value=[]), "allowed an object"),
    ("onnx", put(GENAI, "model", "decoder", "session_options", "provider_options",
                 value=[{"dml": {}}]), "provider_options: got 'dml'; supported: cpu, cuda"),
    ("onnx", put(GENAI, "model", "decoder", "head_size", value=80), "says 4 heads of 80"),
    ("onnx", put(GENAI, "model", "decoder", "num_hidden_layers", value=5),
     r"model\.onnx has no input 'past_key_values\.4\.key'"),
    ("onnx", put("tokenizer_config.json", "chat_template", value=None), "chat_template: got None"),
    ("onnx", put("tokenizer_config.json", "chat_template", value="{% for %}"), "is not valid"),
    ("onnx", lambda folder: (folder / GENAI).write_text("{"), r"genai_config\.json"),
    ("mlx", drop("model.safetensors"), r"model\.safetensors: is missing; it holds weights"),
    ("mlx", cut("model.safetensors"), r"model\.safetensors: found \d+ bytes; its header says \d+"),
    ("mlx", drop(CONFIG), r"config\.json: is missing; mlx-lm reads it"),
    ("mlx", put(CONFIG, "num_hidden_layers", value=5), r"model\.layers\.4\..* is missing among"),
    ("mlx", put(CONFIG, "architectures", value=["Qwen3ForCausalLM"]), "got .Qwen3ForCausalLM"),
    ("mlx", lambda folder: (folder / CONFIG).write_text(SEES), r"config\.json: .* of text alone"),
    ("openvino", drop("openvino_tokenizer.xml"), r"openvino_tokenizer\.xml: is missing"),
    ("openvino", cut("openvino_model.bin"), r"openvino_model\.bin: found \d+ bytes; .*reads \d+"),
    ("openvino", cut("openvino_model.xml"), r"openvino_model\.xml: not a network of OpenVINO"),
    ("openvino", drop(CONFIG), r"config\.json: is missing; it names the architecture"),
    ("openvino", drop("generation_config.json"),
     r"generation_config\.json: is missing; it names the stop ids"),
    ("gguf", cut("model.gguf"), r"model\.gguf: not a GGUF file, or cut short"),
    ("gguf", lambda folder: (folder / "model.gguf").write_bytes(b"GGUF"), "not a GGUF file"),
    ("gguf", lambda folder: shutil.copyfile(folder / "model.gguf", folder / "b.gguf"),
     r"several GGUF files \(b\.gguf, model\.gguf\)"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "text"), BAD)
def test_what_is_wrong_is_said(
    kind: str, change: Change, text: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    source = strip(artifacts[kind], tmp_path / "source")
    change(source)
    with pytest.raises((ArtifactError, UnsupportedError), match=text):
        take(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    assert not list((tmp_path / "out").glob(".*"))


GENIE = "genie_config.json"
BAD_GENIE: list[tuple[Change, str]] = [
    (drop("phi_3_5_mini_instruct_part_2_of_2.bin"), r"is missing; .*ctx-bins\[1\]"),
    (drop("htp_backend_ext_config.json"), r"is missing; .*backend\.extensions"),
    (put(GENIE, "dialog", "context", "eos-token", value=5000), "eos-token: got 5000; allowed ids"),
    (put(GENIE, "dialog", "context", "n-vocab", value=10), "eos-token: got"),
    (put(GENIE, "dialog", "tokenizer", "path", value="t.json"), r"t\.json: is missing"),
    (put(GENIE, "dialog", "engine", "backend", "type", value="Tpu"), "got 'Tpu'; allowed Qnn"),
    (put(GENIE, "dialog", "engine", "model", "type", value="x"), "type: got 'x'; allowed binary"),
    (put(GENIE, "dialog", "context", "size", value=0), "size: got 0; allowed a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "text"), BAD_GENIE)
def test_what_is_wrong_with_a_genie_bundle(
    change: Change, text: str, example: Path, tmp_path: Path
) -> None:
    source = write_genie(example, tmp_path / "genie_bundle")
    change(source)
    with pytest.raises(ArtifactError, match=text):
        take(source, tmp_path / "out", tokenizer=example)


BAD_GGUF: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "llama"}, r"general\.architecture: got 'llama'; supported: phi3"),
    ({"tokenizer__chat_template": None}, r"tokenizer\.chat_template: missing"),
    ({"tokenizer__chat_template": "{{ x"}, "template is not val"),
    ({"tokenizer__ggml__eos_token_id": 70_000}, r"eos_token_id: got 70000; allowed ids from 0 to"),
    ({"phi3__block_count": 5}, r"blk\.4\.attn_norm\.weight: found nothing; the metadata say \[256"),
    ({"phi3__feed_forward_length": 96}, r"ffn_up\.weight: found shape \[\d+, 256\]; the metadata"),
    ({"phi3__context_length": None}, r"phi3\.context_length: got None; allowed int"),
]


@pytest.mark.parametrize(("changes", "text"), BAD_GGUF)
def test_what_is_wrong_with_a_gguf_file(
    changes: dict[str, Any], text: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    source = rewrite_gguf(artifacts["gguf"] / "model.gguf", tmp_path / "bad.gguf", **changes)
    with pytest.raises((ArtifactError, UnsupportedError), match=text) as caught:
        take(source, tmp_path / "out")
    assert str(source) in str(caught.value)


def test_what_is_no_artifact(artifacts: dict[str, Path], tmp_path: Path) -> None:
    for path, text in (
        (tmp_path / "nowhere", "no such file or folder"),
        (artifacts["onnx"], "is sealed already"),
        (artifacts["onnx"] / "tokenizer.json", r"a file of kind \.json; allowed a folder, or a"),
    ):
        with pytest.raises(ArtifactError, match=text):
            take(path, tmp_path / "out")


@pytest.mark.parametrize("name", ["../x", ".x", "a b", "a/b"])
def test_a_name_that_is_no_folder(name: str, artifacts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--name: got"):
        take(strip(artifacts["onnx"], tmp_path / "source"), tmp_path / "out", name=name)
