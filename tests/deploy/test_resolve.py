"""Which versions are chosen when requirements meet, on wheels in a folder."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from tests.deploy.wheelhouse import make_wheel
from toolkit.errors import PreflightError
from toolkit.wheels.resolve import Fetch, resolve


def pick(folder: Path) -> Fetch:
    """Fetch from a folder: the newest version that satisfies a requirement, as pip does."""

    def fetch(requirements: list[str]) -> list[Path]:
        found = []
        for wanted in map(Requirement, requirements):
            candidates = [
                (parse_wheel_filename(path.name)[1], path)
                for path in folder.glob("*.whl")
                if parse_wheel_filename(path.name)[0] == canonicalize_name(wanted.name)
            ]
            fitting = [
                (version, path) for version, path in candidates if version in wanted.specifier
            ]
            if not fitting:
                raise PreflightError(f"no wheel of {wanted}")
            found.append(max(fitting)[1])
        return found

    return fetch


def test_choice_is_made_again_for_who_comes_later(tmp_path: Path) -> None:
    """The newest `part` is taken first; `other` rules it out, and what it needed goes with it."""
    make_wheel(tmp_path, "engine", needs=["part>=1", "other"])
    make_wheel(tmp_path, "other", needs=["part<2"])
    make_wheel(tmp_path, "part", "2.0", needs=["only_new"])
    make_wheel(tmp_path, "part", "1.5")
    make_wheel(tmp_path, "only_new")
    found = resolve(["engine==1.0"], {}, pick(tmp_path))
    assert [(name, found[name].version) for name in found] == [
        ("engine", "1.0"),
        ("other", "1.0"),
        ("part", "1.5"),
    ]


def test_contradictions_end(tmp_path: Path) -> None:
    make_wheel(tmp_path, "engine", needs=["part<2", "other"])
    make_wheel(tmp_path, "other", needs=["part>=2"])
    make_wheel(tmp_path, "part", "2.0")
    make_wheel(tmp_path, "part", "1.0")
    with pytest.raises(PreflightError, match=r"no wheel of part(<2,>=2|>=2,<2)"):
        resolve(["engine"], {}, pick(tmp_path))


def test_choices_that_rule_each_other_out_end(tmp_path: Path) -> None:
    """Each version of `left` wants the `right` that wants the other `left`."""
    make_wheel(tmp_path, "left", "2.0", needs=["right<2"])
    make_wheel(tmp_path, "left", "1.0", needs=["right>=2"])
    make_wheel(tmp_path, "right", "2.0", needs=["left>=2"])
    make_wheel(tmp_path, "right", "1.0", needs=["left<2"])
    with pytest.raises(PreflightError, match="no set of versions satisfies everything that left"):
        resolve(["left", "right"], {}, pick(tmp_path))


def test_wheel_that_is_none(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, "engine")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(PreflightError, match=r"engine-1.0-py3-none-any.whl: .* a damaged wheel"):
        resolve(["engine"], {}, pick(tmp_path))
