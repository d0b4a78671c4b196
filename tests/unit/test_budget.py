"""Budgets: the choice on costs made by hand, and on small checkpoints of every format."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.formats.writing import write_artifact
from tests.quality.artifacts import FORMATS, Case, make_recipe
from tests.small_checkpoints import write_small_checkpoint
from toolkit import budget, catalog, formats, mixing
from toolkit.artifact import Limits
from toolkit.budget import Budget, choose, fit_budget
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.errors import PlanError
from toolkit.families import read_decoder
from toolkit.mixing import Mixture, Option
from toolkit.overrides import overrides_of, with_overrides
from toolkit.plan import make_plan, measure_tokenizer
from toolkit.quality import sensitivity
from toolkit.quality.rounding import read_rounded
from toolkit.recipe import Recipe
from toolkit.report import Report

EIGHT: Mapping[str, Any] = {"onnx": "int8", "openvino": "int8", "mlx": 8, "gguf": "q8_0"}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Shared by the tests of this file."""
    return Case(tmp_path_factory.mktemp("budget"))


@pytest.fixture(autouse=True, scope="module")
def short_text() -> Iterator[None]:
    """One sequence beside the gate's two: enough for what is held against limits here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "PREDICTION_TOKENS", 128)
        yield


class Mixtures(dict[str, Mixture]):
    """What every format's recipe can be, measured when first asked for."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self._case = case

    def __missing__(self, kind: str) -> Mixture:
        case = self._case
        recipe = make_recipe(kind)
        self[kind] = Mixture(recipe, case.checkpoint, case.decoder, None, None, Console())
        return self[kind]


@pytest.fixture(scope="module")
def mixtures(case: Case) -> Mixtures:
    """By format."""
    return Mixtures(case)


# Costs made by hand

A, B, C = "a", "b", "c"


def option(choice: Any, size_bytes: int, kl: float) -> Option:
    return Option(choice, size_bytes, kl, kl)


OPTIONS = {
    A: [option(4, 100, 8.0), option(8, 200, 1.0)],  # 0.07 a byte
    B: [option(4, 100, 1.0), option(5, 110, 0.2), option(8, 200, 0.0)],  # 0.08, then 0.002
    C: [option(4, 10, 0.1), option(8, 20, 0.0)],  # 0.01
}


def names(steps: mixing.Steps) -> list[tuple[str, Any]]:
    return [(name, option.choice) for name, option in steps]


def test_bytes_go_where_they_save_most() -> None:
    assert names(choose(OPTIONS)) == [(B, 5), (A, 8), (C, 8), (B, 8)]


def test_what_does_not_fit_is_passed_over() -> None:
    assert names(choose(OPTIONS, spare_bytes=109)) == [(B, 5), (C, 8)]
    assert names(choose(OPTIONS, spare_bytes=110)) == [(B, 5), (A, 8)]
    assert names(choose(OPTIONS, spare_bytes=9)) == []


def test_it_ends_when_the_sum_is_within_the_limit() -> None:
    assert names(choose(OPTIONS, kl=9.1)) == []
    assert names(choose(OPTIONS, kl=8.3)) == [(B, 5)]
    assert names(choose(OPTIONS, kl=2.05)) == [(B, 5), (A, 8)]


def test_steps_that_are_not_needed_are_taken_back() -> None:
    """B's comes first, and A's is enough."""
    assert names(choose(OPTIONS, kl=2.2)) == [(A, 8)]


def test_what_is_no_better_is_never_taken() -> None:
    assert choose({A: [option(4, 100, 1.0), option(8, 200, 1.0)]}) == []
    assert choose({A: [option(None, 100, 0.0)]}, kl=-1) == []


# Real formats


@pytest.mark.parametrize("kind", FORMATS)
def test_costs_are_those_of_the_types(kind: str, mixtures: Mixtures, case: Case) -> None:
    """In the largest type a matrix costs alone what its squared error in that type foretells."""
    mixture = mixtures[kind]
    largest = {name: some[-1].choice for name, some in mixture.options.items()}
    plan = mixture._plan(largest)
    sequences = mixture._texts[0][:1]
    read = lambda: read_rounded(plan.data, case.checkpoint)  # noqa: E731
    found = sensitivity.measure(case.checkpoint, case.decoder, read, sequences)
    sizes = sensitivity.measure_bytes(plan.data)
    for error in found.errors:
        small, *_, large = mixture.options[error.name]
        assert large.size_bytes == sizes[error.name]
        # Errors of two types point in other directions, and 64 sampled rows are not all: measured
        # at most 30 % apart; the types' own ratio is a factor of 4 to 256.
        assert large.kl == pytest.approx(error.kl, rel=0.6, abs=1e-7), error.name
        assert small.kl > 3 * large.kl


