"""Hugging Face models whose attention torchq computes: which, by which scheme, and with the right values."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import torchq
from torchq import kernels
from torchq.modules.attention import AttentionScheme
from torchq.modules.attention_offer import attention_modules
from torchq.planning.plan import AttentionPlan, Plan

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
SCHEMES = torchq.ops.ATTENTION_SCHEMES
LEAST_DB = {"float32": 110, "bfloat16": 45, "int8_bfloat16": 40, "int8": 35}
FASTEST = SCHEMES[-1]
QUICK = {"observer": "minmax", "rounding": "nearest", "smoothing": "none"}  # here attention counts, not the layers


def bert(**more):
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES, **more)).eval()


def llama(**more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, **more)
    return transformers.LlamaForCausalLM(config).eval()


def bart():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BartModel(config).eval()


def tokens(rows, length, seed=0):
    return torch.randint(1, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


def batches(length=24):
    return [{"input_ids": tokens(8, length, seed)} for seed in range(6)]


def converted(model, length=24, **more):
    return torchq.convert(model, batches(length), config=torchq.QConfig(**QUICK, **more), progress=False)


def only_attention(model, scheme, length=24):
    """Converted with every layer in float, so that only attention differs."""
    return converted(model, length, attention=scheme, min_sqnr_db=1e9)


def db(model, other, **inputs):
    with torch.no_grad():
        return torchq.sqnr_db(model(**inputs)[0], other(**inputs)[0])


# ---- Where it is offered ----


def test_the_copy_asks_for_torchq_and_the_original_for_what_it_did():
    model = bert()
    qmodel = torchq.convert(model)
    assert qmodel.config._attn_implementation == "torchq"
    assert model.config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "torchq_attention") for module in model.modules())
    names = [f"encoder.layer.{i}.attention.self" for i in range(3)]
    assert list(attention_modules(model)) == names == list(qmodel.torchq_plan.attentions)
    assert {row.scheme for row in qmodel.torchq_plan.attentions.values()} == {"float32"}


def test_a_model_that_wants_its_attention_weights_keeps_eager():
    model = bert(attn_implementation="eager")
    qmodel = converted(model)
    assert qmodel.config._attn_implementation == "eager"
    assert qmodel.torchq_plan.attentions == {}
    with torch.no_grad():
        assert len(qmodel(**batches()[0], output_attentions=True).attentions) == 3


def test_none_leaves_attention_alone():
    qmodel = torchq.convert(bert(), config=torchq.QConfig(attention="none"))
    assert qmodel.config._attn_implementation == "sdpa"
    assert qmodel.torchq_plan.attentions == {}


def test_a_model_without_attention_has_no_rows():
    assert torchq.convert(nn.Sequential(nn.Linear(64, 64))).torchq_plan.attentions == {}


def test_inplace_asks_for_torchq_in_the_model_itself():
    model, config = bert(), torchq.QConfig(**QUICK, embeddings=True)  # "auto" judges tables, but not in place
    expected = torchq.convert(model, batches(), config=config, progress=False)
    torchq.convert(model, batches(), config=config, inplace=True, progress=False)
    assert model.config._attn_implementation == "torchq"
    assert model.torchq_plan.attentions == expected.torchq_plan.attentions
    assert torch.equal(model(**batches()[0])[0], expected(**batches()[0])[0])


# ---- Its values ----


@pytest.mark.parametrize(("scheme", "least_db"), [(scheme, LEAST_DB[scheme]) for scheme in SCHEMES])
def test_each_scheme_is_as_close_as_it_should_be(scheme, least_db):
    model = bert()
    qmodel = only_attention(model, scheme)
    assert {module.torchq_attention.scheme for module in attention_modules(qmodel).values()} == {scheme}
    assert db(model, qmodel, **batches()[0]) > least_db
    if scheme != "float32":
        assert db(model, qmodel, **batches()[0]) < 100  # so the scheme was really used


def test_padding_is_masked():
    model = bert()
    qmodel = only_attention(model, "float32")
    mask = torch.ones(4, 24, dtype=torch.long)
    mask[1:, 7:] = 0
    ids = tokens(4, 24)
    assert db(model, qmodel, input_ids=ids, attention_mask=mask) > 110
    shorter = qmodel(input_ids=ids[1:2, :7])[0]
    torch.testing.assert_close(qmodel(input_ids=ids, attention_mask=mask)[0][1:2, :7], shorter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_decoder_generates_what_the_float_model_does(cache):
    model = llama()
    qmodel = only_attention(model, "float32")
    assert qmodel.config._attn_implementation == "torchq"
    more = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    ids = tokens(2, 5)
    assert torch.equal(qmodel.generate(ids, **more), model.generate(ids, **more))


def test_a_sliding_window():
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=6)
    torch.manual_seed(0)
    model = transformers.MistralModel(config).eval()
    assert db(model, only_attention(model, "float32"), **batches()[0]) > 110


def test_encoder_and_decoder():
    model = bart()
    qmodel = only_attention(model, "float32")
    assert len(qmodel.torchq_plan.attentions) == 3
    assert db(model, qmodel, input_ids=tokens(2, 20), decoder_input_ids=tokens(2, 9)) > 110


def test_position_biases_are_left_to_transformers():
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, vocab_size=99)
    model = transformers.T5EncoderModel(config).eval()
    assert db(model, only_attention(model, FASTEST), **batches()[0]) == float("inf")


def test_training_with_dropout_and_gradients_is_left_to_transformers():
    model = bert(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    qmodel = only_attention(model, FASTEST)
    outputs = []
    for each in (model, qmodel):
        torch.manual_seed(1)
        x = each.embeddings(tokens(2, 24)).detach().requires_grad_()
        each.train()(inputs_embeds=x)[0].square().sum().backward()
        outputs.append(x.grad)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_trace_is_the_same_whether_gradients_are_wanted_or_not():
    qmodel = only_attention(bert(return_dict=False), "float32")
    ids = tokens(2, 24)
    assert qmodel.embeddings(ids).requires_grad
    traced = torch.jit.trace(qmodel, ids, strict=False)  # which compares it with one that it makes in no_grad
    with torch.no_grad():
        torch.testing.assert_close(traced(ids)[0], qmodel(ids)[0], rtol=1e-5, atol=1e-5)


# ---- How the scheme is chosen ----

ENOUGH_KEYS = 64  # from here on a faster scheme pays on every kernel


@pytest.fixture
def not_of_pairs(monkeypatch):
    """Schemes are those of kernels that don't multiply pairs of codes."""
    monkeypatch.setattr(kernels, "_OF_PAIRS", None)


