"""Quantization-aware training of embeddings: rows that are looked up have the values of their int8 tables."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import QConfig, convert, fake_quantize, prepare_qat, simulate
from torchq.modules.embedding import QuantizedEmbedding, QuantizedEmbeddingBag
from torchq.modules.qat_embedding import QATEmbedding, QATEmbeddingBag, QATTable
from torchq.modules.qat_linear import QATLinear
from torchq.modules.ranges import fake_quantize_finely, fake_quantize_rows
from torchq.planning.tables import TRAINED

ROWS, DIM = 100, 48
IDS = torch.randint(ROWS, (4, 6), generator=torch.Generator().manual_seed(0))
DATA = [torch.randint(ROWS, (8, 6), generator=torch.Generator().manual_seed(seed)) for seed in range(1, 4)]


class Positions(nn.Embedding):
    """Has a forward of its own, which looks up other indices than it is given."""

    def forward(self, input):
        return super().forward(input.flip(-1))


class Tied(nn.Module):
    """A language model whose head may have the table of its embedding, and an encoder of bags."""

    def __init__(self, tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.positions = nn.Embedding(ROWS, DIM, padding_idx=3), Positions(ROWS, DIM)
        self.bag, self.body = nn.EmbeddingBag(ROWS, DIM, padding_idx=5), nn.Linear(DIM, DIM)
        self.head, self.bags = nn.Linear(DIM, ROWS, bias=False), True
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids) + self.positions(ids)
        x = x + self.bag(ids)[:, None] if self.bags else x
        return self.head(self.body(x).relu())


def train(model, steps=3):
    """Trains for a few steps to predict the next id; gives the losses."""
    optimizer, losses = torch.optim.Adam(model.train().parameters(), lr=3e-3), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(DATA[0]).flatten(0, 1), DATA[0].roll(1, 1).flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("data", [None, DATA], ids=["observed", "learned"])
@pytest.mark.parametrize("weight", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_training_forward_is_the_simulated_forward_of_the_converted_model(tied, weight, data):
    model = prepare_qat(Tied(tied), data, config=QConfig(weight=weight, embeddings=True))
    assert [type(model.table), type(model.bag)] == [QATEmbedding, QATEmbeddingBag]
    assert isinstance(model.positions, Positions)
    assert isinstance(model.positions, QATEmbedding)
    train(model)
    qmodel = convert(model)
    assert [type(qmodel.table), type(qmodel.bag)] == [QuantizedEmbedding, QuantizedEmbeddingBag]
    assert isinstance(qmodel.positions, QuantizedEmbedding)
    assert (qmodel.table.owner is qmodel.head) == tied
    for name in ("table", "positions", "bag"):  # a look-up has no sums, so here it needs no simulate()
        assert_identical(qmodel.get_submodule(name)(IDS), model.get_submodule(name)(IDS).detach())
    with simulate(), torch.no_grad():
        assert_identical(qmodel(IDS), model(IDS))
    assert "float_class" not in vars(qmodel.positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("embeddings", ["int8", True])
def test_a_row_is_rounded_by_its_own_peak(dtype, embeddings):
    """In whole steps or in sixteenths, as it was prepared, whatever the config says that makes it int8."""
    model = nn.ModuleList([nn.Embedding(2 * ROWS, DIM, dtype=dtype)])
    prepared = prepare_qat(model, config=QConfig(embeddings=embeddings))[0]
    weight = model[0].weight.detach().float()
    scale = weight.abs().amax(dim=1) / 127
    expected = fake_quantize(weight, scale, axis=0)
    if embeddings is True:
        steps = weight * (1 / scale)[:, None]
        more = ((steps - steps.round()) * 16).round().clamp(-8, 7)
        expected = (steps.round() + more / 16 + 0.0) * scale[:, None]  # no -0
    assert_identical(prepared(IDS).detach(), expected[IDS].to(dtype))
    qmodel = convert(nn.ModuleList([prepared]))
    assert_identical(qmodel[0](IDS), expected[IDS].to(dtype))
    assert qmodel.torchq_plan.tables["0"].residual == (embeddings is True)
    assert prepared(IDS[:0]).shape == (0, 6, DIM)


BAGS = {"sum": {"mode": "sum"}, "mean": {}, "max": {"mode": "max"}, "offsets": {"include_last_offset": True}}


@pytest.mark.parametrize("form", BAGS)
def test_gradients_are_those_of_the_float_module_at_rounded_rows(form):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"table": nn.Embedding(ROWS, DIM, padding_idx=3), "bag": nn.EmbeddingBag(ROWS, DIM, **BAGS[form])}
    )
    prepared, ids = prepare_qat(model), IDS.clone()
    ids[0, 0] = 3
    with torch.no_grad():
        for name, table in model.items():
            rounded = fake_quantize_finely if prepared[name].finely else fake_quantize_rows
            table.weight.copy_(rounded(table.weight, table.weight.abs().amax(dim=1) / 127))
    calls = {"table": (ids,), "bag": (ids,)}
    if form == "offsets":
        calls["bag"] = (ids.flatten(), torch.tensor([0, 5, 9, 24]))
    if form == "sum":
        calls["bag"] = (ids, None, normal(4, 6, seed=2))
    for name, call in calls.items():
        for each in (model, prepared):
            y = each[name](*call)
            (y * normal(*y.shape, seed=1)).sum().backward()
        gradient = prepared[name].weight.grad
        torch.testing.assert_close(gradient, model[name].weight.grad, rtol=1e-5, atol=1e-6)
        assert bool(gradient.any(dim=1).sum() == ids.unique().numel() - (name == "table")), name
    assert not prepared["table"].weight.grad[3].any()


def test_sparse_gradients_stay_sparse():
    model = prepare_qat(nn.ModuleList([nn.Embedding(ROWS, DIM, sparse=True)]))
    model[0](IDS).sum().backward()
    assert model[0].weight.grad.is_sparse


def test_training_lowers_the_loss_and_moves_all():
    model = prepare_qat(Tied(), DATA)
    assert {name for name, _ in Tied().named_parameters()} < {name for name, _ in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert model.head.weight is model.table.weight
    losses = train(model, steps=30)
    assert losses[-1] < 0.5 * losses[0]
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_data_does_not_return_trained_tables_to_float():
    """Neither for what int8 costs the output, nor because a batch did not reach them."""
    plain, model = Tied(), prepare_qat(Tied(), DATA)
    train(model)
    for each in (plain, model):
        each.bags = False
        with torch.no_grad():
            each.positions.weight[:, 0] = 40  # of which int8 has steps of 0.3
            each.body.weight[:, 0] = 0
    kinds = {name: row.kind for name, row in convert(plain, DATA).torchq_plan.tables.items()}
    assert kinds == {"table": "int8", "positions": "float", "bag": "float"}
    qmodel = convert(model, DATA)
    assert {row.kind for row in qmodel.torchq_plan.tables.values()} == {"int8"}
    assert qmodel.torchq_plan.layers["head"].channel_scale is None  # its weight is the table's, in the table's units


def test_what_is_left_out_is_float_then_and_after():
    model = prepare_qat(Tied(), config=QConfig(exclude=("bag",)))
    assert [type(model.table), type(model.bag)] == [QATEmbedding, nn.EmbeddingBag]
    train(model)
    rows = convert(model).torchq_plan.tables
    assert [(row.kind, row.reason) for row in (rows["bag"], rows["table"])] == [
        ("float", TRAINED),
        ("int8", "tied to 'head': one int8 copy"),
    ]
    back = convert(model, config=QConfig(exclude=("table", "positions")))
    assert [type(back.table), type(back.positions), type(back.head)] == [nn.Embedding, Positions, nn.Linear]
    assert back.head.weight is back.table.weight
    assert set(back.state_dict()) >= {"table.weight", "positions.weight", "bag.weight"}
    off = prepare_qat(Tied(), config=QConfig(embeddings=False))
    assert not any(isinstance(module, QATTable) for module in off.modules())
    assert type(off.head) is nn.Linear  # int8 would be a second copy
    assert type(off.body) is QATLinear


def test_a_table_that_no_batch_reaches_stays_float_with_its_head():
    model = Tied()
    model.other = nn.Embedding(ROWS, DIM)
    plan = prepare_qat(model, DATA).torchq_plan
    assert plan.tables["other"].reason.startswith("calib_loader never reached it")
    assert plan.tables["table"].kind == "int8"


def test_states_and_copies():
    model = prepare_qat(Tied())
    train(model)
    other = prepare_qat(Tied()).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.positions) is type(model.positions)
        assert twin.head.weight is twin.table.weight
        assert_identical(twin(IDS), model(IDS))
        train(twin)
        assert not torch.equal(twin(IDS), model(IDS))


def test_bad_input():
    model = prepare_qat(Tied())
    with pytest.raises(IndexError):
        model.table(torch.tensor([ROWS]))
    with torch.no_grad():
        model.table.weight[7] = torch.nan
    model.table(torch.tensor([1]))
    with pytest.raises(ValueError, match="NaN or Inf"):
        model.table(torch.tensor([7]))
    with pytest.raises(ValueError, match=r"the model is already prepared \('0' is a QATEmbedding\)"):
        prepare_qat(prepare_qat(nn.ModuleList([nn.Embedding(ROWS, DIM)])))
    scaled = nn.ModuleList([nn.Embedding(ROWS, DIM, max_norm=1.0)])
    with pytest.raises(ValueError, match=r"of the model can be quantized; '0': max_norm rescales rows"):
        prepare_qat(scaled)
