"""compressed-tensors: what is written computes what transformers reads from it, and is run again bit for bit."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers.compare import assert_identical
from helpers.texts import SIZES
from torchq import QConfig, apply_plan, convert, sqnr_db
from torchq.planning import tables

transformers = pytest.importorskip("transformers", "5.17", reason="transformers 5.17 is not installed")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

from torchq import hf  # noqa: E402

pytestmark = [pytest.mark.usefixtures("seeded", "quiet_transformers"), pytest.mark.slow(seconds=4)]

IDS = [torch.randint(5, 90, (8, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
MORE = {"intermediate_size": 48}
SHARE = 5e-3
"""The most that an output may differ from transformers', as a share of the largest.

Sums of floats are rounded otherwise, by 1e-7. Where that moves an input of a later layer over a rounding step, its code
is one off: 6σ/255 · 3σ' of a sum of K products, whose largest is about 3·sqrt(K)·σσ'. That is 4.2e-3 for K = 32, the
least here. It happens to few values, so the SQNR is that of sums that differ in a few rows, above 60 dB.
"""


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    monkeypatch.setattr(tables, "MIN_BYTES", 1)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **MORE)).eval()


def llama(**more):
    config = transformers.LlamaConfig(**SIZES, **MORE, num_key_value_heads=2, pad_token_id=0, **more)
    return transformers.LlamaForCausalLM(config).eval()


def converted(model, **more):
    config = QConfig(**{"smoothing": "none", "rounding": "nearest", "attention": "none", "embeddings": False, **more})
    return convert(model, [{"input_ids": ids} for ids in IDS], config=config, progress=False)


def changed(folder, change):
    """Changes the only group of a written checkpoint's config."""
    path = folder / "config.json"
    about = json.loads(path.read_text())
    change(about["quantization_config"]["config_groups"]["group_0"])
    path.write_text(json.dumps(about))


