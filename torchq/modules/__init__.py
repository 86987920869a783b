"""The int8 modules, their training forms, and the registry of the float modules they replace."""

from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.simulation import simulate

__all__ = ["QuantizedLinear", "simulate"]
