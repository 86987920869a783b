"""The plan of a part of a model, or of a larger model that has it as a part: the same rows under other names."""

import dataclasses
from collections.abc import Callable

from torchq.errors import BadValueError
from torchq.planning.plan import LayerPlan, Plan, TablePlan

Rename = Callable[[str], str | None]
"""The new name of a module; None for one that is left out."""


def renamed(plan: Plan, rename: Rename) -> Plan:
    """The plan with these names, without what is left out. A layer's activation that is left out is not fused.

    Raises:
        ValueError: a table is the weight of a head that is left out.

    >>> plan = Plan({"a.fc": LayerPlan("int8 dynamic", ""), "b": LayerPlan("float", "")})
    >>> list(renamed(plan, within("a")).layers)
    ['fc']
    """
    named = {name: new for name in (*plan.layers, *plan.attentions, *plan.tables) if (new := rename(name)) is not None}
    return dataclasses.replace(
        plan,
        layers={named[name]: _layer(layer, rename) for name, layer in plan.layers.items() if name in named},
        attentions={named[name]: row for name, row in plan.attentions.items() if name in named},
        tables={named[name]: _table(name, row, rename) for name, row in plan.tables.items() if name in named},
        written_attentions=tuple(new for name in plan.written_attentions if (new := rename(name)) is not None),
    )


def within(path: str) -> Rename:
    """Names as they are in the module of this name; "" is the model itself."""
    start = f"{path}." if path else ""
    return lambda name: name.removeprefix(start) if name.startswith(start) else None


def _layer(layer: LayerPlan, rename: Rename) -> LayerPlan:
    return dataclasses.replace(
        layer,
        norm=layer.norm and rename(layer.norm),
        activation=layer.activation and rename(layer.activation),
        sum_norm=layer.sum_norm and rename(layer.sum_norm),
        skipped=tuple(new for name in layer.skipped if (new := rename(name)) is not None),
        feeds=layer.feeds and rename(layer.feeds),
        hands=_all(layer.hands, rename),
        sum_qparams=layer.sum_qparams if _all(layer.hands, rename) else None,
    )


def _all(names: tuple[str, ...], rename: Rename) -> tuple[str, ...]:
    """The new names, or none where one of them is left out."""
    found = tuple(new for name in names if (new := rename(name)) is not None)
    return found if len(found) == len(names) else ()


def _table(name: str, row: TablePlan, rename: Rename) -> TablePlan:
    owner = row.owner and rename(row.owner)
    if row.owner and not owner and row.kind == "int8":
        raise BadValueError(f"the table {name!r} is the weight of {row.owner!r}, which is left out here.")
    return dataclasses.replace(row, owner=owner)
