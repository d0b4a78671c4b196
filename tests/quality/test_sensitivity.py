"""Which tensors hurt: each variant of the one pass against a checkpoint made for it."""

from pathlib import Path

import numpy as np
import pytest

from tests.quality.artifacts import FORMATS, SEQUENCES, Case, make_recipe, reader_of
from toolkit.checkpoint import Checkpoint
from toolkit.errors import ArtifactError
from toolkit.families import read_decoder
from toolkit.plan import make_plan
from toolkit.quality import measures, reference, sensitivity, weightonly
from toolkit.quality.sensitivity import measure, measure_bits
from toolkit.quality.weightonly import open_reader


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Shared by the tests of this file."""
    return Case(tmp_path_factory.mktemp("sensitivity"))


def test_every_variant_is_a_checkpoint_with_that_tensor_replaced(
    case: Case, tmp_path: Path
) -> None:
    read = open_reader("mlx", "native", case.write("mlx"), case.decoder)
    replaced = dict(read())
    table = measure(case.checkpoint, case.decoder, read, SEQUENCES)
    assert len(table.errors) == 4 * case.decoder.layers + 2
    source = [reference.forward(case.checkpoint, case.decoder, ids) for ids in SEQUENCES]
    for error in table.errors:
        copy = case.copy(tmp_path / error.name, {error.name: replaced[error.name]})
        expected = np.mean([
            measures.compare_logits(own, reference.forward(copy, case.decoder, ids), ids).mean_kl
            for own, ids in zip(source, SEQUENCES, strict=True)
        ])  # fmt: skip
        # Rounding in the last bits of logits moves a KL of 1e-3 by some 1e-8.
        assert error.kl == pytest.approx(expected, rel=1e-3, abs=1e-7), error.name
        own = case.checkpoint.read(error.name)
        wanted = np.square(replaced[error.name] - own).sum() / np.square(own).sum()
        assert error.relative_error == pytest.approx(wanted, rel=1e-4)


def test_uses_come_in_their_order(case: Case) -> None:
    table = measure(case.checkpoint, case.decoder, reader_of(case.tensors()), SEQUENCES)
    layer = ["qkv", "attention_out", "gate_up", "down"]
    assert [error.kind for error in table.errors] == ["embedding", *layer, *layer, "head"]
    assert [error.layer for error in table.errors] == [None, *[0] * 4, *[1] * 4, None]
    assert table.tokens == 48


@pytest.mark.parametrize("kind", FORMATS)
def test_the_whole_is_the_weight_only_view(kind: str, case: Case) -> None:
    read = open_reader(kind, "native", case.write(kind), case.decoder)
    table = measure(case.checkpoint, case.decoder, read, SEQUENCES)
    expected = weightonly.compare(read, case.source(), SEQUENCES).mean_kl
    assert table.whole_kl == pytest.approx(expected, rel=1e-6)


def test_small_errors_add_up(example: Path, tmp_path: Path) -> None:
    """To second order a KL is a quadratic form of the errors; those of tensors hardly correlate."""
    checkpoint = Checkpoint.open(example)
    decoder = read_decoder(checkpoint.config)
    tensors = {name: checkpoint.read(name) for name in decoder.shapes()}
    random = np.random.default_rng(1)
    noisy = {
        name: tensor + random.standard_normal(tensor.shape, np.float32) * tensor.std() * 0.03
        for name, tensor in tensors.items()
    }
    table = measure(checkpoint, decoder, reader_of(noisy), SEQUENCES)
    # Measured 4 % for this noise; 18 products of two errors that are random signs cancel to some
    # tenths at worst, while a variant that took another's path would be off by a factor.
    assert sum(error.kl for error in table.errors) == pytest.approx(table.whole_kl, rel=0.25)


def test_a_damaged_tensor_comes_first(case: Case) -> None:
    tensors = case.tensors()
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors = {key: tensor * np.float32(1.001) for key, tensor in tensors.items()}
    tensors[name] = tensors[name] * np.float32(-1)
    table = measure(case.checkpoint, case.decoder, reader_of(tensors), SEQUENCES)
    first, second, *_ = table.worst
    assert first.name == name
    assert first.kl > 10 * second.kl
    assert first.relative_error == pytest.approx(4, rel=0.01)


def test_floats_cost_nothing(case: Case, tmp_path: Path) -> None:
    own = measure(case.checkpoint, case.decoder, reader_of(case.tensors()), SEQUENCES)
    assert max(error.relative_error for error in own.errors) == 0
    # Products of other shapes round their last bits otherwise.
    assert max(error.kl for error in own.errors) < 1e-9
    assert own.whole_kl < 1e-9
    halves = {name: w.astype(np.float16).astype(np.float32) for name, w in case.tensors().items()}
    found = measure(case.checkpoint, case.decoder, reader_of(halves), SEQUENCES)
    assert found.whole_kl < 1e-6


@pytest.mark.parametrize("part_tokens", [1, 5 * 48])
def test_parts_give_the_same(part_tokens: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants go through the layers in parts; progress counts what each of them reads."""
    read = open_reader("mlx", "native", case.write("mlx"), case.decoder)
    expected = measure(case.checkpoint, case.decoder, read, SEQUENCES)
    monkeypatch.setattr(sensitivity, "PART_TOKENS", part_tokens)
    told = list[int]()
    found = measure(case.checkpoint, case.decoder, read, SEQUENCES, advance=told.append)
    assert [e.kl for e in found.errors] == pytest.approx([e.kl for e in expected.errors], rel=1e-4)
    assert found.whole_kl == pytest.approx(expected.whole_kl, rel=1e-6)
    assert sum(told) == sensitivity.bytes_to_read(case.checkpoint, case.decoder, 48)


