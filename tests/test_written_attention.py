"""Attention that code writes out is named in the plan and the report: nobody can put another function in its place."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from helpers.compare import assert_identical
from torchq import Plan, QConfig, convert, plan_of, report

pytestmark = pytest.mark.usefixtures("seeded")

X = torch.linspace(-2, 2, 64 * 24 * 32).reshape(64, 24, 32).sin()
QUICK = QConfig(rounding="nearest", smoothing="none")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(4, 24, 24))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Plainly(Attention):
    def attend(self, q, k, v):
        return torch.softmax(q @ k.mT, -1) @ v


class Masked(Attention):
    def attend(self, q, k, v):
        scores = q @ k.transpose(-1, -2) / math.sqrt(8) + self.bias
        scores = scores.masked_fill(torch.ones(24, 24).tril() == 0, float("-inf"))
        return functional.dropout(scores.softmax(-1, dtype=torch.float32).to(v.dtype), 0.1, self.training) @ v


class InPlace(Attention):
    def attend(self, q, k, v):
        scores = torch.matmul(q, k.mT)
        scores *= 0.5
        scores += self.bias
        return torch.matmul(functional.softmax(scores, -1), v)


class Einsum(Attention):
    def attend(self, q, k, v):
        weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(0.3).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", weights, v)


class InAFunction(Attention):
    def attend(self, q, k, v):
        return attend(self, q, k, v)


def attend(module, q, k, v):
    scores = torch.baddbmm(module.bias.repeat(64, 1, 1)[: q.shape[0] * 4], q.flatten(0, 1), k.flatten(0, 1).mT)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).unflatten(0, (-1, 4))


def convert_on(model):
    return convert(model.eval(), X.split(16), config=QUICK)


@pytest.mark.parametrize("kind", [Plainly, Masked, InPlace, Einsum, InAFunction])
def test_attention_that_is_written_out_is_named(kind):
    model = nn.Sequential(kind(), nn.LayerNorm(32), kind())
    qmodel = convert_on(model)
    assert qmodel.torchq_plan.written_attentions == ("0", "2")
    text = " ".join(str(report(qmodel)).split())
    assert "attention written out, in float: 0, 2. torch.nn.functional.scaled_dot_product_attention" in text
    assert report(qmodel).to_dict()["written_attentions"] == ["0", "2"]
    plan = plan_of(qmodel)
    assert Plan.from_dict(plan.to_dict()).written_attentions == ("0", "2")
    with torch.no_grad():
        assert_identical(convert(model, X.split(16), config=QUICK)(X[:4]), qmodel(X[:4]))


class ByTorch(Attention):
    def attend(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)


class ByTorchsOwnModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        y, weights = self.attention(x, x, x)
        return y + weights.mean()


class Gates(nn.Module):
    """A softmax of a layer's output, and products that are not of scores."""

    def __init__(self):
        super().__init__()
        self.gate, self.out = nn.Linear(32, 24), nn.Linear(32, 32)
        self.experts = nn.Parameter(torch.randn(24, 32))

    def forward(self, x):
        y = self.gate(x).softmax(-1) @ x
        y = torch.bmm(x, x.mT) @ y
        return self.out(torch.bmm(x, self.experts.t().expand(len(x), -1, -1)).softmax(-1) @ y)


@pytest.mark.parametrize("kind", [ByTorch, ByTorchsOwnModule, Gates])
def test_nothing_else_is_named(kind):
    qmodel = convert_on(kind())
    assert qmodel.torchq_plan.written_attentions == ()
    assert "written out" not in str(report(qmodel))


def test_without_data_nothing_is_known():
    assert convert(Plainly().eval()).torchq_plan.written_attentions == ()
