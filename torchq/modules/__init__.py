"""One file per module type."""

from torchq.modules.linear import QuantizedLinear as QuantizedLinear
from torchq.modules.linear import simulate as simulate
