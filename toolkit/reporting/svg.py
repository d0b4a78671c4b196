"""matplotlib's drawings as SVG that stands in an HTML page and takes its colours from there."""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup

from toolkit.errors import require

# Colours to draw with: each stands for a variable of the page's style, which knows whether the
# screen is dark. matplotlib needs to see numbers, so these are numbers that nothing else uses.
INK = {
    "text": "#010101", "soft": "#010102", "line": "#010103", "back": "#010104",
    **{f"series-{number}": f"#0102{number:02d}" for number in range(6)},
    **{f"heat-{number}": f"#0103{number:02d}" for number in range(9)},
    **{f"heat-text-{number}": f"#0104{number:02d}" for number in range(9)},
}  # fmt: skip
VARIABLES = {colour: f"var(--{name})" for name, colour in INK.items()}
STYLED = ("fill", "stroke")
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "phiship",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "hatch.linewidth": 0.8,
    "axes.edgecolor": INK["line"],
    "axes.labelcolor": INK["soft"],
    "axes.titlecolor": INK["text"],
    "text.color": INK["text"],
}


@contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
    """Yield a figure of that many pixels, with the page's colours set."""
    matplotlib, figures = require("matplotlib"), require("matplotlib.figure")
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # A browser has glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = figures.Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        figure.patch.set_alpha(0)
        require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
        yield figure


def to_markup(
    figure: Any, name: str, label: str, titles: Mapping[str, str] | None = None
) -> Markup:
    """Return the drawing as an <svg> element; to be called while `drawing`.

    `name` goes before every id, which have to differ in a page; `label` says what it shows to those
    who cannot see it; `titles` are shown at what has these group ids.
    """
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=nothing, transparent=True)
    root = ET.fromstring(stream.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        _rewrite(element, name)
    for element in root.iter("g"):
        title = (titles or {}).get(element.get("id", "").removeprefix(f"{name}-"))
        if title:
            ET.SubElement(element, "title").text = title
            element.insert(0, element[-1])
            del element[-1]
    _dress(root, label)
    return Markup(ET.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _rewrite(element: ET.Element, name: str) -> None:
    """Drop namespaces, which HTML knows itself; make ids unique; name colours by variable."""
    element.tag = _local(element.tag)
    attributes = {_local(key): value for key, value in element.attrib.items()}
    style = attributes.pop("style", "")
    for key in STYLED:
        if attributes.get(key) in VARIABLES:
            style = f"{key}: {attributes.pop(key)}; {style}"
    if style:
        attributes["style"] = _rewrite_style(style)
    for key, value in attributes.items():
        if key == "id":
            attributes[key] = f"{name}-{value}"
        elif key == "href":
            attributes[key] = "#" + f"{name}-{value[1:]}"
        else:
            attributes[key] = value.replace("url(#", f"url(#{name}-")
    element.attrib = attributes


def _rewrite_style(style: str) -> str:
    style = re.sub(r"#[0-9a-f]{6}", lambda found: VARIABLES.get(found[0], found[0]), style)
    # One way to name fonts or the other, by matplotlib's version.
    return re.sub(r"(font-family:|font:[^;]*?px) [^;]+", r"\1 system-ui, sans-serif", style)


def _dress(root: ET.Element, label: str) -> None:
    box = root.get("viewBox", "")
    root.attrib = {"viewBox": box, "role": "img", "aria-label": label}
    root.set("style", f"--drawn: {box.split()[2]}px")
