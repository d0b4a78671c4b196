"""Pictures to what Phi-3-vision's tower sees: crops of a large picture, and the whole of it small.

Follows Phi3VImageProcessor of the published remote code: its HD transform, its white margin, its
global crop by a bicubic filter (a = -0.75) of the normalized picture.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .failure import Failure
from .manifest import Vision

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MOST_PICTURES = 16  # of one question
MOST_BYTES = 1 << 26
MOST_PIXELS = 1 << 26  # 8192 x 8192; decoded they take 268 MB
# Phones write JPEGs with a preview behind the picture, which Pillow counts as a frame.
STILL = ("JPEG", "MPO")
ORIENTATION = 0x0112  # EXIF's tag: 1 upright, 2 to 8 turned or mirrored
HALF_TAPS = (-0.09375, 0.59375, 0.59375, -0.09375)  # the bicubic filter halfway between pixels
ADVICE = f"give one still picture: {', '.join(FORMATS)}"


@dataclass(frozen=True)
class Pixels:
    """Crops for the tower.

    `values` float32 [pictures, 1 + crops, 3, size, size], the global crop first, zeros behind the
    last; `sizes` int64 [pictures, 2], height and width in pixels; `counts` tokens of each picture.
    """

    values: Any
    sizes: Any
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """Where a picture lies on a canvas of crops, all in pixels, width before height."""

    picture: tuple[int, int]
    canvas: tuple[int, int]
    offset: tuple[int, int]


def read_image(data: bytes, where: str) -> Image:
    """Open one picture's file, upright and in RGB; Failure `request` says what is wrong with it.

    Its size is judged before a pixel is decoded.
    """
    pillow = import_pillow()
    if not data:
        raise _refuse(where, "is empty")
    if len(data) > MOST_BYTES:
        raise _refuse(where, f"has more than the {MOST_BYTES:,} bytes allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's own limit, which is above ours
            picture = pillow.open(BytesIO(data), formats=FORMATS)
            _check(picture, where)
            return _make_upright(picture)
    except pillow.DecompressionBombError:
        raise _refuse(where, f"has more than the {MOST_PIXELS:,} pixels allowed") from None
    except pillow.UnidentifiedImageError:
        raise _refuse(where, f"is no picture that can be read ({len(data)} bytes)") from None
    except Failure:
        raise
    except MemoryError:
        raise _refuse(where, "is too large for the memory here") from None
    except Exception as error:  # Decoders raise anything; a picture must not count as our failure.
        raise _refuse(where, f"is a damaged picture ({type(error).__name__}: {error})") from None


def prepare_files(
    paths: Sequence[Path], vision: Vision | None, name: str, most_tokens: int | None = None
) -> Pixels:
    """Read files and cut them; Failure when `name`, the artifact, reads none, or not so many."""
    if vision is None:
        raise Failure(
            "request", f"{name} reads no pictures", "take an artifact of a model that does"
        )
    if len(paths) > MOST_PICTURES:
        raise Failure("request", f"{len(paths)} pictures; a question can have {MOST_PICTURES}")
    pictures = (read_image(read_bytes(one, str(one)), str(one)) for one in paths)
    return prepare(pictures, vision, most_tokens)


def import_pillow() -> Any:
    """Return PIL.Image; Failure `runtime` when it is missing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise Failure(
            "runtime",
            f"pictures are read by Pillow, which cannot be imported: {error}",
            "install it: python -m pip install pillow",
        ) from None
    return Image


def read_bytes(path: Path, where: str) -> bytes:
    """Return a file, or as much of it as shows that it is too large; Failure `request`."""
    try:
        with path.open("rb") as stream:
            return stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise _refuse(where, f"cannot be read: {error.strerror}") from None


def _check(picture: Image, where: str) -> None:
    width, height = picture.size
    if not (width and height):
        raise _refuse(where, f"has {width} x {height} pixels")
    if width * height > MOST_PIXELS:
        raise _refuse(where, f"has {width} x {height} pixels; allowed are {MOST_PIXELS:,} in all")
    if picture.format not in STILL and getattr(picture, "is_animated", False):
        raise _refuse(where, "is animated")
    if picture.mode.startswith("I"):
        # To RGB, as the source has it, Pillow cuts them off at 255: all but black is white.
        raise _refuse(where, "has 16 bits of grey a pixel; allowed are 8: save it so")


