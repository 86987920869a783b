"""ModuleType: what torchq must know about a kind of float module to calibrate, plan, convert and report it.

A module type is one file here and one entry in `registry.TYPES`. The stages of a conversion only use the entry; none
contains code for a particular kind of module. They decide about *matrices*. A matrix is one weight, in nn.Linear's
orientation, and the input it multiplies,

    y = x · weightᵀ + bias        x (..., K), weight (N, K), bias (N,) or None

A module has one or several matrices, and may store them transposed, stacked or packed. In the int8 module, each becomes
a QuantizedLinear.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchq.modules.float_view import FloatView
from torchq.modules.sparse import parts_of
from torchq.numerics.qparams import QParams

if TYPE_CHECKING:
    from torchq.modules.packed_weights import PackedWeights
    from torchq.modules.patches import Patches
    from torchq.modules.qat_linear import QATProduct
    from torchq.modules.ranges import InputRange


class Matrix(NamedTuple):
    """One weight (N, K) of a module and its bias (N,), in nn.Linear's orientation: views of the module's parameters."""

    weight: Tensor
    bias: Tensor | None


class Trained(NamedTuple):
    """How a matrix was trained to be quantized (`prepare_qat`).

    Args:
        input_qparams: the static range of its input; None for a range per token.
        per_channel: one weight scale per output channel, or one for all.
        origin: where the range came from, such as "learned range".
        channel_scale: what multiplies each channel of its input first, while the weight is divided by it; or None.
    """

    input_qparams: QParams | None
    per_channel: bool
    origin: str
    channel_scale: Tensor | None = None


class Int8Module(nn.Module, ABC):
    """The base class of int8 modules. A subclass says how many bytes the float module took."""

    float_key: str | None = None
    """The name of a parameter that the float module had and this one's checkpoint lacks; None if there is none."""

    @property
    @abstractmethod
    def float_bytes(self) -> int:
        """The bytes of its weights and biases in the dtype of the float module."""

    def group(self, part: str) -> str | None:
        """As `ModuleType.group`, for an int8 module of several parts."""
        return None

    def __prepare_scriptable__(self) -> None:
        """What torch.jit.script calls first."""
        raise RuntimeError(
            f"torchq: torch.jit.script can't compile a {type(self).__name__}. Trace the model, by "
            "torch.jit.trace(model, example), or export it, by torch.export.export(model, (example,))."
        )

    @property
    def int8_bytes(self) -> int:
        """The bytes it takes now: int8 weights, scales, biases, padding."""
        tensors = (*self.parameters(), *self.buffers())
        return sum({tensor: tensor.untyped_storage().nbytes() for tensor in tensors}.values())  # a FloatView has none


