"""Pages to look at."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.reporting import samples
from toolkit.reporting.content import Content, collect
from toolkit.reporting.data import Data, read_data
from toolkit.reporting.markdown import render_markdown
from toolkit.reporting.page import render_page

WHEN = "2026-11-21"


@dataclass(frozen=True)
class Rendered:
    content: Content
    page: str
    markdown: str


def render(artifacts: list[Path], files: list[Path], most_tokens: int = 200) -> Rendered:
    content = collect(artifacts, sum((read_data(path) for path in files), Data()))
    page = render_page(content, WHEN, most_tokens)
    return Rendered(content, page, render_markdown(content, WHEN, most_tokens))


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """All formats, all sections."""
    return render(*samples.write_all(tmp_path_factory.mktemp("full")))


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """The same, with names, texts, devices and files that try to leave their place."""
    folder = tmp_path_factory.mktemp("hostile")
    names = [text for text in samples.HOSTILE if "\ud83d" not in text]  # no manifest can hold it
    artifacts, files = samples.write_all(folder, names)
    bench = samples.make_bench("tiny-gguf-4", board="</svg><script>alert(2)</script>")
    count = len(read_data(files[0]).details[0].ids)  # as many as the others, to be compared
    texts = (samples.HOSTILE * count)[:count]
    details = samples.make_details(artifacts[0], texts=texts, runtime="<i>x</i>")
    events = {"event": "bench", **samples.msgspec.to_builtins(bench)}
    files += [samples.write_events(folder / "<b>&.jsonl", events)]
    return render(artifacts, [samples.write(details, folder), *files[1:]], most_tokens=40)
