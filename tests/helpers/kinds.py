"""A small model of each kind that torchq converts, with batches for it."""

import torch
from torch import nn

from helpers.convolutional import Basic
from helpers.mobile import Network
from helpers.numbers import normal
from helpers.self_attention import bert
from torchq import convert


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(32, 48, batch_first=True)
        self.head = nn.Linear(48, 8)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Block(nn.Module):
    """The code of a transformer's output, which becomes one fused form."""

    def __init__(self):
        super().__init__()
        self.inner, self.act, self.dense = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        return self.norm(self.dense(self.act(self.inner(x))) + x)


class Decoder(nn.Module):
    """RMSNorm, attention that calls torch's function by itself, and a gated feed forward."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.gate, self.up, self.down, self.act = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32), nn.SiLU()

    def forward(self, x):
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 16)).movedim(-3, 0).transpose(-3, -2)
        x = x + self.out(nn.functional.scaled_dot_product_attention(*heads).transpose(-3, -2).flatten(-2))
        return x + self.down(self.act(self.gate(x)) * self.up(x))


class Hidden(nn.Module):
    """The last hidden state of a model of transformers."""

    def __init__(self):
        super().__init__()
        self.model = bert(attention_probs_dropout_prob=0.0)

    def forward(self, x):
        return self.model(x).last_hidden_state


def _encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _cnn():
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    depthwise = [nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6()]
    return nn.Sequential(*stem, *depthwise, Basic(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


MODELS = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8)),
        (32,),
    ),
    "block": (lambda: nn.Sequential(Block(), Block()), (6, 32)),
    "encoder": (_encoder, (6, 32)),
    "conv2d": (_cnn, (3, 12, 12)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(8, 24, 3), nn.ReLU(), nn.Conv1d(24, 8, 1)), (8, 20)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (5, 32)),
    "GRU": (lambda: Recurrent(nn.GRU), (5, 32)),
    "decoder": (lambda: nn.Sequential(Decoder(), Decoder()), (6, 32)),
    "mobile": (Network, (32, 12, 12)),
    "bert": (Hidden, None),
    "table": (lambda: nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 50)), None),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(50, 32), nn.Linear(32, 50)), None),
}


def batches(name, count=4):
    shape = MODELS[name][1]
    generator = torch.Generator().manual_seed(0)
    if shape is None:
        return [torch.randint(50, (16, 6), generator=generator) for _ in range(count)]
    return [normal(16, *shape, seed=seed) for seed in range(count)]


def model_of(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def int8_of(name, calibrated):
    return convert(model_of(name), batches(name) if calibrated else None, progress=False)
