"""Files that a report reads, and what it refuses."""

import html
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.reporting import samples
from toolkit.check import LONG_ROPE_MARK
from toolkit.errors import ArtifactError, SettingsError
from toolkit.measuring.bench import write_result
from toolkit.reporting.content import collect
from toolkit.reporting.data import Data, read_data
from toolkit.reporting.markdown import render_markdown
from toolkit.reporting.page import render_page
from toolkit.reporting.tables import list_artifacts, list_ranges
from toolkit.weights import RUNTIME


def test_what_commands_write_is_read(tmp_path: Path) -> None:
    artifact = samples.seal(tmp_path, "phi-q4")
    details, bench = samples.make_details(artifact), samples.make_bench("phi-q4")
    costs = samples.write_events(tmp_path / "phi-q4.jsonl", *samples.make_costs())
    found = read_data(samples.write(details, tmp_path)) + read_data(costs)
    events = samples.write_events(
        tmp_path / "b.jsonl", {"event": "bench", **msgspec.to_builtins(bench)}
    )
    write_result(bench, tmp_path / "bench.json")  # many lines
    found += read_data(events) + read_data(tmp_path / "bench.json")
    assert found.details == (details,)
    assert found.benches == (bench, bench)
    assert [(one.name, one.recipe) for one in found.built] == [
        ("native", "phi-q4"), ("vendor", "phi-q4"),
    ]  # fmt: skip
    assert [one.holds for one in found.origins][:2] == [
        "details of phi-q4", "phi-q4 built by native, phi-q4 built by vendor",
    ]  # fmt: skip
    assert all(len(one.sha256) == 64 for one in found.origins)


