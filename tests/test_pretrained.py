"""transformers: what save_pretrained writes, from_pretrained brings back bit for bit, and float models become int8."""

import copy
import json
import pickle
import re
import sys
import types
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import torchq
from helpers.commands import run_code
from helpers.compare import assert_identical
from helpers.texts import SIZES
from torchq import QConfig, convert
from torchq.modules.attention import attends
from torchq.modules.base import Int8Module
from torchq.planning import tables

transformers = pytest.importorskip("transformers", "5.17", reason="transformers 5.17 is not installed")

from torchq import hf  # noqa: E402
from torchq.hf import availability  # noqa: E402

pytestmark = pytest.mark.usefixtures("seeded", "quiet_transformers")

IDS = [torch.randint(5, 90, (8, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
MORE = {"intermediate_size": 48}
GQA = {**MORE, "num_key_value_heads": 2, "pad_token_id": 0}
STATIC = QConfig(activation="static", observer="minmax", rounding="gptq", attention="int8", embeddings=True)
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
MODELS = {
    "BertForMaskedLM": {**SIZES, **MORE},
    "LlamaForCausalLM": {**SIZES, **GQA, "tie_word_embeddings": True},
    "MixtralForCausalLM": {**SIZES, **GQA, "num_local_experts": 4},
    "GPT2LMHeadModel": GPT2,
    "T5ForConditionalGeneration": T5,
    "GemmaForCausalLM": {**SIZES, **GQA, "head_dim": 8},
    "SiglipVisionModel": {**VISION, **MORE},
}


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    monkeypatch.setattr(tables, "MIN_BYTES", 1)


def made(name, **more):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**{**MODELS[name], **more})).eval()


def bert(**more):
    return made("BertForMaskedLM", **more)


@cache
def static_bert():
    """For tests that change nothing of it."""
    return convert(bert(), [{"input_ids": IDS[0]}], config=STATIC, progress=False)


def inputs(name, ids):
    if name == "SiglipVisionModel":
        return {"pixel_values": ids.float().reshape(8, 12).repeat(1, 64).reshape(8, 3, 16, 16) / 90}
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5]} if name[0] == "T" else {"input_ids": ids}


def assert_same(loaded, qmodel, given):
    assert_identical(loaded(**given)[0], qmodel(**given)[0])
    assert str(loaded) == str(qmodel)
    assert loaded.torchq_plan == qmodel.torchq_plan
    states = loaded.state_dict(), qmodel.state_dict()
    assert list(states[0]) == list(states[1])
    for key, tensor in states[0].items():
        assert_identical(tensor, states[1][key], key)


@pytest.mark.slow(seconds=8)
@pytest.mark.parametrize(("name", "config"), [*((name, STATIC) for name in MODELS), ("BertForMaskedLM", QConfig())])
def test_a_calibrated_model_comes_back_bit_for_bit(name, config, tmp_path):
    """In shards, without a word about missing or unexpected tensors."""
    model = made(name)
    qmodel = convert(model, [inputs(name, ids) for ids in IDS], config=config, progress=False)
    qmodel.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, said = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    assert_same(loaded, qmodel, inputs(name, IDS[0]))


def test_what_is_saved_holds_no_float_weight(tmp_path):
    qmodel = static_bert()
    qmodel.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, module in qmodel.named_modules():
        if isinstance(module, Int8Module):
            mine = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
            codes = (torch.int8, torch.uint8)  # and the residuals of tables
            assert all(tensor.dim() < 2 or tensor.dtype in codes for tensor in mine.values()), name
    about = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (about["quant_method"], about["format_version"]) == ("torchq", 1)
    assert len(about["plan"]["layers"]) == len(qmodel.torchq_plan.layers)


def test_in_bfloat16(tmp_path):
    qmodel = convert(bert().bfloat16(), [{"input_ids": IDS[0]}], progress=False)
    qmodel.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert_same(loaded, qmodel, {"input_ids": IDS[1]})


