"""Files that a report reads, and what it refuses."""

import json
from pathlib import Path

import msgspec
import pytest

from tests.reporting import samples
from toolkit.errors import ArtifactError, SettingsError
from toolkit.measuring.bench import write_result
from toolkit.reporting.content import collect
from toolkit.reporting.data import Data, read_data
from toolkit.reporting.tables import list_artifacts
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
    assert content.left_out == (
        "details of there", "details of an earlier build of here", "bench of there",
    )  # fmt: skip
    assert [bench.name for bench in content.benches] == ["here"]
    assert content.entries[0].details == ()


def test_artifacts_are_compared_on_one_text(tmp_path: Path) -> None:
    """A divergence on one text says nothing beside one on another."""
    one, two, three = (samples.seal(tmp_path, name) for name in ("a-1", "a-2", "a-3"))
    details = [samples.make_details(path) for path in (one, two)]
    with_two = collect([one, two, three], Data(details=tuple(details)))
    assert [entry.label for entry, _ in with_two.plotted] == ["1", "2", "3"]  # by the gate's text
    assert {measured.mean_kl for _, measured in with_two.plotted} == {0.0094}
    unchecked = samples.seal(tmp_path, "a-4", kl=None)
    with_three = collect([one, two, unchecked], Data(details=tuple(details)))
    assert {measured.mean_kl for _, measured in with_three.plotted} == {0.006}  # the longer text
    other = samples.make_details(two, text_digest="ff" * 32)
    apart = collect([one, two], Data(details=(details[0], other)))
    assert {measured.digest for _, measured in apart.plotted} == {""}


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
