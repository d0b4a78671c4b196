"""Tensors of GGUF files, beside what gguf-py reads."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from toolkit.errors import ArtifactError
from toolkit.formats.gguf.tensors import read_tensors

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def path(artifacts: dict[str, Path]) -> Path:
    return next(artifacts["gguf"].glob("*.gguf"))


def test_they_are_gguf_pys(path: Path) -> None:
    expected = gguf.GGUFReader(path).tensors
    found = read_tensors(path)
    assert [one.name for one in found] == [one.name for one in expected]
    assert {one.kind for one in found} >= {"F32", "Q4_0", "Q6_K"}
    for one, other in zip(found, expected, strict=True):
        assert one.kind == other.tensor_type.name
        assert one.data.tobytes() == other.data.tobytes()
        weights = gguf.dequantize(other.data, other.tensor_type)
        np.testing.assert_array_equal(one.dequantize(), weights)


def test_other_alignments_and_every_kind_of_value(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("texts", ["", "two"])
    writer.add_float64("double", 0.5)
    writer.add_bool("flag", True)
    writer.add_int8("small", -3)
    tensors = {"odd": np.arange(3, dtype=np.float32), "next": np.ones((2, 4), np.float16)}
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for one in read_tensors(tmp_path / "x.gguf"):
        np.testing.assert_array_equal(one.dequantize(), tensors[one.name])


@pytest.mark.parametrize("kept", [0, 3, 100, 10_000, -1])
def test_a_file_that_is_cut_off_is_refused(path: Path, tmp_path: Path, kept: int) -> None:
    cut = Path(shutil.copy(path, tmp_path / "x.gguf"))
    cut.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"x\.gguf: is not a GGUF file, or cut off"):
        read_tensors(cut)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ArtifactError, match="it begins with"):
        read_tensors(tmp_path / "x.gguf")
