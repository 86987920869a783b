"""Batch norms whose own code goes on with children, and blocks with modules of another kind between convolutions."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.conv_blocks import DATA, STATIC, X
from helpers.convolutional import IMAGE, IMAGES, by_code, shaken
from helpers.norm_rows import Mobile, Net, NormAct, Row
from torchq import QConfig, apply_plan, convert, plan_of, prepare_qat, simulate
from torchq.modules.conv_block import ConvBlock
from torchq.modules.norm_row import row_of
from torchq.modules.norms import IncludedNorm, factors, is_foldable
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

DYNAMIC = QConfig(activation="dynamic", rounding="nearest", smoothing="none")


class Inherits(nn.BatchNorm2d):
    """It leaves the arithmetic to torch's forward."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Child(Inherits):
    """The forward is its base's."""


class Sum(Inherits):
    def forward(self, x):
        return x + self.act(super().forward(x))


class Twice(Inherits):
    def forward(self, x):
        return self.act(self.act(super().forward(x)))


class Forgets(Inherits):
    """One of its children is not called."""

    def __init__(self, channels):
        super().__init__(channels)
        self.other = nn.ReLU()


class Grandchild(Inherits):
    """What comes next is not torch's forward."""

    def forward(self, x):
        return super().forward(x)


class OtherEps(NormAct):
    def forward(self, x):
        y = nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.1)
        return self.act(self.drop(y))


class Swapped(NormAct):
    def forward(self, x):
        y = nn.functional.batch_norm(x, self.running_mean, self.running_var, self.bias, self.weight)
        return self.act(self.drop(y))


class Prints(NormAct):
    def forward(self, x):
        print("called")
        return super().forward(x)


class Writes(NormAct):
    def forward(self, x):
        self.calls = 1
        return super().forward(x)


class By(NormAct):
    """By the function's full name, and with keywords."""

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        y = torch.nn.functional.batch_norm(x, mean, var, weight=self.weight, bias=self.bias, eps=self.eps)
        return self.act(self.drop(y))


