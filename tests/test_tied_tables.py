"""Embeddings in whole models: tables tied to heads and to each other, what they cost the output, copies, graphs."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding

from torchq import Plan, QConfig, apply_plan, convert, prepare_qat, report, simulate
from torchq.modules.embedding import QuantizedEmbedding
from torchq.numerics.metrics import sqnr_db

ROWS = 300
FINE = QConfig(embeddings=True)


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


def with_one_code(plan):
    """The plan without the second codes of the head's input."""
    layers = {name: dataclasses.replace(layer, fine=False) for name, layer in plan.layers.items()}
    return dataclasses.replace(plan, layers=layers)


class Masked(Language):
    """Its tables have a large first column, which is hidden behind them: so their steps are too large for the rest."""

    def __init__(self):
        super().__init__(tie=False)
        with torch.no_grad():
            self.words.weight[:, 0] = self.more_words.weight[:, 0] = 30
            self.mix.weight.zero_()
            self.mix.bias.zero_()

    def forward(self, ids):
        h = self.words(ids) + self.more_words(ids.flip(-1))
        h = torch.cat([torch.zeros_like(h[..., :1]), h[..., 1:]], dim=-1)
        return self.head(h + self.mix(h))


def masked():
    torch.manual_seed(0)
    return Masked().eval()


def stored(model):
    """Bytes, shared ones once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("data", [None, DATA], ids=["no data", "data"])
@torch.no_grad()
def test_a_tied_table_is_one_int8_copy(data, inplace):
    model = language()
    exact, words, before = model(X), model.words(X), stored(model)
    qmodel = convert(model, data, config=FINE, inplace=inplace)
    plan = qmodel.torchq_plan

    assert qmodel.words.owner is qmodel.head
    assert qmodel.more_words.owner is qmodel.head
    assert sorted(name for name in qmodel.state_dict() if "words" in name or "head" in name) == [
        "head.bias",
        "head.weight_int8",
        "head.weight_residual",
        "head.weight_scale",
    ]
    assert stored(qmodel) < 0.41 * before
    assert sqnr_db(words, qmodel.words(X)) > 65
    assert 40 < sqnr_db(words, qmodel.head.weight.clone()[X]) < 46
    assert plan.layers["head"].rounding == "nearest"
    assert plan.layers["head"].channel_scale is None
    assert sqnr_db(exact, qmodel(X)) > 35
    assert report(qmodel).model.bytes_before == before
    assert report(qmodel).model.bytes_after == stored(qmodel)
    printed = " ".join(str(report(qmodel)).split())
    assert "table of words in int8, 67.8 dB (tied to 'head': one int8 copy, and 4 more bits for look-ups)" in printed


@torch.no_grad()
def test_a_tie_outlives_copies_pickles_and_checkpoints():
    qmodel = convert(language(), config=FINE)
    expected, file = qmodel(X), io.BytesIO()
    torch.save(qmodel, file)
    file.seek(0)

    for again in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel)), torch.load(file, weights_only=False)):
        assert again.words.owner is again.more_words.owner is again.head
        assert torch.equal(again(X), expected)
    other = convert(language(), config=FINE)
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
    untied = convert(language(tie=False), config=FINE)
    with pytest.raises(RuntimeError, match="this one is the weight of a FineLinear"):
        other.load_state_dict(untied.state_dict())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@torch.no_grad()
def test_a_checkpoint_of_an_earlier_version_has_the_codes_alone(tie, assign):
    """So its model gives what it gave then; a plan of that version makes one without residuals."""
    model = language(tie=tie)
    old = convert(model, config=QConfig(embeddings="int8"))
    data = old.torchq_plan.to_dict()
    for row in data["tables"].values():
        del row["residual"]
    assert not any(row.residual for row in Plan.from_dict(data).tables.values())
    assert not any("residual" in name for name in apply_plan(model, Plan.from_dict(data)).state_dict())
    new = apply_plan(model, with_one_code(convert(model, config=FINE).torchq_plan))
    assert not torch.equal(new(X), old(X))
    new.load_state_dict(old.state_dict(), assign=assign)
    assert torch.equal(new(X), old(X))
    with pytest.raises(RuntimeError, match=r"weight_residual: the saved layer has 4 more bits for look-ups, this one"):
        old.load_state_dict(new.state_dict())


BAD_RESIDUALS = {
    "dtype": (torch.int8, (ROWS, 32), r"expected torch.uint8 \(300, 32\), got torch.int8 \(300, 32\)"),
    "shape": (torch.uint8, (ROWS, 64), r"expected torch.uint8 \(300, 32\), got torch.uint8 \(300, 64\)"),
}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("case", BAD_RESIDUALS)
def test_residuals_of_a_checkpoint_are_checked_and_copied(case, tie):
    qmodel, key = convert(language(tie=tie), config=FINE), f"{'head' if tie else 'words'}.weight_residual"
    dtype, shape, words = BAD_RESIDUALS[case]
    state = {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"{key}: {words}"):
        qmodel.load_state_dict({**state, key: torch.zeros(shape, dtype=dtype)})
    expected = qmodel.words(X)
    qmodel.load_state_dict(state)
    state[key].zero_()
    assert torch.equal(qmodel.words(X), expected)


def test_an_edited_plan_says_which_tables_have_residuals():
    model = language()
    plan = with_one_code(convert(model, config=FINE).torchq_plan)
    rows = {name: dataclasses.replace(row, residual=False) for name, row in plan.tables.items()}
    plain = apply_plan(model, dataclasses.replace(plan, tables=rows))
    assert torch.equal(plain(X), convert(model, config=QConfig(embeddings="int8"))(X))
    for residual, words in ((False, "shares one int8 copy with others, so all have"), (4, "has residual 4, expected")):
        plan.tables["more_words"] = dataclasses.replace(plan.tables["more_words"], residual=residual)
        with pytest.raises(ValueError, match=f"table 'more_words' {words}"):
            apply_plan(model, plan)


@torch.no_grad()
def test_embeddings_that_share_a_table_without_a_head_share_the_int8_one():
    model = nn.ModuleDict({"a": nn.Embedding(ROWS, 40), "b": nn.EmbeddingBag(ROWS, 40), "c": nn.Embedding(ROWS, 40)})
    model["b"].weight = model["a"].weight
    qmodel = convert(model, config=FINE)

    assert qmodel["b"].owner is qmodel["a"]
    keys = ("weight_int8", "weight_residual", "weight_scale")
    assert sorted(qmodel.state_dict()) == [f"{name}.{key}" for name in "ac" for key in keys]
    assert stored(qmodel) == 2 * ROWS * (40 + 20 + 4)
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


@pytest.mark.parametrize("read", [lambda table: table[:7].sum(), lambda table: torch.cat([table, table]).sum()])
def test_a_table_that_more_than_look_ups_reads_stays_in_float(read):
    class Reads(Language):
        def forward(self, ids):
            return super().forward(ids) + read(self.words.weight)

    for tie, kinds in ((False, ["float", "int8"]), (True, ["int8", "int8"])):
        model = Reads(tie=tie).eval()
        rows = convert(model, DATA, config=FINE).torchq_plan.tables
        assert [row.kind for row in rows.values()] == kinds
        assert tie or rows["words"].reason.startswith("more than look-ups reads its table")


def test_int8_tables_that_cost_the_output_too_much_stay_in_float():
    """Nothing else here has an error to speak of, so they cost all there is; the head's own does not count."""
    model = masked()
    auto = convert(model, DATA, config=QConfig(embeddings="auto"))
    forced = convert(model, DATA, config=FINE)

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
    model = masked()
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
    plan = convert(model, config=FINE).torchq_plan
    scale = tuple(float(i % 7 + 1) / 4 for i in range(64))
    plan.layers["head"] = dataclasses.replace(plan.layers["head"], channel_scale=scale)
    qmodel = apply_plan(model, plan)

    assert torch.equal(qmodel.words(X), (qmodel.words.weight + 0)[X])
    assert sqnr_db(model.words(X), qmodel.words(X)) > sqnr_db(model.words(X), (qmodel.head.weight + 0)[X]) + 20


