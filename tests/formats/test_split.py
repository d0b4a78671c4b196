"""Split checkpoints: read as transformers reads them, written byte for byte as fused ones."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.checkpoints import random_weights, write_safetensors
from tests.formats.test_published_contexts import EXACT, HALF
from tests.formats.test_published_contexts import make_recipe as make_float_recipe
from tests.formats.writing import write_artifact
from tests.golden.cases import case_ids, select
from tests.golden.split_cases import CASES, GOLDEN, SEED
from tests.quality.artifacts import FORMATS, make_recipe
from tests.split_checkpoints import (
    LLAMA3,
    VARIANTS,
    split_config,
    split_weights,
    write_parts,
    write_split_checkpoint,
)
from toolkit import catalog, formats
from toolkit.build import build
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.config import Config
from toolkit.console import Console
from toolkit.errors import CheckpointError, PhishipError, PlanError
from toolkit.export import open_exporter
from toolkit.families import read_decoder
from toolkit.formats.gguf.layout import rope_factors
from toolkit.job import Options
from toolkit.plan import make_plan
from toolkit.quality import reference
from toolkit.report import Report
from toolkit.source import find_model

# Two float32 forward passes that add in other orders (tests/quality/test_reference.py).
TOLERANCE = 1e-4
FUSED = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}


def write_both(folder: Path, variant: str) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoint of a variant, split and fused."""
    split = write_split_checkpoint(folder / "split", variant)
    config = {**split_config(variant), **FUSED}
    fused = write_parts(folder / "fused", config, random_weights(config))
    return Checkpoint.open(split), Checkpoint.open(fused)


def write_files(kind: str, source: Checkpoint, folder: Path, **changes: Any) -> dict[str, bytes]:
    """Every file of an artifact."""
    folder.mkdir()
    write_artifact(make_recipe(kind, **changes), source, folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_variant_is_recorded() -> None:
    assert set(CASES) == set(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_split_checkpoint(tmp_path, variant, seed=SEED))
    decoder = read_decoder(checkpoint.config)
    checkpoint.check(decoder)
    for length in CASES[variant]:
        logits = reference.forward(checkpoint, decoder, case_ids(tmp_path, length))
        expected = np.load(GOLDEN)[f"{variant}-{length}"]
        assert np.abs(select(logits) - expected).max() < TOLERANCE, length


@pytest.mark.parametrize("kind", FORMATS)
def test_every_byte_is_that_of_the_fused_checkpoint(kind: str, tmp_path: Path) -> None:
    split, fused = write_both(tmp_path, "llama3")
    found, expected = (
        write_files(kind, source, tmp_path / f"{kind}-{number}")
        for number, source in enumerate((split, fused))
    )
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, name


@pytest.mark.parametrize(
    ("kind", "variant"),
    [*((kind, "llama3") for kind in FORMATS), ("onnx", "narrow"), ("openvino", "narrow")],
)
def test_runtimes_have_transformers_logits(kind: str, variant: str, tmp_path: Path) -> None:
    """Frequencies divided by constants, and heads that are not as wide as the model together."""
    checkpoint = Checkpoint.open(write_split_checkpoint(tmp_path / "source", variant, seed=SEED))
    (tmp_path / "out").mkdir()
    write_artifact(make_float_recipe(kind, None, 256), checkpoint, tmp_path / "out")
    session = formats.get(kind).open_session(tmp_path / "out")
    length = CASES[variant][-1]
    found = select(session.logits(case_ids(tmp_path / "source", length)))
    session.close()
    expected = np.load(GOLDEN)[f"{variant}-{length}"]
    assert np.abs(found - expected).max() < (HALF if kind == "gguf" else EXACT)


def test_constants_hold_for_every_context_that_llama_cpp_allocates() -> None:
    """It takes the long factors where it allocates more than the model's context."""
    factors = rope_factors(read_decoder(Config("config.json", split_config("llama3"))))
    assert factors["rope_factors_long.weight"] == factors["rope_factors_short.weight"]
    assert len(set(factors["rope_factors_long.weight"])) > 2


@pytest.mark.parametrize("kind", ["gguf", "mlx"])
def test_heads_that_a_runtime_cannot_have_are_refused(kind: str) -> None:
    decoder = read_decoder(Config("config.json", split_config("narrow")))
    with pytest.raises(PlanError, match=r"needs heads x head_dim = hidden_size.*2 x 64 and 256"):
        make_plan(make_recipe(kind), decoder)


def test_a_vendors_engine_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_split_checkpoint(tmp_path / "source", "llama"))
    recipe = make_recipe("gguf").with_engine("vendor")
    plan = make_plan(recipe, read_decoder(checkpoint.config))
    asked = open_exporter(plan, checkpoint, tmp_path / "out")
    with pytest.raises(PlanError, match="a model with split projections"), asked:
        pass


