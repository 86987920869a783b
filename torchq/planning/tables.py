"""Which embeddings get an int8 table, and why the others don't.

Embeddings and heads that share one parameter share one int8 copy of it, or stay in float together: a second copy would
take more memory than int8 saves. The copy belongs to the head if there is one, packed for its product.
"""

import dataclasses
import math
from collections.abc import Container, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from torchq.calibration.calibrate import Evidence
from torchq.config import QConfig
from torchq.modules.base import FLOATS, model_bytes, why_opaque
from torchq.modules.embedding import TABLES, is_prepared, why_float
from torchq.modules.qat_embedding import QATTable
from torchq.modules.registry import Layer
from torchq.numerics.metrics import decibels, energies
from torchq.numerics.qparams import dequantize
from torchq.numerics.residual import residuals_of, with_residuals
from torchq.ops.lookup import residual_width
from torchq.ops.weights import quantize_weight, weight_blocks
from torchq.planning.plan import LayerPlan, Plan, TablePlan

MIN_BYTES = 2**14
"""Smaller tables stay in float: they are nothing beside the rest of a model."""

TRAINED = "prepare_qat trained the model with it in float"

UNREACHED = "calib_loader never reached it; its table may be read without calling it"
READ = "more than look-ups reads its table, which in int8 would be dequantized each time"

LOSS_DB = 0.1
"""How much SQNR of the model's output int8 tables may cost with `QConfig(embeddings="auto")`, if no layer shares them.

A table that a head shares may cost what another plan may (`selfcheck.MARGIN_DB`): in float, it would keep the head so.
"""


MOST_SHARE = 0.7
"""Of a model's bytes. With more of them in tables `QConfig(embeddings="auto")` gives none residuals: with them, int8
would take more than 0.35 of what float takes."""


def find_tables(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, nn.Module]:
    """The embeddings of the model by name, but for those inside of a module that has layers. A shared one goes once."""
    inside = tuple(f"{layer.path}." for layer in layers.values())
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, TABLES) and not name.startswith(inside)}


def first_tables(
    model: nn.Module, layers: Mapping[str, Layer], barred: Mapping[str, str], config: QConfig
) -> dict[str, TablePlan]:
    """A row for each embedding of the model.

    `barred` has the reasons of layers and tables that must stay in float, as far as they are known.
    """
    tables = find_tables(model, layers)
    weights: dict[int, list[str]] = {}
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        if not layer.part:
            weights.setdefault(id(layer.weight), []).append(name)  # a weight stored transposed is a view, and no table
    for name, module in tables.items():
        weight = module._parameters.get("weight")
        groups.setdefault(id(module) if weight is None else id(weight), []).append(name)
    trained = any(layer.trained for layer in layers.values()) or any(map(is_prepared, tables.values()))
    rows, residuals = {}, have_residuals(model, tables, config)
    for key, names in groups.items():
        heads = weights.get(key, [])
        ours = [*(layers[name].module for name in heads), *(tables[name] for name in names)]
        reasons = [barred.get(name) or _why_float(tables[name], config) for name in names]
        reasons += [_of_others(model, ours, key), *(_of_head(name, barred) for name in heads)]
        if trained and not all(is_prepared(tables[name]) for name in names):
            reasons.append(TRAINED)
        reason = next(filter(None, reasons), None)
        if reason is not None:
            rows.update({name: TablePlan("float", reason) for name in names})
            continue
        finely = _was_trained_finely([tables[name] for name in names])
        finely = residuals if finely is None else finely
        db = _sqnr_db(tables[names[0]], finely=finely)
        more = ", and 4 more bits for look-ups" if finely else ""
        why = (f"tied to {heads[0]!r}: one int8 copy" if heads else "a scale for each row") + more
        rows[names[0]] = TablePlan("int8", why, heads[0] if heads else None, db, finely)
        owner = heads[0] if heads else names[0]
        tied = TablePlan("int8", f"tied to {owner!r}: one int8 copy{more}", owner, db, finely)
        rows.update(dict.fromkeys(names[1:], tied))
    return {name: rows[name] for name in tables}


def _why_float(module: nn.Module, config: QConfig) -> str | None:
    """Why the table of this module must stay in float, by itself."""
    if config.embeddings is False:
        return "QConfig(embeddings=False)"
    reason = why_float(module) or why_opaque(module)
    if reason is not None:
        return reason
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which a swap would drop"
    weight = module.weight.detach()  # type: ignore[operator]
    if weight.device.type != "cpu":
        return f"its table is on device {weight.device}"
    if weight.dtype not in FLOATS:
        return f"its table is {weight.dtype}; float32, bfloat16 and float16 can be quantized"
    width = weight.shape[1]
    taken = width + 4 + (0 if config.embeddings == "int8" else residual_width(width))
    if weight.nbytes < MIN_BYTES or taken >= width * weight.itemsize:
        return f"int8 would save next to nothing: it has {weight.nbytes} bytes"
    if not all(math.isfinite(extreme) for extreme in torch.aminmax(weight)):
        return "its table has NaN or infinity"
    return None


def _of_others(model: nn.Module, ours: Sequence[nn.Module], key: int) -> str | None:
    """Why the table must stay in float as a parameter of other modules than `ours`, which would keep it."""
    for name, module in model.named_modules():
        others = not any(module is each for each in ours)
        if others and any(id(parameter) == key for parameter in module._parameters.values()):
            return f"its table is a parameter of {name!r} ({type(module).__name__}) too"
    return None


