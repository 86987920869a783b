"""nn.Linear as a module type, plain and in its training form."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchq.modules.base import Matrix, ModuleType, Trained
from torchq.modules.qat_linear import QATLinear
from torchq.modules.ranges import InputRange


class LinearType(ModuleType):
    """nn.Linear, and subclasses that keep its forward: one matrix, stored in its own orientation."""

    name = "nn.Linear"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def matrices(self, module: nn.Module) -> dict[str, Matrix]:
        return {"": Matrix(cast(nn.Linear, module).weight, cast(nn.Linear, module).bias)}

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {"": args[0] if args else kwargs.get("input")}

    def become(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        return parts[""]

    def why_float(self, module: nn.Module, parent: nn.Module) -> str | None:
        if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
            return f"{type(module).__name__} has a forward of its own"
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads this layer's weight without calling it"
        return None

    def why_untrainable(self, module: nn.Module) -> str | None:
        if parametrize.is_parametrized(module):
            return "its weight is computed by a parametrization, not trained"
        return None

    def prepare(
        self, module: nn.Module, input_range: InputRange, *, per_channel: bool, channel_scale: Tensor | None = None
    ) -> None:
        linear = cast(nn.Linear, module)
        QATLinear.adopt(linear, input_range, per_channel=per_channel, channel_scale=channel_scale)


class QATLinearType(LinearType):
    """The QATLinear that `prepare_qat` made of an nn.Linear."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, QATLinear)

    def why_float(self, module: nn.Module, parent: nn.Module) -> str | None:
        if type(module).forward is not QATLinear.forward or "forward" in vars(module):
            return f"{type(module).__name__} has a forward of its own"
        if not cast(QATLinear, module).input_range.is_ready():
            return "its trained range is not finite: no training batch reached it, or training diverged"
        return None

    def trained(self, module: nn.Module) -> Trained:
        layer = cast(QATLinear, module)
        return Trained(layer.input_range.qparams(), layer.per_channel, layer.input_range.origin, layer.channel_scale)

    def why_untrainable(self, module: nn.Module) -> str | None:
        return "it is prepared already"

    def release(self, module: nn.Module) -> None:
        cast(QATLinear, module).release()
