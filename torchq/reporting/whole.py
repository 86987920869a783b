"""The whole model, and not only its layers: what it takes before and after, and what of it stayed in float."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from torchq.modules.base import bytes_of, own_tensors
from torchq.modules.packed_weights import PackedWeights
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.registry import type_of
from torchq.planning.plan import Plan
from torchq.text import to_json

_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)

_ADVICE: dict[type, str] = {
    nn.modules.conv._ConvNd: "transposed convolutions stay in float; one whose kernel is as wide as its stride is an "
    "nn.Linear and a rearranged output, which becomes int8",
    parametrize.ParametrizationList: "a weight is computed of them, for a module that stays in float",
    torch.jit.ScriptModule: "torch.jit compiled it; convert the model before torch.jit.script or torch.jit.trace",
    nn.Module: "parameters of its own: what it multiplies by becomes int8 if an nn.Linear, one for each matrix, or an "
    "nn.Bilinear holds it and is called",
}
"""Of modules that hold matrices which no layer of the plan is: why they are float, and what helps."""


@dataclass(frozen=True)
class LeftInFloat:
    """All modules of one type that hold parameters or buffers in float.

    Args:
        kind: the name of the type; of a module with modules inside, the parameters that are its own.
        modules: how many.
        bytes: of their own parameters and buffers.
        matrices: the names of those parameters that may be weights of matrix products, and belong to no layer of the
            plan, which has its own reason.
        advice: how these could become int8, or why they can't.
    """

    kind: str
    modules: int
    bytes: int
    matrices: tuple[str, ...] = ()
    advice: str | None = None


@dataclass(frozen=True)
class WholeModel:
    """Sizes of the whole model. What several modules share is counted once.

    Args:
        bytes_before: all parameters and buffers of the float model.
        bytes_after: the same now.
        int8_weights: how many weights of matrix products are int8.
        weights: how many there are. A parameter with two or more dimensions counts as one of a matrix product, be it of
            a convolution, a recurrent layer or the model's own; an embedding's table does not.
        left: what stayed in float, the largest first.
        output_db: SQNR of the model's output in dB, where `convert` measured it.
    """

    bytes_before: int
    bytes_after: int
    int8_weights: int
    weights: int
    left: tuple[LeftInFloat, ...] = ()
    output_db: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        data: dict[str, Any] = to_json(asdict(self))
        return data


def whole_model(qmodel: nn.Module, plan: Plan) -> WholeModel:
    """What `qmodel` is made of.

    >>> from torchq.conversion import convert
    >>> whole = whole_model(qmodel := convert(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))), qmodel.torchq_plan)
    >>> whole.bytes_before, whole.weights
    (17152, 4096)
    >>> whole.left
    (LeftInFloat(kind='LayerNorm', modules=1, bytes=512, matrices=(), advice=None),)
    """
    holders: dict[str, list[nn.Module]] = {}
    sizes: dict[str, int] = {}
    after = grown = int8 = weights = 0
    for module, tensor in own_tensors(qmodel):
        after += bytes_of(tensor)
        if isinstance(module, PackedWeights):
            if tensor is module._buffers.get("packed"):  # a tied table has none, and may have buffers of its own
                multiplies = isinstance(module, (QuantizedLinear, QuantizedConv))
                int8 += module.out_features * module.in_features if multiplies else 0
                grown += module.int8_bytes - module.float_bytes
            continue
        kind = type(module).__name__ + ("'s own parameters" if module._modules else "")
        holders.setdefault(kind, []).append(module)
        sizes[kind] = sizes.get(kind, 0) + bytes_of(tensor)
        weights += tensor.numel() if _is_matrix(module, tensor) else 0
    paths = {id(module): path for path, module in qmodel.named_modules()}
    left = [_left(kind, list(dict.fromkeys(holders[kind])), size, paths) for kind, size in sizes.items()]
    before = after - grown if plan.model_bytes is None else plan.model_bytes
    left.sort(key=lambda each: -each.bytes)
    output_db = None if plan.checked is None else plan.checked.model_db
    return WholeModel(before, after, int8, weights + int8, tuple(left), output_db)


def _is_matrix(module: nn.Module, tensor: Any) -> bool:
    if sum(size > 1 for size in tensor.shape) < 2:
        return False
    tables = (own for name, own in module._parameters.items() if name.startswith("weight"))
    if isinstance(module, _LOOKED_UP) and any(tensor is table for table in tables):
        return False
    if not isinstance(module, torch.jit.ScriptModule):
        return isinstance(tensor, nn.Parameter)
    own = {parameter.data_ptr() for parameter in module.parameters(recurse=False)}  # a copy's are plain tensors
    return tensor.data_ptr() in own and module.original_name not in {kind.__name__ for kind in _LOOKED_UP}


def _left(kind: str, modules: list[nn.Module], size: int, paths: dict[int, str]) -> LeftInFloat:
    others = [module for module in modules if type_of(module) is None]
    matrices = [
        ".".join(filter(None, (paths[id(module)], name)))
        for module in others
        for name, parameter in module._parameters.items()
        if parameter is not None and _is_matrix(module, parameter)
    ]
    advice = next(text for kind_of, text in _ADVICE.items() if isinstance(others[0], kind_of)) if matrices else None
    return LeftInFloat(kind, len(modules), size, tuple(matrices), advice)
