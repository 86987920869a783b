"""Calibration: run the loader through the float model, and fill one record per layer.

A record holds what the plan decides from: observers of the layer's input (constant memory), a bounded random sample of
its input rows, and how often it was called. Its size does not depend on the number of batches.
"""

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchq.config import QConfig
from torchq.dataflow import Dataflow
from torchq.observers import Histogram, Observer, make_observer, share

SAMPLE_BYTES = 2 * 2**20
"""The most one layer's sample may hold, whatever `QConfig.sample_rows` says."""

MAX_GRAM_DEPTH = {"nearest": 0, "auto": 1024, "gptq": 4096}
"""By `QConfig.rounding`: the most inputs of a layer for which XᵀX is kept. 4096 are 64 MiB and seconds of rounding."""

ROWS_PER_CHANNEL = 20
"""Rows seen for each input channel, from which on a new one seldom leaves the range of any (`Record.judged`)."""

GRAM_ROWS = 4
"""XᵀX takes in the first 4 K input rows of a layer: enough for its K x K numbers, at a cost that more batches keep."""

MIN_ROWS = 16
"""Fewer input rows of a layer are a warning of `convert`: the largest of n + 1 is the new one once in n + 1 times."""

Forward = Callable[[nn.Module, Any], object]


class Sample:
    """A uniform random sample of at most `capacity` rows of a stream: Vitter's algorithm R (ACM TOMS 1985).

    Seeded, so that the same data gives the same plan.

    >>> sample = Sample(capacity=2)
    >>> sample.add(torch.arange(12.0).reshape(4, 3))
    >>> sample.rows.shape, sample.seen
    (torch.Size([2, 3]), 4)
    >>> sample.positions.tolist()
    [0, 2]
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.seen = capacity, 0
        self._kept: Tensor | None = None
        self._positions = torch.zeros(capacity, dtype=torch.long)
        self._generator = torch.Generator().manual_seed(0)

    @property
    def rows(self) -> Tensor:
        """The sample, (rows, K)."""
        return torch.empty(0, 0) if self._kept is None else self._kept[: min(self.seen, self.capacity)]

    @property
    def positions(self) -> Tensor:
        """Where in the stream each of the rows stood."""
        return self._positions[: min(self.seen, self.capacity)]

    def add(self, rows: Tensor) -> None:
        """Offers rows (n, K); each row seen so far is kept with equal probability."""
        if self._kept is None:
            self._kept = rows.new_empty(self.capacity, rows.shape[1])
        index = torch.arange(self.seen, self.seen + rows.shape[0])
        draw = torch.rand(rows.shape[0], generator=self._generator, dtype=torch.float64)
        slot = torch.where(index < self.capacity, index, (draw * (index + 1)).long())
        hits = (slot < self.capacity).nonzero().flatten()
        last = dict(zip(slot[hits].tolist(), hits.tolist(), strict=True))  # of the rows for one slot, the last stays
        slots, chosen = torch.tensor(list(last), dtype=torch.long), torch.tensor(list(last.values()), dtype=torch.long)
        self._kept[slots] = rows[chosen]
        self._positions[slots] = index[chosen]
        self.seen += rows.shape[0]


@dataclass
class Record:
    """What calibration saw of one layer.

    Args:
        seen: all values of its input: one histogram for all observers if `config.observer` is "auto", or the one asked
            for.
        sample: some rows of its input.
        config: which observers.
        calls: how often it was called.
    """

    seen: Observer
    sample: Sample
    config: QConfig
    calls: int = 0
    extremes: Tensor | None = None
    """The smallest and the largest value of each input channel, (2, K)."""
    gram: Tensor | None = None
    """XᵀX of the first `gram_rows` rows, float32 (K, K); None unless weights are to be rounded by it."""
    gram_rows: int = 0
    half: Tensor | None = None
    """The rows that made the ranges, where they are not the sample (`judged`)."""

    @classmethod
    def empty(cls, layer: nn.Linear, config: QConfig) -> "Record":
        """A record that has seen nothing, for the observers `config` asks for."""
        rows = max(1, min(config.sample_rows, SAMPLE_BYTES // (4 * max(1, layer.in_features))))
        wanted = layer.in_features <= MAX_GRAM_DEPTH[config.rounding]
        gram = torch.zeros(layer.in_features, layer.in_features) if wanted else None
        return cls(_make_seen(config), Sample(rows), config, gram=gram)

    @property
    def observers(self) -> dict[str, Observer]:
        """The observers that `config` asks for, by name, as of now."""
        if isinstance(self.seen, Histogram) and self.config.observer == "auto":
            return share(self.seen, percentile=self.config.percentile)
        return {self.config.observer: self.seen}

    @property
    def has_data(self) -> bool:
        """Whether any value was seen; a layer may have been called with empty inputs only."""
        return self.seen.count > 0

    def observe(self, x: Tensor) -> None:
        """Takes one call's input, (..., in_features)."""
        rows = x.detach().float().reshape(math.prod(x.shape[:-1]), x.shape[-1])
        self.seen.observe(rows)
        self.sample.add(rows)
        self.calls += 1
        if self.gram is not None and self.gram_rows < GRAM_ROWS * rows.shape[1]:
            first = rows[: GRAM_ROWS * rows.shape[1] - self.gram_rows]
            self.gram.addmm_(first.T, first)
            self.gram_rows += len(first)
        if len(rows) > 0:
            lo, hi = rows.amin(dim=0), rows.amax(dim=0)  # a tenth of the time of aminmax(dim=0)
            if self.extremes is not None:
                lo, hi = torch.minimum(lo, self.extremes[0]), torch.maximum(hi, self.extremes[1])
            self.extremes = torch.stack([lo, hi])

    @property
    def peak(self) -> Tensor:
        """max|x_j| of each input channel, (K,); needs data."""
        return torch.empty(0) if self.extremes is None else self.extremes.abs().amax(dim=0)

    def judged(self) -> "Record":
        """The record itself where its rows are many; where they are few, one whose ranges saw half of the sample, to be
        measured on the other half.

        The range of each channel is what smoothing divides by, and a new row is beyond it in K / n channels on
        average, n being the rows seen: every range fits the rows that made it, and no others.
        """
        rows = self.sample.rows
        if self.sample.seen >= ROWS_PER_CHANNEL * rows.shape[1] or len(rows) < 2:
            return self
        return self._of(rows[::2], rows[1::2])

    def smoothed(self, scales: Tensor) -> "Record":
        """What calibration would have seen of inputs divided by `scales` (K,).

        Exact for the min-max range; the other observers see the sample instead of all rows.
        """
        record = self._of(self.observed / scales, self.sample.rows / scales)
        if self.config.observer in ("auto", "minmax") and self.extremes is not None:
            record.seen.observe(self.extremes / scales)
        return record

    @property
    def observed(self) -> Tensor:
        """Rows that made the ranges: the sample, or its half in a `judged` record."""
        return self.sample.rows if self.half is None else self.half

    def _of(self, observed: Tensor, sample: Tensor) -> "Record":
        """A record whose ranges have seen `observed`, to be measured on `sample`."""
        record = Record(_make_seen(self.config), Sample(max(1, len(sample))), self.config, half=observed)
        record.observe(observed)
        record.sample = Sample(max(1, len(sample)))
        record.sample.add(sample)
        return record


