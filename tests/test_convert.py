"""convert(): models of many structures are converted correctly, and the model passed in does not change."""

import contextlib
import copy
import io
import pickle
import warnings
from functools import partial
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from helpers.compare import assert_close_to_float, snapshot
from helpers.covers import pairs_of
from helpers.models import DATA, Doubled, Nested, X, load_digits, mlp, with_and_without_data
from torchq import QConfig, QuantizedLinear, convert, simulate
from torchq.planning.apply import apply_plan

pytestmark = pytest.mark.usefixtures("seeded")

AUTO, DYNAMIC = QConfig(), QConfig(activation="dynamic")
STATIC = QConfig(activation="static", observer="minmax")
by_activation = pytest.mark.parametrize("config", [AUTO, STATIC, DYNAMIC], ids=lambda config: config.activation)


def int8_names(qmodel):
    return [name for name, module in qmodel.named_modules() if isinstance(module, QuantizedLinear)]


# ---- structures ----


@pytest.mark.parametrize("inplace", [False, True])
@with_and_without_data
def test_nested_modules(data, inplace):
    model = Nested().eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    qmodel = convert(copy.deepcopy(model), data, inplace=inplace)
    assert int8_names(qmodel) == list(qmodel.torchq_plan.layers) == names
    assert not any(isinstance(module, nn.Linear) for module in qmodel.modules())
    assert_close_to_float(model, qmodel)


class Shared(nn.Module):
    """Has a Linear under two names, and a weight that an Embedding shares."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(24, 24)
        self.b, self.tied, self.emb = self.a, nn.Linear(24, 24), nn.Embedding(24, 24)
        self.emb.weight = self.tied.weight

    def forward(self, x):
        return self.b(self.tied(self.a(x))) + self.emb(torch.tensor(3))


@pytest.mark.parametrize("inplace", [False, True])
@with_and_without_data
def test_shared_layers_and_tied_weights(data, inplace):
    model = Shared()
    qmodel = convert(copy.deepcopy(model), data, inplace=inplace)
    assert int8_names(qmodel) == ["a"]
    reason = "its weight is that of 'emb' (Embedding) too; int8 would be a second copy of it"
    assert qmodel.torchq_plan.layers["tied"].reason == reason
    assert qmodel.tied.weight is qmodel.emb.weight
    assert qmodel.b is qmodel.a
    assert torch.equal(qmodel.emb.weight, model.emb.weight)
    assert_close_to_float(model, qmodel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_model_is_a_linear(dtype, bias):
    linear = nn.Linear(24, 8, bias=bias).to(dtype)
    before = snapshot(linear)
    for data in (None, [x.to(dtype) for x in DATA]):
        qmodel = convert(linear, data)
        assert type(qmodel) is QuantizedLinear
        assert_close_to_float(linear, qmodel, X.to(dtype))
    assert snapshot(linear) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@by_activation
def test_half_precision_models(dtype, config):
    model = Nested().to(dtype).eval()
    qmodel = convert(model, [x.to(dtype) for x in DATA], config=config)
    assert_close_to_float(model, qmodel, X.to(dtype))


class Plain(nn.Linear):
    """A subclass of nn.Linear that inherits its forward."""


class Beside(nn.Module):
    """Runs `target`, in its own dtype, and a Linear that is always converted."""

    def __init__(self, target):
        super().__init__()
        self.target, self.fc, self.dtype = target, nn.Linear(24, 8), target.weight.dtype

    def forward(self, x):
        return self.fc(x) + self.target(x.to(self.dtype)).to(x.dtype)


@pytest.mark.parametrize("make", [Plain, nn.modules.linear.NonDynamicallyQuantizableLinear])
@with_and_without_data
def test_a_subclass_with_the_forward_of_linear_is_converted(make, data):
    model = Beside(make(24, 8))
    qmodel = convert(model, data)
    assert int8_names(qmodel) == ["target", "fc"]
    assert_close_to_float(model, qmodel)


@with_and_without_data
def test_a_parametrized_linear_is_converted_with_the_weight_it_has(data):
    model = Beside(parametrizations.weight_norm(nn.Linear(24, 8)))
    model.target.parametrizations.weight.original0.mul_(3)
    before = snapshot(model)
    qmodel = convert(model, data, config=QConfig(rounding="nearest"))
    expected = QuantizedLinear.from_float(model.target)
    assert torch.equal(qmodel.target.weight_int8, expected.weight_int8)
    assert torch.equal(qmodel.target.weight_scale, expected.weight_scale)
    assert not any(parameter.requires_grad for parameter in qmodel.parameters())
    assert_close_to_float(model, qmodel)
    assert snapshot(model) == before


def hooked(register):
    layer = nn.Linear(24, 8)
    getattr(layer, register)(lambda module, args, *output: 2 * (output or args)[0])
    return layer


def patched():
    layer = nn.Linear(24, 8)
    layer.forward = MethodType(lambda self, x: 3 * nn.functional.linear(x, self.weight), layer)
    return layer


class Opaque(torch.Tensor):
    """As torchao's quantized weights: a float tensor by its dtype, which takes few operations."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return Opaque(**tensors)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return func(args[0], args[1].codes * args[1].scale, *args[2:])
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            return Opaque(args[0].codes.clone(), args[0].scale.clone())
        raise NotImplementedError(f"Opaque takes no {func}")