class ModuleType(ABC):
    """One kind of float module. Methods take the module as an argument, and change it only if they say so."""

    name: str
    """The type as a user knows it, for messages: "nn.Linear"."""

    routed = False
    """Whether a router chooses which of its matrices a row goes to."""

    absorbs: bool = False
    """Whether its int8 layer may include the norm behind it, and hand codes to another one wherever in the model."""

    attends: bool = False
    """Whether its int8 module computes attention itself, by a scheme of the plan (`OwnAttention`)."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is of this kind."""

    @abstractmethod
    def matrices(self, module: nn.Module) -> dict[str, Matrix]:
        """Its matrices by part: the name of a QuantizedLinear in the int8 module, or "" if it is the int8 module."""

    def matrix(self, module: nn.Module, part: str) -> Matrix:
        """One of them."""
        return self.matrices(module)[part]

    def weight(self, module: nn.Module, part: str) -> Tensor:
        """The weight of one of them, (N, ...) with K values for each output, in whatever order costs least."""
        return self.matrix(module, part).weight

    def group(self, part: str) -> str | None:
        """The name under which a report shows this part together with others: "*.down_proj" of all experts, or None."""
        return None

    @abstractmethod
    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """For each part, the input that a call with these arguments multiplies its weight by, as far as is known."""

    def patches(self, module: nn.Module) -> "Patches | None":
        """How rows are made of the input of a convolution; None where its last dimension is one."""
        return None

    @abstractmethod
    def become(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        """The int8 module made of `parts`. Each is a QuantizedLinear, or an nn.Linear if it stays in float."""

    def why_float(self, module: nn.Module, parent: nn.Module) -> str | None:
        """Why this module must stay in float, whatever the data; None if it need not."""
        return None

    def with_codes(
        self, module: nn.Module, codes: Tensor, scale: Tensor, bias: Tensor | None, **settings: Any
    ) -> "PackedWeights | None":
        """The int8 layer of int8 codes (N, K), with the settings of QuantizedLinear; None: it is a QuantizedLinear."""
        return None

    def takes_codes(self, module: nn.Module) -> bool:
        """Of a kind that `absorbs`: whether its int8 layer could be handed u8 codes, were it static."""
        return False

    def is_first_input(self, part: str) -> bool:
        """Whether this matrix multiplies the input of a module that feeds its output back, step after step."""
        return False

    # ---- Quantization-aware training -----------------------------------------------------------------------------

    def training_form(self, module: nn.Module, part: str) -> "QATProduct | None":
        """The product with this matrix as `prepare` made it; None for a plain float one."""
        return None

    def why_untrainable(self, module: nn.Module) -> str | None:
        """Why `prepare_qat` must leave it in float; None if `prepare` can turn it into its training form."""
        return f"{self.name} has no training form"

    def prepare(
        self,
        module: nn.Module,
        part: str,
        input_range: "InputRange",
        *,
        per_channel: bool,
        channel_scale: Tensor | None = None,
    ) -> None:
        """Turns `module` itself into its training form, and the product with this matrix into one on int8's values.

        To be called only if `why_untrainable` gives no reason.
        """
        raise TypeError(f"{self.name} has no training form")

    def release(self, module: nn.Module) -> None:
        """Turns a training form itself back into the plain float module. Leaves other modules unchanged."""
        return


def float_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or of the float module that a training form was."""
    kind: type[nn.Module] = vars(module).get("float_class", type(module))
    return kind


def why_opaque(module: nn.Module) -> str | None:
    """Why the values of its parameters are not for others to read; None if they are.

    torchao's quantized tensors, DTensor and their like hold them in a way of their own, and take few operations.
    """
    for name, parameter in module._parameters.items():
        if parameter is not None and is_traceable_wrapper_subclass(parameter):
            kind = type(parameter)
            return f"its {name} is a {kind.__module__}.{kind.__qualname__}, which holds its values in a way of its own"
    return None


def float_size(module: nn.Module) -> int:
    """The bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def model_bytes(model: nn.Module) -> int:
    """The bytes of all parameters and buffers of a model, shared ones once."""
    return sum(bytes_of(tensor) for _, tensor in own_tensors(model))


def bytes_of(tensor: Tensor) -> int:
    """The bytes of a tensor; those of its values and indices where it is sparse.

    >>> bytes_of(torch.eye(16)), bytes_of(torch.eye(16).to_sparse())
    (1024, 320)
    """
    parts = parts_of(tensor)
    return sum(part.nbytes for part in parts.values()) if parts else tensor.nbytes


def own_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """All parameters and buffers with the module that holds them; shared ones once, with the first that does.

    An int8 layer's views of its weight and bias take no bytes, and are left out.
    """
    seen = set()
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or is_lazy(tensor) or isinstance(tensor, FloatView):
                continue
            try:
                key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel())
            except (NotImplementedError, RuntimeError):  # sparse, and other tensors without a storage
                key = (id(tensor), 0, 0)
            if key not in seen:
                seen.add(key)
                yield module, tensor


MODULE_OWN = frozenset(vars(nn.Module()))
"""What nn.Module itself keeps in an instance: parameters, children, hooks. All else is the subclass's."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of weights and inputs that can be quantized."""
