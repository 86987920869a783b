"""What code that knows nn.Linear does with a converted layer: right values, or an error that says what to do."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert
from torchq.modules.float_view import FloatView
from torchq.numerics.qparams import dequantize

pytestmark = pytest.mark.usefixtures("seeded")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer_of(dtype=torch.float32, bias=True):
    return QuantizedLinear.from_float(nn.Linear(24, 40, bias=bias).to(dtype))


def values(layer):
    """The weight that the layer computes with, by its codes and scales."""
    return dequantize(layer.weight_int8, layer.weight_scale, axis=0).to(layer.dtype)


# ---- reading ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_looks_like_a_linear(dtype):
    linear, layer = nn.Linear(24, 40).to(dtype), layer_of(dtype)
    for name in ("weight", "bias"):
        ours, theirs = getattr(layer, name), getattr(linear, name)
        assert isinstance(ours, nn.Parameter)
        assert (ours.shape, ours.dtype, ours.device, ours.stride()) == (
            *(theirs.shape, theirs.dtype, theirs.device, theirs.stride()),
        )
        assert (ours.requires_grad, ours.grad, ours.is_leaf) == (False, None, True)
    assert layer_of(bias=False).bias is None
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in linear.parameters())
    assert next(layer.parameters()).dtype == dtype


READS = {
    "linear": lambda w: nn.functional.linear(torch.ones(2, 24, dtype=w.dtype), w),
    "norm": lambda w: w.float().norm(dim=1),
    "row sums": lambda w: w.sum(1),
    "diagonal": lambda w: w.diagonal(),
    "transposed": lambda w: w.T @ w,
    "heads": lambda w: torch.einsum("hdk,bk->bhd", w.view(4, 10, 24), torch.ones(3, 24, dtype=w.dtype)),
    "a row": lambda w: w[3],
    "rows": lambda w: w[torch.tensor([1, 5])],
    "chunk": lambda w: w.chunk(2)[1],
    "unbound": lambda w: torch.stack(list(w)),
    "of a view": lambda w: w.t()[2:5, ::3].contiguous(),
    "looked up": lambda w: nn.functional.embedding(torch.tensor([3, 1]), w),
    "as list": lambda w: torch.tensor(w.tolist()),
    "concatenated": lambda w: torch.cat([w, w]),
    "cloned": lambda w: w.clone(),
    "detached": lambda w: w.detach() + 0,
    "cast": lambda w: w.to(torch.float64),
    "data": lambda w: w.data * 1,
    "deepcopy": lambda w: copy.deepcopy(w) + 0,
    "pickled": lambda w: pickle.loads(pickle.dumps(w)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_wherever_it_is_used_it_is_the_dequantized_weight(read, dtype, mode):
    layer = layer_of(dtype)
    with mode():
        got, expected = read(layer.weight), read(values(layer))
        assert not isinstance(got, FloatView) or got.shape == expected.shape
        assert torch.equal(got.clone(), expected)


def test_numpy_sees_the_values():
    layer = layer_of()
    assert (layer.weight.numpy() == values(layer).numpy()).all()


def test_the_bias_is_the_layers():
    layer = layer_of()
    x = normal(3, 24)
    zero = nn.functional.linear(torch.zeros(1, 24), layer.weight, layer.bias)
    assert torch.equal(zero, layer(torch.zeros(1, 24)))
    assert torch.allclose(nn.functional.linear(x, layer.weight, layer.bias), layer(x), atol=0.05)


def test_a_gradient_flows_through_a_use_of_it():
    layer, x = layer_of(), normal(2, 24)
    with torch.enable_grad():
        x.requires_grad_()
        nn.functional.linear(x, layer.weight).sum().backward()
    assert torch.allclose(x.grad, values(layer).sum(0).expand(2, 24), atol=1e-6)  # 40 sums, in another order


@pytest.mark.parametrize("read", ["dtype", "shape", "device", "requires_grad"])
def test_reading_what_it_is_unpacks_nothing(read, monkeypatch):
    layer = layer_of()
    monkeypatch.setattr(FloatView, "make", None, raising=False)
    layer.weight.make = None  # calling it would be an error
    getattr(layer.weight, read)
    assert layer.bias is not None


def test_compiled_code_may_read_it():
    layer, x = layer_of(), normal(2, 24)
    compiled = torch.compile(lambda x: nn.functional.linear(x, layer.weight) + layer(x), backend="eager")
    assert torch.allclose(compiled(x), nn.functional.linear(x, values(layer)) + layer(x), atol=1e-5)


# ---- writing ----


def write_data(w):
    w.data = torch.zeros(40, 24)


def write_item(w):
    w[0, 0] = 1


def write_view(w):
    w.view(-1)[3:].fill_(2)


def write_row_of_data(w):
    w.data[1] = 0


WRITES = {
    "in place": lambda w: w.mul_(2),
    "data": lambda w: w.data.zero_(),
    "set data": write_data,
    "item": write_item,
    "view": write_view,
    "row of data": write_row_of_data,
    "transposed": lambda w: w.t().add_(1),
    "init": nn.init.normal_,
    "out": lambda w: torch.add(torch.ones(40, 24), 1, out=w),
    "copy": lambda w: w.copy_(torch.zeros(40, 24)),
    "resize": lambda w: w.resize_(1),
    "set": lambda w: w.set_(torch.zeros(40, 24)),
    "detached": lambda w: w.detach().zero_(),
    "contiguous": lambda w: w.contiguous().zero_(),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_no_write_is_lost(write):
    layer = layer_of()
    before = layer(normal(2, 24))
    with pytest.raises(RuntimeError, match=r"^torchq: the weight of an int8 layer can't be written"):
        write(layer.weight)
    assert torch.equal(layer(normal(2, 24)), before)


def test_a_copy_of_what_is_there_is_no_write():
    layer = layer_of()
    weight, row = layer.weight.clone(), layer.weight[3]
    for write in (
        lambda w: w.copy_(weight),
        lambda w: w.data.copy_(w),
        lambda w: w[3].copy_(weight[3]),
        lambda w: row.copy_(row),
    ):
        write(layer.weight)
    assert torch.equal(layer.weight, weight)
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    for write in (
        lambda w: w.copy_(weight),
        lambda w: w[3].copy_(weight[3]),
        lambda w: w.copy_(weight[3]),
        lambda w: w.copy_(w.double()),
    ):
        with pytest.raises(RuntimeError, match=r"can't be written \(aten::copy_\)"):
            write(layer.weight)


@pytest.mark.parametrize("name", ["weight", "bias", "weight_int8", "weight_scale"])
def test_no_other_tensor_takes_its_place(name):
    layer = layer_of()
    for value in (nn.Parameter(torch.ones(40, 24)), torch.ones(40, 24), None):
        with pytest.raises(RuntimeError, match=rf"can't be written \({name}\)"):
            setattr(layer, name, value)
    with pytest.raises(RuntimeError, match="can't be written"):
        layer._parameters["weight"] = torch.ones(40, 24)


def test_it_is_not_trained():
    with pytest.raises(RuntimeError, match=r"prepare_qat"):
        layer_of().weight.requires_grad_()
    layer, x = layer_of(), normal(2, 24)
    before = layer(x)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1.0)
    optimizer.step()
    assert torch.equal(layer(x), before)


# ---- modules ----


def test_functional_call_takes_buffers_and_refuses_the_rest():
    model, other, x = nn.Sequential(layer_of()), nn.Sequential(layer_of()), normal(2, 24)
    call = torch.func.functional_call
    assert torch.equal(call(model, dict(other.named_buffers()), (x,)), other(x))
    before = model(x)
    for state in (dict(other.named_parameters()), other.state_dict(), {"0.weight": torch.ones(40, 24)}):
        if any(isinstance(value, FloatView) for value in state.values()):
            continue  # of the other model: covered by the plain tensor below
        with pytest.raises(RuntimeError, match="can't be written"):
            call(model, state, (x,))
    assert torch.equal(model(x), before)


def test_copies_have_views_of_their_own():
    layer = layer_of()
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again.weight.clone(), values(layer))
        assert again.weight is not layer.weight
    half = copy.deepcopy(layer).half()
    assert (half.weight.dtype, half.bias.dtype) == (torch.float16, torch.float16)
    assert torch.equal(half.weight.clone(), values(layer).half())


def test_exported_programs_hold_no_float_weight():
    model = nn.Sequential(layer_of(), nn.ReLU(), QuantizedLinear.from_float(nn.Linear(40, 8)))
    for strict in (False, True):
        program = torch.export.export(model, (normal(2, 24),), strict=strict)
        assert list(program.state_dict) == []
        assert torch.equal(program.module()(normal(2, 24)), model(normal(2, 24)))


class Tied(nn.Module):
    """A language model whose head reads the embedding's table."""

    def __init__(self):
        super().__init__()
        self.emb, self.fc, self.head = nn.Embedding(50, 24), nn.Linear(24, 24), nn.Linear(24, 50, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens):
        return self.head(self.fc(self.emb(tokens)))


