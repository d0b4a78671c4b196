"""HTML pages that need nothing else: one look, one way to escape."""

import unicodedata
from pathlib import Path

SIGNS = {"\n": "↵", "\t": "⇥"}
JOINERS = "\u200c\u200d"  # within words of Persian and Indic scripts, and within emoji
UNREADABLE = "\ufffd"


def make_visible(text: str, keep: str = "") -> str:
    """Return the text with every character shown: controls, and what changes direction, as signs.

    The result can be encoded as UTF-8 and stands in HTML, SVG and XML once it is escaped. What
    `keep` holds, such as line feeds, is left as it is.
    """
    if text.isprintable():
        return text
    return "".join(one if one in keep else _show(one) for one in text)


def _show(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    if character in SIGNS:
        return SIGNS[character]
    if category == "Cs" or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF:
        return UNREADABLE
    if category in ("Cc", "Cf", "Zl", "Zp") and character not in JOINERS:
        return f"⟨U+{code:04X}⟩"
    return character


def render(folder: Path, template: str, **fields: object) -> str:
    """Return a page from a template of `folder`; whatever strings come from data is escaped.

    A template extends `base.html.j2`. Strings other than Markup go through `make_visible`; lines
    stay lines.
    """
    import jinja2
    import markupsafe

    def finalize(value: object) -> object:
        if isinstance(value, markupsafe.Markup) or not isinstance(value, str):
            return value
        return make_visible(value, keep="\n\t")

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=finalize,
    )  # fmt: skip
    return environment.get_template(template).render(**fields)
