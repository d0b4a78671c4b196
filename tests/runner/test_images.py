"""Pictures from files, whole and bad, to the crops that the source's own processor cuts."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.golden.vision_cases import GOLDEN, wide_picture
from tests.vision_checkpoints import PREPROCESSOR, draw
from toolkit.runner.failure import Failure
from toolkit.runner.images import (
    MOST_BYTES,
    count_tokens,
    cut_crops,
    place_picture,
    prepare,
    prepare_files,
    read_bytes,
    read_image,
)
from toolkit.runner.manifest import Vision

MEAN, STD = (tuple(PREPROCESSOR[key]) for key in ("image_mean", "image_std"))
VISION = Vision(336, 12, 16, MEAN, STD)
PICTURE = draw(60, 40, 3)
ROTATED = 6  # EXIF: the camera was held upright, its picture lies on the left side
ORIENTATION = 0x0112


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def difference(found: Image.Image, expected: Image.Image) -> float:
    return float(np.abs(np.asarray(found, np.float32) - np.asarray(expected, np.float32)).mean())


def draw_grey() -> Image.Image:
    return Image.fromarray(np.arange(60 * 40, dtype=np.uint16).reshape(40, 60) * 27)


def make_png(width: int, height: int, bits: int = 8, lines: bytes = bytes(100)) -> bytes:
    """A PNG in colour that says a size and holds, by default, next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF"])
def test_a_lossless_file_is_the_picture(kind: str, tmp_path: Path) -> None:
    picture = PICTURE if kind != "GIF" else PICTURE.quantize(64).convert("RGB")
    path = tmp_path / "picture"
    path.write_bytes(encode(picture, kind))
    assert difference(read_image(read_bytes(path, "it"), "it"), picture) == 0


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("WEBP", "RGB"), ("PNG", "RGBA"),
     ("PNG", "L"), ("PNG", "P"), ("PNG", "1"), ("PNG", "LA")],
)  # fmt: skip
def test_any_colours_become_rgb(kind: str, mode: str) -> None:
    picture = PICTURE.convert(mode)
    found = read_image(encode(picture, kind), "it")
    assert found.mode == "RGB"
    # JPEG and WebP lose some of the drawing's sharp edges.
    assert difference(found, picture.convert("RGB")) < (12 if kind in ("JPEG", "WEBP") else 1)


def test_colours_of_16_bits_keep_their_upper_ones() -> None:
    picture = np.asarray(PICTURE)
    lines = [b"\0" + (row * 256.0 + 200).astype(">u2").tobytes() for row in picture]
    data = make_png(PICTURE.width, PICTURE.height, 16, b"".join(lines))
    assert difference(read_image(data, "it"), PICTURE) == 0


def test_an_inverted_cmyk_would_be_seen() -> None:
    white = read_image(encode(Image.new("RGB", (16, 16), "white").convert("CMYK"), "JPEG"), "it")
    assert np.asarray(white).min() > 240


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_as_its_camera_says(kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATED
    found = read_image(encode(PICTURE, kind, exif=exif, quality=95), "it")
    assert found.size == PICTURE.size[::-1]
    turned = PICTURE.transpose(Image.Transpose.ROTATE_270)
    assert difference(found, turned) < 12
    assert difference(found, ImageOps.flip(turned)) > 24


def test_a_phones_preview_is_no_animation() -> None:
    data = encode(PICTURE, "MPO", save_all=True, append_images=[draw(30, 20, 4)], quality=95)
    assert difference(read_image(data, "it"), PICTURE) < 12


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"no picture at all", "is no picture that can be read"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no picture"),
    "postscript": (lambda: encode(PICTURE, "EPS"), "is no picture"),
    "zero": (lambda: make_png(0, 10), "is no picture|has 0 x 10 pixels"),
    "bomb": (lambda: make_png(30_000, 30_000), "has more than|has 30000 x 30000 pixels"),
    "large": (lambda: make_png(8200, 8200), "has 8200 x 8200 pixels; allowed are 67,108,864"),
    "cut-png": (lambda: encode(PICTURE, "PNG")[:600], "is a damaged picture"),
    "cut-jpeg": (lambda: encode(PICTURE, "JPEG")[:700], "is a damaged picture"),
    "grey-16": (lambda: encode(draw_grey(), "PNG"), "has 16 bits of grey a pixel"),
    "hollow": (lambda: make_png(60, 40), "is a damaged picture"),
    **{
        f"animated-{kind}": (
            lambda kind=kind: encode(  # type: ignore[misc]
                PICTURE, kind, save_all=True, append_images=[draw(60, 40, 4)]
            ),
            "is animated",
        )
        for kind in ("GIF", "WEBP", "PNG")
    },
}


@pytest.mark.parametrize("which", BAD)
def test_a_bad_picture_is_refused_in_a_sentence(which: str) -> None:
    make, said = BAD[which]
    with pytest.raises(Failure, match=f"it: ({said})") as caught:
        read_image(make(), "it")
    assert caught.value.kind == "request"
    assert "give one still picture" in caught.value.advice


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="cannot be read: No such file"):
        read_bytes(tmp_path / "none.png", "none.png")
    with pytest.raises(Failure, match="cannot be read: Is a directory"):
        read_bytes(tmp_path, "a folder")
    large = tmp_path / "large.png"
    with large.open("wb") as stream:
        stream.truncate(MOST_BYTES + 1)
    with pytest.raises(Failure, match="has more than the 67,108,864 bytes allowed"):
        read_image(read_bytes(large, "large.png"), "large.png")