def test_parts_of_several_types_are_read_exactly(tmp_path: Path) -> None:
    config = split_config("llama")
    weights = split_weights(random_weights(config), config)
    keys = {name: weight for name, weight in weights.items() if "k_proj" in name}
    others = {name: weight for name, weight in weights.items() if name not in keys}
    write_parts(tmp_path, config, {})
    (tmp_path / "model.safetensors").unlink()
    names = {"a.safetensors": keys, "b.safetensors": others}
    for (file, tensors), dtype in zip(names.items(), ("f32", "bf16"), strict=True):
        write_safetensors(tmp_path / file, tensors, dtype)
    index = {"weight_map": {name: file for file, some in names.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check(read_decoder(checkpoint.config))
    assert checkpoint.files == ["a.safetensors", "b.safetensors"]
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert {raw.dtype for _, raw in checkpoint.read_rows(name)} == {np.dtype(np.float32)}
    fused = checkpoint.read(name)
    key = "model.layers.0.self_attn.k_proj.weight"
    assert np.array_equal(fused[256:384], keys[key])
    queries = weights["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_allclose(fused[:256], queries, rtol=2**-8)


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({K_PROJ: None}, r"k_proj\.weight \[128, 256\] is missing"),
        ({K_PROJ: (256, 128)}, r"k_proj\.weight: found \[256, 128\]; expected \[128, 256\]"),
        ({K_PROJ: (64, 256)}, r"k_proj\.weight: found \[64, 256\]; expected \[128, 256\]"),
        ({"model.layers.0.mlp.up_proj.weight": None}, r"up_proj\.weight \[512, 256\] is missing"),
        ({K_PROJ.replace("weight", "bias"): (128,)},
         r"k_proj\.bias is not part of LlamaForCausalLM"),
        ({"model.layers.0.self_attn.q_norm.weight": (64,)}, r"q_norm\.weight is not part of Llama"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    changes: dict[str, tuple[int, ...] | None], says: str, tmp_path: Path
) -> None:
    config = split_config("llama")
    weights = split_weights(random_weights(config), config)
    for name, shape in changes.items():
        weights.pop(name, None)
        if shape:
            weights[name] = np.zeros(shape, np.float32)
    checkpoint = Checkpoint.open(write_parts(tmp_path, config, weights))
    with pytest.raises(CheckpointError, match=says):
        checkpoint.check(read_decoder(checkpoint.config))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"attention_bias": True}, "attention_bias: got True; supported: false"),
        ({"mlp_bias": True}, "mlp_bias: got True; supported: false"),
        ({"use_qk_norm": True}, "norms of queries and keys"),
        ({"sliding_window": "wide"}, "sliding_window: got 'wide'; allowed a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads: got 0; allowed a whole number above 0"),
        ({"rope_scaling": {"type": ["su"]}}, "type: got ['su']; supported"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'; allowed 'silu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5; allowed 1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "type: got 'yarn'; supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor: got 0; allowed a number"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
         "high_freq_factor: got 1.0; allowed more than low_freq_factor"),
    ],
)  # fmt: skip
def test_what_phi3_has_not_is_refused_by_name(fields: dict[str, Any], says: str) -> None:
    config = Config("config.json", {**split_config("llama"), **fields})
    with pytest.raises(PhishipError) as caught:
        read_decoder(config)
    assert says in str(caught.value)


def test_what_a_config_leaves_out_is_transformers_default() -> None:
    fields = {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
              "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16,
              "num_hidden_layers": 2, "vocab_size": 100}  # fmt: skip
    decoder = read_decoder(Config("config.json", fields))
    found = decoder.kv_heads, decoder.norm_epsilon, decoder.window, decoder.context
    assert found == (8, 1e-6, 4096, 131072)
    llama = {**fields, "architectures": None, "model_type": "llama", "sliding_window": 16}
    decoder = read_decoder(Config("config.json", llama))
    found = decoder.kv_heads, decoder.norm_epsilon, decoder.window, decoder.context
    assert found == (16, 1e-6, None, 2048)


def test_a_split_model_is_the_bundled_one() -> None:
    """Its recipes then apply; as unsloth publishes it, and with tokens of a fine-tune's own."""
    fields = dict(catalog.load_model("phi-3.5-mini").config)
    for changes in ({}, {"vocab_size": 32100}, {"tie_word_embeddings": True}):
        split = {**fields, "architectures": ["LlamaForCausalLM"], "model_type": "llama", **changes}
        decoder = read_decoder(Config("config.json", split))
        assert find_model(decoder, "unsloth/Phi-3.5-mini-instruct") == "phi-3.5-mini"
    unknown = read_decoder(Config("config.json", split_config("llama")))
    assert find_model(unknown, "checkpoints/x") == "x"


def test_chosen_codes_are_those_of_the_fused_checkpoint(tmp_path: Path) -> None:
    recipe = make_recipe("gguf", method="gptq", calibration_tokens=128)
    recipe = msgspec.structs.replace(recipe, context_length=128)
    options, console = Options(check=False, workers=2), Console(as_json=True)
    files = []
    for number, source in enumerate(write_both(tmp_path, "llama")):
        out = tmp_path / f"out-{number}"
        folder = build(recipe, source, out, options, console, Report("x"))
        files.append((folder / "model.gguf").read_bytes())
    assert files[0] == files[1]
