"""convert() checks itself: batches run through both models, which layers ran, and how far the outputs are apart.

A swap can miss a layer that the model also keeps elsewhere, in a global or a C extension, say: the model would go on in
float and nobody would know. So the converted model is listened to: a layer that ran in the float model must run.

A layer's own error says little of what the model makes of it. So the *model's* output is compared with float's, for the
plan as made and for the few plans one would have without data; where one of these is more than MARGIN_DB better, it is
taken.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from torchq.calibration.calibrate import Evidence, evaluating
from torchq.calibration.isolation import own_thread, uncompiled
from torchq.errors import BadValueError
from torchq.modules.base import Int8Module
from torchq.modules.registry import find_layers, type_of
from torchq.numerics.metrics import decibels, energies
from torchq.planning.apply import applied
from torchq.planning.attach import attach_plan
from torchq.planning.budget import floats
from torchq.planning.fusion import fuse
from torchq.planning.making import Sharing
from torchq.planning.plan import Checked, LayerPlan, Plan
from torchq.planning.tables import (
    LOSS_DB,
    heads_of_tables,
    measured_tables,
    small_ones,
    tables_in_float,
    tables_of_their_own,
)

M = TypeVar("M", bound=nn.Module)

MARGIN_DB = 0.3
"""How much worse than another plan the one made may be, in SQNR of the model's output, and still be taken."""

CLOSE_DB = 1.0
"""Another plan that must be worse than the one made by more than this is not compared on the batches that are left.

`convolutions.py` asks how much better than without data the plan is, up to this."""

ENOUGH_DB, FLOAT_GAIN_DB = 30.0, 3.0
"""Below ENOUGH_DB of the model's output, the first layers' input products of recurrent modules are tried in float, and
stay so for a gain of FLOAT_GAIN_DB.

h is bounded, and its codes are fine; x is not, and where a network's steps amplify errors, those of the input product
are the largest. In float it costs little, since it is outside of the steps.
"""

ENOUGH_VALUES = 2**20
"""A batch whose output has so many values judges alone: another one would say the same."""

MADE, WITHOUT_DATA = "as made", "without data"
_FLOAT_INPUTS = "recurrent inputs in float"


class _Exact(NamedTuple):
    """What a batch gave in the float model."""

    run: Callable[[nn.Module], object]
    output: Tensor
    ran: set[str]

    def signal(self) -> float:
        """The energy of the output, but for what is not finite."""
        return float(self.output.double().square().masked_fill_(~self.output.isfinite(), 0.0).sum())


