"""Quantization-aware training under DDP and FSDP2: as in one process, and every process converts to the same bits."""

import pytest
import torch
from torch import distributed, nn

from helpers.numbers import normal
from helpers.processes import together
from torchq import convert, prepare_qat, simulate, sqnr_db

pytestmark = [
    pytest.mark.subprocess,
    pytest.mark.slow(seconds=30),
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch was built without gloo"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),  # torch's own, of FSDP
]
SIZE, STEPS = 2, 6
X, TARGETS = normal(STEPS, 32, 48), normal(STEPS, 32, 8, seed=1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8))


def shard(rank):
    return [x[rank::SIZE] for x in X] if rank is not None else list(X)


def train(model, rank):
    """On the rows of this rank; None has all."""
    rows = slice(rank, None, SIZE) if rank is not None else slice(None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, target in zip(X, TARGETS, strict=True):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[rows]), target[rows]).backward()
        optimizer.step()
    return model


def converted(model, rank, group):
    qmodel = convert(model.eval(), shard(rank), group=group)
    with torch.no_grad(), simulate():
        simulated = qmodel(X[0])
    with torch.no_grad():
        trained = model(X[0])
    return qmodel.torchq_plan.to_dict(), qmodel.state_dict(), torch.equal(simulated, trained)


def whole(sharded, ranges, rank, group):
    """The same model, not sharded: in every process."""
    return gathered(sharded, prepare_qat(net(), shard(rank), ranges=ranges, group=group))


def gathered(sharded, model):
    """`model`, with the state of the sharded one."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model.load_state_dict(get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True)))
    return model


class Words(nn.Module):
    """An embedding, a recurrent layer, attention and convolutions."""

    def __init__(self):
        super().__init__()
        self.table, self.rnn = nn.Embedding(60, 32), nn.LSTM(32, 32, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.conv, self.head = nn.Conv1d(32, 16, 3), nn.Linear(16, 8)

    def forward(self, ids):
        x = self.layer(self.rnn(self.table(ids))[0])
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))


def words():
    torch.manual_seed(0)
    return Words()


def sentences(rank, count):
    """Of each process its own, and of another number."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(0, 60, (4 + rank, 7), generator=generator) for _ in range(count)]


def trained_words(rank, wrapper, group, mesh):
    """What two processes made of all kinds of modules: the plan, the state, and whether it is what was trained."""
    from torch.distributed.fsdp import fully_shard

    model = prepare_qat(words(), sentences(rank, 4), group=group)
    wrapped = nn.parallel.DistributedDataParallel(model) if wrapper == "DDP" else fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    for ids in sentences(rank, 3):
        optimizer.zero_grad()
        wrapped(ids).square().mean().backward()
        optimizer.step()
    if wrapper == "FSDP":
        model = gathered(model, prepare_qat(words(), sentences(rank, 4), group=group))
    before = prepare_qat(words(), sentences(rank, 4), group=group).state_dict()
    moved = sum(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    qmodel = convert(model.eval(), sentences(rank, 2), group=group)
    with torch.no_grad(), simulate():
        simulated = qmodel(sentences(0, 1)[0])
    with torch.no_grad():
        same = torch.equal(simulated, model(sentences(0, 1)[0]))
    return qmodel.torchq_plan.to_dict(), qmodel.state_dict(), same, moved


def scenarios(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found, group, mesh = {}, distributed.group.WORLD, init_device_mesh("cpu", (SIZE,))
    for wrapper in ("DDP", "FSDP"):
        found["kinds", wrapper] = trained_words(rank, wrapper, group, mesh)
    for ranges in ("learned", "observed"):
        model = prepare_qat(net(), shard(rank), ranges=ranges, group=group)
        wrapped = train(nn.parallel.DistributedDataParallel(model), rank)
        try:
            convert(wrapped, shard(rank), group=group)
        except ValueError as error:
            found["DDP refused"] = str(error)
        found["DDP", ranges] = model.state_dict(), *converted(wrapped.module, rank, group)

        model = prepare_qat(net(), shard(rank), ranges=ranges, group=group)
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        train(fully_shard(model, mesh=mesh), rank)
        try:
            convert(model, shard(rank), group=group)
        except ValueError as error:
            found["FSDP refused"] = str(error)
        model = whole(model, ranges, rank, group)
        found["FSDP", ranges] = model.state_dict(), *converted(model, rank, group)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return together(scenarios, SIZE, tmp_path_factory.mktemp("qat"))


@pytest.mark.parametrize("ranges", ["learned", "observed"])
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP"])
def test_every_process_converts_to_the_same_bits(found, wrapper, ranges):
    (_, plan, state, exact), (_, other_plan, other_state, _) = (each[wrapper, ranges] for each in found)
    assert plan == other_plan
    assert {layer["kind"] for layer in plan["layers"].values()} == {"int8 static"}
    assert state.keys() == other_state.keys()
    assert all(torch.equal(value, other_state[key]) for key, value in state.items() if isinstance(value, torch.Tensor))
    assert exact  # process 0 computes what it trained


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP"])
def test_all_kinds_of_modules_convert_to_the_same_bits(found, wrapper):
    """On shards of other sizes. Every layer has been trained in int8, and most of its numbers have moved."""
    (plan, state, exact, moved), (other_plan, other_state, _, _) = (each["kinds", wrapper] for each in found)
    assert plan == other_plan
    assert {layer["kind"] for layer in plan["layers"].values()} == {"int8 static"}
    assert {"rnn.hh_l0", "layer.self_attn.q_proj", "layer.linear1", "conv", "head"} <= plan["layers"].keys()
    assert state.keys() == other_state.keys()
    assert all(torch.equal(value, other_state[key]) for key, value in state.items() if isinstance(value, torch.Tensor))
    assert exact
    assert moved > 20


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP"])
def test_training_is_that_of_one_process_on_all_rows(found, wrapper):
    """Learned ranges and weights have averaged gradients; float32 sums in another order: 80 dB."""
    model = train(prepare_qat(net(), shard(None)), None)
    for each in found:
        for key, value in model.state_dict().items():
            assert sqnr_db(value, each[wrapper, "learned"][0][key]) > 80, key


def test_the_wrappers_themselves_are_refused(found):
    for each in found:
        assert each["DDP refused"].startswith("torchq.convert: the model is wrapped in DistributedDataParallel. Pass")
        assert each["FSDP refused"].startswith("torchq.convert: parameter '0.weight' is sharded over processes")
