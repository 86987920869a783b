"""convert() in several processes: each calibrates on its shard, and all end with the plan and the bits of one."""

import dataclasses
import datetime
import os
import re
import signal
import socket

import pytest
import torch
from torch import distributed, nn

from helpers import ROOT
from helpers.commands import start_code
from helpers.numbers import normal
from helpers.processes import together
from torchq import QConfig, convert, observers, prepare_qat
from torchq.calibration.peers import Peers
from torchq.calibration.record import Record
from torchq.calibration.sample import Sample

pytestmark = [
    pytest.mark.subprocess,
    pytest.mark.slow(seconds=40),
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch was built without gloo"),
]
SIZE = 3
STATIC = QConfig(activation="static", rounding="nearest", smoothing="none")
MINMAX = dataclasses.replace(STATIC, observer="minmax")
OBSERVERS = [name for name in observers.OBSERVERS if name != "moving_average"]  # its merge is another mean


class Net(nn.Module):
    """Two layers that share their input, one that only some batches reach, and an activation."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.rare = (nn.Linear(24, 16) for _ in range(3))
        self.act, self.head = nn.ReLU(), nn.Linear(16, 8)

    def forward(self, x):
        y = self.left(x) + self.right(x)
        if len(x) == 40:
            y = y + self.rare(x)
        return self.head(self.act(y))


def net():
    torch.manual_seed(7)
    return Net().eval()


def images():
    torch.manual_seed(8)
    layers = [nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 8)]
    return nn.Sequential(*layers).eval()


def pictures(rank):
    return [] if rank == 1 else [normal(24, 4, 8, 8, seed=10 * rank + i) + rank for i in range(2)]


def shard(rank):
    """Batches, so that each rank sees another end of the range; the last rank has none."""
    if rank == SIZE - 1:
        return []
    return [3 * normal(24 + 16 * rank, 24, seed=10 * rank + i) + (4 if rank else -4) for i in range(3 + rank)]


def union():
    return [batch for rank in range(SIZE) for batch in shard(rank)]


def state_of(qmodel):
    return qmodel.torchq_plan.to_dict(), qmodel.state_dict()


def failure(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def poisoned(rank):
    batches = [normal(24, 24, seed=i) for i in range(2)]
    if rank == 1:
        batches[1][3, 5] = float("nan")
    return batches


def scenarios(rank):
    """What each process returns, by name. All go through them in the same order."""
    group, found = distributed.group.WORLD, {}
    for name in OBSERVERS:
        config = dataclasses.replace(STATIC, observer=name)
        found[name] = state_of(convert(net(), shard(rank), config=config, group=group))
    found["auto"] = state_of(convert(net(), shard(rank), group=group))
    found["gptq"] = state_of(convert(net(), shard(rank), config=QConfig(rounding="gptq"), group=group))
    found["inplace"] = state_of(convert(net(), shard(rank), inplace=True, group=group))
    found["convolutions"] = state_of(convert(images(), pictures(rank), group=group))
    found["static convolutions"] = state_of(convert(images(), pictures(rank), config=MINMAX, group=group))
    found["no data"] = state_of(convert(net(), group=group))
    found["one batch each"] = state_of(convert(net(), [normal(64, 24, seed=rank)], group=group))
    part = distributed.new_group([0, 1])
    if rank < 2:
        found["a part of the processes"] = state_of(convert(net(), shard(1 - rank), config=STATIC, group=part))
    calls = []
    judged = convert(net(), shard(rank), evaluate=lambda model: calls.append(1) or 1.0, group=group)
    found["evaluated"], found["budget"] = len(calls), state_of(judged)
    found["QAT"] = {k: v for k, v in prepare_qat(net(), shard(rank), group=group).state_dict().items() if "range" in k}

    found["NaN"] = failure(lambda: convert(net(), poisoned(rank), group=group))
    found["empty"] = failure(lambda: convert(net(), [], group=group))
    other = net()
    with torch.no_grad():
        other.head.weight[3, 4] += rank == 1
    found["other model"] = failure(lambda: convert(other, shard(rank), group=group))
    config = QConfig(observer="mse" if rank else "minmax")
    found["other config"] = failure(lambda: convert(net(), shard(rank), config=config, group=group))
    fails = failure(lambda: convert(net(), shard(rank), evaluate=lambda model: "high", group=group))
    found["evaluate fails"] = fails
    found["QAT fails"] = failure(lambda: prepare_qat(net(), poisoned(rank), group=group))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return together(scenarios, SIZE, tmp_path_factory.mktemp("peers"))


def assert_same(one, other):
    plan, state = one
    other_plan, other_state = other
    assert plan == other_plan
    assert state.keys() == other_state.keys()
    assert all(torch.equal(value, other_state[key]) for key, value in state.items() if isinstance(value, torch.Tensor))


NAMES = [*OBSERVERS, "auto", "gptq", "inplace", "convolutions", "no data", "one batch each", "budget"]


@pytest.mark.parametrize("name", NAMES)
def test_every_process_ends_with_the_same_plan_and_bits(found, name):
    for other in found[1:]:
        assert_same(found[0][name], other[name])


@pytest.mark.parametrize("name", OBSERVERS)
def test_static_ranges_are_those_of_one_process_on_all_the_data(found, name):
    """Histograms merge exactly, so ranges and codes are the same to the bit, whatever the observer."""
    config = dataclasses.replace(STATIC, observer=name)
    plan, state = state_of(convert(net(), union(), config=config))
    layers, wanted = found[0][name][0]["layers"], plan["layers"]
    assert {key: layer["input_qparams"] for key, layer in layers.items()} == {
        key: layer["input_qparams"] for key, layer in wanted.items()
    }
    assert layers["left"]["input_qparams"] is not None
    assert_same(({}, found[0][name][1]), ({}, state))


def test_static_convolutions_are_those_of_one_process(found):
    """Each with the norm behind it, which every process folds."""
    one = convert(images(), [each for rank in range(SIZE) for each in pictures(rank)], config=MINMAX)
    layers = found[0]["static convolutions"][0]["layers"]
    assert {layer["kind"] for layer in layers.values()} == {"int8 static"}
    assert_same(({}, found[0]["static convolutions"][1]), ({}, one.state_dict()))


def test_what_is_measured_is_what_one_process_measures(found):
    """Samples have room for all of these rows, so only the order of float sums differs. And XᵀX has more rows.

    One process adds up the first 4 K rows, each of many its own first 4 K: here 64 and 48 + 40.
    """
    one = convert(net(), union()).torchq_plan
    many = type(one).from_dict(found[0]["auto"][0])
    assert many.layers.keys() == one.layers.keys()
    for name, layer in many.layers.items():
        wanted = one.layers[name]
        assert (layer.kind, layer.observer, layer.alpha) == (wanted.kind, wanted.observer, wanted.alpha)
        for candidate in wanted.sqnr_db.keys() - {"gptq"}:
            assert layer.sqnr_db[candidate] == pytest.approx(wanted.sqnr_db[candidate], abs=1e-3), (name, candidate)
        assert layer.gptq_db == pytest.approx(wanted.gptq_db, abs=1.0), name
    assert many.checked.apart


def test_layers_that_share_their_input_are_recorded_together(found):
    layers = found[0]["minmax"][0]["layers"]
    assert layers["left"]["input_qparams"] == layers["right"]["input_qparams"]
    assert layers["left"]["input_qparams"] != layers["rare"]["input_qparams"]


def test_a_layer_that_one_process_alone_reaches_has_its_range(found):
    """And it is no reason for another process to keep it in float."""
    lo = min(float(batch.min()) for batch in shard(1))
    hi = max(float(batch.max()) for batch in shard(1))
    scale, _ = found[0]["minmax"][0]["layers"]["rare"]["input_qparams"]
    assert scale == pytest.approx((hi - lo) / 255, rel=1e-6)


def test_a_group_of_some_of_the_processes(found):
    one, other = (each["a part of the processes"] for each in found[:2])
    assert_same(one, other)
    assert "a part of the processes" not in found[2]


def test_one_process_evaluates(found):
    assert [each["evaluated"] > 0 for each in found] == [True, False, False]


def test_one_batch_each_is_enough_to_judge_by_another_one(found):
    checked = found[0]["one batch each"][0]["checked"]
    assert checked["apart"]
    assert checked["batches"] == 1


def test_qat_begins_with_the_ranges_of_all_the_data(found):
    wanted = {k: v for k, v in prepare_qat(net(), union()).state_dict().items() if "range" in k}
    assert wanted
    for each in found:
        assert each["QAT"].keys() == wanted.keys()
        assert all(torch.equal(each["QAT"][key], value) for key, value in wanted.items())


@pytest.mark.parametrize("function", ["convert", "prepare_qat"])
def test_an_error_in_one_process_is_told_in_all(found, function):
    name = "NaN" if function == "convert" else "QAT fails"
    assert found[1][name].startswith(f"ValueError: torchq.{function}: layer 'left' got an input that is not finite")
    for rank in (0, 2):
        start = f"RuntimeError: torchq.{function}: process 1 of 3 failed: ValueError: layer 'left' got an input"
        assert found[rank][name].startswith(start)


def test_an_error_of_the_one_that_decides_is_told_in_all(found):
    assert found[0]["evaluate fails"].startswith("TypeError: torchq.convert: evaluate must return a number")
    for rank in (1, 2):
        start = "RuntimeError: torchq.convert: process 0 of 3 failed: TypeError: torchq.convert: evaluate must"
        assert found[rank]["evaluate fails"].startswith(start)


def test_models_and_configs_must_be_the_same(found):
    for each in found:
        assert "but the tensor 'head.weight' is not the same in process 1 as in process 0" in each["other model"]
        assert "but the config is not the same in process 1 as in process 0" in each["other config"]
        assert each["empty"].startswith("ValueError: torchq.convert: calib_loader yielded no batch")
        assert "In none of the 3 processes" in each["empty"]


# ---- Processes that are lost ----


def dying_batches(rank):
    yield normal(24, 24)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    yield normal(24, 24)


def lose(rank):
    """First a group of two, one of which never comes; then all, one of which is killed."""
    two = distributed.new_group([0, 1], timeout=datetime.timedelta(seconds=1))
    silent = None
    if rank == 0:
        silent = failure(lambda: convert(net(), shard(0), group=two))
    distributed.barrier()
    return silent, failure(lambda: convert(net(), dying_batches(rank), group=distributed.group.WORLD))


def test_a_process_that_hangs_or_dies_is_named(tmp_path):
    *alive, dead = together(lose, SIZE, tmp_path)
    assert dead is None
    assert alive[0][0].startswith(
        "RuntimeError: torchq.convert: process 1 of 2 failed: process 1 of 2 died, or did not"
    )
    for _, error in alive:
        assert error.startswith("RuntimeError: torchq.convert: process 2 of 3 failed: process 2 of 3 died, or did not")


# ---- One process ----


@pytest.mark.parametrize("group", ["world", 3])
def test_a_group_that_is_none_is_refused(group):
    with pytest.raises(TypeError, match=r"torchq\.convert: group must be a process group of torch\.distributed"):
        convert(net(), group=group)


def test_alone_nothing_is_sent():
    with Peers(None, net()) as peers:
        evidence = object()
        assert peers.merged(evidence, data=True) is evidence


@pytest.mark.parametrize("rounding", ["auto", "gptq"])
def test_a_merged_record_is_that_of_all_rows(rounding):
    config, rows = QConfig(rounding=rounding), normal(60, 8)
    parts = [rows[:20], rows[20:50], rows[50:]]  # 4 K = 32 rows are enough for XᵀX
    whole = Record.empty(8, config)
    one, other = Record.empty(8, config), Record.empty(8, config)
    for i, part in enumerate(parts):
        whole.observe(part, i)
        (other if i == 2 else one).observe(part, i)
    one.merge(other)
    one.merge(Record.empty(8, config))
    assert (one.calls, one.held_rows, one.sample.rows_seen) == (whole.calls, whole.held_rows, 60)
    assert torch.equal(one.extremes, whole.extremes)
    assert all(torch.equal(value, whole.observer.state_dict()[key]) for key, value in one.observer.state_dict().items())
    used = [parts[0], parts[2]] if rounding == "auto" else [rows[:32], parts[2]]
    assert one.gram_rows == sum(map(len, used))
    assert torch.allclose(one.products(), torch.cat(used).T @ torch.cat(used), atol=1e-4)
    if rounding == "gptq":  # rows held out are subtracted from XᵀX, where they are part of it: these must be known
        inside = one.sample.rows[one.sample.positions < one.gram_rows]
        assert torch.equal(inside.sum(1).sort().values, torch.cat(used).sum(1).sort().values)


def test_a_merged_sample_is_uniform():
    """Of 300 and 100 rows, 64 are kept: a quarter of the second stream's, on average over many seeds."""
    shares = []
    for seed in range(200):
        one, other = Sample(64), Sample(64)
        one._generator.manual_seed(seed)
        one.add(torch.zeros(300, 1))
        other.add(torch.ones(100, 1), batch=1)
        one.merge(other, first=10, others_first=5)
        assert one.rows_seen == 400
        assert len(one.rows) == 64
        assert one.positions.unique().numel() == 64
        mine = one.rows.flatten() == 0
        assert torch.equal(one.held_out, ~mine)
        positions = one.positions[mine]  # 0 to 9, and from 15 on
        assert bool(((positions < 10) | ((positions >= 15) & (positions < 305))).all())
        positions = one.positions[~mine]
        assert bool((((positions >= 10) & (positions < 15)) | (positions >= 305)).all())
        shares.append(float(one.rows.mean()))
    # The count has a standard deviation of 64 · sqrt(¼ · ¾ / 64 · 336 / 399) = 3.2, its mean over 200 one of 0.22.
    assert 64 * sum(shares) / 200 == pytest.approx(16, abs=5 * 0.22)


