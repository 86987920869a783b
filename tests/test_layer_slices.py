"""Layers of transformers on a few samples at a time: the bits of all samples at once, or no slices."""

import pytest
import torch

from helpers.compare import assert_identical
from helpers.decoders import int8
from helpers.encoder_forms import PICTURES, TEXTS, by_code, layers, padded
from helpers.numbers import normal
from helpers.self_attention import converted, int8_bert, outputs, tokens
from torchq import _C, kernels
from torchq.modules import layer_slices
from torchq.modules.layer_steps import LayerSteps

pytest.importorskip("transformers", reason="transformers is not installed")

WIDEST = 96 * 4  # bytes of a row of a layer's widest value, in the models of the helpers


@pytest.fixture
def sizes(monkeypatch):
    """How many samples the steps of a layer were run on, call by call."""
    found, run = [], LayerSteps.run

    def noting(self, calls):
        found.append(len(calls[0].x))
        return run(self, calls)

    monkeypatch.setattr(LayerSteps, "run", noting)
    return found


@pytest.fixture
def fit(monkeypatch):
    """Lets so many rows stay in L2, by whatever kernel."""
    threads = torch.get_num_threads()

    def set_rows(rows):
        fit = {kernels.active(): -(-rows * WIDEST // threads)}
        monkeypatch.setattr(layer_slices, "STAYS_IN_L2", fit)
        monkeypatch.setattr(layer_slices, "PAYS_FROM", 0)

    return set_rows


def assert_slices_are_exact(model, sizes, set_rows, rows, *args, **kwargs):
    expected = outputs(model, *args, **kwargs)
    sizes.clear()
    set_rows(rows)
    for one, other in zip(outputs(model, *args, **kwargs), expected, strict=True):
        if isinstance(one, torch.Tensor):
            assert_identical(one, other)


@pytest.mark.parametrize("name", TEXTS)
def test_slices_give_the_bits_of_all_samples(name, sizes, fit):
    model = converted(TEXTS[name]())
    assert_slices_are_exact(model, sizes, fit, 2 * 24, tokens(5, 24, seed=3))
    assert sizes == [2, 2, 1] * 2


@pytest.mark.parametrize(("samples", "expected"), [(12, [6, 6]), (13, [13])])
def test_activations_wait_in_each_slice_or_there_are_none(samples, expected, sizes, fit):
    model = converted(TEXTS["distilbert"]())  # 342 rows of 96 values wait, and 341 do not
    assert_slices_are_exact(model, sizes, fit, 6 * 60, tokens(samples, 60, seed=3))
    assert sizes == expected * 2


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_too(name, sizes, fit):
    pictures = [{"pixel_values": normal(8, 3, 32, 32, seed=seed)} for seed in range(3)]
    model = converted(PICTURES[name](), pictures)
    assert_slices_are_exact(model, sizes, fit, 18, normal(3, 3, 32, 32, seed=7))
    assert sizes == [1, 1, 1] * 2


def test_each_sample_has_its_own_mask(sizes, fit):
    mask = padded(4, 10)
    mask[3, 2:] = 0
    assert_slices_are_exact(int8_bert(), sizes, fit, 10, tokens(4, 10, seed=1), attention_mask=mask)
    assert sizes == [1] * 8


def test_a_mask_may_be_that_of_all_samples(sizes, fit):
    model, x = int8_bert(), normal(3, 5, 64)
    mask = normal(1, 1, 5, 5, seed=3) > -1
    layer = layers(model)[0]
    fit(5)
    with torch.inference_mode():
        assert_identical(layer(x, mask), by_code(model).encoder.layer[0](x, mask))
    assert sizes == [1, 1, 1]


def test_queries_and_keys_are_turned_by_the_angles_of_their_sample(sizes, fit):
    model, ids = int8(), tokens(3, 6, seed=2)
    places = torch.arange(6) + torch.tensor([[0], [5], [9]])
    assert_slices_are_exact(model, sizes, fit, 6, ids, position_ids=places, use_cache=False)
    assert sizes == [1, 1, 1] * len(layers(model))
    assert not torch.equal(
        outputs(model, ids, position_ids=places, use_cache=False)[0], outputs(model, ids, use_cache=False)[0]
    )


def test_a_cache_gets_the_keys_of_all_samples_at_once(sizes, fit):
    model = int8()
    assert_slices_are_exact(model, sizes, fit, 6, tokens(3, 6, seed=2), use_cache=True)
    assert sizes == [3] * len(layers(model))


def test_inputs_and_outputs_share_no_memory(fit):
    model, x = int8_bert(), normal(3, 5, 64)
    layer = layers(model)[0]
    fit(5)
    before = x.clone()
    with torch.inference_mode():
        y = layer(x)
        y.zero_()
    assert_identical(x, before)


@pytest.mark.parametrize(("rows", "samples"), [(4, 3), (15, 3), (100, 3)])
def test_no_slices_where_one_sample_does_not_fit_or_all_do(rows, samples, sizes, fit):
    model, x = int8_bert(), normal(samples, 5, 64)
    fit(rows)
    with torch.inference_mode():
        layers(model)[0](x)
    assert sizes == [samples]


def test_no_slices_of_small_values(sizes, fit, monkeypatch):
    model, x = int8_bert(), normal(3, 5, 64)
    fit(5)
    with torch.inference_mode():
        monkeypatch.setattr(layer_slices, "PAYS_FROM", 3 * 5 * WIDEST)
        layers(model)[0](x)
        monkeypatch.setattr(layer_slices, "PAYS_FROM", 3 * 5 * WIDEST - 1)
        layers(model)[0](x)
    assert sizes == [3, 1, 1, 1]


def test_no_slices_for_other_kernels(sizes, monkeypatch):
    monkeypatch.setattr(layer_slices, "PAYS_FROM", 0)
    monkeypatch.setattr(layer_slices, "STAYS_IN_L2", {"another": 1 << 10})
    with torch.inference_mode():
        layers(int8_bert())[0](normal(3, 5, 64))
    assert sizes == [3]


def test_no_slices_where_gradients_may_be_wanted(sizes, fit):
    model, x = int8_bert(), normal(3, 5, 64)
    layer = layers(model)[0]
    fit(5)
    assert_identical(layer(x), by_code(model).encoder.layer[0](x))
    assert sizes == [3]


def test_other_code_sees_all_samples(fit):
    class Centered(torch.nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    model, x = int8_bert(), normal(3, 5, 64)
    layer = layers(model)[0]
    layer.intermediate.intermediate_act_fn = Centered()
    fit(5)
    with torch.inference_mode():
        assert_identical(layer(x), by_code(model).encoder.layer[0](x))


def test_kernels_with_slices_exist():
    assert {*layer_slices.STAYS_IN_L2} <= {*_C.known_names()}
