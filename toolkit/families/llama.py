"""Llama and Mistral, as which Phi-3 and Phi-3.5 are published too, and their relatives.

Their mathematics is Phi-3's: no biases, RMSNorm, SwiGLU. What they store apart is read as one
(toolkit/checkpoint/split.py).
"""

from toolkit.checkpoint.config import Config
from toolkit.checkpoint.split import as_phi3
from toolkit.decoder import Decoder
from toolkit.families import Evidence, read_decoder

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
MODELS = "Phi-3 and Phi-3.5 with split projections, Llama, Mistral"
VERIFIED = {
    kind: Evidence(
        "every byte is that of the same model stored as Phi3ForCausalLM, whose float32 logits are "
        "those of transformers' LlamaForCausalLM and MistralForCausalLM",
        "tests/formats/test_split.py",
    )
    for kind in ("onnx", "openvino", "gguf", "mlx")
}  # fmt: skip


def read(config: Config) -> Decoder:
    """Describe the decoder as Phi-3's with fused projections; UnsupportedError for other layers."""
    return read_decoder(as_phi3(config))