@with_and_without_data
@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 8), lambda: nn.Embedding(8, 24)])
def test_a_weight_that_holds_its_values_in_a_way_of_its_own_stays(make, data):
    """Beside an attribute as torchao leaves one: a partial that is bound to the layer."""
    layer = make()
    layer.weight = nn.Parameter(Opaque(torch.randint(-9, 9, (8, 24)).float(), torch.rand(8, 1)), requires_grad=False)
    layer.extra_repr = MethodType(partial(lambda module: "opaque"), layer)
    model = Beside(layer) if isinstance(layer, nn.Linear) else Beside(nn.Linear(24, 8))
    model.table = layer
    plan = convert(model, data).torchq_plan
    row = plan.layers["target"] if isinstance(layer, nn.Linear) else plan.tables["table"]
    reason = "its weight is a test_convert.Opaque, which holds its values in a way of its own"
    assert (row.kind, row.reason) == ("float", reason)


def spoilt(bad):
    layer = nn.Linear(24, 8)
    layer.weight[3, 5] = bad
    return layer


@with_and_without_data
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Doubled(24, 8), "Doubled has a forward of its own"),
        (patched, "Linear has a forward of its own"),
        (lambda: hooked("register_forward_hook"), "it has forward hooks, which a swap would drop"),
        (lambda: hooked("register_forward_pre_hook"), "it has forward hooks, which a swap would drop"),
        (lambda: nn.Linear(24, 8).double(), "its weight is torch.float64; float32, bfloat16 and float16 can be"),
        (lambda: spoilt(torch.nan), "its weight has NaN or infinity"),
        (lambda: spoilt(-torch.inf), "its weight has NaN or infinity"),
    ],
    ids=["subclass", "instance", "hook", "pre-hook", "float64", "nan", "inf"],
)
@pytest.mark.filterwarnings("ignore:torchq.convert. 1 of . layers are float64")
def test_what_stays_float_has_its_reason_and_works_as_before(make, reason, data):
    model = Beside(make())
    before = snapshot(model)
    qmodel = convert(model, data)
    layers = qmodel.torchq_plan.layers
    assert (layers["target"].kind, layers["target"].reason[: len(reason)]) == ("float", reason)
    assert int8_names(qmodel) == ["fc"]
    x = X.to(model.dtype)
    torch.testing.assert_close(qmodel.target(x), model.target(x), rtol=0, atol=0, equal_nan=True)
    assert type(qmodel.target) is type(model.target)
    assert snapshot(model) == before


def test_a_lazy_linear_is_not_initialized_behind_the_users_back():
    model = nn.Sequential(nn.LazyLinear(24), nn.Linear(24, 8))
    layer = convert(model).torchq_plan.layers["0"]
    assert (layer.kind, layer.reason[:27]) == ("float", "LazyLinear is not initializ")
    with contextlib.suppress(ValueError):  # may be refused: running data through it would initialize it
        convert(model, DATA)
    assert type(model[0]) is nn.LazyLinear
    assert model[0].has_uninitialized_params()


# ---- attention, whose modules read weights without calling the layers ----


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha, self.fc = nn.MultiheadAttention(24, 4, batch_first=True), nn.Linear(24, 8)

    def forward(self, x):
        return self.fc(self.mha(x, x, x)[0])