def test_other_heads(tmp_path):
    """A base model out of a model with a head, the other way round, and a part that is saved alone."""
    qmodel = convert(bert(), [{"input_ids": IDS[0]}], config=QConfig(rounding="gptq"), progress=False)
    expected = qmodel.bert(IDS[1])[0]
    qmodel.save_pretrained(tmp_path / "whole")
    base = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    assert_identical(base(IDS[1])[0], expected)
    qmodel.bert.save_pretrained(tmp_path / "part")
    assert_identical(transformers.AutoModel.from_pretrained(tmp_path / "part")(IDS[1])[0], expected)
    classifier = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "part")
    assert_identical(classifier.bert(IDS[1])[0], expected)
    assert type(classifier.classifier) is nn.Linear
    other = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert_identical(other.bert(IDS[1])[0], expected)


@pytest.mark.parametrize("smoothed", [False, True])
def test_a_table_whose_head_is_left_out(tmp_path, smoothed):
    """It takes the head's tensors, and has a table of its own. To be saved without the head it lacks them."""
    model = made("LlamaForCausalLM")
    with torch.no_grad():
        model.model.norm.weight[[3, 17]] = 30  # outliers among the inputs of the head
    qmodel = convert(model, IDS if smoothed else None, config=QConfig(embeddings=True), progress=False)
    assert qmodel.model.embed_tokens.owner is qmodel.lm_head
    assert (qmodel.lm_head.channel_scale is not None) == smoothed
    qmodel.save_pretrained(tmp_path)
    base, said = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    assert base.embed_tokens.owner is None
    assert_identical(base(IDS[0])[0], qmodel.model(IDS[0])[0])
    base.save_pretrained(tmp_path / "base")
    assert_identical(transformers.AutoModel.from_pretrained(tmp_path / "base")(IDS[0])[0], base(IDS[0])[0])
    with pytest.raises(ValueError, match=r"can't be saved alone: the table 'model.embed_tokens' is the weight"):
        qmodel.model.save_pretrained(tmp_path / "part")


@pytest.mark.parametrize("name", ["BertForMaskedLM", "MixtralForCausalLM", "LlamaForCausalLM"])
def test_a_float_checkpoint_is_converted_as_it_is_loaded(name, tmp_path):
    model = made(name)
    model.save_pretrained(tmp_path)
    config = hf.TorchqConfig(attention="int8", embeddings=True)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    expected = convert(model, config=QConfig(attention="int8", embeddings=True))
    assert_same(loaded, expected, {"input_ids": IDS[0]})
    loaded.save_pretrained(tmp_path / "int8")
    assert_same(type(model).from_pretrained(tmp_path / "int8"), expected, {"input_ids": IDS[0]})


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("asked", ["eager", "sdpa"])
def test_an_attention_that_is_asked_for_by_name(asked, tmp_path):
    """It is the one that computes, with all else in int8 as saved; by default, and by its name, torchq's is."""
    qmodel, other = static_bert(), convert(bert(), [{"input_ids": IDS[0]}], config=replace(STATIC, attention="none"))
    qmodel.save_pretrained(tmp_path)
    load = transformers.AutoModelForMaskedLM.from_pretrained
    loaded = load(tmp_path, attn_implementation=asked)
    assert loaded.config._attn_implementation == asked
    assert loaded.torchq_plan.attentions == {}
    assert loaded.torchq_plan.layers == qmodel.torchq_plan.layers
    other.set_attn_implementation(asked)
    assert_identical(loaded(IDS[1])[0], other(IDS[1])[0])
    if asked == "eager":
        assert len(loaded(IDS[1], output_attentions=True).attentions) == 2
    loaded.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").config._attn_implementation == "sdpa"
    assert_same(load(tmp_path, attn_implementation="torchq"), qmodel, {"input_ids": IDS[1]})


@pytest.mark.parametrize(("asked", "used"), [("eager", "eager"), ("sdpa", "sdpa"), ("torchq", "torchq")])
def test_an_attention_that_is_asked_for_of_a_float_checkpoint(asked, used, tmp_path):
    bert().save_pretrained(tmp_path)
    more = {"quantization_config": hf.TorchqConfig(), "attn_implementation": asked}
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, **more)
    assert loaded.config._attn_implementation == used
    assert len(loaded.torchq_plan.attentions) == (2 if used == "torchq" else 0)
    expected = convert(bert(), config=QConfig(attention="auto" if used == "torchq" else "none"))
    expected.set_attn_implementation(used)
    assert_identical(loaded(IDS[0])[0], expected(IDS[0])[0])


