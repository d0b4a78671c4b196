"""Choosing and fetching wheels for another machine: real pip, real packaging, a small index."""

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import packaging.tags
import pytest

from tests.deploy.wheelhouse import Index, find_pip, make_wheel, serve, use_index
from toolkit.artifact import Runtime, hash_file
from toolkit.device import EngineFacts, Facts
from toolkit.errors import MissingExtraError, PreflightError
from toolkit.wheels import (
    Installed,
    Wheel,
    WheelSet,
    find_fitting,
    fits,
    is_same_version,
    name_runtime,
)
from toolkit.wheels.collect import collect_wheels
from toolkit.wheels.tags import list_tags

ARM = "manylinux_2_28_aarch64"
LIBC = " ".join(platform.libc_ver())


def make_facts(libc: str = "glibc 2.36", python: str = "3.11.2", **other: object) -> Facts:
    values: dict[str, object] = {
        "system": "Linux",
        "machine": "aarch64",
        "word_bits": 64,
        "libc": libc,
        "python": python,
        "python_path": "/usr/bin/python3",
        "board": "",
        "cpu_count": 4,
        "cpu_features": (),
        "memory_total_bytes": None,
        "memory_available_bytes": None,
        "memory_limit_bytes": None,
        "disk_free_bytes": 0,
        "root": "/root/.phiship/v1",
    }
    return Facts(**{**values, **other})  # type: ignore[arg-type]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index that has pip, and what a test adds."""
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / find_pip().name).write_bytes(find_pip().read_bytes())
    with serve(folder) as started:
        use_index(monkeypatch, started.url)
        yield started


def collect(tmp_path: Path, package: str = "engine", **facts: str) -> WheelSet:
    return collect_wheels(package, "1.0", make_facts(**facts), tmp_path / "cache")


def list_chosen(found: WheelSet) -> list[str]:
    return [f"{wheel.name} {wheel.version}" for wheel in found.wheels]


# --- tags


@pytest.mark.parametrize(
    ("libc", "first", "taken", "refused"),
    [
        (
            "glibc 2.36",
            "manylinux_2_36_aarch64",
            "manylinux_2_35_aarch64",
            "manylinux_2_37_aarch64",
        ),
        ("glibc 2.31", "manylinux_2_31_aarch64", ARM, "manylinux_2_35_aarch64"),
        ("glibc 2.27", "manylinux_2_27_aarch64", "manylinux2014_aarch64", ARM),
        ("musl 1.2.4", "musllinux_1_2_aarch64", "musllinux_1_1_aarch64", ARM),
    ],
)
def test_tags_of_linux(libc: str, first: str, taken: str, refused: str) -> None:
    tags = list_tags(make_facts(libc))
    assert tags[:2] == ("linux_aarch64", first)
    assert taken in tags
    assert refused not in tags


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_legacy_names_come_beside_their_versions(machine: str) -> None:
    tags = list_tags(make_facts("glibc 2.18", machine=machine))
    assert tags[1:4] == tuple(
        f"{name}_{machine}" for name in ("manylinux_2_18", "manylinux_2_17", "manylinux2014")
    )
    assert (f"manylinux1_{machine}" in tags) == (machine == "x86_64")
    assert "manylinux_2_16_aarch64" not in tags


@pytest.mark.skipif(not LIBC.startswith("glibc"), reason="this machine has another C library")
def test_tags_are_those_that_this_machine_itself_takes() -> None:
    here = make_facts(LIBC, machine=platform.machine())
    assert list(list_tags(here)) == list(packaging.tags.platform_tags())


def test_tags_of_macos() -> None:
    tags = list_tags(
        make_facts("none", system="Darwin", machine="arm64", system_version="macOS 14.5")
    )
    assert tags[0] == "macosx_14_0_arm64"
    assert {"macosx_11_0_arm64", "macosx_11_0_universal2"} < set(tags)
    assert "macosx_15_0_arm64" not in tags
    unknown = list_tags(make_facts("none", system="Darwin", machine="arm64"))
    assert unknown[0] == "macosx_11_0_arm64"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"word_bits": 32}, "aarch64 with a 32-bit userland"),
        ({"machine": "armv7l"}, "armv7l with a 64-bit userland"),
        ({"libc": "bionic"}, "Linux with C library bionic"),
        ({"libc": ""}, "Linux with C library unknown"),
        ({"libc": "musl"}, "C library 'musl': its version cannot be read"),
        ({"system": "FreeBSD"}, "FreeBSD with C library"),
    ],
)
def test_what_has_no_wheels_is_refused(facts: dict[str, object], words: str) -> None:
    with pytest.raises(PreflightError, match=words):
        list_tags(make_facts(**facts))  # type: ignore[arg-type]


