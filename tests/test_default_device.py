"""`torch.device(...)` and `torch.set_default_device`, modes which see each function of torch, change no int8 model."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from helpers.compare import assert_identical
from helpers.kinds import MODELS, batches, int8_of, model_of
from torchq import _C, convert

EACH = pytest.mark.parametrize("name", MODELS)


class Mode(TorchFunctionMode):
    """Somebody's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@EACH
@pytest.mark.parametrize("calibrated", [False, True], ids=["without data", "calibrated"])
def test_an_int8_model_computes_the_same_bits(name, calibrated):
    qmodel, x = int8_of(name, calibrated), batches(name, 5)[-1]
    with torch.no_grad():
        expected = qmodel(x)
        with torch.device("meta"):
            assert_identical(qmodel(x), expected)
    with torch.inference_mode(), torch.device("meta"):
        assert_identical(qmodel(x), expected)


@EACH
def test_convert_gives_the_same_model(name):
    usual, model, data = int8_of(name, True), model_of(name), batches(name)
    with torch.device("meta"):
        qmodel = convert(model, data, progress=False)
    assert list(qmodel.state_dict()) == list(usual.state_dict())
    for key, value in usual.state_dict().items():
        assert_identical(qmodel.state_dict()[key], value, key)


def test_default_devices_are_no_modes():
    assert _C.function_modes() == 0
    with torch.device("meta"):
        assert _C.function_modes() == 0
        with Mode(), torch.device("cpu"):
            assert _C.function_modes() == 1
    torch.set_default_device("cpu")
    try:
        assert _C.function_modes() == 0
    finally:
        torch.set_default_device(None)


def test_what_somebody_derives_from_one_is_a_mode():
    class Own(DeviceContext):
        pass

    with Own(torch.device("cpu")):
        assert _C.function_modes() == 1


def test_a_layer_keeps_its_short_way():
    """In a default device, too, an eager call of a plain tensor goes past the dispatcher. A mode would see it there."""
    layer, x = int8_of("linear", False)[0], batches("linear")[0]
    with torch.no_grad(), torch.device("cpu"):
        assert _C.call_linear(layer, type(layer), x) is not NotImplemented
        with Mode():
            assert _C.call_linear(layer, type(layer), x) is NotImplemented
