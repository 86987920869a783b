"""Embeddings in whole models: tables tied to heads and to each other, what they cost the output, copies, graphs."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding

from torchq import Plan, QConfig, apply_plan, convert, report, simulate
from torchq.modules.embedding import QuantizedEmbedding
from torchq.numerics.metrics import sqnr_db

ROWS = 300


class Language(nn.Module):
    """Tokens and positions in, scores of tokens out."""

    def __init__(self, tie=True, positions=True):
        super().__init__()
        self.words, self.more_words = nn.Embedding(ROWS, 64), nn.Embedding(ROWS, 64)
        self.mix, self.head = nn.Linear(64, 64), nn.Linear(64, ROWS)
        if tie:
            self.head.weight = self.more_words.weight = self.words.weight

    def forward(self, ids):
        h = self.words(ids) + self.more_words(ids.flip(-1))
        return self.head(h + torch.relu(self.mix(h)))


def language(**options):
    torch.manual_seed(0)
    return Language(**options).eval()


DATA = [torch.randint(0, ROWS, (8, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]
X = DATA[0][:2]


def stored(model):
    """Bytes, shared ones once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("data", [None, DATA], ids=["no data", "data"])
@torch.no_grad()
def test_a_tied_table_is_one_int8_copy(data, inplace):
    model = language()
    exact, before = model(X), stored(model)
    qmodel = convert(model, data, config=QConfig(embeddings=True), inplace=inplace)
    plan = qmodel.torchq_plan

    assert qmodel.words.owner is qmodel.head
    assert qmodel.more_words.owner is qmodel.head
    assert sorted(name for name in qmodel.state_dict() if "words" in name or "head" in name) == [
        "head.bias",
        "head.weight_int8",
        "head.weight_scale",
    ]
    assert stored(qmodel) < 0.3 * before
    assert torch.equal(qmodel.words(X), qmodel.head.weight.clone()[X])
    assert plan.layers["head"].rounding == "nearest"
    assert plan.layers["head"].channel_scale is None
    assert sqnr_db(exact, qmodel(X)) > 35
    assert report(qmodel).model.bytes_before == before
    assert report(qmodel).model.bytes_after == stored(qmodel)
    assert "table of words in int8" in str(report(qmodel))


@torch.no_grad()
def test_a_tie_outlives_copies_pickles_and_checkpoints():
    qmodel = convert(language())
    expected, file = qmodel(X), io.BytesIO()
    torch.save(qmodel, file)
    file.seek(0)

    for again in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel)), torch.load(file, weights_only=False)):
        assert again.words.owner is again.more_words.owner is again.head
        assert torch.equal(again(X), expected)
    other = convert(language())
    other.head.replace_weight(torch.ones(ROWS, 64, dtype=torch.int8), torch.ones(ROWS), torch.zeros(ROWS))
    assert torch.equal(other.words(X), torch.ones(2, 16, 64))
    other.load_state_dict(qmodel.state_dict())
    assert torch.equal(other(X), expected)
    plan = Plan.from_dict(qmodel.torchq_plan.to_dict())
    assert plan == qmodel.torchq_plan
    again = apply_plan(language(), plan)
    again.load_state_dict(qmodel.state_dict())
    assert torch.equal(again(X), expected)
    with pytest.raises(RuntimeError, match="replace it there"):
        other.words.replace_weight(torch.ones(ROWS, 64, dtype=torch.int8), torch.ones(ROWS))
    untied = convert(language(tie=False))
    with pytest.raises(RuntimeError, match="this one is the weight of a QuantizedLinear"):
        other.load_state_dict(untied.state_dict())


@torch.no_grad()
def test_embeddings_that_share_a_table_without_a_head_share_the_int8_one():
    model = nn.ModuleDict({"a": nn.Embedding(ROWS, 40), "b": nn.EmbeddingBag(ROWS, 40), "c": nn.Embedding(ROWS, 40)})
    model["b"].weight = model["a"].weight
    qmodel = convert(model)

    assert qmodel["b"].owner is qmodel["a"]
    assert sorted(qmodel.state_dict()) == ["a.weight_int8", "a.weight_scale", "c.weight_int8", "c.weight_scale"]
    assert stored(qmodel) == 2 * ROWS * (40 + 4)
    assert torch.equal(qmodel["b"](X), nn.functional.embedding_bag(X, qmodel["a"].weight.clone()))
    again = copy.deepcopy(qmodel).half()
    assert again["b"](X).dtype == again["a"](X).dtype == torch.float16
    assert torch.equal(again["a"](X), qmodel["a"](X).half())


