"""Bad input: each kind gets an error that says what is wrong, where, and what to do, and the model is as before."""

import threading

import pytest
import torch
from torch import nn

from helpers.compare import snapshot
from helpers.numbers import normal
from torchq import QConfig, convert, kernels

X = normal(6, 8)
STATIC, DYNAMIC = QConfig(activation="static", observer="minmax"), QConfig(activation="dynamic")


def poisoned(bad):
    x = X.clone()
    x[2, 3] = bad
    return x


class Model(nn.Module):
    """Has everything that a failure could leave changed: buffers, hooks, mixed training flags."""

    def __init__(self, rare=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)
        self.rare = rare
        self.body[2].register_forward_hook(lambda *_: None)
        self.body[3].eval()
        self.head.eval()

    def forward(self, x):
        return self.head(self.body(x))


class Overflows(Model):
    def forward(self, x):
        return self.head(self.body(x) / 0)


class Pairs(Model):
    def forward(self, x, y):
        return super().forward(x + y)


class Broken(Model):
    def forward(self, x):
        raise ArithmeticError("the model's own")


def partly_meta():
    return Model(rare=nn.Linear(8, 8, device="meta"))


def failing_loader():
    yield X
    raise OSError("the loader's own")


def used_up():
    iterator = iter([X])
    next(iterator)
    return iterator


# For each mistake: the model, the arguments of convert (inplace is added), and the error.
TABLE = {
    "a loader that yields nothing": (
        Model,
        lambda: {"calib_loader": []},
        ValueError,
        r"torchq.convert: calib_loader yielded no batch. Pass a loader with data .* or none at all for dynamic",
    ),
    "an iterator that is used up": (
        Model,
        lambda: {"calib_loader": used_up()},
        ValueError,
        r"calib_loader yielded no batch. .*\(an iterator can be used up only once\)",
    ),
    "a loader that is none": (
        Model,
        lambda: {"calib_loader": 5},
        TypeError,
        "torchq.convert: calib_loader must be an iterable of batches, got int",
    ),
    "a batch of an unknown type": (
        Model,
        lambda: {"calib_loader": [X, "text"]},
        TypeError,
        r"batch 1 of calib_loader is of type str; expected a tensor, a tuple or a dict. Pass forward=lambda",
    ),
    "a batch with too few elements": (
        Pairs,
        lambda: {"calib_loader": [(X,)]},
        ValueError,
        r"Pairs.forward requires 2 inputs, batch 0 of calib_loader has 1 elements. Pass forward=lambda",
    ),
    "a loader that fails": (Model, lambda: {"calib_loader": failing_loader()}, OSError, "^the loader's own$"),
    "a model that fails": (
        Broken,
        lambda: {"calib_loader": [X]},
        ArithmeticError,
        "^the model's own\ntorchq: raised by batch 0 of calib_loader, a float32 tensor ",
    ),
    "NaN in the data": (
        Model,
        lambda: {"calib_loader": [X, X, poisoned(torch.nan)]},
        ValueError,
        r"layer 'body.0' got an input that is not finite in batch 2 .*got 1 NaN or Inf among the 48.*leave this batch",
    ),
    "Inf in the data": (
        Model,
        lambda: {"calib_loader": [poisoned(-torch.inf)]},
        ValueError,
        "layer 'body.0' got an input that is not finite in batch 0 ",
    ),
    "NaN or Inf made inside the model": (
        Overflows,
        lambda: {"calib_loader": [X]},
        ValueError,
        r"layer 'head' got an input that is not finite in batch 0 .*got 48 NaN or Inf among the 48",
    ),
    "calibration data of a wrong inner size": (
        Model,
        lambda: {"calib_loader": [X, normal(6, 7)]},
        RuntimeError,
        r"mat1 and mat2 shapes cannot be multiplied \(6x7 and 8x8\)",
    ),
    "calibration data of a wrong dtype": (
        Model,
        lambda: {"calib_loader": [X.long()]},
        RuntimeError,
        "mat1 and mat2 must have the same dtype, but got Long and Float",
    ),
    "calibration data on a wrong device": (
        Model,
        lambda: {"calib_loader": [X.to("meta")]},
        RuntimeError,
        "Tensor on device .* is not on the expected device",
    ),
    "static, and a layer the data never reach": (
        lambda: Model(rare=nn.Linear(8, 8)),
        lambda: {"calib_loader": [X], "config": STATIC},
        ValueError,
        r"activation='static', but calib_loader never reached 'rare'. Pass data that .*, exclude them, or use .*'auto'",
    ),
    "static, and a layer that gets empty batches only": (
        Model,
        lambda: {"calib_loader": [X[:0]], "config": STATIC},
        ValueError,
        r"activation='static', but calib_loader never reached 'body.0'",
    ),
    "static without data": (
        Model,
        lambda: {"config": STATIC},
        ValueError,
        "activation='static' needs a calib_loader to find the ranges with",
    ),
    "a model on a wrong device": (
        lambda: Model().to("meta"),
        lambda: {"calib_loader": [X]},
        ValueError,
        r"layer 'body.0' is on device meta, expected cpu. Move .* model.cpu\(\), or, .* \(meta\), load them first",
    ),
    "one layer on a wrong device": (partly_meta, dict, ValueError, "layer 'rare' is on device meta, expected cpu"),
    "a converted model": (
        lambda: convert(Model()),
        lambda: {"calib_loader": [X]},
        ValueError,
        r"the model is already converted \('body.0' is a QuantizedLinear\)",
    ),
    "a model with no Linear": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 2, 1), nn.Sequential(nn.ReLU())),
        lambda: {"calib_loader": [X]},
        ValueError,
        "the model has no nn.Linear, .* to convert. Its modules are: ConvTranspose1d, ReLU, Sequential",
    ),
    "a config that is none": (
        Model,
        lambda: {"config": {"activation": "static"}},
        TypeError,
        "config must be a torchq.QConfig, got dict",
    ),
    "an unknown config value": (
        Model,
        lambda: {"config": QConfig(activation="int4")},
        ValueError,
        "QConfig: activation must be one of 'auto', 'static', 'dynamic', got 'int4'",
    ),
    "an exclude pattern that matches nothing": (
        Model,
        lambda: {"config": QConfig(exclude=("head", "haed"))},
        ValueError,
        r"exclude pattern 'haed' matches no nn.Linear, .* of the model. Its layers are 'body.0', 'body.4', 'head'\.",
    ),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", TABLE)
