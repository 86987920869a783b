"""QATLinear: an nn.Linear that trains with the quantized values QuantizedLinear will use."""

import math

import torch
from torch import Tensor, nn

from torchq.modules.ranges import InputRange, PerToken, fake_quantize_weight


class QATLinear(nn.Linear):
    """`y = x̂ · ŵᵀ + b` in float32 on fake-quantized x̂ and ŵ: the same as the converted layer in `torchq.simulate()`.

    With a channel_scale c, x̂ is made of x · c and ŵ of w / c.

    Takes (..., in_features) in float32, bfloat16 or float16 and returns (..., out_features) in the same dtype, or in
    autocast's, as nn.Linear does. The arithmetic is float32 there, too. Weight and bias are ordinary float parameters.
    Gradients: torchq/modules/ranges.py.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the layer has a bias.
        input_range: how the input is quantized: a LearnedRange, an ObservedRange, or (the default) PerToken.
        per_channel: one weight scale per output feature, or one for all.
        channel_scale: float32 (in_features,), positive, or None. It is a buffer, and not trained.

    >>> QATLinear(8, 4)(torch.ones(2, 8)).requires_grad
    True
    """

    input_range: InputRange
    per_channel: bool
    channel_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        input_range: InputRange | None = None,
        per_channel: bool = True,
        channel_scale: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.input_range = PerToken() if input_range is None else input_range
        self.per_channel = per_channel
        self.register_buffer("channel_scale", channel_scale)

    @classmethod
    def adopt(
        cls,
        linear: nn.Linear,
        input_range: InputRange,
        *,
        per_channel: bool = True,
        channel_scale: Tensor | None = None,
    ) -> None:
        """Turns `linear` itself into a QATLinear. Its parameters, and all references to it, stay valid.

        >>> layer = nn.Linear(8, 4)
        >>> QATLinear.adopt(layer, PerToken())
        >>> type(layer).__name__
        'QATLinear'
        """
        linear.__class__ = cls
        linear.input_range = input_range.train(linear.training)
        linear.per_channel = per_channel  # type: ignore[assignment]
        linear.register_buffer("channel_scale", channel_scale)

    def release(self) -> None:
        """Turns this layer back into a plain nn.Linear: the inverse of `adopt`.

        >>> layer = QATLinear(8, 4)
        >>> layer.release()
        >>> layer
        Linear(in_features=8, out_features=4, bias=True)
        """
        del self.input_range, self.per_channel, self.channel_scale
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features).

        Raises:
            TypeError: x is not float32, bfloat16 or float16.
            ValueError: the weight has NaN or infinity.
        """
        x = input
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"QATLinear: x must be float32, bfloat16 or float16, got {x.dtype}. Pass x.float().")
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            rows, weight = x.float().reshape(math.prod(x.shape[:-1]), x.shape[-1]), self.weight
            if self.channel_scale is not None:
                scale = self.channel_scale.float()
                rows, weight = rows * scale, weight.float() / scale
            rows, weight = self.input_range(rows), fake_quantize_weight(weight, per_channel=self.per_channel)
            y = nn.functional.linear(rows, weight, None if self.bias is None else self.bias.float())
            return y.reshape(*x.shape[:-1], self.out_features).to(dtype)

    def extra_repr(self) -> str:
        """Sizes and weight scheme, for `repr`."""
        return f"{super().extra_repr()}, weight={'per_channel' if self.per_channel else 'per_tensor'}"
