"""Pictures in requests: as bytes, as files of one folder, never from the network."""

import base64
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.running import Reply, Server, running, serving
from tests.vision_checkpoints import draw, write_vision_checkpoint
from toolkit.artifact import Limits
from toolkit.build import build
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.formats.onnx.recipe import OnnxQuantization, OnnxRecipe
from toolkit.formats.openvino.recipe import OpenvinoQuantization, OpenvinoRecipe
from toolkit.job import Options
from toolkit.recipe import Recipe
from toolkit.report import Report
from toolkit.runner.generate import generate
from toolkit.runner.serving.pictures import Eyes, FolderFile
from toolkit.runner.serving.refusal import Refusal

QUESTION = "What is shown?"
TOKENS = 6


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = OnnxRecipe(
        name="sees", model="phi-3-vision", title="sees", context_length=2048,
        quantization=OnnxQuantization(precision="fp32", head="fp32", vision="fp32"),
        check=Limits(max_kl=1e-6),
    )  # fmt: skip
    return build_small(recipe, tmp_path_factory.mktemp("pictures"))


def build_small(recipe: Recipe, folder: Path) -> Path:
    source = Checkpoint.open(write_vision_checkpoint(folder / "source", crops=1))
    return build(recipe, source, folder, Options(), Console(as_json=True), Report("sees"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, a link out of it, and a picture outside."""
    outside = tmp_path_factory.mktemp("files")
    inside = outside / "inside"
    inside.mkdir()
    draw(200, 100, 1).save(inside / "a b.png")
    draw(100, 200, 2).save(outside / "secret.png")
    (inside / "link.png").symlink_to(outside / "secret.png")
    (inside / "text.png").write_text("no picture", encoding="utf-8")
    (inside / "again.png").symlink_to("a b.png")
    (inside / "loop.png").symlink_to("loop.png")
    os.mkfifo(inside / "pipe.png")
    return inside


@pytest.fixture(scope="module")
def server(artifact: Path, folder: Path) -> Iterator[Server]:
    """A server that may read the folder."""
    command = [sys.executable, "-m", "toolkit.runner", "serve", "--artifact", str(artifact)]
    command += ["--json", "--port", "0", "--image-folder", str(folder)]
    with running(command) as one:
        yield one
        assert one.ask("GET", "/health").json == {"status": "ok"}
        assert not [line for line in one.log if "Traceback" in line or "File " in line]


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def ask(server: Server, *urls: str, **more: Any) -> Reply:
    images = [{"type": "image_url", "image_url": {"url": url, **more}} for url in urls]
    content = [*images, {"type": "text", "text": QUESTION}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
    return server.ask("POST", "/v1/chat/completions", body)


@pytest.mark.parametrize("kind", ["data", "file", "link"])
def test_the_answer_is_the_runners(kind: str, server: Server, artifact: Path, folder: Path) -> None:
    path = folder / "a b.png"
    expected = generate(artifact, QUESTION, TOKENS, lambda _: None, images=[path])
    urls = {"data": data_url(path), "file": path.as_uri(), "link": f"file://{folder}/again.png"}
    reply = ask(server, urls[kind], detail="high")
    assert reply.status == 200
    assert reply.text == expected["text"]
    assert reply.json["usage"]["prompt_tokens"] == expected["prompt_tokens"] > 300


def test_an_openvino_artifact_answers_as_its_runner(folder: Path, tmp_path: Path) -> None:
    """Its networks are run step by step; two pictures and a text alone go through one server."""
    recipe = OpenvinoRecipe(
        name="sees", model="phi-3-vision", title="sees", context_length=2048,
        quantization=OpenvinoQuantization(precision="int4", group_size=32, vision="int8"),
        check=Limits(max_kl=0.3, min_top1=0.4),
    )  # fmt: skip
    artifact, path = build_small(recipe, tmp_path), folder / "a b.png"
    seen = generate(artifact, QUESTION, TOKENS, lambda _: None, images=[path, path])
    plain = generate(artifact, "Hello", TOKENS, lambda _: None)
    with serving(artifact, context_tokens=2048) as one:
        for _ in range(2):
            reply = ask(one, data_url(path), data_url(path))
            assert reply.text == seen["text"]
            assert reply.json["usage"]["prompt_tokens"] == seen["prompt_tokens"] > 600
            assert one.chat("Hello", max_tokens=TOKENS).text == plain["text"]
        refused = ask(one, *[data_url(path)] * 7)  # 313 tokens each, of 2,048
        assert refused.error["code"] == "context_length_exceeded"
        assert "picture 7 leads to 2191 tokens of pictures" in refused.error["message"]


def test_several_pictures_and_then_text_alone(server: Server, artifact: Path, folder: Path) -> None:
    path = folder / "a b.png"
    expected = generate(artifact, QUESTION, TOKENS, lambda _: None, images=[path, path])
    assert ask(server, data_url(path), path.as_uri()).text == expected["text"]
    plain = generate(artifact, "Hello", TOKENS, lambda _: None)
    assert server.chat("Hello", max_tokens=TOKENS).text == plain["text"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:1/a.png", "nothing is fetched from the network"),
        ("https://example.org/a.png", "nothing is fetched from the network"),
        ("ftp://example.org/a.png", "nothing is fetched"),
        ("a b.png", "can only be a data: URL"),
        ("data:text/html;base64,AAAA", "can only be a data: URL of an image"),
        ("data:image/png,AAAA", "can only be a data: URL"),
        ("data:image/png;base64,A", "is not base64"),
        ("data:image/png;base64,%%%", "is not base64"),
        ("data:image/png;base64,\u00e9", "is not base64"),
        ("data:image/png;base64,", "picture 1: is empty"),
        ("data:image/png;base64,bm90aGluZw==", "picture 1: is no picture that can be read"),
        ("file://{folder}/../secret.png", "names no file of the folder"),
        ("file://{folder}/%2e%2e/secret.png", "names no file of the folder"),
        ("file://{folder}/link.png", "names no file of the folder"),
        ("file://{folder}/none.png", "names no file of the folder"),
        ("file://{folder}", "names no file of the folder"),
        ("file://{folder}/pipe.png", "names no file of the folder"),
        ("file://{folder}/loop.png", "names no file of the folder"),
        ("file://{folder}/a%00b.png", "names no file of the folder"),
        ("file://example.org{folder}/a%20b.png", "names no file of the folder"),
        ("file://[", "names no file of the folder"),
        ("file://\u2100/x", "names no file of the folder"),
        ("file://{folder}/text.png", "picture 1: is no picture that can be read"),
    ],
)
def test_other_urls_are_refused(url: str, said: str, server: Server, folder: Path) -> None:
    reply = ask(server, url.replace("{folder}", str(folder)))
    assert reply.status == 400
    assert said in reply.error["message"]
    assert "secret" not in reply.error["message"]


@pytest.mark.parametrize(
    "image",
    [None, "data:", {}, {"url": 3}, {"url": "data:", "colour": 1}, {"url": "x", "detail": "huge"}],
)
def test_a_part_that_is_no_picture_is_refused(image: Any, server: Server) -> None:
    part = {"type": "image_url", "image_url": image}
    body = {"messages": [{"role": "user", "content": [part]}]}
    reply = server.ask("POST", "/v1/chat/completions", body)
    assert reply.status == 400
    assert reply.error["param"] == "messages[0].content[0]"


def test_too_many_pictures_are_refused(server: Server, folder: Path) -> None:
    assert (
        "can have 16 pictures"
        in ask(server, *[(folder / "a b.png").as_uri()] * 17).error["message"]
    )


def test_pictures_beyond_the_context_are_refused(server: Server, folder: Path) -> None:
    reply = ask(server, *[(folder / "a b.png").as_uri()] * 7)  # 313 tokens each, of 2,048
    assert reply.status == 400
    assert reply.error["code"] == "context_length_exceeded"


def test_a_text_cannot_stand_for_a_picture(server: Server, folder: Path) -> None:
    """The mark of a picture is no text that a client can write."""
    image = {"type": "image_url", "image_url": {"url": (folder / "a b.png").as_uri()}}
    for content in ([image, {"type": "text", "text": "\0 and"}], "\0"):
        body = {"messages": [{"role": "user", "content": content}]}
        reply = server.ask("POST", "/v1/chat/completions", body)
        assert reply.status == 400
        assert json.dumps(reply.error)


def test_files_are_for_servers_that_may_read_a_folder(artifact: Path, folder: Path) -> None:
    with serving(artifact, context_tokens=2048) as one:
        reply = ask(one, (folder / "a b.png").as_uri())
    assert reply.status == 400
    assert "names a file, which this server does not read" in reply.error["message"]


def test_a_name_that_became_another_files_is_not_read(folder: Path, tmp_path: Path) -> None:
    """Between a request and its turn somebody puts a link, or a folder's, in a file's place."""
    inside = tmp_path / "inside"
    (inside / "below").mkdir(parents=True)
    (inside / "below" / "one.png").write_bytes(b"one")
    (tmp_path / "one.png").write_bytes(b"secret")
    eyes = Eyes(inside)
    url = (inside / "below" / "one.png").as_uri()
    for _ in range(2):
        eyes.take({"type": "image_url", "image_url": {"url": url}}, "here")
    first, second = (one for one in eyes.found if isinstance(one, FolderFile))
    assert first.read() == b"one"
    (inside / "below" / "one.png").unlink()
    (inside / "below").rmdir()
    (inside / "below").symlink_to(tmp_path)
    with pytest.raises(Refusal, match="here: its url names no file of the folder"):
        second.read()


def test_a_bomb_is_refused_before_it_is_decoded(server: Server) -> None:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("1", (9000, 9000)).save(stream, "PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    reply = ask(server, url)
    assert reply.status == 400
    assert "has 9000 x 9000 pixels; allowed are 67,108,864" in reply.error["message"]
