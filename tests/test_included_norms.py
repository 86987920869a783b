"""Norms of other classes than torch's that are a factor and an offset for each channel: known by what they compute."""

import dataclasses

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.convolutional import IMAGE, IMAGES, shaken
from helpers.numbers import normal
from torchq import QConfig, apply_plan, convert, plan_of
from torchq.modules.norms import IncludedNorm, factors, is_foldable
from torchq.numerics.metrics import sqnr_db

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.slow(seconds=6)]  # transformers is imported

CONFIG = QConfig(rounding="nearest", smoothing="none")
CHANNELS = 24


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d."""

    def __init__(self, channels=CHANNELS, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, 0.5 + torch.rand(channels))

    def forward(self, x):
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        variance, mean = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (variance + self.eps).rsqrt()
        return x * scale + (b - mean * scale)


class Detectron(Frozen):
    """As detectron2's, which takes another way where gradients are wanted."""

    def forward(self, x):
        if x.requires_grad:
            return x
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(CHANNELS, 1, 1), requires_grad=False)

    def forward(self, x):
        return x * self.gamma


class OwnBatchNorm(nn.BatchNorm2d):
    """A subclass that computes nothing else."""


def of_transformers():
    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

    norm = DetrFrozenBatchNorm2d(CHANNELS)
    for buffer in norm.buffers():
        buffer.copy_(0.5 + torch.rand(CHANNELS))
    return norm


NORMS = {
    "torchvision": Frozen,
    "detectron": Detectron,
    "transformers": of_transformers,
    "layer scale": LayerScale,
    "subclass": lambda: shaken(OwnBatchNorm(CHANNELS)),
}


class Block(nn.Module):
    """Its parts are called by name."""

    def __init__(self, norm, conv=None):
        super().__init__()
        self.conv, self.norm, self.act = conv or nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False), norm, nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_a_norm_is_known_by_what_it_computes(make):
    model = Block(make()).eval()
    gain, offset = factors(model.norm)
    x = normal(2, CHANNELS, 5, 4)
    torch.testing.assert_close(
        model.norm(x), x * gain.float().reshape(-1, 1, 1) + offset.float().reshape(-1, 1, 1), rtol=1e-5, atol=1e-5
    )
    qmodel = convert(model, IMAGES, config=CONFIG)
    plan = qmodel.torchq_plan.layers["conv"]
    assert (plan.norm, plan.activation) == ("norm", "act")
    assert type(qmodel.norm) is IncludedNorm
    exact = (model.conv.weight.double() * gain.reshape(-1, 1, 1, 1)).float()
    step = exact.abs().amax((1, 2, 3), keepdim=True) / 127
    assert bool(((qmodel.conv.weight - exact).abs() <= 0.51 * step).all())
    torch.testing.assert_close(qmodel.conv.bias.clone(), offset.float())
    assert sqnr_db(model(IMAGE), qmodel(IMAGE)) > 35
    assert_identical(apply_plan(model, plan_of(qmodel))(IMAGE), qmodel(IMAGE))


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_a_file_brings_it_back(make, tmp_path):
    """On the meta device nothing has values, and the norm is known all the same."""
    model = Block(make()).eval()
    qmodel = convert(model, IMAGES, config=CONFIG)
    torchq.save(qmodel, tmp_path / "m.safetensors")
    loaded = torchq.load(tmp_path / "m.safetensors", Block(make()).eval().to("meta"))
    assert_identical(loaded(IMAGE), qmodel(IMAGE))


class Loud(Frozen):
    def forward(self, x):
        print("called")
        return super().forward(x)


class Random(Frozen):
    def forward(self, x):
        return x * self.weight.reshape(1, -1, 1, 1) + torch.rand_like(x)


class Bounded(Frozen):
    def forward(self, x):
        return torch.clamp(x * self.weight.reshape(1, -1, 1, 1), -1e3, 1e3)


class Squared(Frozen):
    def forward(self, x):
        return x * x * self.weight.reshape(1, -1, 1, 1)


class OfTheBatch(Frozen):
    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True)


class ForPlaces(nn.Module):
    """A factor for each row of the image: of an input of rank 3, it would be one for each channel."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(20, 1), requires_grad=False)

    def forward(self, x):
        return x * self.gamma


class Counts(Frozen):
    def forward(self, x):
        self.calls = 1
        return x * self.weight.reshape(1, -1, 1, 1)


class Branches(Frozen):
    """Other values for large inputs."""

    def forward(self, x):
        return x * self.weight.reshape(1, -1, 1, 1) if x.abs().amax() < 100 else x


def watched():
    norm = Frozen()
    norm.register_forward_hook(lambda *_: None)
    return norm


def with_children():
    norm = Frozen()
    norm.extra = nn.Identity()
    return norm


def not_finite():
    norm = Frozen(eps=0.0)
    norm.running_var[3] = 0.0
    norm.weight[3] = 0.0  # 0 · inf
    return norm


OTHERS = [Loud, Random, Bounded, Squared, OfTheBatch, ForPlaces, Counts, Branches, watched, with_children]


@pytest.mark.parametrize("make", OTHERS, ids=lambda make: make.__name__)
def test_what_is_no_such_norm(make, capsys):
    model = Block(make()).eval()
    assert not is_foldable(model.norm, rank=4)
    assert capsys.readouterr().out == ""  # it was not run
    qmodel = convert(model, IMAGES, config=CONFIG)
    assert qmodel.torchq_plan.layers["conv"].norm is None
    assert type(qmodel.norm) is type(model.norm)


def test_factors_that_are_not_finite():
    qmodel = convert(Block(not_finite()).eval(), IMAGES, config=CONFIG, forward=lambda model, x: model.conv(x))
    assert qmodel.torchq_plan.layers["conv"].norm is None
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), not_finite()).eval()
    assert convert(model).torchq_plan.layers["0"].norm is None


def test_only_for_inputs_of_its_rank():
    """Behind a convolution over one dimension it gives a tensor of four."""
    model = nn.Sequential(nn.Conv1d(3, CHANNELS, 3), Frozen()).eval()
    assert is_foldable(model[1], 4)
    assert not is_foldable(model[1], 3)
    qmodel = convert(model)
    assert qmodel.torchq_plan.layers["0"].norm is None
    x = normal(1, 3, 9)
    assert qmodel(x).shape == model(x).shape == (1, CHANNELS, CHANNELS, 7)
    plan = plan_of(qmodel)
    plan.layers["0"] = dataclasses.replace(plan.layers["0"], norm="1")
    with pytest.raises(ValueError, match="'0' includes '1', which is no batch norm"):
        apply_plan(model, plan)


def test_a_backbone_of_transformers():
    from transformers import ResNetConfig, ResNetModel
    from transformers.models.detr.modeling_detr import replace_batch_norm

    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]}
    model = ResNetModel(ResNetConfig(**sizes)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            shaken(module)
    replace_batch_norm(model)
    data = [normal(2, 3, 64, 64, seed=i) for i in range(4)]
    qmodel = convert(model, data, config=CONFIG)
    layers = qmodel.torchq_plan.layers.values()
    assert len(layers) == 9
    assert all(layer.is_int8 and layer.norm is not None for layer in layers)
    exact, given = (m(data[0]).last_hidden_state for m in (model, qmodel))
    assert sqnr_db(exact, given) > 30