# --- choosing


def test_dependencies_are_those_of_the_device(index: Index, tmp_path: Path) -> None:
    """pip alone would take this machine's: markers are where its --platform ends."""
    make_wheel(
        index.folder, "engine", tag=f"cp311-cp311-{ARM}",
        needs=[
            'for_arm; platform_machine == "aarch64"',
            'for_pc; platform_machine == "x86_64"',
            'for_mac; sys_platform == "darwin"',
            'for_old; python_version < "3.10"',
            'for_patch; python_full_version == "3.11.2"',
            'for_extra; extra == "cuda"',
            "with_extra[cpu]",
        ],
    )  # fmt: skip
    make_wheel(
        index.folder, "with_extra", needs=['for_cpu; extra == "cpu"', 'for_gpu; extra == "gpu"']
    )
    for name in ("for_arm", "for_pc", "for_mac", "for_old", "for_patch", "for_extra", "for_cpu"):
        make_wheel(index.folder, name)
    found = collect(tmp_path)
    names = [wheel.name for wheel in found.wheels]
    assert names == ["engine", "for-arm", "for-cpu", "for-patch", "with-extra"]


def test_best_wheel_that_fits(index: Index, tmp_path: Path) -> None:
    tags = ["manylinux_2_17_aarch64", "manylinux_2_31_aarch64", "manylinux_2_35_aarch64"]
    for tag in [*tags, "manylinux_2_31_x86_64", "musllinux_1_2_aarch64", "macosx_11_0_arm64"]:
        make_wheel(index.folder, "engine", tag=f"cp311-cp311-{tag}")
    make_wheel(index.folder, "engine", tag="cp312-cp312-manylinux_2_31_aarch64")
    (wheel,) = collect(tmp_path, libc="glibc 2.31").wheels
    assert wheel.file_name == "engine-1.0-cp311-cp311-manylinux_2_31_aarch64.whl"
    assert (wheel.sha256, wheel.size_bytes) == (hash_file(wheel.path), wheel.path.stat().st_size)
    (other,) = collect(tmp_path, libc="musl 1.2.4").wheels
    assert other.file_name == "engine-1.0-cp311-cp311-musllinux_1_2_aarch64.whl"


def test_version_of_python_counts(index: Index, tmp_path: Path) -> None:
    make_wheel(index.folder, "engine", needs=["part"], tag="cp38-abi3-manylinux2014_aarch64")
    make_wheel(index.folder, "part", "2.0", python=">=3.10")
    make_wheel(index.folder, "part", "1.0", python=">=3.8")
    assert list_chosen(collect(tmp_path)) == ["engine 1.0", "part 2.0"]
    assert list_chosen(collect(tmp_path, python="3.9.2")) == ["engine 1.0", "part 1.0"]


def test_companions_of_mlx_on_linux(index: Index, tmp_path: Path) -> None:
    """mlx-lm asks for mlx on macOS only; on Linux its extra names the build for processors."""
    needs = ['mlx; platform_system == "Darwin"', 'mlx[cpu]; extra == "cpu"']
    make_wheel(index.folder, "mlx_lm", needs=needs)
    make_wheel(index.folder, "mlx", needs=['mlx_cpu; extra == "cpu"'])
    make_wheel(index.folder, "mlx_cpu")
    found = collect(tmp_path, "mlx-lm")
    assert [wheel.name for wheel in found.wheels] == ["mlx", "mlx-cpu", "mlx-lm"]


def test_companions_that_an_artifact_asks_for(index: Index, tmp_path: Path) -> None:
    make_wheel(index.folder, "engine")
    make_wheel(index.folder, "pillow", "11.0")
    with_it = collect_wheels(
        "engine", "1.0", make_facts(), tmp_path / "cache", companions=("pillow",)
    )
    assert list_chosen(with_it) == ["engine 1.0", "pillow 11.0"]
    without = collect(tmp_path)
    assert list_chosen(without) == ["engine 1.0"]
    assert with_it.id != without.id
    for version in ("3.1.2", "3.1.6"):
        make_wheel(index.folder, "jinja2", version, needs=["markupsafe"])
    make_wheel(index.folder, "markupsafe")
    needed = ("jinja2>=3.1.6",)
    found = collect_wheels("engine", "1.0", make_facts(), tmp_path / "cache", companions=needed)
    assert list_chosen(found) == ["engine 1.0", "jinja2 3.1.6", "markupsafe 1.0"]


