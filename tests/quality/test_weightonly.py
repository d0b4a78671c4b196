"""The weight-only view: an artifact's tensors in the reference forward, without its runtime."""

import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.quality.artifacts import (
    FORMATS,
    SEQUENCES,
    Case,
    count_reads,
    in_order,
    reader_of,
    shape_bytes,
)
from toolkit import formats
from toolkit.errors import ArtifactError
from toolkit.quality import comparing, measures, reference, weightonly
from toolkit.quality.weightonly import ArtifactWeights, compare, open_reader

RUNTIMES = ("onnxruntime", "onnxruntime_genai", "openvino_genai", "openvino_tokenizers",
            "transformers", "mlx_lm", "xllamacpp")  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Shared by the tests of this file."""
    return Case(tmp_path_factory.mktemp("weightonly"))


@pytest.mark.parametrize("variant", ["gqa", "longrope", "partial_rotary_tied", "window"])
def test_the_sources_own_tensors_are_the_source(variant: str, tmp_path: Path) -> None:
    case = Case(tmp_path, variant)
    found = compare(reader_of(case.tensors()), case.source(), SEQUENCES)
    assert found.ids.tolist() == [token for ids in SEQUENCES for token in ids]
    # Float32 products of other shapes: last bits of logits, whose effect on a KL is quadratic.
    assert found.kl.max() < 1e-9
    assert found.top1 == 1
    assert found.perplexity_artifact == pytest.approx(found.perplexity_source, rel=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
def test_it_is_a_checkpoint_of_the_dequantized_tensors(
    kind: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = case.write(kind)
    for module in RUNTIMES:
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    read = open_reader(kind, "native", folder, case.decoder)
    found = compare(read, case.source(), SEQUENCES)
    copy = case.copy(tmp_path / "copy", dict(read()))
    parts = [
        measures.compare_logits(
            reference.forward(case.checkpoint, case.decoder, ids),
            reference.forward(copy, case.decoder, ids),
            ids,
        )
        for ids in SEQUENCES
    ]
    expected = measures.join(parts)
    assert expected.mean_kl > 0.01  # 4 bits of random weights: nothing near 0 is compared
    assert found.kl == pytest.approx(expected.kl, rel=1e-3, abs=1e-7)
    assert found.perplexity_artifact == pytest.approx(expected.perplexity_artifact, rel=1e-4)


ORDERS: dict[str, Callable[[str], Any]] = {
    # As files of the vendors' converters have them: layer 10 before layer 2, the head in front.
    "alphabet": lambda name: name,
    "backwards": lambda name: [-ord(letter) for letter in name],
    "by matrix": lambda name: name.split(".")[::-1],
}


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_gives_the_same(order: str, case: Case) -> None:
    scaled = {name: tensor * np.float32(1.01) for name, tensor in case.tensors().items()}
    source, started = case.source(), list[int]()
    expected = compare(count_reads(reader_of(scaled), started), source, SEQUENCES)
    assert len(started) == 1
    started.clear()
    read = count_reads(in_order(scaled, ORDERS[order]), started)
    assert np.array_equal(compare(read, source, SEQUENCES).kl, expected.kl)
    # Whole layers in any inner order come with one reading; here only the head is read again.
    assert len(started) == 2 or order != "alphabet"


@pytest.mark.parametrize("order", [*ORDERS, "the model's"])
def test_no_more_than_a_layer_is_in_memory(order: str, case: Case) -> None:
    tensors, most = case.tensors(), 0
    living = list[weakref.ref[NDArray[Any]]]()
    names = sorted(tensors, key=ORDERS[order]) if order in ORDERS else list(tensors)

    def read() -> Iterator[tuple[str, NDArray[Any]]]:
        nonlocal most
        for name in names:
            array = tensors[name].copy()
            living.append(weakref.ref(array))
            most = max(most, sum(one.nbytes for ref in living if (one := ref()) is not None))
            yield name, array
            del array

    weights = ArtifactWeights(read, case.decoder)
    reference.final_states_of(weights, case.decoder, SEQUENCES)
    layer = shape_bytes(case.decoder, case.decoder.layer_tensors(0))
    largest = max(tensor.nbytes for tensor in tensors.values())
    # What is held of a layer, what was found last, and what is on its way.
    assert most <= layer + 2 * largest
    assert shape_bytes(case.decoder, list(tensors)) > layer + 2 * largest


def test_a_tied_head_may_be_stored_apart(tmp_path: Path) -> None:
    """As ONNX has it: the embedding in bf16, the head in int4, both under one name."""
    case = Case(tmp_path, "partial_rotary_tied")
    name, tensors = case.decoder.names.embedding, case.tensors()
    other = tensors[name] * np.float32(0.5)
    read = lambda: iter([*tensors.items(), (name, other)])  # noqa: E731
    weights = ArtifactWeights(read, case.decoder)
    states = reference.final_states(weights, case.decoder, SEQUENCES[0])
    logits = weights.project(case.decoder.head_name, states)
    own = reference.forward(case.checkpoint, case.decoder, SEQUENCES[0])
    assert logits == pytest.approx(own / 2, abs=1e-4)


def test_a_missing_tensor_is_named(case: Case) -> None:
    tensors = case.tensors()
    del tensors["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is not in"):
        compare(reader_of(tensors), case.source(), SEQUENCES)


def test_a_vendors_artifact_has_the_vendors_reader(case: Case) -> None:
    """Its names are others: onnxruntime-genai's builder calls every node after a module."""
    found = open_reader("onnx", "vendor", case.folder, case.decoder)
    assert found.func is formats.get_vendor("onnx").dequantize  # type: ignore[attr-defined]
    own = open_reader("onnx", "native", case.folder, case.decoder)
    assert own.func is formats.get("onnx").dequantize  # type: ignore[attr-defined]


def test_long_sequences_go_in_parts(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = {name: tensor * np.float32(1.01) for name, tensor in case.tensors().items()}
    expected = compare(reader_of(scaled), case.source(), SEQUENCES)
    monkeypatch.setattr(weightonly, "LOGIT_ROWS", 7)
    found = compare(reader_of(scaled), case.source(), SEQUENCES)
    assert found.kl == pytest.approx(expected.kl, rel=1e-3, abs=1e-9)
    assert np.isnan(found.losses).tolist() == np.isnan(expected.losses).tolist()


def test_long_texts_go_through_the_layers_in_parts(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: weights * 1.01 for name, weights in case.tensors().items()}
    whole = compare(reader_of(tensors), case.source(), SEQUENCES)
    source, together = case.source(), list[int]()
    run = reference.final_states_of
    monkeypatch.setattr(
        reference, "final_states_of", lambda w, d, ids: together.append(len(ids)) or run(w, d, ids)
    )
    monkeypatch.setattr(comparing, "PASS_TOKENS", len(SEQUENCES[0]))
    parts = compare(reader_of(tensors), source, SEQUENCES)
    assert together == [1] * len(SEQUENCES)
    assert parts.ids.tolist() == whole.ids.tolist()
    # Products of other shapes: the last bits of logits differ.
    assert parts.kl == pytest.approx(whole.kl, rel=1e-3, abs=1e-7)
