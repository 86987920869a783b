"""A GPU in the machine: QAT trains there, int8 runs on the CPU alone, and every mix of the two is right or an error."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.kinds import MODELS, batches, int8_of, model_of
from helpers.numbers import normal
from torchq import QConfig, convert, prepare_qat, simulate
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device in this machine")
CUDA = torch.device("cuda")


EACH = pytest.mark.parametrize("name", MODELS)
WITH_AND_WITHOUT_DATA = pytest.mark.parametrize("calibrated", [False, True], ids=["without data", "calibrated"])


def assert_same_state(actual, expected):
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].device == value.device, key
        assert_identical(actual[key].cpu(), value.cpu(), key)


@pytest.fixture(autouse=True, scope="module")
def exact_products():
    """Float32 products of the GPU in float32, so that they can be compared."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@EACH
@WITH_AND_WITHOUT_DATA
def test_a_model_on_the_gpu_is_refused_and_stays_as_it_was(name, calibrated):
    model = model_of(name).to(CUDA)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = [x.to(CUDA) for x in batches(name)] if calibrated else None
    with pytest.raises(ValueError, match=r"cuda.*expected cpu.*\.cpu\(\)|cuda.*\.cpu\(\)"):
        convert(model, data, inplace=True, progress=False)
    with pytest.raises(ValueError, match="cuda"):
        prepare_qat(model, data, inplace=True, progress=False)
    assert_same_state(model.state_dict(), before)
    assert not hasattr(model, "torchq_plan")


