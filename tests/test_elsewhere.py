"""The ops on other devices than the CPU: they refuse, but for those that read a packed weight."""

import re

import pytest
import torch

from helpers.compare import assert_identical
from helpers.numbers import normal, random_weight
from torchq import ops
from torchq.ops import elsewhere

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def test_every_op_has_a_kernel_for_other_devices():
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("torchq::")}
    names = {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"torchq::{name}", "CPU")}
    assert names == {*elsewhere.READING, *elsewhere.COMPUTING}
    for name in names:
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"torchq::{name}", "CUDA"), name


@pytest.mark.parametrize("name", elsewhere.COMPUTING)
def test_what_computes_names_itself_and_the_devices(name):
    kernel = elsewhere._refusal(name)
    with pytest.raises(RuntimeError) as caught:
        kernel(torch.ones(2, device="meta"), [torch.ones(2), torch.ones(2).to_sparse()], other=1)
    assert str(caught.value) == (
        f"torchq::{name}: int8 runs on the CPU, with dense tensors; got some on meta and on cpu and on "
        "cpu (torch.sparse_coo). Move the model and its input there: model.cpu(), x.cpu()."
    )


def test_it_is_what_another_device_runs(generator):
    """Without such a device, the dispatcher can still be asked for the kernel that it has for it."""
    weight, scale, bias = random_weight(5, 7, generator)
    packed = ops.pack(weight, scale, bias)
    assert_identical(torch.ops.torchq.pack.default.redispatch(CUDA, weight, scale, bias), packed)
    unpack = torch.ops.torchq.unpack.default
    for got, expected in zip(unpack.redispatch(CUDA, packed, 7), unpack(packed, 7), strict=True):
        assert_identical(got, expected)
    with pytest.raises(RuntimeError, match=re.escape("torchq::linear_dynamic: int8 runs on the CPU")):
        torch.ops.torchq.linear_dynamic.default.redispatch(CUDA, normal(2, 7), packed)


def test_a_sparse_weight_is_refused():
    with pytest.raises(
        RuntimeError, match=re.escape("torchq::pack: int8 runs on the CPU, with dense tensors; got some on")
    ):
        ops.pack(torch.ones(3, 4, dtype=torch.int8).to_sparse(), torch.ones(3))


def test_sparse_input_is_refused():
    weight = torch.ones(3, 4, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=re.escape("got some on cpu (torch.sparse_coo) and on cpu. Move")):
        ops.linear_dynamic(torch.ones(2, 4).to_sparse(), ops.pack(weight, torch.ones(3)))
