"""watch_drift(): does inference still see the values that calibration saw?

A static layer clips what lies outside its calibrated range. Some clipping is meant (percentile); much more of it than
in calibration means that the data have moved, and that the layer should be calibrated again on such data.

    with torchq.watch_drift(qmodel) as drift:
        serve(qmodel)
    print(drift)                                # recalibrate layer 'fc1': ...
    print(torchq.report(qmodel, drift=drift))   # the same, beside the rest

Inside the `with`, forward hooks count; outside there are none, and a call costs what it cost before. Where a layer
takes u8 codes, clipped values can't be told from values that belong at the ends (the zeros of a ReLU are all code 0).
So they are counted where they are made: the layer before computes its output once more, in float32, which doubles its
time while watched. The counts are then exact, and mean the same for every layer.

Hooks need eager calls: watch the model itself, not what torch.compile or torch.export made of it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchq import ops
from torchq.errors import BadValueError, door
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.numerics.metrics import count_clipped
from torchq.numerics.qparams import QParams
from torchq.planning.plan import Plan, attached_plan

THRESHOLD = 0.001
"""A layer has drifted when it clips this share of all values more than in calibration.

0.1 %: one channel in a thousand. Transformers have about one outlier channel in a thousand, and clipping just these
ruins them; data like those calibrated on stay below it once calibration has seen some thousands of values.
"""

MIN_CLIPPED = 10
"""How many more values than in calibration must be clipped for a drift: fewer may be chance."""


@dataclass
class LayerDrift:
    """What one static layer was given: all values, and those clipped (`stats.count_clipped`) below and above its range.

    Args:
        calibrated: the share of values clipped in calibration.
    """

    calibrated: float
    values: int = 0
    below: int = 0
    above: int = 0

    @property
    def share(self) -> float:
        """The share of values clipped, on either side; 0 if there were none."""
        return (self.below + self.above) / max(1, self.values)

    def count(self, x: Tensor, qparams: QParams) -> None:
        """Adds the values of x."""
        below, above = count_clipped(x, qparams)
        self.values, self.below, self.above = self.values + x.numel(), self.below + below, self.above + above


@dataclass
class Drift:
    """The counts of every static layer, by name. Prints what to do about them."""

    threshold: float
    layers: dict[str, LayerDrift] = field(default_factory=dict)

    def drifted(self, name: str) -> bool:
        """Whether this layer clips more than it should: `THRESHOLD` and `MIN_CLIPPED` say how much that is."""
        layer = self.layers[name]
        more = layer.share - layer.calibrated
        return more > self.threshold and more * layer.values >= MIN_CLIPPED

    @property
    def recalibrate(self) -> tuple[str, ...]:
        """The layers that have drifted."""
        return tuple(name for name in self.layers if self.drifted(name))

    def advice(self, name: str) -> str | None:
        """What to do about this layer, with the numbers; None if nothing."""
        layer = self.layers.get(name)
        if layer is None or not self.drifted(name):
            return None
        below, above = layer.below / layer.values, layer.above / layer.values
        return (
            f"recalibrate layer {name!r}: {layer.share:.2%} of {layer.values} values clipped ({below:.2%} below its "
            f"range, {above:.2%} above), {layer.calibrated:.2%} in calibration"
        )

    def __str__(self) -> str:
        lines = [advice for advice in map(self.advice, self.layers) if advice is not None]
        return "\n".join(lines) or f"no drift in {len(self.layers)} static layers"


@door("torchq.watch_drift")
def watch_drift(qmodel: nn.Module, *, threshold: float = THRESHOLD) -> AbstractContextManager[Drift]:
    """Inside, counts what every static layer clips. The counts are in the `Drift` it gives, also afterwards.

    Args:
        qmodel: from `torchq.convert`. Its outputs stay the same, bit for bit.
        threshold: how much larger a share of the values than in calibration may be clipped; `drift.THRESHOLD` says why.

    Raises:
        ValueError: `qmodel` did not come from `torchq.convert`, or the threshold is not in [0, 1).

    >>> from torchq import QConfig, convert
    >>> x = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    >>> qmodel = convert(nn.Linear(64, 64), [x], config=QConfig(activation="static", observer="minmax"))
    >>> with watch_drift(qmodel) as drift:
    ...     _ = qmodel(x)
    >>> print(drift)
    no drift in 1 static layers
    >>> with watch_drift(qmodel) as drift:
    ...     _ = qmodel(x + 0.5)
    >>> drift.recalibrate
    ('',)
    """
    if not 0 <= threshold < 1:
        raise BadValueError(f"threshold must be a share in [0, 1), got {threshold}. Try {THRESHOLD}.")
    return _watching(qmodel, attached_plan(qmodel), threshold)


@contextmanager
def _watching(qmodel: nn.Module, plan: Plan, threshold: float) -> Iterator[Drift]:
    plans, drift, handles = plan.layers, Drift(threshold), []
    feeders = {planned.feeds: name for name, planned in plans.items()}
    for name, planned in plans.items():
        layer = qmodel.get_submodule(name)
        if not isinstance(layer, QuantizedLinear) or layer.input_qparams is None:
            continue
        drift.layers[name] = LayerDrift(0.0 if planned.stats is None else planned.stats.clipped)
        count = partial(drift.layers[name].count, qparams=layer.input_qparams)
        if layer.takes_codes:
            feeder = cast(QuantizedLinear, qmodel.get_submodule(feeders[name]))
            hook = partial(_count_output, count)
        else:
            feeder, hook = layer, partial(_count_input, count)
        handles.append(feeder.register_forward_pre_hook(hook))
    try:
        yield drift
    finally:
        for handle in handles:
            handle.remove()


def _count_input(count: Callable[[Tensor], None], layer: QuantizedLinear, args: tuple[Any, ...]) -> None:
    count(args[0])


def _count_output(count: Callable[[Tensor], None], layer: QuantizedLinear, args: tuple[Any, ...]) -> None:
    """On the layer that gives the codes: counts its output in float32, before it becomes codes."""
    scale, zero_point = cast(QParams, layer.input_qparams)
    count(ops.linear_static(args[0], layer.packed, scale, zero_point, torch.float32, activation=layer.activation))
