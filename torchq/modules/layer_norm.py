"""LayerNorm: nn.LayerNorm in float32, faster than torch's on the CPU, for converted models."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.fx import Proxy
from torch.nn.functional import layer_norm

from torchq import _C, ops
from torchq.modules import gradients, simulation
from torchq.modules.classes import computes_as_known, know
from torchq.modules.tracing import is_watched, path_in_graph


class LayerNorm(nn.LayerNorm):
    """An nn.LayerNorm whose plain eager calls are computed by `torchq.ops.layer_norm`.

    All else is nn.LayerNorm's: its parameters, its state, and what it computes for other dtypes, where a gradient is
    wanted, in a compiled or exported graph, under autocast and inside `torchq.simulate()`.
    """

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Makes an nn.LayerNorm itself a LayerNorm, if it can be one."""
        if LayerNorm.can_be(module):
            module.__class__ = LayerNorm

    @staticmethod
    def can_be(module: nn.Module | None) -> bool:
        """Whether it is an nn.LayerNorm that normalizes the last dimension and has a weight."""
        known = type(module) is nn.LayerNorm and len(module.normalized_shape) == 1
        return known and cast(nn.LayerNorm, module).elementwise_affine

    def __call__(self, input: Tensor) -> Tensor:
        """forward(), skipping nn.Module's and the dispatcher's part of the call if they have nothing to do."""
        if is_dynamo_compiling() and type(self) is LayerNorm and not is_watched(self):  # with few guards
            return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        if is_dynamo_compiling() or simulation.anywhere:
            return super().__call__(input)  # type: ignore[no-any-return]
        y = _C.call_layer_norm(self, LayerNorm, input)
        if y is not NotImplemented:
            return y
        if isinstance(input, Proxy) and (path := path_in_graph(self, input)):  # a leaf, as nn.LayerNorm is
            return input.tracer.create_proxy("call_module", path, (input,), {})
        return super().__call__(input)  # type: ignore[no-any-return]

    def forward(self, input: Tensor) -> Tensor:
        """(..., normalized_shape[0]) -> the same shape and dtype."""
        if is_compiling() or simulation.simulating.get() or not self._is_plain(input) or _is_changed():
            return super().forward(input)
        return ops.layer_norm(input, self.weight, self.bias, self.eps)

    def _is_plain(self, x: Tensor) -> bool:
        """Whether the op computes it: float32 on the CPU, with no gradient wanted and no autocast."""
        tensors = [each for each in (x, self.weight, self.bias) if each is not None]
        if any(each.dtype != torch.float32 or each.device.type != "cpu" for each in tensors):
            return False
        wanted = any(map(gradients.wanted, tensors))
        return not wanted and not torch.is_autocast_enabled("cpu") and x.dim() > 0 and x.shape[-1] == len(self.weight)


know(LayerNorm)


def _is_changed() -> bool:
    """Whether somebody gave nn.LayerNorm another forward."""
    return not computes_as_known(LayerNorm)
