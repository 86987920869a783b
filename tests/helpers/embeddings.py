"""Models with sums of embeddings, in the ways in which code writes them."""

import copy

import torch
from torch import nn

import torchq
from helpers.numbers import normal
from torchq.modules.straight_forms import give_back

WIDTH, LONGEST = 40, 64
ROWS = 1000  # so many that int8 saves something


def positions_of(ids, first):
    mask = ids.ne(first).int()
    return (torch.cumsum(mask, dim=1).type_as(mask) * mask).long() + first


class Sum(nn.Module):
    """Tables, a norm and a layer, so that convert() has something to do; `forward` is for subclasses."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(ROWS, WIDTH), nn.Embedding(LONGEST + 8, WIDTH)
        self.types = nn.Embedding(2, WIDTH)
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.5)
        self.register_buffer("places", torch.arange(LONGEST).expand(1, -1), persistent=False)
        self.register_buffer("kinds", torch.zeros(1, LONGEST, dtype=torch.long), persistent=False)
        self.first = 1
        for i, each in enumerate(self.parameters()):
            each.data.copy_(normal(*each.shape, seed=i))


class Bert(Sum):
    def forward(self, ids=None, types=None, places=None, embeds=None, start: int = 0):
        shape = ids.size() if ids is not None else embeds.size()[:-1]
        batch, length = shape
        if places is None:
            places = self.places[:, start : length + start]
        if types is None:
            if hasattr(self, "kinds"):
                types = torch.gather(self.kinds.expand(places.shape[0], -1), dim=1, index=places).expand(batch, length)
            else:
                types = torch.zeros(shape, dtype=torch.long, device=self.places.device)
        if embeds is None:
            embeds = self.words(ids)
        x = embeds + self.types(types)
        x = x + self.positions(places)
        return self.dropout(self.norm(x))


class Roberta(Sum):
    def forward(self, ids):
        return self.norm(self.words(ids) + self.positions(self.count(ids, self.first)))

    @staticmethod
    def count(ids, first):
        return positions_of(ids, first)


class Clip(Sum):
    def forward(self, ids, places=None):
        if ids.shape[-1] > self.positions.weight.shape[0]:
            raise ValueError(f"{ids.shape[-1]} is too long.")
        places = self.places[:, : ids.shape[-1]] if places is None else places
        return self.words(ids) + self.positions(places)


class Reversed(Sum):
    def forward(self, ids):
        places = torch.arange(ids.size(1), device=ids.device)
        return self.positions(places) + (self.types(self.kinds[:, : len(places)]) + self.words(ids))


class Distil(Sum):
    def forward(self, ids):
        words = self.words(ids)
        return self.dropout(self.norm(words + self.positions(self.own_places(words))))

    def own_places(self, words):
        return self.places[:, : words.size(1)]


ALL = (Bert, Roberta, Clip, Reversed, Distil)


def model_of(kind, **config):
    """An int8 model with a module of this class, in eval mode."""
    model = nn.Sequential(kind(), nn.Linear(WIDTH, WIDTH)).eval().requires_grad_(False)
    return torchq.convert(model, config=torchq.QConfig(**config))


def ids_of(*shape, seed=0):
    return torch.randint(1, ROWS, shape, generator=torch.Generator().manual_seed(seed))


def by_code(module):
    """A copy that is what the user's class makes of it."""
    copied = copy.deepcopy(module)
    give_back(copied)
    return copied
