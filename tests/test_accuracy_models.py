"""The networks and tables of benchmarks/accuracy.py: exact outlier twins, correct metrics, torchq auto on an MLP."""

import copy
import dataclasses
import math
from itertools import islice

import pytest
import torch
from torch import nn

import torchq
from benchmarks import accuracy, models
from benchmarks.accuracy_peers import CONTESTANTS, FLOAT, OURS, Task
from benchmarks.models import IGNORED, MASK, Batch, Recipe
from benchmarks.peers import Peer
from torchq.numerics.metrics import sqnr_db

SMALL = {  # a step or two of training: enough, unless the test is about accuracy
    "mlp": Recipe("mlp", width=64, depth=2, steps=2, batch=16, learning_rate=1e-3),
    "cnn": Recipe("cnn", width=32, depth=1, steps=2, batch=16, learning_rate=1e-3),
    "vit": Recipe("vit", width=32, depth=1, steps=2, batch=4, learning_rate=1e-3),
    "gpt": Recipe("gpt", width=32, depth=1, steps=2, batch=2, learning_rate=1e-3, context=128),
    "bert": Recipe("bert", width=32, depth=1, steps=2, batch=2, learning_rate=1e-3, context=128),
}


@pytest.fixture(scope="module")
def data() -> dict[str, models.Data]:
    return {kind: models.Data(kind, recipe.context) for kind, recipe in SMALL.items()}


@pytest.mark.parametrize("kind", SMALL)
def test_outlier_twin_computes_the_same_function(kind, data):
    """In float64 x · s · (w / s) rounds by about 1e-16 of x · w, which is 300 dB. A wrong factor gives about 0 dB."""
    model = models.trained(SMALL[kind], data[kind], progress=False).double()
    twin = models.with_outliers(model)
    inputs = next(data[kind].held_out(4)).inputs
    inputs = inputs.double() if inputs.is_floating_point() else inputs

    with torch.no_grad():
        assert sqnr_db(model(inputs), twin(inputs)) > 250


@pytest.mark.parametrize("kind", SMALL)
def test_outlier_twin_has_ranges_50_times_as_large(kind, data):
    """1 channel in 32 of a rescaled module's output is 50 times the model's; the others are equal to it."""
    model = models.network(SMALL[kind]).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):  # with offsets no channel is zero everywhere
            nn.init.uniform_(norm.bias, 0.1, 1.0)
    twin = models.with_outliers(model)
    inputs = next(data[kind].held_out(4)).inputs
    before, after = [outputs_of_producers(net, inputs) for net in (model, twin)]
    assert len(before) == {"mlp": 2, "cnn": 2}.get(kind, 3)

    for small, large in zip(before, after, strict=True):
        small, large = (each.movedim(1, -1) if kind == "cnn" else each for each in (small, large))
        ratios = (large / small).flatten(0, -2).nanmedian(dim=0).values  # 0 / 0 behind a ReLU
        outliers = (ratios - 50).abs() < 0.01
        assert torch.equal(outliers | ((ratios - 1).abs() < 0.01), torch.ones_like(outliers))
        assert int(outliers.sum()) == len(ratios) // 32