def test_auto_keeps_the_output_within_the_margin():
    model = bert()
    exact, plan = (converted(model, ENOUGH_KEYS, attention=scheme).torchq_plan for scheme in ("float32", "auto"))
    assert plan.checked.model_db > exact.checked.model_db - 0.3
    assert {row.scheme for row in plan.attentions.values()} != {"float32"}
    for row in plan.attentions.values():
        assert list(row.sqnr_db) == list(kernels.attention_schemes(ENOUGH_KEYS))
        assert sorted(row.sqnr_db.values()) == list(row.sqnr_db.values())  # the faster, the less exact
        assert min(row.sqnr_db.values()) > 30


@pytest.mark.parametrize(
    ("pays_from", "tried", "taken"),
    [(0, ["int8", "int8_bfloat16"], "int8"), (24, ["int8", "bfloat16"], "int8"), (25, ["bfloat16"], "bfloat16")],
)
@pytest.mark.usefixtures("not_of_pairs")
def test_auto_tries_what_is_faster_by_the_kernel(pays_from, tried, taken, monkeypatch):
    monkeypatch.setattr(kernels._C, "codes_pay_from", lambda: pays_from)
    rows = converted(bert()).torchq_plan.attentions.values()
    assert len(rows) == SIZES["num_hidden_layers"]
    assert [list(row.sqnr_db) for row in rows] == [tried] * 3
    assert [row.scheme for row in rows].count(taken) >= 2


