"""Convolutions with what follows them: a sum, an activation, u8 codes for the next one. It is never seen."""

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.convolutional import IMAGE, IMAGES, Basic, Bottleneck, ConvNorm, by_code, resnet, unfused
from helpers.numbers import normal
from torchq import QConfig, apply_plan, convert, plan_of, simulate
from torchq.modules.channels_last import ChannelsLast
from torchq.modules.conv_block import ConvBlock
from torchq.modules.pending_conv import PendingConv
from torchq.modules.quantized_conv import QuantizedConv
from torchq.numerics.metrics import sqnr_db
from torchq.ops import Activation

pytestmark = pytest.mark.usefixtures("seeded")

STATIC = QConfig(activation="static", rounding="nearest", smoothing="none")
DYNAMIC = QConfig(activation="dynamic", rounding="nearest", smoothing="none")
DATA = [normal(4, 32, 20, 20, seed=i) for i in range(4)]
X = normal(2, 32, 20, 20, seed=9)


def waiting(model):
    """The int8 model with blocks under the code of their classes, in which convolutions wait for each other."""
    return by_code(convert(model.eval(), DATA, config=STATIC), ConvBlock)


@pytest.fixture
def runs(monkeypatch):
    """Lists the products: the dtype of the input, the activation, and whether a sum and codes were a part of it."""
    seen = []
    usual = QuantizedConv._int8

    def spy(layer, x, activation, dtype, last, residual=None, y_qparams=None, around=()):
        seen.append((x.dtype, Activation(activation), residual is not None, y_qparams is not None))
        return usual(layer, x, activation, dtype, last, residual, y_qparams, around)

    monkeypatch.setattr(QuantizedConv, "_int8", spy)
    return seen


MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])

F32, U8, NONE, RELU = torch.float32, torch.uint8, Activation.NONE, Activation.RELU


@MODES
def test_a_block_of_transformers(runs, mode):
    qmodel = waiting(Bottleneck(32, 64))
    runs.clear()
    with mode():
        y = qmodel(X + 0)  # of the same mode
    assert type(y) is torch.Tensor
    assert runs == [
        (F32, RELU, False, True),  # codes for the next one
        (U8, RELU, False, True),
        (F32, NONE, False, False),  # the shortcut
        (U8, RELU, True, False),  # the sum is a part of it
    ]
    assert_identical(y, unfused(qmodel)(X))


@MODES
def test_a_block_of_torchvision(runs, mode):
    """Its activation works in place, and is called twice."""
    qmodel = waiting(Basic(32))
    runs.clear()
    with mode():
        y = qmodel(X + 0)
    assert runs == [(F32, RELU, False, True), (U8, RELU, True, False)]
    assert type(y) is torch.Tensor
    assert_identical(y, unfused(qmodel)(X))


