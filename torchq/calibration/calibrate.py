"""Calibration: run the loader through the float model, and record the input of every layer."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from torchq.calibration.batches import Forward, call_with_batch, check_loader, has_forward, run_batch
from torchq.calibration.handovers import Handovers
from torchq.calibration.isolation import in_eval_mode, own_thread, uncompiled, without_fast_path
from torchq.calibration.lookups import Lookups
from torchq.calibration.readers import Readers
from torchq.calibration.record import GRAM_BYTES, GRAM_SHARE, Record
from torchq.calibration.sample import is_held_out
from torchq.calibration.sharing import Recorder
from torchq.calibration.weight_reads import WeightReads
from torchq.calibration.written_attention import WrittenAttention
from torchq.config import QConfig
from torchq.errors import BadTypeError, BadValueError
from torchq.modules.refusals import refuse_layout
from torchq.modules.registry import Layer
from torchq.scopes import callers_autocast
from torchq.watching import Watchers, unwatched

MIN_ROWS = 16
"""A layer with fewer input rows gets a warning.

After n rows, the next one has a probability of 1 / (n + 1) of holding a new largest value: 6 % after 16 rows.
"""


NO_BATCH = (
    "calib_loader yielded no batch. Pass a loader with data (an iterator can be used up only once), or none at all for "
    "dynamic quantization (with prepare_qat: for observed ranges)."
)

JUDGES = 2
"""How many batches the converted model is checked on."""


@dataclass
class Evidence:
    """What is known about a model when its plan is made. All stages of planning read it.

    Without calibration data, all but the first three are empty.

    Args:
        model: the float model.
        layers: the layers that can become int8, by name.
        config: how to quantize.
        records: what calibration recorded, by layer. Layers that read the same tensors share a record. Each of `layers`
            has one; without data, none has.
        activations: for each layer whose output an activation module alone reads, the name of that module.
        norms: for each convolution that includes the norm behind it, the name of that norm.
        chains: for each convolution, what follows it as the only reader each time (`Readers`).
        handovers: by convolution, those that alone read its output, or what keeps its memory format (`Handovers`).
        turned: the convolutions whose output is turned so that its channels lie last (`Handovers`).
        sums: by convolution, those that take the sum of its output with another one as their input (`Handovers`).
        batches: how many batches were run.
        batches_held_out: how many of them judge, and round no weight.
        run: runs the first batch through a model.
        judges: the same for the batches that judge the converted model: the last two that no weight is rounded by, or
            the only one there was.
        tables_called: the embeddings that were called.
        tables_read: those whose table no layer shares, but other operations than look-ups read.
        weights_read: the layers whose weight was read past a call of their module; without data, those of which code
            does nothing else.
        written_attentions: the modules whose code computes attention operation by operation.
    """

    model: nn.Module
    layers: Mapping[str, Layer]
    config: QConfig
    records: dict[str, Record] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    handovers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    turned: set[str] = field(default_factory=set)
    sums: dict[str, tuple[str, ...]] = field(default_factory=dict)
    batches: int = 0
    batches_held_out: int = 0
    run: Callable[[nn.Module], object] | None = None
    judges: list[Callable[[nn.Module], object]] = field(default_factory=list)
    tables_called: set[str] = field(default_factory=set)
    tables_read: set[str] = field(default_factory=set)
    weights_read: set[str] = field(default_factory=set)
    written_attentions: tuple[str, ...] = ()

    @property
    def apart(self) -> bool:
        """Whether the batches that judge are others than those that weights are rounded by."""
        return self.batches_held_out > 0


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Mapping[str, Layer],
    config: QConfig,
    *,
    forward: Forward | None = None,
    tables: Mapping[str, str | None] | None = None,
    progress: bool | None = None,
    shard: int | None = None,
) -> Evidence:
    """Runs every batch of `loader` through `model`, in eval mode and without gradients, and records `layers`' inputs.

    The model is left as it was: hooks are removed and training flags restored, also when a batch fails. Special cases:

    * Batches may differ in size, sequence length and leading dimensions. Only the rows count: the result is the same as
      for one batch with all rows, except that with `rounding="auto"` every second batch judges the rounding.
    * Padding is not recorded: where a batch is a dict, or (dict, label), with an `attention_mask` (B, T) of ones and
      zeros, these are the rows of inputs (B, T, ..., K) whose mask is 0. With a `src_key_padding_mask` or
      `key_padding_mask` that is bool, as torch's own transformers take it, these are the rows whose mask is True.
    * Constant values, a constant channel, and all zeros are allowed: all ranges stay finite, and zero stays exact.
    * A layer called twice in a forward, or under two names, is one layer, with the rows of all calls.
    * A weight shared by two layers is quantized twice, each time by the rows of that layer.
    * A layer that is only called in training counts as one that no batch reaches (see `choose`).

    Args:
        model: the float model.
        loader: an iterable of batches: tensors; tuples whose leading elements `model.forward` requires (all of them,
            where it takes *args); dicts of its keyword arguments (keys it does not know, such as labels, are left out),
            or a dict that forward takes whole, as its one input; (dict, label); lists of objects, taken whole.
        layers: the layers to record, by name.
        config: which observers, and how many sample rows.
        forward: `forward(model, batch)`, which then replaces this rule for calling the model.
        tables: the embeddings to watch, by name, with the layer or embedding that each shares its table with, or None.
        progress: a progress bar: None shows it on a terminal only.
        shard: the number of this process among those that have a part of the data each (`Peers`), which may be empty;
            None: there is this one only.

    Raises:
        ValueError: the loader yields nothing though it has all the data, or a layer's input has NaN or infinity (the
            message names the layer and the batch).
        TypeError: a batch is none of the above and there is no `forward`.
    """
    check_loader(loader)
    if forward is None and not has_forward(model):
        raise BadTypeError(
            f"this {type(model).__name__} has no forward(), so a batch of calib_loader can't be given to it. Pass "
            "forward=lambda model, batch: ... to say how to run one."
        )
    # Each process holds every second batch out. Counting from its number, one batch each suffices for both kinds.
    first = shard or 0
    evidence = Evidence(model, layers, config)
    recorder = Recorder(config, gram_bytes=_gram_bytes(layers), first_batch=first)
    call = forward or call_with_batch
    readers = Readers(model, layers if config.fuse else {})
    handovers = Handovers(model, layers if config.fuse else {})
    reads, written = WeightReads(layers), WrittenAttention(model)
    lookups = Lookups({name: model.get_submodule(name) for name in tables or ()}, _alone(tables or {}))
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(uncompiled())
        wants = {each: stack.enter_context(each.watching()) for each in (readers, handovers, lookups, reads, written)}
        stack.enter_context(_recording(recorder, evidence))
        if any(wants.values()):
            stack.enter_context(Watchers([each for each, wanted in wants.items() if wanted]))
        for batch in tqdm(loader, desc="torchq: calibrating", disable=None if progress is None else not progress):
            if evidence.run is None:
                evidence.run = partial(_run, call, batch)
                evidence.judges = [evidence.run]
            if is_held_out(first + evidence.batches):
                evidence.batches_held_out += 1
                others = [judge for judge in evidence.judges if judge is not evidence.run]
                evidence.judges = [*others[1 - JUDGES :], partial(_run, call, batch)]
            recorder.begin(batch)
            run_batch(model, batch, evidence.batches, forward)
            evidence.batches += 1
            readers.end_batch()
            handovers.end_batch()
            written.end_batch()
    evidence.activations, evidence.norms, evidence.chains = readers.activations, readers.norms, readers.chains
    evidence.handovers, evidence.sums = handovers.found(readers.norms), handovers.sums()
    evidence.turned = handovers.turned(readers.norms)
    evidence.tables_called, evidence.tables_read = lookups.called, lookups.read
    evidence.weights_read, evidence.written_attentions = reads.read, tuple(written.found)
    if evidence.batches == 0 and shard is None:
        raise BadValueError(NO_BATCH)
    reached = recorder.records()
    for name, layer in layers.items():
        unreached = Record.empty(layer.in_features, config, patches=layer.patches)
        evidence.records[name] = reached.get(name, unreached)
    return evidence


def _gram_bytes(layers: Mapping[str, Layer]) -> float:
    """What all XᵀX may take in memory."""
    weights = [layer.weight for layer in layers.values()]
    return max(GRAM_SHARE * sum(4 * weight.numel() for weight in weights if not is_lazy(weight)), GRAM_BYTES)


def _alone(tables: Mapping[str, str | None]) -> set[str]:
    """The tables that no layer shares."""
    return {name for name, owner in tables.items() if owner is None or owner in tables}


def _run(call: Forward, batch: Any, model: nn.Module) -> object:
    return call(model, batch)


def warn_of_few_rows(records: Mapping[str, Record]) -> None:
    """Warns the caller of `convert`, once, if some layers got input rows, but fewer than MIN_ROWS.

    There is no warning where the config leaves nothing for them to choose.
    """
    few = {name: record.sample.rows_seen for name, record in records.items() if 0 < record.sample.rows_seen < MIN_ROWS}
    if not few or all(_is_fixed(record.config) for record in records.values()):
        return
    name, rows = min(few.items(), key=lambda item: item[1])
    warnings.warn(
        f"torchq.convert: {len(few)} of {len(records)} layers saw fewer than {MIN_ROWS} rows (samples, or tokens) "
        f"of calib_loader, {name!r} the fewest: {rows}. What so few rows choose may not suit other data: 1 new row in "
        f"{rows + 1}, or more, is to be expected outside of their range. Pass more data, a hundred samples or more, or "
        "none at all for dynamic quantization.",
        stacklevel=4,  # the caller of convert()
    )


def _is_fixed(config: QConfig) -> bool:
    """Whether calibration chooses no range, no rounding and no smoothing."""
    return (config.activation, config.rounding, config.smoothing) == ("dynamic", "nearest", "none")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside: eval mode, no gradients, and no fused attention kernels, which would bypass the layers' forward.

    Within `convert`, which computes outside of it, the caller's autocast too.
    """
    with in_eval_mode(model), without_fast_path(), torch.no_grad(), callers_autocast():
        yield