def test_the_recipe_that_an_event_names_counts(tmp_path: Path) -> None:
    path = samples.write_events(tmp_path / "x.jsonl", *samples.make_costs(recipe="phi-mlx"))
    assert {one.recipe for one in read_data(path).built} == {"phi-mlx"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "JSON of another kind"),
        (b"hello", "file.json:1: no JSON"),
        (b'{"event": "x"}\n\nTraceback', "file.json:3: no JSON"),
        (b"\xff\xfe{}", "file.json:1: no JSON"),
        (b"[" * 200_000, "file.json:1: no JSON"),
        (b'{"a": 1}', "JSON of another kind"),
        (b"[1, 2]", "JSON of another kind"),
        (b'{"event": "step"}\n{"event": "error"}', "its events are error, step"),
        (b'{"event": 7}', "JSON of another kind"),
        (b'{"event": "engine", "name": "native"}', "file.json: no engine"),
        (b'{"event": "step"}\n{"event": "bench", "name": 3}', "file.json:2: no bench"),
        (b'{"kl": [], "texts": []}', "no details"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as error:
        read_data(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_data(tmp_path / "missing.json")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_data(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 9}, "schema 9"),
        ({"kl": (1.0,)}, "differ in length"),
        ({"same_top": ()}, "differ in length"),
        ({"sequences": (1, 2)}, "differ in length"),
        ({"delta_p": ()}, "differ in length"),
    ],
)
def test_details_that_do_not_fit(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    details = samples.make_details(samples.seal(tmp_path, "a"), **changes)
    with pytest.raises(SettingsError, match=words):
        read_data(samples.write(details, tmp_path))


def test_what_is_of_other_artifacts_is_left_out(tmp_path: Path) -> None:
    here, there = samples.seal(tmp_path, "here"), samples.seal(tmp_path, "there")
    rebuilt = samples.make_details(here, manifest_digest="0" * 64)
    data = Data(
        details=(samples.make_details(there), rebuilt),
        benches=(samples.make_bench("here"), samples.make_bench("there")),
    )
    content = collect([here], data)
    assert content.left_out == ("details of there", "bench of there")
    assert content.outdated == ("details of here",)
    assert [bench.name for bench in content.benches] == ["here"]
    assert content.entries[0].details == ()


def test_artifacts_are_compared_on_one_text(tmp_path: Path) -> None:
    """A divergence on one text says nothing beside one on another."""
    one, two, three = (samples.seal(tmp_path, name) for name in ("a-1", "a-2", "a-3"))
    details = [samples.make_details(path) for path in (one, two)]
    without = collect([one, two, three], Data(details=(details[0],)))
    assert [entry.label for entry, _ in without.plotted] == ["1", "2", "3"]  # by the gate's text
    assert {measured.mean_kl for _, measured in without.plotted} == {0.0094}
    with_two = collect([one, two, three], Data(details=tuple(details)))
    assert [entry.label for entry, _ in with_two.plotted] == ["1", "2"]  # by the longer text
    assert {measured.mean_kl for _, measured in with_two.plotted} == {0.006}
    assert (with_two.unmeasured, with_two.elsewhere) == (["a-3"], [])
    other = samples.make_details(two, text_digest="ff" * 32)
    apart = collect([one, two], Data(details=(details[0], other)))
    assert {measured.digest for _, measured in apart.plotted} == {""}


def test_a_range_too_short_to_say_has_a_dash(tmp_path: Path) -> None:
    artifact = samples.seal(tmp_path, "a")
    details = samples.make_details(artifact)
    short = msgspec.structs.replace(details.ranges[0], judged=False)
    ranges = (*details.ranges, short, msgspec.structs.replace(short, judged=True, agrees=False))
    content = collect([artifact], Data(details=(msgspec.structs.replace(details, ranges=ranges),)))
    assert [row[3] for row in list_ranges(content).rows] == ["yes", "–", "no"]


def test_other_numbers_of_tokens_are_another_text(tmp_path: Path) -> None:
    """A digest may be that of the whole text where a sequence was cut."""
    one, two, cut = (samples.seal(tmp_path, name) for name in ("a-1", "a-2", "a-3"))
    long, short = ["x"] * 240, ["x"] * 99
    details = (
        samples.make_details(cut, texts=short, summary={"mean KL": 0.1, "source perplexity": 7.0}),
        samples.make_details(one, texts=long),
        samples.make_details(two, texts=long),
    )
    content = collect([cut, one, two], Data(details=details))
    assert [(entry.label, found.tokens) for entry, found in content.plotted] == [
        ("1", 240), ("2", 240),
    ]  # fmt: skip
    assert content.elsewhere == [f"a-3 (99 tokens of {samples.TEXT})"]
    assert list_artifacts(content).rows[0][5:] == ["–"] * 3
    page = render_page(content, "2026-11-21", 10)
    assert "240 tokens; the source’s perplexity on it is 65.8" in page
    assert "99 tokens of" in render_markdown(content, "2026-11-21", 10)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"context": 96}, "cut for a context of 96 tokens"),
        ({"plan": {"rope_factors": "long"}}, "LongRoPE's long factors"),
    ],
)
def test_the_gate_is_compared_where_it_read_the_same(
    tmp_path: Path, told: dict[str, Any], words: str
) -> None:
    same = [samples.seal(tmp_path, name, context=97) for name in ("a-1", "a-2")]
    other = samples.seal(tmp_path, "a-3", **told)
    content = collect([other, *same], Data())
    assert [entry.label for entry, _ in content.plotted] == ["1", "2"]
    assert words in content.elsewhere[0]
    assert words in html.unescape(render_page(content, "2026-11-21", 10))
    alone = collect([other], Data())
    assert [words in found.text for _, found in alone.plotted] == [True]


def test_details_read_with_long_factors_say_so(tmp_path: Path) -> None:
    one, two, long = (samples.seal(tmp_path, name) for name in ("a-1", "a-2", "a-3"))
    marked = samples.make_details(long, text_digest="32b1" * 16 + LONG_ROPE_MARK)
    details = (*map(samples.make_details, (one, two)), marked)
    content = collect([one, two, long], Data(details=details))
    assert [entry.label for entry, _ in content.plotted] == ["1", "2"]
    assert "a-3 (240 tokens of" in content.elsewhere[0]
    assert "read with LongRoPE's long factors" in content.elsewhere[0]