@pytest.mark.parametrize("kind", FORMATS)
def test_a_size_is_used_and_kept(kind: str, mixtures: Mixtures, case: Case, tmp_path: Path) -> None:
    mixture = mixtures[kind]
    least = mixture.smallest.artifact_bytes
    most = mixture.plan_of(choose(mixture.options)).artifact_bytes
    wanted = [least + (most - least) * share // 4 for share in range(5)]
    mixes = [budget.spend(mixture, size_bytes) for size_bytes in wanted]
    sizes, kls = [mix.size_bytes for mix in mixes], [mix.kl for mix in mixes]
    assert sizes[0] == least
    assert sizes[-1] == most
    assert sizes == sorted(set(sizes))
    assert all(found <= size_bytes for found, size_bytes in zip(sizes, wanted, strict=True))
    assert kls[0] > 1.5 * kls[2] > 3 * kls[4]
    # The recipe is a plain one: what it is predicted to be is what is written.
    recipe = mixes[2].recipe
    folder = tmp_path / kind
    folder.mkdir()
    write_artifact(recipe, case.checkpoint, folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= sizes[2]
    plan = make_plan(recipe, case.decoder, tokenizer_bytes=measure_tokenizer(case.checkpoint))
    assert plan.artifact_bytes == sizes[2]
    rounded = dict(read_rounded(plan.data, case.checkpoint))
    for name, weights in formats.get(kind).dequantize(folder, case.decoder):
        own = case.checkpoint.read(name)
        error = np.square(weights - own).sum()
        # NNCF's and MLX's codes belong to scales before these are rounded to 16 bits: measured 4 %
        # more than the nearest codes' error.
        assert np.square(rounded[name] - own).sum() == pytest.approx(error, rel=0.06), name


@pytest.mark.parametrize("kind", FORMATS)
def test_a_kl_is_reached_and_becomes_the_limit(kind: str, mixtures: Mixtures) -> None:
    lenient = msgspec.structs.replace(mixtures[kind].recipe, check=Limits(max_kl=10))
    mixture = replace(mixtures[kind], recipe=lenient)
    coarse, fine = mixture.predict([]), mixture.predict(choose(mixture.options))
    limit = (coarse.worst_kl * fine.worst_kl) ** 0.5
    mix = budget.reach(mixture, limit)
    assert 0.3 * limit < mix.worst_kl <= budget.MARGIN * limit
    assert mixture.smallest.artifact_bytes < mix.size_bytes < fine.size_bytes
    assert mix.recipe.check.max_kl == limit
    loose = budget.reach(mixture, 2 * coarse.worst_kl)
    assert loose.size_bytes == mixture.smallest.artifact_bytes
    with pytest.raises(PlanError, match=r"--max-kl 1e-07: the finest mix of x, .* a mean KL of "):
        budget.reach(mixture, 1e-7)


@pytest.mark.parametrize("limit", [1.3, float("inf"), float("nan")])
def test_a_limit_looser_than_the_recipes_is_refused(limit: float, mixtures: Mixtures) -> None:
    with pytest.raises(PlanError, match=r"--max-kl: got .*; x: .* allows 1\.2 at most"):
        budget.reach(mixtures["onnx"], limit)


def test_what_is_advised_is_no_less() -> None:
    assert [budget.round_up(value) for value in (0.01201, 0.5, 3.14e-5)] == [
        "0.013",
        "0.5",
        "3.2e-05",
    ]


def test_the_same_comes_twice(case: Case, mixtures: Mixtures) -> None:
    size_bytes = mixtures["mlx"].smallest.artifact_bytes + 100_000
    console = Console()
    found = [
        fit_budget(
            make_recipe("mlx"), case.checkpoint, Budget(size_bytes=size_bytes), console, Report("")
        )
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert overrides_of(found[0].recipe)


@pytest.mark.parametrize("kind", FORMATS)
def test_own_overrides_stay(kind: str, case: Case) -> None:
    lowest = make_recipe(kind)
    setting = formats.get(kind).list_choices(lowest, case.decoder)["lm_head.weight"][-1]
    recipe = with_overrides(lowest, {"*.o_proj": setting, "lm_head": setting})
    mixture = Mixture(recipe, case.checkpoint, case.decoder, None, None, Console())
    pinned = [name for name, choices in mixture.choices.items() if choices == (None,)]
    assert pinned == [
        *(f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)),
        "lm_head.weight",
    ]
    least = budget.spend(mixture, mixture.smallest.artifact_bytes)
    assert overrides_of(least.recipe)["*.o_proj"] == setting
    assert overrides_of(least.recipe)["lm_head"] == setting
    assert budget.name_choices(least.recipe, mixture)[budget.spell(setting)] == [
        name.removesuffix(".weight") for name in pinned
    ]


def test_gptq_leaves_more_for_what_is_looked_up(case: Case, mixtures: Mixtures) -> None:
    """The embedding costs what it costs by rounding; 8 bits are rounded as well."""
    recipe = make_recipe("mlx", method="gptq")
    mixture = Mixture(recipe, case.checkpoint, case.decoder, None, None, Console())
    rounded = mixtures["mlx"].options
    for name, some in mixture.options.items():
        gains = [one.kl / other.kl for one, other in zip(some, rounded[name], strict=True)]
        by_gptq = [1.0 if name.startswith("model.embed") else mixing.GPTQ_GAIN] * 3
        assert gains == pytest.approx([*by_gptq, 1.0])  # 4, 5, 6 and 8 bits
    mix, other = mixture.predict([]), mixtures["mlx"].predict([])
    assert mixing.GPTQ_GAIN < mix.kl / other.kl < 1
    assert mix.recipe.quantization.method == "gptq"


def test_needless_overrides_are_left_out(mixtures: Mixtures) -> None:
    """ONNX's bf16 embedding is a choice of the recipe; int4 is what the other matrices are."""
    mix = mixtures["onnx"].predict([])
    assert overrides_of(mix.recipe) == {"model.embed_tokens": "int4"}


def test_the_bundled_example_is_better_at_the_same_size(example: Path) -> None:
    checkpoint = Checkpoint.open(example)
    recipe = catalog.load_recipe("tiny-phi3-onnx-cpu-int4")
    decoder = read_decoder(checkpoint.config)
    mixture = Mixture(recipe, checkpoint, decoder, None, None, Console())
    own = mixture._plan({})
    mix = budget.spend(mixture, own.artifact_bytes)
    # Measured 0.0038 against 0.0119.
    assert mix.kl < 0.5 * mixture._compare_weights(own)[0]


# What is refused


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("onnx", {"precision": "fp32", "head": "fp32"}, "it leaves no type to choose"),
        ("openvino", {"precision": "f16"}, "it leaves no type to choose"),
        ("openvino", {"precision": "int8"}, "it leaves no type to choose"),
        ("mlx", {"bits": 8}, "it leaves no type to choose"),
        ("gguf", {"precision": "q8_0"}, "it leaves no type to choose"),
        ("gguf", {"overrides": {"*": "q4_0"}}, "whose overrides do not name every matrix"),
    ],
)
def test_a_recipe_that_leaves_no_choice_is_refused(
    kind: str, changes: dict[str, Any], message: str, case: Case
) -> None:
    with pytest.raises(PlanError, match=message):
        fit(make_recipe(kind, **changes), case, Budget(kl=0.1))


