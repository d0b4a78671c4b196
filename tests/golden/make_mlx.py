"""Make mlx.json: digests of the tensors that mlx_lm.convert writes.

    python -m tests.golden.make_mlx

It needs this project's extra `mlx` only. The digests are keyed by case, scheme and tensor, and
cover type, shape and bytes. Beside them stand the `quantization` of config.json and the totals of
the index.
"""

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.checkpoints import VARIANTS, random_weights, write_random_checkpoint, write_safetensors

GOLDEN = Path(__file__).with_name("mlx.json")

# What each case changes in the config of the variant "mha".
SHAPES: Mapping[str, Mapping[str, Any]] = {
    # Rows of down_proj that are no whole groups of 64: mlx_lm.convert leaves it alone.
    "narrow": {"intermediate_size": 544},
    # Enough layers for all of a mix: first and last eighth, every third between.
    "deep": {"num_hidden_layers": 12, "intermediate_size": 256},
}
# scheme -> arguments of mlx_lm.convert
SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "bf16": {},
    **{
        f"{bits}bit-group{size}": {"quantize": True, "q_bits": bits, "q_group_size": size}
        for bits, size in ((2, 64), (3, 32), (3, 64), (4, 32), (4, 64), (4, 128), (5, 64), (6, 128),
                           (8, 64))
    },
    "mixed_4_6": {"quantize": True, "q_group_size": 64, "quant_predicate": "mixed_4_6"},
    "mixed_3_6": {"quantize": True, "q_group_size": 64, "quant_predicate": "mixed_3_6"},
}  # fmt: skip
COMMON = ("4bit-group64", "8bit-group64")
CASES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(VARIANTS, COMMON),
    "mha": tuple(name for name in SCHEMES if not name.startswith("mixed")),
    "narrow": ("4bit-group64",),
    "deep": ("mixed_4_6", "mixed_3_6"),
}


def write_case(folder: Path, case: str, **changes: Any) -> Path:
    """Write the checkpoint of a case into `folder`, config changed, and return `folder`."""
    if case in VARIANTS and not changes:
        return write_random_checkpoint(folder, case)
    write_random_checkpoint(folder, case if case in VARIANTS else "mha")
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | SHAPES.get(case, {}) | changes
    path.write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", random_weights(config), "bf16")
    return folder


def digest_tensors(path: Path) -> dict[str, str]:
    """The first 16 hex digits of a sha256 over type, shape and bytes of each tensor of a file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__")
    digests = {}
    for name, entry in sorted(header.items()):
        first, last = (start + offset for offset in entry["data_offsets"])
        described = f"{entry['dtype']} {entry['shape']}\n".encode()
        digests[name] = hashlib.sha256(described + content[first:last]).hexdigest()[:16]
    return digests


def describe(folder: Path) -> dict[str, Any]:
    """What golden data holds of an artifact."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    return {
        "quantization": config.get("quantization"),
        "totals": index["metadata"],
        "tensors": digest_tensors(folder / "model.safetensors"),
    }


def convert(checkpoint: Path, scheme: str, out: Path) -> Path:
    """Run mlx_lm.convert on a checkpoint; returns its folder."""
    import mlx.core as mx
    from mlx_lm import convert as run_convert

    mx.set_default_device(mx.cpu)  # the GPU's quantizer may round another way
    with contextlib.redirect_stdout(io.StringIO()):
        run_convert(str(checkpoint), str(out), **SCHEMES[scheme])
    return out


def main() -> None:
    """Convert every case and write the digests."""
    golden: dict[str, Any] = {
        "made_by": "python -m tests.golden.make_mlx",
        "versions": {name: metadata.version(name) for name in ("mlx", "mlx-lm", "transformers")},
        "artifacts": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for case, schemes in CASES.items():
            checkpoint = write_case(work / case, case)
            golden["artifacts"][case] = {
                scheme: describe(convert(checkpoint, scheme, work / f"{case}-{scheme}"))
                for scheme in schemes
            }
            print(case, flush=True)
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
