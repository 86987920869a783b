"""Activations that write over their input, as nearly all of torchvision's do: behind convolutions, and elsewhere."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.conv_blocks import DATA, STATIC, X
from helpers.convolutional import by_code, shaken, unfused
from torchq import QConfig, convert, load, prepare_qat, save, simulate
from torchq.modules.conv_block import ConvBlock
from torchq.modules.curve import Curve
from torchq.numerics.metrics import sqnr_db
from torchq.ops import Activation, activate

pytestmark = pytest.mark.usefixtures("seeded")

SCHEMES = [QConfig(activation=scheme, rounding="nearest", smoothing="none") for scheme in ("static", "dynamic")]


class Squeeze(nn.Module):
    """As torchvision's SqueezeExcitation."""

    def __init__(self, channels, inner, activation, scale):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)
        self.activation, self.scale_activation = activation, scale

    def _scale(self, input):
        scale = self.avgpool(input)
        scale = self.fc1(scale)
        scale = self.activation(scale)
        scale = self.fc2(scale)
        return self.scale_activation(scale)

    def forward(self, input):
        scale = self._scale(input)
        return scale * input


def row(inputs, outputs, kernel=1, stride=1, act=None, **options):
    """As torchvision's Conv2dNormActivation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, **options)
    acts = [] if act is None else [act(inplace=True)]
    return nn.Sequential(conv, shaken(nn.BatchNorm2d(outputs), seed=outputs), *acts)


class Inverted(nn.Module):
    """As the InvertedResidual of torchvision's MobileNetV3."""

    def __init__(self, act, outputs=32, stride=1, squeeze=True):
        super().__init__()
        self.use_res_connect = stride == 1 and outputs == 32
        layers = [row(32, 96, act=act), row(96, 96, 3, stride, act, groups=96)]
        layers += [Squeeze(96, 24, nn.ReLU(), nn.Hardsigmoid())] if squeeze else []
        self.block = nn.Sequential(*layers, row(96, outputs))

    def forward(self, input):
        result = self.block(input)
        if self.use_res_connect:
            result += input
        return result