@contextmanager
def _recording(recorder: Recorder, evidence: Evidence) -> Iterator[None]:
    """Hooks that record the layers' inputs."""
    by_module: dict[str, list[Layer]] = {}
    for layer in evidence.layers.values():
        by_module.setdefault(layer.path, []).append(layer)

    def record(layers: list[Layer], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = layers[0].kind.inputs(module, args, kwargs)
        for layer in layers:
            x = inputs.get(layer.part)
            if isinstance(x, Tensor):
                _refuse_layout(x, layer.name, evidence.batches)
            if not isinstance(x, Tensor) or not _fits(layer, x):
                continue  # the module's own forward will raise the error
            try:
                with unwatched(x):
                    recorder.observe(layer.name, x, layer.patches)
            except ValueError as error:
                raise BadValueError(
                    f"layer {layer.name!r} got an input that is not finite in batch {evidence.batches} of "
                    f"calib_loader: {error}"
                ) from error

    with ExitStack() as stack:
        for path, layers in by_module.items():
            module, hook = evidence.model.get_submodule(path), own_thread(partial(record, layers))
            stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def _refuse_layout(x: Tensor, name: str, batch: int) -> None:
    """Raises an error for an input that no int8 layer takes. In float it may work, but not while it is watched."""
    try:
        refuse_layout(x, f"layer {name!r} in batch {batch} of calib_loader")
    except TypeError as error:
        raise BadTypeError(str(error)) from None


def _fits(layer: Layer, x: Tensor) -> bool:
    if not x.is_floating_point() or x.device.type != "cpu":
        return False
    return x.shape[-1:] == (layer.in_features,) if layer.patches is None else layer.patches.fits(x)
