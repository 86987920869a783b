"""nn.Linear as a module type, plain and in its training form; and what is common to all that multiply by one weight."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from torchq.modules.base import Matrix, ModuleType
from torchq.modules.computed_weights import is_computed, sources, weight_of
from torchq.modules.linear_proof import proof_of
from torchq.modules.plain_code import is_plain_value
from torchq.modules.qat_linear import QATLayer, QATLinear, TrainedLayer
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.ranges import InputRange


class LinearType(ModuleType):
    """nn.Linear, and subclasses whose forward computes the same: one matrix."""

    name = "nn.Linear"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def transposed(self, module: nn.Module) -> bool:
        """Whether the module stores its weight as (in_features, out_features)."""
        return proof_of(module).transposed

    def matrices(self, module: nn.Module) -> dict[str, Matrix]:
        weight, bias = weight_of(module), cast(nn.Linear, module).bias
        return {"": Matrix(weight.t() if self.transposed(module) else weight, bias)}

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {"": args[0] if args else next(iter(kwargs.values()), None)}

    def become(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        layer = cast(QuantizedLinear, parts[""])
        if self.transposed(module):
            layer.present_transposed()
        for name, value in vars(module).items():  # such as `nf` of a Conv1D, which other code reads
            if is_plain_value(value) and name not in QATLayer.OWN and not hasattr(layer, name):
                setattr(layer, name, value)
        return layer

    def why_float(self, module: nn.Module, parent: nn.Module) -> str | None:
        reason = proof_of(module).reason
        if reason is not None:
            return reason
        held = (*module._parameters, *module._buffers, *module._modules)
        others = [name for name in held if name not in ("weight", "bias", *sources(module))]
        if others:
            return f"it holds {others[0]!r} beside its weight and bias, which a swap would drop"
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads this layer's weight without calling it"
        return None

    def why_untrainable(self, module: nn.Module) -> str | None:
        if is_computed(module):
            how = "hook" if module._forward_pre_hooks else "parametrization"
            return f"its weight is computed by a {how}, not trained"
        return None

    def prepare(
        self,
        module: nn.Module,
        part: str,
        input_range: InputRange,
        *,
        per_channel: bool,
        channel_scale: Tensor | None = None,
    ) -> None:
        linear = cast(nn.Linear, module)
        QATLinear.adopt(linear, input_range, per_channel=per_channel, channel_scale=channel_scale)


class QATLinearType(TrainedLayer, LinearType):
    """What `prepare_qat` made of a module with one matrix."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, QATLayer)

    def transposed(self, module: nn.Module) -> bool:
        return cast(QATLayer, module).transposed
