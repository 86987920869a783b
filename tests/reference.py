"""The arithmetic of torchq in plain torch operations: the oracle the ops are held against, bit for bit.

It shares no code with the C++ kernels or with torchq.qparams. Each float operation is its own torch call in float32,
so it rounds once. Integers are summed in float64, where every sum here is exact: |Σ| < 2^31, far below 2^53.
"""

import torch
from torch import Generator, Tensor

FLT_MIN = torch.finfo(torch.float32).tiny
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BITS = {2: torch.int16, 4: torch.int32}


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int) -> Tensor:
    """`clamp(rne(x * (1 / scale)) + zero_point, 0, 255)`, NaN gives 0. int64."""
    steps = (x.float() * (torch.ones(()) / scale)).round()
    return (steps.double() + zero_point).clamp(0, 255).nan_to_num(nan=0.0).long()


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (..., K), scale (..., 1) and zero point (..., 1) of each row of x (..., K)."""
    values = torch.cat([x.float(), torch.zeros(*x.shape[:-1], 1)], dim=-1)  # 0 is always in the range
    lo, hi = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    full = torch.tensor(255.0)
    scale = hi / full - lo / full
    scale = torch.where(scale < FLT_MIN, 1.0, scale)
    zero_point = (-lo * (torch.ones(()) / scale)).round().clamp(0, 255)
    finite = values.isfinite().all(-1, keepdim=True)
    scale, zero_point = torch.where(finite, scale, torch.nan), torch.where(finite, zero_point, 0.0).int()
    return quantize(x, scale, zero_point).to(torch.uint8), scale, zero_point


def product(a: Tensor, weight: Tensor) -> Tensor:
    """Exact `a · wᵀ` of integers, int64."""
    return (a.double() @ weight.double().T).long()


def epilogue(acc: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """`act(float(acc) * (x_scale * w_scale) + bias)`, float32; no bias is a bias of 0."""
    y = acc.float() * (x_scale * w_scale) + (torch.zeros(()) if bias is None else bias)
    return torch.where(y < 0, 0.0, y) if relu else y


def gemm(a: Tensor, weight: Tensor) -> Tensor:
    return product(a, weight).int()


def linear_dynamic(x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    codes, scale, zero_point = quantize_per_token(x)
    return epilogue(product(codes.long() - zero_point, weight), scale, w_scale, bias, relu).to(x.dtype)


def linear_static(
    x: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_qparams: tuple[float, int],
    out_dtype: torch.dtype,
    y_qparams: tuple[float, int] = (1.0, 0),
    relu: bool = False,
) -> Tensor:
    x_scale, y_scale = torch.tensor(x_qparams[0]), torch.tensor(y_qparams[0])
    codes = x if x.dtype == torch.uint8 else quantize(x, x_scale, x_qparams[1])
    y = epilogue(product(codes.long() - x_qparams[1], weight), x_scale, w_scale, bias, relu)
    return (quantize(y, y_scale, y_qparams[1]) if out_dtype == torch.uint8 else y).to(out_dtype)


def assert_identical(actual: Tensor, expected: Tensor, case: object = "") -> None:
    """The same dtype, shape and bits; NaN equals NaN of any payload, 0.0 is not -0.0."""
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


def random_int8(*shape: int, generator: Generator) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def random_float(*shape: int, generator: Generator) -> Tensor:
    """Rows of different spread and centre, as tokens have."""
    spread, centre = torch.rand(2, *shape[:-1], 1, generator=generator) * 3
    return torch.randn(shape, generator=generator) * spread + centre - 1


def random_weight(n: int, k: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """An int8 weight (n, k), its scale (n,) and bias (n,)."""
    scale = torch.rand(n, generator=generator) * 0.02 + 1e-3
    return random_int8(n, k, generator=generator), scale, torch.randn(n, generator=generator)
