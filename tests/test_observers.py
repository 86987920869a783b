"""Observers: their ranges, exact merging, constant memory, and where clipping wins and where it loses."""

import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchq import observers
from torchq.observers import (
    OBSERVERS,
    Histogram,
    MinMaxObserver,
    MovingAverageObserver,
    PercentileObserver,
    make_observer,
)
from torchq.qparams import choose_qparams, fake_quantize, sqnr_db

FLT_MAX = torch.finfo(torch.float32).max
CLASSES = [MinMaxObserver, MovingAverageObserver, Histogram, PercentileObserver]

every_class = pytest.mark.parametrize("cls", CLASSES)
repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=150)
batches_of_floats = st.lists(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=8), min_size=1, max_size=6
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observed(observer, *batches):
    for batch in batches:
        observer.observe(torch.as_tensor(batch, dtype=torch.float32))
    return observer


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- what all have in common ----


@every_class
def test_every_observer_keeps_count_and_extremes(cls):
    observer = observed(cls(), [[-1.5, 2.0]], [], 7.0, torch.empty(0, 3))
    assert observer.count == 3
    assert observer.seen == (-1.5, 7.0)


@every_class
@pytest.mark.parametrize("values", [[1.0, 2.0], [-2.0, -1.0], [-1.0, 3.0], [0.0], [-0.0]], ids=str)
def test_range_contains_zero_and_qparams_follow_it(cls, values):
    observer = observed(cls(), values)
    lo, hi = observer.range()
    assert lo <= 0 <= hi
    ends = torch.tensor([lo, hi], dtype=torch.float32)
    for dtype, symmetric in itertools.product([torch.int8, torch.uint8], [True, False]):
        pair = observer.qparams(dtype=dtype, symmetric=symmetric)
        assert pair == choose_qparams(ends, dtype=dtype, symmetric=symmetric)
        assert pair[0].shape == pair[1].shape == ()
    assert observer.qparams() == observer.qparams(dtype=torch.uint8, symmetric=False)


@every_class
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_taken_as_float32(cls, dtype):
    x = normal(3, 40).to(dtype)
    observer = cls()
    observer.observe(x.T)  # not contiguous
    observer.observe(x.requires_grad_())
    assert same_state(observer, observed(cls(), x.detach().float().T, x.detach().float()))


@every_class
def test_state_survives_a_file_and_goes_on(cls):
    observer = observed(cls(), normal(50), 3 * normal(50, seed=1))
    file = io.BytesIO()
    torch.save(observer.state_dict(), file)
    file.seek(0)
    loaded = cls()
    state = torch.load(file, weights_only=True)
    loaded.load_state_dict(state)
    for tensor in [*state.values(), *observer.state_dict().values()]:
        tensor.zero_()  # neither is shared with an observer
    assert same_state(loaded, observer)
    assert loaded.range() == observer.range()
    for each in (observer, loaded):
        observed(each, 100 * normal(50, seed=2))
    assert same_state(loaded, observer)
    assert loaded.count == 150


@every_class
def test_memory_does_not_grow(cls):
    """Neither the state nor anything else the object holds: 500 batches over 30 orders of magnitude."""
    observer = observed(cls(), normal(10))
    state = sum(tensor.nbytes for tensor in observer.state_dict().values())
    everything = len(pickle.dumps(observer))
    for i in range(500):
        observer.observe(normal(10, seed=i) * 10.0 ** (i % 30))
    assert sum(tensor.nbytes for tensor in observer.state_dict().values()) == state
    assert len(pickle.dumps(observer)) <= everything + 64  # integers take more bytes as they grow


@every_class
def test_batches_from_inference_mode_mix_with_others(cls):
    with torch.inference_mode():
        observer = observed(cls(), normal(10))
    observed(observer, normal(10, seed=1))
    assert same_state(observer, observed(cls(), normal(10), normal(10, seed=1)))


@every_class
def test_merging_with_nothing_changes_nothing(cls):
    observer, reference = observed(cls(), normal(9)), observed(cls(), normal(9))
    observer.merge(cls())
    assert same_state(observer, reference)
    empty = cls()
    empty.merge(cls())
    empty.merge(observer)
    assert same_state(empty, reference)
    assert same_state(observer, reference)


