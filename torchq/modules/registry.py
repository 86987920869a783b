"""The registry of module types that can become int8: the only place where the stages of a conversion look them up."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchq.modules.attention_types import MultiheadAttentionType, QATMultiheadAttentionType
from torchq.modules.base import Matrix, ModuleType, Trained
from torchq.modules.bilinear import BilinearType, QATBilinearType
from torchq.modules.conv import ConvType, QATConvType
from torchq.modules.experts import ExpertsType, QATExpertsType
from torchq.modules.linear import LinearType, QATLinearType
from torchq.modules.linear_like import LinearLikeType
from torchq.modules.norms import folded
from torchq.modules.packed_weights import PackedWeights
from torchq.modules.patches import Patches
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.recurrent_types import CellType, QATCellType, QATRecurrentType, RecurrentType
from torchq.ops.convolution import packed_bytes
from torchq.ops.weights import quantize_weight

TYPES: list[ModuleType] = [
    *map(QATConvType, (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    QATLinearType(),
    LinearType(),
    *map(ConvType, (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    QATMultiheadAttentionType(),
    MultiheadAttentionType(),
    *map(QATRecurrentType, (nn.LSTM, nn.GRU, nn.RNN)),
    *map(RecurrentType, (nn.LSTM, nn.GRU, nn.RNN)),
    *map(QATCellType, (nn.LSTMCell, nn.GRUCell, nn.RNNCell)),
    *map(CellType, (nn.LSTMCell, nn.GRUCell, nn.RNNCell)),
    LinearLikeType(),
    QATBilinearType(),
    BilinearType(),
    QATExpertsType(),
    ExpertsType(),
]
"""A module has the first type here that matches it, so a subclass comes before its base."""


@dataclass(frozen=True)
class Layer:
    """One matrix of a module of the model. A plan has one entry for each.

    Args:
        path: the module's name in the model.
        part: the name of the matrix in the module; "" if the module becomes a single QuantizedLinear.
        module: the float module.
        kind: its type.
        norm: a norm behind it that its matrix includes, or None.

    >>> layers = find_layers(nn.Sequential(nn.Linear(8, 4), nn.ReLU()))
    >>> layers["0"].kind.name, layers["0"].in_features, layers["0"].out_features
    ('nn.Linear', 8, 4)
    """

    path: str
    part: str
    module: nn.Module
    kind: ModuleType
    norm: nn.Module | None = None

    @property
    def name(self) -> str:
        """The name in a plan, and of the QuantizedLinear in the converted model."""
        return ".".join(filter(None, (self.path, self.part)))

    @property
    def matrix(self) -> Matrix:
        """Weight (N, K) and bias (N,), in the model's dtype; together with a norm, in float32."""
        matrix = self.kind.matrix(self.module, self.part)
        return matrix if self.norm is None else folded(matrix, self.norm)

    @property
    def weight(self) -> Tensor:
        """The weight (N, K)."""
        return self.matrix.weight

    @property
    def patches(self) -> Patches | None:
        """How rows are made of its input, if it is a convolution that takes more than one place at a time."""
        return self.kind.patches(self.module)

    @property
    def channels(self) -> int:
        """How many channels its input has: K, or fewer in a convolution."""
        return self.in_features if self.patches is None else self.patches.channels

    @property
    def takes_scale(self) -> bool:
        """Whether the channels of its input may have a scale each."""
        return self.patches is None or self.patches.geometry.groups == 1 or self.is_depthwise

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel of its input has outputs of its own: it is a convolution with one group for each."""
        return self.patches is not None and self.patches.takes_floats

    def packed_bytes(self, *, channel_scale: bool = False) -> int:
        """The bytes that its int8 weight takes, with a channel_scale or without."""
        groups = 1 if self.patches is None else self.patches.geometry.groups
        return packed_bytes(self.kind.weight(self.module, self.part).shape, groups, channel_scale=channel_scale)

    @property
    def channel_rows(self) -> Tensor:
        """The weight as rows of one number for each channel of the input."""
        return self.weight.t() if self.is_depthwise else self.weight.reshape(-1, self.channels)

    def quantized(
        self, *, per_channel: bool = True, channel_scale: Tensor | None = None, **settings: Any
    ) -> PackedWeights:
        """The int8 layer, with the settings of `QuantizedLinear.from_float`."""
        if self.patches is None and not self.kind.absorbs:
            settings |= {"per_channel": per_channel, "channel_scale": channel_scale}
            return QuantizedLinear.from_float(self.matrix, **settings)
        by = channel_scale if self.patches is None else self.patches.weight_scale(channel_scale)
        weight, bias = self.matrix
        codes, scale = quantize_weight(weight.detach(), per_channel=per_channel, channel_scale=by)
        bias = None if bias is None else bias.detach().float()
        return self.with_codes(codes, scale, bias, dtype=self.dtype, channel_scale=channel_scale, **settings)

    def with_codes(self, codes: Tensor, scale: Tensor, bias: Tensor | None, **settings: Any) -> PackedWeights:
        """The int8 layer of these codes (N, K), with the settings of a QuantizedLinear."""
        own = self.kind.with_codes(self.module, codes, scale, bias, **settings)
        return QuantizedLinear(codes, scale, bias, **settings) if own is None else own

    @property
    def trained(self) -> Trained | None:
        """How the layer was trained to be quantized; None for a plain float layer."""
        form = self.kind.training_form(self.module, self.part)
        return None if form is None else form.trained

    @property
    def is_ready(self) -> bool:
        """Whether its range is known, if it was to be trained."""
        form = self.kind.training_form(self.module, self.part)
        return form is None or form.input_range.is_ready()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.kind.weight(self.module, self.part).dtype

    @property
    def out_features(self) -> int:
        """N."""
        return self.kind.weight(self.module, self.part).shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.kind.weight(self.module, self.part).shape[1:].numel()


def type_of(module: nn.Module) -> ModuleType | None:
    """The type of this module; None if it has none, and stays as it is. What torch.jit compiled has none.

    >>> type_of(nn.Linear(2, 2)).name, type_of(nn.ReLU())
    ('nn.Linear', None)
    """
    if isinstance(module, torch.jit.ScriptModule):
        return None
    return next((kind for kind in TYPES if kind.matches(module)), None)


def type_names() -> str:
    """The names of all types as a user knows them, for messages: nn.Linear, and the others."""
    return ", ".join(dict.fromkeys([LinearType.name, *(kind.name for kind in TYPES)]))


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Every matrix of a module of a registered type, by name, in model order. A shared module goes by its first name.

    The children of such a module belong to it, and are not searched.
    """
    layers: dict[str, Layer] = {}
    inside: str | None = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        kind = type_of(module)
        inside = None if kind is None else f"{path}." if path else ""
        layers.update({layer.name: layer for layer in layers_of(path, module)})
    return layers


def layers_of(path: str, module: nn.Module) -> list[Layer]:
    """The matrices of this module, whose name in the model is `path`; none if it has no registered type."""
    kind = type_of(module)
    return [] if kind is None else [Layer(path, part, module, kind) for part in kind.matrices(module)]
