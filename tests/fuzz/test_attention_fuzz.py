"""torchq.ops.attention on any tensors: float32 against the formula in float64, int8 against its definition.

Shapes, groups of heads, strides, masks, bands, dtypes, kernels and threads are drawn.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers.attention import assert_exact_to_rounding
from helpers.compare import assert_identical
from helpers.fuzzing import fuzz
from torchq import kernels
from torchq.numerics.attention import simulated_int8
from torchq.ops import ATTENTION_SCHEMES, attention

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.slow(seconds=5)]

LAYOUTS = {
    "contiguous": Tensor.contiguous,
    "heads inside rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "with gaps": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every other row": lambda x: torch.stack([x, x], 3).flatten(2, 3)[:, :, ::2],
}
MASKS = ["none", "bool", "float", "keys", "rows", "one head"]


@dataclass
class Case:
    """A call. Its tensors come of `seed`, so that a small case is one of small numbers."""

    kernel: str
    batch: int
    kv_heads: int
    group: int
    rows: int
    keys: int
    depth: int
    columns: int
    dtype: torch.dtype
    layout: str
    mask: str
    is_causal: bool
    offset: int
    window: int | None
    scale: float | None
    threads: int
    seed: int

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        g, heads = torch.Generator().manual_seed(self.seed), self.kv_heads * self.group
        shapes = [
            (self.batch, heads, self.rows, self.depth),
            (self.batch, self.kv_heads, self.keys, self.depth),
            (self.batch, self.kv_heads, self.keys, self.columns),
        ]
        q, k, v = (LAYOUTS[self.layout](torch.randn(shape, generator=g).to(self.dtype)) for shape in shapes)
        return q, k, v

    def options(self) -> dict[str, object]:
        g, heads = torch.Generator().manual_seed(self.seed + 1), self.kv_heads * self.group
        sizes = {
            "keys": (self.keys,),
            "rows": (self.rows, 1),
            "one head": (self.batch, 1, self.rows, self.keys),
        }.get(self.mask, (self.batch, heads, self.rows, self.keys))
        mask = None
        if self.mask == "float":
            mask = torch.randn(sizes, generator=g).to(self.dtype)
        elif self.mask != "none":
            mask = torch.rand(sizes, generator=g) < 0.8
        own = {"is_causal": self.is_causal, "offset": self.offset, "window": self.window, "scale": self.scale}
        return {"mask": mask, **own}


sizes = st.one_of(st.integers(1, 8), st.integers(1, 70), st.sampled_from([16, 32, 64, 128, 130]))
cases = st.builds(
    Case,
    kernel=st.sampled_from(kernels.runnable()),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 1, 2, 3]),
    rows=sizes,
    keys=sizes,
    depth=sizes,
    columns=sizes,
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    mask=st.sampled_from(MASKS),
    is_causal=st.booleans(),
    offset=st.integers(-3, 9),
    window=st.one_of(st.none(), st.integers(1, 20)),
    scale=st.one_of(st.none(), st.sampled_from([0.0625, 0.25, 1.0])),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)


def test_float32(set_threads):
    def check(case: Case) -> None:
        set_threads(case.threads)
        (q, k, v), options = case.operands(), case.options()
        with kernels.use(case.kernel):
            y = attention(q, k, v, **options)
        assert_exact_to_rounding(y, q, k, v, **options)

    fuzz(check, cases, examples=150)


def test_int8_is_its_definition_on_every_kernel(set_threads):
    def check(case: Case) -> None:
        set_threads(case.threads)
        (q, k, v), options = case.operands(), case.options()
        if case.rows * case.group <= 4:  # few rows are computed in float32
            return
        expected = simulated_int8(q.float(), k.float(), v.float(), **options)
        for name in ("reference", case.kernel):
            with kernels.use(name):
                assert_identical(attention(q, k, v, scheme="int8", **options), expected.to(case.dtype), name)

    fuzz(check, cases, examples=100)


def test_no_scheme_hides_what_it_cannot_compute(set_threads):
    """A NaN in a value reaches every row of the heads that read it, and no other, in all schemes."""

    def check(case: Case) -> None:
        set_threads(case.threads)
        q, k, v = case.operands()
        v[0, 0, -1, -1] = torch.nan
        for scheme in ATTENTION_SCHEMES:
            with kernels.use(case.kernel):
                y = attention(q, k, v, scheme=scheme, scale=case.scale)
            assert y[0, : case.group, :, -1].isnan().all(), scheme
            assert not y[0, case.group :].isnan().any(), scheme

    fuzz(check, cases, examples=60)