@pytest.mark.parametrize("cls", [MinMaxObserver, Histogram, PercentileObserver])
@repeatable
@given(batches_of_floats, st.randoms(use_true_random=False))
def test_merge_is_exact_in_every_order(cls, batches, random):
    """One stream, another order, one observer per batch: the same state, to the last count."""
    whole = observed(cls(), *batches)
    assert same_state(observed(cls(), [value for batch in batches for value in batch]), whole)
    parts = [observed(cls(), batch) for batch in batches]
    random.shuffle(parts)
    while len(parts) > 1:
        parts[0].merge(parts.pop())
        random.shuffle(parts)
    assert same_state(parts[0], whole)


# ---- moving average ----


def test_moving_average_by_hand():
    observer = observed(MovingAverageObserver(momentum=0.5), [-1.0, 1.0], [-3.0, 5.0])
    assert observer.range() == (-2.0, 3.0)
    assert observer.seen == (-3.0, 5.0)
    observed(observer, [0.0, 1.0])
    assert observer.range() == (-1.0, 2.0)
    assert observed(MovingAverageObserver(momentum=0), [-9.0, 9.0], [-1.0, 2.0]).range() == (-1.0, 2.0)


def test_moving_average_merges_by_number_of_batches():
    a = observed(MovingAverageObserver(), [-1.0, 1.0])
    b = observed(MovingAverageObserver(), [-5.0, 9.0], [-5.0, 9.0], [-5.0, 9.0])
    a.merge(b)
    assert (a.range(), a.batches, a.count, a.seen) == ((-4.0, 7.0), 4, 8, (-5.0, 9.0))


# ---- histogram ----


