"""FineLinear: a QuantizedLinear whose input has two codes for each value (`numerics.fine`).

It is for heads that share their weight with a table, and for first layers. Of their two errors, of the input and of the
weight, only the first can be had smaller without more bytes. A few rows take no longer than with one code, since the
weights are read once for both; many take twice as long.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchq import _C
from torchq.modules import gradients
from torchq.modules.base import FLOATS
from torchq.modules.quantized_linear import BY_CODES, Codes, QuantizedLinear
from torchq.numerics.fine import rounded_twice
from torchq.numerics.qparams import QParams
from torchq.ops.fine import linear_fine


class FineLinear(QuantizedLinear):
    """`y = dequantize(codes(x · c) · wᵀ) + dequantize(codes(rest · c) · wᵀ) + bias`, as `ops.fine.linear_fine`.

    It is always dynamic, and neither takes codes nor gives them.

    >>> layer = QuantizedLinear.from_float(nn.Linear(64, 8))
    >>> x = torch.randn(4, 64)
    >>> expected = layer(x)
    >>> bool((FineLinear.adopt(layer)(x) - expected).abs().max() > 0)
    True
    """

    codes_a_value = 2

    @classmethod
    def adopt(cls, layer: nn.Module) -> "FineLinear":
        """Turns a dynamic QuantizedLinear itself into one. Weights, checkpoints and references stay as they are."""
        assert type(layer) is QuantizedLinear
        assert layer.input_qparams is None
        layer.__class__ = cls
        return layer  # type: ignore[return-value]

    def __call__(self, input: Tensor) -> Tensor:
        """As QuantizedLinear's."""
        y: Any = NotImplemented if is_dynamo_compiling() else _C.call_fine(self, FineLinear, input, 0, (), ())
        return super().__call__(input) if y is NotImplemented else y

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features).

        Raises:
            TypeError: a dtype or layout that QuantizedLinear does not take either.
            RuntimeError: another width or device, or a storage that was freed.
            MemoryError: no memory for the output, or for what the product needs beside it.
        """
        return self.fused(input)

    def _int8(
        self,
        x: Tensor,
        activation: int,
        y_qparams: QParams | None,
        codes: Codes | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        if codes is not None or x.dtype not in FLOATS:
            return super()._int8(x, activation, y_qparams, codes, dtype)  # which raises the error
        dtype = dtype or x.dtype
        packed, _ = self._moment()
        if gradients.wanted(x):
            return gradients.linear(x, packed, activation, gradients.FINE, None, dtype)
        return linear_fine(x.float(), packed, activation).to(dtype)

    def _rounded(self, rows: Tensor, channel_scale: Tensor | None, pair: QParams | None) -> Tensor:
        return rounded_twice(rows, channel_scale)

    def extra_repr(self) -> str:
        """As QuantizedLinear's."""
        return f"{super().extra_repr()}, codes=2"


BY_CODES[FineLinear.codes_a_value] = FineLinear