REASONS = {
    "an excluded head": ({"exclude": ("head",)}, None, "its table is the weight of 'head', which stays in float"),
    "an excluded table": ({"exclude": ("words",)}, None, "excluded by 'words'"),
    "a head below min_sqnr_db": (
        {"min_sqnr_db": 43.5},
        DATA,
        "its table is the weight of 'head', which stays in float",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_is_tied_stays_in_float_together(case):
    config, data, reason = REASONS[case]
    model = language()
    qmodel = convert(model, data, config=QConfig(embeddings=True, smoothing="none", **config))

    assert type(qmodel.words) is type(qmodel.more_words) is nn.Embedding
    assert type(qmodel.head) is nn.Linear
    assert qmodel.head.weight is qmodel.words.weight
    assert {row.reason for row in qmodel.torchq_plan.tables.values()} == {reason}


def test_a_table_that_other_modules_have_stays_in_float():
    model = language()
    model.norm = nn.LayerNorm((ROWS, 64))
    model.norm.weight = model.words.weight
    plan = convert(model).torchq_plan

    assert plan.tables["words"].reason == "its table is a parameter of 'norm' (LayerNorm) too"
    assert plan.layers["head"].kind == "float"


def test_a_table_that_is_only_read_stays_in_float():
    class Reads(Language):
        def forward(self, ids):
            return self.mix(embedding(ids, self.words.weight))

    plan = convert(Reads(tie=False).eval(), DATA).torchq_plan

    assert plan.tables["words"].reason == "calib_loader never reached it; its table may be read without calling it"


def test_a_table_that_more_than_look_ups_reads_stays_in_float():
    class Reads(Language):
        def forward(self, ids):
            return super().forward(ids) + self.words.weight[:7].sum()

    for tie, kinds in ((False, ["float", "int8"]), (True, ["int8", "int8"])):
        model = Reads(tie=tie).eval()
        rows = convert(model, DATA, config=QConfig(embeddings=True)).torchq_plan.tables
        assert [row.kind for row in rows.values()] == kinds
        assert tie or rows["words"].reason.startswith("more than look-ups reads its table")


def test_int8_tables_that_cost_the_output_too_much_stay_in_float():
    """Here nothing but the table has an error to speak of, so it costs all there is; the head's own does not count."""
    model = language(tie=False)
    for parameter in model.mix.parameters():
        nn.init.zeros_(parameter)
    auto = convert(model, DATA, config=QConfig(embeddings="auto"))
    forced = convert(model, DATA, config=QConfig(embeddings=True))

    assert type(auto.words) is nn.Embedding
    assert auto.torchq_plan.tables["words"].reason.startswith("int8 costs ")
    assert type(forced.words) is QuantizedEmbedding
    assert auto.torchq_plan.checked.model_db > forced.torchq_plan.checked.model_db + 0.1
    # The same table behind a head of 23 dB costs nothing that could be seen.
    with torch.no_grad():
        model.head.weight[0] *= 40
    config = QConfig(weight="per_tensor", activation="dynamic", smoothing="none", rounding="nearest")
    kept = convert(model, DATA, config=config)
    assert type(kept.words) is QuantizedEmbedding
    assert kept.torchq_plan.checked.model_db < 30


def test_small_tables_return_to_float_first():
    model = language(tie=False)
    model.more_words = nn.Embedding(4 * ROWS, 64)
    with torch.no_grad():
        model.more_words.weight.mul_(1e-3)  # so what it costs is next to nothing, and the small one costs all there is

    plan = convert(model, DATA).torchq_plan

    assert plan.tables["words"].reason.startswith("int8 costs ")
    assert plan.tables["more_words"].kind == "int8"


@torch.no_grad()
def test_a_budget_that_nothing_keeps_returns_tables_as_well():
    model = language(tie=False)
    exact = model(X)

    def evaluate(candidate):
        return float(torch.equal(candidate(X), exact))

    with pytest.warns(UserWarning, match="no model with an int8 layer keeps the metric"):
        qmodel = convert(model, DATA, evaluate=evaluate, max_drop=0.0)
    assert torch.equal(qmodel(X), exact)


@torch.no_grad()
def test_an_edited_plan_with_the_head_in_float_leaves_the_table_so():
    model = language()
    plan = convert(model).torchq_plan
    plan.layers["head"] = dataclasses.replace(plan.layers["head"], kind="float", reason="mine")
    qmodel = apply_plan(model, plan)

    assert qmodel.words.weight is qmodel.head.weight
    row = report(qmodel).tables["words"]
    assert (row.kind, row.reason) == ("float", "its table is the weight of 'head', which stays in float")
    assert row.bytes_before == row.bytes_after == ROWS * 64 * 4
    plan.tables["words"] = dataclasses.replace(plan.tables["words"], owner="nobody")
    with pytest.raises(ValueError, match="table 'words' is tied to 'nobody', which the plan does not have"):
        apply_plan(model, plan)
    plan.tables["nobody"] = plan.tables.pop("words")
    with pytest.raises(ValueError, match="the plan names table 'nobody', which is no embedding of the model"):
        apply_plan(model, plan)


@torch.no_grad()
def test_a_channel_scale_of_a_tied_head_is_multiplied_back():
    model = language()
    plan = convert(model).torchq_plan
    scale = tuple(float(i % 7 + 1) / 4 for i in range(64))
    plan.layers["head"] = dataclasses.replace(plan.layers["head"], channel_scale=scale)
    qmodel = apply_plan(model, plan)

    assert torch.equal(qmodel.words(X), (qmodel.head.weight + 0)[X])
    assert sqnr_db(model.words(X), qmodel.words(X)) > 30


@pytest.mark.parametrize("tie", [False, True])
@torch.no_grad()
def test_simulated_compiled_and_exported(tie):
    qmodel = convert(language(tie=tie))
    expected = qmodel(X)
    with simulate():
        assert sqnr_db(expected, qmodel(X)) > 60
    assert torch.allclose(torch.compile(qmodel, backend="eager", fullgraph=True)(X), expected, atol=1e-5)
    assert torch.allclose(torch.export.export(qmodel, (X,)).module()(X), expected, atol=1e-5)


def test_gradients_pass_what_lies_behind_a_table():
    qmodel = convert(language())
    h = qmodel.words(X).requires_grad_()
    qmodel.head(h).square().sum().backward()

    assert h.grad.abs().sum() > 0
