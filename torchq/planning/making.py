"""What the int8 modules of a plan are made of: the float model's weights; or nothing yet, for a file to fill them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchq.modules.activations import activation_named
from torchq.modules.base import Int8Module
from torchq.modules.embedding import QuantizedTable
from torchq.modules.fine_linear import FineLinear
from torchq.modules.folding import Fold
from torchq.modules.packed_weights import PackedWeights
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.registry import Layer, layers_of
from torchq.numerics.qparams import float32_qparams
from torchq.ops import Activation
from torchq.planning.plan import LayerPlan, Plan
from torchq.planning.rounding import check_rounded, warn_of_missing


class FromFloat:
    """Makes int8 modules of the weights of a float model."""

    def check(self, plan: Plan) -> None:
        """Warns of what the plan asks for and this can't give."""
        warn_of_missing(plan)

    def module(self, model: nn.Module, plan: Plan, path: str) -> nn.Module:
        """What the module at this path becomes."""
        layers = layers_of(path, model.get_submodule(path))
        parts: dict[str, nn.Module] = {}
        for layer in layers:
            planned = plan.layers.get(layer.name)
            int8 = planned is not None and planned.is_int8
            parts[layer.part] = self.layer(model, plan, layer) if int8 else self.float_part(layer)
            if planned is not None and planned.fine:
                FineLinear.adopt(parts[layer.part])
        made = layers[0].kind.become(layers[0].module, parts).train(layers[0].module.training)
        if isinstance(made, Int8Module):
            made.float_key = _lost_key(layers[0].module, made)
        if isinstance(made, QuantizedConv):
            made.includes = plan.layers[path].norm
        return made

    def layer(self, model: nn.Module, plan: Plan, layer: Layer) -> PackedWeights:
        """The int8 layer that `plan` makes of this one."""
        planned = plan.layers[layer.name]
        whole, rounded = with_norm(model, planned, layer), planned.weights if planned.rounding == "gptq" else None
        settings: dict[str, Any] = {
            "input_qparams": planned.input_qparams if planned.kind == "int8 static" else None,
            "fold": fold_of(model, planned),
            "channel_scale": planned.scale_vector,
        }
        if rounded is not None:
            check_rounded(whole, planned)
            quantized = whole.with_codes(*rounded[:3], dtype=layer.dtype, **settings)
            quantized.had_bias = layer.matrix.bias is not None
            return quantized
        quantized = whole.quantized(per_channel=planned.per_channel, **settings)
        if planned.rounding == "gptq":  # bias correction gives every layer a bias: so a state_dict still fits
            quantized.replace_weight(*quantized.rows()[:3])
        return quantized

    def float_part(self, layer: Layer) -> nn.Linear:
        """An nn.Linear for a matrix that stays in float while others of its module become int8."""
        part = empty_linear(layer)
        part.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        if layer.matrix.bias is not None:
            part.bias = nn.Parameter(layer.matrix.bias.detach().clone(), requires_grad=False)
        return part

    def table(self, model: nn.Module, plan: Plan, name: str, owner: nn.Module | None) -> QuantizedTable:
        """What the embedding of this name becomes; `owner` is the int8 module that its table is the weight of."""
        assert owner is None or isinstance(owner, PackedWeights)
        row = plan.tables[name]
        return QuantizedTable.from_float(model.get_submodule(name), owner, finely=row.residual, scaled=row.scaled)

    def kept(self, model: nn.Module) -> dict[int, Any]:
        """By the id of a tensor of the float model: what a copy has in its place. All others are copied."""
        return {}


