"""Products with parameters that no layer holds: the report names them, and what it advises makes them int8."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from helpers.numbers import normal
from torchq import convert, report
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

WIDTH, HEADS, ROWS = 64, 4, 16
X = normal(HEADS, ROWS, WIDTH, seed=9)
EYE = nn.Parameter(torch.eye(WIDTH), requires_grad=False)


class Raw(nn.Module):
    """A head behind a product of its own, `product`, with a parameter of this shape."""

    shape: tuple[int, ...] = (WIDTH, WIDTH)

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(normal(*self.shape, seed=1) / WIDTH**0.5)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.head(self.product(x))

    def layers(self):
        """What the report advises: layers of this weight."""
        return linear(self.w)

    def advised(self, layer, x):
        """The product, by these layers."""
        return layer(x)


def linear(weight):
    layer = nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.copy_(weight)
    return layer


class Functional(Raw):
    def product(self, x):
        return F.linear(x, self.w)


class Transposed(Raw):
    def product(self, x):
        return x @ self.w.T


class Matmul(Raw):
    def product(self, x):
        return torch.matmul(x, self.w)

    def layers(self):
        return linear(self.w.T)


class Einsum(Raw):
    shape = (HEADS, WIDTH // HEADS, WIDTH)

    def product(self, x):
        return torch.einsum("btk,hdk->bthd", x, self.w).flatten(2)

    def layers(self):
        return linear(self.w.flatten(0, 1))


class Batched(Raw):
    shape = (HEADS, WIDTH, WIDTH)

    def product(self, x):
        return torch.baddbmm(torch.ones(1, 1, WIDTH), x, self.w)

    def layers(self):
        return nn.ModuleList(linear(each.T) for each in self.w)

    def advised(self, layer, x):
        return 1 + torch.stack([each(rows) for each, rows in zip(layer, x, strict=True)])


class Pair(Raw):
    shape = (WIDTH, WIDTH, WIDTH)

    def product(self, x):
        return F.bilinear(x, x.flip(0), self.w)

    def layers(self):
        layer = nn.Bilinear(WIDTH, WIDTH, WIDTH, bias=False)
        layer.weight.copy_(self.w)
        return layer

    def advised(self, layer, x):
        return layer(x, x.flip(0))


class FusedQKV(Raw):
    shape = (3 * WIDTH, WIDTH)

    def product(self, x):
        return self.attend(F.linear(x, self.w))

    def attend(self, qkv):
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def advised(self, layer, x):
        return self.attend(layer(x))


class Attention(FusedQKV):
    """torch's attention as a function, with weights of the module's own."""

    def product(self, x):
        x = x.transpose(0, 1)
        none = dict.fromkeys(("in_proj_bias", "bias_k", "bias_v", "out_proj_bias"))
        settings = {"add_zero_attn": False, "dropout_p": 0.0, "need_weights": False, "training": False}
        y, _ = F.multi_head_attention_forward(
            x, x, x, WIDTH, HEADS, in_proj_weight=self.w, out_proj_weight=EYE, **none, **settings
        )
        return y.transpose(0, 1)


class Table(nn.Embedding):
    """An embedding with a projection of its own."""

    def __init__(self):
        super().__init__(100, WIDTH)
        self.projection = nn.Parameter(normal(WIDTH, WIDTH, seed=1) / WIDTH**0.5)

    def forward(self, ids):
        return super().forward(ids) @ self.projection


class Followed(nn.Module):
    """A model of `Raw` whose parameter is what the report advises."""

    def __init__(self, raw):
        super().__init__()
        self.layer, self.head = raw.layers(), raw.head
        self.product = raw.advised

    def forward(self, x):
        return self.head(self.product(self.layer, x))


@pytest.mark.parametrize("kind", [Functional, Transposed, Matmul, Einsum, Batched, Pair, FusedQKV, Attention])
def test_it_is_named_with_its_bytes_and_the_advice_makes_it_int8(kind):
    model = kind().eval()
    (left,) = report(convert(model)).model.left
    assert (left.matrices, left.bytes) == (("w",), 4 * model.w.numel())
    assert left.advice == (
        "parameters of its own: what it multiplies by becomes int8 if an nn.Linear, one for each matrix, or an "
        "nn.Bilinear holds it and is called"
    )
    followed = Followed(model).eval()
    torch.testing.assert_close(followed(X), model(X), rtol=1e-4, atol=1e-4)
    qmodel = convert(followed)
    whole = report(qmodel).model
    assert whole.left == ()
    assert whole.int8_weights == whole.weights == model.w.numel() + WIDTH * WIDTH
    assert whole.bytes_after < 0.35 * whole.bytes_before
    assert sqnr_db(model(X), qmodel(X)) > 30


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_table_is_none_but_what_stands_beside_it_is():
    left = report(convert(nn.Sequential(Table(), nn.Linear(WIDTH, WIDTH)))).model.left
    assert [(each.kind, each.matrices) for each in left] == [("Table", ("0.projection",))]
    normed = nn.utils.weight_norm(nn.Embedding(100, WIDTH))
    assert [each.matrices for each in report(convert(nn.Sequential(normed, nn.Linear(WIDTH, 64)))).model.left] == [()]