def test_a_tied_matrix_has_two_uses(tmp_path: Path) -> None:
    case = Case(tmp_path, "partial_rotary_tied")
    tensors, name = case.tensors(), case.decoder.names.embedding
    tensors[name] = tensors[name] * np.float32(1.1)
    table = measure(case.checkpoint, case.decoder, reader_of(tensors), SEQUENCES)
    uses = [error for error in table.errors if error.name == name]
    assert [use.kind for use in uses] == ["embedding", "head"]
    assert min(use.kl for use in uses) > 1e-4
    assert all(e.kl < 1e-9 for e in table.errors if e.name != name)


def test_bits_count_scales_too(case: Case) -> None:
    q4_0 = measure_bits(make_plan(make_recipe("gguf"), case.decoder).data)
    assert q4_0["model.layers.0.mlp.down_proj.weight"] == 4.5  # 18 bytes for 32 weights
    assert q4_0["lm_head.weight"] == 6.5625  # Q6_K: 210 bytes for 256 weights
    assert q4_0["model.norm.weight"] == 32
    onnx = measure_bits(make_plan(make_recipe("onnx"), case.decoder).data)
    # int4 with a float32 scale for 32 weights; gate_up is stored as two matrices.
    assert onnx["model.layers.1.mlp.gate_up_proj.weight"] == pytest.approx(5)
    assert onnx["model.embed_tokens.weight"] == 16
    read = open_reader("gguf", "native", case.write("gguf"), case.decoder)
    table = measure(case.checkpoint, case.decoder, read, SEQUENCES, bits=q4_0)
    assert [error.bits for error in table.errors] == [4.5] * 9 + [6.5625]


def test_what_cannot_be_measured_is_refused(case: Case) -> None:
    tensors = case.tensors()
    with pytest.raises(ValueError, match="token 5000"):
        measure(case.checkpoint, case.decoder, reader_of(tensors), [[1, 5000]])
    del tensors["lm_head.weight"]
    with pytest.raises(ArtifactError, match=r"lm_head\.weight is not in the artifact"):
        measure(case.checkpoint, case.decoder, reader_of(tensors), SEQUENCES)
