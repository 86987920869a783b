"""nn.MultiheadAttention in all its forms, and what torch's own function gives between the int8 layers."""

import copy

import torch
from torch import nn

from helpers.numbers import normal
from torchq.numerics.metrics import sqnr_db

E, HEADS, N, L, S = 16, 4, 3, 6, 7

FORMS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "sizes of its own": {"kdim": 12, "vdim": 20},
    "sizes of its own, without bias": {"kdim": 12, "vdim": 20, "bias": False, "batch_first": True},
    "a size of its own for value": {"vdim": 20},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True, "batch_first": True},
    "bias_kv and zero": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 12},
}


def attention(**form):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, HEADS, **form).eval()
    for name, parameter in module.named_parameters():
        if "bias" in name:
            parameter.normal_()
    return module


def inputs(module, relation="cross"):
    """Query, key and value: the same tensor, key the same as value, query the same as key, or all different."""

    def one(length, width, seed):
        x = normal(N, length, width, seed=seed)
        return x if module.batch_first else x.transpose(0, 1).contiguous()

    query = one(L, E, 1)
    if relation == "self":
        return query, query, query
    if relation == "value apart":
        return query, query, one(L, module.vdim, 2)
    key = one(S, module.kdim, 3)
    return query, key, key if relation == "memory" else one(S, module.vdim, 2)


def oracle(int8, query, key, value, **call):
    """What torch's function gives between the int8 layers, and its weights.

    It gets what they give, and identity matrices for its own products, which change no bit.
    """
    q, k, v = (part(x) for part, x in zip((int8.q_proj, int8.k_proj, int8.v_proj), (query, key, value), strict=True))
    if int8.batch_first and q.dim() == 3:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    same = torch.eye(E)
    y, weights = nn.functional.multi_head_attention_forward(
        q, k, v, E, HEADS, None, None, int8.bias_k, int8.bias_v, int8.add_zero_attn, int8.dropout, same, None,
        training=int8.training, use_separate_proj_weight=True, q_proj_weight=same, k_proj_weight=same,
        v_proj_weight=same, **call,
    )  # fmt: skip
    if int8.batch_first and y.dim() == 3:
        y = y.transpose(0, 1)
    return y, weights


def assert_as_torch(int8, *xs, **call):
    """The output is that of `out_proj` on torch's heads.

    A head is off by some units of 2⁻²⁴, which can move a code of out_proj's input by one; so the outputs, too, are
    compared with a twin that has out_proj in float.
    """
    twin = copy.deepcopy(int8)
    twin.out_proj = nn.Linear(E, E, bias=False)
    twin.out_proj.weight.copy_(torch.eye(E))
    expected, expected_weights = oracle(int8, *xs, **call)
    y, weights = twin(*xs, **call)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=2e-7, equal_nan=True)
    whole = int8(*xs, **call)[0]
    known = ~expected.isnan().any()
    assert whole.shape == expected.shape
    assert not known or sqnr_db(int8.out_proj(expected), whole) > 50  # a code is 1/255 of a row's range
