"""verify(): every kernel against the reference, int8 against the simulated path; and a wrong one is found."""

import json

import pytest
import torch
from torch import nn

from helpers.compare import snapshot
from helpers.numbers import normal
from torchq import QConfig, convert, kernels, ops, simulate, verify
from torchq.ops import Activation
from torchq.reporting import verification
from torchq.reporting.exact import Given, attention_allowance, convolved, share_of_allowed, simulated
from torchq.reporting.verified import First, first_difference

pytestmark = pytest.mark.usefixtures("seeded")

X = normal(6, 64)
FAST = kernels.runnable()[0]
has_two_kernels = pytest.mark.skipif(FAST == "reference", reason="this CPU runs only the reference")


def mlp(dtype=torch.float32, **config):
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)).to(dtype)
    config = QConfig(rounding="nearest", smoothing="none", **config)
    return convert(model.eval(), [normal(80, 64).to(dtype)], config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["static", "dynamic"])
def test_all_kernels_agree(activation, dtype):
    result = verify(mlp(dtype, activation=activation), X.to(dtype))
    assert result.ok
    assert result.differences == result.unreached == ()
    assert [(call.layer, call.kind, call.shape) for call in result.calls] == [
        ("0", f"int8 {activation}", (6, 64, 48)),
        ("2", f"int8 {activation}", (6, 48, 32)),
        ("4", f"int8 {activation}", (6, 32, 10)),
    ]
    for call in result.calls:
        assert set(call.seconds) == {*kernels.runnable(), "float"}
        assert all(seconds > 0 for seconds in call.seconds.values())
        assert set(call.ran) == {*kernels.runnable()} - {"reference"}
        assert 0 < call.share <= 1
    assert (result.kernels, result.active) == (tuple(kernels.runnable()), kernels.active())


def test_layers_are_run_as_planned(monkeypatch):
    """With the fused activation, and from and to u8 codes where the plan hands these over."""
    seen, real = [], verification._multiplied_by

    def spy(func, x, packed, rest, kernel):
        seen.append((x.dtype, *(rest[2:3] + rest[5:] if len(rest) == 6 else rest)))
        return real(func, x, packed, rest, kernel)

    monkeypatch.setattr(verification, "_multiplied_by", spy)
    verify(mlp(activation="static"), X)
    assert list(dict.fromkeys(seen)) == [
        (torch.float32, torch.uint8, Activation.GELU),
        (torch.uint8, torch.uint8, Activation.RELU),
        (torch.uint8, torch.float32, Activation.NONE),
    ]


class Waiting(nn.Module):
    """Its activation is called by name, so that in a plain call the layer's output waits for it."""

    def __init__(self):
        super().__init__()
        self.dense, self.act, self.out = nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)

    def forward(self, x, scale=1.0):
        return self.out(self.act(self.dense(x)) * scale)


def test_an_activation_that_a_layer_waits_for_is_fused_too(monkeypatch):
    seen, real = {}, verification._multiplied_by

    def spy(func, x, packed, rest, kernel):
        seen[packed.data_ptr()] = rest[-1]
        return real(func, x, packed, rest, kernel)

    qmodel = convert(Waiting(), [normal(80, 64)])
    assert qmodel.dense.fold.activation == Activation.GELU
    monkeypatch.setattr(verification, "_multiplied_by", spy)
    result = verify(qmodel, X)
    assert result.ok
    assert [seen[layer.packed.data_ptr()] for layer in (qmodel.dense, qmodel.out)] == [Activation.GELU, Activation.NONE]