def outputs_of_producers(model: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    handles = [
        producer.register_forward_hook(lambda module, args, output: found.append(output))
        for producer, _ in models.rescalable(model)
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found


def test_check_twin_refuses_another_function(data):
    model = models.network(SMALL["gpt"]).eval()
    inputs = next(data["gpt"].held_out(2)).inputs
    twin = models.with_outliers(model)
    models.check_twin(model, twin, inputs)
    with torch.no_grad():
        twin.norm.weight[0] *= 50  # without the head's column

    with pytest.raises(RuntimeError, match="expected 100 dB or more"):
        models.check_twin(model, twin, inputs)


@pytest.mark.parametrize("kind", SMALL)
def test_training_is_reproducible(kind, data):
    first, second = (models.trained(SMALL[kind], data[kind], progress=False).state_dict() for _ in range(2))
    other = models.trained(dataclasses.replace(SMALL[kind], seed=1), data[kind], progress=False).state_dict()

    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_cache_holds_what_was_trained_and_knows_the_recipe(tmp_path, data, monkeypatch):
    recipe = SMALL["mlp"]
    model = models.load(recipe, data["mlp"], cache=tmp_path)
    monkeypatch.setattr(models, "trained", lambda *_: pytest.fail("trained again"))
    again = models.load(recipe, data["mlp"], cache=tmp_path)

    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not again.training
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        models.load(dataclasses.replace(recipe, steps=3), data["mlp"], cache=tmp_path)


def test_questions_about_text(data):
    """GPT predicts the next byte at every position; BERT only the masked bytes, about 15 %."""
    gpt, bert = (next(data[kind].batches("train", 64, seed=0)) for kind in ("gpt", "bert"))

    assert torch.equal(gpt.inputs[:, 1:], gpt.targets[:, :-1])
    asked = bert.targets != IGNORED
    assert torch.equal(asked, bert.inputs == MASK)
    assert not (bert.targets == MASK).any()
    assert 0.13 < float(asked.float().mean()) < 0.17  # 64 · 128 draws: a standard deviation of 0.004


def test_held_out_text_is_not_trained_on():
    train, test = (bytes(split.to(torch.uint8).tolist()) for split in models.standard_library())
    window = test[10_000 : 10_000 + 128]
    assert window in test
    assert window not in train


def test_gpt_sees_no_later_byte(data):
    model = models.network(SMALL["gpt"]).eval()
    inputs = next(data["gpt"].held_out(2)).inputs
    changed = inputs.clone()
    changed[:, 64:] = 1
    with torch.no_grad():
        assert torch.equal(model(inputs)[:, :64], model(changed)[:, :64])


@pytest.mark.slow(seconds=3)
def test_quick_mlp_evaluation_keeps_accuracy(data):
    """On real digits, with a second of training: torchq auto is within 0.5 points of float, on the twin within 1."""
    recipe = Recipe("mlp", width=128, depth=2, steps=150, batch=64, learning_rate=2e-3)
    model = models.trained(recipe, data["mlp"], progress=False)
    seen = [batch.inputs for batch in islice(data["mlp"].batches("train", 32, seed=1), 4)]
    asked = list(data["mlp"].held_out(32))
    contestants = [peer for peer in CONTESTANTS if peer.name.startswith("torchq") or peer.name == FLOAT]
    for net, allowed in ((model, 0.5), (models.with_outliers(model), 1.0)):
        found = accuracy.measure(Task("MLP", net, seen, asked), contestants, rounds=1)["contestants"]

        assert found[FLOAT]["accuracy"] > 90
        assert found[FLOAT]["sqnr_db"] == math.inf
        assert found[FLOAT]["accuracy"] - found[OURS]["accuracy"] <= allowed
        assert found[OURS]["sqnr_db"] > 20
        assert all(result["us"] > 0 for result in found.values())


@pytest.mark.slow(seconds=15)
def test_a_small_cnn_keeps_accuracy(data):
    """With batch norms, residuals and depthwise convolutions, on all digits: it loses at most 0.2 points, or 3 of 1797.

    So does its twin with outlier channels.
    """
    recipe = dataclasses.replace(models.RECIPES["digits CNN"], depth=1, steps=120)
    model = models.trained(recipe, data["cnn"], progress=False)
    seen = [batch.inputs for batch in islice(data["cnn"].batches("train", 32, seed=1), 6)]
    images, labels = (torch.cat(parts) for parts in zip(*data["cnn"].splits.values(), strict=True))
    with torch.no_grad():
        for net in (model, models.with_outliers(model)):
            qnet = torchq.convert(net, seen, progress=False)
            assert all(layer.is_int8 for layer in qnet.torchq_plan.layers.values())
            exact, int8 = net(images), qnet(images)
            right = [100 * float((logits.argmax(dim=1) == labels).float().mean()) for logits in (exact, int8)]
            assert right[0] > 95
            assert right[0] - right[1] <= 0.2
            assert sqnr_db(exact, int8) > 25


@pytest.mark.parametrize("name", models.RECIPES)
def test_every_network_has_tasks(name, monkeypatch):
    """The network as trained, and its twin, with the batches that were asked for."""
    untrained = models.network(models.RECIPES[name]).eval()
    monkeypatch.setattr(models, "load", lambda recipe, data: untrained)

    plain, twin = accuracy.tasks([name], 2, 1)

    assert (plain.name, twin.name) == (name, name + ", outliers")
    assert [len(task.calibration) for task in (plain, twin)] == [2, 2]
    assert plain.model is untrained
    assert len(plain.test) == 1


def test_score_counts_only_what_was_asked():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
    task = Task("t", nn.Identity(), [], [Batch(logits, torch.tensor([0, 0, IGNORED, 0]))])
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))

    found = accuracy.score(logits, task)

    assert found["accuracy"] == pytest.approx(100 * 2 / 3)
    assert found["perplexity"] == pytest.approx(math.exp((2 * right + wrong) / 3), rel=1e-6)


