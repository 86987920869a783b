"""Applying a plan: int8 modules replace the float ones, all or nothing."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from torchq import kernels
from torchq.errors import BadTypeError, door
from torchq.modules.attention_offer import offer_attention
from torchq.modules.base import Int8Module
from torchq.modules.checkpoints import check_state
from torchq.modules.chunked import Chunked
from torchq.modules.classes import know
from torchq.modules.computed_weights import without_history
from torchq.modules.conv_block import ConvBlock
from torchq.modules.curve import Curve, exact, faster
from torchq.modules.embedding_sum import EmbeddingSum
from torchq.modules.encoder import SKIPPED, Int8TransformerEncoder
from torchq.modules.encoder_layer import Int8TransformerEncoderLayer
from torchq.modules.gated import Gated
from torchq.modules.int8_sequential import InOrder, Int8Sequential
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.norms import IncludedNorm
from torchq.modules.packed_weights import PackedWeights
from torchq.modules.pending import Scope
from torchq.modules.qat_embedding import QATTable
from torchq.modules.qat_linear import QATProduct
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.registry import find_layers, type_of
from torchq.modules.rms_norm import RMSNorm
from torchq.modules.sparse import sparse_copies
from torchq.modules.straight_forms import ConvRow, Residual, Row
from torchq.planning.attach import attach_plan
from torchq.planning.check import check_plan
from torchq.planning.making import FROM_FLOAT, FromFloat
from torchq.planning.plan import Plan, attention_schemes
from torchq.planning.references import attributes, held, replaced
from torchq.scopes import outside_inference_mode

M = TypeVar("M", bound=nn.Module)


@door("torchq.apply_plan")
def apply_plan(model: M, plan: Plan, *, inplace: bool = False) -> M:
    """Replaces the layers of `model` as `plan` says. The plan comes from `convert`, and may have been edited.

    A plan from JSON, and the `torchq_plan` of a converted model, lack the weights of layers with `rounding="gptq"`.
    Those layers are then rounded to nearest, with a warning. To get the same model, pass `torchq.plan_of(qmodel)`,
    which has the weights, or load the converted model's state_dict afterwards.

    Raises:
        ValueError: the plan names a layer the model lacks; passes codes to a layer that is not static or has a
            channel_scale; has a channel_scale of other numbers than one positive one for each input; or holds the
            weights of another layer or channel_scale.
        TypeError: the model can't be copied.

    >>> import dataclasses
    >>> from torchq import convert, plan_of
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> plan = plan_of(convert(model))
    >>> plan.layers["2"] = dataclasses.replace(plan.layers["2"], kind="float", reason="my choice")
    >>> type(apply_plan(model, plan)[2]).__name__
    'Linear'
    """
    return settled(applied(model, plan, inplace=inplace))


def settled(model: M) -> M:
    """The model, with its int8 layers in huge pages: for one that is kept. One that is only tried is not worth it."""
    for module in model.modules():
        if isinstance(module, PackedWeights):
            module.settle()
    return model


def applied(model: M, plan: Plan, *, inplace: bool = False, make: FromFloat = FROM_FLOAT) -> M:
    """`apply_plan` without its name in front of the errors: the caller's `door` adds another one.

    `make` gives the int8 modules.
    """
    make.check(plan)
    check_plan(model, plan, find_layers(model))
    if plan.int8_layers():
        kernels.warn_if_slow()
    with outside_inference_mode():
        try:
            if inplace:
                _swap(model, plan, make)
            else:
                swaps = {id(model.get_submodule(path)): make.module(model, plan, path) for path in _paths(model, plan)}
                for name in plan.int8_tables():
                    owner = plan.tables[name].owner
                    held_by = None if owner is None else swaps[id(model.get_submodule(owner))]
                    swaps[id(model.get_submodule(name))] = make.table(model, plan, name, held_by)
                swaps |= {
                    id(model.get_submodule(name)): IncludedNorm.of(model.get_submodule(name)) for name in plan.norms()
                }
                model = _copy(model, swaps, make.kept(model))
            _make_curves(model, plan)
            for module in list(model.modules()):
                if isinstance(module, nn.Sequential):
                    Int8Sequential.adopt(module)
                Int8TransformerEncoder.adopt(module)
                Row.adopt(module)
                ConvRow.adopt(module)
                Gated.adopt(module)
                if plan.int8_layers():
                    LayerNorm.adopt(module)
                    RMSNorm.adopt(module)
                    Chunked.adopt(module)
            modules = list(model.modules())
            if any(isinstance(module, QuantizedConv) for module in modules):
                for module in reversed(modules):  # when all within are what they become
                    ConvBlock.adopt(module)
            for module in modules:
                EmbeddingSum.adopt(module)
            _adopt_encoder_layers(model, plan)
            _adopt_residuals(model, plan)
            _open_scopes(model, plan)
            for module in list(model.modules()):  # training forms that stay float become plain modules again
                kind = type_of(module)
                if kind is not None:
                    kind.release(module)
                elif isinstance(module, QATTable):
                    module.release()
                know(type(module))
        finally:
            leave_fast_path(model)
    if plan.attentions:
        offer_attention(model, attention_schemes(plan.attentions))
    if plan.int8_layers() or plan.int8_tables():
        model.register_load_state_dict_pre_hook(check_state)
    attach_plan(model, plan)
    return model


def _paths(model: nn.Module, plan: Plan) -> list[str]:
    """The names of the modules that have a layer in int8, or attend by a scheme of the plan.

    (Names only: a reference would keep a float module alive.)
    """
    layers, schemes = find_layers(model), attention_schemes(plan.attentions)
    paths = [layers[name].path for name in plan.int8_layers()]
    paths += [layer.path for layer in layers.values() if layer.kind.attends and layer.path in schemes]
    return list(dict.fromkeys(paths))


def _make_curves(model: nn.Module, plan: Plan) -> None:
    """Replaces activations that layers may compute, where they are not the one operation that a layer waits for.

    Behind convolutions it is those without the bits of an epilogue, so that blocks are proven to compute the same.
    One of a norm that a layer includes is replaced in any case: what it writes over is that layer's output, which
    nothing else reads.
    """
    layers = {name: planned.activation for name, planned in plan.layers.items() if planned.is_int8}
    convolved = {layers[name] for name in layers if isinstance(model.get_submodule(name), QuantizedConv)}
    places = _places(model)
    modules = {
        id(module): (module, exact if name in convolved else faster)
        for name, module in model.named_modules(remove_duplicate=False)
        if name in layers.values()
    }
    included = {id(module._modules) for module in model.modules() if isinstance(module, IncludedNorm)}
    for module, suited in modules.values():
        for children, key in places[id(module)]:
            children[key] = Curve.of(module) if id(children) in included else suited(module)


def _adopt_residuals(model: nn.Module, plan: Plan) -> None:
    """Lets modules with a layer, a sum and a LayerNorm compute these at once, where the plan says so."""
    for name, planned in plan.layers.items():
        if planned.is_int8 and planned.sum_norm is not None:
            owner = model.get_submodule(name.rpartition(".")[0])
            Residual.adopt(owner, planned.sum_norm.rpartition(".")[2])


def _adopt_encoder_layers(model: nn.Module, plan: Plan) -> None:
    """Lets torch's encoder layers run in fewer calls, where the plan folds their activations."""
    for path, module in model.named_modules():
        planned = plan.layers.get(f"{path}.linear2" if path else "linear2")
        Int8TransformerEncoderLayer.adopt(module, sums=planned is not None and planned.sum_norm is not None)


