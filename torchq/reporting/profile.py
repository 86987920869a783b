"""profile_layers(): the time of each layer of a converted model, in float and in int8, at its calibration shape."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.functional import linear

from torchq import _C
from torchq.errors import door
from torchq.modules.convolving import convolved
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.quantized_linear import Codes, QuantizedLinear
from torchq.planning.plan import attached_plan
from torchq.timing import interleaved


@dataclass(frozen=True)
class LayerTime:
    """One layer's times on `rows` input rows (tokens): the mean number of rows per call in calibration.

    Of a convolution they are the places of its output, for the input that it was called with last.
    """

    rows: int
    float_seconds: float
    int8_seconds: float

    @property
    def speedup(self) -> float:
        """How many times faster int8 is."""
        return self.float_seconds / self.int8_seconds


@door("torchq.profile_layers")
@torch.no_grad()
def profile_layers(qmodel: nn.Module, *, rounds: int = 5) -> dict[str, LayerTime]:
    """Times every int8 layer and a float layer of the same shape and dtype, by name. `report` prints the times.

    Each layer runs alone, on random input in cache. Int8 and float are interleaved, and the best of `rounds` rounds
    counts. The int8 layer runs as planned: with its fused activation, and with u8 codes if it takes or gives them.
    The float time is torch's `linear` or `conv` only, while a sum that is a part of a convolution is in its int8 time.
    Layers in float are left out, and so are layers without calibration data, since their shape is not known.

    Args:
        qmodel: from `torchq.convert`.
        rounds: how many rounds; each takes about 20 ms for the int8 layer and 20 ms for the float layer.

    Raises:
        ValueError: `qmodel` did not come from `torchq.convert`, or `rounds` is less than 1.

    >>> from torchq.conversion import convert
    >>> times = profile_layers(convert(nn.Linear(64, 64), [torch.randn(32, 64)]), rounds=1)
    >>> times[""].rows, times[""].int8_seconds > 0
    (32, True)
    """
    if rounds < 1:
        raise ValueError(f"torchq.profile_layers: rounds must be at least 1, got {rounds}.")
    times = {}
    plans = attached_plan(qmodel).layers
    for name, plan in plans.items():
        if plan.stats is None:
            continue
        layer, reader = qmodel.get_submodule(name), qmodel.get_submodule(plan.feeds) if plan.feeds else None
        takes_codes = any(other.feeds == name for other in plans.values())
        if isinstance(layer, QuantizedLinear):
            times[name] = _time(layer, reader, takes_codes, plan.stats.rows, rounds)
        elif isinstance(layer, QuantizedConv) and plan.stats.input_shape is not None:
            times[name] = _time_conv(layer, reader, takes_codes, plan.stats.input_shape, rounds)
    return times


def _time(layer: QuantizedLinear, reader: nn.Module | None, takes_codes: bool, rows: int, rounds: int) -> LayerTime:
    x = torch.randn(rows, layer.in_features, dtype=torch.float32, device="cpu").to(layer.dtype)
    codes = torch.randint(256, (rows, layer.in_features), dtype=torch.uint8, device="cpu")
    weight = (layer.weight.t() if layer.transposed else layer.weight).contiguous().clone()
    bias = None if layer.bias is None else layer.bias.clone()
    made_in = layer.input_qparams if takes_codes else None
    given = x if made_in is None else codes
    stand_for = None if made_in is None else Codes(layer.dtype, made_in)
    y_qparams = reader.input_qparams if isinstance(reader, QuantizedLinear) else None
    activation = layer.fold.activation
    int8: Callable[[], object] = partial(layer.fused, x, activation)
    if type(layer) is QuantizedLinear:  # else the call takes no short cut
        int8 = partial(_C.call_fused, layer, QuantizedLinear, given, stand_for, activation, (), (), reader, y_qparams)
    calls: dict[str, Callable[[], object]] = {"float": partial(linear, x, weight, bias), "int8": int8}
    best = interleaved(calls, rounds=rounds)
    return LayerTime(rows, best["float"], best["int8"])


def _time_conv(
    layer: QuantizedConv, reader: nn.Module | None, takes_codes: bool, shape: tuple[int, ...], rounds: int
) -> LayerTime:
    geometry, fold = layer.geometry, layer.fold
    x = torch.randn(shape, dtype=torch.float32, device="cpu").to(layer.dtype)
    given = x
    if takes_codes:
        given = torch.randint(256, (shape[0], *shape[2:], shape[1]), dtype=torch.uint8, device="cpu")
    like = torch.empty(shape[0], layer.out_channels, *geometry.out_sizes(shape[2:]), dtype=layer.dtype, device="cpu")
    residual = torch.randn_like(like) if fold.adds else None
    y_qparams = reader.input_qparams if isinstance(reader, QuantizedConv) else None
    weight, bias = layer.weight.contiguous().clone(), None if layer.bias is None else layer.bias.clone()
    calls = {
        "float": partial(convolved, x, weight, bias, geometry),
        "int8": partial(layer.computed, like.dtype, False, given, fold.activation, residual, y_qparams),
    }
    best = interleaved(calls, rounds=rounds)
    return LayerTime(like.numel() // max(1, layer.out_channels), best["float"], best["int8"])
