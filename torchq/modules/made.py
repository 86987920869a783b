"""MadeTensor: a tensor without memory, whose values are made when something reads them.

It is what torch calls a wrapper subclass: it has a shape, a dtype and a device, and torch hands it every operation
(`__torch_dispatch__`). This is what all such tensors share: the ways to values that pass torch's operations by.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def taken_apart(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation run as those that it consists of; NotImplemented where it is one.

    In torch.inference_mode a tensor is handed operations whole that reach it in parts elsewhere, such as max_pool2d.
    """
    if not torch.is_inference_mode_enabled() or not _is_composite(func):
        return NotImplemented
    return func.decompose(*args, **kwargs)


class MadeTensor(Tensor):
    """A tensor that `make()` gives the values of."""

    # No Python between an attribute such as dtype and its value: 0.1 us.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def make(self) -> Tensor:
        """The values, as an ordinary tensor."""
        raise NotImplementedError

    def numpy(self, *, force: bool = False) -> Any:
        """The values, as Tensor.numpy() gives them."""
        return self.make().numpy(force=force)

    def tolist(self) -> Any:
        """The values, as Tensor.tolist() gives them."""
        return self.make().tolist()

    def __array__(self, dtype: Any = None) -> Any:
        array = self.make().numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.make().__dlpack__(**kwargs)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.make().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.make().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.make())
