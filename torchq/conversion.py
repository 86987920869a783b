"""convert(): calibrates, plans in stages, swaps the layers. The model passed in is never left half changed."""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from torchq.calibration.batches import Forward
from torchq.calibration.calibrate import Evidence, calibrate, warn_of_few_rows
from torchq.calibration.isolation import taking_turns
from torchq.calibration.peers import Peers
from torchq.config import QConfig
from torchq.errors import BadValueError, door
from torchq.planning.apply import applied, settled
from torchq.planning.attention import choose_attention
from torchq.planning.budget import Evaluate, fit, make_budget
from torchq.planning.by_code import with_code_read
from torchq.planning.choose import choose, note_code
from torchq.planning.coded_sums import coded_sums
from torchq.planning.convolutions import static_convolutions
from torchq.planning.describe import describe
from torchq.planning.fine_heads import fine_heads
from torchq.planning.fine_signals import fine_signals
from torchq.planning.fusion import fuse
from torchq.planning.layers import first_plan, select_layers, unprepared, warn_of_float
from torchq.planning.logged import log_plan
from torchq.planning.norms import include_norms
from torchq.planning.plan import attached_plan
from torchq.planning.rounding import round_weights
from torchq.planning.routers import keep_choices
from torchq.planning.selfcheck import SelfCheck
from torchq.planning.smoothing import smooth
from torchq.planning.stems import float_stems, keep_unjudged
from torchq.planning.tables import keep_together
from torchq.scopes import outside_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

M = TypeVar("M", bound=nn.Module)


@door("torchq.convert")
def convert(
    model: M,
    calib_loader: Iterable[Any] | None = None,
    *,
    config: QConfig | None = None,
    forward: Forward | None = None,
    inplace: bool = False,
    progress: bool | None = None,
    evaluate: Evaluate | None = None,
    max_drop: float | None = None,
    group: "ProcessGroup | None" = None,
) -> M:
    """Returns the model with its nn.Linear layers in int8: the same forward, weights 4 times smaller.

    Args:
        model: a trained model on the CPU, in float32, bfloat16 or float16. It is left as it was, unless `inplace`.
        calib_loader: an iterable of typical batches: tensors, (input, label) pairs, or dicts, which may differ in shape
            (see `calibrate` for special cases). A layer that gets fewer than 16 rows (samples, or tokens) causes a
            UserWarning, and one that gets fewer than 64 is dynamic. Without a loader, every layer is. A model from
            `prepare_qat` keeps the schemes and ranges it was trained with in any case; with data, its layers are also
            fused and their error is measured.
        config: a QConfig; the default measures and chooses per layer.
        forward: `forward(model, batch)`: how to run one batch, if `model(batch)` and the like do not work.
        inplace: swap the layers of `model` itself and return it. That needs memory only for the model, one more layer,
            and what calibration keeps (docs/performance.md; least with rounding="nearest"). Everything is checked
            before the first swap.
        progress: a progress bar over the batches; None shows it on a terminal only.
        evaluate: `evaluate(model) -> float`, your own metric, higher is better. Layers that lower it too much stay in
            float. It is called on the float model and on copies, at most 2 + ceil(log2(int8 layers)) times
            (docs/accuracy-budget.md). Its errors pass through.
        max_drop: the most the metric may fall below the float model's, in the metric's own unit; 0.01 if not given. If
            not even one int8 layer is within it, all layers stay in float, and a warning gives the numbers.
        group: processes of torch.distributed that convert the same model together, each with its own part of the data,
            which may be none. All of them call it, and all get the same plan and bits (docs/distributed.md). One of
            them decides, so `evaluate` is called in that one only.

    Returns:
        The converted model. Its attribute `torchq_plan` says what every Linear became, and why.

    Raises:
        TypeError: `model` is not a module, or can't be copied, or a batch is of a type it can't be called with.
        ValueError: no Linear in the model; already converted; weights not on the CPU; an exclude pattern
            that matches nothing; "static" without data, or with a layer that the data never reach; a loader without
            batches; NaN or infinity in a layer's input; `evaluate` without data, or that returns NaN; models that
            differ between the processes of `group`.
        RuntimeError: another process of `group` failed, died, or did not answer in time.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> qmodel = convert(model, [torch.randn(32, 64) for _ in range(4)])
    >>> qmodel(torch.randn(2, 64)).shape
    torch.Size([2, 10])
    """
    config = QConfig() if config is None else config
    with taking_turns(model), Peers(group, model) as peers, outside_autocast():
        budget = make_budget(evaluate, max_drop, calib_loader)
        selection = select_layers(model, calib_loader, config)
        layers, barred, tables = selection
        prepared = any(layer.trained for layer in layers.values())
        own = next((layer.kind.name for layer in layers.values() if layer.module is model), None)
        if inplace and own is not None:
            raise BadValueError(f"inplace=True can't replace the model itself, an {own}. Leave it out.")
        if config.activation == "static" and calib_loader is None and not prepared:
            raise BadValueError("activation='static' needs a calib_loader to find the ranges with.")
        if prepared:
            barred = unprepared(model, layers) | barred
            selection = selection._replace(barred=barred)

        free = {name: layer for name, layer in layers.items() if name not in barred}
        evidence = Evidence(model, free, config)
        if calib_loader is not None:
            owners = {name: row.owner for name, row in tables.items()}
            evidence = calibrate(
                model, calib_loader, free, config, forward=forward, tables=owners, progress=progress, shard=peers.shard
            )
        merged = peers.merged(evidence, data=calib_loader is not None)
        if merged is None:
            del layers, selection, free, evidence  # as below
            return settled(applied(model, peers.received(), inplace=inplace))
        evidence = include_norms(with_code_read(merged))
        unjudged, rounded = partial(keep_unjudged, inplace=inplace), partial(round_weights, progress=progress)
        first = (choose, smooth, unjudged, keep_choices, keep_together, fine_heads)
        stages = (*first, fuse, rounded, describe, note_code)
        plan = first_plan(model, selection)
        for stage in stages:
            plan = stage(plan, evidence)
        if calib_loader is not None:
            warn_of_few_rows({name: evidence.records[name] for name, layer in free.items() if not layer.trained})
        check, converted = SelfCheck(evidence), None
        if not inplace:
            plan, converted = check.best(model, plan, evidence)
            plan, converted = float_stems(model, plan, converted, evidence, check)
            plan, converted = fine_signals(model, plan, converted, evidence, check)
            plan, converted = static_convolutions(model, plan, converted, evidence, check)
            plan, converted = coded_sums(model, plan, converted, evidence, check)
            plan = choose_attention(converted, plan, check, config.attention)
        if budget is not None:
            plan, converted = fit(plan, evidence, budget), None
        warn_of_float(plan, layers)
        del layers, selection, free, evidence, merged  # they hold the float modules, which inplace frees one by one
        if converted is None:
            converted = applied(model, plan, inplace=inplace)
            plan = check.final(converted, plan, inplace=inplace)
            if inplace:  # a budget has been kept without it, so then nothing is risked
                exact = budget is not None and config.attention == "auto"
                plan = choose_attention(converted, plan, check, "float32" if exact else config.attention)
        peers.send(plan)
        log_plan(attached_plan(converted), type(converted).__name__)
        return settled(converted)
