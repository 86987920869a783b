"""torch.compile of converted models: activations move into the int8 layers before them, as they do in eager mode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from torchq.ops import Activation

_LINEARS = (torch.ops.torchq.linear_dynamic.default, torch.ops.torchq.linear_static.default)
_F = nn.functional
_GELUS = {"none": Activation.GELU, "tanh": Activation.GELU_TANH}
_FUNCTIONS: dict[Any, Activation] = {
    _F.relu: Activation.RELU,
    torch.relu: Activation.RELU,
    "relu": Activation.RELU,
    _F.silu: Activation.SILU,
    _F.hardswish: Activation.HARDSWISH,
    _F.relu6: Activation.RELU6,
    **dict.fromkeys((torch.tanh, _F.tanh, "tanh"), Activation.TANH),
    **dict.fromkeys((torch.sigmoid, _F.sigmoid, "sigmoid"), Activation.SIGMOID),
}
"""What the graph of a model calls, by function or by method's name. GELU, which has two forms, is _F.gelu beside it."""


def compile_options() -> dict[str, Callable[[fx.Graph], None]]:
    """Options for torch.compile: `torch.compile(qmodel, options=torchq.compile_options())`.

    They let torch.compile's inductor fold an activation into the int8 layer before it, wherever nothing else reads the
    layer's output: a function such as `F.gelu` as well as a module. Without them inductor computes activations itself,
    in float, right but slower. What else stands around the layers, such as a residual sum and its LayerNorm, inductor
    joins without help.

    Returns:
        {"pre_grad_custom_pass": ...}; add options of your own to it.

    >>> sorted(compile_options())
    ['pre_grad_custom_pass']
    """
    return {"pre_grad_custom_pass": fold_activations}


def fold_activations(graph: fx.Graph) -> None:
    """Rewrites `act(linear(x))` as one call of the op with this activation, in a graph of torch's functions."""
    for node in list(graph.nodes):
        activation = _activation_of(node)
        layer = node.args[0] if activation != Activation.NONE else None
        if isinstance(layer, fx.Node) and _is_plain_layer(layer) and len(layer.users) == 1:
            layer.args, layer.kwargs = _with_activation(layer, activation), {}
            node.replace_all_uses_with(layer)
            graph.erase_node(node)


def _activation_of(node: fx.Node) -> Activation:
    """The activation that a node computes of its first argument; NONE for any other node."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return Activation.NONE
    if node.target is _F.gelu:
        form = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return _GELUS.get(str(form), Activation.NONE)
    return _FUNCTIONS.get(node.target, Activation.NONE)


def _arguments(layer: fx.Node) -> dict[str, Any]:
    """Of a call of an op, by name, defaults included."""
    schema = layer.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema), layer.args, strict=False)) | dict(layer.kwargs)
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}


def _is_plain_layer(node: fx.Node) -> bool:
    """Whether it is a product that gives floats, without an activation of its own."""
    if node.op != "call_function" or node.target not in _LINEARS:
        return False
    arguments = _arguments(node)
    return arguments["activation"] == Activation.NONE and arguments.get("out_dtype") is not torch.uint8


def _with_activation(layer: fx.Node, activation: Activation) -> tuple[Any, ...]:
    return tuple((_arguments(layer) | {"activation": int(activation)}).values())
