"""What is done with int8 models of Hugging Face: generate, pipelines, LoRA by PEFT, sentence-transformers."""

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.texts import SIZES, texts, tokenizer
from torchq import QConfig, QuantizedLinear, convert, sqnr_db

transformers = pytest.importorskip("transformers", "5.17", reason="transformers 5.17 is not installed")

from torchq import hf  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("seeded", "quiet_transformers"),
    pytest.mark.slow(seconds=5),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # PEFT asks transformers for it
]

IDS = [torch.randint(5, 90, (8, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
STATIC = QConfig(activation="static", observer="minmax", attention="int8")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with an int8 decoder and its tokenizer; and the model that was saved there. Tests change neither."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    more = {"num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, intermediate_size=48, **more)).eval()
    qmodel = convert(model, [{"input_ids": ids} for ids in IDS], config=STATIC, progress=False)
    qmodel.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path, qmodel


def test_generate(llama):
    path, qmodel = llama
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path)
    for more in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}):
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, **more}
        tokens = loaded.generate(IDS[0][:2], **settings)
        assert tokens.shape == (2, 18)
        assert torch.equal(tokens, qmodel.generate(IDS[0][:2], **settings))


def test_pipelines(llama, tmp_path):
    path, qmodel = llama
    write = transformers.pipeline("text-generation", model=str(path), device="cpu")
    assert any(isinstance(module, QuantizedLinear) for module in write.model.modules())
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    said = write("w1 w2 w3", return_tensors=True, **settings)[0]["generated_token_ids"]
    expected = qmodel.generate(tokenizer()("w1 w2 w3", return_tensors="pt").input_ids, **settings)
    assert torch.as_tensor(said).tolist() == expected[0].tolist()
    config = transformers.BertConfig(**SIZES, intermediate_size=48, num_labels=3)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "float")
    kwargs = {"quantization_config": hf.TorchqConfig()}
    path = str(tmp_path / "float")
    judge = transformers.pipeline("text-classification", path, tokenizer=tokenizer(), device="cpu", model_kwargs=kwargs)
    given = tokenizer()("w1 w2 w3", return_tensors="pt")
    label = convert(model)(**given).logits[0].softmax(dim=0)
    assert judge("w1 w2 w3")[0]["score"] == pytest.approx(float(label.max()), rel=1e-6)


# ---- PEFT -----------------------------------------------------------------------------------------------------------


def trained(model, steps=12):
    """Trains what of the model can be trained to predict the tokens it is given, and returns the losses."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.Adam(parameters, lr=5e-2), []
    model.train()
    with torch.enable_grad():
        for _ in range(steps):
            loss = model(input_ids=IDS[0], labels=IDS[0]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="PEFT is not installed")


def test_lora_trains_beside_int8_layers_and_is_saved(llama, peft, tmp_path):
    path, _ = llama
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    base = transformers.AutoModelForCausalLM.from_pretrained(path)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, hf.int8_lora(config))
    losses = trained(model)
    assert losses[-1] < losses[0] - 0.1
    after = {key.replace("base_layer.", ""): tensor for key, tensor in base.state_dict().items() if "lora" not in key}
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        assert_identical(tensor, before[key], key)
    model.save_pretrained(tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(path)
    config = hf.int8_lora(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter", config=config).eval()
    assert_identical(loaded(IDS[1]).logits, model(IDS[1]).logits)
    with loaded.disable_adapter():
        expected = transformers.AutoModelForCausalLM.from_pretrained(path)(IDS[1]).logits
        assert_identical(loaded(IDS[1]).logits, expected)


def with_lora(peft, model, target, **more):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[target], init_lora_weights=False, **more)
    return peft.get_peft_model(model, hf.int8_lora(config))


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_lora_is_what_its_formula_says(kind, peft):
    layer = nn.Linear(32, 24) if kind == "Linear" else transformers.pytorch_utils.Conv1D(24, 32)
    layer = convert(nn.Sequential(layer))[0]
    model = with_lora(peft, nn.Sequential(layer), "0", fan_in_fan_out=kind == "Conv1D")
    x = torch.randn(5, 32)
    a, b = (model.base_model.model[0].get_submodule(f"lora_{part}").default.weight for part in "AB")
    torch.testing.assert_close(model(x), layer(x) + 8 / 4 * (x @ a.T @ b.T))
    assert_identical(model.unload()(x), layer(x))


def test_an_adapter_of_an_int8_table(peft):
    table = convert(nn.Sequential(nn.Embedding(5000, 32)), config=QConfig(embeddings=True))[0]
    model = with_lora(peft, nn.Sequential(table), "0")
    ids = torch.arange(7)
    part = model.base_model.model[0]
    a, b = part.lora_embedding_A.default, part.lora_embedding_B.default
    torch.testing.assert_close(model(ids), table(ids) + 8 / 4 * (a.T[ids] @ b.T))
    with pytest.raises(RuntimeError, match="the weight of an int8 layer can't be written"):
        model.merge_and_unload()


def test_dora_scales_by_the_weight_that_the_layer_has(peft):
    """Against PEFT's own on a float layer of that weight: what int8 rounds, and no more."""
    layer, exact = convert(nn.Sequential(nn.Linear(64, 48)))[0], nn.Linear(64, 48)
    exact.load_state_dict({"weight": layer.weight + 0, "bias": layer.bias + 0})
    torch.manual_seed(1)
    model = with_lora(peft, nn.Sequential(layer), "0", use_dora=True)
    other = peft.get_peft_model(nn.Sequential(exact), model.peft_config["default"])
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" in k}, strict=False)
    for each in (model, other):
        each.base_model.model[0].lora_magnitude_vector.default.weight.data.mul_(1.5)
    x = torch.randn(9, 64)
    assert sqnr_db(other(x), model(x)) > 40