class SelfCheck:
    """The held-out batches, as they ran through the float model.

    It keeps neither the model nor its layers alive. Without calibration data, or where a batch can't be run twice, it
    checks nothing. `first` is the layer called before all others and all tables, by its name.
    """

    def __init__(self, evidence: Evidence) -> None:
        self._exact: list[_Exact] = []
        self.first: str | None = None
        self._model_name = type(evidence.model).__name__
        self._trained = any(layer.trained for layer in evidence.layers.values())
        self._config = evidence.config
        self.margin_db = max(MARGIN_DB, evidence.config.margin_db)  # what the user allows each layer
        self._apart = evidence.apart
        self._inputs = [name for name, layer in evidence.layers.items() if layer.kind.is_first_input(layer.part)]
        names = {id(layer.module): layer.path for layer in find_layers(evidence.model).values()}
        for run in reversed(evidence.judges):
            if sum(exact.output.numel() for exact in self._exact) >= ENOUGH_VALUES:
                break
            try:
                output, called = _listened(evidence.model, run)
            except Exception:  # the float model's own; calibration has run this batch, so it can't be run twice
                continue
            if called and not self._exact:
                self.first = names.get(id(called[0]))
            self._exact.append(_Exact(run, output, {names[id(module)] for module in called if id(module) in names}))
        self._signal = sum(exact.signal() for exact in self._exact)

    def best(self, model: M, plan: Plan, evidence: Evidence) -> tuple[Plan, M]:
        """The plan to take, with its figures, and the model converted by it: `plan`, or what is better without data."""
        converted = applied(model, plan)
        db = self.compare(converted)
        if db is None:
            return plan, converted
        measured, kept = {MADE: db}, {MADE: (plan, converted)}
        for name, other in (self._others(plan, evidence) | self._float_inputs(plan, db)).items():
            candidate = applied(model, other, make=Sharing(plan, converted))
            margin = FLOAT_GAIN_DB if name == _FLOAT_INPUTS else self.margin_db
            least_db = max([db + margin, *(measured[key] for key in kept)])
            other_db = self.compare(candidate, least_db=db - CLOSE_DB)
            if other_db is None:
                continue
            measured[name] = other_db
            if other_db > least_db:
                kept = {name: (other, candidate)}
        scaled = {name for name, layer in plan.layers.items() if layer.channel_scale is not None}
        chosen, (plan, converted) = next(iter(kept.items()))
        if chosen == WITHOUT_DATA:
            plan = measured_tables(plan, model, scaled)
        plan, converted, measured[chosen] = self._tables_judged(model, plan, converted, measured[chosen])
        return self.noted(converted, plan, measured, chosen), converted

    def _tables_judged(self, model: M, plan: Plan, converted: M, db: float) -> tuple[Plan, M, float]:
        """The same, or with tables of embeddings in float: if need be the small ones, all that only look up, or all.

        What int8 tables cost is measured with the heads that share them in int8, which are judged as other layers are.
        """
        if self._config.embeddings != "auto" or not plan.int8_tables():
            return plan, converted, db
        make, shared = Sharing(plan, converted), heads_of_tables(plan)
        exact = applied(model, tables_in_float(plan, "", heads=False), make=make)
        exact_db = self.compare(exact)
        while exact_db is not None and plan.int8_tables():
            alone = tables_of_their_own(plan)
            if exact_db <= db + (LOSS_DB if alone else self.margin_db):
                break
            why = f"int8 costs {exact_db - db:.1f} dB of the model's output, {db:.1f} instead of {exact_db:.1f}"
            plan = tables_in_float(plan, why, *(small_ones(model, alone) or plan.int8_tables()))
            if plan.int8_tables() or shared:
                converted = applied(model, plan, make=make)
                db = self.compare(converted) or db
            else:  # no head is in float with them, so this is what was compared with
                converted, db = exact, exact_db
        return plan, converted, db

    def final(self, converted: nn.Module, plan: Plan, *, inplace: bool = False) -> Plan:
        """Checks a model that `best` did not make. The plan with its figures, as the model carries it too."""
        db = self.compare(converted, inplace=inplace)
        if db is None:
            return plan
        before = plan.checked or Checked({}, MADE, 0, self._apart)
        return self.noted(converted, plan, {**before.output_db, before.chosen: db}, before.chosen)

    def compare(self, converted: nn.Module, *, inplace: bool = False, least_db: float = -math.inf) -> float | None:
        """SQNR of the converted model's output in dB; None where it can't be told.

        Once the errors are too large for `least_db`, however small those of the other batches are, it is that of the
        batches so far, which is less than `least_db`.

        Raises:
            ValueError: an int8 layer did not run, since a float one ran that is no module of the model.
        """
        sums, comparable = torch.zeros(2, dtype=torch.float64, device="cpu"), False
        paths = {name: module for name, module in converted.named_modules() if isinstance(module, Int8Module)}
        known = {id(module) for module in converted.modules()}
        for run, exact, ran in self._exact:
            try:
                output, called = _listened(converted, run)
            except Exception as error:
                raise BadValueError(
                    f"the converted {self._model_name} fails on a batch that the float model ran "
                    f"({type(error).__name__}: {error}). {_state(inplace)}"
                    "Leave the layer it fails at in float with QConfig(exclude=...)."
                ) from error
            called_ids = {id(module) for module in called}
            strangers = [module for module in called if id(module) not in known]
            silent = [path for path in paths if path in ran and id(paths[path]) not in called_ids]
            if strangers and silent:
                raise BadValueError(
                    f"{len(silent)} of {len(paths)} int8 layers did not run on a batch that ran them in float: "
                    f"{', '.join(map(repr, silent[:3]))}{', ...' if len(silent) > 3 else ''}. The model runs "
                    f"{type(strangers[0]).__name__} layers that are not among its modules: a function, a list or an "
                    f"object that it uses keeps the float ones. {_state(inplace)}Let it call its own modules"
                    f"{'' if inplace else ', pass inplace=True'}, or leave these in float with QConfig(exclude=...)."
                )
            if exact.numel() and exact.shape == output.shape:
                finite = exact.isfinite()  # masked scores are -inf
                sums += energies(*((exact, output) if finite.all() else (exact[finite], output[finite])))
                comparable = True
            if sums[1] > self._signal * 10 ** (-least_db / 10):
                break
        db = decibels(sums) if comparable else math.nan
        return None if math.isnan(db) else db

    def _others(self, plan: Plan, evidence: Evidence) -> dict[str, Plan]:
        """What one would have without data, as far as the config leaves it open, and where it differs."""
        if self._trained:
            return {}
        found, made = {}, plan.layers.values()
        if self._config.rounding == "auto" and any(layer.rounding == "gptq" for layer in made):
            found["rounded to nearest"] = dataclasses.replace(
                plan, layers={name: _nearest(layer) for name, layer in plan.layers.items()}
            )
        data_used = any(layer.kind == "int8 static" or layer.rounding == "gptq" or layer.alpha for layer in made)
        if self._config.activation == "auto" and self._config.rounding != "gptq" and data_used:
            reason = "better for the whole model than what the data chose for each layer"
            layers = {
                name: LayerPlan("int8 dynamic", reason, layer.per_channel, sqnr_db=layer.sqnr_db, fine=layer.fine)
                if layer.is_int8
                else layer
                for name, layer in plan.layers.items()
            }
            found[WITHOUT_DATA] = fuse(dataclasses.replace(plan, layers=layers), evidence)
        return found

    def _float_inputs(self, plan: Plan, db: float) -> dict[str, Plan]:
        """The plan with the input products of recurrent modules in float, where it does too little for the model."""
        names = [name for name in self._inputs if plan.layers[name].is_int8]
        if not names or db >= ENOUGH_DB or self._config.activation != "auto":
            return {}
        reason = f"the model's output has {db:.1f} dB with it in int8: the steps amplify its errors"
        layers = {name: LayerPlan("float", reason, sqnr_db=plan.layers[name].sqnr_db) for name in names}
        return {_FLOAT_INPUTS: dataclasses.replace(plan, layers=plan.layers | layers)}

    def noted(self, converted: nn.Module, plan: Plan, measured: dict[str, float], chosen: str) -> Plan:
        """The plan with these figures, as the converted model carries it too."""
        plan = dataclasses.replace(plan, checked=Checked(measured, chosen, len(self._exact), self._apart))
        attach_plan(converted, plan)
        return plan


def _nearest(layer: LayerPlan) -> LayerPlan:
    if layer.rounding != "gptq":
        return layer
    sqnr_db = {name: db for name, db in layer.sqnr_db.items() if name != "gptq"}
    return dataclasses.replace(layer, rounding="nearest", weights=None, sqnr_db=sqnr_db)


def _state(inplace: bool) -> str:
    return "The model is converted now, which inplace=True can't undo. " if inplace else ""


@torch.no_grad()
def _listened(model: nn.Module, run: Callable[[nn.Module], object]) -> tuple[Tensor, list[nn.Module]]:
    """The floats of the model's output, and the modules with matrices or tables, float or int8, that it called.

    With a seed of its own: dropout that is always on drops the same in both models.
    """
    called: list[nn.Module] = []
    with evaluating(model), uncompiled(), _listening(called), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return floats(run(model)), called


@contextmanager
def _listening(called: list[nn.Module]) -> Iterator[None]:
    """Collects the calls of this thread. (Any hook makes int8 layers take the way through nn.Module's call.)"""

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, Int8Module | nn.Embedding | nn.EmbeddingBag) or type_of(module) is not None:
            called.append(module)

    with register_module_forward_pre_hook(own_thread(note)):
        yield
