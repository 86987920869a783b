"""Real int8 speed for PyTorch models on a CPU, in eager mode, in one call: `torchq.convert(model, calib_loader)`."""

from torchq import kernels as kernels
from torchq import observers as observers
from torchq import ops as ops
from torchq.config import QConfig as QConfig
from torchq.convert import convert as convert
from torchq.drift import watch_drift as watch_drift
from torchq.modules.linear import QuantizedLinear as QuantizedLinear
from torchq.modules.linear import simulate as simulate
from torchq.profile import profile_layers as profile_layers
from torchq.qat import freeze_ranges as freeze_ranges
from torchq.qat import prepare_qat as prepare_qat
from torchq.qparams import choose_qparams as choose_qparams
from torchq.qparams import dequantize as dequantize
from torchq.qparams import fake_quantize as fake_quantize
from torchq.qparams import quantize as quantize
from torchq.report import report as report

__version__ = "0.1.0"
