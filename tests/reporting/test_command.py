"""`phiship report` as its users call it, with what they may do wrong."""

import sys
from pathlib import Path

import pytest

from tests.cli.commands import events, run
from tests.reporting import samples
from toolkit.console import Console
from toolkit.errors import ArtifactError, MissingExtraError, SettingsError
from toolkit.reporting.writing import read_date, write_report


def test_the_command_writes_both_files(tmp_path: Path) -> None:
    artifacts, files = samples.write_all(tmp_path)
    artifacts, files = artifacts[:2], [*files[:2], *files[-2:]]
    page, markdown = tmp_path / "r.html", tmp_path / "r.md"
    words = [word for path in files for word in ("--data", str(path))]
    told = ["--out", str(page), "--markdown", str(markdown), "--tokens", "7", "--json"]
    done = run("report", *map(str, artifacts), *words, *told, SOURCE_DATE_EPOCH="86400")
    assert (done.returncode, done.stderr) == (0, "")
    assert [(e["event"], e["path"]) for e in events(done)] == [
        ("report", str(page)), ("report", str(markdown)),
    ]  # fmt: skip
    assert "1970-01-02" in page.read_text("utf-8")
    assert page.read_text("utf-8").count('<p class="text"') == 2
    assert "1970-01-02" in markdown.read_text("utf-8")


def test_bad_input_ends_with_one_sentence_and_no_file(tmp_path: Path) -> None:
    artifact, out, data = samples.seal(tmp_path, "a"), tmp_path / "r.html", tmp_path / "no.json"
    data.write_text("{}")
    done = run("report", str(artifact), "--data", str(data), "--out", str(out), "--json")
    assert done.returncode == SettingsError.exit_code
    assert "Traceback" not in done.stderr
    assert [event["event"] for event in events(done)] == ["error"]
    with pytest.raises(ArtifactError, match="not a sealed artifact"):
        write_report([tmp_path], [], out, None, 10, Console())
    assert not out.exists()


def test_nothing_is_written_when_one_file_cannot_be(tmp_path: Path) -> None:
    artifact, page = samples.seal(tmp_path, "a"), tmp_path / "r.html"
    missing = tmp_path / "missing" / "r.md"
    with pytest.raises(SettingsError, match=r"--markdown .*: its folder is not there"):
        write_report([artifact], [], page, missing, 10, Console())
    with pytest.raises(SettingsError, match=r"--out .*: its folder is not there"):
        write_report([artifact], [], missing, page, 10, Console())
    assert not page.exists()


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = samples.seal(tmp_path, "a")
    other = samples.make_details(samples.seal(tmp_path, "other"))
    rebuilt = samples.make_details(artifact, manifest_digest="0" * 64)
    page = tmp_path / "r.html"
    files = [samples.write(one, tmp_path) for one in (other, rebuilt)]
    write_report([artifact], files, page, None, 10, Console())
    noted = " ".join(capsys.readouterr().err.split())
    assert "its artifact is not among those given: details of other" in noted
    assert "measured on another build of the artifact: details of a" in noted
    written = page.read_text("utf-8")
    assert "because this page has no such artifact: details of other." in written
    assert "measured on another build of the artifact: details of a." in written


def test_no_output_replaces_another_file(tmp_path: Path) -> None:
    artifact, page = samples.seal(tmp_path, "a"), tmp_path / "r.html"
    data = samples.write(samples.make_details(artifact), tmp_path)
    linked = tmp_path / "linked.json"
    linked.hardlink_to(data)
    before = data.read_bytes()
    with pytest.raises(SettingsError, match=r"--markdown .*: the same file as --out"):
        write_report([artifact], [], page, tmp_path / "artifacts" / ".." / "r.html", 10, Console())
    with pytest.raises(SettingsError, match=r"--out .*: also given with --data"):
        write_report([artifact], [data], linked, None, 10, Console())
    with pytest.raises(SettingsError, match=r"--markdown .*: also given with --data"):
        write_report([artifact], [data], page, data, 10, Console())
    assert (data.read_bytes(), page.exists()) == (before, False)


@pytest.mark.parametrize(
    ("given", "words"),
    [("-", "standard input is not read"), ("missing.json", "cannot be read: No such file")],
)
def test_data_that_is_no_file(tmp_path: Path, given: str, words: str) -> None:
    artifact, out = samples.seal(tmp_path, "a"), tmp_path / "r.html"
    done = run("report", str(artifact), "--data", given, "--out", str(out))
    assert (done.returncode, done.stdout) == (SettingsError.exit_code, "")
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(MissingExtraError) as error:
        write_report([tmp_path], [], tmp_path / "r.html", None, 10, Console())
    assert "phiship[plot]" in error.value.advice
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("told", ["yesterday", "-99999999999999999", "1e3"])
def test_a_date_that_is_none(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", told)
    with pytest.raises(SettingsError, match="SOURCE_DATE_EPOCH"):
        read_date()
