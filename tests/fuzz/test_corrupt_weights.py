"""Corruptions of packed weights, each given to every op that takes some: the right error or the right shape.

What is right is said here once more, from the description of the header in csrc/gemm/gemm.h.
"""

import random
import struct
from collections.abc import Callable
from functools import partial

import pytest
import torch

from helpers.fuzzing import MINUTES, seeds
from torchq import _C, QuantizedLinear, kernels, ops
from torchq.numerics.qparams import QParams
from torchq.ops.convolution import Geometry, convolve

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.slow(seconds=3)]

CORRUPTIONS = 10_000 if MINUTES else 2_000
SHAPES = [(0, 16), (1, 1), (4, 16), (16, 64), (21, 10), (33, 65), (5, 0)]  # (N, K)
HEADER = struct.Struct("<IIqqII")  # magic, layout, n, k, has_bias, has_channel_scale; then zeros up to 64 bytes
MAGIC = 0x50385154


def packed_weights() -> list[torch.Tensor]:
    """In the layout of the best kernel, and of the others that run here; with a channel scale and without."""
    found = []
    for name in kernels.runnable():
        with kernels.use(name):
            for n, k in SHAPES:
                weight, scale = torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n) + 0.1
                found += [ops.pack(weight, scale), ops.pack(weight, scale, None, torch.rand(k) + 0.1)]
    return found


def layout_of(blob: bytes) -> int:
    return blob[4]


# ---- What can happen to a packed weight ----


def one_bit_of_the_header(blob: bytearray, rng: random.Random) -> None:
    blob[rng.randrange(64)] ^= 1 << rng.randrange(8)


def some_bytes_of_the_header(blob: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        blob[rng.randrange(32)] = rng.randrange(256)


def a_field(blob: bytearray, rng: random.Random) -> None:
    """N or k becomes a number that is near, negative, or as large as can be."""
    at, value = rng.choice([8, 16]), rng.choice([0, 1, 2**31, 2**32, 2**58, 2**60, 2**62, 2**63, 2**64 - 1])
    near = int.from_bytes(blob[at : at + 8], "little") + rng.randint(-17, 17)
    blob[at : at + 8] = (rng.choice([near, value, value + rng.randint(-64, 64)]) % 2**64).to_bytes(8, "little")


def anothers_header(blob: bytearray, rng: random.Random) -> None:
    n, k = rng.choice([*SHAPES, (rng.randint(0, 70), rng.randint(0, 130))])
    blob[:32] = HEADER.pack(MAGIC, rng.randint(1, 2), n, k, rng.randint(0, 1), rng.randint(0, 1))


def one_bit_of_the_panels(blob: bytearray, rng: random.Random) -> None:
    blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)


def shorter(blob: bytearray, rng: random.Random) -> None:
    del blob[rng.randrange(len(blob)) :]


def longer(blob: bytearray, rng: random.Random) -> None:
    blob += bytes(rng.randint(1, 300))


CHANGES = [one_bit_of_the_header, some_bytes_of_the_header, a_field, anothers_header, one_bit_of_the_panels]
CHANGES += [shorter, longer]


def shape_of(blob: bytearray) -> tuple[int, int, bool] | None:
    """(N, K) of what is a packed weight by its header and its length, and whether it has a channel scale."""
    if len(blob) < 64:
        return None
    magic, layout, n, k, _, scaled = HEADER.unpack(blob[:32])
    fits = 0 <= n <= len(blob) and 0 <= k <= ops.MAX_DEPTH and scaled in (0, 1)
    fits = fits and ops.packed_bytes(n, k, bool(scaled)) == len(blob)
    return (n, k, bool(scaled)) if magic == MAGIC and layout in (1, 2) and fits else None


# ---- What comes of it ----


def layer_with(packed: torch.Tensor, static: bool) -> QuantizedLinear:
    pair = QParams(0.05, 128) if static else None
    layer = QuantizedLinear(torch.ones(1, 1, dtype=torch.int8), torch.ones(1), input_qparams=pair)
    layer._buffers["packed"] = packed
    return layer


def gemm(packed: torch.Tensor, k: int):
    return ops.gemm(torch.ones(3, k, dtype=torch.int8), packed)


