"""Recipes, targets, models and plans, through the command line where a user would."""

import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from tests.cli.commands import ROOT, events, run
from toolkit import catalog, formats
from toolkit.checkpoint.config import Config
from toolkit.decoder import Decoder
from toolkit.errors import PlanError, SettingsError
from toolkit.families import read_decoder
from toolkit.plan import check_fit, find_problem, largest_context, make_plan, what_fits
from toolkit.yamlfile import ByteSize


def known_decoder(model: str) -> Decoder:
    """The architecture of a bundled model."""
    return read_decoder(Config(model, catalog.load_model(model).config))


@pytest.mark.parametrize("name", catalog.names("recipes"))
def test_every_recipe_plans_and_says_what_each_target_lacks(name: str) -> None:
    recipe = catalog.load_recipe(name)
    decoder = known_decoder(recipe.model or "phi-3.5-mini")
    plan = make_plan(recipe if recipe.model else recipe.bind("fine-tune", decoder), decoder)
    assert plan.device_memory_bytes > plan.data.size_bytes > 0
    for target_name in catalog.names("targets"):
        target = catalog.load_target(target_name)
        if find_problem(plan, target):
            with pytest.raises(PlanError, match=re.escape(target.name)):
                check_fit(plan, target)
        else:
            check_fit(plan, target)


@pytest.mark.parametrize("name", catalog.names("targets"))
def test_every_target_says_how_it_was_verified(name: str) -> None:
    target = catalog.load_target(name)
    assert target.verified
    assert 0 < target.reserved_memory < target.memory


@pytest.mark.parametrize("name", catalog.names("models"))
def test_every_published_model_is_pinned(name: str) -> None:
    model = catalog.load_model(name)
    assert name == "tiny-phi3" or re.fullmatch(r"[0-9a-f]{40}", model.revision)


def test_recipe_names_follow_the_pattern() -> None:
    models = "|".join(map(re.escape, catalog.names("models")))
    for name in catalog.names("recipes"):
        recipe = catalog.load_recipe(name)
        kinds = "onnx-(cpu|cuda)|gguf|openvino|mlx"
        assert re.fullmatch(rf"(({models})-)?({kinds})-[a-z0-9_-]+", name), name
        assert name.startswith(f"{recipe.model}-{recipe.format}".lstrip("-"))


def test_a_recipe_for_any_model_takes_smaller_groups_where_rows_ask_for_them() -> None:
    decoder = replace(known_decoder("phi-3-mini-4k"), hidden=576, heads=9, head_dim=64)
    expected = {"openvino-int4": 64, "openvino-npu-int4": -1, "mlx-4bit-group128": 64}
    for name, size in expected.items():
        bound = catalog.load_recipe(name).bind("fine-tune", decoder)
        assert bound.quantization.group_size == size
        assert bound.name == f"fine-tune-{name}"
    assert catalog.load_recipe("onnx-cpu-int4-block128").bind(
        "x", decoder
    ).quantization.block_size == 64  # fmt: skip


def test_known_sizes() -> None:
    """The sizes that the vendor's builder and llama.cpp give for Phi-3-mini, within 2 %."""
    decoder = known_decoder("phi-3-mini-4k")
    # 2.727 GB by the builder, which keeps the embedding in float32: 283 MB more than int8 with its
    # scales; its head has 4 bits, 49 MB less than 8
    onnx = make_plan(catalog.load_recipe("phi-3-mini-4k-onnx-cpu-int4"), decoder)
    assert onnx.data.size_bytes == pytest.approx(2.727e9 - 0.283e9 + 0.049e9, rel=0.02)
    gguf = make_plan(catalog.load_recipe("phi-3-mini-4k-gguf-q4_0"), decoder)
    assert gguf.data.size_bytes == pytest.approx(2.176e9, rel=0.02)
    assert gguf.needs.kv_bytes_per_token == 393_216
    assert onnx.needs.kv_bytes_per_token == 786_432


def test_the_digest_covers_what_changes_bytes_and_nothing_else() -> None:
    decoder = known_decoder("phi-3-mini-4k")
    recipe = catalog.load_recipe("phi-3-mini-4k-onnx-cpu-int4")
    plan = make_plan(recipe, decoder)
    assert make_plan(recipe, decoder, workers=7).digest == plan.digest
    assert make_plan(recipe, decoder, context_length=2048).digest != plan.digest
    other = catalog.load_recipe("phi-3-mini-4k-onnx-cpu-int4-asym")
    assert make_plan(other, decoder).digest != plan.digest


def test_plan_shows_every_default_and_every_cost() -> None:
    done = run("plan", "phi-3-mini-4k-onnx-cpu-int4", "--for", "raspberry-pi-5")
    assert done.returncode == 0, done.stderr
    for text in ("block_size", "symmetric", "context_length", "artifact", "build: memory",
                 "device: memory", "device: disk", "cache 3.22 GB"):  # fmt: skip
        assert text in done.stdout
    assert "fits raspberry-pi-5" in done.stderr


def test_plan_that_does_not_fit_says_what_would() -> None:
    done = run("plan", "phi-3-mini-4k-onnx-cpu-int4", "--for", "android", "--json")
    assert done.returncode == PlanError.exit_code
    error = events(done)[-1]
    assert "memory" in error["message"]
    context = int(re.search(r"--context (\d+) would fit", error["advice"]).group(1))  # type: ignore[union-attr]
    fitting = run(
        "plan", "phi-3-mini-4k-onnx-cpu-int4", "--for", "android", "--context", str(context)
    )
    assert fitting.returncode == 0
    too_long = run(
        "plan", "phi-3-mini-4k-onnx-cpu-int4", "--for", "android", "--context", str(context + 256)
    )
    assert too_long.returncode == PlanError.exit_code