@has_two_kernels
@pytest.mark.parametrize("activation", ["static", "dynamic"])
def test_a_wrong_kernel_is_named_with_the_first_element(activation, monkeypatch):
    real = verification._multiplied_by

    def wrong(func, x, packed, rest, kernel):
        call = real(func, x, packed, rest, kernel)

        def off():
            y = call()
            if kernel == FAST and y.shape[-1] == 10:
                y[2, 3] += 1e-3
                y[4, 0] += 1e-3
            return y

        return off

    qmodel = mlp(activation=activation)
    right = qmodel(X)[2, 3].item()
    monkeypatch.setattr(verification, "_multiplied_by", wrong)
    result = verify(qmodel, X)
    assert not result.ok
    (found,) = result.differences
    assert (found.layer, found.kernel, found.against) == ("4", FAST, "reference")
    assert (found.index, found.count, found.of) == ((2, 3), 2, 60)
    assert (found.got, found.expected) == (pytest.approx(right + 1e-3, abs=1e-6), right)
    line = next(line for line in str(result).splitlines() if line.startswith("WRONG"))
    assert line.startswith(
        f"WRONG: layer '4': kernel {FAST} differs from reference in 2 of 60 elements, first at (2, 3"
    )
    assert "agree" not in str(result)


def test_a_wrong_integer_path_is_found(monkeypatch):
    """Weights that all kernels read alike, and wrongly: only the simulated path shows it."""

    def other(given):
        exact, allowed = simulated(given)
        return exact + 1e-5, allowed

    monkeypatch.setattr(verification, "simulated", other)
    result = verify(mlp(activation="dynamic"), X)
    assert {found.against for found in result.differences} == {"simulated"}
    assert {found.kernel for found in result.differences} <= {*kernels.runnable()}
    assert [found.layer for found in result.differences] == ["0", "2", "4"]
    assert result.differences[0].index == (0, 0)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("channel_scale", [None, torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5])
def test_the_simulated_path_is_simulates_and_its_allowance_tight(static, channel_scale):
    config = QConfig(activation="static" if static else "dynamic", rounding="nearest", smoothing="none")
    layer = convert(nn.Linear(64, 32), [normal(80, 64)], config=config)
    packed = ops.pack(layer.weight_int8, layer.weight_scale, layer.bias.clone(), channel_scale)
    layer._set_packed(packed)
    pair = layer.input_qparams or (None, 0)
    exact, allowed = simulated(Given(X, packed, *pair))
    with simulate():
        assert torch.allclose(layer(X).double(), exact, atol=1e-5)
    y = layer(X)
    assert 0.05 < share_of_allowed(y, exact, allowed) <= 1  # the bound is not 20 times too wide
    assert first_difference(y, exact, allowed) is None
    y[5, 7] += 8 * float(allowed[5, 7])
    assert first_difference(y, exact, allowed).index == (5, 7)


def test_rows_with_nan_are_anything_and_others_are_still_compared():
    x = X.clone()
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    layer = convert(nn.Linear(64, 32))
    exact, allowed = simulated(Given(x, layer.packed))
    assert exact.isnan().any(dim=1).tolist() == [False, True, True, False, False, False]
    assert first_difference(layer(x), exact, allowed) is None
    assert verify(layer, x).ok


class Recurrent(nn.Module):
    """All kinds of ops in one."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(64, 48, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(96, 3, batch_first=True)
        self.out = nn.Linear(96, 8)

    def forward(self, x):
        y, _ = self.lstm(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        return self.out(y)


SEQUENCES = [normal(4, 30, 64, seed=i) for i in range(3)]


def recurrent(**config):
    return convert(Recurrent().eval(), SEQUENCES, config=QConfig(activation="dynamic", rounding="nearest", **config))


@pytest.mark.parametrize("scheme", ["float32", "bfloat16", "int8_bfloat16", "int8"])
def test_attention_and_recurrent_steps(scheme):
    qmodel = recurrent(attention=scheme)
    result = verify(qmodel, SEQUENCES[0])
    assert result.ok, str(result)
    assert result.unreached == ()
    kinds = {call.layer: (call.kind, call.shape) for call in result.calls}
    assert kinds["lstm.hh_l0, lstm.hh_l0_reverse"] == ("LSTM steps", (120, 48, 192))
    assert kinds["attention"] == (f"attention {scheme}", (4 * 3 * 30, 32, 30))
    assert set(kinds) == {*verification._Checks(qmodel).layers, *list(kinds)} - {"lstm.hh_l0", "lstm.hh_l0_reverse"}
    assert len(kinds) == len(result.calls) == 2 + 4 + 1 + 2


@has_two_kernels
@pytest.mark.parametrize("op", ["attention", "recurrent"])
def test_other_ops_that_are_wrong(op):
    checks = verification._Checks(qmodel := recurrent())

    def wrong(func):
        def off(*args):
            y = func(*args)
            first = y[0] if isinstance(y, tuple) else y
            if kernels.active() != "reference":
                first.view(-1)[-1] += 1e-2
            return y

        return off

    if op == "attention":
        q = normal(1, 2, 8, 16)
        checks._attend(wrong(verification._ATTENTION), q, q, q, None, False, None, 0, None, 3)
    else:
        gates, packed, zeros = normal(6, 192), qmodel.lstm.hh_l0.packed, torch.zeros(1, 2, 48)
        checks._recurrent(wrong(verification._RECURRENT), 0, [gates], [packed], [], zeros, zeros, None, [])
    found = checks.calls[0].differences
    assert [each.kernel for each in found] == [name for name in kernels.runnable() if name != "reference"]
    assert {each.count for each in found} == {1}
    assert found[0].index == ((0, 1, 7, 15) if op == "attention" else (5, 47))


class Convolutions(nn.Module):
    """With groups, depthwise, pointwise, strides, dilation, a residual and one dimension."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.point = nn.Conv2d(32, 32, 1)
        self.line = nn.Conv1d(32, 16, 5, padding="same")

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.wide(x))
        x = self.point(torch.relu(self.depthwise(torch.relu(self.grouped(x)))))
        return self.line(x.flatten(2))