@pytest.mark.parametrize("data", [None, [torch.arange(50).reshape(5, 10)]], ids=["without data", "calibrated"])
def test_a_tied_table_stays_one(data):
    qmodel = convert(Tied().eval(), data)
    assert qmodel.head.weight is qmodel.emb.weight
    assert qmodel.torchq_plan.layers["fc"].is_int8
    assert "'emb' (Embedding) too" in qmodel.torchq_plan.layers["head"].reason


# ---- checkpoints ----


def saved(qmodel):
    file = io.BytesIO()
    torch.save(qmodel.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def chain():
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)).eval()


DATA = [normal(40, 24, seed=i) for i in range(3)]


def test_a_float_model_reports_an_int8_checkpoint():
    state = saved(convert(chain()))
    result = chain().load_state_dict(state, strict=False)
    assert set(result.missing_keys) == {"0.weight", "2.weight"}
    assert {"0.weight_int8", "0.weight_scale"} <= set(result.unexpected_keys)
    with pytest.raises(RuntimeError, match="Missing"):
        chain().load_state_dict(state)


def test_the_plan_and_the_state_make_the_same_model():
    """Static, fused, biased by correction: exactly."""
    model = chain()
    qmodel = convert(model, DATA, config=QConfig(activation="static", observer="minmax", rounding="gptq"))
    assert qmodel.torchq_plan.layers["0"].feeds == "2"
    from torchq import Plan, apply_plan

    plan = Plan.from_dict(qmodel.torchq_plan.to_dict())
    with pytest.warns(UserWarning, match="rounded to nearest now"):
        again = apply_plan(chain(), plan)
    again.load_state_dict(saved(qmodel))
    assert torch.equal(again(DATA[0]), qmodel(DATA[0]))


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_scheme_says_how_to_load_it(strict):
    static, dynamic = convert(chain(), DATA, config=QConfig(activation="static", observer="minmax")), convert(chain())
    before = dynamic(DATA[0])
    with pytest.raises(RuntimeError, match=r"0\.input_scale: the saved layer is static.*apply_plan"):
        dynamic.load_state_dict(saved(static), strict=strict)
    assert torch.equal(dynamic(DATA[0]), before)


