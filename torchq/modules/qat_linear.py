"""QATLinear: an nn.Linear that trains with the quantized values QuantizedLinear will use; and its relatives."""

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from torchq.modules.base import ModuleType, Trained
from torchq.modules.ranges import InputRange, PerToken, fake_quantize_weight


class QATProduct(nn.Module):
    """One product that trains on int8's values: `y = x̂ · ŵᵀ + b` in float32, and how x and w are rounded.

    With a channel_scale c, x̂ is made of x · c and ŵ of w / c.
    """

    input_range: InputRange
    per_channel: bool
    channel_scale: Tensor | None

    def begin(self, input_range: InputRange, per_channel: bool, channel_scale: Tensor | None) -> None:
        """Gives it all that it rounds by."""
        self.input_range = input_range.train(self.training)
        self.per_channel = per_channel
        self.register_buffer("channel_scale", channel_scale)

    @property
    def trained(self) -> Trained:
        """How it was trained to be quantized."""
        origin = self.input_range.origin
        return Trained(self.input_range.qparams(), self.per_channel, origin, self.channel_scale)

    def rounded(self, weight: Tensor) -> Tensor:
        """ŵ, float32 (N, K), of a weight (N, K).

        Raises:
            ValueError: the weight has NaN or infinity.
        """
        if self.channel_scale is not None:
            weight = weight.float() / self.channel_scale.float()
        return fake_quantize_weight(weight, per_channel=self.per_channel)

    def times(self, x: Tensor, rounded: Tensor, bias: Tensor | None) -> Tensor:
        """x̂ · ŵᵀ + b, (..., N), for x (..., K) and ŵ as `rounded` gives it.

        Raises:
            TypeError: x is not float32, bfloat16 or float16.
        """
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"QATLinear: x must be float32, bfloat16 or float16, got {x.dtype}. Pass x.float().")
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            rows = x.float().reshape(math.prod(x.shape[:-1]), x.shape[-1])
            if self.channel_scale is not None:
                rows = rows * self.channel_scale.float()
            y = nn.functional.linear(self.input_range(rows), rounded, None if bias is None else bias.float())
            return y.reshape(*x.shape[:-1], len(rounded)).to(dtype)


class QATLayer(QATProduct):
    """`y = x̂ · ŵᵀ + b` in float32, in place of a module with a weight and a bias.

    Args:
        transposed: whether the weight is stored as (in_features, out_features).
        float_class: what the module was.
    """

    weight: Any
    bias: Any
    transposed: bool = False
    float_class: type[nn.Module] = nn.Linear
    OWN: ClassVar[tuple[str, ...]] = ("input_range", "per_channel", "channel_scale", "transposed", "float_class")

    @classmethod
    def adopt(
        cls,
        module: nn.Module,
        input_range: InputRange,
        *,
        per_channel: bool = True,
        channel_scale: Tensor | None = None,
    ) -> None:
        """Turns `module` itself into its training form. Its parameters, and all references to it, stay valid.

        >>> layer = nn.Linear(8, 4)
        >>> QATLinear.adopt(layer, PerToken())
        >>> type(layer).__name__
        'QATLinear'
        """
        if type(module) is not cls.float_class:
            vars(module)["float_class"] = type(module)
        module.__class__ = cls
        cast(QATProduct, module).begin(input_range, per_channel, channel_scale)

    def release(self) -> None:
        """Turns this layer back into the float module that it was: the inverse of `adopt`.

        >>> layer = QATLinear(8, 4)
        >>> layer.release()
        >>> layer
        Linear(in_features=8, out_features=4, bias=True)
        """
        kind = self.float_class
        del self.input_range, self.per_channel, self.channel_scale
        for name in ("transposed", "float_class"):
            vars(self).pop(name, None)
        self.__class__ = kind  # type: ignore[assignment]

    @property
    def matrix(self) -> Tensor:
        """The weight (out_features, in_features)."""
        weight: Tensor = self.weight
        return weight.t() if self.transposed else weight

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features).

        Raises:
            TypeError: x is not float32, bfloat16 or float16.
            ValueError: the weight has NaN or infinity.
        """
        return self.times(input, self.rounded(self.matrix), self.bias)

    def extra_repr(self) -> str:
        """Sizes and weight scheme, for `repr`."""
        n, k = self.matrix.shape
        sizes = f"in_features={k}, out_features={n}, bias={self.bias is not None}"
        return f"{sizes}, weight={'per_channel' if self.per_channel else 'per_tensor'}"


class TrainedLayer(ModuleType):
    """What `prepare_qat` made of a module with one matrix, which has `form`: a base to stand before its type."""

    form: ClassVar[type[QATLayer]] = QATLayer

    def why_float(self, module: nn.Module, parent: nn.Module) -> str | None:
        if type(module).forward is not self.form.forward or "forward" in vars(module):
            return f"{type(module).__name__} has a forward of its own"
        return None

    def training_form(self, module: nn.Module, part: str) -> QATProduct:
        return cast(QATLayer, module)

    def why_untrainable(self, module: nn.Module) -> str | None:
        return "it is prepared already"

    def release(self, module: nn.Module) -> None:
        cast(QATLayer, module).release()


class QATLinearLike(QATLayer):
    """The training form of what computes as nn.Linear does and is none, such as transformers' Conv1D.

    Only `adopt` makes one.
    """

    float_class = nn.Module


class QATLinear(QATLayer, nn.Linear):
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
        self.begin(PerToken() if input_range is None else input_range, per_channel, channel_scale)
