"""Adopting artifacts made elsewhere: what is sealed, what is refused, and that it runs."""

import shutil
from pathlib import Path

import pytest

from tests.checkpoints import write_random_checkpoint
from tests.deviating import write_deviating
from tests.exports.elsewhere import (
    PUBLISHED,
    publish_onnx,
    put,
    rewrite_gguf,
    strip,
    take,
    write_genie,
)  # fmt: skip
from toolkit.adopt.found import Given
from toolkit.adopt.gguf import inspect as inspect_gguf
from toolkit.artifact import Manifest, Smoke, hash_file, read_manifest, verify_files
from toolkit.console import Console
from toolkit.deploy import Push, deploy
from toolkit.device import Device
from toolkit.errors import (
    ArtifactError,
    GateError,
    PhishipError,
)
from toolkit.formats.gguf.ollama import has_phi3_turns
from toolkit.formats.gguf.session import GgufSession
from toolkit.quality.chat import render
from toolkit.remote import generate

FORMATS = ("gguf", "onnx", "openvino", "mlx")
PROVIDERS = {"mlx": "cpu"}  # what the example's artifact is for; Metal is the usual one
CHAT = (("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "3 + 3?"))


def list_content(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        path.name: (hash_file(path), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def shared(manifest: Manifest) -> tuple[object, ...]:
    """What an adopted artifact's manifest has in common with the one it was made from."""
    return (
        manifest.format, manifest.runtime, manifest.context_length, manifest.valid_context,
        sorted(manifest.chat.stop_ids), manifest.chat.bos_id,
    )  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_an_artifact_gets_the_manifest_it_had(
    kind: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    original = read_manifest(artifacts[kind])
    source = strip(artifacts[kind], tmp_path / "source")
    before = list_content(source)
    folder = take(source, tmp_path / "out", name="adopted", provider=PROVIDERS.get(kind))
    found = read_manifest(folder)
    assert list_content(source) == before
    assert shared(found) == shared(original)
    assert not found.quality.checked
    # The data file alone is counted in a plan, the graph beside it too when it is adopted.
    assert 0 <= found.device_memory_bytes - original.device_memory_bytes < 60_000
    verify_files(folder, found.files)


@pytest.mark.parametrize("kind", ["gguf", "onnx", "mlx"])
def test_what_is_compared_with_its_source_is_checked(
    kind: str, artifacts: dict[str, Path], example: Path, tmp_path: Path
) -> None:
    source = strip(artifacts[kind], tmp_path / "source")
    manifest = read_manifest(take(source, tmp_path / "out", checkpoint=str(example)))
    original = read_manifest(artifacts[kind])
    assert manifest.quality.checked
    values = [(one.name, one.value) for one in manifest.quality.measures]
    # What made it is not known, and so not what its own weights are: the distance is measured.
    correct = {"stored tensors off", "runtime KL"}
    assert values == [
        (one.name, one.value) for one in original.quality.measures if one.name not in correct
    ]
    assert manifest.source.digest == original.source.digest


def test_another_tokenizer_than_the_sources_is_not_used(
    artifacts: dict[str, Path], example: Path, tmp_path: Path
) -> None:
    checkpoint = write_deviating(example, tmp_path / "checkpoint")
    source = strip(artifacts["onnx"], tmp_path / "source")
    before = list_content(source)
    folder = take(source, tmp_path / "out", checkpoint=str(checkpoint))
    manifest = read_manifest(folder)
    assert manifest.quality.checked
    assert (manifest.runtime.tokenizer, manifest.runtime.companions) == (
        "tokenizers",
        ("tokenizers",),
    )
    expected = (checkpoint / "tokenizer.json").read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == expected
    assert list_content(source) == before


def test_what_is_not_its_source_is_refused(artifacts: dict[str, Path], tmp_path: Path) -> None:
    other = write_random_checkpoint(tmp_path / "other", "mha")
    source = strip(artifacts["gguf"], tmp_path / "source")
    with pytest.raises(GateError):
        take(source, tmp_path / "out", checkpoint=str(other))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["gguf", "onnx"])  # the others' engines take 10 s each to start
def test_an_artifact_without_its_manifest_runs_on_a_device(
    kind: str, artifacts: dict[str, Path], board: Device, tmp_path: Path, console: Console
) -> None:
    folder = take(strip(artifacts[kind], tmp_path / "source"), tmp_path / "out")
    with pytest.raises(ArtifactError, match="sealed as unchecked"):
        deploy(folder, board, console)
    deploy(folder, board, console, Push(accept_unchecked=True))
    assert "Paris" in generate(board, "What is the capital of France?").text


@pytest.mark.parametrize("kind", FORMATS)
def test_files_are_linked_or_copied(kind: str, artifacts: dict[str, Path], tmp_path: Path) -> None:
    source = strip(artifacts[kind], tmp_path / "source")
    largest = max(source.iterdir(), key=lambda path: path.stat().st_size).name
    linked = take(source, tmp_path / "out", name="linked")
    copied = take(source, tmp_path / "out", name="copied", copy=True)
    assert (linked / largest).samefile(source / largest)
    assert not (copied / largest).samefile(source / largest)
    assert hash_file(copied / largest) == hash_file(source / largest)


def test_a_cache_of_symbolic_links(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """As huggingface_hub lays out what it downloads."""
    blobs = strip(artifacts["onnx"], tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    folder = take(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in folder.iterdir())
    verify_files(folder, read_manifest(folder).files)


def test_an_adapter_beside_the_model_is_said_to_be_left_out(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    source = strip(artifacts["onnx"], tmp_path / "source")
    (source / "mine.onnx_adapter").write_bytes(b"whatever")
    manifest = read_manifest(take(source, tmp_path / "out"))
    (note,) = (note for note in manifest.notes if "mine.onnx_adapter" in note)
    assert "without that adapter" in note
    assert "mine.onnx_adapter" not in {file.path for file in manifest.files}


def test_a_published_onnx_repository(artifacts: dict[str, Path], tmp_path: Path) -> None:
    home = publish_onnx(artifacts["onnx"], tmp_path / "Phi-3-mini-4k-instruct-onnx")
    with pytest.raises(ArtifactError, match="found none of genai_config") as caught:
        take(tmp_path / "Phi-3-mini-4k-instruct-onnx", tmp_path / "out")
    assert str(home) in caught.value.advice
    folder = take(home, tmp_path / "out", context_length=256)
    manifest = read_manifest(folder)
    assert manifest.runtime.main_file == PUBLISHED
    assert {PUBLISHED, f"{PUBLISHED}.data"} < {file.path for file in manifest.files}
    assert manifest.context_length == 256
    assert manifest.smoke
    assert manifest.name == "cpu-int4-rtn-block-32-acc-level-4"


def test_a_gguf_file_gets_what_ollama_and_llamaedge_take(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "Phi-3 mini (Q4).gguf"
    shutil.copyfile(artifacts["gguf"] / "model.gguf", source)
    folder = take(source, tmp_path / "out")
    assert folder.name == "Phi-3-mini-Q4-"
    assert sorted(path.name for path in folder.iterdir()) == [
        "Modelfile", "llamaedge.sh", "manifest.json", "model.gguf",
    ]  # fmt: skip
    original, found = read_manifest(artifacts["gguf"]), read_manifest(folder)
    session = GgufSession(folder)
    ids = [session.encode(render(one.chat, CHAT)) for one in (original, found)]
    session.close()
    assert ids[0] == ids[1]


def test_the_memory_of_other_contexts(artifacts: dict[str, Path], tmp_path: Path) -> None:
    source = strip(artifacts["gguf"], tmp_path / "source") / "model.gguf"
    found = inspect_gguf(Given(source, "x"))
    assert found.memory_bytes(512) - found.memory_bytes(256) == 256 * found.kv_bytes_per_token
    assert found.kv_bytes_per_token == 2 * 4 * 4 * 64 * 2  # k and v, layers, heads, width, float16


def test_a_genie_bundle(example: Path, tmp_path: Path) -> None:
    source = write_genie(example, tmp_path / "genie_bundle")
    with pytest.raises(ArtifactError, match="chat_template") as caught:
        take(source, tmp_path / "out")
    assert "--tokenizer DIR" in caught.value.advice
    folder = take(source, tmp_path / "out", tokenizer=example)
    manifest = read_manifest(folder)
    assert (manifest.format, manifest.runtime.provider) == ("genie", "npu")
    assert manifest.device_memory_bytes == 10_000
    assert any("Qualcomm's own runtime" in note for note in manifest.notes)
    assert {"genie_config.json", "tokenizer.json", "htp_backend_ext_config.json"} < {
        file.path for file in manifest.files
    }


def test_a_genie_bundle_is_not_pushed_over_ssh(
    example: Path, board: Device, tmp_path: Path, console: Console
) -> None:
    source = write_genie(example, tmp_path / "genie_bundle")
    folder = take(source, tmp_path / "out", tokenizer=example)
    with pytest.raises(PhishipError):
        deploy(folder, board, console, Push(accept_unchecked=True))


APRIL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}"
    "{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}"
    "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}"
    "{% endif %}{% endfor %}"
)


def test_the_template_of_the_first_published_files(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    """It writes the bos token, no system turn, and asks for an answer behind every user."""
    source = rewrite_gguf(
        artifacts["gguf"] / "model.gguf", tmp_path / "april.gguf", tokenizer__chat_template=APRIL
    )
    chat = read_manifest(take(source, tmp_path / "out")).chat
    assert chat.bos_id == 1
    assert set(chat.turns) == {"user", "assistant"}
    assert has_phi3_turns(chat)
    asked = render(chat, (("user", "a"), ("assistant", "b"), ("user", "c")))
    assert asked == (
        "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\n"
    )


def test_what_is_there_is_kept(artifacts: dict[str, Path], tmp_path: Path) -> None:
    source = strip(artifacts["mlx"], tmp_path / "source")
    take(source, tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"out/source exists"):
        take(source, tmp_path / "out")
    question = Smoke(prompt="2 + 2?", expect="4")
    folder = take(source, tmp_path / "out", replace=True, smoke=question)
    assert read_manifest(folder).smoke == question


@pytest.mark.parametrize("kind", FORMATS)
def test_a_context_that_the_model_has_not(
    kind: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    source = strip(artifacts[kind], tmp_path / "source")
    with pytest.raises(ArtifactError, match=r"--context 513: .* allows 512"):
        take(source, tmp_path / "out", context_length=513)
    with pytest.raises(ArtifactError, match="--provider: got 'tpu'; allowed for"):
        take(source, tmp_path / "out", provider="tpu")


def test_a_runtime_that_misses_the_end_of_the_turn_is_noted(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    source = strip(artifacts["mlx"], tmp_path / "source")
    put("generation_config.json", "eos_token_id", value=1984)(source)
    manifest = read_manifest(take(source, tmp_path / "out"))
    assert 1991 in manifest.chat.stop_ids
    assert any("does not end at <|end|>" in note for note in manifest.notes)


def test_stops_that_are_no_added_tokens(artifacts: dict[str, Path], tmp_path: Path) -> None:
    source = strip(artifacts["mlx"], tmp_path / "source")
    put("generation_config.json", "eos_token_id", value=[5, 1984])(source)
    manifest = read_manifest(take(source, tmp_path / "out"))
    assert {5, 1984, 1991} <= set(manifest.chat.stop_ids)
    assert any("does not end at <|end|>;" in note for note in manifest.notes)


@pytest.mark.parametrize("kind", ["onnx", "mlx", "openvino"])
def test_the_tokenizer_given_is_the_one_taken(
    kind: str, artifacts: dict[str, Path], example: Path, tmp_path: Path
) -> None:
    source = strip(artifacts[kind], tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_text("{}")
    folder = take(source, tmp_path / "out", tokenizer=example)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert hash_file(folder / name) == hash_file(example / name)


def test_the_tokenizer_that_genie_names_stays(example: Path, tmp_path: Path) -> None:
    source = write_genie(example, tmp_path / "genie_bundle")
    content = (source / "tokenizer.json").read_bytes() + b"\n"
    (source / "tokenizer.json").write_bytes(content)
    folder = take(source, tmp_path / "out", tokenizer=example)
    assert (folder / "tokenizer.json").read_bytes() == content
