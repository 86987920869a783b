"""An int8 checkpoint where it can't be read: in a process without torchq.hf, and in a float model. It never loads."""

import json

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import run_code
from helpers.compare import assert_identical
from helpers.texts import SIZES
from torchq import QConfig, convert
from torchq.modules.attention import attends
from torchq.modules.registry import find_layers
from torchq.planning import tables

transformers = pytest.importorskip("transformers", "5.17", reason="transformers 5.17 is not installed")

import torchq.hf  # noqa: E402, F401

pytestmark = pytest.mark.usefixtures("seeded", "quiet_transformers")

MORE = {"intermediate_size": 48, "pad_token_id": 0}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
SOUND = {**SIZES, **MORE, "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
SOUND |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
EXPERTS = {**SIZES, **MORE, "num_local_experts": 4}
KINDS = {  # of what becomes int8: a class, its config, the layers, and what the float model has and the file lacks
    "linear": ("BertModel", {**SIZES, **MORE}, "query", "encoder.layer.0.attention.self.query.weight"),
    "Conv1D": ("GPT2Model", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99}, "c_fc", "h.0.mlp.c_fc.weight"),
    "convolution": ("SiglipVisionModel", {**VISION, **MORE}, "patch_emb", "embeddings.patch_embedding.weight"),
    "computed": ("Wav2Vec2Model", SOUND, "pos_conv", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    "multihead": ("SiglipVisionModel", {**VISION, **MORE}, "head.attention", "head.attention.in_proj_weight"),
    "experts": ("MixtralModel", EXPERTS, "experts", "layers.0.mlp.experts.gate_up_proj"),
    "recurrent": ("Custom", {}, "rnn", "rnn.weight_ih_l0"),
    "cell": ("Custom", {}, "cell", "cell.weight_ih"),
    "bilinear": ("Custom", {}, "both", "both.weight"),
    "table": ("BertModel", {**SIZES, **MORE}, "word_embeddings", "embeddings.word_embeddings.weight"),
    "tied table": ("LlamaForCausalLM", {**SIZES, **MORE, "tie_word_embeddings": True}, "lm_head", "lm_head.weight"),
    "attention": ("BertModel", {**SIZES, **MORE}, None, None),
}  # fmt: skip

CUSTOM = """
import transformers
from torch import nn

class Custom(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.rnn, self.cell, self.both = nn.LSTM(32, 32, batch_first=True), nn.GRUCell(32, 32), nn.Bilinear(8, 8, 32)
        self.post_init()
"""


def class_of(name):
    if hasattr(transformers, name):
        return getattr(transformers, name)
    names = {"__name__": __name__}
    exec(CUSTOM, names)
    return names[name]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For each kind: the folder of a model in which nothing else is int8, that model, and the float one's class."""
    folder, found = tmp_path_factory.mktemp("kinds"), {}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(tables, "MIN_BYTES", 1)
        for kind, (name, sizes, part, _) in KINDS.items():
            torch.manual_seed(0)
            cls = class_of(name)
            model = cls(cls.config_class(**sizes)).eval()
            layers = find_layers(model)
            names = [*layers, *tables.find_tables(model, layers)]
            excluded = tuple(name for name in names if part is None or part not in name.replace("embed_tokens", part))
            attention, embeddings = "none" if part else "int8", bool(part and kind in ("table", "tied table"))
            qmodel = made(model, QConfig(exclude=excluded, attention=attention, embeddings=embeddings))
            qmodel.save_pretrained(folder / kind)
            found[kind] = folder / kind, qmodel, cls
    return found


def made(model, config):
    with pytest.warns() if config.attention == "int8" else pytest.MonkeyPatch.context():  # that no layer is in int8
        return convert(model, config=config)


IN_A_NEW_PROCESS = """
import json, sys
{custom}
for kind, (folder, name) in {kinds!r}.items():
    cls = Custom if name == "Custom" else getattr(transformers, name)
    try:
        cls.from_pretrained(folder)
        print(json.dumps([kind, "loaded"]))
    except Exception as error:
        print(json.dumps([kind, f"{{type(error).__name__}}: {{error}}"]))
assert "torchq" not in sys.modules
"""


@pytest.mark.subprocess
@pytest.mark.slow(seconds=8)
def test_without_torchq_no_kind_of_int8_module_loads(saved, tmp_path):
    """Where transformers would go on with random weights, it says why, and what to do. One tower of two, too."""
    kinds = {kind: (str(folder), KINDS[kind][0]) for kind, (folder, _, _) in saved.items()}
    towers = {"text_config": {**SIZES, **MORE}, "vision_config": {**VISION, **MORE}}
    convert(transformers.CLIPModel(transformers.CLIPConfig(**towers)).eval()).save_pretrained(tmp_path)
    kinds["second tower"] = (str(tmp_path), "CLIPVisionModel")
    code, out, err = run_code(IN_A_NEW_PROCESS.format(custom=CUSTOM, kinds=kinds))
    assert code == 0, err
    said = dict(json.loads(line) for line in out.splitlines() if line.startswith("["))
    attention = said.pop("attention")
    assert attention.startswith('ValueError: Specified `attn_implementation="torchq"` is not supported.')
    assert said.keys() == kinds.keys() - {"attention"}
    assert {each.partition(".")[0] for each in said.values()} == {
        "RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus raising an error"
    }
    assert err.count("TO LOAD THIS INT8 MODEL: import torchq.hf") == len(said)
    assert "Unknown quantization type, got torchq" in err


@pytest.mark.parametrize("kind", KINDS)
def test_with_torchq_every_kind_comes_back(kind, saved):
    """And no tensor is called missing or unexpected, of those that stop others from loading neither."""
    folder, qmodel, cls = saved[kind]
    loaded, said = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    assert loaded.torchq_plan == qmodel.torchq_plan
    assert str(loaded) == str(qmodel)
    for key, tensor in loaded.state_dict().items():
        assert_identical(tensor, qmodel.state_dict()[key], key)
    assert any(map(attends, loaded.modules())) == (kind == "attention")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "attention"])
def test_a_float_model_takes_no_tensors_of_an_int8_one(kind, saved):
    folder, qmodel, cls = saved[kind]
    model = cls(qmodel.config)
    tensors = load_file(folder / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"TO LOAD THIS INT8 MODEL: import torchq\.hf") as caught:
        model.load_state_dict(tensors)
    lost = KINDS[kind][3]
    assert lost in dict(cls(qmodel.config).named_parameters(remove_duplicate=False))
    assert f"size mismatch for {lost}: " in str(caught.value)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(tensors, strict=False)
