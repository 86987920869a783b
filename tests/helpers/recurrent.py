"""Recurrent layers: converted alone, called part by part, and compared."""

import copy

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import QConfig, convert
from torchq.modules.recurrent import QuantizedRecurrent
from torchq.numerics.metrics import sqnr_db


class Alone(nn.Module):
    """The layer, and a call of it with all its arguments."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, *args):
        return self.rnn(*args)


def converted(rnn, data=None, **config):
    qmodel = convert(Alone(rnn).eval(), data, config=QConfig(**config) if config else None)
    assert isinstance(qmodel.rnn, QuantizedRecurrent)
    return qmodel.rnn


def parts_called(rnn):
    """The same with a hook on each part, so that each is called by itself."""
    rnn = copy.deepcopy(rnn)
    for part in rnn.children():
        part.register_forward_hook(lambda *_: None)
    return rnn


def flat(output):
    """All tensors that a call returned, with their structure."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, PackedSequence):
        kept = [output.data, output.batch_sizes, output.sorted_indices, output.unsorted_indices]
        return [each for each in kept if each is not None]
    return [each for part in output for each in flat(part)]


def assert_alike(actual, expected, db=30):
    """Of the same structure, shapes and dtypes, and the floats as near as int8 is: 38 dB and more here."""
    assert type(actual) is type(expected)
    actual, expected = flat(actual), flat(expected)
    assert [(t.shape, t.dtype) for t in actual] == [(t.shape, t.dtype) for t in expected]
    for got, want in zip(actual, expected, strict=True):
        if want.is_floating_point():
            assert sqnr_db(want.float(), got.float()) > db
        else:
            assert torch.equal(got, want)


def assert_same(actual, expected):
    for got, want in zip(flat(actual), flat(expected), strict=True):
        assert_identical(got, want)


def given_state(rnn, *batch):
    rows = rnn.num_layers * (1 + rnn.bidirectional)
    h = normal(rows, *batch, rnn.proj_size or rnn.hidden_size, seed=5).tanh()
    return (h, normal(rows, *batch, rnn.hidden_size, seed=6)) if isinstance(rnn, nn.LSTM) else h
