"""The page and the Markdown: whole, nothing missing unsaid, everything escaped."""

import html.parser
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.reporting import samples
from tests.reporting.conftest import Rendered, render
from toolkit.pages import make_visible
from toolkit.reporting.heat import draw_heat
from toolkit.reporting.markdown import escape
from toolkit.reporting.scale import HALF_DECADES, make_scale

SECTIONS = ("artifacts", "front", "heat", "trace", "speed", "costs", "origins")
VOID = {"meta", "br"}


class Tags(html.parser.HTMLParser):
    """Which elements a page opens and closes, their attributes and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("kind", ["full", "hostile"])
def test_the_page_is_whole_and_needs_nothing_else(
    kind: str, request: pytest.FixtureRequest
) -> None:
    rendered: Rendered = request.getfixturevalue(kind)
    rendered.page.encode()
    tags = Tags(rendered.page)
    assert tags.open == []
    assert not {"script", "link", "img", "iframe"} & set(tags.opened)
    names = {name for name, _ in tags.attributes}
    assert not {"src", "onerror", "onload"} & names
    assert {value[0] for name, value in tags.attributes if name.endswith("href")} == {"#"}
    assert "http" not in rendered.page
    assert not re.search(r"url\((?!#)|@import", rendered.page)
    for words in ("prefers-color-scheme: dark", "@media print", "viewport"):
        assert words in rendered.page


def test_ids_are_unique_and_found(full: Rendered) -> None:
    tags = Tags(full.page)
    ids = [value for name, value in tags.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in tags.attributes if name.endswith("href")}
    used |= set(re.findall(r"url\(#([^)]+)\)", full.page))
    assert used
    assert used <= set(ids)


def test_charts_take_every_colour_from_the_page(full: Rendered) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", full.page, re.S))
    assert full.page.count("<svg") == 4
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b(?![^\"]*\))", drawn.replace('"#', '"'))
    variables = set(re.findall(r"var\((--[a-z0-9-]+)\)", full.page))
    for mode in ("@media (prefers-color-scheme: dark)", "@media print"):
        assert mode in full.page
    style = full.page[: full.page.index("</style>")]
    bright, _, rest = style.partition("@media (prefers-color-scheme: dark)")
    assert {name for name in variables if f"{name}:" not in style} == {"--drawn"}
    assert "DejaVu" not in full.page
    assert len(re.findall(r"--heat-\d: ", style)) == 27  # bright, dark, print
    assert bright
    assert rest


def test_every_section_shows_its_numbers(full: Rendered) -> None:
    text = Tags(full.page).text
    for words in (
        "tiny-phi3", "8 artifacts", samples.TEXT, "0.0300 ± 0.0010", "93.1% ± 0.6%",
        "66.20 (+0.6%)", "65.8", "gguf, q4_0", "3.3 MB", "Raspberry Pi 5", "Jetson Orin Nano",
        "matched by name alone", "vendor / phiship", "10.0 ×", "187.5 ×",
        "phiship check ARTIFACT --details FILE",
        "phiship bench", "phiship parity", "Agreement by length", "The first 200 of 222 tokens",
        "The ten worst of all 222", "model.0.qkv.weight", "python 3.11.7", "details-0.json",
        "2026-11-21",
    ):  # fmt: skip
        assert words in text, words
    assert 'class="missing"' not in full.page
    assert full.page.count('title="') == 8 * 200


def test_the_front_is_drawn_as_it_is(full: Rendered) -> None:
    """Points of the front are filled; there is one of every artifact, with its name."""
    drawn = re.search(r'<svg[^>]*aria-label="Size against.*?</svg>', full.page, re.S)
    assert drawn
    root = ET.fromstring(drawn[0])
    points = [g for g in root.iter("g") if g.get("id", "").startswith("front-point-")]
    assert len(points) == len(full.content.plotted) == 8
    filled = {
        title.text.partition(":")[0]
        for g in points
        for title in g.iter("title")
        if title.text
        and not any("fill: var(--back)" in use.get("style", "") for use in g.iter("use"))
    }
    assert filled == {entry.manifest.name for entry in full.content.front}
    assert 0 < len(filled) < 8
    texts = {text.text for text in root.iter("text")}
    assert {entry.label for entry in full.content.entries} <= texts


def test_the_heat_map_has_every_matrix(full: Rendered) -> None:
    heated = full.content.heated[:2]
    costs = [tensor.kl or 0.0 for one in heated for tensor in one.tensors]
    scale = make_scale(costs, HALF_DECADES)
    root = ET.fromstring(draw_heat(heated, scale))
    cells = [g for g in root.iter("g") if g.get("id", "").startswith("heat-cell-")]
    assert len(cells) == len(costs) == 2 * (2 + 4 * 2)
    for cell, cost in zip(cells, costs, strict=True):
        assert f"KL {cost:.3g} nats" in next(cell.iter("title")).text or ""
        assert f"var(--heat-{scale.level(cost)})" in next(cell.iter("path")).get("style", "")


def test_equal_input_makes_equal_pages(full: Rendered, tmp_path: Path) -> None:
    again = render(*samples.write_all(tmp_path))
    assert again.page == full.page
    assert again.markdown == full.markdown


def test_hostile_words_are_words(hostile: Rendered) -> None:
    tags = Tags(hostile.page)
    shown = "".join(tags.text.split())
    for words in (
        "</title><script>alert(1)</script>", '"><imgsrc=xonerror=alert(1)>', "{{7*7}}", "&amp;",
        "⟨U+0000⟩⟨U+0007⟩⟨U+001B⟩[31m", "⟨U+202E⟩evil⟨U+2066⟩", "שלום", "]]>", "<i>x</i>",
        "a↵b⇥c⟨U+000D⟩",
        "</svg><script>alert(2)</script>", "$x^2$|`a`*b*[c](d)", "<b>&.jsonl", "∅", "\ufffd",
    ):  # fmt: skip
        assert words in shown, words
    for token in (r"a↵b⇥c⟨U\+000D⟩", "∅", r"\$x\^2\$ \| `a`[^<]*"):
        assert re.search(f'<span class="k\\d[^>]*>{token}</span>', hostile.page), token
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]", hostile.page
    )
    assert tags.opened.count("svg") == 4


def test_hostile_names_are_names_in_charts(hostile: Rendered) -> None:
    drawn = re.findall(r"<svg.*?</svg>", hostile.page, re.S)
    front, heat = ({text.text for text in ET.fromstring(one).iter("text")} for one in drawn[:2])
    names = [make_visible(entry.label) for entry in hostile.content.entries]
    assert len(names) > 20
    assert set(names) <= front
    assert set(names[:10]) <= heat


def test_hostile_words_are_words_in_markdown(hostile: Rendered) -> None:
    hostile.markdown.encode()
    for line in hostile.markdown.splitlines():
        cells = re.split(r"(?<!\\)(?:\\\\)*\|", line)
        assert "<script" not in line.replace("\\<", "")
        if line.startswith("|"):
            assert len(cells) in (5, 6, 7, 8, 9, 10), line
    assert "\\<script\\>alert(1)" in hostile.markdown


def test_markdown_has_the_same_tables(full: Rendered) -> None:
    for words in (
        "# tiny-phi3", "## Artifacts", "## The front", "## The costliest matrices",
        "## Agreement by length", "## Speed and memory", "## What building costs", "## Files",
        "0.0300 ± 0.0010", "vendor / phiship", "Raspberry Pi 5",
    ):  # fmt: skip
        assert words in full.markdown, words
    tables = re.findall(r"(?:^\|.*\n)+", full.markdown, re.M)
    for table in tables:
        assert len({row.count("|") for row in table.splitlines()}) == 1


def test_markdown_escapes() -> None:
    assert escape("a|b\n<c> *d* `e` \\ [f](g) #h") == (
        "a\\|b↵\\<c\\> \\*d\\* \\`e\\` \\\\ \\[f\\](g) \\#h"
    )


@pytest.mark.parametrize(
    ("data", "missing"),
    [
        (("details",), {"speed", "costs"}),
        (("bench",), {"heat", "trace", "costs"}),
    ],
)
def test_what_is_missing_is_said_with_its_command(
    tmp_path: Path, data: tuple[str, ...], missing: set[str]
) -> None:
    artifacts, files = samples.write_all(tmp_path)
    chosen = [path for path in files if path.name.startswith(data)] if data else []
    page = render(artifacts[:2], chosen).page
    said = dict(re.findall(r'<section id="(\w+)(?:-section)?">(.*?)</section>', page, re.S))
    without = {name for name, text in said.items() if 'class="missing"' in text}
    assert without - {"origins"} == missing
    assert set(said) == set(SECTIONS)
    for name in missing:
        assert "<code>phiship " in said[name]


def test_one_artifact_or_none_that_was_checked(tmp_path: Path) -> None:
    alone = render([samples.seal(tmp_path, "alone")], [])
    assert "One artifact alone" in alone.page
    assert "1 artifact of" in Tags(alone.page).text
    for name in ("heat", "trace", "speed", "costs"):
        assert re.search(f'id="{name}-section".*?class="missing".*?</section>', alone.page, re.S)
    unchecked = render([samples.seal(tmp_path, "unchecked", kl=None)], [])
    assert "No divergence is known" in unchecked.page
    assert "| no |" in unchecked.markdown


def test_odd_numbers_are_drawn(tmp_path: Path) -> None:
    """Divergences of zero, equal sizes, no rates, one layer, many layers, no tokens shown."""
    same = [samples.seal(tmp_path, f"a-{n}", kl=kl) for n, kl in enumerate((0.0, 0.0, 1e-9, 2.0))]
    details = samples.make_details(same[0], layers=20)
    lean = samples.msgspec.structs.replace(details, artifact="a-1", tensors=(), texts=details.texts)
    assert "(KL 0)" in render(same, [samples.write(details, tmp_path)], 0).page
    assert lean.tensors == ()
    assert "(KL 0)" in render(same[:2], []).page
    thin = samples.make_details(same[3], layers=1)
    assert render([same[3]], [samples.write(thin, tmp_path)]).page.count("heat-cell-0-") == 6
