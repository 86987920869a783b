"""Two codes for each value of an input: the op in every kernel, the layer, and the heads that have them."""

import copy
import dataclasses
import io
import math

import pytest
import torch
from torch import nn

from helpers import reference
from helpers.compare import assert_identical
from helpers.numbers import normal, random_float, random_weight
from torchq import (
    Plan,
    QConfig,
    QuantizedLinear,
    apply_plan,
    convert,
    ops,
    plan_of,
    prepare_qat,
    report,
    simulate,
    verify,
)
from torchq.modules.fine_linear import FineLinear
from torchq.numerics.metrics import sqnr_db
from torchq.ops.fine import linear_fine
from torchq.planning.fine_heads import WHY
from torchq.reporting.exact import Given, simulated_finely
from torchq.reporting.profile import profile_layers

pytestmark = pytest.mark.usefixtures("seeded")
FINE = QConfig(embeddings=True)

# ---- the op ----


@pytest.mark.parametrize("scaled", [False, True])
def test_every_kernel_gives_the_bits_of_the_oracle(kernel, generator, scaled):
    """Also with more rows than are computed at once, and more columns than their products have room for in L2."""
    for m, n, k in [
        (1, 5, 1),
        (3, 17, 15),
        (7, 33, 16),
        (2, 65, 31),
        (65, 40, 64),
        (130, 700, 20),
        (1, 3, 0),
        (0, 4, 8),
    ]:
        weight, w_scale, bias = random_weight(n, k, generator)
        c = torch.rand(k, generator=generator).mul(8).sub(4).exp2() if scaled else None
        x = random_float(m, k, generator=generator)
        for b in (bias, None):
            expected = reference.linear_fine(x, weight, w_scale, b, c)
            assert_identical(linear_fine(x, ops.pack(weight, w_scale, b, c)), expected, (m, n, k))


def test_threads_give_the_same_bits(generator, set_threads):
    weight, w_scale, bias = random_weight(3000, 256, generator)
    packed, x = ops.pack(weight, w_scale, bias), random_float(70, 256, generator=generator)
    expected = linear_fine(x, packed)
    set_threads(3)
    assert_identical(linear_fine(x, packed), expected)
    assert_identical(linear_fine(x[:1], packed), expected[:1])


def test_special_values_spoil_their_row_only(kernel, generator):
    weight, w_scale, bias = random_weight(20, 30, generator)
    x = random_float(5, 30, generator=generator)
    x[1, 3], x[2, 4], x[3] = math.nan, math.inf, 0.0
    y = linear_fine(x, ops.pack(weight, w_scale, bias))
    assert y.isnan().all(dim=1).tolist() == [False, True, True, False, False]
    assert_identical(y[3], bias)
    assert_identical(y[[0, 4]], reference.linear_fine(x[[0, 4]], weight, w_scale, bias))


def test_an_activation_is_that_of_the_epilogue(generator):
    weight, w_scale, bias = random_weight(50, 30, generator)
    packed, x = ops.pack(weight, w_scale, bias), random_float(9, 30, generator=generator)
    for activation in ops.Activation:
        assert_identical(linear_fine(x, packed, activation), ops.activate(linear_fine(x, packed), activation))


def test_sixteen_bits_of_x_are_left(generator):
    weight, w_scale, bias = random_weight(64, 256, generator)
    x, packed = torch.randn(32, 256, generator=generator), ops.pack(weight, w_scale, bias)
    exact = (x.double() @ (weight * w_scale[:, None]).double().T + bias).float()
    assert 42 < sqnr_db(exact, ops.linear_dynamic(x, packed)) < 46
    assert sqnr_db(exact, linear_fine(x, packed)) > 88


