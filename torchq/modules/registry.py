"""The registry of module types that can become int8: the only place where the stages of a conversion look them up."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchq.modules.base import Matrix, ModuleType, Trained
from torchq.modules.experts import ExpertsType
from torchq.modules.linear import LinearType, QATLinearType
from torchq.modules.linear_like import LinearLikeType
from torchq.modules.multihead_attention import MultiheadAttentionType
from torchq.modules.recurrent_types import CellType, RecurrentType

TYPES: list[ModuleType] = [
    QATLinearType(),
    LinearType(),
    MultiheadAttentionType(),
    *map(RecurrentType, (nn.LSTM, nn.GRU, nn.RNN)),
    *map(CellType, (nn.LSTMCell, nn.GRUCell, nn.RNNCell)),
    LinearLikeType(),
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

    >>> layers = find_layers(nn.Sequential(nn.Linear(8, 4), nn.ReLU()))
    >>> layers["0"].kind.name, layers["0"].in_features, layers["0"].out_features
    ('nn.Linear', 8, 4)
    """

    path: str
    part: str
    module: nn.Module
    kind: ModuleType

    @property
    def name(self) -> str:
        """The name in a plan, and of the QuantizedLinear in the converted model."""
        return ".".join(filter(None, (self.path, self.part)))

    @property
    def matrix(self) -> Matrix:
        """Weight (N, K) and bias (N,), in the model's dtype."""
        return self.kind.matrix(self.module, self.part)

    @property
    def weight(self) -> Tensor:
        """The weight (N, K)."""
        return self.matrix.weight

    @property
    def trained(self) -> Trained | None:
        """How the layer was trained to be quantized; None for a plain float layer."""
        return self.kind.trained(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.weight.dtype

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[1]


def type_of(module: nn.Module) -> ModuleType | None:
    """The type of this module; None if it has none, and stays as it is.

    >>> type_of(nn.Linear(2, 2)).name, type_of(nn.ReLU())
    ('nn.Linear', None)
    """
    return next((kind for kind in TYPES if kind.matches(module)), None)


def type_names() -> str:
    """The names of all types as a user knows them, for messages."""
    return ", ".join(dict.fromkeys(kind.name for kind in TYPES))


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
