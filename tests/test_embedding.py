"""int8 tables of embeddings: their arithmetic, what stays in float, and what other code finds."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding

from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert, ops, prepare_qat, report
from torchq.modules.embedding import QuantizedEmbedding, QuantizedEmbeddingBag, QuantizedTable
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.residual import residuals_of, with_residuals
from torchq.ops import lookup
from torchq.ops.weights import quantize_weight
from torchq.planning.tables import MIN_BYTES

ROWS, DIM = 300, 40


def dequantized(weight, finely=True):
    """By hand: one scale per row, symmetric, half to even, in float32; finely, in sixteenths of a step."""
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
    steps = weight.float() * (1 / torch.where(scale == 0, 1, scale))
    codes = torch.round(steps)
    if finely:
        codes += torch.round((steps - codes) * 16).clamp(-8, 7) / 16
    return (codes * torch.where(scale == 0, 1, scale)).to(weight.dtype)


def table(kind=nn.Embedding, seed=0, dtype=torch.float32, **options):
    module = kind(ROWS, DIM, **options).to(dtype)
    with torch.no_grad():
        module.weight.copy_(normal(ROWS, DIM, seed=seed))
        if module.padding_idx is not None:
            module.weight[module.padding_idx] = 0
    return module.eval()


def converted(module, embeddings=True):
    return convert(nn.ModuleList([module]), config=QConfig(embeddings=embeddings))[0]


IDS = torch.randint(0, ROWS, (4, 7), generator=torch.Generator().manual_seed(0))


# ---- The op ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 8, 13, 64, 515, 1100])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("finely", [False, True])
def test_rows_are_codes_times_scale_bit_for_bit(kernel, dtype, dim, packed, finely):
    """Also gathered out of a packed weight, whose channel scale multiplies what its division took."""
    generator = torch.Generator().manual_seed(dim)
    codes = torch.randint(-128, 128, (50, dim), dtype=torch.int8, generator=generator)
    residuals = torch.randint(-8, 8, (50, dim), dtype=torch.int8, generator=generator) if finely else None
    scale, factor = normal(50, seed=1).abs() + 0.1, normal(dim, seed=2).abs() + 0.5
    expected = (codes + (0 if residuals is None else residuals.float() / 16)).float() * scale[:, None]
    ids = torch.tensor([[0, 49, 17], [16, 15, 17]])
    residual = None if residuals is None else lookup.pack_residuals(residuals)

    def found(form, ids):
        return lookup.embedding(form, ids, dim, dtype, residual)

    form = ops.pack(codes, scale, normal(50, seed=3)) if packed else lookup.pack_table(codes, scale)
    assert torch.equal(found(form, ids), expected[ids].to(dtype))
    assert torch.equal(found(form, ids.int().t()), expected[ids.t()].to(dtype))
    assert found(form, ids[:0]).shape == (0, 3, dim)
    scaled = ops.pack(codes, scale, None, factor)
    assert torch.equal(found(scaled, ids), (expected[ids] * factor).to(dtype))


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_residuals_are_packed_two_in_a_byte(dim):
    residuals = torch.arange(-8, 8, dtype=torch.int8).repeat(dim, 1).t().contiguous()
    residuals[:, 1::2] = residuals[:, 1::2].flip(0)
    packed = lookup.pack_residuals(residuals)

    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (16, (dim + 1) // 2))
    assert torch.equal(lookup.unpack_residuals(packed, dim), residuals)


def test_residuals_are_what_codes_leave():
    """Half of a step above a code is out of reach, by a sixteenth; zeros stay zeros."""
    x = torch.tensor([[127.0, 0.5, -0.5, 0.46, 0.47, -3.2, 0.0]])
    codes, scale = quantize_weight(x, per_channel=True)
    residuals = residuals_of(x, codes, scale)

    assert codes.tolist() == [[127, 0, 0, 0, 0, -3, 0]]
    assert residuals.tolist() == [[0, 7, -8, 7, 7, -3, 0]]
    assert with_residuals(codes, residuals, scale).tolist() == [[127.0, 0.4375, -0.5, 0.4375, 0.4375, -3.1875, 0.0]]
    weight = normal(200, 256, seed=7)
    codes, scale = quantize_weight(weight, per_channel=True)
    fine = with_residuals(codes, residuals_of(weight, codes, scale), scale)
    assert sqnr_db(weight, fine) > sqnr_db(weight, codes * scale[:, None]) + 23


def test_many_rows_by_threads_and_extreme_numbers():
    codes, scale = torch.tensor([[-128, 127, 0]], dtype=torch.int8), torch.tensor([3e38 / 127])
    form = lookup.pack_table(codes.repeat(2000, 50), scale.repeat(2000))
    ids = torch.arange(2000).flip(0)

    y = lookup.embedding(form, ids, 150, torch.float32)

    assert torch.equal(y, (codes.float() * scale).repeat(2000, 50))
    assert torch.equal(y, torch.cat([lookup.embedding(form, part, 150, torch.float32) for part in ids.split(7)]))


BAD = {
    "an index below": (lambda t: lookup.embedding(t, torch.tensor([3, -1]), DIM, torch.float32), IndexError, "-1 of a"),
    "an index above": (lambda t: lookup.embedding(t, torch.tensor([ROWS]), DIM, torch.float32), IndexError, "300 of a"),
    "float indices": (lambda t: lookup.embedding(t, torch.ones(2), DIM, torch.float32), RuntimeError, "int64 or int32"),
    "another width": (lambda t: lookup.embedding(t, IDS, DIM + 1, torch.float32), RuntimeError, "of 41 codes"),
    "another dtype": (lambda t: lookup.embedding(t, IDS, DIM, torch.float64), RuntimeError, "dtype must be float32"),
    "no table": (lambda t: lookup.embedding(t.int(), IDS, DIM, torch.float32), RuntimeError, "got int32"),
    "a residual of another width": (
        lambda t: lookup.embedding(t, IDS, DIM, torch.float32, torch.zeros(ROWS, DIM, dtype=torch.uint8)),
        RuntimeError,
        r"pack_residuals\(\) returned for this table, uint8 \(300, 20\), got uint8 \(300, 40\)",
    ),
    "a residual of fewer rows": (
        lambda t: lookup.embedding(t, IDS, DIM, torch.float32, torch.zeros(ROWS - 1, DIM // 2, dtype=torch.uint8)),
        RuntimeError,
        r"uint8 \(300, 20\), got uint8 \(299, 20\)",
    ),
    "a float residual": (
        lambda t: lookup.embedding(t, IDS, DIM, torch.float32, torch.zeros(ROWS, DIM // 2)),
        RuntimeError,
        r"uint8 \(300, 20\), got float32 \(300, 20\)",
    ),
    "no packed weight": (lambda t: lookup.embedding(t[0], IDS, DIM, torch.float32), RuntimeError, "no packed weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_of_the_op(case):
    run, error, message = BAD[case]
    codes = torch.zeros(ROWS, DIM, dtype=torch.int8)
    with pytest.raises(error, match=message):
        run(lookup.pack_table(codes, torch.ones(ROWS)))


# ---- The modules ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("embeddings", [True, "int8"])
@torch.no_grad()
def test_an_embedding_gives_the_rows_of_its_dequantized_table(dtype, embeddings):
    module = table(dtype=dtype, padding_idx=3)
    int8, expected = converted(module, embeddings=embeddings), dequantized(module.weight, finely=embeddings != "int8")

    assert type(int8) is QuantizedEmbedding
    assert int8(IDS).dtype == dtype
    assert torch.equal(int8(IDS), expected[IDS])
    assert torch.equal(int8(IDS.int()[0, 0]), expected[IDS[0, 0]])
    assert not int8(torch.tensor([3])).any()
    assert (int8.num_embeddings, int8.embedding_dim, int8.padding_idx) == (ROWS, DIM, 3)
    with pytest.raises(IndexError, match="index out of range"):
        int8(torch.tensor([ROWS]))


BAGS = {
    "a row for each bag": (IDS, None, None),
    "offsets": (IDS.flatten(), torch.tensor([0, 3, 3, 10]), None),
    "int32": (IDS.flatten().int(), torch.tensor([0, 3, 3, 10], dtype=torch.int32), None),
    "weights": (IDS.flatten(), torch.tensor([0, 3, 3, 10]), normal(28, seed=4)),
    "weights of rows": (IDS, None, normal(4, 7, seed=4)),
    "none": (IDS[0, :0], torch.tensor([0, 0]), None),
}


@pytest.mark.parametrize("case", BAGS)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": int(IDS[0, 1])}, {"include_last_offset": True}], ids=str)
@torch.no_grad()
def test_a_bag_computes_as_torchs_does_with_the_dequantized_table(case, mode, options):
    ids, offsets, weights = BAGS[case]
    if weights is not None and mode != "sum":
        weights = None
    if options.get("include_last_offset") and offsets is not None:
        offsets = torch.cat([offsets, torch.tensor([len(ids)], dtype=offsets.dtype)])
    module = table(nn.EmbeddingBag, mode=mode, **options)
    int8, exact = converted(module), copy.deepcopy(module)
    exact.weight.copy_(dequantized(module.weight))

    assert type(int8) is QuantizedEmbeddingBag
    assert torch.equal(int8(ids, offsets, weights), exact(ids, offsets, weights))


def test_a_bag_hands_gradients_to_its_weights():
    module = table(nn.EmbeddingBag, mode="sum")
    int8, exact, found = converted(module), copy.deepcopy(module), []
    exact.weight.data = dequantized(module.weight.data)
    for bag in (exact, int8):
        weights = normal(4, 7, seed=4).requires_grad_()
        bag(IDS, None, weights).square().sum().backward()
        found.append(weights.grad)

    assert torch.equal(*found)


class Scaled(nn.Embedding):
    """As in BART and Gemma: the base's rows, by a factor."""

    def __init__(self, *args, factor=3.0):
        super().__init__(*args)
        self.factor = factor
        self.register_buffer("shift", torch.ones(()), persistent=False)

    def forward(self, input_ids):
        return super().forward(input_ids) * self.factor + self.shift

    def twice(self, ids):
        return 2 * self(ids)