def test_an_attention_that_is_asked_for_of_one_tower(tmp_path):
    """The config of each tower counts, and of a model that copies its config the whole one."""
    text, vision = {**SIZES, **MORE, "max_position_embeddings": 16}, {**VISION, **MORE}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    convert(clip, config=QConfig(attention="int8")).save_pretrained(tmp_path / "clip")
    loaded = transformers.CLIPModel.from_pretrained(tmp_path / "clip", attn_implementation={"text_config": "eager"})
    assert list(loaded.torchq_plan.attentions) == ["vision_model.encoder.layers.0.self_attn"]
    assert loaded.text_model.config._attn_implementation == "eager"
    sizes = {"d_model": 32, "vocab_size": 99, "max_position_embeddings": 32, "encoder_layers": 1, "decoder_layers": 1}
    bart = transformers.BartModel(transformers.BartConfig(**sizes, encoder_ffn_dim=48, decoder_ffn_dim=48)).eval()
    convert(bart, config=QConfig(attention="int8")).save_pretrained(tmp_path / "bart")
    loaded = transformers.BartModel.from_pretrained(tmp_path / "bart", attn_implementation="sdpa")
    assert loaded.torchq_plan.attentions == {}
    assert not any(map(attends, loaded.modules()))


def test_modules_to_not_convert(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path)
    config = hf.TorchqConfig(modules_to_not_convert=["cls", "attention.self.query", r"bert\.encoder\.layer\.1\.output"])
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, quantization_config=config)
    left = [name for name, row in loaded.torchq_plan.layers.items() if row.reason.startswith("excluded")]
    expected = {f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)}
    expected |= {"bert.encoder.layer.1.output.dense", "cls.predictions.transform.dense", "cls.predictions.decoder"}
    assert set(left) == expected
    config = hf.TorchqConfig(modules_to_not_convert=["lm_haed"])
    with pytest.warns(UserWarning, match="'lm_haed', which is no layer of BertForMaskedLM"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, quantization_config=config)


IN_A_NEW_PROCESS = """
import transformers
try:
    transformers.AutoModel.from_pretrained({int8!r})
    print("loaded")
except Exception:
    print("failed")
import torch, torchq
from helpers.compare import assert_identical
sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
ids = torch.arange(64).reshape(4, 16)
qmodel = torchq.convert(transformers.BertModel(transformers.BertConfig(**sizes)).eval(), [{{"input_ids": ids}}])
qmodel.save_pretrained({folder!r})
again = transformers.AutoModel.from_pretrained({folder!r})
with torch.no_grad():
    assert_identical(again(ids).last_hidden_state, qmodel(ids).last_hidden_state)
"""


@pytest.mark.subprocess
@pytest.mark.slow(seconds=4)
def test_without_torchq_it_fails_and_with_it_needs_no_other_import(tmp_path):
    """It fails, and not with random weights, as transformers would go on with an unknown quantization."""
    convert(bert(), config=QConfig(embeddings=False)).save_pretrained(tmp_path / "int8")
    code, out, err = run_code(IN_A_NEW_PROCESS.format(int8=str(tmp_path / "int8"), folder=str(tmp_path / "again")))
    assert (code, out) == (0, "failed\n"), err
    assert "Unknown quantization type, got torchq" in err


