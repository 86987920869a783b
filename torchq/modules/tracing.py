"""What torch.fx traces: an int8 module that stands for one of torch.nn is a node of the graph, as that would be."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook


class Leaf(nn.Module):
    """A module whose call is one node of a traced graph: its base, whose others are those of the module it stands for.

    >>> class Twice(Leaf):
    ...     def forward(self, x):
    ...         return 2 * x if bool(x.sum() > 0) else x  # which can't be traced
    >>> import torch
    >>> [node.op for node in torch.fx.symbolic_trace(nn.Sequential(Twice())).graph.nodes]
    ['placeholder', 'call_module', 'output']
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), or where torch.fx traces, a node of its graph."""
        plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if not plain and not is_dynamo_compiling():
            proxy = next((each for each in (*args, *kwargs.values()) if isinstance(each, Proxy)), None)
            if proxy is not None and (path := path_in_graph(self, proxy)):
                return proxy.tracer.create_proxy("call_module", path, args, kwargs)
        return super().__call__(*args, **kwargs)


def is_watched(module: nn.Module) -> bool:
    """Whether hooks, or a forward of its own, see its calls."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or "forward" in module.__dict__ or _has_any_global_hook())


def exporting() -> bool:
    """Whether torch.export is at work.

    torch's own is_exporting() reads this flag; but before torch 2.13, in what Dynamo traces, it was always true.
    """
    return torch.compiler._is_exporting_flag


def path_in_graph(module: nn.Module, x: Proxy) -> str:
    """The module's name in what torch.fx traces; empty if it is all of that, or no part of it."""
    try:
        return x.tracer.path_of_module(module)  # type: ignore[attr-defined, no-any-return]
    except (AttributeError, NameError):
        return ""
