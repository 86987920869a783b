"""Layers as arguments of other processes: the child computes the parent's bits, however it was started."""

import pickle

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.utils.data import DataLoader, Dataset

from helpers.commands import AFRESH
from helpers.compare import assert_identical
from torchq import QConfig, QuantizedLinear, convert
from torchq.modules.sending import received, sendable
from torchq.numerics.qparams import QParams

pytestmark = [pytest.mark.subprocess, pytest.mark.slow(seconds=5), pytest.mark.usefixtures("seeded")]
each_method = pytest.mark.parametrize("method", ["spawn", "forkserver"])
MODELS = ["a layer", "static layers", "a layer twice", "many layers"]


def made(name):
    x = torch.randn(4, 32)
    if name == "a layer":
        model = QuantizedLinear.from_float(nn.Linear(32, 20))
    elif name == "static layers":
        float_model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
        model = convert(
            float_model, [torch.randn(64, 32)], config=QConfig(activation="static", observer="minmax"), progress=False
        )
    elif name == "a layer twice":
        layer = QuantizedLinear.from_float(nn.Linear(32, 32))
        model = nn.Sequential(layer, nn.Tanh(), layer)
    else:  # as many storages as make file descriptors come back, floats among them
        pairs = [(QuantizedLinear.from_float(nn.Linear(32, 32, bias=i % 2 == 0)), nn.LayerNorm(32)) for i in range(12)]
        model = nn.Sequential(*(module for pair in pairs for module in pair))
    return model.eval(), x


def check(model, x, expected):
    torch.set_num_threads(1)
    with torch.no_grad():
        assert_identical(model(x), expected)
    if isinstance(model, nn.Sequential) and type(model[1]) is nn.Tanh:
        assert model[0] is model[2]


def check_all(cases):
    for case in cases:
        check(*case)


@each_method
def test_arguments_of_a_new_process(method):
    cases = [(model, x, model(x)) for model, x in map(made, MODELS)]
    process = torch.multiprocessing.get_context(method).Process(target=check_all, args=(cases,))
    process.start()
    process.join()
    assert process.exitcode == 0
    for model, x, expected in cases:
        assert_identical(model(x), expected)  # the parent's own goes on


def spawned(index, model, x, expected):
    check(model, x, expected)


def test_processes_started_by_torch():
    """Two processes, from the same arguments."""
    model, x = made("many layers")
    torch.multiprocessing.start_processes(spawned, (model, x, model(x)), nprocs=2, start_method="forkserver")


class Features(Dataset):
    """Computes its items with a model, as a frozen encoder does in front of training."""

    def __init__(self, model, x):
        self.model, self.x = model, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.model(self.x[index])


def test_a_data_loader_with_workers():
    model, x = made("static layers")
    loader = DataLoader(Features(model, x), batch_size=2, num_workers=2, multiprocessing_context=AFRESH)
    assert_identical(torch.cat(list(loader)), model(x))


def through_a_queue(models, answers, x):
    answers.put(models.get()(x).tolist())


def test_a_queue():
    model, x = made("a layer")
    models, answers = AFRESH.Queue(), AFRESH.Queue()
    process = AFRESH.Process(target=through_a_queue, args=(models, answers, x))
    process.start()
    models.put(model)
    assert answers.get() == model(x).tolist()
    process.join()


def test_a_pickle_holds_tensors_and_no_packed_weight():
    """Bytes are for new processes only: what is stored has the same form as ever."""
    layer = QuantizedLinear.from_float(nn.Linear(32, 20), input_qparams=QParams(0.1, 3))
    state = layer.__getstate__()
    assert isinstance(state["canonical"], dict)
    assert "packed" not in state["_buffers"]
    x = torch.randn(4, 32)
    assert_identical(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert received(sendable(state["canonical"])) is state["canonical"]