def _open_scopes(model: nn.Module, plan: Plan) -> None:
    """Lets layers wait for an activation that is not behind them in an Int8Sequential, in the calls of both's owner."""
    scopes: dict[int, Scope] = {}
    for name, planned in plan.layers.items():
        layer = model.get_submodule(name) if planned.is_int8 else None
        if isinstance(layer, QuantizedConv) and (planned.hands or planned.turned):
            names = (name, *planned.hands)
            layer.hands = _scope_of(model, _owner_of(model, names, (*_LISTS, nn.Sequential)), scopes)
        last = planned.activation if isinstance(layer, QuantizedLinear) else planned.feeds or planned.activation
        if last is None or not isinstance(layer, (QuantizedLinear, QuantizedConv)):
            continue
        path = _owner_of(model, (name, last))
        owner = model.get_submodule(path)
        if isinstance(owner, (InOrder, Int8TransformerEncoderLayer, Gated)) and owner.computes(layer):
            continue
        layer.scope = _scope_of(model, path, scopes)


def _scope_of(model: nn.Module, path: str, scopes: dict[int, Scope]) -> Scope:
    """That of this module. `scopes` has those that there are, by module."""
    owner = model.get_submodule(path)
    if id(owner) not in scopes:
        scopes[id(owner)] = Scope()
        scopes[id(owner)].attach(owner)
    return scopes[id(owner)]


_LISTS = (nn.ModuleList, nn.ModuleDict)  # they have no forward


def _owner_of(model: nn.Module, names: tuple[str, ...], lists: tuple[type[nn.Module], ...] = _LISTS) -> str:
    """The innermost module that holds all of these and is none of `lists`; some go through an nn.Sequential as well."""
    path = []
    for step, *others in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if any(other != step for other in others):
            break
        path.append(step)
    while path and isinstance(model.get_submodule(".".join(path)), lists):
        path.pop()
    return ".".join(path)


