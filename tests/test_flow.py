"""What the code of blocks of convolutions is proven to compute, and what is no such code."""

import pytest
import torch
from torch import nn

from helpers import mobile
from helpers.mobile import Layer, Timm, same_padding
from helpers.numbers import normal
from torchq import QConfig, convert
from torchq.modules.conv_block import ConvBlock
from torchq.modules.flow import flow_of

pytestmark = pytest.mark.usefixtures("seeded")


def of_code(forward, **attributes):
    kind = type("Mine", (Timm,), {"forward": forward})
    block = kind()
    for name, value in attributes.items():
        setattr(block, name, value)
    return flow_of(block, kind)


COUNTS = []


def counted(x, conv):
    COUNTS.append(1)
    return nn.functional.pad(x, (1, 1, 1, 1))


def by_value(x, conv):
    return nn.functional.pad(x, (1, 1, 1, 1)) if x.sum() > 0 else x


def with_ones(x, conv):
    return nn.functional.pad(x, (1, 1, 1, 1), "constant", 1.0)


def reflected(x, conv):
    return nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")


def cut(x, conv):
    return nn.functional.pad(x, (-1, 1, 1, 1))


def endless(x, conv):
    return endless(x, conv)


@pytest.mark.parametrize("function", [counted, by_value, with_ones, reflected, cut, endless])
def test_functions_that_do_anything_else_are_no_zeros(monkeypatch, function):
    monkeypatch.setattr(mobile, "same_padding", function)
    assert flow_of(Layer(32, 32, 3), Layer) is None
    assert not COUNTS


class Computed:
    @property
    def tf_padding(self):
        COUNTS.append(1)
        return True


REFUSED = {
    "a branch on x": lambda self, x: self.conv(x) if x else x,
    "a comparison of x": lambda self, x: self.conv(x) if x == 0 else x,
    "a branch on a child": lambda self, x: self.conv(x) if self.act else x,
    "a result that nobody reads": lambda self, x: self.conv(x) if self.act(x) is not None else x,
    "a property": lambda self, x: self.conv(x) if self.config.tf_padding else x,
    "a tensor": lambda self, x: self.conv(x) if self.value else x,
    "a method": lambda self, x: self.conv(x) if self.named_children() else x,
    "a builtin": lambda self, x: self.conv(x) if print(x) else x,
    "a global object": lambda self, x: self.conv(x) if COUNTS.append(1) else x,
    "whether two are one": lambda self, x: self.conv(x) if self.conv is self.conv else self.act(x),
    "whether a result is x": lambda self, x: self.act(y) if (y := self.conv(x)) is x else y,
    "whether one of two is x": lambda self, x: self.conv(x) if x is (x if self.act is None else None) else x,
    "a product": lambda self, x: self.conv(x) * x,
    "a loop": lambda self, x: next(self.conv(x) for _ in (1,)),
    "zeros that nobody reads": lambda self, x: self.conv(x) if same_padding(x, self.conv) is not None else x,
}


@pytest.mark.parametrize("forward", REFUSED.values(), ids=REFUSED)
def test_code_that_does_anything_else_is_no_flow(forward):
    assert of_code(forward, config=Computed(), value=torch.ones(1)) is None
    assert not COUNTS


def test_zeros_that_are_read_twice_are_none_of_one_layer():
    class Twice(Timm):
        def forward(self, x):
            x = same_padding(x, self.conv)
            return self.conv(x) + self.act(x)

    data = [normal(4, 32, 20, 20)]
    assert not isinstance(convert(Twice().eval(), data, config=QConfig(activation="dynamic")), ConvBlock)


def test_a_thousand_sizes_keep_little():
    zeros = flow_of(Layer(32, 32, 3), Layer).one[0]
    for size in range(10, 1010):
        assert zeros.around((1, 32, size, 9)) == (1, 1, 1, 1)
    assert len(zeros._known) <= 256
