"""Calibration: run the loader through the float model, and fill one record per layer.

A record holds what the plan decides from: observers of the layer's input (constant memory), a bounded random sample of
its input rows, and how often it was called. Its size does not depend on the number of batches.
"""

import inspect
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

from torchq.calibration.dataflow import Dataflow
from torchq.calibration.record import Record
from torchq.config import QConfig

MIN_ROWS = 16
"""Fewer input rows of a layer are a warning of `convert`: the largest of n + 1 is the new one once in n + 1 times."""


Forward = Callable[[nn.Module, Any], object]


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
