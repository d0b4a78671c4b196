"""What bench/quality.py compares: our recipes, and the vendors' commands for the same formats.

Words in braces are filled in: checkpoint, out, scratch (of one row), shared (of all rows: what
several of a vendor's rows start from), text and ids (the calibration text), home, chats (it in the
places and forms in which mlx-lm looks for it), whole (the whole calibration part, one document a
line), bench, python, llama_cpp, llama_bin.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = "phiship"

_BUILDER = (
    "{python} -m onnxruntime_genai.models.builder -i {checkpoint} -o {out} -c {scratch}/cache"
    " -p int4 -e cpu --extra_options hf_token=false hf_remote=false "
)
_OPTIMUM = (
    "{python} -m optimum.commands.optimum_cli export openvino --model {checkpoint}"
    " --task text-generation-with-past --weight-format "
)
_NNCF = "{python} {bench}/quality_nncf.py {shared}/openvino-fp16 {out} {ids} "
_MLX = "{python} -m mlx_lm convert --hf-path {checkpoint} --mlx-path {out} -q "
_MLX_GPTQ = "{python} -m mlx_lm gptq --model {checkpoint} --mlx-path {out} "
_QUANTIZE = "{llama_bin}/llama-quantize {shared}/lossless.gguf {out}/model.gguf "
_IMATRIX = (
    "{llama_bin}/llama-quantize --imatrix {shared}/imatrix.gguf {shared}/lossless.gguf"
    " {out}/model.gguf "
)


@dataclass(frozen=True)
class Row:
    """One artifact: ours by what its recipe's quantization says, a vendor's by its commands.

    `default` marks what the vendor's tool makes unasked, which ours is held against. `shared` are
    commands whose results several rows use, by the file or folder that they make.
    """

    format: str
    who: str
    method: str
    quantization: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    shared: tuple[str, ...] = ()
    default: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the row's folder is called, and what selects it."""
        words = f"{self.format}-{self.who}-{self.method}".lower()
        return "".join(c if c.isalnum() or c in "_-" else "_" for c in words)


SHARED: dict[str, tuple[str, str]] = {
    "openvino-fp16": ("openvino", _OPTIMUM + "fp16 {shared}/openvino-fp16"),
    "lossless.gguf": (
        "gguf",
        (
            "{python} {llama_cpp}/convert_hf_to_gguf.py {checkpoint} --outtype bf16"
            " --outfile {shared}/lossless.gguf"
        ),
    ),
    "imatrix.gguf": (
        "gguf",
        (
            "{llama_bin}/llama-imatrix -m {shared}/lossless.gguf -f {text}"
            " -o {shared}/imatrix.gguf --parse-special -c 512 -b 512 -t 2 --no-ppl"
        ),
    ),
}
"""Format and command of what several rows start from, by the name of what it makes."""


def _ours(format_: str, base: dict[str, Any], *rows: tuple[str, dict[str, Any]]) -> list[Row]:
    return [Row(format_, OURS, method, {**base, **more}) for method, more in rows]


_RTN: dict[str, Any] = {}
_GPTQ = {"method": "gptq"}
_BOTH = {"method": "gptq", "equalize": True}


def _onnx() -> list[Row]:
    base = {"precision": "int4"}
    ours = _ours(
        "onnx", base,
        ("fp32", {"precision": "fp32"}),
        ("rtn 32", _RTN),
        ("gptq 32", _GPTQ),
        ("gptq 32 equalized", _BOTH),
        ("gptq 32 asymmetric", _GPTQ | {"symmetric": False}),
        ("gptq 32 asymmetric equalized", _BOTH | {"symmetric": False}),
        ("gptq 32 asymmetric equalized, int8 head", _BOTH | {"symmetric": False, "head": "int8"}),
        ("gptq 32 asymmetric equalized, float activations",
         _BOTH | {"symmetric": False, "accuracy_level": 1}),
        ("gptq 128", _GPTQ | {"block_size": 128}),
        ("gptq 128 equalized", _BOTH | {"block_size": 128}),
    )  # fmt: skip

    def builder(method: str, options: str, default: bool = False) -> Row:
        return Row("onnx", "onnxruntime-genai", method, command=_BUILDER + options, default=default)

    return [
        *ours,
        builder("rtn 32 (default)", "block_size=32", default=True),
        builder("rtn 32 asymmetric", "block_size=32 is_symmetric=false"),
        builder("rtn_last 32", "block_size=32 algo_config=rtn_last"),
        builder("k_quant 32", "block_size=32 algo_config=k_quant"),
        builder("k_quant_last 32", "block_size=32 algo_config=k_quant_last"),
        builder("k_quant_mixed 32", "block_size=32 algo_config=k_quant_mixed"),
    ]