def assert_near(actual, expected, share=SHARE, db=60):
    assert float((actual - expected).abs().max()) <= share * float(expected.abs().max())
    assert sqnr_db(expected, actual) > db


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("activation", ["dynamic", "static"])
def test_what_is_written_is_read_by_transformers_and_run_bit_for_bit(make, activation, tmp_path):
    model = make()
    qmodel = converted(model, activation=activation)
    hf.save_compressed_tensors(qmodel, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    y = qmodel(IDS[0])[0]
    theirs = type(model).from_pretrained(tmp_path)
    assert type(theirs) is type(model)
    assert_near(y, theirs(IDS[0])[0])
    again = hf.from_compressed_tensors(type(model), tmp_path)
    kinds = {name: row.kind for name, row in again.torchq_plan.layers.items()}
    assert kinds == {name: row.kind for name, row in qmodel.torchq_plan.layers.items()}
    assert f"int8 {activation}" in kinds.values()
    for name, row in again.torchq_plan.layers.items():
        assert row.input_qparams == getattr(qmodel.get_submodule(name), "input_qparams", None)
    assert all(row.scheme == "float32" for row in again.torchq_plan.attentions.values())
    assert sqnr_db(y, again(IDS[0])[0]) > 60  # torchq's attention
    again.save_pretrained(tmp_path / "int8")
    assert_identical(type(model).from_pretrained(tmp_path / "int8")(IDS[0])[0], again(IDS[0])[0])
    states = again.state_dict(), qmodel.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert_identical(tensor, states[1][key], key)


def test_the_two_schemes_and_float_layers_in_one_model(tmp_path):
    qmodel = converted(bert(), exclude=("bert.encoder.layer.0.attention",), activation="static")
    plan = qmodel.torchq_plan
    layer = qmodel.bert.encoder.layer[1].output.dense
    layer.input_qparams = None
    plan.layers["bert.encoder.layer.1.output.dense"].__dict__["kind"] = "int8 dynamic"
    hf.save_compressed_tensors(qmodel, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert len(said["config_groups"]) == 2
    assert "bert.encoder.layer.0.attention.self.query" in said["ignore"]
    y = qmodel(IDS[0])[0]
    assert_near(y, transformers.BertForMaskedLM.from_pretrained(tmp_path)(IDS[0])[0])
    again = hf.from_compressed_tensors(transformers.AutoModelForMaskedLM, tmp_path)
    kinds = {name: row.kind for name, row in again.torchq_plan.layers.items()}
    assert kinds == {name: row.kind for name, row in plan.layers.items()}
    assert sqnr_db(y, again(IDS[0])[0]) > 60


def test_symmetric_activations_have_zero_point_128(tmp_path):
    """Static ones as they are. Dynamic ones are finer here than what the checkpoint asks for."""
    qmodel = converted(llama(), activation="static")
    for module in qmodel.modules():
        if getattr(module, "input_qparams", None) is not None:
            module.input_qparams = module.input_qparams._replace(zero_point=128)
    hf.save_compressed_tensors(qmodel, tmp_path / "static")
    changed(tmp_path / "static", lambda group: group["input_activations"].update(symmetric=True))
    y = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "static")(IDS[0])[0]
    again = hf.from_compressed_tensors(transformers.AutoModelForCausalLM, tmp_path / "static")
    assert {row.input_qparams.zero_point for row in again.torchq_plan.layers.values()} == {128}
    assert sqnr_db(y, again(IDS[0])[0]) > 60
    model = llama()
    hf.save_compressed_tensors(converted(model, activation="dynamic"), tmp_path / "dynamic")
    changed(tmp_path / "dynamic", lambda group: group["input_activations"].update(symmetric=True))
    exact = model(IDS[0])[0]
    y = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dynamic")(IDS[0])[0]
    z = hf.from_compressed_tensors(transformers.AutoModelForCausalLM, tmp_path / "dynamic")(IDS[0])[0]
    assert sqnr_db(exact, z) > sqnr_db(exact, y) > 25
    assert_near(z, y, 0.05, db=25)


def test_in_bfloat16(tmp_path):
    """Transformers rounds the scales to bfloat16, which has 8 bits: 2^-9 each, and the sums of a residual stream."""
    qmodel = converted(bert().bfloat16(), activation="dynamic")
    hf.save_compressed_tensors(qmodel, tmp_path)
    y = qmodel(IDS[0])[0].float()
    again = hf.from_compressed_tensors(transformers.AutoModelForMaskedLM, tmp_path)
    assert again.dtype == torch.bfloat16
    assert sqnr_db(y, again(IDS[0])[0].float()) > 40
    assert_near(y, transformers.BertForMaskedLM.from_pretrained(tmp_path)(IDS[0])[0].float(), 0.02, db=35)


def test_a_table_and_its_head_are_written_in_float(tmp_path):
    qmodel = converted(llama(tie_word_embeddings=True), embeddings=True, activation="dynamic")
    assert qmodel.torchq_plan.tables["model.embed_tokens"].owner == "lm_head"
    hf.save_compressed_tensors(qmodel, tmp_path)
    written = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert_identical(written, qmodel.model.embed_tokens.weight + 0)  # with the residuals, for which there is no place
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    again = hf.from_compressed_tensors(transformers.AutoModelForCausalLM, tmp_path)
    assert type(again.lm_head) is nn.Linear
    assert_near(again(IDS[0])[0], theirs(IDS[0])[0])


def test_the_model_is_left_as_it_is(tmp_path):
    qmodel = converted(bert())
    before = str(qmodel.config), qmodel.hf_quantizer
    hf.save_compressed_tensors(qmodel, tmp_path / "compressed")
    assert (str(qmodel.config), qmodel.hf_quantizer) == before
    qmodel.save_pretrained(tmp_path / "int8")
    assert_identical(transformers.BertForMaskedLM.from_pretrained(tmp_path / "int8")(IDS[0])[0], qmodel(IDS[0])[0])


def test_what_the_format_has_no_place_for(tmp_path):
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2)
    for model, more, words in (
        (llama(), {"rounding": "gptq"}, r"got a bias by bias correction\. Convert with QConfig\(rounding='nearest'\)"),
        (transformers.GPT2LMHeadModel(gpt2).eval(), {}, "was no nn.Linear, which the format has no place for"),
    ):
        with pytest.raises(ValueError, match=words):
            hf.save_compressed_tensors(converted(model, **more), tmp_path)
    plan = converted(llama()).torchq_plan
    name = next(iter(plan.int8_layers()))
    layers = {**plan.layers, name: dataclasses.replace(plan.layers[name], fine=True)}
    with pytest.raises(ValueError, match=f"'{name}' has two codes for each value of its input, which the format"):
        hf.save_compressed_tensors(apply_plan(llama(), dataclasses.replace(plan, layers=layers)), tmp_path)
    with pytest.raises(TypeError, match="qmodel must be a converted PreTrainedModel, got Linear"):
        hf.save_compressed_tensors(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="has no torchq_plan"):
        hf.save_compressed_tensors(bert(), tmp_path)


CHANGES = {
    "int4": (lambda group: group["weights"].update(num_bits=4), "weights of group_0 must be 8 bits of int"),
    "groups": (lambda group: group["weights"].update(strategy="group"), "must be symmetric, by channel or tensor"),
    "weights only": (lambda group: group.update(input_activations=None), "input_activations of group_0 must be 8 bits"),
    "float": (lambda group: group.update(format="float-quantized"), "has format 'float-quantized', and torchq reads"),
    "int8 in float's place": (
        lambda group: group.update(targets=["re:.*query"]),
        "key.weight: is torch.int8, but config.json says that the layer is in float",
    ),
    "local": (lambda group: group["input_activations"].update(dynamic="local"), "must be dynamic by token or static"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_checkpoint_of_another_kind(case, tmp_path):
    change, words = CHANGES[case]
    hf.save_compressed_tensors(converted(bert()), tmp_path)
    changed(tmp_path, change)
    with pytest.raises(ValueError, match=words):
        hf.from_compressed_tensors(transformers.AutoModelForMaskedLM, tmp_path)


def test_no_compressed_checkpoint(tmp_path):
    bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no compressed-tensors checkpoint"):
        hf.from_compressed_tensors(transformers.AutoModelForMaskedLM, tmp_path)
