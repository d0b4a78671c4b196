"""`phiship check`: what it measures, writes and refuses, on real artifacts in their runtimes."""

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from tests.checkpoints import write_random_checkpoint
from tests.cli.commands import events, run
from toolkit import artifact, catalog
from toolkit.artifact import Limits
from toolkit.build import build
from toolkit.check import Asked, check_artifact
from toolkit.checkpoint import Checkpoint
from toolkit.cli.building import check_command
from toolkit.console import Console
from toolkit.errors import GateError, PlanError, SettingsError
from toolkit.families import read_decoder
from toolkit.job import Options
from toolkit.quality import agreement, reference
from toolkit.quality.details import Details
from toolkit.quality.texts import digest_ids, read_text
from toolkit.report import Report

QUIET = Console(as_json=True)


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def check(folder: Path, checkpoint: Path, **asked: object) -> Report:
    report = Report("check")
    check_artifact(folder, str(checkpoint), QUIET, report, Asked(**asked))
    return report


def limit(folder: Path, **limits: float) -> Path:
    """Set limits in an artifact's manifest."""
    manifest = artifact.read_manifest(folder)
    changed = msgspec.structs.replace(manifest, limits=Limits(**limits))
    artifact.write_manifest(folder, changed)
    return folder


def test_all_measures_come_as_events_and_as_a_file(artifacts, example, tmp_path):
    path = tmp_path / "details.json"
    done = run(
        *("check", str(artifacts["gguf"]), "--checkpoint", str(example), "--json"),
        *("--details", str(path), "--tokens", "600", "--length", "200"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = {event["event"]: event for event in events(done)}
    found = {one["name"]: one for one in said["quality"]["measures"]}
    assert said["text"]["tokens"] == 600
    details = msgspec.json.decode(path.read_bytes(), type=Details)
    for name, value in details.summary.items():
        assert found[name]["value"] == value
        assert found[name]["error"] == details.errors.get(name)
    assert 1e-4 < details.summary["mean KL"] < 0.05
    assert found["mean KL"]["limit"] == 0.05
    assert found["max KL"]["limit"] is None
    assert {"token id mismatches", "stop ids ignored", "smoke answer"} <= found.keys()
    manifest = artifact.read_manifest(artifacts["gguf"])
    assert details.artifact == manifest.name
    assert (details.format, details.size_bytes) == ("gguf", manifest.size_bytes)
    assert details.text_digest == said["text"]["digest"]
    assert details.sequences == (200, 200, 200)


def test_the_file_has_every_token(artifacts, example, tmp_path):
    path = tmp_path / "details.json"
    check(artifacts["gguf"], example, tokens=600, length=200, details=path)
    details = msgspec.json.decode(path.read_bytes(), type=Details)
    checkpoint = Checkpoint.open(example)
    chat = artifact.read_manifest(artifacts["gguf"]).chat
    text = read_text(checkpoint, chat, "evaluation", tokens=600, length=200)
    assert details.ids == tuple(token for ids in text.sequences for token in ids)
    assert details.text_digest == text.digest
    assert len(details.kl) == len(details.texts) == len(details.same_top) == 600
    assert details.texts[0] == "<|user|>"
    assert "".join(details.texts[:200]).startswith("<|user|> Explain assert in Python.<|end|>")
    gaps = [place for place, change in enumerate(details.delta_p) if change is None]
    assert gaps == [199, 399, 599]
    assert np.mean(details.kl) == pytest.approx(details.summary["mean KL"])
    assert np.mean(details.same_top) == pytest.approx(details.summary["top-1 agreement"])
    known = [change for change in details.delta_p if change is not None]
    assert np.mean(known) == pytest.approx(details.summary["mean Δp"])
    assert details.ranges == ()


def test_people_see_a_table(artifacts, example):
    done = run("check", str(artifacts["gguf"]), "--checkpoint", str(example), "--tokens", "300")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "top-1 agreement" in line)
    assert "±" in line
    assert "85 %" in line
    assert "perplexity ratio" in done.stdout


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_the_users_own_text(artifacts, example, tmp_path, suffix):
    path, details = tmp_path / f"own.{suffix}", tmp_path / "details.json"
    sentence = "What is the capital of France? Paris."
    chat = [{"role": "user", "content": sentence}]
    path.write_text(sentence if suffix == "txt" else json.dumps(chat), "utf-8")
    check(artifacts["gguf"], example, text=path, details=details)
    found = msgspec.json.decode(details.read_bytes(), type=Details)
    assert found.text == path.name
    shown = "".join(found.texts)
    assert shown.strip() == sentence if suffix == "txt" else sentence in shown
    assert len(found.sequences) == 1


def test_when_a_limit_is_missed_all_is_written_all_the_same(artifacts, example, tmp_path):
    # Each limit by itself is tested in tests/quality/test_gate.py.
    folder = limit(Path(shutil.copytree(artifacts["gguf"], tmp_path / "copy")), max_kl_99=1e-4)
    path = tmp_path / "details.json"
    with pytest.raises(
        GateError, match=r"99 % of the KL .* on 300 tokens; limit 0\.0001"
    ) as caught:
        check(folder, example, tokens=300, details=path)
    assert "its folder is as it was" in caught.value.advice
    assert msgspec.json.decode(path.read_bytes(), type=Details).summary["mean KL"] > 0


def test_a_missed_limit_comes_before_a_file_that_cannot_be_written(artifacts, example, tmp_path):
    path = tmp_path / ("long" * 100)  # no file system has names of 400 bytes
    with pytest.raises(SettingsError, match=r"--details .*: cannot be written: "):
        check(artifacts["gguf"], example, tokens=100, details=path)
    folder = limit(Path(shutil.copytree(artifacts["gguf"], tmp_path / "copy")), max_kl_99=1e-4)
    with pytest.raises(GateError, match=r"99 % of the KL"):
        check(folder, example, tokens=100, details=path)


def test_limits_gate_the_build_too(example, tmp_path):
    recipe = catalog.load_recipe("tiny-phi3-gguf-q4_0")
    strict = msgspec.structs.replace(recipe, check=Limits(max_kl_99=1e-4))
    with pytest.raises(GateError, match="limit"):
        build(strict, Checkpoint.open(example), tmp_path, Options(), QUIET, Report(""))
    assert not (tmp_path / recipe.name).exists()


@pytest.fixture(scope="module")
def make_variant(tmp_path_factory) -> Callable[[str, str], tuple[Path, Path]]:
    """Build an artifact of a random checkpoint's variant; returns it and the checkpoint."""

    @functools.cache
    def make(variant: str, recipe_name: str) -> tuple[Path, Path]:
        made = tmp_path_factory.mktemp(variant)
        source = write_random_checkpoint(made / "source", variant)
        changes: dict[str, Any] = {"check": Limits(max_kl=0.02, min_top1=0.8), "smoke": None}
        if variant == "longrope" and "gguf" in recipe_name:
            changes["rope_factors"] = "long"
        recipe = msgspec.structs.replace(catalog.load_recipe(recipe_name), **changes)
        options = Options(check=False)
        folder = build(recipe, Checkpoint.open(source), made, options, QUIET, Report(""))
        return folder, source

    return make


def ranges_of(path: Path) -> list[tuple[int, int, bool, bool]]:
    details = msgspec.json.decode(path.read_bytes(), type=Details)
    return [(one.first, one.last, one.agrees, one.claimed) for one in details.ranges]


def test_a_runtime_without_the_window_is_found_out(make_variant, tmp_path, capsys):
    # llama.cpp has no window for phi3, as the manifest says.
    folder, source = make_variant("window", "tiny-phi3-gguf-q8_0")
    path = tmp_path / "details.json"
    report = check(folder, source, tokens=500, length=100, details=path)
    assert ranges_of(path) == [(1, 32, True, True), (33, 100, False, False)]
    step = report.steps[-1]
    assert step.measured == "agrees at 1 to 32 tokens; not at 33 to 100 tokens"
    assert step.limit == "the manifest says 1 to 32"
    details = msgspec.json.decode(path.read_bytes(), type=Details)
    # Its own limits hold for what is claimed.
    assert details.sequences == (32,) * 5
    assert len(details.kl) == 160
    sequences = [details.ids[start : start + 32] for start in range(0, 160, 32)]
    assert details.text_digest == digest_ids(sequences)
    assert [place for place, one in enumerate(details.delta_p) if one is None] == [
        *range(31, 160, 32)
    ]
    assert '"event": "range"' in capsys.readouterr().out


def test_a_claim_that_does_not_hold_fails(make_variant, tmp_path):
    made, source = make_variant("window", "tiny-phi3-gguf-q8_0")
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    manifest = artifact.read_manifest(folder)
    claiming = msgspec.structs.replace(
        manifest, valid_context=(1, 128), limits=Limits(max_kl=9, min_top1=0)
    )
    artifact.write_manifest(folder, claiming)
    with pytest.raises(
        GateError, match=r"after 33 to 100 tokens .* says that it agrees at 1 to 128"
    ):
        check(folder, source, tokens=500, length=100)


def test_one_token_beyond_the_window_is_too_few(make_variant, tmp_path):
    folder, source = make_variant("window", "tiny-phi3-gguf-q8_0")
    path = tmp_path / "details.json"
    report = check(folder, source, tokens=165, length=33, details=path)
    assert ranges_of(path) == [(1, 32, True, True), (33, 33, True, False)]
    assert (
        report.steps[-1].measured == "agrees at 1 to 32 tokens; too short to say at 33 to 33 tokens"
    )
    details = msgspec.json.decode(path.read_bytes(), type=Details)
    assert [one.judged for one in details.ranges] == [True, False]


def test_what_was_measured_is_kept_when_lengths_cannot_be(make_variant, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(agreement, "measure_ranges", fail)
    folder, source = make_variant("window", "tiny-phi3-gguf-q8_0")
    path = tmp_path / "details.json"
    with pytest.raises(GateError, match=r"lengths: .*: out of memory"):
        check(folder, source, tokens=165, length=33, details=path)
    assert len(msgspec.json.decode(path.read_bytes(), type=Details).kl) == 160
    strict = limit(Path(shutil.copytree(folder, tmp_path / "copy")), max_kl=1e-9)
    with pytest.raises(GateError, match="the mean KL divergence"):
        check(strict, source, tokens=165, length=33)


def test_long_factors_on_a_short_text_are_found_out(make_variant, tmp_path):
    # llama.cpp picks LongRoPE's factors by what is allocated, 256 tokens at least.
    folder, source = make_variant("longrope", "tiny-phi3-gguf-q8_0")
    path = tmp_path / "details.json"
    check(folder, source, tokens=400, length=100, details=path)
    assert ranges_of(path) == [(1, 64, False, False), (65, 100, True, True)]


def test_a_runtime_that_switches_as_the_source_does_agrees(make_variant, tmp_path):
    folder, source = make_variant("longrope", "tiny-phi3-onnx-cpu-int4")
    path = tmp_path / "details.json"
    limit(folder, max_kl=0.3, min_top1=0.5)  # int4 of random weights is far from its source
    check(folder, source, tokens=400, length=100, details=path)
    assert ranges_of(path) == [(1, 64, True, True), (65, 100, True, True)]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--tokens", "1", "1 is not in the range x>=2"),
        ("--length", "1", "1 is not in the range x>=2"),
        ("--text", ".", "'.' is a directory"),
        ("--details", ".", "'.' is a directory"),
    ],
)
def test_bad_options(option, value, said):
    done = CliRunner().invoke(check_command, ["artifact", option, value])
    assert done.exit_code == 2
    assert said in done.output