class Empty(FromFloat):
    """Makes int8 modules of the same kind and size without values: their tensors are on the meta device.

    The float model may be there too. Of its weights only shapes and dtypes are read.
    """

    def check(self, plan: Plan) -> None:
        """Rounded weights come with all the others."""

    def layer(self, model: nn.Module, plan: Plan, layer: Layer) -> PackedWeights:
        """An int8 layer with the tensors that `plan` gives it; bias correction and a norm give each layer a bias."""
        planned, n = plan.layers[layer.name], layer.out_features
        had_bias = layer.matrix.bias is not None
        given = had_bias or planned.rounding == "gptq" or planned.norm is not None
        empty = layer.with_codes(
            _nothing(n, layer.in_features, dtype=torch.int8),
            _nothing(n),
            _nothing(n) if given else None,
            input_qparams=planned.input_qparams if planned.kind == "int8 static" else None,
            fold=fold_of(model, planned),
            dtype=layer.dtype,
            channel_scale=None if planned.channel_scale is None else _nothing(layer.channels),
        )
        empty.had_bias = had_bias
        return empty

    def float_part(self, layer: Layer) -> nn.Linear:
        """An nn.Linear on the meta device, in the float model's dtype."""
        return empty_linear(layer).to(layer.dtype).requires_grad_(False)

    def table(self, model: nn.Module, plan: Plan, name: str, owner: nn.Module | None) -> QuantizedTable:
        """A table with its number of rows, or the owner's."""
        assert owner is None or isinstance(owner, PackedWeights)
        row = plan.tables[name]
        return QuantizedTable.empty(model.get_submodule(name), owner, finely=row.residual, scaled=row.scaled)

    def kept(self, model: nn.Module) -> dict[int, Any]:
        """All parameters and buffers are on the meta device."""
        tensors: Mapping[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        return {key: _without_values(tensor) for key, tensor in tensors.items() if not tensor.is_meta}


class Sharing(FromFloat):
    """Makes int8 modules of the weights of a float model, or of the packed weights that an int8 model has of them.

    Plans that are tried one after the other have most layers in common. What is shared is nothing that anybody writes
    to: whoever changes a layer's weight gives it another tensor.

    Args:
        plan: a plan of the same float model.
        converted: the int8 model by it.
    """

    def __init__(self, plan: Plan, converted: nn.Module) -> None:
        self._plan, self._modules = plan, dict(converted.named_modules(remove_duplicate=False))

    def layer(self, model: nn.Module, plan: Plan, layer: Layer) -> PackedWeights:
        """The int8 layer that `plan` makes of this one."""
        made, before = self._modules.get(layer.name), self._plan.layers.get(layer.name)
        if not isinstance(made, PackedWeights) or before is None or not _same_weights(before, plan.layers[layer.name]):
            return super().layer(model, plan, layer)
        again = Empty().layer(model, plan, layer)
        again.share(made.packed)
        return again

    def table(self, model: nn.Module, plan: Plan, name: str, owner: nn.Module | None) -> QuantizedTable:
        """What the embedding of this name becomes; `owner` is the int8 module that its table is the weight of."""
        made, row = self._modules.get(name), plan.tables[name]
        if owner is not None or not isinstance(made, QuantizedTable) or self._plan.tables.get(name) != row:
            return super().table(model, plan, name, owner)
        again = Empty().table(model, plan, name, owner)
        again.share(*made.table())
        return again


def _same_weights(one: LayerPlan, other: LayerPlan) -> bool:
    """Whether both plans, of one layer in int8, give it the same weights and bias."""
    same = one.rounding == other.rounding and one.weights is other.weights and one.per_channel == other.per_channel
    return one.is_int8 and same and one.channel_scale == other.channel_scale and one.norm == other.norm


def empty_linear(layer: Layer) -> nn.Linear:
    """An nn.Linear of this layer's size on the meta device."""
    has_bias = layer.matrix.bias is not None
    return nn.Linear(layer.in_features, layer.out_features, has_bias, device="meta", dtype=torch.float32)


def fold_of(model: nn.Module, planned: LayerPlan) -> Fold:
    """What the plan lets this layer be fused with."""
    activation = activation_named(model, planned.activation) if planned.activation else Activation.NONE
    sum_qparams = float32_qparams(planned.sum_qparams)
    return Fold(activation, codes=planned.feeds is not None, adds=planned.adds, sum_qparams=sum_qparams)


def with_norm(model: nn.Module, planned: LayerPlan, layer: Layer) -> Layer:
    """The layer together with the norm that its weight is to include, if any."""
    return layer if planned.norm is None else dataclasses.replace(layer, norm=model.get_submodule(planned.norm))


def _nothing(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _lost_key(module: nn.Module, made: Int8Module) -> str | None:
    """The first parameter of the float module of which the int8 one has none of this name in its checkpoints."""
    own = made.expected() if isinstance(made, PackedWeights) else made._parameters
    return next((name for name, _ in module.named_parameters() if name not in own), None)


FROM_FLOAT = FromFloat()
"""What `apply_plan` takes."""
