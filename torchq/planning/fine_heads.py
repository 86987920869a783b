"""Heads that share their weight with a table have two codes for each value of their input.

Such a head makes the model's output, and its error stands there undiminished. Version 0.1 left it in float, since it
shares the table. Its weight can't be rounded by GPTQ, for the table's sake, and more bits of it would take more memory.
Half of its error is that of its input, and 16 bits instead of 8 for that cost nothing where a model decodes: one row
reads all weights once, for both codes. Many rows take twice as long as with one.
"""

import dataclasses

from torchq.calibration.calibrate import Evidence
from torchq.modules.linear import LinearType
from torchq.modules.registry import Layer
from torchq.planning.choose import yardstick_of
from torchq.planning.plan import LayerPlan, Plan
from torchq.planning.tables import heads_of_coarse_tables, heads_of_tables

WHY = "two codes for each value of its input"


def fine_heads(plan: Plan, evidence: Evidence) -> Plan:
    """A stage: the heads of tables with residuals get a second code for each value of their input, and are dynamic.

    Not what the config wants static, and not trained ones: training compensated the codes that they have.
    """
    layers = dict(plan.layers)
    for name in heads_of_tables(plan) - heads_of_coarse_tables(plan):
        layer, planned = evidence.layers.get(name), layers[name]
        if layer is None or layer.trained is not None or evidence.config.activation == "static":
            continue
        if isinstance(layer.kind, LinearType):
            layers[name] = as_fine(layer, planned, evidence)
    return dataclasses.replace(plan, layers=layers)


def as_fine(layer: Layer, planned: LayerPlan, evidence: Evidence) -> LayerPlan:
    """The same layer, dynamic, with two codes; and its SQNR with them, if there is data."""
    reason = WHY if planned.kind == "int8 static" else f"{planned.reason}, {WHY}"
    record, sqnr_db = evidence.records.get(layer.name), planned.sqnr_db
    if sqnr_db and record is not None:
        yardstick = yardstick_of(layer, record.whole, evidence.config)
        sqnr_db = {**sqnr_db, **yardstick.measure({}, planned.scale_vector, fine=True)}
    return dataclasses.replace(
        planned, kind="int8 dynamic", reason=reason, input_qparams=None, observer=None, sqnr_db=sqnr_db, fine=True
    )
