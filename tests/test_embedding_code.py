"""Which code is a sum of embeddings: none that somebody could notice, and nothing but sums."""

import pytest
import torch

from helpers.embeddings import Sum, model_of
from torchq.modules.embedding_code import embedding_code_of
from torchq.modules.embedding_sum import EmbeddingSum


class Counting(Sum):
    def forward(self, ids):
        self.first += 1
        return self.words(ids) + self.positions(ids % 9)


class Printing(Sum):
    def forward(self, ids):
        print("called")
        return self.words(ids) + self.positions(ids % 9)


class InPlace(Sum):
    def forward(self, ids):
        ids += 0
        return self.words(ids) + self.positions(ids % 9)


class Filling(Sum):
    def forward(self, ids):
        return self.words(ids.clamp_(1, 50)) + self.positions(ids % 9)


class Out(Sum):
    def forward(self, ids):
        return self.words(torch.cumsum(ids * 0, dim=1, out=self.kinds)) + self.positions(ids % 9)


class Random(Sum):
    def forward(self, ids):
        return self.words(ids) + self.positions(torch.randint(0, 9, (1, ids.size(1))))


class Other(Sum):
    def forward(self, ids):
        self = ids
        self.zero_()
        return self


class Looping(Sum):
    def forward(self, ids):
        x = self.words(ids)
        for _ in range(2):
            x = x + self.positions(ids % 9)
        return x


class Merged(Sum):
    def forward(self, ids):
        return self.words(torch.cumsum(ids, 1, **{"out": ids})) + self.positions(ids % 9)  # noqa: PIE804


class Either(Sum):
    def forward(self, ids, more=None):
        (ids if more is None else self).add_(1)
        return self.words(ids) + self.positions(ids % 9)


class OfStandIn(Sum):
    _methods = 9

    def forward(self, ids):
        return self.words(ids) + self.positions(ids % (9 if self._methods == 9 else 7))


class Long(Sum):
    def forward(self, ids):
        return self.words(ids) + self.positions(ids % len(self.positions.weight))


class Asking(Sum):
    def forward(self, ids):
        return self.words(ids) + self.positions(ids % (7 if hasattr(self.positions, "padding_idx") else 9))


class AskingOfClass(Sum):
    kept = True

    def forward(self, ids):
        return self.words(ids) + self.positions(ids % (7 if hasattr(self, "kept") else 9))


class Comparing(Sum):
    def forward(self, ids):
        return self.words(ids) + self.positions(ids % (7 if self.words == self.words else 9))


class ComparingNorms(Sum):
    def forward(self, ids):
        return self.norm(self.words(ids) + self.positions(ids % (7 if self.norm == self.norm else 9)))


class AskingIdle(Sum):
    def forward(self, ids):
        x = self.words(ids) + self.positions(ids % (7 if self.dropout else 9))
        return self.dropout(x)


class Discarding(Sum):
    def forward(self, ids):
        self.types(ids)
        return self.words(ids) + self.positions(ids % 9)


class Scaled(Sum):
    def forward(self, ids):
        return self.norm(self.words(ids) * 2.0 + self.positions(ids % 9))


class Alone(Sum):
    def forward(self, ids):
        return self.words(ids)


class Pair(Sum):
    def forward(self, ids):
        x = self.words(ids) + self.positions(ids % 9)
        return x, ids


@pytest.mark.parametrize(
    "kind", [Counting, Printing, InPlace, Filling, Out, Merged, Either, OfStandIn, Random, Other, Looping]
)
def test_code_that_is_not_read(kind):
    assert embedding_code_of(kind) is None or not isinstance(model_of(kind)[0], EmbeddingSum)


@pytest.mark.parametrize("kind", [Long, Asking, AskingOfClass, Comparing, ComparingNorms, AskingIdle, Discarding])
def test_code_that_asks_more_than_stand_ins_know(kind):
    assert not isinstance(model_of(kind)[0], EmbeddingSum)


@pytest.mark.parametrize("kind", [Scaled, Alone, Pair])
def test_code_that_is_no_sum(kind):
    assert not isinstance(model_of(kind)[0], EmbeddingSum)


def test_the_order_of_sums_counts():
    class Twice(Sum):
        def forward(self, ids):
            return (self.words(ids) + self.positions(ids % 9)) + (self.words(ids) + self.types(ids % 2))

    assert not isinstance(model_of(Twice)[0], EmbeddingSum)