@pytest.mark.parametrize(
    ("norm", "row"),
    [
        (nn.BatchNorm2d(8), ()),
        (NormAct(8), ("drop", "act")),
        (By(8), ("drop", "act")),
        (Inherits(8), ("act",)),
        (Child(8), ("act",)),
        *((kind(8), None) for kind in (Sum, Twice, Forgets, Grandchild, OtherEps, Swapped, Prints, Writes)),
        (nn.LayerNorm(8), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_children_behind_a_norm_are_read_from_its_code(capsys, norm, row):
    before = copy.deepcopy(norm)
    assert row_of(norm) == row
    assert is_foldable(norm, 4) == (row is not None)
    assert capsys.readouterr().out == ""
    assert vars(norm).keys() == vars(before).keys()
    for name, value in before.state_dict().items():
        assert torch.equal(norm.state_dict()[name], value)


def test_a_norm_in_training_is_read_as_in_eval_mode():
    norm = NormAct(8).train()
    assert row_of(norm) == ("drop", "act")
    assert norm.training
    assert int(norm.num_batches_tracked) == 0


@pytest.mark.parametrize("kind", [NormAct, By, Inherits, Child])
@pytest.mark.parametrize("data", [IMAGES, None], ids=["data", "no data"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_includes_such_a_norm(kind, data, inplace):
    row = Row(3, 32)
    row.bn = shaken(kind(32), seed=3)
    model = nn.Sequential(row, nn.Conv2d(32, 32, 3)).eval()
    y, act = model(IMAGE), model[0].bn.act
    exact = (row.conv.weight.double() * factors(row.bn)[0].reshape(-1, 1, 1, 1)).float()
    qmodel = convert(copy.deepcopy(model) if inplace else model, data, config=DYNAMIC, inplace=inplace)
    plan = plan_of(qmodel).layers["0.conv"]
    assert (plan.norm, plan.activation) == ("0.bn", "0.bn.act")
    assert type(qmodel[0].bn) is IncludedNorm
    assert qmodel[0].bn.act is not act
    step = exact.abs().amax((1, 2, 3), keepdim=True) / 127
    assert bool(((qmodel[0].conv.weight - exact).abs() <= 0.51 * step).all())
    assert sqnr_db(y, qmodel(IMAGE)) > 34
    assert model[0].bn.act is act
    assert_identical(model(IMAGE), y)
    assert_identical(apply_plan(model, plan_of(qmodel))(IMAGE), qmodel(IMAGE))


def test_what_a_norm_goes_on_with_stays_where_no_layer_can_compute_it():
    """A child that is no activation of a layer is called as before, and so is what comes behind it."""

    class Clips(nn.Module):
        def forward(self, x):
            return x.clamp(-0.25, 0.75)

    row = Row(3, 32)
    row.bn.drop = Clips()
    model = nn.Sequential(row, nn.Conv2d(32, 32, 3)).eval()
    for data in (IMAGES, None):
        qmodel = convert(model, data, config=DYNAMIC)
        plan = plan_of(qmodel).layers["0.conv"]
        assert (plan.norm, plan.activation) == ("0.bn", None)
        assert type(qmodel[0].bn.drop) is Clips
        assert sqnr_db(model(IMAGE), qmodel(IMAGE)) > 34
        with torch.no_grad():
            assert_identical(qmodel[0].bn(IMAGE), qmodel[0].bn.act(IMAGE.clamp(-0.25, 0.75)))


def test_what_its_code_asked_for_can_no_longer_be_set():
    row = Row(3, 32)
    row.bn.apply_act = True
    qmodel = convert(nn.Sequential(row, nn.Conv2d(32, 32, 3)).eval(), IMAGES, config=DYNAMIC)
    with pytest.raises(AttributeError, match="'apply_act' can't be set"):
        qmodel[0].bn.apply_act = False
    qmodel[0].bn.tag, qmodel[0].bn.act = "mine", nn.Tanh()  # what is the user's, and a child, can


def test_a_hook_on_what_comes_behind_is_heard():
    seen = []
    model = nn.Sequential(Row(3, 32), nn.Conv2d(32, 32, 3)).eval()
    qmodel = convert(model, IMAGES, config=DYNAMIC)
    y = qmodel(IMAGE)
    qmodel[0].bn.drop.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    assert_identical(qmodel(IMAGE), y)
    norm = model[0].bn
    expected = nn.functional.batch_norm(
        model[0].conv(IMAGE), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )
    assert sqnr_db(expected, seen[0]) > 34


def test_a_network_of_them_gives_the_bits_of_its_code(tmp_path, ran):
    model = Net().eval()
    for config in (None, STATIC, DYNAMIC):
        qmodel = convert(model, IMAGES, config=config)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in qmodel.modules())
        code, y = by_code(qmodel), qmodel(IMAGE)
        assert_identical(code(IMAGE), y)
        for mode in (torch.no_grad, torch.inference_mode):
            for x in (IMAGE, IMAGE.contiguous(memory_format=torch.channels_last), IMAGE[:1, :, :9, :13], IMAGE[:0]):
                with mode():
                    assert_identical(qmodel(x), code(x))
        ran.clear()
        with torch.no_grad():
            assert_identical(qmodel(IMAGE), y)
        assert set(qmodel.blocks) <= set(ran)
        for copied in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
            assert_identical(copied(IMAGE), y)
        torchq.save(qmodel, tmp_path / "m.safetensors")
        assert_identical(torchq.load(tmp_path / "m.safetensors", Net().eval().to("meta"))(IMAGE), y)
        with simulate():
            assert sqnr_db(y, qmodel(IMAGE)) > 45
        assert sqnr_db(model(IMAGE), y) > 25


def test_without_data_it_is_as_by_runs():
    """But inside of the squeeze-and-excitation, whose code is no row."""
    model = Net().eval()
    told, shown = convert(model), convert(model, IMAGES, config=DYNAMIC)
    rows = [
        {
            name: (row.norm, row.adds, row.activation)
            for name, row in plan_of(qmodel).layers.items()
            if ".se." not in name
        }
        for qmodel in (told, shown)
    ]
    assert rows[0] == rows[1]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in told.modules())
    assert sqnr_db(model(IMAGE), told(IMAGE)) > 25


def test_training_goes_on_with_the_children():
    model = Net()
    prepared = prepare_qat(model, IMAGES)
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
    with torch.enable_grad():
        prepared.train()(IMAGE).square().mean().backward()
    optimizer.step()
    qmodel = convert(prepared.eval(), IMAGES)
    assert type(qmodel.stem.bn) is IncludedNorm
    assert sqnr_db(prepared(IMAGE), qmodel(IMAGE)) > 35


# ---- Blocks with other modules between their convolutions ------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["static", "dynamic", "auto"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("block", [Mobile(), Mobile(32, 48, 2)], ids=["sum", "row"])
def test_a_block_calls_what_is_no_convolution(ran, block, mode, scheme):
    block.eval()
    qmodel = convert(block, DATA, config=QConfig(activation=scheme, rounding="nearest", smoothing="none"))
    assert isinstance(qmodel, ConvBlock)
    code = by_code(qmodel)
    calls = []
    qmodel.se.register_forward_hook(lambda *_: calls.append(1))
    with mode():
        for x in (X + 0, X.contiguous(memory_format=torch.channels_last), X[:1, :, :9, :7]):
            calls.clear()
            ran.clear()
            y = qmodel(x)
            assert ran == [qmodel]
            assert len(calls) == 1
            assert_identical(y, code(x))
            assert y.stride() == code(x).stride()


def made():
    return convert(Mobile().eval(), DATA, config=STATIC)


class Doubles(nn.Module):
    def forward(self, x):
        return x.mul_(2)


class Widens(nn.Module):
    """What it gives is not float32."""

    def forward(self, x):
        return x.double()


CHANGES = {
    "another module": lambda block: setattr(block, "se", nn.Sigmoid()),
    "one that writes over what it gets": lambda block: setattr(block, "se", Doubles()),
    "none": lambda block: setattr(block, "se", nn.Identity()),
    "a hook": lambda block: block.se.register_forward_hook(lambda *_: _[2] + 1),
    "a setting": lambda block: setattr(block, "has_skip", False),
    "another convolution": lambda block: setattr(block, "conv_pwl", nn.Conv2d(64, 32, 1)),
    "a module that was missing": lambda block: setattr(block, "conv_s2d", nn.Tanh()),
    "the norm of a layer": lambda block: setattr(block, "bn1", nn.Sigmoid()),
    "an activation": lambda block: setattr(block.bn2, "act", nn.Tanh()),
}


@pytest.mark.filterwarnings("ignore:torchq. this forward hook sees:UserWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_afterwards_counts(change):
    qmodel = made()
    with torch.no_grad():
        before, code = qmodel(X), by_code(qmodel)
        for model in (qmodel, code):
            torch.manual_seed(0)
            change(model)
        for _ in range(2):
            y = qmodel(X)
            assert_identical(y, code(X))
    assert not torch.equal(y, before)


def test_what_no_convolution_can_take_goes_to_the_code(ran):
    """Which then says what is wrong."""
    qmodel = made()
    qmodel.se = Widens()
    with torch.no_grad(), pytest.raises(Exception, match="float64"):
        qmodel(X)
    qmodel.se = nn.Identity()
    assert_identical(qmodel(X), by_code(qmodel)(X))


def test_an_error_inside_is_the_users():
    def fails(*_):
        raise RuntimeError("mine")

    qmodel = made()
    qmodel.se.register_forward_hook(fails)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^mine$"):
        qmodel(X)


def test_a_name_that_code_misses_may_come_later():
    qmodel = convert(nn.Sequential(Row(3, 32), nn.Conv2d(32, 32, 3)).eval(), IMAGES, config=DYNAMIC)
    code = by_code(qmodel)
    with torch.no_grad():
        before = qmodel(IMAGE)
        for model in (qmodel, code):
            model[0].aa = nn.AvgPool2d(2, 1)
        y = qmodel(IMAGE)
        assert y.shape != before.shape
        assert_identical(y, code(IMAGE))


def test_a_graph_holds_them():
    model = Net().eval()
    qmodel = convert(model, IMAGES, config=DYNAMIC)
    y = qmodel(IMAGE)
    program = torch.export.export(qmodel, (IMAGE,))
    assert sqnr_db(y, program.module()(IMAGE)) > 40