def test_what_peft_can_not_do_is_an_error(peft):
    """And never an adapter that is not there, or a part that is trained in vain."""
    image = convert(nn.Sequential(nn.Conv2d(8, 16, 3)))
    with pytest.raises(ValueError, match=r"Target module QuantizedConv2d.* is not supported"):
        with_lora(peft, image, "0")
    model = convert(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    with pytest.raises(ValueError, match=r"Target module QuantizedLinear.* is not supported"):
        peft.get_peft_model(nn.Sequential(*model), peft.LoraConfig(target_modules=["0"]))
    for more in ({"modules_to_save": ["1"]}, {"bias": "lora_only"}, {"bias": "all"}):
        with pytest.raises(RuntimeError, match="the weight of an int8 layer gets no gradient"):
            with_lora(peft, nn.Sequential(*model), "0", **more)
    with pytest.raises(TypeError, match=r"int8_lora: config must be a peft\.LoraConfig, got IA3Config"):
        hf.int8_lora(peft.IA3Config(target_modules=["0"]))


def test_an_adapter_can_not_be_merged(llama, peft):
    config = hf.int8_lora(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(llama[0]), config)
    with pytest.raises(RuntimeError, match=r"an adapter can't be merged into an int8 weight\. Keep it beside"):
        model.merge_and_unload()


def test_adapters_of_transformers(llama, peft, tmp_path, monkeypatch):
    """`add_adapter`, which saves the adapter alone, and `load_adapter`.

    transformers 5.24 asks for a PEFT that is not out yet, and refuses to try others. This one can do it.
    """
    path, qmodel = llama
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", peft.__version__)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    model.add_adapter(hf.int8_lora(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)))
    y = model(IDS[0]).logits
    assert sqnr_db(qmodel(IDS[0]).logits, y) < 60
    model.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    again = transformers.AutoModelForCausalLM.from_pretrained(path)
    config = hf.int8_lora(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again.load_adapter(str(tmp_path / "adapter"), peft_config=config)
    assert_identical(again(IDS[0]).logits, y)
    model.disable_adapters()
    assert_identical(model(IDS[0]).logits, qmodel(IDS[0]).logits)


# ---- sentence-transformers ------------------------------------------------------------------------------------------


@pytest.fixture
def sentences(tmp_path):
    """A SentenceTransformer in float, saved in a folder, and the library."""
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    config = transformers.BertConfig(**SIZES, intermediate_size=48)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    parts = [Transformer(str(tmp_path / "bert")), Pooling(32)]
    library.SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "float"))
    return library, tmp_path / "float"