BAD = {
    "dtype": (lambda x: x.half(), "x must be float32, got float16"),
    "width": (lambda x: x[:, :7], "the weight was packed for 8 input features, but x has 7"),
    "scalar": (lambda x: x[0, 0], "x must have 1 to 64 dimensions, got 0"),
    "device": (lambda x: x.to("meta"), "x is on meta, the packed weight on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, words = BAD[case]
    packed = ops.pack(torch.ones(3, 8, dtype=torch.int8), torch.ones(3))
    with pytest.raises(RuntimeError, match=words):
        linear_fine(change(torch.ones(2, 8)), packed)
    with pytest.raises(RuntimeError, match="activation must be"):
        linear_fine(torch.ones(2, 8), packed, 99)


# ---- the layer ----


def layer_of(channel_scale=None):
    torch.manual_seed(0)
    return FineLinear.adopt(QuantizedLinear.from_float(nn.Linear(64, 40), channel_scale=channel_scale))


SCALES = {"plain": None, "scaled": normal(64, seed=5).exp()}


@pytest.mark.parametrize("scale", SCALES)
def test_a_layer_gives_what_the_op_gives(scale):
    layer, x = layer_of(SCALES[scale]), normal(3, 5, 64)
    y = linear_fine(x, layer.packed)
    assert_identical(layer(x), y)
    assert_identical(layer(x.half()), linear_fine(x.half().float(), layer.packed).half())
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(layer(x), y.bfloat16())
    with simulate():
        assert sqnr_db(y, layer(x)) > 110
    assert_identical(torch.compile(layer, backend="eager", fullgraph=True)(x), y)
    assert_identical(torch.export.export(layer, (x,)).module()(x), y)
    assert_identical(copy.deepcopy(layer)(x), y)
    assert "codes=2" in repr(layer)


@pytest.mark.parametrize("scale", SCALES)
@torch.enable_grad()
def test_gradients_to_inputs_are_those_of_the_weight(scale):
    layer, x, dy = layer_of(SCALES[scale]), normal(3, 64).requires_grad_(), normal(3, 40, seed=1)
    y = layer(x)
    assert_identical(y.detach(), linear_fine(x.detach(), layer.packed))
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ layer.weight.clone())
    rows = torch.func.vmap(layer)(x.detach()[:, None])
    assert_identical(rows[:, 0], y.detach())


def test_a_graph_compiled_while_a_thread_simulates():
    layer, x = layer_of(), normal(3, 64)
    with torch.no_grad(), simulate():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        simulated = layer(x)
        torch.testing.assert_close(compiled(x), simulated)
    assert_identical(compiled(x).detach(), layer(x).detach())


def test_what_a_layer_does_not_take():
    layer, x = layer_of(), normal(3, 64)
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16, got float64"):
        layer(x.double())
    with pytest.raises(TypeError, match="x must be dense"):
        layer(x.to_sparse())


# ---- the plan ----


class Language(nn.Module):
    """Tokens in, scores of tokens out, by one table."""

    def __init__(self):
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(300, 64), nn.Linear(64, 64), nn.Linear(64, 300, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        h = self.words(ids)
        return self.head(h + torch.relu(self.mix(h)))


DATA = [torch.randint(0, 300, (8, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def fine_layers(qmodel):
    return [name for name, module in qmodel.named_modules() if isinstance(module, FineLinear)]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("data", [None, DATA], ids=["no data", "data"])
def test_a_tied_head_has_two_codes(data, inplace):
    model = Language()
    exact, one_code = model(DATA[0]), convert(model, data, config=QConfig(embeddings="int8"))
    before = one_code.torchq_plan.layers["head"].measured_db
    qmodel = convert(model, data, config=FINE, inplace=inplace)
    planned = qmodel.torchq_plan.layers["head"]
    assert fine_layers(qmodel) == ["head"]
    assert (planned.kind, planned.fine, planned.input_qparams) == ("int8 dynamic", True, None)
    assert planned.reason.endswith(WHY)
    assert WHY in str(report(qmodel))
    assert sqnr_db(exact, qmodel(DATA[0])) > sqnr_db(exact, one_code(DATA[0])) + 1.5
    assert (planned.measured_db is None) == (data is None)
    if data:
        assert planned.measured_db > before + 2.5
        assert planned.stats.input_db > 85
        assert list(profile_layers(qmodel, rounds=1)) == ["mix", "head"]
    assert verify(qmodel, DATA[0][:1]).ok


def test_it_outlives_plans_files_and_checkpoints():
    qmodel, file = convert(Language(), config=FINE), io.BytesIO()
    expected = qmodel(DATA[0])
    plan = Plan.from_dict(qmodel.torchq_plan.to_dict())
    assert plan == qmodel.torchq_plan
    again = apply_plan(Language(), plan)
    again.load_state_dict(qmodel.state_dict())
    assert_identical(again(DATA[0]), expected)
    torch.save(qmodel, file)
    file.seek(0)
    assert_identical(torch.load(file, weights_only=False)(DATA[0]), expected)


def test_plans_of_earlier_versions_have_one_code():
    data = convert(Language(), config=FINE).torchq_plan.to_dict()
    for layer in data["layers"].values():
        del layer["fine"]
    assert fine_layers(apply_plan(Language(), Plan.from_dict(data))) == []


def test_which_heads_have_one_code():
    data = {"coarse": QConfig(embeddings="int8"), "static": dataclasses.replace(FINE, activation="static")}
    for config in data.values():
        assert fine_layers(convert(Language(), DATA, config=config)) == []
    untied = Language()
    untied.head.weight = nn.Parameter(untied.words.weight.detach().clone())
    assert fine_layers(convert(untied, config=FINE)) == []
    prepared = prepare_qat(Language(), DATA, config=FINE)
    assert fine_layers(convert(prepared.eval())) == []


def test_what_the_plan_without_data_has_is_fine_too():
    """It is one of those that the plan is compared with."""
    plan = convert(Language(), DATA, config=dataclasses.replace(FINE, margin_db=0.0)).torchq_plan
    assert plan.layers["head"].fine


def test_an_edited_plan_may_have_two_codes_anywhere():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 40)), normal(9, 64)
    plan = plan_of(convert(model))
    layers = {name: dataclasses.replace(layer, fine=True) for name, layer in plan.layers.items()}
    qmodel = apply_plan(model, dataclasses.replace(plan, layers=layers))
    assert fine_layers(qmodel) == ["0", "2"]
    hidden = torch.relu(linear_fine(x, qmodel[0].packed))
    assert_identical(qmodel(x), linear_fine(hidden, qmodel[2].packed))


def test_a_plan_that_can_not_be_applied():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(6, 64))
    plan = plan_of(convert(model, [normal(8, 8, 8, 8)], config=QConfig(activation="static")))
    for name, value, words in (
        ("0", True, "is fine, so it must be a dynamic nn.Linear; it is int8 static, nn.Conv"),
        ("1", True, "is fine, so it must be a dynamic nn.Linear; it is int8 static, nn.Linear"),
        ("1", 2, "has fine 2, expected True or False"),
    ):
        edited = {**plan.layers, name: dataclasses.replace(plan.layers[name], fine=value)}
        with pytest.raises(ValueError, match=words):
            apply_plan(model, dataclasses.replace(plan, layers=edited))


def test_what_it_must_give_to_float64(generator):
    weight, w_scale, bias = random_weight(50, 64, generator)
    x = random_float(9, 64, generator=generator)
    for c in (None, torch.rand(64, generator=generator) + 0.5):
        packed = ops.pack(weight, w_scale, bias, c)
        exact, allowed = simulated_finely(Given(x, packed))
        y = linear_fine(x, packed).double()
        assert bool(((y - exact).abs() <= allowed).all())
        assert not bool(((ops.linear_dynamic(x, packed).double() - exact).abs() <= allowed).all())