def _openvino() -> list[Row]:
    base = {"precision": "int4", "group_size": 128}
    ours = _ours(
        "openvino", base,
        ("f16", {"precision": "f16"}),
        ("rtn 128", _RTN),
        ("gptq 128", _GPTQ),
        ("gptq 128 equalized", _BOTH),
        ("gptq 128 asymmetric", _GPTQ | {"symmetric": False}),
        ("gptq 128 asymmetric equalized", _BOTH | {"symmetric": False}),
        ("gptq 32", _GPTQ | {"group_size": 32}),
        ("gptq 32 equalized", _BOTH | {"group_size": 32}),
    )  # fmt: skip

    def nncf(method: str, options: str) -> Row:
        shared = ("openvino-fp16",)
        return Row("openvino", "nncf", method, command=_NNCF + options, shared=shared)

    return [
        *ours,
        Row("openvino", "optimum", "int4 128 asymmetric (default)",
            command=_OPTIMUM + "int4 {out}", default=True),
        Row("openvino", "optimum", "int4 128 symmetric", command=_OPTIMUM + "int4 --sym {out}"),
        nncf("awq", "--awq"),
        nncf("scale estimation", "--scale-estimation"),
        nncf("awq, scale estimation", "--awq --scale-estimation"),
        nncf("gptq", "--gptq"),
        nncf("gptq, scale estimation", "--gptq --scale-estimation"),
        nncf("awq, gptq, scale estimation", "--awq --gptq --scale-estimation"),
        nncf("lora correction", "--lora-correction"),
        nncf("awq, scale estimation 32", "--awq --scale-estimation --group-size 32"),
    ]  # fmt: skip


def _mlx() -> list[Row]:
    base = {"bits": 4, "group_size": 64}
    ours = _ours(
        "mlx", base,
        ("bf16", {"bits": 16}),
        ("rtn 64", _RTN),
        ("gptq 64", _GPTQ),
        ("gptq 64 equalized", _BOTH),
        ("gptq 128", _GPTQ | {"group_size": 128}),
        ("gptq 128 equalized", _BOTH | {"group_size": 128}),
        ("gptq 32 equalized", _BOTH | {"group_size": 32}),
        ("gptq 128 equalized, 8-bit embedding",
         _BOTH | {"group_size": 128, "embedding_bits": 8}),
        ("gptq 64 equalized, 8-bit embedding", _BOTH | {"embedding_bits": 8}),
    )  # fmt: skip

    def tool(method: str, command: str, **more: Any) -> Row:
        return Row("mlx", "mlx-lm", method, command=command, **more)

    return [
        *ours,
        tool("rtn 64 (default)", _MLX, default=True),
        tool("rtn 32", _MLX + "--q-group-size 32"),
        tool("mixed_4_6", _MLX + "--quant-predicate mixed_4_6"),
        tool("gptq 64, rest 4 bits", _MLX_GPTQ + "--fallback-bits 4", variables={"HOME": "{home}"}),
        tool("gptq 64 (default), rest 6 bits", _MLX_GPTQ, variables={"HOME": "{home}"}),
        tool("awq 64", "{python} -m mlx_lm awq --model {checkpoint} --mlx-path {out}",
             variables={"HOME": "{home}"}),
        tool("dwq 64", "{python} -m mlx_lm dwq --model {checkpoint} --mlx-path {out}"
             " --data-path {chats} --num-samples 256 --max-seq-length 513 --batch-size 1"
             " --learning-rate 1e-5"),
    ]  # fmt: skip


def _gguf() -> list[Row]:
    ours = _ours("gguf", {"precision": "q8_0"}, ("q8_0 rtn", _RTN))
    ours += _ours(
        "gguf", {"precision": "q4_0", "embedding": "q8_0"},
        ("q4_0 gptq equalized, q8_0 embedding", _BOTH),
    )  # fmt: skip
    ours += _ours(
        "gguf", {"precision": "iq4_xs", "embedding": "q8_0"},
        ("iq4_xs gptq equalized, q8_0 embedding", _BOTH),
    )  # fmt: skip
    ours += [
        row
        for precision in ("q4_0", "q4_k_m", "iq4_xs")
        for row in _ours(
            "gguf", {"precision": precision},
            (f"{precision} rtn", _RTN),
            (f"{precision} gptq", _GPTQ),
            (f"{precision} gptq equalized", _BOTH),
        )
    ]  # fmt: skip
    eight = "--token-embedding-type q8_0 "
    vendors = [
        Row("gguf", "llama.cpp", "Q4_0 imatrix, q8_0 embedding",
            shared=("lossless.gguf", "imatrix.gguf"),
            command=_IMATRIX.replace("--imatrix", eight + "--imatrix") + "Q4_0")
    ]  # fmt: skip
    for scheme in ("Q4_0", "Q4_K_M", "IQ4_XS"):
        vendors += [
            Row("gguf", "llama.cpp", f"{scheme} (default)", command=_QUANTIZE + scheme,
                shared=("lossless.gguf",), default=True),
            Row("gguf", "llama.cpp", f"{scheme} imatrix", command=_IMATRIX + scheme,
                shared=("lossless.gguf", "imatrix.gguf")),
        ]  # fmt: skip
    return ours + vendors


ROWS: tuple[Row, ...] = (*_onnx(), *_openvino(), *_mlx(), *_gguf())