@pytest.mark.parametrize("activation", ["static", "dynamic"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions(activation, channels_last):
    torch.manual_seed(0)
    data = [torch.randn(4, 3, 20, 18) for _ in range(3)]
    config = QConfig(activation=activation, rounding="nearest", smoothing="none")
    qmodel = convert(Convolutions().eval(), data, config=config)
    x = data[0].to(memory_format=torch.channels_last) if channels_last else data[0]
    result = verify(qmodel, x)
    assert result.ok, str(result)
    assert result.unreached == ()
    found = {call.layer: call for call in result.calls}
    assert list(found) == qmodel.torchq_plan.int8_layers()
    assert set(found) >= {"stem", "wide", "grouped", "point", "line"}
    assert found["stem"].shape == (4 * 10 * 9, 27, 32)
    assert found["grouped"].shape == (4 * 90, 16 * 9, 32)
    assert all(0 < call.share <= 1 for call in found.values())
    assert all(call.seconds["float"] > 0 for call in found.values())


def test_a_convolution_runs_with_the_activation_of_its_plan():
    x, model = normal(2, 16, 9, 9), nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    qmodel = convert(model, [x], config=QConfig(activation="dynamic", rounding="nearest"))
    layer = qmodel[0]
    assert layer.fold.activation == Activation.RELU
    checks, seen = verification._Checks(qmodel), []

    def convolve(*args):
        seen.append(args[6:7])
        return verification._CONVOLUTION(*args)

    checks._convolution(convolve, x, layer.packed, layer.geometry.numbers(), [], torch.float32)
    assert set(seen) == {(), (Activation.RELU,)}  # without, for the simulated path
    assert checks.calls[0].differences == ()


@pytest.mark.parametrize("static", [False, True])
def test_a_wrong_convolution_is_found(static, monkeypatch):
    def off(given, geometry):
        exact, allowed = convolved(given, geometry)
        return exact + 1e-4, allowed

    config = QConfig(activation="static" if static else "dynamic", rounding="nearest", smoothing="none")
    qmodel = convert(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)), [normal(2, 16, 9, 9)], config=config)
    assert verify(qmodel, normal(2, 16, 9, 9)).ok
    monkeypatch.setattr(verification, "convolved", off)
    (found,) = verify(qmodel, normal(2, 16, 9, 9)).differences
    assert (found.layer, found.against, found.count) == ("0", "simulated", 2 * 16 * 81)