def test_matrices_are_compared_on_one_text(tmp_path: Path) -> None:
    """The page's, as far as any were measured on it; else it is named."""
    one, two = (samples.seal(tmp_path, name) for name in ("a-1", "a-2"))
    apart = {"text": "a novel", "text_digest": "ff" * 32}
    details = [samples.make_details(one), samples.make_details(two, tensors=())]
    details += [samples.make_details(two, **apart)]
    content = collect([one, two], Data(details=tuple(details)))
    assert [found.entry.label for found in content.heated] == ["1"]
    assert (content.heat_text, content.unheated) == ("", ["a-2 (240 tokens of a novel)"])
    assert "a-2 (240 tokens of a novel)" in render_page(content, "2026-11-21", 10)
    content = collect([one, two], Data(details=tuple(details[2:])))  # by the gate's text
    assert [found.entry.label for found in content.heated] == ["2"]
    assert content.heat_text == "240 tokens of a novel"
    page, said = render_page(content, "2026-11-21", 10), render_markdown(content, "2026-11-21", 10)
    assert "on the first of <bdi>240 tokens of a novel</bdi>" in page
    assert "on the first of 240 tokens of a novel" in said


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"summary": {"mean KL": 1e999}}, "summary.mean KL: got inf"),
        ({"summary": {"mean KL": -0.1}}, "summary.mean KL: got -0.1"),
        ({"summary": {"mean KL": 0.1}, "errors": {"mean KL": -1.0}}, "errors.mean KL: got -1"),
        ({"errors": {"mean Δp": -1.0}}, "errors.mean Δp: got -1"),
        ({"size_bytes": 10**400}, "size_bytes: got"),
        ({"kl": (float("nan"),) * 240}, "kl[0]: got nan"),
        ({"delta_p": (-1.0, float("-inf")) * 120}, "delta_p[1]: got -inf"),
    ],
)
def test_numbers_that_are_none(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    path = samples.write(samples.make_details(samples.seal(tmp_path, "a"), **changes), tmp_path)
    with pytest.raises(SettingsError) as error:
        read_data(path)
    assert f"{path}: {field}" in str(error.value)
    assert "\n" not in str(error.value)


def test_rates_and_costs_below_zero(tmp_path: Path) -> None:
    bench = msgspec.to_builtins(samples.make_bench("a", rate=-1.0))
    path = samples.write_events(tmp_path / "b.jsonl", {"event": "bench", **bench})
    with pytest.raises(SettingsError, match=r"per_second.*got -4.0; allowed: a finite"):
        read_data(path)
    path = samples.write_events(tmp_path / "c.jsonl", *samples.make_costs(top1=-1))
    with pytest.raises(SettingsError, match=r"c.jsonl:2: top1: got -1"):
        read_data(path)


def test_changes_may_be_below_zero(tmp_path: Path) -> None:
    summary = {"mean KL": 0.0, "mean Δp": -2.0, "ln perplexity ratio": -0.1}
    details = samples.make_details(samples.seal(tmp_path, "a"), summary=summary)
    assert read_data(samples.write(details, tmp_path)).details == (details,)


def test_a_runtime_counts_before_weights_alone(tmp_path: Path) -> None:
    artifact = samples.seal(tmp_path, "a")
    alone = samples.make_details(artifact, mean_kl=0.005, runtime=RUNTIME)
    measured = samples.make_details(artifact, mean_kl=0.006)
    for details in ((alone, measured), (measured, alone)):
        content = collect([artifact], Data(details=details))
        assert [found.mean_kl for _, found in content.plotted] == [0.006]
    table = list_artifacts(collect([artifact], Data(details=(alone,))))
    assert "0.00500 ± 0.00017 (weights alone)" in table.rows[0]


def test_one_page_is_of_one_model(tmp_path: Path) -> None:
    one = samples.seal(tmp_path, "a")
    other = samples.seal(tmp_path, "b", source=msgspec.structs.replace(samples.MODEL, digest="f"))
    with pytest.raises(SettingsError, match="one model") as error:
        collect([one, other], Data())
    assert "once for each" in error.value.advice
    with pytest.raises(SettingsError, match="both named a"):
        collect([one, samples.seal(tmp_path, "a")], Data())
    with pytest.raises(ArtifactError, match="not a sealed artifact"):
        collect([one, tmp_path], Data())
    (one / "manifest.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(ArtifactError, match="damaged"):
        collect([one], Data())