def test_contestant_that_cannot_run_is_a_line(capsys):
    def fail(task, x, threads):
        raise ValueError("no such op\nand a long trace")

    x = torch.eye(2)
    task = Task("t", nn.Identity(), [x], [Batch(x, torch.tensor([0, 1]))])
    contestants = [CONTESTANTS[0], Peer("broken: setting", True, fail)]

    result = accuracy.measure(task, contestants, rounds=1)

    assert result["contestants"]["broken: setting"] == {"error": "ValueError: no such op"}
    assert "t: broken: setting: skipped, ValueError: no such op\n" in capsys.readouterr().out
    assert "* broken: setting: skipped, ValueError: no such op" in accuracy.table(result)


def test_answers_are_those_to_each_batch():
    """Engines reuse one input and one output tensor, so every batch must be copied in and every answer copied out."""
    batches = [Batch(torch.full((1, 2), float(i)), torch.tensor([0])) for i in range(3)]
    x, y = torch.zeros(1, 2), torch.zeros(1, 2)

    found = accuracy.answers(lambda: y.copy_(x), x, Task("t", nn.Identity(), [], batches))

    assert found.tolist() == [[0, 0], [1, 1], [2, 2]]


def entry(sqnr: float, accuracy_: float, int8: bool = True) -> dict[str, object]:
    return {"sqnr_db": sqnr, "accuracy": accuracy_, "perplexity": 2.0, "int8": int8, "us": 5.0}


RESULTS = [
    {
        "model": name,
        "contestants": {
            FLOAT: entry(math.inf, 90.0, int8=False),
            OURS: entry(ours, 89.5),
            "peer a: x": entry(20.0, 80.0),
            "peer a: y": entry(30.0, 88.0),
            "peer b": {"error": "ImportError: b"},
        },
    }
    for name, ours in (("m", 36.0), ("m" + accuracy.TWIN, 28.0))
]


def test_summary_names_the_best_peer_and_the_gap():
    text = accuracy.summary(copy.deepcopy(RESULTS))

    assert "| m           | 36.0 dB     | peer a: y, 30.0 dB | +6.0 dB | +0.50       | +2.00  |" in text
    assert "+2.0 dB in the geometric middle, least -2.0 dB, behind on 1 of 2" in text
    assert "Most points of accuracy lost: +0.50 on the models, +0.50 on the outlier twins." in text


def test_table_shows_the_most_accurate_setting_first():
    lines = accuracy.table(copy.deepcopy(RESULTS[0])).splitlines()

    assert lines[0] == "### m"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:7]]
    assert rows[0] == [FLOAT, "-", "-", "90.00 %", "+0.00", "2.0000", "5 us"]
    assert rows[1] == [OURS, "-", "36.0 dB", "89.50 %", "+0.50", "2.0000", "5 us"]
    assert rows[2] == ["peer a", "y", "30.0 dB", "88.00 %", "+2.00", "2.0000", "5 us"]


def test_summary_without_a_peer_says_so():
    alone = [{"model": "m", "contestants": {FLOAT: entry(math.inf, 90.0, int8=False), OURS: entry(40.0, 90.0)}}]
    assert accuracy.summary(alone) == "No model was measured with both torchq auto and an int8 peer."