def test_a_merged_sample_that_has_room_has_all_rows():
    one, other, empty = Sample(8), Sample(8), Sample(8)
    one.add(torch.tensor([[1.0], [2.0]]))
    other.add(torch.tensor([[3.0]]))
    empty.merge(one)
    empty.merge(other)
    empty.merge(Sample(8))
    assert empty.rows.flatten().tolist() == [1.0, 2.0, 3.0]
    assert empty.positions.tolist() == [0, 1, 2]


# ---- torchrun ----


def test_the_program_of_the_page_runs_under_torchrun(tmp_path):
    """With the variables that it sets. Itself it starts an example, in test_examples.py."""
    (page,) = re.findall(
        r'```python title="calibrate.py"\n(.*?)```', (ROOT / "docs/distributed.md").read_text(), re.DOTALL
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    files = [[tmp_path / f"{rank}.{name}" for name in ("out", "err")] for rank in range(2)]
    code = f"import os, torch; os.chdir({str(tmp_path)!r}); torch.set_num_threads(1)\n{page}"
    processes = [start_code(code, files[rank], {**shared, "RANK": str(rank)}) for rank in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], [err.read_text() for _, err in files]
    assert "".join(out.read_text() for out, _ in files).count("whole model: ") == 1  # one report
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert state["0.weight_int8"].shape == (256, 64)
