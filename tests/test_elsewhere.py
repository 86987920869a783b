"""The ops on other devices than the CPU: they refuse, but for those that read a packed weight."""

import re

import pytest
import torch
from torch.utils._pytree import tree_map_only

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


VALUES = {
    "Tensor": lambda: torch.ones(2, 2),
    "List[Tensor]": lambda: [torch.ones(2, 2)],
    "List[int]": lambda: [1] * 9,
    "List[float]": list,
    "int": lambda: 1,
    "float": lambda: 1.0,
    "bool": lambda: False,
}


def tensors_of(schema):
    """The arguments that are tensors, or lists of them, but for those that torch itself keeps on the CPU."""
    kinds = {each.name: str(each.type).removeprefix("Optional[").rstrip("]") for each in schema.arguments}
    return [name for name, kind in kinds.items() if kind.endswith("Tensor") and name != "batch_sizes"]


def schema_of(name):
    return getattr(torch.ops.torchq, name).default._schema


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        (name, apart)
        for name in (*elsewhere.COMPUTING, *elsewhere.READING, "linear_of_context")
        for apart in tensors_of(schema_of(name))
        if len(tensors_of(schema_of(name))) > 1
    ],
)
def test_one_argument_on_meta_is_an_error(name, apart):
    """A fake that took the device of another one would give an output of the CPU that nobody has computed."""
    given = {}
    for each in schema_of(name).arguments:
        kind = str(each.type)
        kind = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional[") else kind
        given[each.name] = torch.float32 if "dtype" in each.name else VALUES[kind]()
    given[apart] = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), given[apart])
    with pytest.raises(RuntimeError, match=rf"torchq::{name}: .* on (meta|cpu), .* on (meta|cpu)\. Move both"):
        getattr(torch.ops.torchq, name).default(**given)


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
