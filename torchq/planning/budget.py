"""Accuracy budget: layers return to float, the most sensitive first, until the user's own metric is good enough.

`convert(model, loader, evaluate=fn, max_drop=0.01)` ends here. The search costs few evaluations:

1. `evaluate` the float model, and the model with all n planned layers in int8. If the second is good enough, stop.
2. Measure sensitivity, once: run the first calibration batch with a single layer in int8, for each of the n layers. The
   lower the SQNR of the model's output, the more sensitive the layer. Sort the layers by it.
3. Bisect: find the shortest prefix of that order that must return to float, with ceil(log2 n) evaluations.

That is at most 2 + ceil(log2 n) evaluations: 9 for a model of 73 layers. Bisection needs a metric that improves with
the length of the prefix. It does, because the errors of single layers add up in the output like independent noise. A
coarse metric (accuracy on a small set) may be out of order by a few samples; still, the model returned is one whose
metric was measured and was within the budget.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchq.calibration.calibrate import Evidence, evaluating
from torchq.errors import BadValueError
from torchq.modules.registry import find_layers
from torchq.numerics.metrics import sqnr_db
from torchq.planning.apply import applied
from torchq.planning.frontier import Frontier, Step
from torchq.planning.plan import LayerPlan, Plan
from torchq.planning.tables import settled, tables_in_float
from torchq.timing import interleaved

Evaluate = Callable[[nn.Module], Any]
Run = Callable[[nn.Module], object]
"""`run(model)`: a forward pass of one typical batch."""


@dataclass(frozen=True)
class Budget:
    """How much of the user's metric may be lost.

    Args:
        evaluate: `evaluate(model) -> float`, higher is better. Any kind of number: a float, a 0-dim tensor, numpy.
        max_drop: the most that the result's metric may lie below the float model's, in the metric's own unit.

    Raises:
        TypeError: `evaluate` is not callable.
        ValueError: `max_drop` is not a finite number >= 0.
    """

    evaluate: Evaluate
    max_drop: float

    def __post_init__(self) -> None:
        if not callable(self.evaluate):
            raise TypeError(
                f"torchq.convert: evaluate must be a function of a model, got {type(self.evaluate).__name__}. "
                "Pass evaluate=lambda model: ... that returns the metric, higher is better."
            )
        if not isinstance(self.max_drop, (int, float)) or not 0 <= self.max_drop < math.inf:
            raise ValueError(
                f"torchq.convert: max_drop must be a finite number >= 0, got {self.max_drop!r}. It is how much of "
                "what evaluate returns may be lost against the float model."
            )

    def metric(self, model: nn.Module, which: str) -> float:
        """What `evaluate` returns for the model in eval mode, without gradients, checked. Its errors pass through."""
        with evaluating(model):
            value = self.evaluate(model)
        is_number = hasattr(value, "__float__") and getattr(value, "shape", ()) == ()
        number = float(value) if is_number else math.nan
        if not is_number or math.isnan(number):
            raise (ValueError if is_number else TypeError)(
                f"torchq.convert: evaluate must return a number, higher is better; for the {which} it returned "
                f"{value!r}. Return one float, such as the accuracy."
            )
        return number


def make_budget(evaluate: Evaluate | None, max_drop: float | None, calib_loader: Iterable[Any] | None) -> Budget | None:
    """The budget that `convert`'s arguments ask for, if any; max_drop defaults to 0.01.

    Raises:
        TypeError, ValueError: see `Budget`; `max_drop` without `evaluate`; `evaluate` without a calib_loader.
    """
    if evaluate is None:
        if max_drop is not None:
            raise ValueError(
                "torchq.convert: max_drop needs evaluate, which measures the metric. Pass evaluate=lambda model: ... "
            )
        return None
    if calib_loader is None:
        raise BadValueError("evaluate needs a calib_loader: its first batch tells which layers are sensitive.")
    return Budget(evaluate, 0.01 if max_drop is None else max_drop)


def fit(plan: Plan, evidence: Evidence, budget: Budget) -> Plan:
    """The plan with enough layers returned to float that the metric drops by at most `max_drop`, and its frontier.

    Everything is tried on copies; the model itself does not change. Warns if no layer can stay in int8.

    Args:
        plan: with every layer in int8 that should be.
        evidence: the model, and how to run a batch. A model from `prepare_qat` is compared with its float form.
        budget: the metric and its tolerance.

    Raises:
        TypeError, ValueError: `evaluate` returned no number, or NaN, or infinity for the float model.
    """
    assert evidence.run is not None  # make_budget demands a loader
    model = evidence.model
    if any(layer.trained for layer in find_layers(model).values()):
        model = applied(model, return_to_float(plan, dict.fromkeys(plan.layers, "")))
    search = _Search(model, plan, budget, evidence.run)
    too_few, enough = 0, len(search.names)  # with `enough` layers in float the budget is met, with `too_few` it is not
    if enough and not search.fits(0):
        search.sensitivity_db = sensitivity(model, plan, evidence.run)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            too_few, enough = (too_few, middle) if search.fits(middle) else (middle, enough)
    else:
        enough = 0
    frontier = search.frontier(enough)
    if search.names and enough == len(search.names):
        _warn(frontier)
    return dataclasses.replace(search.plan_with(enough), frontier=frontier)


class _Search:
    """What the search has measured so far: a step for each number of layers returned to float that was tried."""

    def __init__(self, model: nn.Module, plan: Plan, budget: Budget, run: Run) -> None:
        self.model, self.plan, self.budget, self.run = model, plan, budget, run
        self.names = plan.int8_layers()
        self.sensitivity_db: dict[str, float] = {}
        self.float_metric = budget.metric(model, "float model")
        if math.isinf(self.float_metric):
            raise ValueError(
                f"torchq.convert: evaluate returned {self.float_metric} for the float model, so no drop can be told. "
                "Return a finite number."
            )
        self.float_seconds = math.inf
        self.steps: dict[int, Step] = {}

    def plan_with(self, returned: int) -> Plan:
        """The plan with the `returned` most sensitive layers in float; with all, also tables and attention are."""
        reasons = {}
        for rank, (name, db) in enumerate(list(self.sensitivity_db.items())[:returned], 1):
            reasons[name] = (
                f"returned to float to keep the metric: number {rank} of {len(self.names)} by sensitivity, {db:.1f} dB "
                f"with this layer alone in {self.plan.layers[name].kind}"
            )
        plan = settled(return_to_float(self.plan, reasons))
        if returned < len(self.names):
            return plan
        return dataclasses.replace(tables_in_float(plan, "returned to float to keep the metric"), attentions={})

    def fits(self, returned: int) -> bool:
        """Measures the plan with `returned` layers in float, and says whether it is within the budget."""
        candidate = applied(self.model, self.plan_with(returned))
        metric = self.budget.metric(candidate, f"model with {returned} of {len(self.names)} int8 layers in float")
        with evaluating(self.model), evaluating(candidate):
            calls = {"float": partial(self.run, self.model), "int8": partial(self.run, candidate)}
            seconds = interleaved(calls, rounds=5, seconds=0.005)
        self.float_seconds = min(self.float_seconds, seconds["float"])
        speedup = seconds["float"] / seconds["int8"]
        self.steps[returned] = Step(returned, metric, seconds["int8"], speedup, _bytes(candidate))
        return self.float_metric - metric <= self.budget.max_drop

    def frontier(self, returned: int) -> Frontier:
        """All measured steps, with the float model last. The one with `returned` layers in float is the chosen one."""
        if not self.names:  # fits() never ran, so the float model has no time yet
            with evaluating(self.model):
                calls = {"float": partial(self.run, self.model)}
                self.float_seconds = interleaved(calls, rounds=5, seconds=0.005)["float"]
        last = Step(len(self.names), self.float_metric, self.float_seconds, 1.0, _bytes(self.model))
        steps = (*(self.steps[key] for key in sorted(self.steps)), last)
        chosen = [step.returned for step in steps].index(returned)
        return Frontier(self.budget.max_drop, self.sensitivity_db, steps, chosen)


def sensitivity(model: nn.Module, plan: Plan, run: Run) -> dict[str, float]:
    """Per int8 layer, the SQNR in dB of the model's output with only this layer in int8, the most sensitive first.

    The output is every floating-point tensor in what `run(model)` returns: a tensor, or a tuple, list or dict of them.
    If there is none, the SQNR of each layer's own output is taken from the plan instead. A layer that makes the output
    NaN, or changes its shape, comes first, with -inf.
    """
    names, plan = plan.int8_layers(), tables_in_float(plan, "", heads=False)
    with evaluating(model):
        exact = floats(run(model))
    measured = {}
    for name in names:
        if exact.numel():
            with_one_int8 = applied(model, return_to_float(plan, dict.fromkeys(set(names) - {name}, "")))
            with evaluating(with_one_int8):
                output = floats(run(with_one_int8))
            db = sqnr_db(exact, output) if output.shape == exact.shape else -math.inf
        else:
            own = plan.layers[name].measured_db
            db = math.inf if own is None else own
        measured[name] = -math.inf if math.isnan(db) else db
    return dict(sorted(measured.items(), key=lambda item: item[1]))


def return_to_float(plan: Plan, reasons: Mapping[str, str]) -> Plan:
    """The plan with the layers of `reasons` in float, for those reasons, and not fused with their neighbours.

    >>> plan = Plan({"a": LayerPlan("int8 static", "", feeds="b"), "b": LayerPlan("int8 static", "")})
    >>> layers = return_to_float(plan, {"b": "sensitive"}).layers
    >>> layers["a"].feeds, layers["b"].kind, layers["b"].reason
    (None, 'float', 'sensitive')
    """
    layers = {}
    for name, layer in plan.layers.items():
        if name in reasons:
            layer = LayerPlan("float", reasons[name], layer.per_channel, sqnr_db=layer.sqnr_db)
        elif layer.feeds in reasons:
            layer = dataclasses.replace(layer, feeds=None, skipped=())
        elif any(name in reasons for name in layer.hands):
            layer = dataclasses.replace(layer, sum_qparams=None)
        layers[name] = layer
    return dataclasses.replace(plan, layers=layers)


def floats(output: object) -> Tensor:
    """All floating-point values in a model's output, as one vector."""
    if isinstance(output, Tensor) and output.is_floating_point():
        return output.detach().float().flatten()
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return torch.cat([torch.empty(0, dtype=torch.float32, device="cpu"), *(floats(part) for part in parts)])


def _bytes(model: nn.Module) -> int:
    """The size of all parameters and buffers, each shared one counted once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _warn(frontier: Frontier) -> None:
    *steps, exact = frontier.steps
    best = max(steps, key=lambda step: step.metric)
    warnings.warn(
        f"torchq.convert: no model with an int8 layer keeps the metric within max_drop = {frontier.max_drop:g} of "
        f"float's {exact.metric:.6g}. The best, with {exact.returned - best.returned} of {exact.returned} layers in "
        f"int8, has {best.metric:.6g}, a drop of {frontier.drop(best):.3g}. So all layers are in float. Pass more "
        "calibration data or a larger max_drop; torchq.report(qmodel) shows what was measured.",
        stacklevel=5,  # the caller of convert()
    )