def _make_upright(picture: Image) -> Image:
    """Turn it as its camera says, then drop all but three channels, as the source does.

    Not by ImageOps.exif_transpose, which writes all of the EXIF anew and fails on what is damaged.
    """
    turns = import_pillow().Transpose
    ways = {
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE, 6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90,
    }  # fmt: skip
    try:
        way = ways.get(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF that cannot be read says nothing
        way = None
    return (picture if way is None else picture.transpose(way)).convert("RGB")


def _refuse(where: str, what: str) -> Failure:
    return Failure("request", f"{where}: {what}", ADVICE)


def place_pictures(
    sizes: Iterable[tuple[int, int]], vision: Vision, most_tokens: int | None = None
) -> Iterator[Grid]:
    """Place pictures of these widths and heights, one after the other.

    Failure for one that is too narrow; of kind `context` at the first that leads beyond
    `most_tokens`.
    """
    tokens = 0
    for number, size in enumerate(sizes, 1):
        grid = place_picture(*size, vision, f"picture {number}")
        columns, rows = (side // vision.image_size for side in grid.canvas)
        tokens += count_tokens(rows, columns, vision)
        if most_tokens is not None and tokens > most_tokens:
            raise Failure(
                "context",
                f"picture {number} leads to {tokens} tokens of pictures; this artifact's context "
                f"holds {most_tokens}",
                "give fewer pictures, or a longer context",
            )
        yield grid


def place_picture(width: int, height: int, vision: Vision, where: str = "a picture") -> Grid:
    """Choose size and canvas: as large as the crops allow; Failure for a picture too narrow."""
    size, longest = vision.image_size, max(width, height)
    ratio = longest / min(width, height)
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= vision.crops:
        scale += 1
    long_side = scale * size
    short_side = int(long_side / ratio)
    if short_side < 1:
        what = "is too narrow: it has no line left"
        raise _refuse(f"{where} of {width} x {height} pixels", what)
    canvas_side = math.ceil(short_side / size) * size
    margin = int((canvas_side - short_side) / 2)
    if width >= height:
        return Grid((long_side, short_side), (long_side, canvas_side), (0, margin))
    return Grid((short_side, long_side), (canvas_side, long_side), (margin, 0))


def prepare(pictures: Iterable[Image], vision: Vision, most_tokens: int | None = None) -> Pixels:
    """Cut pictures into crops; Failure as `place_pictures`.

    One after the other, and none once they take too many tokens: a file of 70 bytes becomes 20 MB.
    """
    opened: list[Image] = []  # the one that is being placed

    def measure() -> Iterator[tuple[int, int]]:
        for picture in pictures:
            opened.append(picture)
            yield picture.size

    grids = place_pictures(measure(), vision, most_tokens)
    return cut_crops([_paint(opened.pop(), grid, vision) for grid in grids], vision)


def cut_crops(canvases: Sequence[Any], vision: Vision) -> Pixels:
    """Cut normalized pictures, float32 [3, rows * size, columns * size] each, into crops."""
    import numpy as np

    size = vision.image_size
    shapes = [(canvas.shape[1] // size, canvas.shape[2] // size) for canvas in canvases]
    most = max(rows * columns for rows, columns in shapes)
    values = np.zeros((len(canvases), 1 + most, 3, size, size), np.float32)
    for place, canvas in enumerate(canvases):
        rows, columns = shapes[place]
        values[place, 0] = _shrink(_shrink(canvas, size, 2), size, 1)
        crops = canvas.reshape(3, rows, size, columns, size).transpose(1, 3, 0, 2, 4)
        values[place, 1 : 1 + rows * columns] = crops.reshape(-1, 3, size, size)
    return Pixels(
        values,
        np.array([[rows * size, columns * size] for rows, columns in shapes], np.int64),
        tuple(count_tokens(rows, columns, vision) for rows, columns in shapes),
    )


def count_tokens(rows: int, columns: int, vision: Vision) -> int:
    """Tokens of a picture of so many crops: theirs, the global crop's, and the separators."""
    side = vision.side
    return (rows * columns + 1) * side**2 + 1 + (rows + 1) * side


def _paint(picture: Image, grid: Grid, vision: Vision) -> Any:
    """The picture on its white canvas, normalized: float32 [3, height, width]."""
    import numpy as np

    pillow = import_pillow()
    if picture.width < picture.height:
        # Lying, as the source does it: Pillow rounds to 8 bits between its two passes.
        turned = picture.transpose(pillow.Transpose.TRANSPOSE)
        resized = turned.resize(grid.picture[::-1], pillow.Resampling.BILINEAR)
        resized = resized.transpose(pillow.Transpose.TRANSPOSE)
    else:
        resized = picture.resize(grid.picture, pillow.Resampling.BILINEAR)
    canvas = pillow.new("RGB", grid.canvas, (255, 255, 255))
    canvas.paste(resized, grid.offset)
    values = np.asarray(canvas, np.float32) / np.float32(255)
    values = (values - np.array(vision.mean, np.float32)) / np.array(vision.std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _shrink(values: Any, size: int, axis: int) -> Any:
    """Bicubic without a wider filter, to `size` along one axis that is a multiple of it.

    The scale is a whole number, so every output lies on a pixel, or halfway between two.
    """
    import numpy as np

    length = values.shape[axis]
    scale = length // size
    first = np.arange(size) * scale + (scale - 1) // 2
    if scale % 2:
        return values.take(first, axis)
    return sum(
        values.take((first + step).clip(0, length - 1), axis) * np.float32(weight)
        for step, weight in enumerate(HALF_TAPS, start=-1)
    )
