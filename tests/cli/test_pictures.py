"""`build` and `run --image`: pictures through the command line, good and bad."""

from pathlib import Path

import pytest

from tests.cli.commands import ROOT, events, run
from tests.vision_checkpoints import draw, write_vision_checkpoint

RECIPE = """\
format: {kind}
title: sees
model: phi-3-vision
quantization:
  precision: int4
context_length: 2048
check:
  max_kl: 0.3
  min_top1: 0.4
"""


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    source = write_vision_checkpoint(folder / "source", crops=1)
    recipe = folder / "sees.yaml"
    recipe.write_text(RECIPE.format(kind=request.param), encoding="utf-8")
    done = run("build", str(recipe), "--checkpoint", str(source), "--out", str(folder))
    assert done.returncode == 0, done.stderr
    assert "picture: mean KL" in done.stdout
    draw(200, 100, 1).save(folder / "good.png")
    (folder / "bad.png").write_text("no picture", encoding="utf-8")
    return folder


def test_a_picture_is_answered(built: Path) -> None:
    words = ["run", str(built / "sees"), "--prompt", "What is shown?", "--max-tokens", "4"]
    done = run(*words, "--image", str(built / "good.png"), "--json")
    assert done.returncode == 0, done.stderr
    answer = next(one for one in events(done) if one["event"] == "answer")
    assert answer["new_tokens"] == 4
    assert answer["prompt_tokens"] > 313


@pytest.mark.parametrize(("name", "said"), [("bad.png", "is no picture"), ("none.png", "No such")])
def test_a_bad_picture_is_one_sentence(name: str, said: str, built: Path) -> None:
    done = run("run", str(built / "sees"), "--prompt", "What?", "--image", str(built / name))
    assert done.returncode not in (0, 1, 2)
    assert said in done.stderr
    assert "give one still picture" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--image", "good.png"],
        ["--image", "good.png", "--serve"],
        ["--image-folder", "."],
        ["--image-folder", ".", "--prompt", "What?"],
        ["--serve", "--prompt", "What?"],
    ],
)
def test_options_that_do_not_go_together(words: list[str], built: Path) -> None:
    done = run("run", str(built / "sees"), *words)
    assert done.returncode == 2
    assert "goes with" in done.stderr or "exclude each other" in done.stderr


@pytest.fixture(scope="module")
def device(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where an embedded device has the artifact in use."""
    environment = {"PHISHIP_EMBEDDED_ROOT": str(tmp_path_factory.mktemp("device"))}
    smoke = ["--prompt", "Hello", "--expect", ""]
    done = run("deploy", str(built / "sees"), "embedded", *smoke, **environment)
    assert done.returncode == 0, done.stderr
    return environment


def test_a_device_answers_as_the_artifact_does(built: Path, device: dict[str, str]) -> None:
    picture = str(built / "good.png")
    words = ["--prompt", "What?", "--max-tokens", "4", "--system", "Be short.", "--json"]
    words += ["--image", picture, "--image", picture]
    here, there = (
        next(one for one in events(run("run", place, *words, **device)) if one["event"] == "answer")
        for place in (str(built / "sees"), "embedded")
    )
    assert there["new_tokens"] == 4
    assert there["prompt_tokens"] == here["prompt_tokens"] > 2 * 313
    assert there["text"].strip() == here["text"]


@pytest.mark.parametrize(("name", "said"), [("bad.png", "is no picture"), ("none.png", "No such")])
def test_a_bad_picture_is_not_sent(name: str, said: str, built: Path) -> None:
    done = run("run", "pi@nowhere", "--prompt", "What?", "--image", str(built / name))
    assert done.returncode == 14
    assert said in done.stderr
    assert "give one still picture" in done.stderr


@pytest.mark.parametrize(
    ("width", "count", "said"),
    [
        (10_000, 1, "picture 1 of 10000 x 1 pixels: is too narrow"),
        (1, 7, "2191 tokens of pictures"),
    ],
)
def test_pictures_that_the_release_cannot_take_start_no_server(
    width: int, count: int, said: str, built: Path, device: dict[str, str], tmp_path: Path
) -> None:
    picture = tmp_path / "line.png"
    draw(width, 1, 1).save(picture)
    pictures = ["--image", str(picture)] * count
    done = run("run", "embedded", "--prompt", "What?", *pictures, **device)
    assert done.returncode == 14
    assert said in done.stderr
    assert done.stderr.startswith("error: embedded: picture")  # a server's answer names its URL


def test_pillow_that_is_missing_here_is_not_said_of_the_device(built: Path, tmp_path: Path) -> None:
    (tmp_path / "PIL.py").write_text("raise ImportError('no PIL')", encoding="utf-8")
    words = ["--prompt", "What?", "--image", str(built / "good.png")]
    done = run("run", "pi@nowhere", *words, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 14
    assert done.stderr.startswith("error: this machine: pictures are read by Pillow")


def test_too_many_pictures_are_not_sent(built: Path) -> None:
    pictures = ["--image", str(built / "good.png")] * 17
    for place in ("pi@nowhere", str(built / "sees")):
        done = run("run", place, "--prompt", "What?", *pictures)
        assert done.returncode == 14
        assert "17 pictures; a question can have 16" in done.stderr


def test_more_bytes_than_a_request_has_are_not_sent(built: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes((built / "good.png").read_bytes() + bytes(13 << 20))
    pictures = ["--image", str(large)] * 2
    done = run("run", "pi@nowhere", "--prompt", "What?", *pictures)
    assert done.returncode == 14
    assert "more than the 33,554,432 bytes that a request may have" in done.stderr


def test_a_release_that_reads_text_only(
    artifacts: dict[str, Path], built: Path, tmp_path: Path
) -> None:
    environment = {"PHISHIP_EMBEDDED_ROOT": str(tmp_path / "device")}
    assert run("deploy", str(artifacts["onnx"]), "embedded", **environment).returncode == 0
    picture = str(built / "good.png")
    done = run("run", "embedded", "--prompt", "What?", "--image", picture, **environment)
    assert done.returncode == 14
    assert "the release in use there, tiny-phi3-onnx-cpu-int4, reads no pictures" in done.stderr


def test_a_kind_of_tower_that_is_refused(built: Path) -> None:
    recipe = built / "small.yaml"
    refused = RECIPE.format(kind="onnx").replace("int4\n", "int4\n  vision: int4\n")
    recipe.write_text(refused, encoding="utf-8")
    done = run("plan", str(recipe), "--checkpoint", str(built / "source"))
    assert done.returncode == 6
    assert "quantization.vision: got int4; 4 bits move a picture's features" in done.stderr