@EACH
def test_batches_on_the_gpu_are_refused(name):
    model = model_of(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((RuntimeError, ValueError), match="cuda"):
        convert(model, [x.to(CUDA) for x in batches(name)], inplace=True, progress=False)
    assert_same_state(model.state_dict(), before)


@EACH
@WITH_AND_WITHOUT_DATA
def test_int8_moved_to_the_gpu_says_so_and_comes_back_to_the_bit(name, calibrated):
    qmodel, x = int8_of(name, calibrated), batches(name, 5)[-1]
    with torch.no_grad():
        expected = qmodel(x)
        moved = copy.deepcopy(qmodel).to(CUDA)
        for model, there in ((qmodel, CUDA), (moved, CUDA), (moved, "cpu")):
            with pytest.raises((RuntimeError, ValueError), match=r"runs on the CPU|same device"):
                model(x.to(there))
        assert_identical(qmodel(x), expected)
        assert {value.device.type for value in moved.state_dict().values()} == {"cuda"}
        assert_identical(moved.cpu()(x), expected)
        assert_same_state(moved.state_dict(), qmodel.state_dict())


@EACH
def test_weights_read_on_the_gpu_are_those_of_the_cpu(name):
    """What reads `layer.weight` of a module that was moved gets the dequantized weight there."""
    qmodel = int8_of(name, True)
    moved = copy.deepcopy(qmodel).to(CUDA)
    for (path, here), there in zip(qmodel.named_modules(), moved.modules(), strict=True):
        if isinstance(getattr(here, "weight", None), torch.Tensor):
            assert there.weight.device.type == "cuda", path
            assert torch.equal((there.weight * 1).cpu(), here.weight * 1), path


@EACH
def test_pinned_batches_count_as_any_other(name):
    data = [x.pin_memory() for x in batches(name)]
    usual, pinned = int8_of(name, True), convert(model_of(name), data, progress=False)
    assert_same_state(pinned.state_dict(), usual.state_dict())
    with torch.no_grad():
        assert_identical(pinned(data[0]), usual(batches(name)[0]))


@EACH
def test_a_default_device_and_the_gpus_autocast_change_no_bit(name):
    usual, x = int8_of(name, True), batches(name)[0]
    with torch.no_grad():
        expected = usual(x)
        model, data = model_of(name), batches(name)
        with torch.device(CUDA):
            qmodel = convert(model, data, progress=False)
            assert_identical(qmodel(x), expected)
        with torch.autocast("cuda", dtype=torch.float16):
            assert_identical(usual(x), expected)
            assert_same_state(convert(model, data, progress=False).state_dict(), usual.state_dict())
    assert_same_state(qmodel.state_dict(), usual.state_dict())


@EACH
def test_a_file_of_a_model_on_the_gpu_is_that_of_the_cpu(name, tmp_path):
    qmodel, x = int8_of(name, True), batches(name)[0]
    torchq.save(qmodel, tmp_path / "cpu.safetensors")
    moved = copy.deepcopy(qmodel).to(CUDA)
    torchq.save(moved, tmp_path / "gpu.safetensors")
    assert (tmp_path / "gpu.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()
    with torch.no_grad():
        assert_identical(torchq.load(tmp_path / "gpu.safetensors", model_of(name))(x), qmodel(x))
    again = model_of(name)
    with torch.device(CUDA), torch.no_grad():
        assert_identical(torchq.load(tmp_path / "cpu.safetensors", again)(x), qmodel(x))


@EACH
@pytest.mark.parametrize("scheme", ["static", "observed", "dynamic"])
def test_qat_trains_on_the_gpu_and_converts_on_the_cpu(name, scheme):
    data = batches(name)
    config = QConfig(activation="dynamic" if scheme == "dynamic" else "static")
    model = prepare_qat(
        model_of(name),
        data if scheme == "static" else None,
        config=config,
        ranges="observed" if scheme == "observed" else "auto",
        progress=False,
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin = copy.deepcopy(model)
    losses = {"cpu": _train(twin, data), "cuda": _train(model.to(CUDA), [x.to(CUDA) for x in data])}
    assert losses["cuda"][-1] < 0.9 * losses["cuda"][0]
    assert losses["cuda"][0] == pytest.approx(losses["cpu"][0], rel=1e-3)
    with torch.no_grad():
        there = model.eval()(data[0].to(CUDA)).cpu()
        model.cpu()
        here = model(data[0])
        assert sqnr_db(here, there) > 35, "the GPU sums in another order, so few codes differ"
        qmodel = convert(model, config=QConfig(attention="none"), progress=False)
        with simulate():
            y = qmodel(data[0])
        if name in ("conv2d", "mobile"):  # their norms have become part of the weights, which is another rounding
            assert sqnr_db(here, y) > 45
        else:
            assert_identical(y, here)
        assert sqnr_db(y, qmodel(data[0])) > 60


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EACH
def test_qat_under_the_gpus_autocast(name, dtype):
    data = batches(name)
    model = prepare_qat(model_of(name), data, progress=False).to(CUDA)
    moved = [x.to(CUDA) for x in data]
    with torch.no_grad():
        exact = model(moved[0])
        with torch.autocast("cuda", dtype=dtype):
            assert sqnr_db(exact, model(moved[0]).float()) > 20
    losses = _train(model, moved, dtype)
    assert losses[-1] < losses[0]


def test_a_qat_checkpoint_of_the_gpu_loads_on_the_cpu(tmp_path):
    data = batches("linear")
    model = prepare_qat(model_of("linear"), data, progress=False).to(CUDA)
    _train(model, [x.to(CUDA) for x in data])
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
    again = prepare_qat(model_of("linear"), data, progress=False)
    again.load_state_dict(torch.load(tmp_path / "checkpoint.pt", map_location="cpu"))
    with torch.no_grad():
        model.cpu().eval()
        assert_identical(again.eval()(data[0]), model(data[0]))
        assert_identical(pickle.loads(pickle.dumps(model))(data[0]), model(data[0]))


@EACH
def test_simulated_int8_runs_on_the_gpu_but_for_attention_and_curves(name):
    qmodel, x = int8_of(name, True), batches(name)[0]
    moved = copy.deepcopy(qmodel).to(CUDA)
    with simulate(), torch.no_grad():
        if name in ("encoder", "conv2d", "mobile", "bert"):
            with pytest.raises(RuntimeError, match=r"torchq::(attention|activate): int8 runs on the CPU"):
                moved(x.to(CUDA))
        else:
            assert sqnr_db(qmodel(x), moved(x.to(CUDA)).cpu()) > 35


def test_attention_on_the_gpu_is_refused():
    q = normal(1, 2, 8, 16).to(CUDA)
    with pytest.raises(RuntimeError, match="CPU"):
        torchq.ops.attention(q, q, q)


def _train(model, data, dtype=None, steps=30):
    """Trains towards arbitrary targets; gives the losses."""
    optimizer, losses = torch.optim.Adam(model.train().parameters(), lr=3e-3), []
    for step in range(steps):
        x = data[step % len(data)]
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype or torch.float16, enabled=dtype is not None):
            y = model(x)
        target = normal(*y.shape, seed=step % len(data)).tanh().to(y.device)
        loss = (y.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
