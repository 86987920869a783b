"""torch.compile of converted models: what inductor does to their graphs, as it happens in eager mode."""

import functools
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from torchq import ops
from torchq.modules import activations
from torchq.modules.activations import activation_computed
from torchq.modules.one_op import LAYERS
from torchq.ops import Activation

_CONVOLUTION = torch.ops.torchq.convolution.default
_PRODUCTS = (torch.ops.torchq.linear_dynamic.default, torch.ops.torchq.linear_static.default, _CONVOLUTION)
_ATTENTION = torch.ops.torchq.attention.default
_TRANSPOSITIONS: set[Any] = {"transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims}
_PERMUTATIONS: set[Any] = {"permute", torch.permute, *_TRANSPOSITIONS}
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

    They let torch.compile's inductor fold an activation into the int8 layer or convolution before it, wherever nothing
    else reads the output: a function such as `F.gelu` as well as a module. Without them inductor computes activations
    itself, in float, right but slower. A convolution that is only read with its channels last gives them so, attention
    reads queries, keys and values as they lie, and layers of an encoder that follow each other are one call. What else
    stands around the layers, such as a residual sum and its LayerNorm, inductor joins without help. A convolution in
    float whose patches don't overlap, such as a ViT's first, reads input and weight as they lie; inductor would turn
    both in each call.

    Returns:
        {"pre_grad_custom_pass": ...}; add options of your own to it.

    >>> sorted(compile_options())
    ['pre_grad_custom_pass']
    """
    return {"pre_grad_custom_pass": _cacheable_pass()}


@functools.cache
def _cacheable_pass() -> Any:
    """`rewrite` with an identity, by which inductor caches what it compiled."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files  # takes as long as torch itself

    class Rewrite(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            rewrite(graph)

        def uuid(self) -> bytes:
            """Changes with the files that decide what it does: no graph of another version is taken."""
            return get_hash_for_files((__file__, activations.__file__, ops.__file__))

        def __reduce__(self) -> Any:
            return _cacheable_pass, ()

    return Rewrite()


def rewrite(graph: fx.Graph) -> None:
    """All that the options do to a graph of torch's functions. No value changes but by the rounding of activations."""
    fold_activations(graph)
    turn_convolutions(graph)
    drop_copies(graph)
    keep_patches(graph)
    join_layers(graph)


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


def turn_convolutions(graph: fx.Graph) -> None:
    """Lets a convolution give its channels last in memory, where all that reads it is a view that has them last.

    Else inductor would read along columns in whatever follows, such as the layers of Whisper's encoder.
    """
    for node in [node for node in graph.nodes if node.target is _CONVOLUTION]:
        arguments = _arguments(node)
        readers = list(node.users)  # none, of a convolution that is called for nothing
        if arguments["out_dtype"] is not torch.uint8 and len(readers) == 1 and _has_channels_last(readers[0]):
            node.args, node.kwargs = tuple((arguments | {"channels_last": True}).values()), {}


def _has_channels_last(node: fx.Node) -> bool:
    """Whether it is a view of (N, C, *size) as (N, *size, C)."""
    if node.op not in ("call_method", "call_function") or node.target not in _PERMUTATIONS or node.kwargs:
        return False
    numbers = node.args[1:]
    flat: Any = numbers[0] if len(numbers) == 1 and isinstance(numbers[0], tuple | list) else numbers
    if node.target in _TRANSPOSITIONS:
        return _dimensions(node) == 3 and {*flat} in ({1, 2}, {-1, -2}, {1, -1}, {2, -2})
    return len(flat) > 2 and tuple(flat) == (0, *range(2, len(flat)), 1)


def _dimensions(node: fx.Node) -> int | None:
    value = node.meta.get("example_value")
    return value.dim() if isinstance(value, Tensor) else None


def drop_copies(graph: fx.Graph) -> None:
    """Gives attention its queries, keys and values as they lie: it takes any strides."""
    for node in [node for node in graph.nodes if node.target is _ATTENTION]:
        for each in {*node.args[:3]}:
            plain = isinstance(each, fx.Node) and each.op == "call_method" and each.target == "contiguous"
            if plain and len(each.args) == 1 and not each.kwargs and {*each.users} == {node}:
                node.replace_input_with(each, each.args[0])
                graph.erase_node(each)


def keep_patches(graph: fx.Graph) -> None:
    """Makes a convolution in float whose patches don't overlap an op that reads input and weight as they lie.

    Inductor gives every convolution channels last, and turns its weight in each call. That pays where a patch is read
    again and again; here it takes longer than it saves.
    """
    for node in [node for node in graph.nodes if node.target is torch.conv2d]:
        given = {**_OF_CONV2D, **dict(zip(_OF_CONV2D, node.args, strict=False)), **node.kwargs}
        if _are_patches(node, given):
            node.target, node.kwargs = _PATCHES, {}
            node.args = (given["input"], given["weight"], given["bias"], [*_pair(given["stride"])])


_OF_CONV2D = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def _are_patches(node: fx.Node, given: dict[str, Any]) -> bool:
    """Whether this convolution of dense float tensors on the CPU reads each value of its input at most once."""
    read = (node, given["input"], given["weight"])
    y, x, weight = [each.meta.get("example_value") if isinstance(each, fx.Node) else None for each in read]
    if not isinstance(y, Tensor) or not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        return False
    alike = y.dtype == x.dtype == weight.dtype and y.dim() == 4 and not y.requires_grad
    plain = all(each.device.type == "cpu" and each.is_contiguous() for each in (y, x, weight))
    once = _pair(given["stride"]) == tuple(weight.shape[2:]) and weight.shape[2:].numel() > 1
    apart = _pair(given["padding"]) == (0, 0) and _pair(given["dilation"]) == (1, 1) and given["groups"] == 1
    return alike and plain and once and apart


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) * (1 if len(value) == 2 else 2) if isinstance(value, tuple | list) else (value, value)


_library = torch.library.Library("torchq", "FRAGMENT")  # as long as this lives, the op is there
_library.define("patches(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride) -> Tensor")
_PATCHES = torch.ops.torchq.patches.default


def _patches(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int]) -> Tensor:
    return torch.conv2d(x, weight, bias, stride).contiguous()


_library.impl("patches", _patches, "CompositeExplicitAutograd")


@torch.library.register_fake("torchq::patches")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int]) -> Tensor:
    sizes = (size // step for size, step in zip(x.shape[2:], stride, strict=True))
    return x.new_empty((x.shape[0], weight.shape[0], *sizes))


def join_layers(graph: fx.Graph) -> None:
    """Rewrites calls of `torchq::layers`, each of what the one before it gave, as one call."""
    for node in [node for node in graph.nodes if node.target is LAYERS]:
        numbers, before, *others = node.args
        if isinstance(before, fx.Node) and before.target is LAYERS and len(before.users) == 1:
            first, x, *same = cast(Any, before.args)
            if same == others:
                node.args = ([*first, *numbers], x, *others)
                graph.erase_node(before)


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
    if node.op != "call_function" or node.target not in _PRODUCTS:
        return False
    arguments = _arguments(node)
    return arguments["activation"] == Activation.NONE and arguments.get("out_dtype") is not torch.uint8


def _with_activation(layer: fx.Node, activation: Activation) -> tuple[Any, ...]:
    return tuple((_arguments(layer) | {"activation": int(activation)}).values())
