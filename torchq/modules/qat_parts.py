"""QATParts: a module with several matrices that trains on int8's values; and what is common to their types.

Parameters stay where they are. What each matrix is rounded by is in a child of the module, `qat_parts`: a `QATPart` for
each matrix that was prepared. The others are multiplied by in float.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from torchq.modules.base import Matrix, ModuleType
from torchq.modules.qat_linear import QATProduct
from torchq.modules.ranges import InputRange

QAT_PARTS = "qat_parts"
"""The name of that child."""


class QATPart(QATProduct):
    """How one matrix of a module, and what it multiplies, are rounded. The weight is the module's."""

    def __init__(self, input_range: InputRange, per_channel: bool, channel_scale: Tensor | None) -> None:
        super().__init__()
        self.begin(input_range, per_channel, channel_scale)


class QATParts(nn.Module):
    """The base of the training forms of modules with several matrices."""

    qat_parts: nn.ModuleDict
    float_class: type[nn.Module]

    @classmethod
    def adopt(
        cls,
        module: nn.Module,
        part: str,
        input_range: InputRange,
        *,
        per_channel: bool = True,
        channel_scale: Tensor | None = None,
    ) -> None:
        """Turns `module` itself into its training form, if it is none yet, and prepares the matrix `part` of it."""
        if not isinstance(module, cls):
            vars(module)["float_class"] = type(module)
            module.__class__ = cls
            module.qat_parts = nn.ModuleDict()
        form = QATPart(input_range, per_channel, channel_scale).train(module.training)
        cast(QATParts, module).qat_parts[_key(part)] = form

    def release(self) -> None:
        """Turns this module back into the float module that it was: the inverse of `adopt`."""
        kind = vars(self).pop("float_class")
        del self.qat_parts
        self.__class__ = kind

    def matrix(self, part: str) -> Matrix:
        """One of its matrices, in float."""
        raise NotImplementedError(f"{type(self).__name__} has no matrices")

    def form(self, part: str) -> QATPart | None:
        """How this matrix is rounded; None if it stays in float."""
        key = _key(part)
        return cast(QATPart, self.qat_parts[key]) if key in self.qat_parts else None

    def multiplier(self, part: str) -> Callable[[Tensor], Tensor]:
        """The product with this matrix, whose weight is rounded once for all calls."""
        (weight, bias), form = self.matrix(part), self.form(part)
        if form is None:
            return partial(nn.functional.linear, weight=weight, bias=bias)
        return partial(form.times, rounded=form.rounded(weight), bias=bias)

    def multiplied(self, part: str, x: Tensor) -> Tensor:
        """The product of x (..., K) with this matrix, (..., N)."""
        return self.multiplier(part)(x)


def _key(part: str) -> str:
    return part.replace(".", "_")


class TrainableParts(ModuleType):
    """A module type with several matrices, whose training form is `form`."""

    form: type[QATParts]

    def why_untrainable(self, module: nn.Module) -> str | None:
        computed = any(is_parametrized(each) for each in module.modules())
        return "its weights are computed by a parametrization, not trained" if computed else None

    def prepare(self, module: nn.Module, part: str, input_range: InputRange, **scheme: Any) -> None:
        self.form.adopt(module, part, input_range, **scheme)


class TrainedParts(TrainableParts):
    """What `prepare_qat` made of one: a base to stand before that type."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, self.form)

    def why_float(self, module: nn.Module, parent: nn.Module) -> str | None:
        return f"{type(module).__name__} has a forward of its own" if "forward" in vars(module) else None

    def training_form(self, module: nn.Module, part: str) -> QATProduct | None:
        return cast(QATParts, module).form(part)

    def why_untrainable(self, module: nn.Module) -> str | None:
        return "it is prepared already"

    def release(self, module: nn.Module) -> None:
        cast(QATParts, module).release()