def test_a_model_that_reads_text_only_says_so(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="mini reads no pictures"):
        prepare_files([tmp_path / "a.png"], None, "mini")


def test_a_line_is_too_narrow() -> None:
    with pytest.raises(Failure, match="picture 2 of 10000 x 1 pixels: is too narrow"):
        prepare([Image.new("RGB", (1, 1)), Image.new("RGB", (10_000, 1))], VISION)


def test_pictures_beyond_the_context_are_not_opened() -> None:
    """A file of a few bytes becomes 16 crops: their tokens are counted before they are cut."""
    opened = []

    def read() -> Iterator[Image.Image]:
        for number in range(16):
            opened.append(number)
            yield Image.new("RGB", (1, 1))

    with pytest.raises(Failure, match="picture 2 leads to 5018 tokens of pictures;") as caught:
        prepare(read(), VISION, 5017)
    assert (opened, caught.value.kind) == ([0, 1], "context")
    assert prepare([Image.new("RGB", (1, 1))] * 2, VISION, 5018).counts == (2509, 2509)


@pytest.mark.parametrize(
    ("size", "crops", "canvas", "tokens"),
    [
        # 1008 x 1344 and its 1,921 tokens: what the published processor makes of 640 x 480.
        ((640, 480), 16, (1344, 1008), 1921),
        ((300, 500), 16, (1008, 1680), 2377),
        ((336, 336), 16, (1344, 1344), 2509),
        ((336, 336), 4, (672, 672), 757),
        ((1344, 336), 16, (2688, 672), 2485),
        ((336, 336), 1, (336, 336), 313),
    ],
)
def test_grid_and_count_are_the_sources(
    size: tuple[int, int], crops: int, canvas: tuple[int, int], tokens: int
) -> None:
    vision = Vision(336, 12, crops, MEAN, STD)
    grid = place_picture(*size, vision)
    assert grid.canvas == canvas
    assert count_tokens(canvas[1] // 336, canvas[0] // 336, vision) == tokens


def test_the_global_crop_is_torchs_bicubic() -> None:
    """F.interpolate without antialias, on 3 x 4 crops: an odd and an even scale."""
    found = cut_crops([wide_picture()], VISION).values[0, 0]
    # float32, and torch adds in another order: 2.4e-7 measured.
    np.testing.assert_allclose(found[:, ::16, ::16], np.load(GOLDEN)["small"], atol=2e-6)


def test_crops_are_the_canvas_line_by_line() -> None:
    pixels = cut_crops([wide_picture()], VISION)
    assert pixels.sizes.tolist() == [[1008, 1344]]
    crop = wide_picture()[:, 336:672, 672:1008]  # second line, third crop
    assert np.array_equal(pixels.values[0, 1 + 4 + 2], crop)


def test_a_standing_picture_is_cut_as_if_it_lay() -> None:
    """The source turns it, resizes and turns it back: Pillow rounds between its two passes."""
    picture = draw(300, 500, 2)
    lying = prepare([picture.transpose(Image.Transpose.TRANSPOSE)], VISION).values[0, 1:]
    standing = prepare([picture], VISION).values[0, 1:]
    rows, columns = 5, 3
    turned = lying.reshape(columns, rows, 3, 336, 336).transpose(1, 0, 2, 4, 3)
    assert np.array_equal(standing, turned.reshape(standing.shape))


def test_the_margin_is_white_and_above_and_below() -> None:
    pixels = prepare([Image.new("RGB", (640, 480), "black")], VISION)
    # 1344 x 1008 is filled; 640 x 300 leaves a margin.
    assert pixels.values[0, 1:].max() < 0
    margin = prepare([Image.new("RGB", (640, 300), "black")], Vision(336, 12, 2, MEAN, STD))
    white = (1 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    np.testing.assert_allclose(margin.values[0, 1, :, 0, 0], white, rtol=1e-6)
    np.testing.assert_allclose(margin.values[0, 1, :, -1, 0], white, rtol=1e-6)
    assert (margin.values[0, 1, :, 168] < 0).all()


def test_exif_that_cannot_be_written_again_says_its_orientation_all_the_same() -> None:
    """Pillow's own transposing writes all of it anew, and fails on tags of other types."""
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATED
    whole = exif.tobytes()
    count = int.from_bytes(whole[14:16], "little" if whole[6:8] == b"II" else "big")
    assert count == 1
    order = "<" if whole[6:8] == b"II" else ">"
    # A second tag: Software as one float, where text is expected.
    entry = struct.pack(f"{order}HHIf", 0x0131, 11, 1, 1.5)
    broken = whole[:14] + struct.pack(f"{order}H", 2) + whole[16:28] + entry + whole[28:]
    data = encode(PICTURE, "JPEG", exif=broken, quality=95)
    found = read_image(data, "it")
    assert difference(found, PICTURE.transpose(Image.Transpose.ROTATE_270)) < 12
    with pytest.raises(Exception, match="encode"):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
