"""watch_drift(): checks whether inference still sees the range of values that calibration saw.

A static layer clips values outside its calibrated range. Some clipping is intended (percentile). If a layer clips much
more than in calibration, the data have drifted, and the layer should be calibrated again on the new data.

    with torchq.watch_drift(qmodel) as drift:
        serve(qmodel)
    print(drift)                                # recalibrate layer 'fc1': ...
    print(torchq.report(qmodel, drift=drift))   # the same, as part of the report

Forward hooks count inside the `with`. Outside there are none, and calls cost nothing extra. A layer that is
watched gets floats where it takes u8 codes else, and makes the same codes of them. So the counts mean the same for
every layer.

Hooks need eager calls: watch the model itself, not the result of torch.compile or torch.export.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from torchq.errors import BadValueError, door
from torchq.modules.int8_sequential import Watch
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.numerics.metrics import count_clipped
from torchq.numerics.qparams import QParams
from torchq.planning.plan import Plan, attached_plan

THRESHOLD = 0.001
"""A layer has drifted when the share of clipped values exceeds that in calibration by more than this.

0.1 % is one channel in a thousand. Transformers have about one outlier channel in a thousand, and clipping only these
ruins them. Data like the calibration data stay below the threshold if calibration had at least some thousand values.
"""

MIN_CLIPPED = 10
"""A drift needs at least this many clipped values beyond the share in calibration: fewer may be chance."""


@dataclass
class LayerDrift:
    """The inputs of one static layer: how many values in all, and clipped below and above its range (`count_clipped`).

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
    """The counts of every static layer, by name. Prints which layers to calibrate again."""

    threshold: float
    layers: dict[str, LayerDrift] = field(default_factory=dict)

    def drifted(self, name: str) -> bool:
        """Whether this layer clips too much: by more than `threshold`, and at least `MIN_CLIPPED` values."""
        layer = self.layers[name]
        more = layer.share - layer.calibrated
        return more > self.threshold and more * layer.values >= MIN_CLIPPED

    @property
    def recalibrate(self) -> tuple[str, ...]:
        """The layers that have drifted."""
        return tuple(name for name in self.layers if self.drifted(name))

    def advice(self, name: str) -> str | None:
        """The advice to calibrate this layer again, with the numbers; None if it has not drifted."""
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
    """Inside, counts the values that every static layer clips. The counts stay in the `Drift` it yields.

    Args:
        qmodel: from `torchq.convert`. Its outputs stay the same, bit for bit.
        threshold: how far the share of clipped values may exceed that in calibration. `drift.THRESHOLD` explains the
            default.

    Raises:
        ValueError: `qmodel` did not come from `torchq.convert`, or the threshold is not in [0, 1).

    >>> import torch
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
    drift = Drift(threshold)
    with ExitStack() as stack:
        for name, planned in plan.layers.items():
            layer = qmodel.get_submodule(name)
            if not isinstance(layer, (QuantizedLinear, QuantizedConv)) or layer.input_qparams is None:
                continue
            drift.layers[name] = LayerDrift(0.0 if planned.stats is None else planned.stats.clipped)
            count = partial(drift.layers[name].count, qparams=layer.input_qparams)
            scale = layer.channel_scale
            if scale is not None and isinstance(layer, QuantizedConv):  # channels are no longer last
                scale = scale.reshape(-1, *[1] * layer.dimensions)
            stack.enter_context(layer.register_forward_pre_hook(Watch(partial(_count, count, scale))))
        yield drift


def _count(count: Callable[[Tensor], None], channel_scale: Tensor | None, x: Tensor) -> None:
    """Counts what the layer quantizes."""
    count(x if channel_scale is None else x.float() * channel_scale)