def _of_head(name: str, barred: Mapping[str, str]) -> str | None:
    return f"its table is the weight of {name!r}, which stays in float" if name in barred else None


def have_residuals(model: nn.Module, tables: Mapping[str, nn.Module], config: QConfig) -> bool:
    """Whether look-ups in the int8 tables of the model are to have residuals."""
    if config.embeddings != "auto":
        return config.embeddings is True
    weights = {
        id(weight): weight for module in tables.values() if (weight := module._parameters.get("weight")) is not None
    }
    return sum(weight.nbytes for weight in weights.values()) <= MOST_SHARE * model_bytes(model)


def _was_trained_finely(modules: Sequence[nn.Module]) -> bool | None:
    """Whether the table that these share was trained with residuals; None if it was not trained."""
    trained = [cast(QATTable, module).finely for module in modules if is_prepared(module)]
    return all(trained) if trained else None


def _sqnr_db(module: nn.Module, *, finely: bool, channel_scale: Tensor | None = None) -> float:
    weight = module.weight.detach()  # type: ignore[operator]
    codes, scale = quantize_weight(weight, per_channel=True, channel_scale=channel_scale)
    both = torch.zeros(2, dtype=torch.float64, device="cpu")
    for rows, values in weight_blocks(weight, channel_scale):
        found = dequantize(codes[rows], scale[rows], axis=0)
        if finely:
            found = with_residuals(codes[rows], residuals_of(values, codes[rows], scale[rows]), scale[rows])
        both += energies(
            *((values, found) if channel_scale is None else (values * channel_scale, found * channel_scale))
        )
    return decibels(both)


# ---- Stages ----------------------------------------------------------------------------------------------------------


def keep_together(plan: Plan, evidence: Evidence) -> Plan:
    """A stage: tables that the batches read otherwise than by calls, and those of heads in float, return to float.

    Trained ones do not: training compensated what int8 costs, and saw what is read.
    """
    for name, row in plan.tables.items():
        group = {each for each, other in plan.tables.items() if (other.owner or each) == (row.owner or name)}
        if row.kind != "int8" or not evidence.batches or is_prepared(evidence.model.get_submodule(name)):
            continue
        if not group & evidence.tables_called:
            plan = tables_in_float(plan, UNREACHED, name)
        elif group & evidence.tables_read:
            plan = tables_in_float(plan, READ, name)
    return settled(plan)


def settled(plan: Plan) -> Plan:
    """The plan with tables in float whose owner is: they share one parameter."""
    int8 = plan.int8_tables()
    lost = {name: row.owner for name, row in plan.tables.items() if row.kind == "int8" and name not in int8}
    for name, owner in lost.items():
        plan = tables_in_float(plan, f"its table is the weight of {owner!r}, which stays in float", name)
    return plan


def tables_in_float(plan: Plan, reason: str, *names: str, heads: bool = True) -> Plan:
    """The plan with these tables in float, or with all that are int8; with `heads`, the heads tied to them too."""
    tables, layers = dict(plan.tables), dict(plan.layers)
    for name in names or plan.int8_tables():
        row = tables[name]
        tables[name] = dataclasses.replace(row, kind="float", reason=reason, owner=None, residual=False)
        if heads and row.owner in layers and layers[row.owner].is_int8:
            text = f"its weight is that of {name!r} too, whose table stays in float; int8 would be a second copy of it"
            layers[row.owner] = LayerPlan("float", text, sqnr_db=layers[row.owner].sqnr_db)
    return dataclasses.replace(plan, layers=layers, tables=tables)


def tables_of_their_own(plan: Plan) -> list[str]:
    """The int8 tables that no layer shares."""
    heads = heads_of_tables(plan)
    return [name for name in plan.int8_tables() if plan.tables[name].owner not in heads]


def small_ones(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Of these tables those of less than half the size of the largest, or all if there are none: the least is lost."""
    sizes = {name: cast(Tensor, model.get_submodule(name).weight).nbytes for name in names}
    small = [name for name, size in sizes.items() if 2 * size < max(sizes.values())]
    return small or list(names)


def heads_of_tables(plan: Plan) -> set[str]:
    """The layers whose weight is a table too. They are rounded to nearest, for the table's sake."""
    return {row.owner for row in plan.tables.values() if row.kind == "int8" and row.owner in plan.layers}


def heads_of_coarse_tables(plan: Plan) -> set[str]:
    """Those whose table has no residuals. They are not smoothed: its rows would be too coarse for what they gain."""
    coarse = {row.owner for row in plan.tables.values() if not row.residual}
    return heads_of_tables(plan) & coarse


def measured_tables(plan: Plan, model: nn.Module, heads: Container[str]) -> Plan:
    """The plan with the SQNR of the tables that these share, whose rows are divided by what multiplies their inputs."""
    tables = dict(plan.tables)
    for name in plan.int8_tables():
        row = tables[name]
        if row.owner in heads and row.owner in plan.layers:
            scale = plan.layers[row.owner].scale_vector
            db = _sqnr_db(model.get_submodule(name), finely=row.residual, channel_scale=scale)
            tables[name] = dataclasses.replace(row, sqnr_db=db)
    return dataclasses.replace(plan, tables=tables)