def test_a_missing_and_a_bad_tensor_are_named(tmp_path):
    qmodel = static_bert()
    qmodel.save_pretrained(tmp_path)
    path, layer = tmp_path / "model.safetensors", "bert.encoder.layer.0.output.dense"
    whole = load_file(path)
    for tensors, words in (
        ({key: t for key, t in whole.items() if key != f"{layer}.weight_scale"}, f"{layer}.weight_scale: is missing"),
        (whole | {f"{layer}.input_scale": torch.tensor(torch.nan)}, f"{layer}.input_scale: scales must be positive"),
    ):
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(ValueError, match=words):
            transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    save_file(whole | {f"{layer}.weight_int8": torch.zeros(3, 3, dtype=torch.int8)}, path, {"format": "pt"})
    with pytest.raises((RuntimeError, ValueError), match=r"mismatched|expected torch\.int8"):  # 5.17: by torchq
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_a_shard_that_is_missing_or_cut(tmp_path):
    static_bert().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SafetensorError, match="incomplete"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_a_config_of_another_kind(tmp_path):
    qmodel = convert(bert())
    qmodel.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    about = json.loads(path.read_text())
    for change, words in (
        ({"format_version": 2}, "has format 2, and this torchq reads 1. Update torchq"),
        ({"plan": None}, "has no plan of it"),
        ({"plan": {"layers": {}}}, "does not fit BertForMaskedLM: its plan is not one of this version"),
    ):
        path.write_text(json.dumps({**about, "quantization_config": {**about["quantization_config"], **change}}))
        with pytest.raises(ValueError, match=words):
            transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_a_config_of_the_first_version(tmp_path):
    qmodel = static_bert()
    qmodel.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    about = json.loads(path.read_text())
    about["quantization_config"]["guard"] = "bert.encoder.layer.0.attention.self.query.weight"
    path.write_text(json.dumps(about))
    assert_same(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path), qmodel, {"input_ids": IDS[0]})


@pytest.mark.parametrize("version", ["4.57.1", None])
def test_transformers_that_is_old_or_missing(version, monkeypatch):
    fake = None if version is None else types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    with pytest.raises(ImportError, match=r"torchq.hf needs transformers"):
        availability.check()


def test_bad_options():
    with pytest.raises(ValueError, match="attention must be one of"):
        hf.TorchqConfig(attention="fast")
    for names in ("lm_head", 3, True, [1], {"lm_head": 1}):
        said = f"modules_to_not_convert must be a list of names of modules, got {re.escape(repr(names))}"
        with pytest.raises(ValueError, match=said):
            hf.TorchqConfig(modules_to_not_convert=names)
    with pytest.raises(ValueError, match="run on the CPU, but device_map says 'cuda'"):
        hf.TorchqHfQuantizer(hf.TorchqConfig()).validate_environment(device_map="cuda")


def test_the_float_model_is_left_alone(tmp_path):
    model = bert()
    before = str(model.config)
    qmodel = convert(model)
    qmodel.save_pretrained(tmp_path / "int8")
    assert str(model.config) == before
    assert getattr(model, "hf_quantizer", None) is None
    model.save_pretrained(tmp_path / "float")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "float")
    assert_identical(again(IDS[0])[0], model(IDS[0])[0])


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copy_can_be_saved(way, tmp_path):
    qmodel = static_bert()
    way(qmodel).save_pretrained(tmp_path)
    assert_same(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path), qmodel, {"input_ids": IDS[0]})


def test_torchq_save_takes_a_loaded_model(tmp_path):
    qmodel = static_bert()
    qmodel.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    torchq.save(loaded, tmp_path / "m")
    assert_same(torchq.load(tmp_path / "m", bert()), qmodel, {"input_ids": IDS[0]})


def test_other_libraries_are_told_of_torchq_save():
    class Mixin(nn.Sequential):
        hf_quantizer = None

        def save_pretrained(self):
            return self.hf_quantizer.quantization_config

    qmodel = convert(Mixin(nn.Linear(32, 32)))
    assert not qmodel.hf_quantizer.is_serializable()
    with pytest.raises(RuntimeError, match=r"Save the converted model by torchq\.save"):
        qmodel.save_pretrained()


@pytest.mark.parametrize("hook", ["update_attn_implementation", "update_tp_plan"])
def test_whichever_hook_transformers_has_notes_the_attention_asked_for(hook):
    """The first is that of 5.18 and later, the second that of 5.17."""
    quantizer = transformers.quantizers.AutoHfQuantizer.from_config(hf.TorchqConfig())
    config = transformers.BertConfig(**SIZES, attn_implementation="eager")
    assert getattr(quantizer, hook)(config) is config
    assert quantizer._asked == ["eager"]
