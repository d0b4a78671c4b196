"""The page in a real browser: bright, dark, narrow, on paper."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.reporting.conftest import Rendered

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"
)
MEASURE = Path(__file__).with_name("measure.html")
SWITCHES = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging")
MODES = {"bright": 1, "dark": 0}
BACK = {"bright": (255, 255, 255), "dark": (20, 23, 27)}
TEXT_CONTRAST, MARK_CONTRAST = 4.5, 3.0  # what WCAG 2 asks of text, and of what else is drawn


@dataclass(frozen=True)
class Seen:
    """What a browser said: its measures at 1200 and 400 pixels, and its messages."""

    wide: dict[str, Any]
    narrow: dict[str, Any]
    messages: list[str]


def start(folder: Path, mode: str, what: str, *words: str) -> "subprocess.Popen[str]":
    """Start the browser with a profile of its own."""
    assert CHROMIUM
    profile = f"--user-data-dir={folder / f'profile-{mode}-{what}'}"
    scheme = f"--blink-settings=preferredColorScheme={MODES[mode]}"
    return subprocess.Popen(
        [CHROMIUM, *SWITCHES, "--enable-logging=stderr", profile, scheme, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> tuple[str, list[str]]:
    """What the browser printed, and the messages of its console."""
    out, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    return out, [line for line in log.splitlines() if "CONSOLE" in line]


def read_measures(done: tuple[str, list[str]]) -> Seen:
    found = re.search(r'<pre id="measures">(.+?)</pre>', done[0], re.S)
    assert found, "the page could not be measured"
    return Seen(*json.loads(html.unescape(found[1])), done[1])


@pytest.fixture(scope="module")
def folder(full: Rendered, hostile: Rendered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, and beside them what measures them."""
    folder = tmp_path_factory.mktemp("browser")
    for name, page in (("full", full.page), ("hostile", hostile.page)):
        (folder / f"{name}.html").write_text(page, "utf-8")
        told = json.dumps(page).replace("</", "<\\/")
        measures = MEASURE.read_text("utf-8").replace("PAGE;", f"{told};", 1)
        (folder / f"measure-{name}.html").write_text(measures, "utf-8")
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Seen]:
    """The measures of both modes, and of the hostile page."""
    runs = {
        name: start(
            folder, mode, name, "--virtual-time-budget=5000", "--dump-dom",
            (folder / f"measure-{page}.html").as_uri(),
        )
        for name, mode, page in (
            ("bright", "bright", "full"), ("dark", "dark", "full"), ("hostile", "dark", "hostile"),
        )
    }  # fmt: skip
    return {name: read_measures(finish(process)) for name, process in runs.items()}


@pytest.fixture(scope="module")
def pictures(folder: Path) -> dict[str, NDArray[Any]]:
    """Screenshots of both modes, [height, width, 3] bytes."""
    from matplotlib.image import imread

    runs = {}
    for mode in MODES:
        words = ("--window-size=1200,1600", f"--screenshot={folder / mode}.png")
        runs[mode] = start(folder, mode, "picture", *words, (folder / "full.html").as_uri())
    for process in runs.values():
        assert finish(process)[1] == []
    found = {mode: imread(folder / f"{mode}.png") for mode in MODES}
    return {mode: np.rint(255 * picture[..., :3]).astype(int) for mode, picture in found.items()}


@pytest.mark.parametrize("name", ["bright", "dark", "hostile"])
def test_it_is_shown_without_a_message(seen: dict[str, Seen], name: str) -> None:
    for found in (seen[name].wide, seen[name].narrow):
        assert found["page_height"] > 2000
        assert found["tokens"] >= 200
        assert len(found["seen"]) == 7 + 4
        assert all(height > 40 for height in found["seen"])
    assert seen[name].messages == []


@pytest.mark.parametrize("name", ["bright", "hostile"])
def test_it_is_never_wider_than_the_screen(seen: dict[str, Seen], name: str) -> None:
    for found, width in ((seen[name].wide, 1200), (seen[name].narrow, 400)):
        assert found["width"] == width
        assert found["page_width"] <= width


@pytest.mark.parametrize("mode", MODES)
def test_everything_can_be_read(seen: dict[str, Seen], mode: str) -> None:
    found = seen[mode].wide
    faint = [one for one in [*found["drawn"], *found["words"]] if one["contrast"] < TEXT_CONTRAST]
    assert faint == []
    assert len(found["words"]) > 300
    assert len([one for one in found["drawn"] if one["inCell"]]) == 8 * 10  # all of the heat map
    assert len(found["marks"]) == 8
    assert min(found["marks"]) >= MARK_CONTRAST


def test_labels_are_not_cut_and_not_tiny(seen: dict[str, Seen]) -> None:
    for found in (seen["bright"].wide, seen["bright"].narrow):
        assert [one for one in found["drawn"] if one["cut"] > 1] == []
        assert min(one["pixels"] for one in found["drawn"]) >= 8  # scrolled, not shrunk
    assert [one for one in seen["hostile"].wide["drawn"] if one["cut"] > 1] == []


@pytest.mark.parametrize("mode", MODES)
def test_pictures_have_the_colours_of_the_mode(
    pictures: dict[str, NDArray[Any]], mode: str
) -> None:
    picture = pictures[mode]
    assert picture.shape == (1600, 1200, 3)
    for corner in (picture[2, 2], picture[2, -3], picture[-3, 2]):
        assert tuple(corner) == BACK[mode]
    # Of a page of text and charts most is background, and much is not.
    share = float(np.mean(np.all(picture == BACK[mode], axis=-1)))
    assert 0.5 < share < 0.95


def test_it_prints(folder: Path) -> None:
    path = folder / "page.pdf"
    words = ("--no-pdf-header-footer", f"--print-to-pdf={path}")
    assert finish(start(folder, "dark", "print", *words, (folder / "full.html").as_uri()))[1] == []
    pages = len(re.findall(rb"/Type\s*/Page\b", path.read_bytes()))
    assert 3 <= pages <= 12
