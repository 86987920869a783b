"""Layers of transformers' encoders as forms, and the same with the code of transformers."""

import copy

import pytest
import torch

from helpers.compare import assert_identical
from helpers.self_attention import SIZES, TEXT, bert, outputs
from torchq.modules.layer_form import LayerForm

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def of(config, model, **more):
    torch.manual_seed(0)
    return model(config(**more)).eval()


def distilbert():
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": 99}
    return of(transformers.DistilBertConfig, transformers.DistilBertModel, **sizes)


def of_pictures(config, model):
    return lambda: of(config, model, **SIZES, image_size=32, patch_size=8)


TEXTS = {
    "bert": bert,
    "roberta": lambda: of(transformers.RobertaConfig, transformers.RobertaModel, **TEXT),
    "electra": lambda: of(transformers.ElectraConfig, transformers.ElectraModel, **TEXT),
    "distilbert": distilbert,
}
PICTURES = {
    "vit": of_pictures(transformers.ViTConfig, transformers.ViTModel),
    "clip": of_pictures(transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
    "deit": of_pictures(transformers.DeiTConfig, transformers.DeiTModel),
}


def forms(model):
    return [module for module in model.modules() if isinstance(module, LayerForm)]


def layers(model):
    """The forms that are in no other one."""
    within = {id(each) for form in forms(model) for each in form.modules() if each is not form}
    return [form for form in forms(model) if id(form) not in within]


def by_code(model):
    """A copy whose layers are the code of transformers."""
    copied = copy.deepcopy(model)
    for module in forms(copied):
        object.__setattr__(module, "__class__", module.original)
    return copied


def assert_same(model, *args, **kwargs):
    ours, theirs = outputs(model, *args, **kwargs), outputs(by_code(model), *args, **kwargs)
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, torch.Tensor):
            assert_identical(one, other)
        else:
            assert all(map(torch.equal, one, other))
    return ours


def padded(batch, rows):
    mask = torch.ones(batch, rows, dtype=torch.long)
    mask[0, rows // 2 :] = 0
    return mask