def test_who_is_not_strict_loads_what_there_is():
    """As adapters do, within the model or around it."""
    qmodel, other = convert(chain()), convert(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)).eval())
    state = {key: tensor for key, tensor in saved(other).items() if key[0] == "0"}
    before = qmodel[2].weight_int8
    for outer, prefix in ((qmodel, ""), (nn.ModuleDict({"inner": qmodel}), "inner.")):
        given = {f"{prefix}{key}": tensor for key, tensor in state.items()} | {"more": torch.ones(1)}
        result = outer.load_state_dict(given, strict=False)
        assert set(result.missing_keys) == {f"{prefix}2.{key}" for key in ("weight_int8", "weight_scale", "bias")}
        assert result.unexpected_keys == ["more"]
        assert torch.equal(qmodel[0].weight_int8, other[0].weight_int8)
        assert torch.equal(qmodel[2].weight_int8, before)
        with pytest.raises(RuntimeError, match="Missing key"):
            outer.load_state_dict(given)


BAD = {
    "weight_scale": [float("nan"), float("inf"), -1.0, 0.0, 1e-45],
    "input_scale": [float("nan"), float("inf"), -0.5, 0.0],
    "input_zero_point": [-1, 256, 10**6],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name]])
@pytest.mark.parametrize("key", ["0", "2"])
def test_a_bad_value_is_named_and_nothing_is_loaded(key, name, value):
    config = QConfig(activation="static", observer="minmax", smoothing="none", rounding="nearest")
    qmodel, other = (convert(chain(), DATA, config=config) for _ in range(2))
    state, before = saved(other), qmodel(DATA[0])
    state[f"{key}.{name}"].fill_(value) if name != "weight_scale" else state[f"{key}.{name}"][3:4].fill_(value)
    with pytest.raises(RuntimeError, match=rf"nothing of it was:\s+{key}\.{name}: "):
        qmodel.load_state_dict(state)
    assert torch.equal(qmodel(DATA[0]), before)
    with pytest.raises(RuntimeError, match=rf"{key}\.{name}: "):
        nn.ModuleDict({"inner": qmodel}).load_state_dict({f"inner.{k}": v for k, v in state.items()})


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape of a float layer", "no tensor"])
def test_a_bad_key_is_named_and_nothing_is_loaded(change):
    """Nor of the layers before it, nor of float ones."""
    model = nn.Sequential(nn.LayerNorm(24), chain(), nn.BatchNorm1d(16))
    qmodel = convert(model, DATA, config=QConfig(activation="static", smoothing="none"))
    state, before = {key: tensor * 2 for key, tensor in saved(qmodel).items()}, copy.deepcopy(saved(qmodel))
    key = {"shape of a float layer": "0.bias", "unexpected": "1.gain"}.get(change, "1.2.weight_scale")
    if change == "missing":
        del state[key]
    else:
        state[key] = [1.0] if change == "no tensor" else torch.ones(3)
    with pytest.raises(RuntimeError, match=rf"nothing of it was:\s+.*{key}"):
        qmodel.load_state_dict(state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in qmodel.state_dict().items())