def test_a_text_must_be_there(artifacts, example, tmp_path):
    with pytest.raises(SettingsError, match=r"--text .*none.txt: is not there") as caught:
        check(artifacts["gguf"], example, text=tmp_path / "none.txt")
    assert caught.value.exit_code == 3


def test_a_place_for_details_must_be_there(artifacts, example, tmp_path):
    path = tmp_path / "none" / "details.json"
    with pytest.raises(SettingsError, match=r"--details .*: its folder is not there"):
        check(artifacts["gguf"], example, details=path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "found 0 tokens"),
        ("binary.txt", bytes(range(256)), "found a NUL byte|not UTF-8"),
        ("bad.jsonl", b'[]\n{"messages": 5}\n', "bad.jsonl:2: "),
    ],
)
def test_bad_texts(artifacts, example, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=said):
        check(artifacts["gguf"], example, text=tmp_path / name)


def test_a_sequence_longer_than_the_context_is_refused(artifacts, example):
    with pytest.raises(PlanError, match="allowed 2 to 511"):
        check(artifacts["gguf"], example, length=600)


def test_logits_that_are_not_numbers_fail(artifacts, example, tmp_path):
    folder = Path(shutil.copytree(artifacts["gguf"], tmp_path / "copy"))
    poison_head(folder / "model.gguf")
    manifest = artifact.read_manifest(folder)
    artifact.write_manifest(
        folder, msgspec.structs.replace(manifest, files=artifact.list_files(folder))
    )
    with pytest.raises(GateError, match=r"1 of 27 stored tensors are not .* lm_head\.weight"):
        check(folder, example, tokens=100)


