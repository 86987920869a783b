"""convert() in one thread while others serve, or convert: nobody sees or disturbs the other."""

import copy
import threading

import pytest
import torch
from torch import nn

from helpers.numbers import normal
from torchq import convert
from torchq.calibration.isolation import in_eval_mode, taking_turns, uncompiled, without_fast_path

pytestmark = pytest.mark.usefixtures("seeded")

DATA = [normal(32, 24, seed=i) for i in range(4)]


def chain():
    return nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8)).eval()


def in_thread(function):
    """Runs it in a thread of its own, to the end, and raises what it raised."""
    errors = []

    def run():
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in errors:
        raise error


def served_between(model, x):
    """The loader of DATA; before each batch and after the last, another thread calls the model with x."""
    for batch in DATA:
        in_thread(lambda: model(x))
        yield batch
    in_thread(lambda: model(x))


@pytest.mark.parametrize("x", [normal(40, 24) * 1e4, torch.full((2, 24), torch.nan)], ids=["large", "nan"])
def test_calls_of_other_threads_are_no_calibration_data(x):
    model = chain()
    quiet, served = convert(model, DATA), convert(model, served_between(model, x))
    assert served.torchq_plan == quiet.torchq_plan
    states = quiet.state_dict(), served.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_serving_during_a_forward_of_the_conversion():
    """In the middle of a batch: what dataflow thinks of the calls under way is not theirs."""
    model = chain()

    def forward(model, batch):
        x = model[0](batch)
        in_thread(lambda: model(batch * 100))
        return model[1:](x)

    quiet = convert(model, DATA, forward=lambda model, batch: model[1:](model[0](batch)))
    assert convert(model, DATA, forward=forward).torchq_plan == quiet.torchq_plan


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_overlapping_conversions_leave_switches_as_they_were(enabled, first_leaves_first):
    before, model = torch.backends.mha.get_fastpath_enabled(), chain()
    model.train()
    model[2].eval()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        runs = [(without_fast_path(), in_eval_mode(model)) for _ in range(2)]
        for run in runs:
            for each in run:
                each.__enter__()
        for run in runs if first_leaves_first else reversed(runs):
            assert not torch.backends.mha.get_fastpath_enabled()
            assert not any(module.training for module in model.modules())
            for each in run:
                each.__exit__(None, None, None)
        assert torch.backends.mha.get_fastpath_enabled() == enabled
        assert [module.training for module in model] == [True, True, False, True]
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_overlapping_conversions_leave_compiled_parts_as_they_were(first_leaves_first):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled, runs = torch.compile(chain(), backend=backend), [uncompiled() for _ in range(2)]
    for run in runs:
        run.__enter__()
    for run in runs if first_leaves_first else reversed(runs):
        compiled(DATA[0])
        assert graphs == []
        run.__exit__(None, None, None)
    compiled(DATA[0])
    assert len(graphs) == 1


def test_threads_that_convert_one_model_get_what_one_alone_gets():
    """They take turns: a copy would hold the other's hooks, and a layer with hooks stays in float."""
    model, results = chain(), []
    alone = convert(model, DATA).torchq_plan
    threads = [threading.Thread(target=lambda: results.append(convert(model, DATA))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [qmodel.torchq_plan == alone for qmodel in results] == [True] * 4
    assert not any(module._forward_pre_hooks for qmodel in (model, *results) for module in qmodel.modules())


def test_turns_are_for_models_that_share_a_module():
    model, waits, entered = chain(), threading.Event(), threading.Event()

    def other():
        with taking_turns(chain()):  # shares nothing
            waits.set()
        with taking_turns(nn.Sequential(model[1])):
            entered.set()

    thread = threading.Thread(target=other)
    with taking_turns(model), taking_turns(model):  # one thread may nest them
        thread.start()
        assert waits.wait(60)
        assert not entered.wait(0.1)
    thread.join(60)
    assert entered.is_set()


def test_a_failed_conversion_lets_the_next_have_its_turn():
    model = chain()
    with pytest.raises(ValueError, match="not finite in batch 1"):
        convert(model, [DATA[0], torch.full((2, 24), torch.nan)])
    in_thread(lambda: convert(model, DATA))


def test_a_conversion_may_convert_in_its_loader_and_in_its_metric():
    """In the same thread: of the same model too."""
    model = chain()

    def evaluate(candidate):
        convert(copy.deepcopy(model), DATA)
        return 1.0

    assert convert(model, DATA, evaluate=evaluate).torchq_plan.frontier.chosen == 0