def _make_seen(config: QConfig) -> Observer:
    name = config.observer
    return Histogram() if name == "auto" else make_observer(name, percentile=config.percentile)


@dataclass
class Calibration:
    """The records, by layer name, and how often each nn.Sequential and each of its children was called.

    Equal counts prove that the children ran as parts of their Sequential, in order, and in no other way. `readers` are
    the layers that read a module's output, for each module of which it is proven that nothing else does.
    """

    records: dict[str, Record]
    calls: Counter[str]
    batches: int = 0
    readers: dict[str, tuple[str, ...]] = field(default_factory=dict)


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Mapping[str, nn.Linear],
    config: QConfig,
    *,
    forward: Forward | None = None,
    progress: bool | None = None,
    function: str = "torchq.convert",
) -> Calibration:
    """Runs every batch of `loader` through `model`, in eval mode and without gradients, and records `layers`' inputs.

    The model is left as it was: hooks removed, training flags restored, also when a batch fails. What the loader may
    give:

    * batches of any and of different sizes, sequence lengths and leading dimensions: a layer's rows are what counts,
      so they give what the same rows in one batch would;
    * constant values, a constant channel, nothing but zeros: all ranges are finite, and zero stays exact;
    * a layer called twice in a forward, or under two names, is one layer that saw the rows of all calls; a weight that
      two layers share is quantized for each by its own rows;
    * a layer that only training calls is one that no batch reaches (see `make_plan`).

    Args:
        model: the float model.
        loader: an iterable of batches: tensors, tuples whose leading elements `model.forward` requires, or dicts of
            its keyword arguments (keys it does not know, such as labels, are left out).
        layers: the layers to record, by name.
        config: which observers, and how many sample rows.
        forward: `forward(model, batch)` instead of that rule.
        progress: a progress bar: None shows it on a terminal only.
        function: whose errors they are.

    Raises:
        ValueError: the loader yields nothing, or a layer's input has NaN or infinity (the message names the layer and
            the batch).
        TypeError: a batch is none of the above and there is no `forward`.
    """
    if not isinstance(loader, Iterable):
        raise TypeError(f"{function}: calib_loader must be an iterable of batches, got {type(loader).__name__}.")
    calibration = Calibration({name: Record.empty(layer, config) for name, layer in layers.items()}, Counter())
    run = forward or partial(call_with_batch, function=function)
    dataflow = Dataflow(model, layers if config.smoothing == "auto" else {})
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(dataflow.watching())  # first: recording an input is not a use of it
        stack.enter_context(_recording(function, model, layers, calibration, dataflow))
        for batch in tqdm(loader, desc="torchq: calibrating", disable=None if progress is None else not progress):
            run(model, batch)
            calibration.batches += 1
            dataflow.end_batch()
    calibration.readers = dataflow.readers
    if calibration.batches == 0:
        raise ValueError(
            f"{function}: calib_loader yielded no batch. Pass a loader with data (an iterator can be used up only "
            "once), or none at all for dynamic quantization (with prepare_qat: for observed ranges)."
        )
    return calibration


