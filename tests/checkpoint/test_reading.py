"""Reading tensors: any rows, any dtype, bounded memory, the same bytes however they are stored."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.checkpoints import Dtype, encode, write_random_checkpoint, write_safetensors
from toolkit import fileio
from toolkit.checkpoint import PIECE_WEIGHTS, RAW_DTYPES, Checkpoint, to_float32
from toolkit.errors import CheckpointError

DTYPES: tuple[Dtype, ...] = ("bf16", "f16", "f32")
SHAPES = {
    "matrix": (37, 12),
    "wide": (3, 200),
    "column": (9, 1),
    "vector": (50,),
    "cube": (4, 5, 6),
}
RNG = np.random.default_rng(7)
WEIGHTS = {name: RNG.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Dtype, Checkpoint]:
    """The same tensors in each dtype."""
    opened: dict[Dtype, Checkpoint] = {}
    for dtype in DTYPES:
        folder = tmp_path_factory.mktemp(dtype)
        (folder / "config.json").write_text("{}")
        write_safetensors(folder / "model.safetensors", WEIGHTS, dtype)
        opened[dtype] = Checkpoint.open(folder)
    return opened


def stored(name: str, dtype: Dtype) -> NDArray[Any]:
    """What the file holds of a tensor, as rows of its last axis."""
    raw = np.frombuffer(encode(WEIGHTS[name], dtype), RAW_DTYPES[dtype.upper()])
    return raw.reshape(-1, SHAPES[name][-1])


@pytest.fixture(params=["mapped", "buffer"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test both ways: where the file lies, and read into a buffer."""
    if request.param == "buffer":
        monkeypatch.setattr(fileio, "map_file", lambda _: None)


# Machines that are busy are slow, not wrong. One way of reading holds for all examples.
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("_way")
@given(data=st.data(), name=st.sampled_from(sorted(SHAPES)), dtype=st.sampled_from(DTYPES))
def test_any_rows_equal_slicing_the_whole(
    checkpoints: dict[Dtype, Checkpoint], data: st.DataObject, name: str, dtype: Dtype
) -> None:
    checkpoints[dtype].close()  # what was mapped
    whole = stored(name, dtype)
    start = data.draw(st.integers(0, len(whole)), "start")
    count = data.draw(st.none() | st.integers(0, len(whole) - start), "count")
    piece = data.draw(st.integers(1, 2 * whole.size), "piece")
    expected = whole[start:] if count is None else whole[start : start + count]
    next_row = start
    for row, raw in checkpoints[dtype].read_rows(name, start, count, piece):
        assert row == next_row
        assert raw.size <= max(piece, raw.shape[1])
        np.testing.assert_array_equal(raw, whole[row : row + len(raw)])
        next_row += len(raw)
    assert next_row == start + len(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_read_is_exact(checkpoints: dict[Dtype, Checkpoint], name: str, dtype: Dtype) -> None:
    found = checkpoints[dtype].read(name)
    assert found.shape == SHAPES[name] and found.dtype == np.float32
    raw = stored(name, dtype).reshape(SHAPES[name])
    # bf16 is the upper half of a float32, so the lower half is zero.
    upper = raw.astype(np.uint32) << 16
    expected = upper.view(np.float32) if dtype == "bf16" else raw.astype(np.float32)
    np.testing.assert_array_equal(found, expected)


def test_widening_keeps_every_bf16() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    widened = to_float32(bits)
    np.testing.assert_array_equal(widened.view(np.uint32) >> 16, bits)
    assert not (widened.view(np.uint32) & 0xFFFF).any()


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (38, 0), (0, 38), (37, 1), (5, -1)])
def test_rows_that_are_not_there(
    checkpoints: dict[Dtype, Checkpoint], start: int, count: int
) -> None:
    # Without this, the next tensor's bytes would pass for this one's.
    with pytest.raises(IndexError, match=r"matrix.*37"):
        list(checkpoints["bf16"].read_rows("matrix", start, count))


@pytest.mark.parametrize("variant", ["gqa", "partial_rotary_tied"])
def test_shards_hold_what_one_file_holds(tmp_path: Path, variant: str) -> None:
    single = Checkpoint.open(write_random_checkpoint(tmp_path / "single", variant))
    sharded = Checkpoint.open(write_random_checkpoint(tmp_path / "sharded", variant, shards=3))
    assert len({info.file for info in sharded.tensors.values()}) == 3
    assert single.tensors.keys() == sharded.tensors.keys()
    for name in single.tensors:
        np.testing.assert_array_equal(single.read(name), sharded.read(name))
    assert single.fingerprint() == sharded.fingerprint()


def test_single_file_wins_over_a_stale_index(tmp_path: Path) -> None:
    """transformers reads it like that too."""
    folder = write_random_checkpoint(tmp_path / "both", "mha", shards=2)
    write_safetensors(folder / "model.safetensors", WEIGHTS, "bf16")
    assert Checkpoint.open(folder).tensors.keys() == WEIGHTS.keys()


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("piece", [PIECE_WEIGHTS, 24 << 10])
def test_memory_is_bounded(tmp_path: Path, piece: int) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = np.ones((1 << 14, 1 << 10), np.float32)  # 64 MB
    write_safetensors(tmp_path / "model.safetensors", {"w": weights}, "f32")
    del weights
    checkpoint = Checkpoint.open(tmp_path)
    tracemalloc.start()
    mapped_bytes = []
    total = 0.0
    try:
        for _, raw in checkpoint.read_rows("w", piece=piece):
            total += float(raw[0, 0]) * len(raw)
            mapped_bytes.append(measure_mapped())
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 1 << 14
    # One buffer, and a little for the rest: far from the tensor's 64 MB.
    assert peak_bytes < 4 * piece + (1 << 20)
    # One piece, and the pages around it.
    assert max(mapped_bytes) - mapped_bytes[0] < 4 * piece + 2 * fileio.AROUND_BYTES


