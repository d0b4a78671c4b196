"""How parity matches, classifies and counts; with real checkpoints in test_live.py."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.checkpoints import write_random_checkpoint
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.errors import ArtifactError
from toolkit.families import read_decoder
from toolkit.parity import compare_tensors

Pairs = list[tuple[str, NDArray[Any]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A small random checkpoint: 2 layers."""
    return Checkpoint.open(write_random_checkpoint(tmp_path_factory.mktemp("gqa") / "gqa", "gqa"))


@pytest.fixture(scope="module")
def decoder(checkpoint: Checkpoint) -> Decoder:
    """Its architecture."""
    return read_decoder(checkpoint.config)


@pytest.fixture
def tensors(checkpoint: Checkpoint, decoder: Decoder) -> Pairs:
    """Its tensors, as a reader yields them."""
    return [(name, checkpoint.read(name)) for name in decoder.shapes()]


def stream(pairs: Pairs) -> Iterator[tuple[str, NDArray[Any]]]:
    """What a format's reader is."""
    yield from pairs


def test_the_same_is_equal_in_whatever_order(tensors: Pairs, decoder: Decoder) -> None:
    classes = compare_tensors(stream(tensors), stream(tensors[::-1]), decoder)
    assert {name: found.tensors for name, found in classes.items()} == {
        "embedding": 1, "qkv": 2, "o": 2, "gate_up": 2, "down": 2, "norms": 5, "head": 1,
    }  # fmt: skip
    for found in classes.values():
        assert found.equal_tensors == found.tensors
        assert found.equal_weights == found.weights
        assert found.max_difference == 0
    assert sum(found.weights for found in classes.values()) == sum(a.size for _, a in tensors)


def test_a_difference_is_counted_where_it_is(tensors: Pairs, decoder: Decoder) -> None:
    name = decoder.names.down.format(1)
    theirs = [(n, a.copy() if n == name else a) for n, a in tensors]
    changed = dict(theirs)[name]
    changed[3, 5] += 0.25
    changed[4, 5] -= 0.5
    classes = compare_tensors(stream(tensors), stream(theirs), decoder)
    found = classes.pop("down")
    assert (found.tensors, found.equal_tensors) == (2, 1)
    assert found.weights - found.equal_weights == 2
    assert found.max_difference == pytest.approx(0.5)
    assert found.max_weight == max(
        np.abs(a).max() for n, a in theirs if n.endswith("down_proj.weight")
    )
    assert all(other.max_difference == 0 for other in classes.values())


def test_a_tensor_that_one_side_lacks(tensors: Pairs, decoder: Decoder) -> None:
    missing = tensors[4][0]
    with pytest.raises(ArtifactError, match=f"only in the native artifact: {missing}"):
        compare_tensors(stream(tensors), stream([t for t in tensors if t[0] != missing]), decoder)
    with pytest.raises(ArtifactError, match=f"only in the vendor artifact: {missing}"):
        compare_tensors(stream([t for t in tensors if t[0] != missing]), stream(tensors), decoder)


def test_another_shape_is_named(tensors: Pairs, decoder: Decoder) -> None:
    name = tensors[2][0]
    theirs = [(n, a[1:] if n == name else a) for n, a in tensors]
    with pytest.raises(ArtifactError, match=f"{name}: .* shapes differ"):
        compare_tensors(stream(tensors), stream(theirs), decoder)


def test_a_tied_head_comes_twice(tensors: Pairs, decoder: Decoder) -> None:
    twice = [*tensors, tensors[0]]
    classes = compare_tensors(stream(twice), stream(twice), decoder)
    assert (classes["embedding"].tensors, classes["head"].tensors) == (1, 2)
    with pytest.raises(ArtifactError, match="only in the native"):
        compare_tensors(stream(twice), stream(tensors), decoder)
