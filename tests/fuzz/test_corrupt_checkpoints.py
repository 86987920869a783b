"""Corruptions of a checkpoint: an error that names the key and a model as it was, or exactly these values."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import bits
from helpers.fuzzing import MINUTES, seeds
from helpers.numbers import FLT_MAX, FLT_MIN, normal
from torchq import QConfig, QuantizedLinear, convert
from torchq.modules.int8_sequential import Int8Sequential
from torchq.numerics.qparams import QParams

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.slow(seconds=8)]

CORRUPTIONS = 10_000 if MINUTES else 2_000
DATA = [normal(40, 24, seed=i) for i in range(3)]
State = dict[str, Any]


def network() -> nn.Module:
    """Float modules, layers that pass codes, a bias and none, one layer under two names, and a channel scale."""
    last = nn.Linear(16, 16, bias=False)
    return nn.Sequential(
        nn.LayerNorm(24), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), last, nn.Tanh(), last
    ).eval()


def converted(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = network()
    qmodel = convert(model, DATA, config=QConfig(activation="static", rounding="nearest", smoothing="none"))
    of = {"input_qparams": qmodel[1].input_qparams, "fold": qmodel[1].fold, "channel_scale": 0.5 + torch.rand(24)}
    qmodel[1] = QuantizedLinear.from_float(model[1], **of)
    return qmodel


# ---- What can happen to a checkpoint ----


def one_bit(state: State, rng: random.Random) -> str:
    key = rng.choice(list(state))
    flat = state[key].clone().reshape(-1)
    flat.view(torch.uint8)[rng.randrange(flat.numel() * flat.element_size())] ^= 1 << rng.randrange(8)
    state[key] = flat.reshape(state[key].shape)
    return key


BAD_NUMBERS = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0, 1e-45, FLT_MAX, FLT_MIN, 1.0]


def a_number(state: State, rng: random.Random) -> str:
    key = rng.choice([key for key, t in state.items() if t.is_floating_point()])
    flat = state[key].clone().reshape(-1)
    flat[rng.randrange(flat.numel())] = rng.choice(BAD_NUMBERS)
    state[key] = flat.reshape(state[key].shape)
    return key


def a_zero_point(state: State, rng: random.Random) -> str:
    key = rng.choice([key for key in state if key.endswith("zero_point")])
    state[key] = torch.tensor(rng.choice([-1, 0, 7, 255, 256, -(2**31), 2**31 - 1]), dtype=torch.int32)
    return key


def another_shape(state: State, rng: random.Random) -> str:
    key = rng.choice(list(state))
    t = state[key]
    changes = [lambda: t[None], lambda: t.new_zeros(0), lambda: t.reshape(-1)[:-1], lambda: torch.stack([t, t])]
    state[key] = rng.choice(changes)()
    return key


def another_dtype(state: State, rng: random.Random) -> str:
    key = rng.choice(list(state))
    state[key] = state[key].to(rng.choice([torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]))
    return key


def no_tensor(state: State, rng: random.Random) -> str:
    key = rng.choice(list(state))
    state[key] = rng.choice([None, "weights", 1.0, [1, 2], state[key].tolist(), state[key].to("meta")])
    return key


def missing(state: State, rng: random.Random) -> str:
    key = rng.choice(list(state))
    del state[key]
    return key


def unexpected(state: State, rng: random.Random) -> str:
    key = rng.choice(list(state)) + rng.choice(["x", ".weight", "_scale"])
    state[key] = torch.ones(3)
    return key


def swapped(state: State, rng: random.Random) -> str:
    one, other = rng.sample(list(state), 2)
    state[one], state[other] = state[other], state[one]
    return one


CHANGES = [
    one_bit,
    one_bit,
    a_number,
    a_zero_point,
    another_shape,
    another_dtype,
    no_tensor,
    missing,
    unexpected,
    swapped,
]


# ---- What is right, said once more ----


def is_wrong(key: str, value: Any, right: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.is_meta or value.shape != right.shape:
        return True
    if value.dtype != right.dtype:
        return not key.startswith("0.")  # a float module, which takes any dtype
    if key.endswith("_scale"):
        return not bool(((value >= FLT_MIN) & (value <= FLT_MAX)).all())
    return key.endswith("zero_point") and not 0 <= int(value) <= 255


def wrong_keys(state: State, good: State) -> set[str]:
    """The keys for which this is no checkpoint of the model."""
    both = state.keys() & good.keys()
    return (state.keys() ^ good.keys()) | {key for key in both if is_wrong(key, state[key], good[key])}


def same_state(one: State, other: State) -> bool:
    same = [torch.equal(bits(one[key]), bits(other[key].to(one[key].dtype))) for key in one]
    return one.keys() == other.keys() and all(same)


def fresh(state: State, like: nn.Module) -> Tensor:
    """What a model of these values computes, of layers that are made of them."""

    def layer(name: str) -> QuantizedLinear:
        old, own = like.get_submodule(name), {key[len(name) + 1 :]: t for key, t in state.items() if key[0] == name}
        vectors = {"bias": own.get("bias"), "channel_scale": own.get("channel_scale")}
        new = QuantizedLinear(own["weight_int8"], own["weight_scale"], **vectors, fold=old.fold, dtype=old.dtype)
        if "input_scale" in own:
            new.input_qparams = QParams(float(own["input_scale"]), int(own["input_zero_point"]))
        return new

    x = nn.functional.layer_norm(DATA[0], (24,), *(state[f"0.{name}"].float() for name in ("weight", "bias")))
    last = layer("6")
    return Int8Sequential(layer("1"), nn.ReLU(), layer("3"), last, nn.Tanh(), last)(x)


def test_corrupt_checkpoints():
    model, other = converted(0), converted(1)
    before, good, y = copy.deepcopy(model.state_dict()), other.state_dict(), model(DATA[0])
    pairs = [(name, layer.feeds) for name, layer in model.torchq_plan.layers.items() if layer.feeds]
    assert pairs == [("1", "3"), ("3", "4"), ("4", "4")]
    assert all(model.torchq_plan.layers[name].is_int8 for name in ("1", "3", "4"))
    for seed in seeds():
        rng, loaded = random.Random(seed), 0
        for number in range(CORRUPTIONS):
            state = dict(good)
            key = rng.choice(CHANGES)(state, rng)
            wrong = wrong_keys(state, good)
            if wrong:
                with pytest.raises(RuntimeError, match="nothing of it was") as error:
                    model.load_state_dict(state)
                assert all(f"{key}:" in str(error.value) or f'"{key}"' in str(error.value) for key in wrong), key
                assert same_state(model.state_dict(), before), key
            else:
                loaded += 1
                model.load_state_dict(state)
                # Of one layer under two names the last name counts, as for nn.Linear.
                state |= {key: state["6" + key[1:]] for key in state if key[0] == "4"}
                assert same_state(model.state_dict(), state), key
                if number % 20 == 0:
                    assert torch.equal(bits(model(DATA[0])), bits(fresh(state, model))), key
                model.load_state_dict(before)
        assert torch.equal(model(DATA[0]), y)
        assert 0.1 * CORRUPTIONS < loaded < 0.5 * CORRUPTIONS
