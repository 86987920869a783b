"""nn.Bilinear as a module type, in training and in int8.

    y[o] = x1 · W[o] · x2 + b[o]        x1 (..., I), x2 (..., J), W (O, I, J)

Its one matrix, `product`, is W as (O · I, J), with a scale for each row. It multiplies the second input. The sums over
I of the products with the first input are in float32.
"""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchq.modules.base import Int8Module, Matrix
from torchq.modules.computed_weights import weight_of
from torchq.modules.float_view import read_only
from torchq.modules.qat_parts import QATParts, TrainableParts, TrainedParts
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.tracing import Leaf

_PART = "product"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Pairing(nn.Bilinear):
    """The forward of an nn.Bilinear whose product with the second input is called by itself."""

    def multiplied(self, part: str, x: Tensor) -> Tensor:
        """The product of x (..., J) with the matrix: (..., O · I)."""
        raise NotImplementedError(f"{type(self).__name__} has no products")

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """(..., in1_features) and (..., in2_features) -> (..., out_features), in the dtype of the inputs.

        Raises:
            TypeError: an input that is not float32, bfloat16 or float16, or two of different dtypes.
            ValueError: other shapes.
        """
        if input1.dtype != input2.dtype or input1.dtype not in _FLOATS:
            raise TypeError(
                "nn.Bilinear: both inputs must be float32, bfloat16 or float16, and of one dtype, got "
                f"{input1.dtype} and {input2.dtype}."
            )
        sizes = (input1.shape[-1:], input2.shape[-1:])
        if sizes != ((self.in1_features,), (self.in2_features,)) or input1.shape[:-1] != input2.shape[:-1]:
            raise ValueError(
                f"nn.Bilinear: the inputs must be (..., {self.in1_features}) and (..., {self.in2_features}) with the "
                f"same leading dimensions, got {tuple(input1.shape)} and {tuple(input2.shape)}."
            )
        with torch.autocast(input1.device.type, enabled=False):
            products = self.multiplied(_PART, input2.float()).unflatten(-1, (self.out_features, self.in1_features))
            y = torch.matmul(products, input1.float().unsqueeze(-1)).squeeze(-1)
            return (y if self.bias is None else y + self.bias.float()).to(input1.dtype)


class QuantizedBilinear(Leaf, Int8Module, Pairing):
    """nn.Bilinear in int8: the same call and attributes, the same results to the error of int8.

    `weight` is a read-only float view of what the layer `product` holds. Gradients reach both inputs.

    Args:
        module: the float module.
        parts: a QuantizedLinear for `product`.

    >>> from torchq import convert
    >>> pair = convert(nn.ModuleList([nn.Bilinear(32, 64, 16)]))[0]
    >>> pair(torch.ones(5, 32), torch.ones(5, 64)).shape, pair.weight.shape
    (torch.Size([5, 16]), torch.Size([16, 32, 64]))
    """

    def __init__(self, module: nn.Bilinear, parts: Mapping[str, nn.Module]) -> None:
        nn.Module.__init__(self)
        self.in1_features, self.in2_features = module.in1_features, module.in2_features
        self.out_features = module.out_features
        self.bias = copy.deepcopy(module.bias)
        self.product = cast(QuantizedLinear, parts[_PART])

    def multiplied(self, part: str, x: Tensor) -> Tensor:
        """The product of x with the matrix."""
        return self.product(x)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The weight (out_features, in1_features, in2_features), read only."""
        return self.product.weight.unflatten(0, (self.out_features, self.in1_features))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise read_only(name)
        super().__setattr__(name, value)

    @property
    def float_bytes(self) -> int:
        """The bytes of weight and bias in the dtype of the float module."""
        return self.product.float_bytes + (0 if self.bias is None else self.bias.nbytes)


class QATBilinear(QATParts, Pairing):
    """nn.Bilinear in training: the product of its int8 form."""

    def matrix(self, part: str) -> Matrix:
        """The one that it has."""
        return Matrix(self.weight.flatten(0, 1), None)


class BilinearType(TrainableParts):
    """nn.Bilinear, and subclasses that keep its forward: one matrix (O · I, J)."""

    name = "nn.Bilinear"
    form = QATBilinear

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Bilinear) and not isinstance(module, Int8Module)

    def matrices(self, module: nn.Module) -> dict[str, Matrix]:
        return {_PART: Matrix(weight_of(module).flatten(0, 1), None)}

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {_PART: args[1] if len(args) > 1 else kwargs.get("input2")}

    def become(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        return QuantizedBilinear(cast(nn.Bilinear, module), parts)

    def why_float(self, module: nn.Module, parent: nn.Module) -> str | None:
        if type(module).forward is not nn.Bilinear.forward or "forward" in vars(module):
            return f"{type(module).__name__} has a forward of its own"
        return None


class QATBilinearType(TrainedParts, BilinearType):
    """What `prepare_qat` made of an nn.Bilinear."""
