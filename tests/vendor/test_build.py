"""`phiship build --engine vendor` and `phiship vendor`: what they refuse, and how they say it."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.commands import events, run
from tests.conftest import EXAMPLE
from toolkit import catalog
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.errors import BuildError, MissingExtraError, PlanError, SettingsError
from toolkit.export import Exporter, check_disk, check_memory, run_export
from toolkit.families import read_decoder
from toolkit.plan import Plan, make_plan
from toolkit.vendor import Command, Export, Places, Vendor, python_of
from toolkit.vendor.environment import Environment

RECIPE = "tiny-phi3-onnx-cpu-int4"


@pytest.fixture
def plan() -> Plan:
    """The example's plan, by the vendor."""
    decoder = read_decoder(Checkpoint.open(EXAMPLE).config)
    return make_plan(catalog.load_recipe(RECIPE).with_engine("vendor"), decoder)


@pytest.fixture
def exporter(tiny: Vendor, environment: Environment, tmp_path: Path) -> Exporter:
    """The tiny vendor, about to make something in a folder of its own."""
    places = Places(environment.folder, tmp_path / "out", tmp_path / "scratch")
    places.out.mkdir()
    places.scratch.mkdir()
    return Exporter(tiny, environment, Export((), memory_bytes=1_000_000), places)


def test_a_missing_environment_says_how_to_make_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(
        "build", RECIPE, "--checkpoint", str(EXAMPLE), "--out", str(out), "--engine", "vendor",
        "--json", XDG_CACHE_HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == MissingExtraError.exit_code
    error = events(done)[-1]
    assert "the environment of onnxruntime-genai's model builder is missing" in str(
        error["message"]
    )
    assert error["advice"] == "make it with: phiship vendor setup onnx"
    assert list(out.iterdir()) == []


def test_parity_asks_for_the_environment_before_it_builds(tmp_path: Path) -> None:
    done = run("parity", RECIPE, str(EXAMPLE), "--json", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == MissingExtraError.exit_code
    assert [event["event"] for event in events(done)] == ["error"]
    assert events(done)[0]["advice"] == "make it with: phiship vendor setup onnx"


def test_the_vendors_are_listed(tmp_path: Path) -> None:
    done = run("vendor", "list", "--json", XDG_CACHE_HOME=str(tmp_path))
    found = {str(event["name"]): event["state"] for event in events(done)}
    assert found == dict.fromkeys(["gguf", "mlx", "onnx", "openvino"], "missing")


def test_an_unknown_vendor(tmp_path: Path) -> None:
    done = run("vendor", "setup", "olive", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == SettingsError.exit_code
    assert "'olive' is no vendor; allowed gguf, mlx, onnx, openvino" in done.stderr


def test_the_engine_changes_the_plan_and_nothing_else_does(plan: Plan) -> None:
    native = replace(plan, recipe=plan.recipe.with_engine("native"))
    assert plan.digest != native.digest
    assert replace(native, recipe=plan.recipe.with_engine("vendor")).digest == plan.digest


def test_a_recipe_can_say_it(tmp_path: Path) -> None:
    text = (catalog.folder("recipes") / f"{RECIPE}.yaml").read_text("utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text + "engine: vendor\n")
    assert catalog.load_recipe(str(path)).engine == "vendor"
    path.write_text(text + "engine: olive\n")
    with pytest.raises(SettingsError, match="engine: got 'olive'; allowed native, vendor"):
        catalog.load_recipe(str(path))


def test_too_little_memory_is_said_before_it_starts(exporter: Exporter) -> None:
    check_memory(exporter, None, force=False)
    large = replace(exporter, export=Export((), memory_bytes=1 << 50))
    with pytest.raises(PlanError, match=r"predicted to take 1126 TB|predicted to take 11259") as e:
        check_memory(large, None, force=False)
    assert "engine: native" in e.value.advice
    assert "--force-memory" in e.value.advice
    check_memory(large, None, force=True)
    with pytest.raises(PlanError, match=r"1 MB of memory.*--memory allows 500 kB"):
        check_memory(exporter, 500_000, force=False)


def test_too_little_disk_is_said_before_it_starts(exporter: Exporter, plan: Plan) -> None:
    check_disk(exporter, plan)
    with pytest.raises(BuildError, match="scratch files included"):
        check_disk(replace(exporter, export=Export((), 0, scratch_bytes=1 << 50)), plan)


def test_commands_run_in_order_until_one_fails(exporter: Exporter, tmp_path: Path) -> None:
    python = str(python_of(exporter.places.environment))
    write = "import os, sys; open(sys.argv[1], 'w').write(os.environ['TMPDIR'])"
    first = Command("one", (python, "-c", write, str(exporter.places.out / "model")))
    second = Command("two", (python, "-m", "tinyvendor", "fail"))
    third = Command("three", (python, "-c", write, str(exporter.places.out / "never")))
    wanted = replace(exporter, export=Export((first, second, third), 0))
    with pytest.raises(BuildError, match=r"(?s)two ended with exit code 1.*no such architecture"):
        run_export(wanted, tmp_path / "log", Console())
    assert [path.name for path in exporter.places.out.iterdir()] == ["model"]
    assert (exporter.places.out / "model").read_text() == str(exporter.places.scratch)


def test_a_result_moves_into_place_without_the_checkpoints_code(
    exporter: Exporter, tmp_path: Path
) -> None:
    result = exporter.places.scratch / "result"
    result.mkdir()
    for name in ("model.safetensors", "modeling_phi3.py"):
        (result / name).write_text("content")
    run_export(replace(exporter, export=Export((), 0, result=result)), tmp_path / "log", Console())
    assert [path.name for path in exporter.places.out.iterdir()] == ["model.safetensors"]


def test_the_manifest_names_the_vendors_versions(exporter: Exporter) -> None:
    assert exporter.tools == {
        "engine": "vendor: the tiny vendor",
        "vendor lock": exporter.environment.digest[:12],
        "vendor tinyvendor": "1.2",
    }
