"""QATConv1d, QATConv2d, QATConv3d: convolutions that train with the quantized values that int8 will use."""

import torch
from torch import Tensor, nn

from torchq.modules.convolving import along, along_weight, as_rows, convolved, geometry_of, padded, tiles
from torchq.modules.convolving import is_tiled as has_tiles
from torchq.modules.qat_linear import QATLayer
from torchq.modules.ranges import PerToken, fake_quantize_weight
from torchq.ops.convolution import is_depthwise


class QATConv(QATLayer):
    """`y = conv(x̂, ŵ) + b` in float32: the same as the converted layer in `torchq.simulate()`.

    x̂ of a dynamic depthwise one is x.

    With a channel_scale c (C,), x̂ is made of x · c and ŵ of w / c; with groups, each has one channel then. A batch norm
    behind it stays a module of its own, which trains as ever, and becomes a part of the int8 layer in `convert`.
    """

    @property
    def matrix(self) -> Tensor:
        """The weight (out, K), in the order of a patch."""
        return as_rows(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *spatial), or without N, in float32, bfloat16 or float16 -> the same dtype, or autocast's.

        Raises:
            TypeError: x is not float32, bfloat16 or float16.
            ValueError: the weight has NaN or infinity.
        """
        if input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"{type(self).__name__}: x must be float32, bfloat16 or float16, got {input.dtype}. Pass x.float()."
            )
        alone = input.dim() == self.weight.dim() - 1
        x = input.unsqueeze(0) if alone else input
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            y = self._convolved(padded(x.float(), self)).to(dtype)
        return y.squeeze(0) if alone else y

    def _convolved(self, x: Tensor) -> Tensor:
        geometry, weight = geometry_of(self), self.weight.float()
        if self.channel_scale is not None:
            scale = self.channel_scale.float()
            x, weight = x * along(scale, len(geometry.kernel)), weight / along_weight(scale, weight, geometry.groups)
        weight = fake_quantize_weight(weight.flatten(1), per_channel=self.per_channel).reshape(weight.shape)
        bias = None if self.bias is None else self.bias.float()
        if not isinstance(self.input_range, PerToken):
            return convolved(self.input_range(x), weight, bias, geometry)
        if is_depthwise(weight.shape, geometry.groups):
            return convolved(x, weight, bias, geometry)
        if has_tiles(self):
            parts = tiles(x, geometry.kernel)
            rows = self.input_range(parts.reshape(-1, parts.shape[-1])).reshape(parts.shape)
            return nn.functional.linear(rows, as_rows(weight), bias).movedim(-1, 1)
        return convolved(self.input_range(x.flatten(1)).reshape(x.shape), weight, bias, geometry)

    def extra_repr(self) -> str:
        """Shape and weight scheme, for `repr`."""
        plain = nn.modules.conv._ConvNd.extra_repr(self)  # type: ignore[arg-type]
        return f"{plain}, weight={'per_channel' if self.per_channel else 'per_tensor'}"


class QATConv1d(QATConv, nn.Conv1d):
    """The training form of nn.Conv1d, which only `prepare_qat` makes: see `QATConv`."""

    float_class = nn.Conv1d


class QATConv2d(QATConv, nn.Conv2d):
    """The training form of nn.Conv2d, which only `prepare_qat` makes: see `QATConv`."""

    float_class = nn.Conv2d


class QATConv3d(QATConv, nn.Conv3d):
    """The training form of nn.Conv3d, which only `prepare_qat` makes: see `QATConv`."""

    float_class = nn.Conv3d


QAT_OF_DIMENSIONS: tuple[type[QATConv], ...] = (QATConv1d, QATConv2d, QATConv3d)