class Basic(nn.Module):
    """As torchvision's BasicBlock: one activation, called on two tensors."""

    def __init__(self, act, outputs=32, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(32, outputs, 3, stride, 1, bias=False), shaken(nn.BatchNorm2d(outputs))
        self.relu = act(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), shaken(nn.BatchNorm2d(outputs), 1)
        self.downsample = row(32, outputs, stride=stride) if stride > 1 or outputs != 32 else None
        self.stride = stride

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class First(nn.Module):
    """What writes over the input of the module, and the sum reads that."""

    def __init__(self, act):
        super().__init__()
        self.act, self.one, self.two = act(inplace=True), row(32, 64, act=act), row(64, 32)

    def forward(self, x):
        y = self.two(self.one(self.act(x)))
        return y + x


ACTS = [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish]
BLOCKS = {
    "squeeze": Inverted,
    "inverted": lambda act: Inverted(act, squeeze=False),
    "stride": lambda act: Inverted(act, 48, 2),
    "basic": Basic,
    "shortcut": lambda act: Basic(act, 64, 2),
}


@pytest.mark.parametrize("config", SCHEMES, ids=["static", "dynamic"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_torchvision_give_the_bits_of_their_code(ran, name, act, config):
    model = BLOCKS[name](act).eval()
    qmodel = convert(model, DATA, config=config)
    assert isinstance(qmodel, ConvBlock)
    code = by_code(qmodel, ConvBlock)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for x in (X + 0, X.contiguous(memory_format=torch.channels_last), X[:1, :, :9, :7] + 0):
                before, expected = x.clone(), model(x)
                ran.clear()
                y = qmodel(x)
                assert ran == [qmodel]
                assert_identical(y, code(x))
                assert y.stride() == expected.stride()
                assert_identical(x, before)
                assert sqnr_db(expected, y) > 25
            assert qmodel(X[:0]).shape == model(X[:0]).shape
    for other in (unfused(code), copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert_identical(other(X), qmodel(X))


@pytest.mark.parametrize("act", ACTS)
def test_what_writes_over_the_input_of_a_block_still_does(act):
    model = First(act).eval()
    qmodel = convert(model, [x + 0 for x in DATA], config=STATIC)
    given, seen = X + 0, X + 0
    expected, y = model(given), qmodel(seen)
    assert sqnr_db(expected, y) > 25
    torch.testing.assert_close(seen, given, rtol=1e-6, atol=1e-6)
    assert not torch.equal(seen, X)


class Reads(nn.Module):
    """Reads what was written over, when it is asked to."""

    reads = ""

    def __init__(self, act):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(32, 64, 3), shaken(nn.BatchNorm2d(64)), act(inplace=True)
        self.last = nn.Conv2d(64, 32, 3)

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.reads == "before":
            y.sum()
        z = self.act(y)
        assert z is y
        if self.reads:
            return self.last(z) + y.sum()
        return self.last(z)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("reads", ["before", "behind"])
def test_who_reads_it_sees_what_was_written(reads, act):
    """Calibration saw no such reader."""
    qmodel = convert(Reads(act).eval(), DATA, config=STATIC)
    plan = qmodel.torchq_plan.layers["conv"]
    assert (plan.activation, plan.feeds) == ("act", "last")
    qmodel.reads = reads
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_identical(qmodel(X + 0), unfused(qmodel)(X + 0))


class Waits(Reads):
    """The second convolution waits with what the activation then writes over."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        if not self.reads:
            return self.final(self.last(self.act(y)))
        z = self.last(y)
        self.act(y)
        return self.final(z)

    def __init__(self, act):
        super().__init__(act)
        self.final = nn.ReLU()


@pytest.mark.parametrize("act", ACTS)
def test_a_write_to_what_waits_is_no_wrong_value(act):
    """Codes nobody can write to."""
    for config in SCHEMES:
        qmodel = convert(Waits(act).eval(), DATA, config=config)
        assert qmodel.torchq_plan.layers["last"].activation == "final"
        qmodel.reads = "behind"
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                if config.activation == "static":
                    assert_identical(qmodel(X + 0), unfused(qmodel)(X + 0))
                else:
                    with pytest.raises(RuntimeError, match="was written before it came"):
                        qmodel(X + 0)


def test_the_module_writes_as_torch_does():
    curve, x = Curve(Activation.SILU, inplace=True), X + 0
    assert repr(curve) == "Curve(silu, inplace=True)"
    assert curve(x) is x
    assert_identical(x, activate(X, Activation.SILU))
    slices = X + 0
    curve(slices[:, ::2])
    assert_identical(slices[:, ::2], x[:, ::2])
    assert_identical(slices[:, 1::2], X[:, 1::2])
    halves = X.half()
    assert curve(halves) is halves
    nothing = torch.tensor([float("nan"), -float("inf"), float("inf"), -0.0])
    expected = activate(nothing, Activation.SILU)
    torch.testing.assert_close(curve(nothing), expected, rtol=0, atol=0, equal_nan=True)


def test_its_gradient_is_that_of_what_it_read():
    grads = []
    for module in (Curve(Activation.HARDSWISH, inplace=True), nn.Hardswish(inplace=True)):
        x = (X * 3).requires_grad_()
        with torch.enable_grad():
            y = module(x * 1)
            (y * y).sum().backward()
            with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
                module(x)
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_graphs_have_it():
    qmodel = convert(Inverted(nn.Hardswish).eval(), DATA, config=STATIC)
    before, y = X.clone(), qmodel(X)
    with torch.no_grad():
        assert_identical(torch.compile(qmodel, fullgraph=True, backend="eager")(X), y)
        program = torch.export.export(qmodel, (X,))
        assert_identical(program.module()(X), y)
    assert_identical(X, before)


def test_it_is_saved_trained_and_simulated(tmp_path):
    model = Basic(nn.SiLU).eval()
    qmodel = convert(model, DATA, config=STATIC)
    save(qmodel, tmp_path / "m.safetensors")
    assert_identical(load(tmp_path / "m.safetensors", Basic(nn.SiLU).eval())(X), qmodel(X))
    expected = qmodel(X)
    with simulate(), torch.no_grad():
        assert sqnr_db(expected, qmodel(X)) > 40
    prepared = prepare_qat(model, DATA, config=STATIC)
    with torch.enable_grad():
        prepared.train()(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    assert isinstance(convert(prepared.eval()), ConvBlock)


def test_what_has_other_users_is_in_place_there_too():
    """One module behind a convolution and on a tensor of the user's."""

    class Shared(Reads):
        def forward(self, x):
            y = self.last(self.act(self.norm(self.conv(x))))
            self.act(x)
            return y

    model = Shared(nn.SiLU).eval()
    qmodel = convert(model, [x + 0 for x in DATA], config=STATIC)
    x, given = X + 0, X + 0
    qmodel(x)
    model(given)
    torch.testing.assert_close(x, given, rtol=1e-6, atol=1e-6)
    assert not torch.equal(x, X)


DIFFERENTIATED = [nn.SiLU, nn.GELU, nn.Hardswish, partial(nn.SiLU, inplace=True), partial(nn.Hardswish, inplace=True)]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which torch.func.jvp calls
@pytest.mark.parametrize("act", DIFFERENTIATED, ids=str)
def test_forward_mode_derivatives_and_torch_func(act):
    """The op of an activation has a gradient, but none of these: torch's function is computed for them."""
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), act(), nn.Conv2d(32, 16, 1)).eval().requires_grad_(False)
    x, v = (torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    for data in (None, [x, v] * 2):
        qmodel = convert(model, data, config=STATIC if data else None).requires_grad_(False)
        assert isinstance(qmodel[1], Curve)
        exact, tangent = (torch.func.jvp(each, (x,), (v,))[1] for each in (model, qmodel))
        assert sqnr_db(exact, tangent) > 25
        exact, gradient = (torch.func.grad(lambda x, each=each: each(x).sum())(x) for each in (model, qmodel))
        assert sqnr_db(exact, gradient) > 25
        with torch.enable_grad():
            usual = x.clone().requires_grad_()
            qmodel(usual).sum().backward()
        assert sqnr_db(usual.grad, gradient) > 60


def test_an_activation_that_others_use_in_float64():
    act = nn.SiLU()
    qmodel = convert(nn.Sequential(nn.Conv2d(4, 8, 3), act))
    x = torch.randn(2, 3, dtype=torch.float64)
    assert isinstance(qmodel[1], Curve)
    assert qmodel[1](x).dtype == x.dtype
    assert torch.equal(qmodel[1](x), act(x))


def test_torch_fx_takes_one_in_place_for_a_leaf():
    qmodel = convert(nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(inplace=True), nn.Conv2d(8, 4, 1)))
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        traced = torch.fx.symbolic_trace(qmodel)
    assert_identical(traced(x), qmodel(x))