def direct_counts(x, bins, exponent):
    """Every value binned on its own, in Python's float64: the power of two makes the product exact."""
    counts = [0] * bins
    for value in x.tolist():
        counts[math.floor(value * 2.0**-exponent * (bins // 2)) + bins // 2] += 1
    return torch.tensor(counts)


@pytest.mark.parametrize("bins", [2, 4, 6, 64, 2048])
@pytest.mark.parametrize("spread", [1e-44, 1e-38, 1e-3, 1.0, 1e30])
def test_histogram_counts_like_direct_binning(bins, spread):
    x = (normal(300).double() * spread).float()
    histogram = observed(Histogram(bins), *x.split(7))
    assert 2.0 ** (histogram.exponent - 1) <= x.abs().max() < 2.0**histogram.exponent
    assert torch.equal(histogram.counts, direct_counts(x, bins, histogram.exponent))


def test_values_on_the_edges_of_bins():
    """An edge belongs to the bin above it, the float just below it does not, whatever the limit."""
    edges = torch.arange(-8, 8).float() / 8
    below = torch.from_numpy(np.nextafter(edges.numpy(), np.float32(-2), dtype=np.float32))
    below[0] = 0.5  # -1 is the lower limit, nothing is below it
    x = torch.cat([edges, below])[1:]  # without -1, whose magnitude would double the limit
    histogram = observed(Histogram(16), x)
    assert histogram.exponent == 0
    assert histogram.counts.tolist() == [1] + [2] * 11 + [3] + [2] * 2 + [1]
    for limit in (1.0, 2.0, 4.0, 1e4, FLT_MAX):
        observed(histogram, [limit])
        x = torch.cat([x, torch.tensor([limit])])
        assert torch.equal(histogram.counts, direct_counts(x, 16, histogram.exponent))


def test_extreme_exponents():
    smallest = 2.0**-149
    histogram = observed(Histogram(8), [smallest, -smallest, 0.0])
    assert (histogram.exponent, histogram.counts.tolist()) == (-148, [0, 0, 1, 0, 1, 0, 1, 0])
    observed(histogram, [FLT_MAX, -FLT_MAX])  # 276 doublings at once
    assert (histogram.exponent, histogram.counts.tolist()) == (128, [1, 0, 0, 1, 2, 0, 0, 1])
    assert histogram.edges().isfinite().all()


def test_zeros_before_anything_else():
    histogram = observed(Histogram(8), [0.0, -0.0], torch.zeros(3))
    assert histogram.counts.tolist() == [0, 0, 0, 0, 5, 0, 0, 0]
    assert histogram.range() == observed(PercentileObserver(50), [0.0]).range() == (0.0, 0.0)
    observed(histogram, [-1e3, 1e3])
    assert same_state(histogram, observed(Histogram(8), [-1e3, 1e3], torch.zeros(5)))


def test_large_tensors_are_binned_in_chunks(monkeypatch):
    whole = observed(Histogram(), normal(1000))
    monkeypatch.setattr(observers, "_CHUNK", 7)
    assert same_state(observed(Histogram(), normal(1000)), whole)


# ---- percentile ----


def test_percentile_100_is_min_max():
    for seed in range(20):
        x = normal(37, seed=seed) * 10.0 ** (seed - 10) + seed % 3 - 1
        assert observed(PercentileObserver(100), x).range() == observed(MinMaxObserver(), x).range()


def test_percentile_by_hand():
    """Bins of width 1 over [-8, 8), ten values each in four of them, spread evenly inside."""
    x = torch.cat([torch.arange(10) / 10 + start for start in (-7.0, -3.0, 2.0, 7.0)])
    for percentile, expected in [(50, (-3.0, 3.0)), (75, (-6.5, 7.5)), (95, (-6.9, 7.9))]:
        lo, hi = observed(PercentileObserver(percentile, bins=16), x).range()
        assert (lo, hi) == pytest.approx(expected, rel=1e-12)
    # Never wider than the values, though their bins are.
    assert observed(PercentileObserver(99.999, bins=16), x).range() == pytest.approx((-7.0, 7.9), abs=1e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_values_on_one_side_lose_only_their_far_end(sign):
    x = sign * torch.cat([torch.zeros(500), torch.linspace(0, 1, 480), torch.full([20], 7.0)])
    lo, hi = sorted(sign * end for end in observed(PercentileObserver(98), x).range())
    # All 2 % at the far end: the 20 sevens and nothing else, to one bin of 8 / 1024.
    assert (lo, hi) == pytest.approx((0.0, 1.0), abs=8 / 1024)
    assert observed(PercentileObserver(98.1), x).range()[(sign + 1) // 2] == pytest.approx(sign * 7.0, abs=0.01)


@pytest.mark.parametrize("count", [1000, 7000, 65_000, 129_000, 130_000])
@pytest.mark.parametrize("percentile", [99, 99.9])
def test_a_percentile_means_its_decimal_value(count, percentile):
    """99.9 % of 1000 are 999: the one outlier is out, in spite of 99.9 being no binary number."""
    outliers = round(count * (100 - percentile) / 100)
    x = torch.cat([torch.linspace(0, 1, count - outliers), torch.full([outliers], 5.0)])
    assert observed(PercentileObserver(percentile), x).range()[1] <= 1 + 8 / 1024


@repeatable
@given(batches_of_floats, st.sampled_from([50, 90, 99, 99.9, 100]))
def test_percentile_keeps_its_share(batches, percentile):
    """To within the bins that the two ends of the range lie in."""
    x = torch.tensor([value for batch in batches for value in batch] + [1.0])
    observer = observed(PercentileObserver(percentile), x)
    lo, hi = observer.range()
    assert min(x.min().item(), 0) <= lo <= 0 <= hi <= max(x.max().item(), 0)
    width = 2.0**observer.exponent / 1024
    inside = (x.double() >= lo - width) & (x.double() <= hi + width)
    assert inside.sum() >= math.floor(len(x) * percentile / 100)


def clip_and_minmax_db(x, measured_on, percentile=99.9):
    """SQNR of static uint8 with the percentile's range and with the min-max range."""
    results = []
    for name in ("percentile", "minmax"):
        pair = observed(make_observer(name, percentile=percentile), x).qparams()
        results.append(sqnr_db(measured_on, fake_quantize(measured_on, *pair, dtype=torch.uint8)))
    return results


def test_clipping_wins_where_outliers_are_rare_and_do_not_matter():
    bulk = normal(100_000)
    x = torch.cat([bulk, torch.tensor([60.0, -60.0, 100.0, -100.0])])
    clipped, minmax = clip_and_minmax_db(x, measured_on=bulk)
    # Steps of 200 / 255 against about 7 / 255: 20 log10(200 / 7) = 29 dB, less what clipping 0.1 % costs.
    assert clipped > minmax + 10


def test_clipping_loses_where_the_outliers_are_the_signal():
    """Outlier channels, as transformers have them: 4 of 768 hold most of the energy."""
    x = normal(128, 768, seed=1)
    x[:, :4] *= 60
    clipped, minmax = clip_and_minmax_db(x, measured_on=x, percentile=99.8)
    assert minmax > clipped + 10


def test_clipping_loses_on_heavy_tails():
    """Student's t with 2 degrees of freedom: a fixed share of the values has most of the energy."""
    x = normal(50_000, seed=2) / (normal(2, 50_000, seed=3).square().mean(0)).sqrt()
    clipped, minmax = clip_and_minmax_db(x, measured_on=x)
    assert minmax > clipped + 3


# ---- names and errors ----


def test_observers_by_name():
    made = {name: make_observer(name, percentile=98) for name in OBSERVERS}
    assert {name: type(observer) for name, observer in made.items()} == {
        "minmax": MinMaxObserver,
        "moving_average": MovingAverageObserver,
        "percentile": PercentileObserver,
    }
    assert made["percentile"].percentile == 98
    assert make_observer("percentile").percentile == 99.9


@every_class
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_refused_and_leave_no_trace(cls, bad):
    observer = observed(cls(), normal(9))
    match = rf"torchq.{cls.__name__}.observe: expected finite .* got 2 NaN or Inf among the 4 of x. Find"
    with pytest.raises(ValueError, match=match):
        observer.observe(torch.tensor([1e9, bad, 0.0, bad]))
    with pytest.raises(ValueError, match="got 1 NaN or Inf among the 1"):
        observer.observe(torch.tensor([1e300], dtype=torch.float64))  # Inf as float32
    assert same_state(observer, observed(cls(), normal(9)))


@every_class
def test_nothing_observed(cls):
    empty = observed(cls(), [])
    for call in (empty.range, empty.qparams, lambda: empty.seen):
        with pytest.raises(ValueError, match=f"torchq.{cls.__name__}: expected at least one .* Call observe"):
            call()


@every_class
def test_wrong_arguments(cls):
    with pytest.raises(TypeError, match=r"observe: x must be floating point, got torch.int64. Pass x.float"):
        cls().observe(torch.tensor([1]))
    other = Histogram if cls is MinMaxObserver else MinMaxObserver
    with pytest.raises(TypeError, match=f"merge: other must be a {cls.__name__}, got {other.__name__}"):
        cls().merge(other())
    with pytest.raises(ValueError, match=r"load_state_dict: expected the shapes .*'count': \(\).*, got \{\}"):
        cls().load_state_dict({})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MovingAverageObserver(1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (lambda: MovingAverageObserver(-0.1), r"momentum must be in \[0, 1\), got -0.1"),
        (lambda: PercentileObserver(0), r"percentile must be in \(0, 100\], got 0. It is in percent"),
        (lambda: PercentileObserver(100.1), r"percentile must be in \(0, 100\], got 100.1"),
        (lambda: PercentileObserver(math.nan), r"percentile must be in \(0, 100\], got nan"),
        (lambda: Histogram(0), "torchq.Histogram: bins must be even and at least 2, got 0"),
        (lambda: PercentileObserver(bins=7), "torchq.PercentileObserver: bins must be even .* got 7"),
        (lambda: make_observer("max"), "one of minmax, moving_average, percentile, got 'max'"),
        (
            lambda: PercentileObserver(99).merge(PercentileObserver(98)),
            r"merge: .*99.0\}, got .*98.0\}. Make",
        ),
        (
            lambda: PercentileObserver(bins=8).merge(PercentileObserver(bins=6)),
            "merge: expected the settings",
        ),
        (lambda: Histogram(8).merge(Histogram(6)), r"merge: expected the settings .*8\}, got .*6\}"),
        (
            lambda: Histogram(8).load_state_dict(Histogram(6).state_dict()),
            r"expected .*\(8,\).* got .*\(6,\)",
        ),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=r"^torchq\.") as caught:
        call()
    assert caught.match(message)