def test_tokenizers_comes_without_what_it_downloads_with(index: Index, tmp_path: Path) -> None:
    """Unless another package asks for that too."""
    make_wheel(index.folder, "engine")
    make_wheel(index.folder, "tokenizers", needs=["huggingface-hub"])
    make_wheel(index.folder, "mlx_lm", needs=["tokenizers", "huggingface-hub"])
    make_wheel(index.folder, "huggingface_hub")
    found = collect_wheels(
        "engine", "1.0", make_facts(), tmp_path / "cache", companions=("tokenizers",)
    )
    assert list_chosen(found) == ["engine 1.0", "tokenizers 1.0"]
    found = collect_wheels("mlx-lm", "1.0", make_facts(system="Darwin"), tmp_path / "cache")
    assert list_chosen(found) == ["huggingface-hub 1.0", "mlx-lm 1.0", "tokenizers 1.0"]


# --- keeping


def test_second_time_needs_no_network(index: Index, tmp_path: Path) -> None:
    make_wheel(index.folder, "engine", needs=["part"])
    make_wheel(index.folder, "part")
    told: list[str] = []
    first = collect_wheels("engine", "1.0", make_facts(), tmp_path / "cache", told.append)
    assert any("engine-1.0-py3-none-any.whl" in line for line in told)
    visits = len(index.visits)
    make_wheel(index.folder, "part", "2.0")
    assert collect(tmp_path) == first
    assert len(index.visits) == visits
    assert set(first.files) == {wheel.file_name for wheel in (*first.wheels, first.pip)}
    assert first.pip.file_name == find_pip().name
    assert [path.name for path in (tmp_path / "cache").glob(".*")] == []


def test_id_is_the_content_and_the_python() -> None:
    def name(sha256: str = "1" * 64, **facts: str) -> str:
        wheel = Wheel("engine", "1.0", Path("engine-1.0-py3-none-any.whl"), sha256, 1)
        return name_runtime("engine", "1.0", (wheel,), make_facts(**facts))

    assert name() == name()
    assert name().startswith("engine-1.0-")
    other = {name("2" * 64), name(python="3.11.3"), name(python_path="/opt/bin/python3")}
    assert len(other | {name()}) == 4


def test_damaged_cache_is_fetched_again(index: Index, tmp_path: Path) -> None:
    make_wheel(index.folder, "engine")
    first = collect(tmp_path)
    path, sha256 = first.wheels[0].path, first.wheels[0].sha256
    path.write_bytes(b"x" * first.wheels[0].size_bytes)
    assert collect(tmp_path) == first
    assert hash_file(path) == sha256
    path.unlink()
    assert collect(tmp_path) == first
    (note,) = (tmp_path / "cache").glob("*.json")
    note.write_text('{"wheels": [')
    assert collect(tmp_path) == first


# --- refusals


def test_no_wheel_fits(index: Index, tmp_path: Path) -> None:
    """What was tried, what there is, and which versions would fit."""
    make_wheel(index.folder, "engine", tag="cp311-cp311-manylinux_2_35_aarch64")
    make_wheel(index.folder, "engine", tag="cp311-cp311-manylinux_2_28_x86_64")
    make_wheel(index.folder, "engine", "0.9", tag="cp311-cp311-manylinux_2_17_aarch64")
    with pytest.raises(PreflightError) as caught:
        collect(tmp_path, libc="glibc 2.31")
    assert str(caught.value) == (
        "no wheel of engine==1.0 fits Linux aarch64, glibc 2.31, Python 3.11.2 (tried "
        "linux_aarch64, manylinux_2_31_aarch64 to manylinux2014_aarch64); its wheels are "
        "cp311-manylinux_2_35_aarch64; versions with a wheel that fits: 0.9"
    )
    assert "newer system or Python" in caught.value.advice


@pytest.mark.parametrize(
    ("tag", "python", "words"),
    [
        ("cp312-cp312-manylinux_2_17_aarch64", ">=3.12", "are cp312-manylinux_2_17_aarch64"),
        ("cp311-cp311-win_amd64", ">=3.8", "are cp311-win_amd64"),
    ],
)
def test_no_wheel_for_this_python_or_system(
    index: Index, tmp_path: Path, tag: str, python: str, words: str
) -> None:
    make_wheel(index.folder, "engine", tag=tag, python=python)
    with pytest.raises(PreflightError, match=f"{words}; versions with a wheel that fits: none"):
        collect(tmp_path)


