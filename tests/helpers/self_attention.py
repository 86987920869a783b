"""Converted models of transformers with self-attention in a few calls, and the same with the code of transformers."""

import copy
from functools import cache

import torch

from helpers.compare import assert_identical
from torchq import QConfig, convert
from torchq.modules.layer_steps import LayerSteps
from torchq.modules.self_attention import SelfAttention

QUICK = {"observer": "minmax", "rounding": "nearest", "smoothing": "none"}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = {**SIZES, "vocab_size": 99}


def tokens(*shape, seed=0):
    return torch.randint(1, 99, shape, generator=torch.Generator().manual_seed(seed))


def bert(**more):
    import transformers

    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**TEXT, **more)).eval()


def converted(model, batches=None, **more):
    batches = [{"input_ids": tokens(8, 24, seed=seed)} for seed in range(6)] if batches is None else batches
    return convert(model, batches, config=QConfig(**QUICK, **more), progress=False)


@cache
def _int8_bert():
    return converted(bert())


def int8_bert():
    """A copy of one that is converted once."""
    return copy.deepcopy(_int8_bert())


def forms(model):
    return [module for module in model.modules() if isinstance(module, SelfAttention)]


def by_code(model):
    """A copy whose attention is the code of transformers."""
    copied = copy.deepcopy(model)
    for module in forms(copied):
        object.__setattr__(module, "__class__", module.original)
    return copied


def outputs(model, *args, **kwargs):
    with torch.inference_mode():
        return tuple(model(*args, **kwargs).to_tuple())


def assert_same(model, *args, **kwargs):
    """That the forms give the bits of the code."""
    ours, theirs = outputs(model, *args, **kwargs), outputs(by_code(model), *args, **kwargs)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, torch.Tensor):
            assert_identical(one, other)
    return ours


def class_of(source, **names):
    """A class with this forward, in a file that knows transformers' attention functions."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    scope = {"ALL_ATTENTION_FUNCTIONS": ALL_ATTENTION_FUNCTIONS, "eager": lambda *args: None, "torch": torch, **names}
    exec(f"def forward{source}", scope)
    return type("Made", (torch.nn.Module,), {"forward": scope["forward"]})


def counted(monkeypatch):
    """How many calls the forms have taken, in a list of one."""
    count, attended, run = [0], SelfAttention.attended, LayerSteps.run

    def counting(self, *call):
        count[0] += 1
        return attended(self, *call)

    def counting_steps(self, *call):
        values, done, heads = run(self, *call)
        count[0] += len(self.attentions) if done == len(self.places) else 0
        return values, done, heads

    monkeypatch.setattr(SelfAttention, "attended", counting)
    monkeypatch.setattr(LayerSteps, "run", counting_steps)
    return count
