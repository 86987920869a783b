"""What judges is not what chose: whole batches are held out of rounding, and few rows choose nothing."""

import pytest
import torch
from torch import nn

from helpers.numbers import normal
from torchq import QConfig, convert
from torchq.calibration.record import MIN_STATIC_ROWS, Record
from torchq.calibration.sample import Sample
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")


def observed(batches, **settings):
    record = Record.empty(8, QConfig(**settings))
    for batch, x in enumerate(batches):
        record.observe(x, batch)
    return record


def test_every_second_batch_is_held_out_of_the_products():
    batches = [normal(6, 8, seed=i) for i in range(4)]
    record = observed(batches, sample_rows=20)
    seen = torch.cat([batches[0], batches[2]])
    assert torch.allclose(record.gram, seen.T @ seen, rtol=1e-5, atol=1e-5)
    assert (record.gram_rows, record.held_rows) == (12, 12)
    assert observed(batches, rounding="gptq").held_rows == 0  # asked for: nothing is judged


@pytest.mark.parametrize(("rows", "others"), [(0, 6), (6, 0), (6, 6), (0, 0)])
def test_products_of_processes_without_rows_of_their_own_merge(rows, others):
    """Without rows, XᵀX has no values yet: none of what lies in its memory may count."""
    parts = [normal(rows, 8), normal(others, 8, seed=1)]
    one, other = (observed([part]) for part in parts)
    for record in (one, other):
        if record.gram_rows == 0:
            record.gram.fill_(torch.nan)
    one.merge(other)
    assert one.gram_rows == rows + others
    if one.gram_rows:
        seen = torch.cat(parts)
        assert torch.allclose(one.products(), seen.T @ seen, rtol=1e-5, atol=1e-5)
    one.observe(normal(3, 8, seed=2), batch=2)
    seen = torch.cat([*parts, normal(3, 8, seed=2)])
    assert torch.allclose(one.products(), seen.T @ seen, rtol=1e-5, atol=1e-5)


def test_the_sample_knows_whose_rows_are_held_out():
    sample = Sample(capacity=50)
    for batch in range(9):
        sample.add(torch.full((30, 1), float(batch)), batch)
        if batch == 5:
            before = sample.before_last_add()
    assert torch.equal(sample.held_out, sample.rows.flatten() % 2 == 1)
    assert before.rows_seen == 150
    assert torch.equal(before.held_out, before.rows.flatten() % 2 == 1)
    assert 10 < sample.held_out.sum() < 40


def graphs(count, seed):
    """Rows that are much alike within a batch, as the atoms of one crystal are."""
    return [normal(1, 64, seed=seed + i) + 0.1 * normal(64, 64, seed=1000 + seed + i) for i in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_rows_alike_in_a_batch_do_not_judge_themselves(seed):
    """GPTQ fits the few graphs it saw, by many dB, and no others."""
    torch.manual_seed(seed)
    model, new = nn.Sequential(nn.Linear(64, 64)).eval(), torch.cat(graphs(64, 100 * seed + 50))
    auto, without = convert(model, graphs(8, 100 * seed)), convert(model)
    assert sqnr_db(model(new), auto(new)) > sqnr_db(model(new), without(new)) - 0.3


@pytest.mark.parametrize("batches", [1, 3])
def test_few_rows_choose_no_static_range(batches):
    """Uniform inputs, for which static is as good as dynamic on the rows it saw."""
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    few, enough = torch.rand(MIN_STATIC_ROWS - 1, 64), torch.rand(MIN_STATIC_ROWS, 64)
    config = QConfig(smoothing="none")
    layer = convert(model, few.split(-(-len(few) // batches)), config=config).torchq_plan.layers["0"]
    assert (layer.kind, layer.reason) == (
        "int8 dynamic",
        "fewer than 64 calibration rows: too few for a static range",
    )
    assert max(layer.sqnr_db["minmax"], layer.sqnr_db["mse"]) > layer.sqnr_db["dynamic"] - 0.3
    layer = convert(model, enough.split(-(-len(enough) // batches)), config=config).torchq_plan.layers["0"]
    assert layer.kind == "int8 static"
    config = QConfig(activation="static")
    assert convert(model, [few], config=config).torchq_plan.layers["0"].kind == "int8 static"


@pytest.mark.filterwarnings("ignore:torchq.convert. 1 of 1 layers saw fewer than 16 rows")
def test_fewer_than_sixteen_rows_round_nothing():
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), normal(40, 2) @ normal(2, 8, seed=1)
    layer = convert(model, [x[:15]]).torchq_plan.layers["0"]
    assert layer.no_gptq == "15 calibration rows, rounding='auto' takes gptq from 16 rows on"
    assert convert(model, [x[:16]]).torchq_plan.layers["0"].gptq_db is not None
    asked = convert(model, [x[:15]], config=QConfig(rounding="gptq")).torchq_plan.layers["0"]
    assert asked.rounding == "gptq"


def test_a_layer_that_only_held_out_batches_reach_is_rounded_to_nearest():
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.turn = nn.Linear(16, 16), nn.Linear(16, 16), 0

        def forward(self, x):
            self.turn += 1
            return self.a(x) if self.turn % 2 else self.b(x)

    x = normal(80, 2) @ normal(2, 16, seed=1)
    layers = convert(Turns().eval(), x.split(20)).torchq_plan.layers
    assert [layer.rounding for layer in layers.values()] == ["gptq", "nearest"]  # `a` is judged by its rows
    assert layers["b"].no_gptq == "its rows are all of batches that judge, or none is: gptq needs both"
