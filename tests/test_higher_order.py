"""Models that call operators of functions, flex_attention and cond, or that are the first to import the compiler."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from torchq import convert, verify
from torchq.modules.writes import written_by
from torchq.numerics.metrics import sqnr_db

pytestmark = [pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")]


def causal(score, batch, head, row, key):
    return torch.where(row >= key, score, -float("inf"))


class FlexAttention(nn.Module):
    """Rows of 64 channels, of a table or after two convolutions, and causal attention of 4 heads by flex_attention."""

    def __init__(self, stem):
        super().__init__()
        self.stem, self.qkv, self.out = stem, nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        x = self.stem(x)
        rows = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        q, k, v = self.qkv(rows).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return rows + self.out(flex_attention(q, k, v, score_mod=causal).transpose(1, 2).flatten(2))


class Branches(nn.Module):
    """One of two layers, by the values, as torch.cond."""

    def __init__(self):
        super().__init__()
        self.table, self.ways = nn.Embedding(100, 64), nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x):
        x = self.table(x)
        way, other = self.ways
        return self.head(torch.cond(x.sum() > 0, lambda x: way(x).relu(), lambda x: other(x).relu(), (x,)))


def convolutions():
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, padding=1), nn.ReLU())


MODELS = {
    "flex attention": (lambda: FlexAttention(nn.Embedding(100, 64)), lambda: torch.randint(100, (4, 16))),
    "behind convolutions": (lambda: FlexAttention(convolutions()), lambda: torch.randn(4, 3, 16, 16)),
    "cond": (Branches, lambda: torch.randint(100, (4, 16))),
}


@pytest.mark.slow(seconds=10)
@pytest.mark.parametrize(("make", "sample"), MODELS.values(), ids=MODELS)
def test_they_are_converted_and_verified(make, sample):
    torch.manual_seed(0)
    model, data = make().eval(), [sample() for _ in range(4)]
    qmodel = convert(model, data)
    assert sum(row.kind != "float" for row in qmodel.torchq_plan.layers.values()) >= 2
    with torch.no_grad():
        assert sqnr_db(model(data[0][:3]), qmodel(data[0][:3])) > 35
    assert verify(qmodel, data[0]).ok


def test_what_functions_write_counts_as_written():
    x, y = torch.zeros(2), torch.zeros(2)
    operands = (torch.tensor(True), lambda x, y: (x.add_(1),), lambda x, y: (y,), (x, y))
    written = written_by(torch.ops.higher_order.cond, operands, {})
    assert [id(each) for each in written[1:]] == [id(x), id(y)]


FIRST = """
    import sys, torch, warnings
    from torch import nn
    from torchq import convert
    from torchq.numerics.metrics import sqnr_db

    class Late(nn.Module):  # compiles a part of itself in its first call
        def __init__(self):
            super().__init__()
            self.part, self.compiled = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), None

        def forward(self, x):
            if self.compiled is None:
                object.__setattr__(self, "compiled", torch.compile(self.part, backend="eager", fullgraph=True))
            return self.compiled(x) + self.part(x)

    class Flex(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(64, 192), nn.Sequential(nn.Linear(64, 64), nn.ReLU())

        def forward(self, x):
            from torch.nn.attention.flex_attention import flex_attention

            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            return self.out(flex_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    model, data = {name}().eval(), [torch.randn(4, 16, 64) for _ in range(4)]
    assert "torch._dynamo" not in sys.modules
    qmodel = convert(model, data)
    assert "torch._dynamo" in sys.modules
    with torch.no_grad():
        right = sqnr_db(model(data[0]), qmodel(data[0])) > 35
    print(right, *[row.kind[:4] for row in qmodel.torchq_plan.layers.values()])
"""


@pytest.mark.subprocess
@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("name", ["Flex", "Late"])
def test_a_model_may_be_the_first_to_import_the_compiler(name):
    program = textwrap.dedent(FIRST).replace("{name}", name)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "True int8 int8\n", done.stderr
