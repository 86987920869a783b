"""LayerNorm: torch's values, one set of bits on every kernel and by every way in, and what stays torch's own."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import kernels, ops
from torchq.modules.layer_norm import LayerNorm

KERNELS = [kernel for kernel in kernels.names() if kernel in kernels.runnable()]


def layer_norm(n, *, bias=True):
    """A LayerNorm of random numbers that wants no gradient."""
    norm = nn.LayerNorm(n, bias=bias).requires_grad_(False)
    norm.weight.copy_(normal(n, seed=1))
    if bias:
        norm.bias.copy_(normal(n, seed=2))
    LayerNorm.adopt(norm)
    return norm


def by_torch(norm, x):
    return nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [1, 3, 64, 100, 768])
def test_values_are_torchs(n, bias):
    norm, x = layer_norm(n, bias=bias), 3 * normal(2, 7, n, seed=3) + 1
    torch.testing.assert_close(norm(x), by_torch(norm, x), rtol=1e-5, atol=1e-5)


def test_all_ways_in_give_the_same_bits():
    norm, x = layer_norm(100), normal(9, 100, seed=3)
    y = norm(x)
    assert_identical(ops.layer_norm(x, norm.weight, norm.bias, norm.eps), y)
    assert_identical(norm.forward(x), y)
    handle = norm.register_forward_hook(lambda module, args, output: None)
    assert_identical(norm(x), y)
    handle.remove()
    wide = normal(9, 200, seed=4)
    wide[:, ::2] = x
    assert_identical(norm(wide[:, ::2]), y)


def test_simulated_values_are_torchs_to_the_bit():
    """A model from prepare_qat trains with torch's, and simulate() gives what it trained on."""
    norm, x = layer_norm(100), normal(9, 100, seed=3)
    with torchq.simulate():
        assert_identical(norm(x), by_torch(norm, x))
        assert_identical(norm.forward(x), by_torch(norm, x))
    assert not torch.equal(norm(x), by_torch(norm, x))


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_kernels_give_the_same_bits(kernel):
    norm, x = layer_norm(100), normal(9, 100, seed=3)
    expected = norm(x)
    with kernels.use(kernel):
        assert_identical(norm(x), expected)
        assert kernels.last_used() == kernel


def test_threads_give_the_same_bits():
    norm, x = layer_norm(768), normal(130, 768, seed=3)
    one = norm(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_identical(norm(x), one)
    finally:
        torch.set_num_threads(threads)


def test_nan_and_infinities_fill_their_row_only():
    norm, x = layer_norm(64), normal(5, 64, seed=3)
    expected = norm(x)
    x[1, 3], x[3, 60] = float("nan"), float("-inf")
    y = norm(x)
    assert y[[1, 3]].isnan().all()
    assert_identical(y[[0, 2, 4]], expected[[0, 2, 4]])


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (64,)])
def test_shapes(shape):
    norm, x = layer_norm(64), normal(*shape, seed=3)
    torch.testing.assert_close(norm(x), by_torch(norm, x), rtol=1e-5, atol=1e-5)


def test_gradients_are_torchs():
    norm = layer_norm(64).requires_grad_()
    x = normal(5, 64, seed=3).requires_grad_()
    for each, inputs in ((norm, (x, *norm.parameters())), (norm, tuple(norm.parameters()))):
        y = each(x)
        assert_identical(y.detach(), by_torch(norm, x).detach())
        assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(y.sin().sum(), inputs))
    with torch.no_grad():
        assert not norm(x).requires_grad


def test_other_dtypes_and_autocast_are_torchs():
    norm, x = layer_norm(64), normal(5, 64, seed=3)
    half = copy.deepcopy(norm).bfloat16()
    assert_identical(half(x.bfloat16()), by_torch(half, x.bfloat16()))
    with torch.autocast("cpu"):
        assert_identical(norm(x.bfloat16()), by_torch(norm, x.bfloat16()))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_that_torch_negates_when_they_are_read(name):
    norm, x = layer_norm(64), normal(3, 64, seed=3)
    setattr(norm, name, nn.Parameter(torch._neg_view(normal(64, seed=4)), requires_grad=False))
    torch.testing.assert_close(norm(x), by_torch(norm, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_value_that_lies_before_the_parameter(name):
    norm, x = layer_norm(64), normal(3, 64, seed=3)
    vars(norm)[name] = normal(64, seed=4)
    torch.testing.assert_close(norm(x), by_torch(norm, x), rtol=1e-5, atol=1e-5)


def test_a_wrong_width_is_torchs_error():
    with pytest.raises(RuntimeError, match="normalized_shape"):
        layer_norm(64)(torch.zeros(2, 65))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4, dtype=torch.float64), torch.ones(4)), "x must be float32, got float64"),
        ((torch.tensor(1.0), torch.ones(1)), "x must have 1 to 64 dimensions, got 0"),
        ((torch.zeros(2, 4), torch.ones(5)), r"weight must be float32 \(4,\), .* got float32 \(5\)"),
        ((torch.zeros(2, 4), torch.ones(4), torch.ones(4).half()), r"bias must be float32 \(4,\), .* got float16"),
    ],
)
def test_bad_input_of_the_op(arguments, message):
    with pytest.raises(RuntimeError, match=f"^torchq::layer_norm: {message}"):
        ops.layer_norm(*arguments)


def test_opcheck():
    torch.library.opcheck(torch.ops.torchq.layer_norm, (normal(5, 7, seed=1), torch.ones(7), torch.zeros(7), 1e-5))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.other = nn.LayerNorm(64), nn.LayerNorm((5, 64))
        self.plain = nn.LayerNorm(64, elementwise_affine=False)
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return self.plain(self.other(self.linear(self.norm(x))))


def test_convert_adopts_what_normalizes_rows_and_leaves_the_float_model():
    model = Block().eval()
    converted = torchq.convert(model)
    assert [type(each) for each in (converted.norm, converted.other, converted.plain)] == [
        LayerNorm,
        nn.LayerNorm,
        nn.LayerNorm,
    ]
    assert type(model.norm) is nn.LayerNorm
    assert str(converted.norm) == str(model.norm)
    x = normal(2, 5, 64, seed=3)
    with torch.no_grad():
        assert torchq.sqnr_db(model(x), converted(x)) > 35
        expected = converted(x)
        for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
            assert type(other.norm) is LayerNorm
            assert_identical(other(x), expected)


def test_a_model_without_int8_layers_keeps_its_own():
    config = torchq.QConfig(exclude=("linear",))
    assert type(torchq.convert(Block().eval(), config=config).norm) is nn.LayerNorm


def test_tracing_and_export_see_a_layer_norm():
    converted = torchq.convert(Block().eval())
    names = [node.target for node in torch.fx.symbolic_trace(converted).graph.nodes if node.op == "call_module"]
    assert names == ["norm", "linear", "other", "plain"]
    with torch.no_grad():
        program = torch.export.export(converted, (torch.zeros(2, 5, 64),))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("aten.layer_norm.default") == 3
    assert not any("torchq.layer_norm" in target for target in targets)
