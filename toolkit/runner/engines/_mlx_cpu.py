"""mlx-lm's model on a CPU, fast enough to answer and to be checked there.

mlx's CPU build multiplies by quantized matrices 0.09 billion weights a second in bfloat16 and 0.75
in float32 (one core of a server), which for 256 tokens of Phi-3-mini is hours and twenty minutes.
So the model computes in float32, and products of many rows are NumPy's, of the weights as mlx
dequantizes them, which takes a minute and a half; single tokens go through mlx's own product.
"""

from __future__ import annotations

from typing import Any

MANY_ROWS = 4  # dequantizing a weight takes as long as three products with it
PIECE_WEIGHTS = 1 << 19  # dequantized at once: three times as fast as a whole matrix
BLOCK_WEIGHTS = 1 << 24  # multiplied at once: each product wakes the threads of the BLAS


def speed_up(model: Any) -> None:
    """Change a loaded model in place; its weights stay the same numbers."""
    import mlx.core as mx  # type: ignore[import-not-found,unused-ignore]
    import mlx.nn as nn  # type: ignore[import-not-found,unused-ignore]

    batched = {
        nn.QuantizedLinear: _batch(nn.QuantizedLinear, "__call__"),
        nn.Linear: _batch(nn.Linear, "__call__"),
        nn.QuantizedEmbedding: _batch(nn.QuantizedEmbedding, "as_linear"),  # a tied head
    }
    for module in model.modules():
        if type(module) is not nn.Linear:  # whose weights would take twice the memory
            _widen(module)
        elif "bias" in module:
            module.bias = module.bias.astype(mx.float32)
        if type(module) in batched:
            module.__class__ = batched[type(module)]


def _widen(module: Any) -> None:
    """Make a module's own floats float32."""
    import mlx.core as mx

    for name, value in module.items():
        if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
            module[name] = value.astype(mx.float32)


def _batch(base: Any, product: str) -> Any:
    """A class whose method `product` leaves products of many rows to NumPy."""
    own = getattr(base, product)

    def multiply(module: Any, inputs: Any) -> Any:
        few = inputs.shape[-2] < MANY_ROWS
        return own(module, inputs) if few else _multiply(module, inputs)

    return type("Batched", (base,), {product: multiply})


def _multiply(module: Any, inputs: Any) -> Any:
    """float32 [..., in] by the transposed weight, and the bias, if any: [..., out]."""
    import mlx.core as mx
    import numpy as np

    rows = np.asarray(inputs).reshape(-1, inputs.shape[-1])
    out = np.empty((len(rows), module.weight.shape[0]), np.float32)
    step = max(1, BLOCK_WEIGHTS // rows.shape[1])
    for first in range(0, out.shape[1], step):
        last = min(first + step, out.shape[1])
        out[:, first:last] = rows @ _read_rows(module, first, last, rows.shape[1]).T
    if "bias" in module:
        out += np.asarray(module.bias)
    return mx.array(out).reshape(*inputs.shape[:-1], -1)


def _read_rows(module: Any, first: int, last: int, columns: int) -> Any:
    """Rows of a module's weight, dequantized: float32 [rows, columns]."""
    import mlx.core as mx
    import numpy as np

    block = np.empty((last - first, columns), np.float32)
    step = max(1, PIECE_WEIGHTS // columns)
    for start in range(first, last, step):
        part = slice(start, min(start + step, last))
        weight = module.weight[part]
        if "scales" in module:
            scales, biases = module.scales[part], module.biases[part]
            size, bits = module.group_size, module.bits
            weight = mx.dequantize(weight, scales, biases, group_size=size, bits=bits)
        block[start - first : part.stop - first] = np.asarray(weight.astype(mx.float32))
    return block