def poison_head(path: Path) -> None:
    """Make the first scale of the head NaN: the last two bytes of a Q6_K block."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path, "r+")
    (tensor,) = [one for one in reader.tensors if one.name == "output.weight"]
    assert tensor.tensor_type == gguf.GGMLQuantizationType.Q6_K
    tensor.data.reshape(-1)[208:210] = np.frombuffer(np.float16(math.nan).tobytes(), np.uint8)
    reader.data.flush()


def test_the_numbers_are_those_of_the_source(artifacts, example, tmp_path):
    # The perplexity of the source, worked out from the forward pass by itself.
    path = tmp_path / "details.json"
    check(artifacts["gguf"], example, tokens=128, length=64, details=path)
    details = msgspec.json.decode(path.read_bytes(), type=Details)
    checkpoint = Checkpoint.open(example)
    decoder = read_decoder(checkpoint.config)
    losses: list[float] = []
    for ids in (details.ids[:64], details.ids[64:]):
        logits = reference.forward(checkpoint, decoder, ids).astype(np.float64)
        totals = np.log(np.exp(logits).sum(-1))
        losses += [totals[i] - logits[i, ids[i + 1]] for i in range(63)]
    expected = math.exp(np.mean(losses))
    assert details.summary["source perplexity"] == pytest.approx(expected, rel=1e-5)