@pytest.mark.usefixtures("not_of_pairs")
def test_auto_asks_for_the_keys_of_each_attention(monkeypatch):
    """The decoder's own has 9 keys; the two others have the encoder's 20, as the longest batch had."""
    monkeypatch.setattr(kernels._C, "codes_pay_from", lambda: 20)
    lengths = [12, 20, 12, 20, 12, 20]
    loader = [{"input_ids": tokens(4, n, i), "decoder_input_ids": tokens(4, 9, i)} for i, n in enumerate(lengths)]
    plan = torchq.convert(bart(), loader, config=torchq.QConfig(**QUICK), progress=False).torchq_plan
    tried = {name: list(row.sqnr_db) for name, row in plan.attentions.items()}
    assert tried == {
        "encoder.layers.0.self_attn": ["int8", "bfloat16"],
        "decoder.layers.0.self_attn": ["bfloat16"],
        "decoder.layers.0.encoder_attn": ["int8", "bfloat16"],
    }


def test_auto_keeps_float32_where_the_output_would_lose():
    """Nothing else has an error here, so any scheme would lose more than 0.3 dB."""
    plan = only_attention(bert(), "auto", ENOUGH_KEYS).torchq_plan
    assert {row.scheme for row in plan.attentions.values()} == {"float32"}
    assert {row.reason for row in plan.attentions.values()} == {"a faster scheme would cost accuracy"}


def test_auto_keeps_float32_where_no_scheme_is_faster(monkeypatch):
    monkeypatch.setattr(kernels, "attention_schemes", lambda keys: ("int8",) if keys >= 25 else ())
    few, enough = (converted(bert(), length).torchq_plan.attentions.values() for length in (24, 25))
    assert {(row.scheme, row.reason) for row in few} == {("float32", "none is faster for so few keys")}
    assert {row.scheme for row in enough} == {"int8"}
    assert [row.sqnr_db.keys() for row in (*few, *enough)] == [set()] * 3 + [{"int8"}] * 3


def test_an_edited_plan_is_applied():
    model = bert()
    plan = torchq.plan_of(converted(model))
    name = "encoder.layer.1.attention.self"
    rows = {**plan.attentions, name: AttentionPlan("sdpa", "my choice")}
    qmodel = torchq.apply_plan(model, dataclasses.replace(plan, attentions=rows))
    assert set(attention_schemes(qmodel)) == set(plan.attentions) - {name}
    assert Plan.from_dict(plan.to_dict()) == plan


def attention_schemes(model):
    modules = attention_modules(model).items()
    return {name: module.torchq_attention.scheme for name, module in modules if hasattr(module, "torchq_attention")}


def test_a_wrong_plan_is_an_error():
    model = bert()
    plan = torchq.plan_of(torchq.convert(model))
    for scheme, message in [
        ("float32", "plan names attention 'pooler', which is no module"),
        ("int4", "expected one of"),
    ]:
        wrong = dataclasses.replace(plan, attentions={"pooler": AttentionPlan(scheme, "")})
        with pytest.raises(ValueError, match=message):
            torchq.apply_plan(model, wrong)


def test_the_report_says_how_attention_is_computed():
    qmodel = torchq.convert(bert(), config=torchq.QConfig(attention="int8"))
    assert "attention in int8 (as the config says): all 3 of them" in str(torchq.report(qmodel))
    rows = torchq.report(qmodel).to_dict()["attentions"]
    assert rows["encoder.layer.0.attention.self"]["scheme"] == "int8"


# ---- Copies, processes, compilers ----


def test_copies_and_pickles_compute_the_same():
    qmodel = only_attention(bert(), FASTEST)
    expected = qmodel(**batches()[0])[0]
    for other in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert attention_schemes(other) == attention_schemes(qmodel)
        assert torch.equal(other(**batches()[0])[0], expected)


def test_unpickling_registers_the_function():
    interface = transformers.AttentionInterface._global_mapping
    saved = pickle.dumps(AttentionScheme("int8"))
    kept = interface.pop("torchq", None)
    try:
        assert pickle.loads(saved).scheme == "int8"
        assert "torchq" in interface
    finally:
        if kept is not None:
            interface["torchq"] = kept


@pytest.mark.slow(seconds=20)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_compile_gives_the_same_without_a_graph_break():
    qmodel = only_attention(bert(), FASTEST)
    inputs = batches()[0]
    with torch.no_grad():
        compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs)[0], qmodel(**inputs)[0], rtol=1e-4, atol=1e-5)
