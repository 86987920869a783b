"""Sparse tensors that a model holds beside its layers are copied and saved as they are, in every layout."""

import pytest
import torch
from torch import nn

import torchq
from helpers.numbers import normal
from torchq import convert, files, report

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state", "ignore:Sparse invariant checks"),
]

X = normal(16, 64)

DENSE = torch.zeros(64, 64)
DENSE[0, 1], DENSE[5, 7], DENSE[63, 0] = 2.0, -3.0, 0.5
INDICES, TWICE = torch.tensor([[0, 0, 5], [1, 1, 7]]), torch.tensor([1.0, 2.0, 0.0])
SPARSE = {
    "coalesced": lambda: DENSE.to_sparse(),
    "not coalesced": lambda: torch.sparse_coo_tensor(INDICES, TWICE, (64, 64)),
    "rows": lambda: DENSE.to_sparse_csr(),
    "short indices": lambda: torch.sparse_csr_tensor(torch.arange(65).int(), torch.arange(64).int(), DENSE[:, 1]),
    "columns": lambda: DENSE.to_sparse_csc(),
    "blocks": lambda: DENSE.to_sparse_bsr((4, 8)),
    "hybrid": lambda: torch.sparse_coo_tensor(torch.tensor([[3, 3]]), DENSE[:2], (64, 64)),
}


def parts(x):
    names = {torch.sparse_coo: ("_indices", "_values"), torch.sparse_csc: ("ccol_indices", "row_indices", "values")}
    return [getattr(x, name)() for name in names.get(x.layout, ("crow_indices", "col_indices", "values"))]


def assert_the_same_sparse(x, y):
    assert (x.layout, x.shape, x.dtype) == (y.layout, y.shape, y.dtype)
    assert x.layout != torch.sparse_coo or x.is_coalesced() == y.is_coalesced()
    for one, other in zip(parts(x), parts(y), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


class Graph(nn.Module):
    def __init__(self, edges, persistent=True):
        super().__init__()
        self.body, self.plain, self.again = nn.Linear(64, 64), edges.clone(), nn.Identity()
        self.register_buffer("edges", edges.clone(), persistent=persistent)
        self.again.register_buffer("edges", self.edges, persistent=persistent)

    def forward(self, x):
        return self.body(x) @ self.edges.to_dense()


@pytest.mark.parametrize("make", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("persistent", [False, True])
def test_sparse_buffers_stay_what_they_are(make, persistent, tmp_path):
    edges = make()
    model = Graph(edges, persistent).eval()
    qmodel = convert(model)
    torchq.save(qmodel, tmp_path / "model.safetensors")
    loaded = torchq.load(tmp_path / "model.safetensors", Graph(edges, persistent))
    from_nothing = torchq.load(tmp_path / "model.safetensors", Graph(edges, persistent).to("meta"))
    for same in (qmodel, loaded, from_nothing):
        assert_the_same_sparse(same.edges, edges)
        assert same.again.edges is same.edges
        assert same.edges is not model.edges
        assert torch.equal(same(X), qmodel(X))
    assert_the_same_sparse(qmodel.plain, edges)
    assert qmodel.plain is not model.plain
    floats = 64 * 64 * 4 + 64 * 4
    assert report(qmodel).model.bytes_before == floats + sum(part.nbytes for part in parts(edges))


def test_a_sparse_parameter_is_copied():
    model = nn.Sequential(nn.Linear(64, 64))
    model.edges = nn.Parameter(SPARSE["rows"]().clone(), requires_grad=False)
    qmodel = convert(model)
    assert isinstance(qmodel.edges, nn.Parameter)
    assert not qmodel.edges.requires_grad
    assert_the_same_sparse(qmodel.edges, model.edges)
    assert qmodel.edges.values().data_ptr() != model.edges.values().data_ptr()


def test_a_file_of_an_earlier_version_has_dense_values_of_sparse_buffers(tmp_path):
    model = Graph(SPARSE["coalesced"]()).eval()
    qmodel = convert(model)
    dense = convert(Graph(DENSE).eval())
    dense.body.load_state_dict(qmodel.body.state_dict())
    torchq.save(dense, tmp_path / "model.safetensors")
    assert_the_same_sparse(torchq.load(tmp_path / "model.safetensors", model).edges, SPARSE["coalesced"]())


def test_wrong_parts_of_a_sparse_buffer_are_refused(monkeypatch, tmp_path):
    qmodel = convert(Graph(SPARSE["rows"]()).eval())
    monkeypatch.setattr(
        files, "_kind_of_sparse", lambda x: {"layout": str(x.layout), "size": [3, 3], "coalesced": False}
    )
    torchq.save(qmodel, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is damaged: edges is no sparse tensor"):
        torchq.load(tmp_path / "model.safetensors", Graph(SPARSE["rows"]()))


@pytest.mark.parametrize("key", ["norm.bias", "table"])
def test_sparse_tensors_for_dense_ones_are_refused(key, monkeypatch, tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)
            self.register_buffer("table", torch.ones(4, 4))

    named = files._named_once

    def with_a_sparse_one(model):
        found, shared = named(model)
        return {**found, key: found[key].detach().to_sparse()}, shared

    monkeypatch.setattr(files, "_named_once", with_a_sparse_one)
    torchq.save(convert(Model().eval()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{key}: torch.sparse_coo in the file, torch.strided in the model"):
        torchq.load(tmp_path / "model.safetensors", Model().eval())