@torch.no_grad()
def test_a_table_of_its_own_may_have_the_channel_scale_of_a_head():
    """As where a checkpoint was loaded without the head."""
    model = language(tie=False)
    plan = convert(model, config=FINE).torchq_plan
    plan.tables["words"] = dataclasses.replace(plan.tables["words"], scaled=True)
    qmodel = apply_plan(model, Plan.from_dict(plan.to_dict()))
    plain, state = qmodel.words(X), qmodel.state_dict()
    assert torch.equal(plain, convert(model, config=FINE).words(X))
    factor = torch.rand(64) + 0.5
    qmodel.load_state_dict({**state, "words.channel_scale": factor})
    assert torch.equal(qmodel.words.channel_scale, factor)
    for again in (qmodel, copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert torch.equal(again.words(X), plain * factor)
        assert torch.equal((again.words.weight + 0)[X], plain * factor)
    with pytest.raises(RuntimeError, match=r"more_words.channel_scale: the saved layer scales the channels"):
        qmodel.load_state_dict({**state, "more_words.channel_scale": factor})


class Outliers(Language):
    """Behind a norm that makes two channels of the head's input 30 times as large."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        with torch.no_grad():
            self.norm.weight[[3, 17]] = 30

    def forward(self, ids):
        h = self.words(ids) + self.more_words(ids.flip(-1))
        return self.head(self.norm(h + torch.relu(self.mix(h))))


@torch.no_grad()
def test_a_head_is_smoothed_if_its_table_has_residuals():
    torch.manual_seed(0)
    model, found = Outliers().eval(), {}
    for name, config in {
        "fine": FINE,
        "codes": QConfig(embeddings="int8"),
        "plain": QConfig(embeddings=True, smoothing="none"),
    }.items():
        qmodel = convert(model, DATA, config=config)
        plan = qmodel.torchq_plan
        found[name] = sqnr_db(model(X), qmodel(X))
        assert (plan.layers["head"].channel_scale is not None) == (name == "fine")
        whole = sqnr_db(model.words.weight, qmodel.words.weight + 0)
        assert plan.tables["words"].sqnr_db == pytest.approx(whole, abs=0.01)
        assert whole > {"fine": 55, "codes": 43, "plain": 65}[name]
        assert torch.equal(qmodel.words(X), (qmodel.words.weight + 0)[X])
    assert found["fine"] > found["plain"] + 2.5
    prepared = prepare_qat(model, DATA, config=FINE)
    assert convert(prepared).torchq_plan.layers["head"].channel_scale is None


@pytest.mark.parametrize("tie", [False, True])
@torch.no_grad()
def test_simulated_compiled_and_exported(tie):
    qmodel = convert(language(tie=tie), config=FINE)
    expected = qmodel(X)
    with simulate():
        assert sqnr_db(expected, qmodel(X)) > 60
    assert torch.allclose(torch.compile(qmodel, backend="eager", fullgraph=True)(X), expected, atol=1e-5)
    assert torch.allclose(torch.export.export(qmodel, (X,)).module()(X), expected, atol=1e-5)


def test_gradients_pass_what_lies_behind_a_table():
    qmodel = convert(language(), config=FINE)
    h = qmodel.words(X).requires_grad_()
    qmodel.head(h).square().sum().backward()

    assert h.grad.abs().sum() > 0
