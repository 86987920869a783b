"""Plans that are tried one after the other share the packed weights that they have in common."""

import dataclasses

import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq.planning.apply import applied
from torchq.planning.making import Sharing
from torchq.planning.plan import LayerPlan
from torchq.planning.rounding import plan_of
from torchq.planning.tables import tables_in_float


def packed_of(qmodel, name):
    return qmodel.get_submodule(name).packed.data_ptr()


def assert_as_without_sharing(model, plan, made):
    expected, found = applied(model, plan).state_dict(), made.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert_identical(found[key], value)


def network():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)).eval()


def test_layers_that_two_plans_have_alike_are_shared_and_others_not():
    model, data = network(), [normal(64, 3, 8, 8, seed=seed) for seed in range(4)]
    before = torchq.convert(model, data, config=torchq.QConfig(rounding="gptq", activation="static", fuse=False))
    plan = plan_of(before)
    assert plan.layers["4"].weights is not None
    layers = dict(plan.layers)
    layers["4"] = dataclasses.replace(layers["4"], rounding="nearest", weights=None)
    layers["6"] = dataclasses.replace(layers["6"], kind="int8 dynamic", input_qparams=None, observer=None)
    other = dataclasses.replace(plan, layers=layers)
    made = applied(model, other, make=Sharing(plan, before))
    assert [packed_of(made, name) == packed_of(before, name) for name in ("0", "2", "4", "6")] == [
        True,
        True,
        False,
        True,
    ]
    assert made[6].input_qparams is None
    assert before[6].input_qparams is not None
    assert_as_without_sharing(model, other, made)
    assert_identical(made(data[0]), applied(model, other)(data[0]))
    assert_identical(before(data[0]), applied(model, plan)(data[0]))


def test_what_was_float_or_scaled_otherwise_is_made_anew():
    model, data = network(), [normal(64, 3, 8, 8, seed=seed) for seed in range(4)]
    before = torchq.convert(model, data, config=torchq.QConfig(smoothing="none", fuse=False))
    plan = plan_of(before)
    layers = dict(plan.layers)
    scale = tuple(torch.linspace(0.5, 2.0, 128).tolist())
    plain = dataclasses.replace(layers["6"], kind="int8 dynamic", rounding="nearest", weights=None, input_qparams=None)
    layers["6"] = dataclasses.replace(plain, channel_scale=scale, observer=None)
    scaled = dataclasses.replace(plan, layers=layers)
    made = applied(model, scaled, make=Sharing(plan, before))
    assert packed_of(made, "6") != packed_of(before, "6")
    assert_as_without_sharing(model, scaled, made)
    in_float = dataclasses.replace(plan, layers={**plan.layers, "4": LayerPlan("float", "for this test")})
    floats = applied(model, in_float, make=Sharing(plan, before))
    assert_as_without_sharing(model, in_float, floats)
    assert_as_without_sharing(model, plan, applied(model, plan, make=Sharing(in_float, floats)))


class Tied(nn.Module):
    """An embedding with a table of its own, one that shares the head's, and the head."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(300, 64), nn.Embedding(256, 64), nn.Linear(64, 300)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.words(ids) + self.places(ids % 256))


def test_tables_are_shared_and_heads_keep_no_residual_of_a_table_in_float():
    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.arange(300).reshape(3, 100)
    before = torchq.convert(model, config=torchq.QConfig(embeddings=True))
    plan = plan_of(before)
    assert sorted(plan.int8_tables()) == ["places", "words"]
    again = applied(model, plan, make=Sharing(plan, before))
    assert packed_of(again, "places") == packed_of(before, "places")
    assert_as_without_sharing(model, plan, again)
    assert_identical(again(ids), before(ids))
    other = tables_in_float(plan, "for this test", "words", heads=False)
    made = applied(model, other, make=Sharing(plan, before))
    assert before.head.residual is not None
    assert made.head.residual is None
    assert packed_of(made, "head") == packed_of(before, "head")
    assert_as_without_sharing(model, other, made)
