"""Manifests as a build of a bundled recipe seals them, but for their files."""

from typing import Any

import msgspec
import pytest

from toolkit import catalog
from toolkit.artifact import Manifest, Runtime
from toolkit.checkpoint.config import Config
from toolkit.device import Facts
from toolkit.errors import PreflightError
from toolkit.families import read_decoder
from toolkit.plan import make_plan
from toolkit.preflight import check_facts

MODEL = "phi-3.5-mini"
CONTEXT = 4096


def make_manifest(noise: Manifest, recipe_name: str, context: int | None = CONTEXT) -> Manifest:
    """What a build of a bundled recipe seals, but for its files."""
    recipe = catalog.load_recipe(recipe_name)
    model = catalog.load_model(recipe.model)
    decoder = read_decoder(Config(model.name, model.config))
    plan = make_plan(recipe, decoder, context_length=context)
    runtime = Runtime(
        engine=plan.needs.engine,
        provider=plan.needs.provider,
        package=plan.needs.package,
        version="0.18.0",
        main_file=plan.needs.main_file,
        companions=plan.needs.companions,
    )
    return msgspec.structs.replace(
        noise,
        name=recipe.name,
        format=recipe.format,
        plan=recipe.settings(),
        runtime=runtime,
        context_length=plan.context_length,
        device_memory_bytes=plan.device_memory_bytes,
    )


def refusal(facts: Facts, manifest: Manifest, **options: Any) -> PreflightError:
    """The error of a preflight that has to fail."""
    with pytest.raises(PreflightError) as caught:
        check_facts("board", facts, manifest, now_s=facts.clock_s, **options)
    assert str(caught.value).startswith("board: ")
    return caught.value