@with_and_without_data
def test_multihead_attention(data):
    """Its matrices have tests of their own."""
    model, x = Attention().eval(), X.reshape(3, 11, 24)
    qmodel = convert(model, data and [batch.reshape(2, 8, 24) for batch in data])
    assert int8_names(qmodel) == [*(f"mha.{part}_proj" for part in ("q", "k", "v", "out")), "fc"]
    assert_close_to_float(model, qmodel, x)
    assert_close_to_float(model.train(), qmodel.train(), x)  # the path without torch's fused attention


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize(("calibrated", "inplace", "norm_first", "grad"), pairs_of(*[[False, True]] * 4))
def test_transformer_encoder(calibrated, inplace, norm_first, grad):
    """In eval mode without gradients, torch runs fused kernels that read float weights. A converted model must not."""
    layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, norm_first=norm_first)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval(), X.reshape(3, 11, 24)
    mask = torch.arange(11) >= torch.tensor([[11], [7], [4]])
    data = [batch.reshape(2, 8, 24) for batch in DATA] if calibrated else None
    qmodel = convert(copy.deepcopy(model), data, inplace=inplace)
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "linear1", "linear2")
    assert int8_names(qmodel) == [f"layers.{i}.{part}" for i in (0, 1) for part in parts]
    with torch.set_grad_enabled(grad):
        assert_close_to_float(model, qmodel, x)
        assert_close_to_float(model, qmodel, x, src_key_padding_mask=mask, rows=~mask)


# ---- the model passed in ----


@pytest.mark.parametrize(("data", "config"), [(None, AUTO), (DATA, AUTO), (DATA, STATIC), (DATA, DYNAMIC)])
def test_the_model_passed_in_is_left_as_it_was(data, config):
    model = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU(), mlp(24, 16, 8), nn.Dropout()).train()
    model[0].eval()
    model[1].eval()
    before, expected = snapshot(model), copy.deepcopy(model).eval()(X)
    qmodel = convert(model, data, config=config)
    assert snapshot(model) == before
    assert torch.equal(copy.deepcopy(model).eval()(X), expected)
    flags = [(name, module.training) for name, module in model.named_modules()]
    assert [(name, module.training) for name, module in qmodel.named_modules()] == flags
    assert not {id(p) for p in model.parameters()} & {id(p) for p in qmodel.parameters()}


# ---- the converted model ----


@by_activation
def test_copies_and_files_of_a_converted_model(config):
    model = Nested().eval()
    qmodel = convert(model, DATA, config=config)
    expected, state = qmodel(X), qmodel.state_dict()
    for again in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert torch.equal(again(X), expected)
        assert again.torchq_plan == qmodel.torchq_plan
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with warnings.catch_warnings():  # the missing weights come with the state_dict
        warnings.filterwarnings("ignore", "torchq.apply_plan: .* rounded with calibration data", UserWarning)
        other = apply_plan(Nested().eval(), qmodel.torchq_plan)
    assert not torch.equal(other(X), expected)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(X), expected)
    assert {key for key in state if key.startswith("stem.")} >= {"stem.weight_int8", "stem.weight_scale", "stem.bias"}
    assert state["stem.weight_int8"].dtype == torch.int8


@pytest.mark.slow(seconds=3)
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # inductor's own
@by_activation
def test_compiled_is_exact(config):
    torch.compiler.reset()
    qmodel = convert(mlp(24, 32, 32, 8), DATA, config=config)
    compiled = torch.compile(qmodel, fullgraph=True)
    for rows in (33, 5):
        assert torch.equal(compiled(X[:rows]), qmodel(X[:rows]))


# ---- a task ----


@pytest.fixture(scope="module")
def digits():
    """An MLP trained on 1347 of scikit-learn's digits, and the other 450 digits."""
    x, y, *others = load_digits()
    torch.manual_seed(0)
    model = mlp(64, 256, 256, 10).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with torch.enable_grad():
        for _ in range(120):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval(), x.split(100), *others


@by_activation
@pytest.mark.parametrize("weight", ["per_channel", "per_tensor"])
def test_digits_lose_less_than_a_point(digits, config, weight):
    model, batches, x, y = digits
    qmodel = convert(model, batches, config=QConfig(activation=config.activation, weight=weight))
    assert int8_names(qmodel) == ["0", "2", "4"]
    accuracy, quantized = ((m(x).argmax(1) == y).double().mean().item() for m in (model, qmodel))
    assert accuracy > 0.95
    assert quantized > accuracy - 0.01
    with simulate():
        simulated = qmodel(x).argmax(1)
    assert torch.equal(simulated, qmodel(x).argmax(1))
