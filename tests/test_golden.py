"""Recorded hashes of the results of every op: a change that should not change results must not change these.

Inputs are made by integer arithmetic, so that they are the same on every CPU and with every version of torch. The
expected hashes are in golden.json, and every kernel must give them. After a change that is meant to change results, run
`python tests/test_golden.py` to record them again.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchq import kernels, ops
from torchq.ops import convolution
from torchq.ops.convolution import Geometry

HASHES = Path(__file__).with_name("golden.json")

# M x N x K around all tile sizes: 6, 8, 16 and 32 rows; 8, 16, 32, 48 and 64 columns; groups of 4, 8 and 64 k.
SHAPES = [
    *((1, n, 20) for n in (1, 15, 16, 17, 33, 48, 63, 64, 65, 129)),
    *((m, 17, 65) for m in (2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 18, 19)),
    *((m, 49, 64) for m in (31, 32, 33, 39, 40, 63, 65, 130)),
    *((7, 32, k) for k in (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 127, 129, 255, 257)),
    (34, 96, 769),  # where amx_int8 cuts the depth
    (9, 40, 4099),
    (1, 2200, 1030),  # weights larger than L2 of the CPUs with AMX: 2.2 MB
    (13, 2200, 1030),
]
X_QPARAMS, Y_QPARAMS = (0.3, 117), (0.7, 131)


@functools.cache  # all ops and kernels get the same tensors; nothing writes to them
def integers(count: int, seed: int) -> Tensor:
    """`count` numbers in [0, 2^16), int64: a linear congruential generator, read at bits 16 to 31."""
    state = (torch.arange(count, dtype=torch.int64) + 1 + 7919 * seed) * 2654435761 % 2**32
    return (state * 1664525 + 1013904223) % 2**32 // 2**16


@functools.cache
def int8(*shape: int, seed: int) -> Tensor:
    return (integers(torch.Size(shape).numel(), seed) % 256 - 128).to(torch.int8).reshape(shape)


@functools.cache
def floats(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of different spread and mean. Every fourth has only positive values, and the last is zero."""
    values = (integers(m * k, 3) % 4096).float().reshape(m, k) / 64 - 31
    row = torch.arange(m).unsqueeze(1)
    values = values * (1 + row % 3) + row % 5
    values = torch.where(row % 4 == 3, values.abs(), values)
    values[m - 1 :] *= 0 if m > 1 else 1
    return values.to(dtype)


@functools.cache
def packed_for(kernel: str, n: int, k: int) -> Tensor:
    """A packed weight in the layout of the active kernel, which must be `kernel`."""
    scale = (1 + integers(n, 1) % 13).float() / 1024
    bias = (integers(n, 2) % 29 - 14).float() / 8
    return ops.pack(int8(n, k, seed=0), scale, bias)


def packed(n: int, k: int) -> Tensor:
    return packed_for(kernels.active(), n, k)


FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
Case = Callable[[int, int, Tensor], tuple[Tensor, ...]]


def cases() -> dict[str, Case]:
    """The computations, by name: `case(m, k, packed)`."""
    found: dict[str, Case] = {"gemm": lambda m, k, w: (ops.gemm(int8(m, k, seed=4), w),)}
    for name, dtype in FLOATS.items():
        found[f"quantize {name}"] = lambda m, k, w, t=dtype: ops.quantize_per_token(floats(m, k, t))
        found[f"dynamic {name}"] = lambda m, k, w, t=dtype: (ops.linear_dynamic(floats(m, k, t), w),)
        found[f"static {name}"] = lambda m, k, w, t=dtype: (ops.linear_static(floats(m, k, t), w, *X_QPARAMS, t),)
        found[f"static u8 to {name}"] = lambda m, k, w, t=dtype: (ops.linear_static(codes(m, k), w, *X_QPARAMS, t),)
    for activation in ops.Activation:
        name = activation.name.lower()
        found[f"dynamic f32 {name}"] = lambda m, k, w, a=activation: (
            ops.linear_dynamic(floats(m, k, torch.float32), w, a),
        )
        found[f"static f32 to u8 {name}"] = lambda m, k, w, a=activation: (
            ops.linear_static(floats(m, k, torch.float32), w, *X_QPARAMS, torch.uint8, *Y_QPARAMS, a),
        )
    found["static u8 to u8"] = lambda m, k, w: (ops.linear_static(codes(m, k), w, *X_QPARAMS, torch.uint8, *Y_QPARAMS),)
    for cell in ops.Cell:
        found[f"recurrent {cell.name.lower()}"] = lambda m, k, w, c=cell: steps(
            c, min(m, 9), min(ops.out_features(w, k), 65)
        )
    found["convolution"] = lambda m, k, w: convolutions(min(m, 9), max(1, min(k, 70)), min(ops.out_features(w, k), 65))
    return found


