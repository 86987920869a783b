"""Modules that compute what nn.Linear does and are none, as a module type: transformers' Conv1D, for one."""

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchq.modules.base import Int8Module
from torchq.modules.linear import LinearType
from torchq.modules.linear_proof import proof_of
from torchq.modules.qat_linear import QATLayer, QATLinearLike
from torchq.modules.ranges import InputRange


class LinearLikeType(LinearType):
    """Modules that hold nothing but a 2-D `weight` and a 1-D `bias` or none, and are proven to multiply by them.

    The weight may be stored as (in_features, out_features). What can't be proven is no layer, and stays as it is.
    """

    name = "Conv1D of transformers"

    def matches(self, module: nn.Module) -> bool:
        if isinstance(module, (nn.Linear, Int8Module, QATLayer)) or not _may_be_linear(module):
            return False
        return proof_of(module).reason is None

    def why_float(self, module: nn.Module, parent: nn.Module) -> str | None:
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
        transposed = proof_of(module).transposed
        QATLinearLike.adopt(module, input_range, per_channel=per_channel, channel_scale=channel_scale)
        module.transposed = transposed  # type: ignore[assignment]


def _may_be_linear(module: nn.Module) -> bool:
    """Whether the module holds a weight and a bias that fit, and nothing else."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or is_lazy(weight) or module._modules or module._buffers:
        return False
    if not module._parameters.keys() <= {"weight", "bias"} or weight.dim() != 2 or not hasattr(module, "bias"):
        return False
    return bias is None or (bias.dim() == 1 and len(bias) in weight.shape)