def warn_of_few_rows(records: Mapping[str, Record]) -> None:
    """One warning, for the caller of `convert`, if a layer saw any input rows, but fewer than MIN_ROWS."""
    few = {name: record.sample.seen for name, record in records.items() if 0 < record.sample.seen < MIN_ROWS}
    if not few:
        return
    name, rows = min(few.items(), key=lambda item: item[1])
    warnings.warn(
        f"torchq.convert: {len(few)} of {len(records)} layers saw fewer than {MIN_ROWS} rows (samples, or tokens) "
        f"of calib_loader, {name!r} the fewest: {rows}. What so few rows choose may not suit other data: 1 new row in "
        f"{rows + 1}, or more, is to be expected outside of their range. Pass more data, a hundred samples or more, or "
        "none at all for dynamic quantization.",
        stacklevel=3,  # the caller of convert()
    )


def call_with_batch(model: nn.Module, batch: Any, *, function: str = "torchq.convert") -> object:
    """Calls `model` with a batch as loaders give them: a tensor, (input, label, ...), or a dict of arguments.

    Errors are those of `function`.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    parameters = inspect.signature(model.forward).parameters
    if isinstance(batch, Mapping):
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return model(**{key: value for key, value in batch.items() if takes_all or key in parameters})
    if isinstance(batch, (tuple, list)):
        positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        required = max(1, sum(p.default is p.empty for p in positional))
        if len(batch) < required:
            raise ValueError(
                f"{function}: {type(model).__name__}.forward requires {required} inputs, a batch of calib_loader "
                f"has {len(batch)} elements. Pass forward=lambda model, batch: ... to say how to call it."
            )
        return model(*batch[:required])
    raise TypeError(
        f"{function}: calib_loader gave a batch of type {type(batch).__name__}; expected a tensor, a tuple or a "
        "dict. Pass forward=lambda model, batch: ... to say how to call the model with it."
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and no fused attention path, which would bypass the layers' own forward."""
    training = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, flag in training.items():
            module.training = flag


@contextmanager
def _recording(
    function: str, model: nn.Module, layers: Mapping[str, nn.Linear], calibration: Calibration, dataflow: Dataflow
) -> Iterator[None]:
    def record(name: str) -> Callable[..., None]:
        def hook(layer: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if x is None or not _fits(layer, x):
                return  # the layer itself will say what is wrong with it
            try:
                with dataflow.paused():
                    calibration.records[name].observe(x)
            except ValueError as error:
                raise ValueError(
                    f"{function}: layer {name!r} got an input that is not finite in batch {calibration.batches} of "
                    f"calib_loader: {error}"
                ) from error

        return hook

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            calibration.calls[name] += 1

        return hook

    handles = [layer.register_forward_pre_hook(record(name), with_kwargs=True) for name, layer in layers.items()]
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Sequential) or isinstance(parent, nn.Sequential):
            handles.append(module.register_forward_pre_hook(count(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fits(layer: nn.Linear, x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.device.type == "cpu"
        and x.shape[-1:] == (layer.in_features,)
    )
