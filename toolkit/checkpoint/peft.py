"""What an adapter's folder says by itself, as PEFT's save_pretrained writes it.

Names of settings and tensors follow PEFT 0.21 (src/peft/tuners/lora, src/peft/utils).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit.checkpoint.config import Config, read_config
from toolkit.checkpoint.safetensors import FP8, TensorInfo, read_header
from toolkit.errors import CheckpointError, UnsupportedError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MERGE = (
    "merge it with PEFT first, and give the folder MERGED as the checkpoint, with the tokenizer's "
    "files in it: from peft import AutoPeftModelForCausalLM; "
    "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(MERGED)"
)
# Settings under which an adapter is something else than is read here, and the values that stand
# for "not so".
WITHOUT: Mapping[str, tuple[object, ...]] = {
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # Others than these start by changing the base's own weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
}
# How a tensor's name ends, and which field of `Module` it is; the first that fits counts.
ENDS: Mapping[str, str] = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_B.bias": "bias",
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".token_adapter.base_layer.weight": "base",
    ".base_layer.weight": "base",
    ".base_layer.bias": "bias",
    ".modules_to_save.weight": "saved_again",
    ".original_module.weight": "original",
    ".bias": "bias",
    ".weight": "saved",
}


@dataclass(frozen=True)
class Module:
    """Names of an adapter's tensors of one module of the model; empty where there is none.

    `a` and `b` are a linear layer's low-rank update, `embedding_a` and `embedding_b` an
    embedding's, `magnitude` is DoRA's. `saved` takes the weight's place, `base` too, before an
    update; `tokens` that of single rows.
    """

    name: str
    a: str = ""
    b: str = ""
    embedding_a: str = ""
    embedding_b: str = ""
    magnitude: str = ""
    bias: str = ""
    tokens: str = ""
    base: str = ""
    saved: str = ""
    saved_again: str = ""
    original: str = ""

    @property
    def weight(self) -> str:
        """Name of the weight in a checkpoint."""
        return f"{self.name}.weight"

    @property
    def stored(self) -> str:
        """What takes the weight's place before any update."""
        return self.saved or self.saved_again or self.base


@dataclass(frozen=True)
class Found:
    """Settings, tensors, and the tensors of each module."""

    config: Config
    tensors: Mapping[str, TensorInfo]
    modules: tuple[Module, ...]

    @property
    def base(self) -> str:
        """What it was trained on: an id or a path; empty when it says nothing."""
        return str(self.config.fields.get("base_model_name_or_path") or "")

    def is_saved_module(self, name: str) -> bool:
        """Whether modules_to_save names a module."""
        found = self.config.fields.get("modules_to_save") or []
        if not isinstance(found, list):
            raise self.config.error("modules_to_save", found, "a list of names")
        return any(name == one or name.endswith(f".{one}") for one in map(str, found))


def look(folder: Path) -> Found:
    """Read settings and headers, before any checkpoint is fetched.

    CheckpointError when the adapter is damaged, UnsupportedError when it is of another kind.
    """
    if not (folder / CONFIG).is_file():
        named = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        raise CheckpointError(
            f"{folder}: no {CONFIG}",
            advice=f"give one of the adapters in it: {', '.join(named)}"
            if named
            else "give a folder as PEFT's save_pretrained writes it",
        )
    config = read_config(folder / CONFIG)
    _check_settings(config)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder}: no {WEIGHTS}",
            advice="save the adapter as safetensors; pickles are not read",
        )
    tensors = read_header(folder / WEIGHTS)
    if coded := next((info for info in tensors.values() if info.dtype == FP8), None):
        raise UnsupportedError(
            f"{folder / WEIGHTS}: {coded.name}: dtype: got {FP8!r}; allowed BF16, F16, F32",
            advice=MERGE,
        )
    return Found(config, tensors, _list_modules(folder, tensors))


def _check_settings(config: Config) -> None:
    kind = config.fields.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{config.where}: peft_type: got {kind!r}; supported: 'LORA'", advice=MERGE
        )
    for key, allowed in WITHOUT.items():
        found = config.fields.get(key)
        if not any(found == one and type(found) is type(one) for one in allowed):
            raise UnsupportedError(
                f"{config.where}: {key}: got {found!r}; supported: "
                f"{', '.join(json.dumps(one) for one in allowed if one is not None)} or nothing",
                advice=MERGE,
            )


def _list_modules(folder: Path, tensors: Mapping[str, TensorInfo]) -> tuple[Module, ...]:
    """The modules by name; UnsupportedError for a tensor that would be dropped."""
    modules: dict[str, Module] = {}
    for tensor in sorted(tensors):
        end = next((end for end in ENDS if tensor.endswith(end)), "")
        if not end or not tensor.startswith(PREFIX):
            raise UnsupportedError(
                f"{folder / WEIGHTS}: {tensor}: not known from PEFT's LoRA; supported: "
                f"{PREFIX}MODULE followed by {', '.join(ENDS)}",
                advice=MERGE,
            )
        name = tensor.removeprefix(PREFIX).removesuffix(end)
        module = modules.get(name) or Module(name)
        modules[name] = replace(module, **{ENDS[end]: tensor})
    if not modules:
        raise CheckpointError(f"{folder / WEIGHTS}: holds no tensors")
    for module in modules.values():
        for a, b, kind in (
            (module.a, module.b, "lora"),
            (module.embedding_a, module.embedding_b, "lora_embedding"),
        ):
            if bool(a) != bool(b):
                raise CheckpointError(
                    f"{folder / WEIGHTS}: {module.weight}: no {kind}_{'B' if a else 'A'} for it"
                )
        if module.magnitude and not (module.a or module.embedding_a):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {module.weight}: a magnitude without lora_A and lora_B"
            )
    return tuple(modules.values())
