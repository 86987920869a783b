"""The weights of an int8 attention wait for their reader: nobody can tell, but by the time."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers.multihead import E, L, N, S, attention, inputs
from helpers.numbers import normal
from torchq import QConfig, convert, kernels
from torchq.modules.attention_weights import AttentionWeights

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def int8():
    return convert(attention(), config=QConfig(attention="float32"))


def at_once(int8, *xs, **call):
    """The weights by torch's operations, as without a scheme."""
    twin = copy.deepcopy(int8)
    twin.scheme = "sdpa"
    weights = twin(*xs, **call)[1]
    assert type(weights) is torch.Tensor
    return weights


READERS = {
    "sum": lambda weights: weights.sum(),
    "a slice": lambda weights: weights[..., 1:3],
    "a copy": copy.deepcopy,
    "a clone": torch.clone,
    "a product": lambda weights: weights @ torch.ones(S, 2),
    "into another": lambda weights: torch.zeros(N, L, S).copy_(weights),
    "a list": lambda weights: torch.tensor(weights.tolist()),
    "numpy": lambda weights: torch.from_numpy(weights.numpy()),
    "a pickle": lambda weights: pickle.loads(pickle.dumps(weights)),
    "detached": lambda weights: weights.detach() + 0,
    "moved": lambda weights: weights.cpu() + 0,
    "another dtype": lambda weights: weights.to(torch.float64),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_reader_gets_the_values(read, int8):
    weights = int8(*inputs(int8))[1]
    assert type(weights) is AttentionWeights
    assert weights._value is None
    expected = at_once(int8, *inputs(int8))
    assert (weights.shape, weights.dtype, weights.device) == (expected.shape, expected.dtype, expected.device)
    got = read(weights)
    assert type(got) is torch.Tensor
    assert torch.equal(got, read(expected))


def test_saved_and_loaded(int8):
    weights, file = int8(*inputs(int8))[1], io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    assert torch.equal(torch.load(file), weights)


def test_a_write_is_seen_by_later_readers(int8):
    weights = int8(*inputs(int8))[1]
    weights[0] = 7
    assert (weights[0] == 7).all()
    assert torch.equal(weights[1:], at_once(int8, *inputs(int8))[1:])


def test_what_is_written_to_the_inputs_and_masks_changes_nothing(int8):
    query, key, value = (x.clone() for x in inputs(int8))
    mask = normal(L, S)
    expected = at_once(int8, query, key, value, attn_mask=mask)
    weights = int8(query, key, value, attn_mask=mask)[1]
    for each in (query, key, value, mask):
        each.zero_()
    int8.q_proj.replace_weight(torch.zeros(E, E, dtype=torch.int8), torch.ones(E), None)
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_forms(average, batched, int8):
    xs = inputs(int8) if batched else [x[:, 0] for x in inputs(int8)]
    weights = int8(*xs, average_attn_weights=average)[1]
    expected = at_once(int8, *xs, average_attn_weights=average)
    assert weights.shape == expected.shape
    assert torch.equal(weights, expected)


def test_they_wait_in_eager_inference_only(int8):
    """Where somebody differentiates, counts or traces, they are there at once."""
    xs = inputs(int8)
    assert type(int8(*xs)[1]) is AttentionWeights
    with torch.inference_mode():
        assert torch.equal(int8(*xs)[1], at_once(int8, *xs))
    with FlopCounterMode(display=False):
        assert type(int8(*xs)[1]) is torch.Tensor
    with torch.enable_grad():
        assert int8(xs[0].clone().requires_grad_(), *xs[1:])[1].requires_grad
    int8.dropout = 0.5
    assert type(int8.train()(*xs)[1]) is torch.Tensor


def test_the_attention_is_measured_although_its_weights_are_asked_for():
    """By default they are, and then dropped."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x):
            return x + self.attention(x, x, x)[0]

    plan = convert(Block().eval(), [normal(2, 40, 64, seed=i) for i in range(4)]).torchq_plan
    assert plan.attentions["attention"].sqnr_db.keys() == set(kernels.attention_schemes(keys=40))