@pytest.mark.parametrize(
    ("name", "target_name", "memory_bytes"),
    [
        ("phi-3-mini-4k-onnx-cpu-int4", "android", None),
        # Masks that grow with the square of the context, and pictures that fit into it.
        ("phi-3-small-8k-openvino-int4", "intel-nuc", 8 * 10**9),
        ("phi-3-vision-onnx-cpu-int4", "intel-nuc", 7 * 10**9),
        ("phi-3-vision-openvino-int4", "intel-nuc", 45 * 10**8),
    ],
)
def test_the_suggested_context_is_the_longest_that_fits(
    name: str, target_name: str, memory_bytes: int | None
) -> None:
    recipe, target = catalog.load_recipe(name), catalog.load_target(target_name)
    decoder = known_decoder(recipe.model)
    if memory_bytes:
        memory = ByteSize(memory_bytes + target.reserved_memory)
        target = msgspec.structs.replace(target, memory=memory)
    plan = make_plan(recipe, decoder)
    context = largest_context(plan, target)
    assert 256 <= context < plan.context_length
    assert not find_problem(make_plan(recipe, decoder, context_length=context), target)
    assert find_problem(make_plan(recipe, decoder, context_length=context + 256), target)
    assert f"--context {context} would fit" in what_fits(plan, target)


@pytest.mark.parametrize("kind", ["onnx-cpu", "openvino"])
def test_a_context_without_room_for_a_picture_is_refused(kind: str) -> None:
    done = run("plan", f"phi-3-vision-{kind}-int4", "--context", "512")
    assert done.returncode == PlanError.exit_code
    assert "got 512; a picture with a text takes 629 tokens" in done.stderr


def test_a_plan_counts_the_pictures_that_fit_its_context() -> None:
    """Two of 4:3 with 12 crops each, 1,921 tokens, go through onnxruntime's tower at once."""
    for kind, least, most in (("onnx-cpu", 26 * 38_000_000, 30 * 39_000_000),
                              ("openvino", 26 * 7_200_000, 400_000_000)):  # fmt: skip
        recipe = catalog.load_recipe(f"phi-3-vision-{kind}-int4")
        decoder = known_decoder("phi-3-vision")
        sees = make_plan(recipe, decoder).needs.overhead_bytes
        reads = make_plan(recipe, decoder, context_length=1024).needs.overhead_bytes
        engine = formats.get(recipe.format).OVERHEAD_BYTES
        engine = engine if isinstance(engine, int) else engine["cpu"]
        assert least < sees - engine < most
        assert (reads - engine) < 0.75 * (sees - engine)


def test_a_format_the_target_cannot_run_is_refused_with_recipes_that_would_do() -> None:
    done = run("plan", "phi-3-mini-4k-onnx-cuda-int4", "--for", "raspberry-pi-5", "--json")
    assert done.returncode == PlanError.exit_code
    error = events(done)[-1]
    assert "does not run onnx/cuda" in error["message"]
    assert "phi-3-mini-4k-gguf-q4_0" in error["advice"]


def test_a_context_beyond_the_models_is_refused() -> None:
    done = run("plan", "phi-3-mini-4k-onnx-cpu-int4", "--context", "8192")
    assert done.returncode == PlanError.exit_code
    assert "8192" in done.stderr
    assert "4096" in done.stderr


def test_a_misspelt_recipe_gets_suggestions() -> None:
    done = run("plan", "phi-3-mini-4k-onnx-cpu-int5")
    assert done.returncode == SettingsError.exit_code
    assert "phi-3-mini-4k-onnx-cpu-int4" in done.stderr


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ("blok: 3", ["blok: unknown key", "allowed", "quantization"]),
        ("quantization: {precision: int4, block_size: 48}", ["block_size: got 48", "16, 32, 64"]),
        ("quantization: {precision: int3}", ["precision: got 'int3'", "int4, fp16, fp32"]),
        ("quantization: {precision: int4, symmetric: 5}", ["symmetric: got 5", "true or false"]),
        ("context_length: long", ["context_length: got 'long'", "whole number"]),
    ],
)
def test_a_wrong_recipe_names_line_key_found_and_allowed(
    bad: str, expected: list[str], tmp_path: Path
) -> None:
    key = bad.partition(":")[0]
    fields = {"format": "onnx", "title": "x", "model": "tiny-phi3"}
    fields |= {} if key == "quantization" else {"quantization": "{precision: int4}"}
    rows = [f"{name}: {value}" for name, value in fields.items()]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join([*rows, bad]) + "\n")
    done = run("plan", str(path))
    assert done.returncode == SettingsError.exit_code
    for text in [f"{path}:{len(rows) + 1}", *expected]:
        assert text in done.stderr, done.stderr


def test_build_memory_limits_workers_and_refuses_too_little() -> None:
    decoder = known_decoder("phi-3-mini-4k")
    recipe = catalog.load_recipe("phi-3-mini-4k-onnx-cpu-int4")
    assert make_plan(recipe, decoder, workers=8, memory_bytes=200_000_000).workers == 2
    with pytest.raises(PlanError, match="converting takes at least"):
        make_plan(recipe, decoder, memory_bytes=10_000_000)


def test_docs_list_every_exit_code() -> None:
    from toolkit import errors

    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    codes = [c.exit_code for c in classes]  # type: ignore[attr-defined]
    assert len(set(codes)) == len(codes)
    for kind, code in zip(classes, codes, strict=True):
        assert f"| {code} | {kind.__name__} |" in text