def test_package_that_nobody_has(index: Index, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="the index has no wheel of it at all"):
        collect(tmp_path)


def test_no_network(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 of this machine: nobody listens there.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(
        PreflightError, match=r"http://127.0.0.1:9/simple/\S+ does not answer"
    ) as it:
        collect(tmp_path)
    assert "the device needs no internet" in it.value.advice
    assert list((tmp_path / "cache").iterdir()) == []


def test_secrets_of_the_index_stay_here(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:s3cret@127.0.0.1:9/simple")
    told: list[str] = []
    with pytest.raises(PreflightError) as caught:
        collect_wheels("engine", "1.0", make_facts(), tmp_path / "cache", told.append)
    assert "s3cret" not in str(caught.value) + "".join(told)


def test_pip_missing(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)  # what Python itself takes for "not there"
    with pytest.raises(MissingExtraError, match="has no pip"):
        collect(tmp_path)


# --- what is there already


def make_runtime(
    package: str = "onnxruntime-genai", version: str = "0.18.0", companions: tuple[str, ...] = ()
) -> Runtime:
    return Runtime(
        engine="onnxruntime_genai", provider="cpu", package=package, version=version,
        main_file="m", companions=companions,
    )  # fmt: skip


def make_engine(version: str = "0.18.0", *, importable: bool = True) -> EngineFacts:
    return EngineFacts(
        package="onnxruntime-genai",
        module="onnxruntime_genai",
        importable=importable,
        version=version,
        signal=None,
        error="",
    )


@pytest.mark.parametrize(
    ("found", "wanted", "is_same"),
    [
        ("0.18.0", "0.18.0", True),
        ("0.18", "0.18.0", True),
        ("0.18.0+cu12", "0.18.0", True),
        ("2026.4.1.0-3408-ab01d1771e4", "2026.4.1.0", True),
        ("2026.4.1-22982-e213a147257-releases/2026/4", "2026.4.1", True),
        ("0.18.1", "0.18.0", False),
        ("0.18.0rc1", "0.18.0", False),
        ("", "0.18.0", False),
        ("", "", False),
    ],
)
def test_versions(found: str, wanted: str, is_same: bool) -> None:
    assert is_same_version(found, wanted) == is_same


def test_engine_of_the_devices_own_python() -> None:
    assert fits(make_engine(), make_runtime())
    assert not fits(None, make_runtime())
    assert not fits(make_engine(importable=False), make_runtime())
    assert not fits(make_engine("0.17.0"), make_runtime())
    assert not fits(make_engine(), make_runtime("onnxruntime-genai-cuda"))
    seeing = make_runtime(companions=("pillow",))
    assert not fits(make_engine(), seeing)
    assert fits(msgspec.structs.replace(make_engine(), companions=("pillow",)), seeing)


def test_runtime_that_is_there() -> None:
    facts, runtime = make_facts(), make_runtime()

    def install(**changed: object) -> dict[str, Installed]:
        values = {
            "packages": {"numpy": "2.0", "onnxruntime-genai": "0.18.0"},
            "python": "/usr/bin/python3",
            "python_version": "3.11.2",
            "usable": True,
        }
        return {"one": Installed(**{**values, **changed})}  # type: ignore[arg-type]

    assert find_fitting(install(), runtime, facts) == "one"
    assert find_fitting({}, runtime, facts) is None
    assert find_fitting(install(usable=False), runtime, facts) is None
    assert find_fitting(install(python_version="3.11.3"), runtime, facts) is None
    assert find_fitting(install(python="/opt/python"), runtime, facts) is None
    assert find_fitting(install(packages={"numpy": "0.18.0"}), runtime, facts) is None
    assert find_fitting(install(), make_runtime(version="0.17.0"), facts) is None
    seeing = make_runtime(companions=("pillow",))
    packages = {"onnxruntime-genai": "0.18.0", "pillow": "11.0.0"}
    assert find_fitting(install(packages=packages), seeing, facts) == "one"
    assert find_fitting(install(), seeing, facts) is None
    rendering = make_runtime(companions=("jinja2>=3.1.6",))
    for version, found in (("3.1.6", "one"), ("3.10", "one"), ("3.1.5", None)):
        packages = {"onnxruntime-genai": "0.18.0", "jinja2": version}
        assert find_fitting(install(packages=packages), rendering, facts) == found
