"""All observers: common behaviour, exact merging, constant memory, channels, and errors."""

import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.numbers import FLT_MAX, normal
from helpers.properties import batches_of_floats, observed, repeatable
from torchq.numerics.qparams import choose_qparams
from torchq.observers import (
    OBSERVERS,
    EntropyObserver,
    Histogram,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    PercentileObserver,
    make_observer,
)

HISTOGRAMS = [Histogram, PercentileObserver, MSEObserver, EntropyObserver]
CLASSES = [MinMaxObserver, MovingAverageObserver, *HISTOGRAMS]

every_class = pytest.mark.parametrize("cls", CLASSES)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- common behaviour ----


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
    """Neither the state nor the whole object grows over 500 batches that span 30 orders of magnitude."""
    observer = observed(cls(), normal(10))
    state = sum(tensor.nbytes for tensor in observer.state_dict().values())
    everything = len(pickle.dumps(observer))
    for i in range(500):
        observer.observe(normal(10, seed=i) * 10.0 ** (i % 30))
    assert sum(tensor.nbytes for tensor in observer.state_dict().values()) == state
    assert len(pickle.dumps(observer)) <= everything + 64  # large integers take more bytes


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


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("cls", [MinMaxObserver, *HISTOGRAMS])
@repeatable
@given(batches_of_floats, st.randoms(use_true_random=False))
def test_merge_is_exact_in_every_order(cls, batches, random):
    """One stream, another order, and one observer per batch all give exactly the same state."""
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
    """Bins every value separately in Python's float64. The product with a power of two is exact."""
    counts = [0] * bins
    for value in x.tolist():
        magnitude = math.floor(abs(value) * 2.0**-exponent * (bins // 2))
        counts[bins // 2 - 1 - magnitude if value < 0 else bins // 2 + magnitude] += 1
    return torch.tensor(counts)


@pytest.mark.parametrize("bins", [2, 4, 64, 2048])
@pytest.mark.parametrize("spread", [1e-32, 1e-3, 1.0, 1e30])
def test_histogram_counts_like_direct_binning(bins, spread):
    x = (normal(300).double() * spread).float()
    histogram = observed(Histogram(bins), *x.split(7))
    exponent = histogram.exponent.item()
    assert 2.0 ** (exponent - 1) <= x.abs().max() < 2.0**exponent
    assert torch.equal(histogram.counts, direct_counts(x, bins, exponent))


def test_values_on_the_edges_of_bins():
    """A value on an edge belongs to the bin farther from zero; the next float towards zero does not."""
    edges = torch.arange(-7, 8).float() / 8
    inside = torch.from_numpy(np.nextafter(edges.numpy(), np.float32(0), dtype=np.float32))
    x = torch.cat([edges, inside])
    histogram = observed(Histogram(16), x)
    assert histogram.exponent == 0
    assert histogram.counts.tolist() == [1, *[2] * 6, 1, 3, *[2] * 6, 1]
    for limit in (1.0, 2.0, 4.0, 1e4, FLT_MAX):
        observed(histogram, [limit])
        x = torch.cat([x, torch.tensor([limit])])
        assert torch.equal(histogram.counts, direct_counts(x, 16, histogram.exponent.item()))


def test_extreme_exponents():
    """Bins are at least FLT_MIN wide; values up to FLT_MIN are zeros, whether the CPU flushes subnormals or not."""
    smallest, flt_min = 2.0**-149, 2.0**-126
    above = flt_min * (1 + 2.0**-23)
    histogram = observed(Histogram(8), [smallest, -smallest, 0.0, flt_min, -flt_min, above, -above])
    assert (histogram.exponent, histogram.zeros) == (-124, 5)
    assert histogram.counts.tolist() == [0, 0, 1, 0, 5, 1, 0, 0]
    assert histogram.edges().tolist() == [k * flt_min for k in range(-4, 5)]
    observed(histogram, [FLT_MAX, -FLT_MAX, -smallest])  # 252 doublings at once
    assert (histogram.exponent, histogram.counts.tolist()) == (128, [1, 0, 0, 1, 7, 0, 0, 1])
    assert histogram.edges().isfinite().all()


def test_exact_zeros_are_counted():
    histogram = observed(Histogram(8), [0.0, -0.0, 2.0**-125, -1.0], torch.zeros(3))
    other = observed(Histogram(8), [0.0, 1e9])
    histogram.merge(other)
    assert (histogram.zeros, histogram.count) == (6, 9)
    columns = Histogram(8, channels=2)
    columns.observe(torch.tensor([[0.0, 1.0], [0.0, 0.0], [3.0, -1.0]]))
    assert columns.zeros.tolist() == [2, 1]


def test_zeros_before_anything_else():
    histogram = observed(Histogram(8), [0.0, -0.0], torch.zeros(3))
    assert histogram.counts.tolist() == [0, 0, 0, 0, 5, 0, 0, 0]
    assert histogram.range() == observed(PercentileObserver(50), [0.0]).range() == (0.0, 0.0)
    observed(histogram, [-1e3, 1e3])
    assert same_state(histogram, observed(Histogram(8), [-1e3, 1e3], torch.zeros(5)))


def test_large_tensors_are_binned_as_their_parts_are():
    assert same_state(observed(Histogram(bins=64), normal(3000)), observed(Histogram(bins=64), *normal(3000).split(7)))


# ---- channels ----


@every_class
def test_channels_are_observers_side_by_side(cls):
    """Each channel has the result of an observer of that channel alone. The channels' ranges differ by 10^20."""
    bins = {} if cls in (MinMaxObserver, MovingAverageObserver) else {"bins": 256}
    factors = torch.tensor([1e-10, 0.0, 1.0, -3e4, 1e10])
    batches = [normal(2, 700, 5, seed=i) * 7.0**i * factors for i in range(3)]
    batches[0][..., 2].relu_()
    together = cls(**bins, channels=5)
    halves = [cls(**bins, channels=5) for _ in range(2)]
    for i, batch in enumerate(batches):
        together.observe(batch)
        halves[i > 0].observe(batch)
    alone = [observed(cls(**bins), *(batch[..., c] for batch in batches)) for c in range(5)]
    assert together.count == 4200
    for value, expected in ((together.range(), "range"), (together.seen, "seen"), (together.qparams(), "qparams")):
        each = [getattr(observer, expected) for observer in alone]
        for side in range(2):
            one_by_one = [(item if expected == "seen" else item())[side] for item in each]
            assert torch.equal(value[side], torch.stack(one_by_one))
    if cls is not MovingAverageObserver:  # its merge is not exact
        halves[0].merge(halves[1])
        assert same_state(halves[0], together)


@every_class
def test_wrong_channels(cls):
    observer = cls(channels=3)
    with pytest.raises(ValueError, match=r"the last dimension of x must be the 3 channels, got shape \[3, 4\]. Move"):
        observer.observe(normal(3, 4))
    with pytest.raises(ValueError, match="merge: expected the settings"):
        observer.merge(cls(channels=4))
    with pytest.raises(ValueError, match="load_state_dict: expected the shapes"):
        observer.load_state_dict(cls().state_dict())
    with pytest.raises(ValueError, match="got 1 NaN or Inf among the 3"):
        observer.observe(torch.tensor([0.0, math.nan, 1.0]))
    observer.observe(torch.empty(0, 3))
    assert same_state(observer, cls(channels=3))


# ---- names and errors ----


def test_observers_by_name():
    made = {name: make_observer(name, percentile=98) for name in OBSERVERS}
    assert {name: type(observer) for name, observer in made.items()} == {
        "minmax": MinMaxObserver,
        "moving_average": MovingAverageObserver,
        "percentile": PercentileObserver,
        "mse": MSEObserver,
        "entropy": EntropyObserver,
    }
    assert made["percentile"].percentile == 98
    assert make_observer("percentile").percentile == 99.9


@every_class
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_refused_and_leave_no_trace(cls, bad):
    observer = observed(cls(), normal(9))
    match = rf"torchq.observers.{cls.__name__}.observe: expected finite .* got 2 NaN or Inf among the 4 of x. Find"
    with pytest.raises(ValueError, match=match):
        observer.observe(torch.tensor([1e9, bad, 0.0, bad]))
    with pytest.raises(ValueError, match="got 1 NaN or Inf among the 1"):
        observer.observe(torch.tensor([1e300], dtype=torch.float64))  # Inf as float32
    assert same_state(observer, observed(cls(), normal(9)))


@every_class
def test_nothing_observed(cls):
    empty = observed(cls(), [])
    for call in (empty.range, empty.qparams, lambda: empty.seen):
        with pytest.raises(ValueError, match=f"torchq.observers.{cls.__name__}: expected at least one .* Call observe"):
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
        (lambda: Histogram(0), "torchq.observers.Histogram: bins must be a power of two and at least 2, got 0"),
        (lambda: MinMaxObserver(channels=0), r"MinMaxObserver: channels must be None or at least 1, got 0"),
        (lambda: EntropyObserver(128), "torchq.observers.EntropyObserver: bins must be at least 256, got 128"),
        (
            lambda: PercentileObserver(bins=7),
            r"observers.PercentileObserver: bins must be a power of two .* got 7",
        ),
        (lambda: make_observer("max"), "one of minmax, moving_average, percentile, mse, entropy, got 'max'"),
        (
            lambda: PercentileObserver(99).merge(PercentileObserver(98)),
            r"merge: .*99.0\}, got .*98.0\}. Make",
        ),
        (
            lambda: PercentileObserver(bins=8).merge(PercentileObserver(bins=4)),
            "merge: expected the settings",
        ),
        (lambda: Histogram(8).merge(Histogram(4)), r"merge: expected the settings .*8\}, got .*4\}"),
        (
            lambda: Histogram(8).load_state_dict(Histogram(4).state_dict()),
            r"expected .*\(8,\).* got .*\(4,\)",
        ),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=r"^torchq\.") as caught:
        call()
    assert caught.match(message)