def test_what_attention_is_allowed():
    q = normal(1, 2, 8, 16)
    assert attention_allowance(q, q, q, "int8") == 0
    floats = attention_allowance(q, q, q, "float32")
    assert 1e-6 < floats < 1e-3
    assert attention_allowance(q[:, :, :2], q, q, "int8") > 0  # few rows are computed in float32
    assert attention_allowance(q, q, q, "bfloat16") > 2.0**-8
    assert attention_allowance(q, q, q, "float32", torch.full((8, 8), -30.0)) > floats
    assert attention_allowance(q, q, q, "float32", torch.full((8, 8), torch.finfo(torch.float32).min)) == floats
    assert attention_allowance(q[:, :, :0], q, q, "float32") == 0


def test_each_layer_and_shape_once():
    shared = nn.Linear(64, 64)
    qmodel = convert(nn.Sequential(shared, nn.Tanh(), shared))
    result = verify(qmodel, X)
    assert [call.layer for call in result.calls] == ["0"]
    assert result.unreached == ()

    def forward(model, batch):
        model(batch)
        model(batch[:2])

    assert [call.shape[0] for call in verify(qmodel, X, forward=forward).calls] == [6, 2]


def test_layers_the_example_does_not_reach():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 8), nn.Linear(64, 8)

        def forward(self, x, other=False):
            return self.b(x) if other else self.a(x)

    qmodel = convert(Branch())
    result = verify(qmodel, X)
    assert result.ok
    assert result.unreached == ("b",)
    assert str(result).splitlines()[-1] == "not reached by the example, so not verified: b"
    assert verify(qmodel, X, forward=lambda model, x: (model(x), model(x, other=True))).unreached == ()


def test_tables_are_no_layers_to_verify():
    qmodel = convert(nn.Sequential(nn.Embedding(4000, 64), nn.Linear(64, 8)))
    assert type(qmodel[0]).__name__ == "QuantizedEmbedding"
    result = verify(qmodel, torch.arange(40).view(4, 10))
    assert [call.layer for call in result.calls] == ["1"]
    assert result.unreached == ()


def test_the_forms_of_an_example():
    qmodel = convert(Waiting())
    for example in (X, (X, torch.zeros(6)), {"x": X, "labels": 1}):
        assert verify(qmodel, example).ok


def test_nothing_changes():
    qmodel = recurrent()
    before = snapshot(qmodel)
    verify(qmodel, SEQUENCES[0])
    assert snapshot(qmodel) == before


def test_json_and_text():
    result = verify(mlp(activation="static"), X)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["ok"] is True
    assert data["calls"][1]["layer"] == "2"
    assert data["calls"][0]["seconds"].keys() == result.calls[0].seconds.keys()
    head, rule, first, *_ = lines = str(result).splitlines()
    assert head.split() == ["layer", "kind", "shape", *kernels.runnable(), "float"]
    assert (rule, first.split()[:8]) == ("-" * len(head), ["0", "int8", "static", "6", "x", "64", "x", "48"])
    assert f"ok: {', '.join(kernels.runnable())} agree on 3 calls; {kernels.active()} is active" in lines


def test_first_difference():
    nan, zero = torch.tensor([torch.nan, 0.0]), torch.tensor([torch.nan, -0.0])
    assert first_difference(nan, nan) is None
    assert first_difference(nan, zero).index == (1,)  # bit for bit
    assert first_difference(nan, zero, 1e-9) is None
    assert first_difference(torch.tensor([1.0]), torch.tensor([torch.nan])).count == 1
    assert first_difference(torch.tensor([torch.nan]), torch.tensor([1.0]), 1e9).count == 1
    inf = torch.tensor([torch.inf])
    assert first_difference(inf, inf, 1e-9) is None
    assert first_difference(inf, -inf, 1e9).got == torch.inf
    codes = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    assert first_difference(codes, codes) is None
    assert first_difference(codes, codes + torch.tensor([[0, 0], [0, 1]])) == First((1, 1), 4, 5, 1, 4)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"^torchq.verify: this Linear has no torchq_plan"):
        verify(nn.Linear(64, 8), X)
    with pytest.raises(ValueError, match=r"^torchq.verify: example reaches no int8 layer of this model\. Pass a batch"):
        verify(convert(nn.Linear(64, 8)), X, forward=lambda model, batch: None)
    with pytest.raises(TypeError, match=r"^torchq.verify: example is of type int; expected a tensor"):
        verify(convert(nn.Linear(64, 8)), 3)
