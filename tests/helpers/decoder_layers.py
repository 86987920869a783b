"""Layers of decoders as forms, and the same with the code of transformers."""

import torch

from helpers.compare import assert_identical
from helpers.decoders import decoded
from helpers.encoder_forms import by_code, forms
from helpers.numbers import normal


def inputs(model, batch=2, rows=5):
    x = normal(batch, rows, 64)
    return x, {"position_embeddings": model.model.rotary_emb(x, torch.arange(rows)[None])}


def pair(model, index=0):
    """A layer, and the same by its code."""
    return forms(model)[index], by_code(model).model.layers[index]


def dynamic(model):
    import transformers

    return transformers.DynamicCache(config=model.config)


def static(model):
    import transformers

    return transformers.StaticCache(config=model.config, max_cache_len=40)


def assert_decodes_alike(model, x, make=dynamic):
    ours, theirs = make(model), make(model)
    for one, other in zip(decoded(model, x, ours), decoded(by_code(model), x, theirs), strict=True):
        assert_identical(one, other)
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert_identical(one.keys, other.keys)
        assert_identical(one.values, other.values)