def embedded(model, batch, **more):
    return torch.as_tensor(model.encode(batch, convert_to_tensor=True, show_progress_bar=False, **more)).clone()


def of(sentences, path=None, **more):
    return sentences[0].SentenceTransformer(str(path or sentences[1]), device="cpu", **more)


def test_sentences_are_converted_as_the_model_is_loaded_and_saved(sentences, tmp_path):
    exact = embedded(of(sentences), texts(20))
    model = of(sentences, model_kwargs={"quantization_config": hf.TorchqConfig()})
    y = embedded(model, texts(20))
    assert 30 < sqnr_db(exact, y) < 80
    model.save(str(tmp_path / "int8"))
    assert_identical(embedded(of(sentences, tmp_path / "int8"), texts(20)), y)


def test_sentences_are_calibrated_on_texts_and_saved(sentences, tmp_path):
    model = of(sentences)
    exact = embedded(model, texts(20))
    config = QConfig(activation="static", observer="minmax", rounding="gptq")
    qmodel = hf.convert_sentence_transformer(model, texts(100, seed=1), config=config, progress=False)
    assert_identical(embedded(model, texts(20)), exact)
    y = embedded(qmodel, texts(20))
    assert 30 < sqnr_db(exact, y) < 80
    plan = qmodel.torchq_plan
    assert {row.kind for row in plan.layers.values()} == {"int8 static"}
    assert plan.checked is not None
    qmodel.save(str(tmp_path / "int8"))
    assert_identical(embedded(of(sentences, tmp_path / "int8"), texts(20)), y)


def test_padding_of_texts_is_no_data(sentences):
    """Words beside long texts are calibrated as they are alone: the ranges are those of the words."""
    config = QConfig(activation="static", observer="minmax", smoothing="none", rounding="nearest", attention="none")
    words, ranges = texts(64), []
    for size in (1, 64):
        qmodel = hf.convert_sentence_transformer(of(sentences), words, config=config, batch_size=size, progress=False)
        ranges.append([row.input_qparams.scale for row in qmodel.torchq_plan.layers.values()])
    torch.testing.assert_close(torch.tensor(ranges[0]), torch.tensor(ranges[1]), rtol=1e-5, atol=0)


def test_what_is_no_list_of_texts(sentences):
    model = of(sentences)
    with pytest.raises(TypeError, match=r"model must be a SentenceTransformer, got Linear"):
        hf.convert_sentence_transformer(nn.Linear(2, 2), ["a"])
    for bad, words in (("a text", "'a text'"), (None, "None"), ([["a", "b"]], "one with"), ([3], "one with 3")):
        with pytest.raises(TypeError, match=f"texts must be a list of strings, got {words}"):
            hf.convert_sentence_transformer(model, bad)
    with pytest.raises(ValueError, match="there must be texts, in batches of at least 1; got 0 by 32"):
        hf.convert_sentence_transformer(model, (text for text in ()))


@pytest.mark.subprocess
@pytest.mark.slow(seconds=30)
def test_a_pool_of_processes(sentences, tmp_path):
    of(sentences, model_kwargs={"quantization_config": hf.TorchqConfig()}).save(str(tmp_path / "int8"))
    model = of(sentences, tmp_path / "int8")
    batch = texts(20)
    pool = model.start_multi_process_pool(["cpu"])
    try:
        assert_identical(embedded(model, batch, pool=pool, chunk_size=20), embedded(model, batch))
    finally:
        model.stop_multi_process_pool(pool)


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_offloading_int8_layers_is_refused(offload, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    x = torch.randn(4, 24)
    qmodel = convert(nn.Sequential(nn.Linear(24, 40), nn.ReLU()))
    expected, where = qmodel(x), {"offload_dir": tmp_path} if offload == "disk_offload" else {}
    with pytest.raises(TypeError, match=r"offloaded to the CPU or a disk.*torchq\.load maps"):
        getattr(accelerate, offload)(qmodel, execution_device=torch.device("cpu"), **where)
    assert_identical(qmodel(x), expected)
    assert_identical(accelerate.dispatch_model(qmodel, {"": "cpu"})(x), expected)
