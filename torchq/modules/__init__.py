"""The int8 modules, their training forms, and the registry of the float modules they replace."""

from torchq.modules.quantized_linear import QuantizedLinear, simulate

__all__ = ["QuantizedLinear", "simulate"]
