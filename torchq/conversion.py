"""convert(): calibrate -> plan -> budget -> swap. All or nothing: the model passed in is never left half changed."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from torchq.calibration.calibrate import Forward, calibrate, call_with_batch, warn_of_few_rows
from torchq.config import QConfig
from torchq.modules.qat_linear import QATLinear
from torchq.planning.apply import apply_plan
from torchq.planning.budget import Evaluate, FirstBatch, fit, make_budget, return_to_float
from torchq.planning.choose import make_plan
from torchq.planning.describe import describe
from torchq.planning.fusion import fuse
from torchq.planning.layers import _unprepared, select_layers
from torchq.planning.rounding import Rounded, round_weights
from torchq.planning.smooth_search import smooth


def convert(
    model: nn.Module,
    calib_loader: Iterable[Any] | None = None,
    *,
    config: QConfig | None = None,
    forward: Forward | None = None,
    inplace: bool = False,
    progress: bool | None = None,
    evaluate: Evaluate | None = None,
    max_drop: float | None = None,
) -> nn.Module:
    """Returns the model with its nn.Linear layers in int8: the same forward, weights 4 times smaller.

    Args:
        model: a trained model on the CPU, in float32, bfloat16 or float16. It is left as it was, unless `inplace`.
        calib_loader: an iterable of typical batches: tensors, (input, label) pairs, or dicts, which may differ in shape
            (`calibrate` says what each kind of data gives). Fewer than 16 rows (samples, or tokens) for a layer are a
            UserWarning. Without a loader, every layer is dynamic. A model from `prepare_qat` keeps the schemes and
            ranges it was trained with, either way; data lets its layers be fused and their error be measured.
        config: a QConfig; the default measures and chooses per layer.
        forward: `forward(model, batch)`: how to run one batch, where the model's own signature does not tell.
        inplace: swap the layers of `model` itself and return it, which needs no memory beyond its own, a layer's, and
            what calibration keeps (docs/performance.md; least with rounding="nearest"). Everything is checked before
            the first swap.
        progress: a progress bar over the batches; None shows it on a terminal only.
        evaluate: `evaluate(model) -> float`, your own metric, higher is better. Layers that cost it too much stay in
            float. It is called on the float model and on copies, 2 + ceil(log2(int8 layers)) times at most
            (torchq/budget.py); its errors pass through.
        max_drop: the most the metric may fall below the float model's, in its own unit; 0.01 if not given. Where no
            int8 layer fits into it, that is a warning with the numbers, and all layers stay in float.

    Returns:
        The converted model. `torchq_plan`, an attribute of it, says of every Linear what it became and why.

    Raises:
        TypeError: `model` is not a module, or can't be copied, or a batch is of a type it can't be called with.
        ValueError: no Linear in the model; already converted; weights not on the CPU; K > 65793; an exclude pattern
            that matches nothing; "static" without data, or with a layer that the data never reach; a loader without
            batches; NaN or infinity in a layer's input; `evaluate` without data, or that returns NaN.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> qmodel = convert(model, [torch.randn(32, 64) for _ in range(4)])
    >>> qmodel(torch.randn(2, 64)).shape
    torch.Size([2, 10])
    """
    config = QConfig() if config is None else config
    budget = make_budget(evaluate, max_drop, calib_loader)
    layers, barred = select_layers("torchq.convert", model, calib_loader, config)
    prepared = any(isinstance(layer, QATLinear) for layer in layers.values())
    if inplace and isinstance(model, nn.Linear):
        raise ValueError("torchq.convert: inplace=True can't replace the model itself, an nn.Linear. Leave it out.")
    if config.activation == "static" and calib_loader is None and not prepared:
        raise ValueError("torchq.convert: activation='static' needs a calib_loader to find the ranges with.")
    if prepared:
        barred = _unprepared(model, layers) | barred
    wanted = {name: layer for name, layer in layers.items() if name not in barred}
    calibration, first = None, FirstBatch(forward or call_with_batch)
    if calib_loader is not None:
        calibration = calibrate(model, calib_loader, wanted, config, forward=first, progress=progress)
    plan = make_plan(layers, barred, calibration, config)
    if calibration is not None:
        trained = {name for name, layer in wanted.items() if isinstance(layer, QATLinear)}  # they keep their ranges
        warn_of_few_rows({name: record for name, record in calibration.records.items() if name not in trained})
    rounded: dict[str, Rounded] = {}
    if calibration is not None:
        plan = fuse(model, smooth(model, plan, calibration, config), calibration)
        if config.rounding != "nearest":
            plan, rounded = round_weights(model, plan, calibration, config, progress=progress)
        plan = describe(model, plan, calibration, rounded)
    if budget is not None:
        exact = apply_plan(model, return_to_float(plan, dict.fromkeys(plan.layers, ""))) if prepared else model
        plan = fit(exact, plan, budget, apply=partial(apply_plan, rounded=rounded), run=first.run)
        del exact
    del layers, wanted, calibration  # they hold the float layers, which inplace frees one by one
    return apply_plan(model, plan, inplace=inplace, rounded=rounded)
