"""How formats look: a colour of the page's style and a mark that differs without colour."""

from dataclasses import dataclass

from toolkit.reporting.content import Entry


@dataclass(frozen=True)
class Look:
    """`marker` is matplotlib's, `sign` the same in a text, `ink` a variable of the style."""

    ink: str
    marker: str
    sign: str


LOOKS = {
    "onnx": Look("series-0", "o", "●"),
    "gguf": Look("series-1", "s", "■"),
    "openvino": Look("series-2", "^", "▲"),
    "mlx": Look("series-3", "D", "◆"),
}
OTHER = Look("series-4", "v", "▼")


def find_look(entry: Entry) -> Look:
    """The look of an artifact's format; formats that are not known share one."""
    return LOOKS.get(entry.manifest.format, OTHER)
