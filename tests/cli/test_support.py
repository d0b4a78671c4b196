"""The support matrix: what its page says is what this version plans."""

from pathlib import Path

import pytest

from tests.cli.commands import events, run
from toolkit import formats, support

ROOT = Path(__file__).parent.parent.parent


def test_the_page_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "support.md").read_text("utf-8")
    again = "write it again: phiship list support --markdown > docs/support.md"
    assert written == support.render_markdown().rstrip("\n") + "\n", again


@pytest.mark.parametrize("model", support.list_models())
def test_a_model_is_made_and_verified_in_a_format_or_refused_with_a_reason(model: str) -> None:
    for cell in support.list_cells([model]):
        if cell.recipes:
            assert cell.verified
            assert (ROOT / cell.test).is_file()
        else:
            assert "no recipe is bundled" not in cell.refusal
            assert len(cell.refusal) > 20


def test_scripts_get_every_cell_and_every_fit() -> None:
    done = run("list", "support", "--json")
    models = support.list_models()
    found = events(done)
    cells = [event for event in found if event["event"] == "support"]
    fits = [event for event in found if event["event"] == "fit"]
    assert len(cells) == len(models) * len(formats.names())
    pi = next(f for f in fits if (f["model"], f["target"]) == ("phi-3.5-mini", "raspberry-pi-5"))
    assert "phi-3.5-mini-gguf-q4_0" in pi["recipes"]
    small = next(f for f in fits if (f["model"], f["target"]) == ("phi-3-medium-4k", "android"))
    assert not small["recipes"]
    assert "takes 9.35 GB of memory" in small["problem"]


def test_markdown_goes_with_support() -> None:
    assert run("list", "recipes", "--markdown").returncode == 2
