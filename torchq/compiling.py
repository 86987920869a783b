"""torch.compile of converted models: activations move into the int8 layers before them, as they do in eager mode."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchq import ops
from torchq.modules import activations
from torchq.modules.activations import activation_computed
from torchq.ops import Activation

_LINEARS = (torch.ops.torchq.linear_dynamic.default, torch.ops.torchq.linear_static.default)
_F = nn.functional

_ELEMENTWISE: set[Any] = {operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg}
_ELEMENTWISE |= {torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.neg, torch.square, torch.clamp}
_ELEMENTWISE |= {torch.relu, torch.tanh, torch.sigmoid, torch.erf, torch.exp, _F.tanh, _F.sigmoid}
_ELEMENTWISE |= {_F.relu, _F.gelu, _F.silu, _F.hardswish, _F.hardsigmoid, _F.relu6, _F.hardtanh}
_ELEMENTWISE |= {torch.ops.torchq.activate.default}
_ELEMENTWISE |= {"add", "sub", "mul", "div", "pow", "neg", "square", "clamp", "relu", "tanh", "sigmoid", "erf", "exp"}
"""What an activation may be made of: functions, and names of methods. None of them writes, or is random."""

_LONGEST = 12  # operations of an activation: 8 make the longest, GELU by tanh


def compile_options() -> dict[str, Any]:
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
    return {"pre_grad_custom_pass": _cacheable_pass()}


@functools.cache
def _cacheable_pass() -> Any:
    """`fold_activations` with an identity, by which inductor caches what it compiled."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files  # takes as long as torch itself

    class FoldActivations(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            fold_activations(graph)

        def uuid(self) -> bytes:
            """Changes with the files that decide what it does: no graph of another version is taken."""
            return get_hash_for_files((__file__, activations.__file__, ops.__file__))

        def __reduce__(self) -> Any:
            return _cacheable_pass, ()

    return FoldActivations()


def fold_activations(graph: fx.Graph) -> None:
    """Rewrites `act(linear(x))` as one call of the op with this activation, in a graph of torch's functions.

    An activation is known by what its operations compute, so `x * torch.sigmoid(1.702 * x)` is one too.
    """
    for layer in [node for node in graph.nodes if _is_plain_layer(node)]:
        activation, operations = _activation_after(layer)
        if activation != Activation.NONE:
            layer.args, layer.kwargs = _with_activation(layer, activation), {}
            operations[-1].replace_all_uses_with(layer)
            for operation in reversed(operations):
                graph.erase_node(operation)


def _activation_after(layer: fx.Node) -> tuple[Activation, list[fx.Node]]:
    """The longest activation that is all that reads this layer's output, and its operations; or NONE."""
    found: tuple[Activation, list[fx.Node]] = (Activation.NONE, [])
    operations: list[fx.Node] = []
    node = layer.next
    while node.op != "root" and len(operations) < _LONGEST:
        inside = {layer, *operations}
        if not inside.isdisjoint(node.all_input_nodes):
            if not inside.issuperset(node.all_input_nodes) or not _is_elementwise(node):
                return found
            operations.append(node)
            if all(reader in operations for each in (layer, *operations[:-1]) for reader in each.users):
                activation = activation_computed(_function(layer, list(operations)))
                found = found if activation == Activation.NONE else (activation, list(operations))
        node = node.next
    return found


def _is_elementwise(node: fx.Node) -> bool:
    """Whether it is one of the operations above, and is not told to work in place."""
    writes = bool(node.kwargs.get("inplace")) or "out" in node.kwargs or any(arg is True for arg in node.args)
    return node.op in ("call_function", "call_method") and node.target in _ELEMENTWISE and not writes


def _function(layer: fx.Node, operations: list[fx.Node]) -> Callable[[Tensor], Tensor]:
    """What the operations compute of the layer's output."""

    def run(x: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {layer: x}
        for node in operations:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            target: Any = node.target
            values[node] = (
                getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)
            )
        result: Tensor = values[operations[-1]]
        return result

    return run


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
