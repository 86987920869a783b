"""Real int8 speed for PyTorch models on a CPU, in eager mode, in one call: `torchq.convert(model, calib_loader)`."""

import logging

from torchq import kernels, observers, ops
from torchq.compiling import compile_options
from torchq.config import QConfig
from torchq.conversion import convert
from torchq.files import load, save
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.simulation import simulate
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import choose_qparams, dequantize, fake_quantize, quantize
from torchq.planning.apply import apply_plan
from torchq.planning.plan import Plan
from torchq.planning.rounding import plan_of
from torchq.qat import freeze_ranges, prepare_qat
from torchq.reporting.drift import watch_drift
from torchq.reporting.profile import profile_layers
from torchq.reporting.report import report
from torchq.reporting.verification import verify

logging.getLogger("torchq").addHandler(logging.NullHandler())  # what convert decides; silent until asked for

__version__ = "0.2.0"

__all__ = [
    "Plan",
    "QConfig",
    "QuantizedLinear",
    "apply_plan",
    "choose_qparams",
    "compile_options",
    "convert",
    "dequantize",
    "fake_quantize",
    "freeze_ranges",
    "kernels",
    "load",
    "observers",
    "ops",
    "plan_of",
    "prepare_qat",
    "profile_layers",
    "quantize",
    "report",
    "save",
    "simulate",
    "sqnr_db",
    "verify",
    "watch_drift",
]


def __dir__() -> list[str]:
    """The public names. The packages they come from are not part of the interface."""
    return [*__all__, "__version__"]
