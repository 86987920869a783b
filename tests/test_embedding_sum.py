"""Sums of embeddings in one call: the same bits by every way in, and whoever looks sees what the code does."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import torchq
from helpers import embeddings
from helpers.compare import assert_identical
from helpers.embeddings import ALL, LONGEST, ROWS, WIDTH, Bert, Clip, Distil, Roberta, by_code, ids_of, model_of
from helpers.numbers import normal
from torchq import kernels
from torchq.modules import embedding_sum
from torchq.modules.embedding import QuantizedEmbedding
from torchq.modules.embedding_sum import EmbeddingSum

KERNELS = [kernel for kernel in kernels.names() if kernel in kernels.runnable()]


@pytest.fixture
def counted(monkeypatch):
    """How many calls were computed as one."""
    count, call = [0], embedding_sum._C.call_embedding_sum

    def counting(*args):
        y = call(*args)
        count[0] += y is not NotImplemented
        return y

    monkeypatch.setattr(embedding_sum._C, "call_embedding_sum", counting)
    return lambda: count[0]


# ---- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ALL)
def test_bits_are_those_of_the_children_one_by_one(kind, kernel, counted):
    sums = model_of(kind)[0]
    assert isinstance(sums, EmbeddingSum)
    assert isinstance(sums, kind)
    assert isinstance(sums.words, QuantizedEmbedding)
    with torch.inference_mode(), kernels.use(kernel):
        for shape in ((1, 1), (3, 17), (5, LONGEST)):
            ids = ids_of(*shape)
            assert_identical(sums(ids), by_code(sums)(ids))
    assert counted() == 3


def test_values_against_float_arithmetic():
    sums = model_of(Bert)[0]
    ids = ids_of(2, 9)
    words, places, types = (each.weight.detach() + 0 for each in (sums.words, sums.positions, sums.types))
    x = words[ids].double() + places[:9].double() + types[0].double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + sums.norm.eps).sqrt()
    expected = x * sums.norm.weight.double() + sums.norm.bias.double()
    with torch.inference_mode():
        torch.testing.assert_close(sums(ids).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("embeddings", ["auto", "int8", False])
def test_tables_of_any_kind(embeddings, counted):
    sums, ids = model_of(Bert, embeddings=embeddings)[0], ids_of(3, 6)
    assert isinstance(sums.words, QuantizedEmbedding) == bool(embeddings)
    assert_identical(sums(ids), by_code(sums)(ids))
    assert counted() == 1


def test_a_table_that_a_head_shares(counted):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.sums, self.head = Bert(), nn.Linear(WIDTH, ROWS, bias=False)
            self.head.weight = self.sums.words.weight

        def forward(self, ids):
            return self.head(self.sums(ids))

    sums, ids = torchq.convert(Tied().eval().requires_grad_(False)).sums, ids_of(3, 6)
    assert sums.words.owner is not None
    assert_identical(sums(ids), by_code(sums)(ids))
    assert counted() == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_rows_on_any_number_of_threads(threads, counted):
    sums, ids, before = model_of(Bert)[0], ids_of(40, LONGEST, seed=1), torch.get_num_threads()
    expected = by_code(sums)(ids)
    try:
        torch.set_num_threads(threads)
        assert_identical(sums(ids), expected)
    finally:
        torch.set_num_threads(before)
    assert counted() == 1


@pytest.mark.parametrize(
    "ids",
    [
        ids_of(2, 5).int(),
        ids_of(5, 2).t(),
        ids_of(1, 5).expand(3, 5),
        ids_of(2, 10)[:, ::2],
        ids_of(4, 5)[1:3],
        torch.empty(0, 5, dtype=torch.long),
        torch.empty(2, 0, dtype=torch.long),
    ],
)
@pytest.mark.parametrize("kind", ALL)
def test_indices_of_any_form(ids, kind):
    sums = model_of(kind)[0]
    assert_identical(sums(ids), by_code(sums)(ids))


@pytest.mark.parametrize(
    "others",
    [
        {"types": ids_of(3, 6) % 2},
        {"types": ids_of(1, 6) % 2},
        {"places": ids_of(3, 6) % 9},
        {"places": ids_of(6) % 9, "types": ids_of(3, 1) % 2},
        {"start": 4},
        {"places": None, "types": None, "embeds": None},
    ],
)
def test_other_arguments(others, counted):
    sums, ids = model_of(Bert)[0], ids_of(3, 6)
    assert_identical(sums(ids, **others), by_code(sums)(ids, **others))
    assert_identical(sums(ids=ids, **others), sums(ids, **others))
    assert counted() == 3


def test_sums_wider_than_the_first_table_has_indices(counted):
    sums, ids = model_of(Bert)[0], ids_of(1, 6)
    places = ids_of(4, 6) % 9
    assert_identical(sums(ids, places=places, types=ids % 2), by_code(sums)(ids, places=places, types=ids % 2))
    assert counted() == 1


def test_embeddings_that_are_given_are_the_users(counted):
    sums, x = model_of(Bert)[0], normal(2, 6, WIDTH)
    assert_identical(sums(embeds=x), by_code(sums)(embeds=x))
    assert counted() == 0


# ---- Errors are those of the code ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [ROWS, -1])
def test_an_index_out_of_range(bad):
    sums, ids = model_of(Bert)[0], ids_of(2, 6)
    ids[1, 3] = bad
    with pytest.raises(IndexError, match=f"index out of range: {bad} of a table of {ROWS} rows"):
        sums(ids)


def test_an_error_that_the_code_raises():
    with pytest.raises(ValueError, match="90 is too long"):
        model_of(Clip)[0](ids_of(1, 90))


# ---- Whoever looks sees what the code does ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "words", "types", "norm", "dropout"])
def test_hooks(name, counted):
    sums, seen = model_of(Bert)[0], []
    sums.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y.shape))
    assert_identical(sums(ids_of(2, 6)), by_code(sums)(ids_of(2, 6)))
    assert seen[0] == (2, 6, WIDTH)
    assert counted() == 0


def test_gradients_of_a_float_table(counted):
    sums = model_of(Bert)[0]
    sums.types.weight.requires_grad_(True)
    sums(ids_of(2, 6)).sum().backward()
    assert sums.types.weight.grad.shape == (2, WIDTH)
    assert counted() == 0


def test_training_drops_out(counted):
    sums = model_of(Bert)[0].train()
    assert (sums(ids_of(2, 6)) == 0).float().mean() > 0.2
    assert counted() == 0


@pytest.mark.parametrize("name", ["words", "norm", "types"])
def test_a_child_that_is_replaced(name, counted):
    sums = model_of(Bert)[0]
    child = nn.LayerNorm(WIDTH) if name == "norm" else nn.Sequential(getattr(sums, name), nn.Identity())
    setattr(sums, name, child)
    assert_identical(sums(ids_of(2, 6)), by_code(sums)(ids_of(2, 6)))
    assert counted() == 0


def test_a_table_that_rescales_its_rows(counted):
    sums = model_of(Bert)[0]
    sums.types.max_norm = 0.5
    with torch.no_grad():
        assert_identical(sums(ids_of(2, 6)), by_code(sums)(ids_of(2, 6)))
        assert sums.types.weight[0].norm() < 0.51
    assert counted() == 0


@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_autocast_modes_and_traces(counted):
    sums, ids = model_of(Bert)[0], ids_of(2, 6)
    expected = by_code(sums)(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_identical(sums(ids), by_code(sums)(ids))
    with FlopCounterMode(display=False):
        assert_identical(sums(ids), expected)
    traced = torch.jit.trace(sums, ids, check_trace=False)
    assert_identical(traced(ids), expected)
    vmapped = torch.vmap(functools.partial(sums, types=ids[:, :3] % 2, places=ids[:, :3] % 9))
    assert vmapped(torch.stack([ids[:, :3], ids[:, 3:]])).shape == (2, 2, 3, WIDTH)
    with torchq.simulate():
        sums(ids)
    assert counted() == 0


def test_compiled(counted):
    sums, ids = model_of(Bert)[0], ids_of(2, 6)
    torch.testing.assert_close(torch.compile(sums, backend="aot_eager", fullgraph=True)(ids), by_code(sums)(ids))
    assert counted() == 0


def test_a_forward_that_is_replaced(monkeypatch, counted):
    class Mine(Bert):
        pass

    sums, ids = model_of(Mine)[0], ids_of(2, 6)
    sums(ids)
    assert counted() == 1
    monkeypatch.setattr(Bert, "forward", lambda self, ids: ids + 1)
    assert torch.equal(sums(ids), ids + 1)
    assert counted() == 1


def test_a_function_that_is_replaced(monkeypatch, counted):
    sums, ids = model_of(Roberta)[0], ids_of(2, 6)
    before = sums(ids)
    monkeypatch.setitem(vars(embeddings), "positions_of", lambda ids, first: torch.zeros_like(ids))
    assert_identical(sums(ids), by_code(sums)(ids))
    assert not torch.equal(sums(ids), before)
    assert counted() == 1


def test_code_that_is_replaced(monkeypatch, counted):
    sums, ids = model_of(Distil)[0], ids_of(2, 6)
    before = sums(ids)
    monkeypatch.setattr(
        Distil.own_places, "__code__", (lambda self, words: self.places[:, 1 : words.size(1) + 1]).__code__
    )
    assert_identical(sums(ids), by_code(sums)(ids))
    assert not torch.equal(sums(ids), before)
    assert counted() == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(copied, counted):
    model, ids = model_of(Bert), ids_of(2, 6)
    again = copied(model)
    assert isinstance(again[0], EmbeddingSum)
    assert type(again[0]).__name__ == "Bert"
    assert again.state_dict().keys() == model.state_dict().keys()
    assert_identical(again[0](ids), model[0](ids))
    assert counted() == 2


def test_other_dtypes(counted):
    sums = model_of(Bert)[0].bfloat16()
    assert sums(ids_of(2, 6)).dtype == torch.bfloat16
    assert counted() == 0


# ---- What is read where the code finds it ----------------------------------------------------------------------------


class Wrapping(Bert):
    norm_of_class = 9

    def __init__(self):
        super().__init__()
        self._modules["norm_of_class"] = self.types  # which the class hides

    def forward(self, ids, divisor=7):
        x = self.words(ids) + self.positions(ids % divisor) + self.types(ids % self.types.weight.shape[0])
        return self.dropout(x if self.norm_of_class == 9 else self.norm(x))


def test_an_attribute_of_the_class_hides_a_child(counted):
    sums, ids = model_of(Wrapping)[0], ids_of(2, 6)
    assert_identical(sums(ids), by_code(sums)(ids))
    assert counted() == 1


@pytest.mark.parametrize(
    ("weight", "calls"), [(normal(8, WIDTH), 1), (torch._neg_view(normal(8, WIDTH)), 0), (normal(WIDTH, 8).t(), 0)]
)
def test_a_weight_that_is_replaced(weight, calls, counted):
    sums, ids = model_of(Wrapping)[0], ids_of(2, 6)
    sums.types.weight = nn.Parameter(weight, requires_grad=False)
    assert_identical(sums(ids), by_code(sums)(ids))
    assert counted() == calls


def test_a_weight_before_the_parameter(counted):
    sums, ids = model_of(Wrapping)[0], ids_of(2, 6)
    vars(sums.types)["weight"] = normal(2, WIDTH, seed=9)
    assert_identical(sums(ids), by_code(sums)(ids))
    assert counted() == 0


def test_defaults_that_are_replaced(monkeypatch, counted):
    sums, ids = model_of(Wrapping)[0], ids_of(2, 6)
    before = sums(ids)
    monkeypatch.setattr(Wrapping.forward, "__defaults__", (5,))
    assert_identical(sums(ids), by_code(sums)(ids))
    assert not torch.equal(sums(ids), before)
    assert counted() == 1


@pytest.mark.parametrize("name", ["embedding", "dropout"])
def test_a_function_of_torch_that_is_replaced(name, monkeypatch, counted):
    sums, ids, known = model_of(Wrapping)[0], ids_of(2, 6), getattr(nn.functional, name)
    before = sums(ids)
    monkeypatch.setattr(nn.functional, name, lambda *args, **kwargs: known(*args, **kwargs) * 2)
    assert_identical(sums(ids), by_code(sums)(ids))
    assert not torch.equal(sums(ids), before)
    assert counted() == 1


def test_an_index_of_a_class_that_watches(counted):
    seen = []

    class Watching(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    sums, ids = model_of(Clip)[0], ids_of(2, 6)
    sums.places = sums.places.clone().as_subclass(Watching)
    seen.clear()
    sums(ids)
    assert seen.count("__getitem__") == 1
    assert counted() == 0
