"""Checkpoints that are quantized already: which scheme a config names, and what to do about it.

Only 8-bit floats with scales are read (fp8.py). Names are those of `quantization_config` as
transformers 5 writes it (utils/quantization_config.py), and of mlx-lm.
"""

from collections.abc import Mapping
from typing import Any

from toolkit.checkpoint.config import Config
from toolkit.errors import UnsupportedError

KEY = "quantization_config"
NAMES: Mapping[str, str] = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "mlx": "MLX",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
DEQUANTIZE: Mapping[str, str] = {
    "bitsandbytes": "(of unsloth's the same name without -bnb-4bit), or dequantize this one: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).dequantize().save_pretrained(OUT)",
    "compressed-tensors": "or decompress this one: AutoModelForCausalLM.from_pretrained(FOLDER, "
    "quantization_config=CompressedTensorsConfig(run_compressed=False)).save_pretrained(OUT)",
    "mxfp4": "or dequantize this one: AutoModelForCausalLM.from_pretrained(FOLDER, "
    "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(OUT)",
}


def check_quantization(config: Config) -> None:
    """UnsupportedError for a checkpoint that is quantized in a way that is not read."""
    method, bits = _find_method(config)
    if not method or _is_fp8(method, _settings(config)):
        return
    name = NAMES.get(method, method)
    raise UnsupportedError(
        f"{config.where}: {KEY}: the checkpoint is quantized already, with {name}"
        f"{f' to {bits} bits' if bits else ''}; supported: 16- and 32-bit floats, and fp8 "
        "(F8_E4M3 with scales)",
        advice="give the 16-bit checkpoint that it was made of "
        + DEQUANTIZE.get(method, "(its model card names it)"),
    )


def read_block(config: Config) -> tuple[int, int] | None:
    """Rows and columns of a block that has one scale; None when the config says nothing of it."""
    found = _settings(config).get("weight_block_size")
    for group in _list_groups(_settings(config)):
        found = found or group.get("block_structure")
    if found is None:
        return None
    counts = found if isinstance(found, list) else []
    if len(counts) != 2 or not all(isinstance(one, int) and one > 0 for one in counts):
        raise config.error(f"{KEY}: weight_block_size", found, "two whole numbers above 0")
    return counts[0], counts[1]


def _find_method(config: Config) -> tuple[str, object]:
    """Name and bits of the scheme; empty where there is none."""
    settings, mlx = _settings(config), config.fields.get("quantization")
    if isinstance(mlx, dict) and "group_size" in mlx:
        return "mlx", mlx.get("bits")
    if not settings:
        return "", None
    method = str(settings.get("quant_method") or "")
    bits = settings.get("bits") or settings.get("nbits")
    for key, count in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if settings.get(key):
            return method or "bitsandbytes", count
    groups = _list_groups(settings)
    return method or "an unknown scheme", bits or (groups[0].get("num_bits") if groups else None)


def _is_fp8(method: str, settings: Mapping[str, Any]) -> bool:
    """Whether the weights are 8-bit floats with scales."""
    if method == "compressed-tensors":
        groups = _list_groups(settings)
        return bool(groups) and all(
            one.get("type") == "float" and one.get("num_bits") == 8 for one in groups
        )
    if method == "modelopt":
        return str(settings.get("quant_algo")).upper().startswith("FP8")
    return method in ("fp8", "fbgemm_fp8")


def _settings(config: Config) -> Mapping[str, Any]:
    found = config.fields.get(KEY)
    return found if isinstance(found, dict) else {}


def _list_groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What compressed-tensors says of weights, group by group."""
    groups = settings.get("config_groups")
    values = groups.values() if isinstance(groups, dict) else ()
    weights = [one.get("weights") for one in values if isinstance(one, dict)]
    return [one for one in weights if isinstance(one, dict)]