def convolutions(size: int, channels: int, outputs: int) -> tuple[Tensor, ...]:
    """Dense and depthwise, of floats and of codes, with a residual."""
    images = floats(2 * size * 7, channels, torch.float32).reshape(2, size, 7, channels)
    results = []
    for n, groups in ((outputs, 1), (channels, channels)):
        weight = int8(n, channels // groups, 3, 3, seed=0)
        scale, bias = (1 + integers(n, 1) % 13).float() / 1024, (integers(n, 2) % 29 - 14).float() / 8
        geometry = Geometry(channels, n, (3, 3), (1, 2), ((1, 1), (2, 0)), (1, 1), groups)
        weights = convolution.pack(weight, scale, bias, groups=groups)
        given = codes(2 * size * 7, channels).reshape(images.shape)
        last, first = images.movedim(-1, 1), images.movedim(-1, 1).contiguous()
        results += [
            convolution.convolve(first, weights, geometry, activation=ops.Activation.SILU),
            convolution.convolve(given, weights, geometry, x_qparams=X_QPARAMS, y_qparams=Y_QPARAMS),
        ]
        residual = results[-2].bfloat16()
        results.append(convolution.convolve(last.bfloat16(), weights, geometry, residual=residual))
    return tuple(results)


def steps(cell: ops.Cell, batch: int, hidden: int) -> tuple[Tensor, ...]:
    """Three steps of a layer."""
    gates = floats(3 * batch, cell.gates * hidden, torch.float32) / 16
    state = torch.zeros(1, batch, hidden)
    c0 = state if cell == ops.Cell.LSTM else None
    return ops.recurrent(cell, [gates], [packed(cell.gates * hidden, hidden)], state, c0)


@functools.cache
def codes(m: int, k: int) -> Tensor:
    return (integers(m * k, 5) % 256).to(torch.uint8).reshape(m, k)


def digest(results: tuple[Tensor, ...]) -> str:
    """The first 16 hex digits of the SHA-256 of dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for result in results:
        found.update(f"{result.dtype} {tuple(result.shape)};".encode())
        found.update(result.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def digests(case: Case) -> Iterator[tuple[str, str]]:
    """For each shape, its name and the hash of the case's result."""
    for m, n, k in SHAPES:
        yield f"{m}x{n}x{k}", digest(case(m, k, packed(n, k)))


@pytest.mark.parametrize("name", cases())
def test_no_bit_has_changed(kernel, name):
    expected = json.loads(HASHES.read_text())[name]
    found = dict(digests(cases()[name]))
    assert found.keys() == expected.keys()
    changed = [shape for shape in found if found[shape] != expected[shape]]
    assert changed == [], f"{name} under {kernel}: other bits than recorded"


def test_a_changed_bit_changes_the_hash():
    y = ops.gemm(int8(3, 8, seed=4), packed(5, 8))
    before = digest((y,))
    y[2, 4] ^= 1
    assert digest((y,)) != before


if __name__ == "__main__":
    with kernels.use("reference"):
        HASHES.write_text(json.dumps({name: dict(digests(case)) for name, case in cases().items()}, indent=1) + "\n")