def measure_mapped() -> int:
    """Resident bytes of mapped files; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text("ascii").splitlines() if status.is_file() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile:"))


def test_weights_at_odd_offsets(tmp_path: Path) -> None:
    """safetensors files of other writers may have a header of any length."""
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    write_safetensors(path, WEIGHTS, "bf16")
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    path.write_bytes(
        (size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :]
    )
    checkpoint = Checkpoint.open(tmp_path)
    for _, raw in checkpoint.read_rows("matrix"):
        assert raw.flags.aligned
        np.testing.assert_array_equal(raw, stored("matrix", "bf16"))


@pytest.mark.usefixtures("_way")
def test_file_access_without_pread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_random_checkpoint(tmp_path / "shards", "mha", shards=2)
    with_pread = Checkpoint.open(folder).fingerprint()
    monkeypatch.setattr(fileio, "HAS_POSITIONAL", False)
    monkeypatch.delattr("os.preadv", raising=False)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.fingerprint() == with_pread
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(checkpoint.read(name), Checkpoint.open(folder).read(name))


@pytest.mark.parametrize("was_read", [False, True])
def test_file_that_shrinks_after_opening(tmp_path: Path, was_read: bool) -> None:
    folder = write_random_checkpoint(tmp_path / "shrinks", "mha")
    checkpoint = Checkpoint.open(folder)
    if was_read:  # and is mapped
        checkpoint.read("lm_head.weight")
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(100_000)
    with pytest.raises(CheckpointError, match=r"lm_head.weight: .* too early"):
        checkpoint.read("lm_head.weight")
    with pytest.raises(CheckpointError, match="too early"):
        checkpoint.fingerprint()


def test_close_and_read_again(checkpoints: dict[Dtype, Checkpoint]) -> None:
    before = checkpoints["f32"].read("vector")
    checkpoints["f32"].close()
    np.testing.assert_array_equal(checkpoints["f32"].read("vector"), before)


def change_weight(position: int) -> Callable[[Path], None]:
    """Change one byte of the data, counted from its end when negative."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little") if position >= 0 else 0
        content[start + position] ^= 1
        path.write_bytes(content)

    return change


def change_json(name: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text("utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**content, **fields}))

    return change


def add_tokenizer(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<|new|>": 2047}')


CHANGES = {
    "first weight": change_weight(0),
    "last weight": change_weight(-1),
    "config": change_json("config.json", rope_theta=20000.0),
    "stop ids": change_json("generation_config.json", eos_token_id=[3]),
    "chat template": change_json("tokenizer_config.json", chat_template="{{ messages }}"),
    "tokenizer": add_tokenizer,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_fingerprint_notices(change: Callable[[Path], None], tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "ck", "mha")
    before = Checkpoint.open(folder).fingerprint()
    assert Checkpoint.open(folder).fingerprint() == before
    change(folder)
    assert Checkpoint.open(folder).fingerprint() != before


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "a", "mha")
    shutil.copytree(folder, tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("a model card")
    first, second = Checkpoint.open(folder), Checkpoint.open(tmp_path / "b")
    assert first.fingerprint() == second.fingerprint()


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 4, 6]}, {"eos_token_id": 3}, (3, 4, 6)),
        ({"eos_token_id": 5}, {"eos_token_id": 3}, (5,)),
        ({}, {"eos_token_id": 3}, (3,)),
        (None, {"eos_token_id": [3, 4]}, (3, 4)),
    ],
)
def test_stop_ids(
    generation: dict[str, Any] | None,
    config: dict[str, Any],
    expected: tuple[int, ...],
    tmp_path: Path,
) -> None:
    assert _with_ids(tmp_path, generation, config).stop_ids == expected


@pytest.mark.parametrize("found", [None, [], "3", [3, None], True, [[3]]])
def test_stop_ids_that_are_none(found: object, tmp_path: Path) -> None:
    checkpoint = _with_ids(tmp_path, None, {"eos_token_id": found})
    with pytest.raises(
        CheckpointError, match=r"eos_token_id: got .*; allowed a token id or a list"
    ):
        _ = checkpoint.stop_ids


def test_special_ids(tmp_path: Path) -> None:
    checkpoint = _with_ids(tmp_path, {"pad_token_id": 7}, {"pad_token_id": 3, "bos_token_id": 1})
    assert checkpoint.special_id("pad_token_id") == 7
    assert checkpoint.special_id("bos_token_id") == 1
    assert checkpoint.special_id("sep_token_id") is None


def _with_ids(
    folder: Path, generation: dict[str, Any] | None, config: dict[str, Any]
) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    write_safetensors(folder / "model.safetensors", WEIGHTS, "bf16")
    return Checkpoint.open(folder)
