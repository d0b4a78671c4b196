"""Chat templates in the shapes that people publish, written for these tests.

IS_DATA are those that artifacts hold as data; all others are carried.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
IS_DATA = {
    *("chatml", "phi-3", "phi-3-medium", "phi-3.5", "phi-3-vision", "phi-4-mini", "zephyr"),
    *(
        "bos-first",
        "bos-each-turn",
        "no-system-role",
        "tulu",
        "closing-eos",
        "deepseek",
        "human-assistant",
    ),
}


def read(name: str) -> str:
    """The text of a template."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
