"""nn.Conv1d, nn.Conv2d and nn.Conv3d as module types."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from torchq import ops
from torchq.modules.base import Matrix, ModuleType
from torchq.modules.computed_weights import is_computed, sources, weight_of
from torchq.modules.convolving import as_rows, geometry_of, is_pointwise, is_tiled, padded
from torchq.modules.packed_weights import PackedWeights
from torchq.modules.patches import Patches
from torchq.modules.qat_conv import QAT_OF_DIMENSIONS, QATConv
from torchq.modules.qat_linear import TrainedLayer
from torchq.modules.quantized_conv import OF_DIMENSIONS, QuantizedConv
from torchq.modules.ranges import InputRange
from torchq.ops.convolution import is_depthwise, packs_as_one

MIN_CHANNELS = 4
"""Of a group's inputs and outputs, with more than one group: fewer fill too little of a panel."""


class ConvType(ModuleType):
    """One of torch's convolutions: one matrix (out, taps · in / groups), whose rows are patches."""

    absorbs = True

    def __init__(self, float_class: type[nn.Module]) -> None:
        self._float_class = float_class
        self.name = f"nn.{float_class.__name__}"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, self._float_class) and not isinstance(module, nn.LazyConv2d)

    def matrices(self, module: nn.Module) -> dict[str, Matrix]:
        return {"": Matrix(as_rows(weight_of(module)), cast(nn.Conv2d, module).bias)}

    def weight(self, module: nn.Module, part: str) -> Tensor:
        return weight_of(module)

    def patches(self, module: nn.Module) -> Patches | None:
        if is_pointwise(module):
            return None
        geometry = geometry_of(module)
        takes_floats = is_depthwise(weight_of(module).shape, geometry.groups)
        # Patches do not depend on the outputs: layers that read the same ones share a record.
        return Patches(geometry._replace(out_channels=0), tiled=is_tiled(module), takes_floats=takes_floats)

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        x = args[0] if args else next(iter(kwargs.values()), None)
        dimensions = len(cast(nn.Conv2d, module).kernel_size)
        if not isinstance(x, Tensor) or x.dim() not in (dimensions + 1, dimensions + 2):
            return {"": None}
        x = x if x.dim() == dimensions + 2 else x.unsqueeze(0)
        if is_pointwise(module):
            return {"": x.movedim(1, -1)}
        return {"": padded(x, module)}

    def takes_codes(self, module: nn.Module) -> bool:
        return cast(nn.Conv2d, module).padding_mode == "zeros"

    def become(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        return parts[""]

    def with_codes(
        self, module: nn.Module, codes: Tensor, scale: Tensor, bias: Tensor | None, **settings: Any
    ) -> PackedWeights:
        shape = weight_of(module).shape
        codes = codes.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        kind: type[QuantizedConv] = OF_DIMENSIONS[len(shape) - 3]
        layer = kind(codes, scale.contiguous(), bias, like=module, **settings)
        layer.had_bias = module.bias is not None
        return layer

    def why_float(self, module: nn.Module, parent: nn.Module) -> str | None:
        conv = cast(nn.Conv2d, module)
        if "forward" in vars(module) or type(module).forward is not self._float_class.forward:
            return f"{type(module).__name__} has a forward of its own"
        if type(module)._conv_forward is not self._float_class._conv_forward:  # type: ignore[attr-defined]
            return f"{type(module).__name__} has a _conv_forward of its own"
        held = (*module._parameters, *module._buffers, *module._modules)
        others = [name for name in held if name not in ("weight", "bias", *sources(module))]
        if others:
            return f"it holds {others[0]!r} beside its weight and bias, which a swap would drop"
        shape = weight_of(module).shape
        out, depth = shape[0], shape[1:].numel()
        if depth > ops.MAX_DEPTH:
            return f"a patch has {depth} values; int32 sums are exact up to {ops.MAX_DEPTH}"
        if not self._is_fast(module):
            return f"{conv.groups} groups of {conv.in_channels // conv.groups} to {out // conv.groups} channels"
        return None

    @staticmethod
    def _is_fast(module: nn.Module) -> bool:
        """Whether groups fill panels well, or the convolution is depthwise."""
        groups, shape = cast(nn.Conv2d, module).groups, weight_of(module).shape
        if packs_as_one(shape, groups):
            return True
        return groups == 1 or min(shape[0] // groups, shape[1]) >= MIN_CHANNELS

    def why_untrainable(self, module: nn.Module) -> str | None:
        return "its weight is computed, not trained" if is_computed(module) else None

    def prepare(
        self,
        module: nn.Module,
        part: str,
        input_range: InputRange,
        *,
        per_channel: bool,
        channel_scale: Tensor | None = None,
    ) -> None:
        form = QAT_OF_DIMENSIONS[weight_of(module).dim() - 3]
        form.adopt(module, input_range, per_channel=per_channel, channel_scale=channel_scale)


class QATConvType(TrainedLayer, ConvType):
    """What `prepare_qat` made of a convolution."""

    form = QATConv

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, QATConv) and isinstance(module, self._float_class)