def _swap(model: nn.Module, plan: Plan, make: FromFloat) -> None:
    """Swaps the modules in place, one after the other: each float weight is freed before the next int8 one is made.

    The model computes the right thing after every swap, even if memory runs out before the next one.
    """
    places, holders = _places(model), _holders(model)
    for path in reversed(_paths(model, plan)):
        quantized = make.module(model, plan, path)
        norm = plan.layers[path].norm if path in plan.layers else None
        if norm is not None:
            _put(model.get_submodule(norm), IncludedNorm.of(model.get_submodule(norm)), places, holders)
        _put(model.get_submodule(path), quantized, places, holders)
    for name in plan.int8_tables():  # after their heads, which then are int8
        owner = plan.tables[name].owner
        table = make.table(model, plan, name, None if owner is None else model.get_submodule(owner))
        _put(model.get_submodule(name), table, places, holders)


def _put(
    old: nn.Module,
    new: nn.Module,
    places: Mapping[int, list[tuple[dict[str, nn.Module | None], str]]],
    holders: Mapping[int, list[tuple[dict[str, Any], str]]],
) -> None:
    """Puts a module into all places of another one."""
    _follow(id(old), new, holders)
    for children, key in places[id(old)]:
        children[key] = new


def _places(model: nn.Module) -> dict[int, list[tuple[dict[str, nn.Module | None], str]]]:
    """For each module, by id, every place that holds it: a parent's dict of children, and the key in it."""
    places: dict[int, list[tuple[dict[str, nn.Module | None], str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent._modules, key))
    return places


def _holders(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """By the id of a module: the attributes of other kinds that refer to it."""
    holders: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for values, key in attributes(model):
        for module in held(values[key]):
            holders.setdefault(module, []).append((values, key))
    return holders


def _follow(old: int, new: nn.Module, holders: Mapping[int, list[tuple[dict[str, Any], str]]]) -> None:
    for values, key in holders.get(old, ()):
        values[key] = replaced(values[key], lambda module: new if id(module) == old else None)


def _copy(model: M, swaps: Mapping[int, nn.Module], kept: Mapping[int, Any]) -> M:
    """A deep copy with the modules in `swaps` (by id) replaced, and the tensors in `kept`.

    They go in as deepcopy's memo: it takes them for copies already made, and never copies the float weights.
    """
    memo: dict[int, Any] = {**without_history(model), **sparse_copies(model), **kept, **swaps}
    try:
        copied = copy.deepcopy(model, memo)
        for norm in (each for each in swaps.values() if isinstance(each, IncludedNorm)):
            norm._modules = copy.deepcopy(norm._modules, memo)
    except Exception as error:
        distributed = isinstance(model, nn.parallel.DistributedDataParallel)
        raise BadTypeError(
            f"this {type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Pass "
            f"{'model.module, the model within, or ' if distributed else ''}inplace=True, and no evaluate, to convert "
            "it as it is."
        ) from error
    inside = {id(module) for module in copied.modules()}
    missing = [
        path for path, module in model.named_modules() if id(module) in swaps and id(swaps[id(module)]) not in inside
    ]
    if missing:
        raise BadTypeError(
            f"this {type(model).__name__} makes copies in its own way (a __deepcopy__ that does not use the memo), "
            f"without the int8 layers: {', '.join(map(repr, missing[:3]))}{', ...' if len(missing) > 3 else ''}. Pass "
            "inplace=True, and no evaluate, to convert it as it is."
        )
    for module in model.modules():
        _forget_defaults(module, memo.get(id(module)))
    made = {id(value) for value in memo.values()}  # what deepcopy shares is the original's
    for values, key in attributes(copied):
        values[key] = replaced(values[key], lambda module: memo.get(id(module)), ours=lambda holder: id(holder) in made)
    return copied


def _forget_defaults(module: nn.Module, copied: Any) -> None:
    """Removes attributes of a copy that hide a child of the same name, where the original has only the child.

    nn.TransformerDecoderLayer gives itself such a one: F.relu, where it does not find its activation among attributes.
    """
    if isinstance(copied, nn.Module):
        for key in vars(copied).keys() & copied._modules.keys() - vars(module).keys():
            del vars(copied)[key]


def leave_fast_path(model: nn.Module) -> None:
    """Turns off torch's fused encoder kernels where torchq changed a layer: they read weights without calling it."""
    for module in model.modules():
        changed = any(isinstance(child, (Int8Module, QATProduct)) for child in module.modules())
        if isinstance(module, nn.TransformerEncoderLayer) and changed:
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and changed:
            vars(module).setdefault(SKIPPED, module.use_nested_tensor)
            module.use_nested_tensor = False