class Positions(nn.Embedding):
    """As in OPT: what it is given is a mask, and its rows start at 2."""

    def forward(self, mask, past=0):
        return super().forward((mask.cumsum(dim=1) * mask - 1 + past) + 2)


class Whole(nn.Embedding):
    """Reads its weight, and never calls the base."""

    def forward(self, ids):
        return embedding(ids, self.weight)


@pytest.mark.parametrize("kind", [Scaled, Positions, Whole])
@torch.no_grad()
def test_a_subclass_keeps_its_forward_around_the_int8_rows(kind):
    module = table(kind)
    int8, exact = converted(module), copy.deepcopy(module)
    exact.weight.copy_(dequantized(module.weight))
    ids = torch.ones(2, 5, dtype=torch.long)

    assert isinstance(int8, QuantizedTable)
    assert isinstance(int8, kind)
    assert torch.equal(int8(ids), exact(ids))
    for again in (copy.deepcopy(int8), pickle.loads(pickle.dumps(int8))):
        assert type(again) is type(int8)
        assert torch.equal(again(ids), exact(ids))
    if kind is Scaled:
        assert torch.equal(int8.twice(ids), exact.twice(ids))
        assert int8.shift is not module.shift


class Noisy(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + torch.rand(())


class Two(nn.Embedding):
    def forward(self, ids, others):
        return super().forward(ids) + super().forward(others)


class Wide(nn.Embedding):
    def __init__(self, *args):
        super().__init__(*args)
        self.extra = nn.Parameter(torch.ones(1))


def hooked():
    module = table()
    module.register_forward_hook(lambda *_: None)
    return module


def with_nan():
    module = table()
    module.weight.data[5, 5] = torch.nan
    return module


def patched():
    module = table()
    module.forward = module.forward
    return module


FLOAT = {
    "max_norm": (lambda: table(max_norm=1.0), "max_norm rescales rows of its table"),
    "a bag's max_norm": (lambda: table(nn.EmbeddingBag, max_norm=1.0), "max_norm rescales rows of its table"),
    "another formula": (lambda: table(Noisy), "Noisy has a forward of its own, which can't be proven"),
    "another call": (lambda: table(Two), "Two has a forward of its own, which can't be proven"),
    "more parameters": (lambda: table(Wide), "Wide has parameters beside its table"),
    "hooks": (hooked, "it has forward hooks"),
    "a patch": (patched, "Embedding has a forward of its own"),
    "a parametrization": (lambda: nn.utils.parametrizations.weight_norm(table()), "its table is computed"),
    "NaN": (with_nan, "its table has NaN or infinity"),
    "float64": (lambda: table(dtype=torch.float64), "its table is torch.float64"),
    "few bytes": (lambda: nn.Embedding(MIN_BYTES // 4 // 64 - 1, 64), "int8 would save next to nothing"),
    "rows of one number": (lambda: nn.Embedding(MIN_BYTES, 1), "int8 would save next to nothing"),
}


@pytest.mark.parametrize("case", FLOAT)
def test_what_stays_in_float_and_why(case):
    make, reason = FLOAT[case]
    module = make()
    qmodel = convert(nn.ModuleDict({"table": module, "fc": nn.Linear(64, 64)}))

    assert qmodel.torchq_plan.tables["table"].kind == "float"
    assert qmodel.torchq_plan.tables["table"].reason.startswith(reason)
    assert not isinstance(qmodel["table"], QuantizedTable)
    assert f"table in float, {reason}" in " ".join(str(report(qmodel)).replace("\n", " ").split())


def test_config_and_exclude():
    model = nn.ModuleDict({"a": table(), "b": table(), "fc": nn.Linear(64, 64)})
    kinds = {name: row.kind for name, row in convert(model, config=QConfig(exclude=("a*",))).torchq_plan.tables.items()}

    assert kinds == {"a": "float", "b": "int8"}
    off = convert(model, config=QConfig(embeddings=False)).torchq_plan.tables["b"]
    assert (off.kind, off.reason) == ("float", "QConfig(embeddings=False)")
    with pytest.raises(ValueError, match="embeddings must be True, False, 'auto' or 'int8', got 'yes'"):
        QConfig(embeddings="yes")
    with pytest.raises(ValueError, match=r"the model has no nn\.Linear"):
        convert(nn.ModuleList([table()]), config=QConfig(embeddings=False))
    with pytest.raises(ValueError, match=r"the model has no nn\.Linear"):
        prepare_qat(nn.ModuleList([table()]), config=QConfig(embeddings=False))


@pytest.mark.parametrize(("others", "residual"), [(80, False), (160, True)])
def test_residuals_are_for_models_that_are_not_nearly_all_table(others, residual):
    """Here 300 x 40 numbers are 0.78 and 0.64 of the model, which with the residuals takes up to a third of float."""
    model = nn.ModuleDict({"a": table(), "b": nn.EmbeddingBag(ROWS, DIM), "fc": nn.Linear(40, others)})
    model["b"].weight = model["a"].weight
    rows = convert(model).torchq_plan.tables
    assert [row.residual for row in rows.values()] == [residual] * 2
    forced = convert(model, config=QConfig(embeddings=True)).torchq_plan.tables
    assert all(row.residual and row.sqnr_db > 65 for row in forced.values())
    assert all(40 < row.sqnr_db < 46 for row in rows.values()) != residual
    none = convert(model, config=QConfig(embeddings="int8")).torchq_plan.tables
    assert not any(row.residual for row in none.values())


# ---- Foreign code ----


@torch.no_grad()
def test_weight_is_a_float_table_that_only_looks_up_what_is_asked(monkeypatch):
    module = table()
    int8, expected = converted(module), dequantized(module.weight)

    assert (int8.weight.shape, int8.weight.dtype) == (module.weight.shape, torch.float32)
    assert torch.equal(int8.weight[:5] + 0, expected[:5])
    assert torch.equal(int8.weight.sum(), expected.sum())
    assert [name for name, _ in int8.named_parameters()] == ["weight"]
    monkeypatch.setattr(QuantizedTable, "_float_table", lambda self: pytest.fail("dequantized all of the table"))
    assert torch.equal(embedding(IDS, int8.weight), expected[IDS])
    with pytest.raises(RuntimeError, match="can't be written"):
        int8.weight.zero_()
    with pytest.raises(RuntimeError, match="can't be written"):
        int8.weight = module.weight


@torch.no_grad()
def test_the_weight_of_a_linear_layer_is_looked_up_by_rows_too():
    layer = QuantizedLinear.from_float(nn.Linear(DIM, ROWS))

    assert torch.equal(embedding(IDS, layer.weight), (layer.weight + 0)[IDS])
