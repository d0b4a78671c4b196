"""Equalized weights compared with the source's: what was folded in is undone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.quality.artifacts import SEQUENCES, Case, reader_of
from toolkit.quality import weightonly
from toolkit.quality.folding import unfold
from toolkit.quality.sensitivity import measure


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two query heads for each pair of keys and values: these share their factors."""
    return Case(tmp_path_factory.mktemp("folding"))


def equalize(case: Case) -> dict[str, NDArray[np.float32]]:
    """The checkpoint's tensors with random factors moved between them; the model is the same."""
    tensors, decoder = case.tensors(), case.decoder
    names, random = decoder.names, np.random.default_rng(3)

    def draw(count: int) -> NDArray[np.float32]:
        return np.exp2(random.uniform(-2, 2, count)).astype(np.float32)

    for layer in range(decoder.layers):
        for norm, matrix in ((names.attention_norm, names.qkv), (names.mlp_norm, names.gate_up)):
            factors = draw(decoder.hidden)
            tensors[norm.format(layer)] /= factors
            tensors[matrix.format(layer)] *= factors
        values, ups = draw(decoder.kv_heads * decoder.head_dim), draw(decoder.intermediate)
        tensors[names.qkv.format(layer)][-len(values) :] /= values[:, None]
        group = decoder.heads // decoder.kv_heads
        each = np.repeat(values.reshape(decoder.kv_heads, -1), group, axis=0).reshape(-1)
        tensors[names.attention_out.format(layer)] *= each
        tensors[names.gate_up.format(layer)][-len(ups) :] /= ups[:, None]
        tensors[names.down.format(layer)] *= ups
    return tensors


def test_the_sources_tensors_come_back(case: Case) -> None:
    folded = equalize(case)
    found = dict(unfold(reader_of(folded), case.checkpoint, case.decoder)())
    assert list(found) == list(case.decoder.shapes())
    for name, own in case.tensors().items():
        assert np.allclose(found[name], own, rtol=1e-5, atol=1e-6), name
        if "embed" not in name and "lm_head" not in name and name != "model.norm.weight":
            assert not np.allclose(folded[name], own, rtol=0.1)


def test_errors_are_told_apart_from_factors(case: Case, tmp_path: Path) -> None:
    folded = equalize(case)
    random = np.random.default_rng(4)
    for tensor in folded.values():
        if tensor.ndim == 2:
            tensor += random.standard_normal(tensor.shape, np.float32) * tensor.std() * 0.01
    read = unfold(reader_of(folded), case.checkpoint, case.decoder)
    table = measure(case.checkpoint, case.decoder, read, SEQUENCES)
    # The function of all tensors together is the one they have folded in, to rounding.
    whole: Any = weightonly.compare(reader_of(folded), case.source(), SEQUENCES).mean_kl
    assert table.whole_kl == pytest.approx(whole, rel=1e-2)
    assert sum(error.kl for error in table.errors) == pytest.approx(whole, rel=0.25)
    # 1e-4, and more where noise as large for all meets rows that were made small.
    assert max(error.relative_error for error in table.errors) < 0.02
    folded_table = measure(case.checkpoint, case.decoder, reader_of(folded), SEQUENCES)
    assert folded_table.whole_kl == pytest.approx(whole, rel=1e-2)
    assert min(e.kl for e in folded_table.errors if e.layer == 0) > 10 * whole