class Renamed(nn.Module):
    """Takes keys of an earlier version of itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x):
        return self.inner(x)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for key in [key for key in state_dict if key.startswith(f"{prefix}old.")]:
            state_dict[key.replace("old.", "inner.")] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_a_module_that_loads_in_its_own_way_does_so():
    qmodel = convert(nn.Sequential(chain(), Renamed(), nn.BatchNorm1d(16)).eval())
    state, expected = saved(qmodel), qmodel(DATA[0])
    old = {key.replace("inner.", "old."): tensor for key, tensor in state.items() if "num_batches" not in key}
    qmodel[0][0].replace_weight(torch.zeros(32, 24, dtype=torch.int8), torch.ones(32), torch.zeros(32))
    assert not torch.equal(qmodel(DATA[0]), expected)
    qmodel.load_state_dict(old)  # without what torch 0.4 did not save of a BatchNorm, too
    assert torch.equal(qmodel(DATA[0]), expected)
    old["1.old.weight_scale"] = -old["1.old.weight_scale"]
    with pytest.raises(RuntimeError, match=r"1\.inner\.weight_scale: scales must be positive"):
        qmodel.load_state_dict(old)


def test_codes_mean_what_their_reader_says():
    """The layer that gives them keeps no scale of its own, so another checkpoint can't part the two."""
    qmodel = convert(chain(), DATA, config=QConfig(activation="static", observer="minmax"))
    state, before = saved(qmodel), qmodel(DATA[0])
    assert not any("output" in key for key in state)
    state["2.input_scale"] *= 2
    qmodel.load_state_dict(state)
    y = qmodel(DATA[0])
    assert torch.equal(y, qmodel[2](qmodel[1](qmodel[0](DATA[0]))))
    assert not torch.equal(y, before)


@pytest.mark.parametrize("config", [QConfig(activation="static", observer="minmax"), QConfig(activation="dynamic")])
def test_meta_device_and_back(config):
    qmodel = convert(chain(), DATA, config=config)
    state, expected = saved(qmodel), qmodel(DATA[0])
    empty = copy.deepcopy(qmodel).to("meta")
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in empty.state_dict().items()}
    assert shapes == {key: (tensor.shape, tensor.dtype) for key, tensor in state.items()}
    assert empty[0].weight.device.type == "meta"
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(DATA[0]), expected)
    blank = copy.deepcopy(qmodel).to("meta").to_empty(device="cpu")
    blank.load_state_dict(state)
    assert torch.equal(blank(DATA[0]), expected)