def test_a_vendors_converter_is_refused(case: Case) -> None:
    with pytest.raises(PlanError, match="engine: got vendor, which takes no overrides"):
        fit(make_recipe("mlx").with_engine("vendor"), case, Budget(kl=0.1))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_size_below_the_smallest_is_refused(kind: str, mixtures: Mixtures, case: Case) -> None:
    """At once: before anything is measured."""
    least = mixtures[kind].smallest.artifact_bytes
    report = Report("")
    with pytest.raises(PlanError, match=rf"the smallest mix of x takes {least} bytes") as caught:
        fit(make_recipe(kind), case, Budget(size_bytes=least - 1), report)
    assert f"give --max-size {-(-least // 1000)}kB or more" in caught.value.advice
    assert not report.ok
    assert report.steps[0].seconds < 60


def test_an_npu_gets_no_int8_layers(case: Case) -> None:
    recipe: Recipe = msgspec.structs.replace(
        make_recipe("openvino", group_size=128),
        provider="npu",  # type: ignore[call-arg]
    )
    choices = formats.get("openvino").list_choices(recipe, case.decoder)
    assert choices["model.layers.0.mlp.down_proj.weight"] == ("int4", "f16")
    assert choices["lm_head.weight"] == ("int4", "int8")


def fit(recipe: Recipe, case: Case, wanted: Budget, report: Report | None = None) -> mixing.Mix:
    return fit_budget(recipe, case.checkpoint, wanted, Console(), report or Report(""))


def test_rows_that_lie_apart_are_one_tensor(tmp_path: Path) -> None:
    """Phi-3-small's gate and up are rows of one matrix, and apart in ONNX."""
    checkpoint = Checkpoint.open(write_small_checkpoint(tmp_path))
    plan = make_plan(make_recipe("onnx"), read_decoder(checkpoint.config))
    seen: dict[str, int] = {}
    for name, rounded in read_rounded(plan.data, checkpoint):
        exact = checkpoint.read(name)
        if exact.ndim == 2:
            seen[name] = seen.get(name, 0) + 1
        assert rounded.shape == exact.shape
        # 4 bits are a tenth off.
        assert np.linalg.norm(rounded - exact) <= 0.2 * np.linalg.norm(exact), name
    head = read_decoder(checkpoint.config).names.embedding
    assert {name: count for name, count in seen.items() if count > 1} == {head: 2}
