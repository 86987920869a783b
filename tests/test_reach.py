"""Without data, a norm is included only where no other code may call the convolution, or the norm, alone."""

import pytest
import torch
from torch import nn

from helpers.conv_blocks import X
from helpers.convolutional import shaken
from helpers.mobile import Unit
from torchq import convert
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")


class Net(nn.Module):
    """A block and a row, of which other code may call single modules."""

    def __init__(self):
        super().__init__()
        self.block, self.row = Unit(), nn.Sequential(nn.Conv2d(32, 32, 1), shaken(nn.BatchNorm2d(32)), nn.ReLU())

    def forward(self, x):
        return self.row(self.block(x))


class CallsInside(Net):
    def forward(self, x):
        return self.row(self.block(x)) + self.block.body[1].conv(self.row(x).repeat(1, 48, 1, 1)[:, :48])


class CallsByName(Net):
    def forward(self, x):
        return self.row(self.block(x)) + getattr(self.row, "0")(x)


class CallsAnItem(Net):
    def forward(self, x):
        return self.row(self.block(x)) + self.row[0](x)


class CallsASlice(Net):
    def forward(self, x):
        return self.row(self.block(x)) + self.row[:-2](x)


class Collects(Net):
    def forward(self, x):
        found = []
        for layer in self.row:
            x = layer(x)
            found.append(x)
        return sum(found)


class CallsInAMethod(Net):
    def taken(self, x):
        return next(layer(x) for layer in self.row)

    def forward(self, x):
        return super().forward(x) + self.taken(x)


def first_of(module, x):
    return module[0](x)


class CallsInAFunction(Net):
    def forward(self, x):
        return super().forward(x) + first_of(self.row, x)


class OfParent(CallsAnItem):
    def forward(self, x):
        return super().forward(x)


class Outer(nn.Module):
    """Holds a network, and calls what is in its row."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return self.net(x) + self.net.row[0](x)


class Keeps(Net):
    """A convolution in a list that torch knows nothing of."""

    def __init__(self):
        super().__init__()
        self.firsts = [self.row[0]]

    def forward(self, x):
        return super().forward(x) + self.firsts[0](x)


class Twins(nn.Module):
    """Two of a class, one of which has a forward of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two = CallsAnItem(), CallsAnItem()
        self.one.forward = lambda x: x

    def forward(self, x):
        return self.two(self.one(x))


class InARow(nn.Module):
    """A row in a row, which has a forward of its own."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Sequential(Net().row)
        row = self.rows[0]
        self.rows.forward = lambda x: row(x) + row[0](x)

    def forward(self, x):
        return self.rows(x)


class ChildOfARow(Net):
    """It asks for its own children, and takes one out of one of them."""

    def forward(self, x):
        block, row = self.children()
        return row(block(x)) + row[0](x)


class ChildrenOfARow(Net):
    def forward(self, x):
        return self.row(self.block(x)) + next(iter(self.row.children()))(x)


class ByAVariable(Net):
    def forward(self, x):
        first = "0"
        return self.row(self.block(x)) + getattr(self.row, first)(x)


class ComparesAndTakes(Net):
    def forward(self, x):
        if self.row is not None:
            row = self.row
            x = row[0](x) + row(x)
        return x


OTHERS = [CallsByName, CallsAnItem, CallsASlice, Collects, CallsInAMethod, CallsInAFunction, OfParent, Outer, Keeps]
OTHERS += [ChildOfARow, ChildrenOfARow, ByAVariable, ComparesAndTakes]


@pytest.mark.parametrize("kind", [CallsInside, *OTHERS])
def test_a_norm_is_not_included_where_other_code_may_call_the_convolution(kind):
    model = kind().eval()
    qmodel = convert(model)
    assert sqnr_db(model(X), qmodel(X)) > 30
    path = "block.body.1.conv" if kind is CallsInside else "net.row.0" if kind is Outer else "row.0"
    assert qmodel.torchq_plan.layers[path].norm is None


@pytest.mark.parametrize(("kind", "path"), [(Twins, "two.row.0"), (InARow, "rows.0.0")])
def test_a_norm_is_not_included_near_a_forward_of_its_own(kind, path):
    assert convert(kind().eval(), inplace=True).torchq_plan.layers[path].norm is None


def test_a_norm_is_not_included_where_a_module_has_a_forward_of_its_own():
    model = Net().eval()
    model.forward = lambda x: Net.forward(model, x) + model.row[0](x)
    qmodel = convert(model, inplace=True)
    assert qmodel.torchq_plan.layers["row.0"].norm is None


def test_norms_are_included_where_the_holder_is_only_called():
    class Usual(Net):
        def forward(self, x):
            y = torch.relu(self.block(x))
            return self.row(y) if y.shape[0] else y

    norms = {name: layer.norm for name, layer in convert(Usual().eval()).torchq_plan.layers.items()}
    assert norms == {
        "block.body.0.conv": "block.body.0.norm",
        "block.body.1.conv": "block.body.1.norm",
        "row.0": "row.1",
    }


class Stage(nn.Module):
    """It calls its children in a loop, as timm's RegStage does."""

    def __init__(self):
        super().__init__()
        self.b1, self.b2 = Unit(), Unit()

    def forward(self, x):
        for block in self.children():
            x = block(x)
        return x


class Asking(Net):
    """It only asks whether there is a row, and by a name in the code whether there is more."""

    def forward(self, x):
        x = self.block(x)
        if self.row is not None:
            x = self.row(x)
        more = getattr(self, "more", None)
        return x if more is None else more(x)


@pytest.mark.parametrize(("model", "count"), [(Stage(), 4), (Asking(), 3)], ids=["children", "asks"])
def test_norms_are_included_where_code_asks_for_no_more_than_whole_children(model, count):
    model = model.eval()
    qmodel = convert(model)
    assert sum(layer.norm is not None for layer in qmodel.torchq_plan.layers.values()) == count
    assert sqnr_db(model(X), qmodel(X)) > 30


def test_a_convolution_that_is_called_in_a_loop_over_children_is_not_changed():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(32, 32, 1), shaken(nn.BatchNorm2d(32))
            self.row = nn.Sequential(nn.Conv2d(32, 32, 1), shaken(nn.BatchNorm2d(32), seed=1))

        def forward(self, x):
            return sum(child(x) for child in self.children())

    model = Loop().eval()
    qmodel = convert(model)
    norms = {name: layer.norm for name, layer in qmodel.torchq_plan.layers.items()}
    assert norms == {"conv": None, "row.0": None}
    assert sqnr_db(model(X), qmodel(X)) > 30