def calls(packed: torch.Tensor, k: int):
    """Every way to multiply floats of this width by a packed weight."""
    x = torch.ones(3, k)
    yield lambda: ops.linear_dynamic(x, packed)
    yield lambda: ops.linear_static(x, packed, 0.05, 128, torch.uint8)
    for static in (False, True):
        layer = layer_with(packed, static)
        yield lambda layer=layer: layer(x)
        yield lambda layer=layer: layer.forward(x)


def refused(message: str, *attempts: Callable[[], object]) -> None:
    for attempt in attempts:
        with pytest.raises(RuntimeError, match=message):
            attempt()


def check(blob: bytearray, k: int, readable: set[int]) -> bool:
    """Whether this was taken. k: of the weight before its change, to which the callers' inputs belong."""
    packed, shape = torch.frombuffer(bytes(blob) or b"\0", dtype=torch.uint8)[: len(blob)].clone(), shape_of(blob)
    if shape is None:
        refused(
            "packed holds no packed weights", lambda: ops.unpack(packed), lambda: gemm(packed, k), *calls(packed, k)
        )
        return False
    n, depth, scaled = shape
    weight, scale, *_ = ops.unpack(packed)
    assert (weight.shape, scale.shape) == ((n, depth), (n,))
    if scaled:
        refused("packed with a channel_scale", lambda: gemm(packed, depth))
    elif layout_of(blob) in readable:
        assert gemm(packed, depth).shape == (3, n)
    if k != depth:
        refused(f"the weight was packed for {depth} input features", *calls(packed, k))
    if n > 0 and layout_of(blob) not in readable:
        refused("the weight was packed in layout", *calls(packed, depth))
        with kernels.use("reference"):  # which reads any
            assert all(call().shape == (3, n) for call in calls(packed, depth))
    else:
        assert all(call().shape == (3, n) for call in calls(packed, depth))
    return True


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_corrupt_weights():
    whole = [packed.numpy().tobytes() for packed in packed_weights()]
    readable = {layout_of(blob) for blob in whole}
    for seed in seeds():
        rng, taken = random.Random(seed), 0
        for _ in range(CORRUPTIONS):
            blob = bytearray(rng.choice(whole))
            k = HEADER.unpack(blob[:32])[3]
            rng.choice(CHANGES)(blob, rng)
            taken += check(blob, k, readable)
        assert 0.1 * CORRUPTIONS < taken < 0.5 * CORRUPTIONS


def test_the_direct_call_refuses_it_too():
    """By itself, before the op says why."""
    layer = layer_with(ops.pack(torch.ones(4, 16, dtype=torch.int8), torch.ones(4)), static=False)
    x = torch.ones(3, 16)
    assert _C.call_linear(layer, QuantizedLinear, x) is not NotImplemented
    layer._buffers["packed"] = layer._buffers["packed"][:-1]
    assert _C.call_linear(layer, QuantizedLinear, x) is NotImplemented


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_corrupt_weights_of_convolutions():
    """The op knows the shape that its weight must have."""
    whole = [packed.numpy().tobytes() for packed in packed_weights()]
    whole = [blob for blob in whole if all(HEADER.unpack(blob[:32])[2:4])]
    readable = {layout_of(blob) for blob in whole}
    for seed in seeds():
        rng, taken = random.Random(seed), 0
        for _ in range(CORRUPTIONS // 4):
            blob = bytearray(rng.choice(whole))
            n, k = HEADER.unpack(blob[:32])[2:4]
            rng.choice(CHANGES)(blob, rng)
            packed = torch.frombuffer(bytes(blob) or b"\0", dtype=torch.uint8)[: len(blob)].clone()
            geometry, x = Geometry(k, n, (1,), (1,), ((0, 0),), (1,)), torch.ones(2, k, 3)
            plain, scaled = (ops.packed_bytes(n, k, each) for each in (False, True))
            found = shape_of(blob[: plain if len(blob) < plain + 64 else scaled])  # groups have some bytes behind it
            if found is None or found[:2] != (n, k):
                refused("packed holds no packed weights", partial(convolve, x, packed, geometry))
            elif layout_of(blob) not in readable:
                refused("the weight was packed in layout", partial(convolve, x, packed, geometry))
            else:
                taken += 1
                assert convolve(x, packed, geometry).shape == (2, n, 3)
        assert taken > 0.02 * CORRUPTIONS