def test_convert_refuses_and_leaves_the_model_untouched(case, inplace):
    make, arguments, error, message = TABLE[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        convert(model, inplace=inplace, **arguments())
    assert snapshot(model) == before
    assert error in (OSError, ArithmeticError, RuntimeError) or str(caught.value).startswith(("torchq.", "QConfig: "))


def test_a_model_that_cannot_be_copied_can_be_converted_in_place():
    model = Model()
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"this Model cannot be copied \(TypeError: .*lock.*\). Pass inplace=True"):
        convert(model)
    assert type(model.head) is nn.Linear
    assert convert(model, inplace=True) is model


def test_what_is_no_model():
    for model, name in [(None, "NoneType"), ("model.pt", "str"), (Model, "type"), (X, "Tensor")]:
        with pytest.raises(TypeError, match=f"torchq.convert: model must be an nn.Module, got {name}"):
            convert(model)


def test_a_linear_cannot_replace_itself():
    layer = nn.Linear(8, 8)
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"inplace=True can't replace the model itself, an nn.Linear. Leave it out"):
        convert(layer, [X], inplace=True)
    assert snapshot(layer) == before


def test_the_deepest_layer_that_is_not_refused():
    """The sums reach 255 * 127 * 65793 < 2^31. Dequantizing them rounds at most 8 times, by 2^-24 each."""
    layer = nn.Linear(65_793, 2)
    layer.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    expected = torch.tensor([[65_793.0, -65_793.0]]) + layer.bias.detach()
    torch.testing.assert_close(convert(layer)(torch.ones(1, 65_793)), expected, rtol=8 * 2.0**-24, atol=0)


@pytest.mark.parametrize("config", [STATIC, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (normal(6, 7), r"the weight was packed for 8 input features, but x has 7 \(x: \(6, 7\)\)"),
        (normal(6, 2, 9), r"the weight was packed for 8 input features, but x has 9 \(x: \(6, 2, 9\)\)"),
        (X.double(), "x must be float32, bfloat16.*, got float64"),
        (X.long(), "x must be float32, bfloat16.*, got int64"),
        (X.to("meta"), "x is on meta, the packed weight on cpu. Move both to the CPU"),
        (torch.tensor(1.0), "x must have at least one dimension, got a scalar"),
    ],
    ids=["narrow", "wide", "float64", "int64", "device", "scalar"],
)
def test_a_converted_model_refuses_what_it_cannot_take(config, x, message):
    qmodel = convert(nn.Sequential(nn.Linear(8, 4)), [X] * 3, config=config)
    before = snapshot(qmodel)
    with pytest.raises(RuntimeError, match=rf"^torchq::linear_{config.activation}: {message}"):
        qmodel(x)
    assert snapshot(qmodel) == before


@pytest.mark.parametrize("config", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_bytes_of_the_user_are_not_taken_for_codes(config):
    """A uint8 image must not be taken for codes from a layer before. The float model refuses it too."""
    qmodel = convert(nn.Sequential(nn.Linear(8, 4)), [X] * 3, config=config)
    with pytest.raises((TypeError, RuntimeError), match=r"must be float32, bfloat16.*got (torch.)?uint8"):
        qmodel(torch.zeros(2, 8, dtype=torch.uint8))


def test_forcing_an_unknown_kernel():
    active = kernels.active()
    with pytest.raises(ValueError, match=r"kernels.use\(\): 'fast' is not a kernel. Compiled in: .*reference"):
        kernels.use("fast").__enter__()
    assert kernels.active() == active