class Pools(nn.Module):
    """Padding and pooling by torch's functions, which in inference mode are handed over whole."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 48, 1)
        self.act, self.pool, self.clip = nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.ReLU6()

    def forward(self, x):
        x = nn.functional.pad(self.act(self.a(x)), (1, 1, 1, 1))
        return self.clip(self.c(self.pool(self.act(self.b(x)))))


def test_inference_mode_fuses_what_no_grad_does(runs, monkeypatch):
    qmodel = convert(Pools().eval(), DATA, config=STATIC)
    made, usual = [], ChannelsLast.__init__

    def spy(self, values, scope):
        made.append(tuple(values.shape))
        usual(self, values, scope)

    monkeypatch.setattr(ChannelsLast, "__init__", spy)
    seen = {}
    for mode in (torch.no_grad, torch.inference_mode):
        runs.clear()
        made.clear()
        with mode():
            seen[mode] = qmodel(X + 0), list(runs), list(made)
    (y, *expected), (again, *found) = seen.values()
    assert_identical(again, y)
    assert found == expected
    assert (2, 32, 10, 10) in found[1]  # what max_pool2d gave


def test_a_sequential_without_data(runs):
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.SiLU(), nn.Dropout(), nn.Conv2d(32, 32, 3)).eval()
    qmodel = convert(model)
    runs.clear()
    y = qmodel(IMAGE)
    assert runs == [(F32, Activation.SILU, False, False), (F32, NONE, False, False)]
    assert sqnr_db(model(IMAGE), y) > 30


@pytest.mark.parametrize("config", [STATIC, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "act",
    [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.GELU(approximate="tanh"), nn.Tanh()]
    + [act(inplace=True) for act in (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)],
    ids=str,
)
def test_activations(act, config, runs):
    """Each becomes a part of the product, with the values of the activation by itself up to rounding."""
    qmodel = convert(ConvNorm(32, 32, act=act).eval(), DATA, config=config)
    runs.clear()
    y = qmodel(X)
    assert [run[1] for run in runs] == [qmodel.conv.fold.activation] != [NONE]
    with torch.inference_mode():
        assert_identical(qmodel(X), y)
    assert runs[0] == runs[1]
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, qmodel.act(qmodel.conv(X)), rtol=2e-5, atol=2e-5)


def test_other_memory_formats_and_dtypes():
    qmodel = waiting(Bottleneck(32, 64))
    y = qmodel(X)
    last = qmodel(X.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_identical(last.contiguous(), y)
    half = qmodel(X.bfloat16())
    assert half.dtype == torch.bfloat16
    assert sqnr_db(y, half.float()) > 30


class Curious(ConvNorm):
    """Reads the output of the convolution in more ways when it is asked to."""

    ask = False

    def forward(self, x):
        y = self.conv(x)
        z = self.act(y)
        return (z, y.sum(), y.numpy().copy(), y) if self.ask else z


def test_other_readers_get_the_values():
    qmodel = convert(Curious(32, 32, act=nn.ReLU()).eval(), DATA, config=DYNAMIC)
    qmodel.ask = True
    z, total, array, y = qmodel(X)
    exact = qmodel.conv(X)
    assert_identical(y, exact)
    assert_identical(torch.from_numpy(array), exact)
    assert_identical(total, exact.sum())
    assert_identical(z, exact.relu())
    assert {type(each) for each in (z, total, y)} == {torch.Tensor}


class Other(Basic):
    """Goes another way than in calibration when it is asked to."""

    way = ""

    def forward(self, x):
        a = self.bn1(self.conv1(x))
        if self.way == "another activation":
            a = a.tanh()
        elif self.way == "none":
            pass
        elif self.way == "twice":
            a = self.relu(self.relu(a))
        elif self.way == "kept":
            self.kept = a = self.relu(a)
        else:
            a = self.relu(a)
        b = self.bn2(self.conv2(a))
        if self.way == "another sum":
            return self.relu(b + x[:, :, :1] + a)
        if self.way == "to itself":
            return self.relu(b + b)
        if self.way == "scaled sum":
            return self.relu(torch.add(b, x, alpha=2))
        return self.relu(b + x)


WAYS = ["", "another activation", "none", "twice", "kept", "another sum", "to itself", "scaled sum"]


@MODES
@pytest.mark.parametrize("way", WAYS)
def test_another_way_through_the_model(way, mode):
    qmodel = convert(Other(32).eval(), DATA, config=STATIC)
    assert qmodel.torchq_plan.layers["conv1"].feeds == "conv2"
    qmodel.way = way
    twin = unfused(qmodel)
    twin.way = way
    with mode():
        assert_identical(qmodel(X), twin(X))
    if way == "kept":
        assert_identical(qmodel.kept + 0, twin.kept)


class Writes(Basic):
    """Writes to a tensor that a convolution waits with, when it is asked to."""

    to = ""

    def forward(self, x):
        a = self.bn1(self.conv1(x))
        if self.to == "the input":
            x.zero_()
        a = self.relu(a)
        if self.to == "a view of the input":
            a.sum()  # its values are made
        b = self.bn2(self.conv2(a))
        if self.to == "a view of the input":
            a[:, 1].mul_(2)
        if self.to == "made values":
            b.sum()
            c = self.conv2(b)
            b.mul_(2)
            return c + 1
        out = b + x
        if self.to == "the other summand":
            x.zero_()
        if self.to == "out=":
            torch.add(x, 1, out=x)
        return self.relu(out)


@MODES
@pytest.mark.parametrize("to", ["the input", "a view of the input", "made values", "the other summand", "out="])
def test_a_write_is_no_wrong_value(to, mode):
    qmodel = convert(Writes(32).eval(), DATA, config=STATIC)
    with mode():
        assert_identical(qmodel(X), unfused(qmodel)(X))
        qmodel.to = to
        with pytest.raises(RuntimeError, match="was written before it came"):
            qmodel(X + 0)
        assert unfused(qmodel)(X + 0).isfinite().all()
    assert torch._C._len_torch_dispatch_stack() == 0


def watched(model):
    """Collects input and output of every module without children, once it is called."""
    seen = {}

    def note(name, module, args, out):
        seen[name] = (args[0] + 0, out + 0)

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(partial(note, name))
    return seen


@pytest.mark.filterwarnings("ignore:torchq. this forward hook sees:UserWarning")
def test_hooks_see_what_the_float_model_has():
    qmodel = waiting(Bottleneck(32, 64))
    y, twin = qmodel(X), unfused(qmodel)
    seen, expected = watched(qmodel), watched(twin)
    assert_identical(qmodel(X), y)
    twin(X)
    assert seen.keys() == expected.keys()
    for name, (given, gave) in expected.items():
        assert_identical(seen[name][0], given, name)
        if not name.endswith("act"):  # in place of one that is a part of the layer before
            assert_identical(seen[name][1], gave, name)


def test_modes_gradients_and_simulation_see_no_pending():
    qmodel = waiting(Bottleneck(32, 64))
    y, twin = qmodel(X), unfused(qmodel)
    with torch.inference_mode():
        assert_identical(qmodel(X), y)
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        gradients = [torch.autograd.grad(model(x).sum(), x)[0] for model in (qmodel, twin)]
    assert_identical(*gradients)
    with simulate():
        assert_identical(qmodel(X), twin(X))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_identical(qmodel(X), twin(X))


@pytest.mark.slow(seconds=15)
def test_compiled_blocks():
    qmodel = waiting(Bottleneck(32, 64))
    assert_identical(torch.compile(qmodel, backend="aot_eager")(X), qmodel(X))


def test_copies_and_threads():
    qmodel = waiting(Bottleneck(32, 64))
    y, found = qmodel(X), {}
    for other in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert_identical(other(X), y)

    def serve(i):
        found[i] = [qmodel(X[:1]) for _ in range(5)]

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for given in found.values():
        for each in given:
            assert_identical(each, y[:1])


def test_few_values_do_not_wait(runs):
    qmodel = waiting(Bottleneck(32, 64))
    runs.clear()
    qmodel(X[:1, :, :4, :4])
    assert [run[1] for run in runs] == [NONE] * 4


def test_a_layer_alone_gives_its_output():
    qmodel = waiting(Bottleneck(32, 64))
    y = qmodel.layer[0].conv(X)
    assert type(y) is torch.Tensor
    assert not isinstance(y, PendingConv)
    assert float(y.min()) < 0


@pytest.mark.slow(seconds=8)
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Hardswish])
def test_a_whole_network(act):
    model = resnet(act)
    qmodel = convert(model, IMAGES, config=STATIC)
    fed = [name for name, layer in qmodel.torchq_plan.layers.items() if layer.feeds]
    assert len(fed) == 5
    y = qmodel(IMAGE)
    torch.testing.assert_close(y, unfused(qmodel)(IMAGE), rtol=0.02, atol=0.02 * float(y.abs().max()))
    assert sqnr_db(model(IMAGE), y) > 30
    assert_identical(apply_plan(model, plan_of(qmodel))(IMAGE), y)


def test_without_fusion_a_network_has_none():
    plain = convert(resnet(), IMAGES, config=QConfig(activation="static", observer="minmax", fuse=False))
    assert not any(layer.feeds or layer.norm or layer.adds for layer in plain.torchq_plan.layers.values())
