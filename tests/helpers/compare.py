"""Comparisons: bit for bit, of everything in a model that a user could see change, or by SQNR."""

import torch
from torch import Tensor

from helpers.models import X
from torchq import kernels, ops, quantize
from torchq.numerics.metrics import sqnr_db

BITS = {2: torch.int16, 4: torch.int32}


def assert_identical(actual: Tensor, expected: Tensor, case: object = "") -> None:
    """Dtype, shape and bits are the same. Any NaN equals any other, and 0.0 differs from -0.0."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), (
        f"{case}: {actual.dtype} {tuple(actual.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    )
    got, want = bits(actual), bits(expected)
    if not torch.equal(got, want):
        where = tuple((got != want).nonzero()[0].tolist())
        raise AssertionError(
            f"{case}: {int((got != want).sum())} of {got.numel()} differ, first at {where}: "
            f"{actual[where]!r}, expected {expected[where]!r}"
        )


def bits(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t
    return torch.where(t.isnan(), torch.full_like(t, torch.nan), t).view(BITS[t.element_size()])


def snapshot(model):
    """Everything in a model that a user could see change, bit for bit."""

    def content(tensor):
        if tensor.is_meta:
            return tensor.shape
        return tensor.dtype, tensor.shape, tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()

    modules = [
        (name, id(m), type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
        for name, m in model.named_modules(remove_duplicate=False)
    ]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    modes = torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(), kernels.active()
    return modules, [(name, id(tensor), content(tensor)) for name, tensor in tensors], modes


def assert_close_to_float(model, qmodel, *args, db=25, rows=..., **kwargs):
    """25 dB is an error of 5.6 %. Int8 has 30 to 45 dB here, and a bug gives far less."""
    args = args or (X,)
    expected, actual = model(*args, **kwargs), qmodel(*args, **kwargs)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert sqnr_db(expected[rows], actual[rows]) > db


def bound(layer, x):
    """The largest difference of the integer and the simulated path, per element of y, before y is rounded to its dtype.

    u = 2^-24, S = Σ|x_q||w_q| of the dequantized values, as each float operation is off by at most a factor 1 ± u:
    integers: float(acc), s_x·s_w, their product: 3u·S.  simulated: dequantizing x and w, K products, K - 1 sums in
    any order, (K + 2)u·S.  Adding the bias, on both sides: 2u·(S + |b|).  One more u·S for the terms in u².
    """
    k = layer.in_features
    rows = x.float().reshape(-1, k)
    if layer.input_qparams is None:
        codes, scale, zero_point = ops.quantize_per_token(rows)
        rows = (codes.double() - zero_point) * scale
    else:
        scale, zero_point = layer.input_qparams
        rows = (quantize(rows, scale, zero_point, dtype=torch.uint8).double() - zero_point) * scale
    total = rows.abs() @ (layer.weight_int8.double() * layer.weight_scale[:, None]).abs().T
    return 2.0**-24 * ((k + 8) * total + 2 * layer.bias.double().abs())
