"""Observers that clip: their ranges against brute force, and cases where clipping wins and where it loses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.numbers import FLT_MAX, normal
from helpers.properties import batches_of_floats, observed, repeatable
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import fake_quantize, qparams_from_range
from torchq.observers import EntropyObserver, MinMaxObserver, MSEObserver, PercentileObserver, clipping, make_observer
from torchq.observers.clipping import divergence
from torchq.ops.histogram import squared_error

# ---- percentile ----


def test_percentile_100_is_min_max():
    for seed in range(20):
        x = normal(37, seed=seed) * 10.0 ** (seed - 10) + seed % 3 - 1
        assert observed(PercentileObserver(100), x).range() == observed(MinMaxObserver(), x).range()


def test_percentile_by_hand():
    """The bins are 1 wide over [-8, 8). Four of them hold ten values each, evenly spread."""
    x = torch.cat([torch.arange(10) / 10 + 0.05 + start for start in (-7.0, -3.0, 2.0, 7.0)])
    for percentile, expected in [(50, (-3.0, 3.0)), (75, (-6.5, 7.5)), (95, (-6.9, 7.9))]:
        bounds = observed(PercentileObserver(percentile, bins=16), x).range()
        assert [bound.item() for bound in bounds] == pytest.approx(expected, rel=1e-7)  # float32
    # Never wider than the values, although their bins are wider.
    assert observed(PercentileObserver(99.999, bins=16), x).range() == pytest.approx((-6.95, 7.95), abs=1e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_values_on_one_side_lose_only_their_far_end(sign):
    x = sign * torch.cat([torch.zeros(500), torch.linspace(0, 1, 480), torch.full([20], 7.0)])
    lo, hi = sorted(sign * end for end in observed(PercentileObserver(98), x).range())
    # All 2 % are cut off at the far end: exactly the 20 sevens, up to one bin of 8 / 1024.
    assert (lo, hi) == pytest.approx((0.0, 1.0), abs=8 / 1024)
    assert observed(PercentileObserver(98.1), x).range()[(sign + 1) // 2] == pytest.approx(sign * 7.0, abs=0.01)


@pytest.mark.parametrize("count", [1000, 7000, 65_000, 129_000, 130_000])
@pytest.mark.parametrize("percentile", [99, 99.9])
def test_a_percentile_means_its_decimal_value(count, percentile):
    """99.9 % of 1000 values are 999, so the one outlier is clipped, although 99.9 is no binary number."""
    outliers = round(count * (100 - percentile) / 100)
    x = torch.cat([torch.linspace(0, 1, count - outliers), torch.full([outliers], 5.0)])
    assert observed(PercentileObserver(percentile), x).range()[1] <= 1 + 8 / 1024


@repeatable
@given(batches_of_floats, st.sampled_from([50, 90, 99, 99.9, 100]))
def test_percentile_keeps_its_share(batches, percentile):
    """The share is accurate to the two bins that hold the ends of the range."""
    x = torch.tensor([value for batch in batches for value in batch] + [1.0])
    observer = observed(PercentileObserver(percentile), x)
    lo, hi = observer.range()
    assert min(x.min().item(), 0) <= lo <= 0 <= hi <= max(x.max().item(), 0)
    width = 2.0**observer.exponent / 1024
    inside = (x.double() >= lo - width) & (x.double() <= hi + width)
    assert inside.sum() >= math.floor(len(x) * percentile / 100)


# ---- mean squared error ----


def mse(x, lo, hi):
    scale, zero_point = qparams_from_range(torch.tensor(lo), torch.tensor(hi), dtype=torch.uint8, symmetric=False)
    return (x.double() - fake_quantize(x, scale, zero_point, dtype=torch.uint8)).square().mean().item()


def heavy_tailed():
    """Student's t with 2 degrees of freedom: a small share of the values has most of the energy."""
    return normal(20_000, seed=2) / (normal(2, 20_000, seed=3).square().mean(0)).sqrt()


SAMPLES = {
    "normal": lambda: normal(20_000),
    "relu": lambda: normal(20_000).relu(),
    "gelu": lambda: torch.nn.functional.gelu(2 * normal(20_000)),
    "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).icdf(torch.linspace(1e-5, 1 - 1e-5, 20_001)),
    "heavy tails": heavy_tailed,
    "outliers": lambda: torch.cat([normal(20_000), torch.tensor([100.0, -70.0])]),
    "one-sided outlier": lambda: torch.cat([normal(20_000), torch.full([40], 30.0)]),
    "shifted": lambda: normal(20_000) - 3,
    "sparse": lambda: torch.nn.functional.dropout(normal(20_000), 0.9),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_mse_is_the_best_range_of_a_dense_search(name):
    """The dense search tries all pairs of 40 bounds on each side, 10 % apart, on the data itself."""
    torch.manual_seed(0)
    x = SAMPLES[name]()
    lo, hi = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    factors = [0.9**i for i in range(40)]
    best = min(mse(x, lo * f, hi * g) for f in (factors if lo < 0 else [1]) for g in factors)
    found = mse(x, *(bound.item() for bound in observed(MSEObserver(), *x.split(999)).range()))
    # The observer's bounds are 1 % apart, and it assumes evenly filled bins. The sums are over 20,000 values, and a few
    # of those saturate.
    assert found <= 1.02 * best


@pytest.mark.parametrize("name", SAMPLES)
def test_the_error_of_a_histogram_is_the_error_of_its_values(name):
    torch.manual_seed(0)
    x = SAMPLES[name]()
    observer = observed(MSEObserver(), x)
    edges = observer.edges().clamp(x.min(), x.max())
    counts = observer.counts.double()
    counts[1024] -= observer.zeros
    lo, hi = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    factors = torch.tensor([[1.0, 0.7, 0.3, 0.1]], dtype=torch.float64)
    errors = squared_error(counts[None], edges[None], lo * factors, hi * factors)[0] / len(x)
    for factor, error in zip(factors[0].tolist(), errors.tolist(), strict=True):
        # GELU gives many values close to 0 in one bin. Their error is smaller than that of evenly spread values.
        assert error == pytest.approx(mse(x, lo * factor, hi * factor), rel=0.06)


def by_formula(counts, edges, lo, hi):
    """`squared_error` as its docstring defines it, for all bins and ranges at once."""
    counts, edges, lo, hi = counts.unsqueeze(1), edges.unsqueeze(1), lo.unsqueeze(-1), hi.unsqueeze(-1)
    scale = (hi - lo) / 255
    scale = torch.where(scale > 0, scale, 1.0)
    zero_point = (-lo / scale).round()
    code = (edges / scale).round().clamp(-zero_point, 255 - zero_point)
    error = edges - code * scale
    left, right = error[..., :-1], error[..., 1:]
    within = (left * (left + right) + right.square()) / 3
    across = (code * scale**3 / 12 + error**3 / 3).diff() / edges.diff()
    return (counts * torch.where(code[..., :-1] == code[..., 1:], within, across)).sum(-1)


@pytest.mark.parametrize(
    ("channels", "bins", "los", "his"), [(1, 1, 1, 1), (3, 40, 7, 1), (2, 300, 1, 5), (1, 0, 2, 2)]
)
def test_squared_errors_are_those_of_the_formula(channels, bins, los, his):
    """Some bins are empty, and the outermost have no width: they are not divided by it."""
    counts = normal(channels, bins).double().mul(20).round().clamp(min=0)
    edges = torch.cat([torch.zeros(channels, 1), normal(channels, bins).abs()], 1).double().cumsum(1) - bins / 3
    edges[:, -1] = edges[:, max(0, bins - 1)]
    lo, hi = -normal(channels, los).double().abs() * bins, normal(channels, his).double().abs() * bins
    lo[0, 0] = 0.0
    torch.testing.assert_close(
        squared_error(counts, edges, lo, hi), by_formula(counts, edges, lo, hi), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_mse_finds_the_range_that_the_formula_finds(name, monkeypatch):
    torch.manual_seed(0)
    observer = observed(MSEObserver(), SAMPLES[name]())
    found = observer.range()
    monkeypatch.setattr(clipping, "squared_error", by_formula)
    assert found == observer.range()


def test_squared_error_is_an_op_of_torch():
    arguments = (torch.ones(2, 3).double(), torch.arange(8.0).reshape(2, 4).double(), -torch.ones(2, 1).double())
    for his in (1, 4):
        each = (*arguments, torch.ones(2, his).double())
        assert set(torch.library.opcheck(torch.ops.torchq.squared_error, each).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("wrong", "shape"), [(0, (6,)), (1, (2, 3)), (1, (1, 4)), (2, (2,)), (2, (1, 3)), (3, (2, 2)), (3, (3, 3))]
)
def test_squared_error_refuses_what_does_not_fit(wrong, shape):
    arguments = [torch.ones(each).double() for each in ((2, 3), (2, 4), (2, 3), (2, 3))]
    squared_error(*arguments)
    with pytest.raises(RuntimeError, match="squared_error"):
        squared_error(*arguments[:wrong], torch.ones(shape).double(), *arguments[wrong + 1 :])
    with pytest.raises(RuntimeError, match="must be float64"):
        squared_error(*arguments[:wrong], arguments[wrong].float(), *arguments[wrong + 1 :])


def test_mse_by_hand():
    """100,000 values are evenly spread in [-1, 1], and two are +-3. For a range of +-b, the rounding error is
    1e5 (2b / 255)^2 / 12 = 0.513 b^2 and the saturation error 2 (3 - b)^2. Their sum is least at b = 6 / 2.513 = 2.388.
    """
    x = torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([3.0, -3.0])])
    lo, hi = observed(MSEObserver(), x).range()
    assert (-lo.item(), hi.item()) == pytest.approx((2.388, 2.388), rel=0.02)


def test_the_closed_form_is_the_integral():
    """For one bin, [-0.3, 1.7], of 200,000 values, and ranges that round it, saturate it, or both."""
    x = torch.linspace(-0.3, 1.7, 200_001, dtype=torch.float64)
    for lo, hi in [(-1.0, 2.0), (-0.1, 0.5), (0.0, 1.0), (-2.0, 0.0), (-0.3, 1.7), (-60.0, 90.0), (-1e3, 1e3)]:
        scale = (hi - lo) / 255
        zero_point = round(-lo / scale)
        codes = (x / scale).round().clamp(-zero_point, 255 - zero_point)
        expected = (x - codes * scale).square().mean().item()
        one, bounds = torch.ones(1, 1).double(), [torch.tensor([[bound]]).double() for bound in (lo, hi)]
        assert squared_error(one, torch.tensor([[-0.3, 1.7]]).double(), *bounds).item() == pytest.approx(
            expected, rel=1e-3
        )


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("bins", [4, 64, 2048])
def test_mse_is_never_worse_than_minmax_on_its_histogram(name, bins):
    """Nor than any range half as wide on a side; with bins too few to be merged as well."""
    torch.manual_seed(0)
    observer = observed(MSEObserver(bins=bins), SAMPLES[name]())
    edges = observer.edges().clamp(*observer.seen)[None]
    counts = observer.counts.double()[None]
    counts[0, bins // 2] -= observer.zeros
    lo, hi = (bound.double().reshape(1, 1) for bound in MinMaxObserver.range(observer))
    tried = torch.tensor([[1.0, 1.0, 0.5, 0.5]]), torch.tensor([[1.0, 0.5, 1.0, 0.5]])
    found = squared_error(counts, edges, *(bound.double().reshape(1, 1) for bound in observer.range()))
    assert (found <= 1.001 * squared_error(counts, edges, lo * tried[0], hi * tried[1])).all()


def test_exact_zeros_make_no_error():
    """So many zeros do not lead to finer steps: the range is the same as without them."""
    x = heavy_tailed()
    with_zeros = torch.cat([x, torch.zeros(1_000_000)])
    for cls in (MSEObserver, EntropyObserver):
        assert observed(cls(), with_zeros).range() == observed(cls(), x).range()


# ---- entropy ----


def kl_of_window(counts, window, levels=128):
    """The formula of the observer's docstring, bin by bin."""
    half = len(counts) // 2
    first, last = half - window, half + window - 1
    p = counts[first : last + 1]
    level_of = [j * levels // len(p) for j in range(len(p))]
    merged = [0.0] * levels
    for level, count in zip(level_of, p, strict=True):
        merged[level] += count
    p = [*p]
    p[0] += sum(counts[:first])
    p[-1] += sum(counts[last + 1 :])
    members = [0] * levels
    for level, count in zip(level_of, p, strict=True):
        members[level] += count > 0
    q = [max(merged[level] / members[level], 1e-4) if n else 0.0 for level, n in zip(level_of, p, strict=True)]
    total_p, total_q = sum(p), sum(q)
    return sum(n / total_p * math.log(n / total_p / (m / total_q)) for n, m in zip(p, q, strict=True) if n)


@pytest.mark.parametrize("name", SAMPLES)
def test_entropy_is_the_least_divergence(name):
    """Compares with all 193 windows of 512 bins. The 64 windows that the observer tries are at most 3 % apart."""
    torch.manual_seed(0)
    x = SAMPLES[name]()
    x = x[x != 0]
    observer = observed(EntropyObserver(512), x)
    counts = [float(count) for count in observer.counts]
    width = 2.0 ** observer.exponent.item() / 256
    widest = math.floor(x.abs().max().item() / width) + 1
    windows = list(range(64, widest + 1))
    expected = [kl_of_window(counts, window) for window in windows]
    actual = divergence(observer.counts.double()[None], torch.tensor([windows]))[0]
    assert actual.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)

    tried = sorted({round(widest * (64 / widest) ** (i / 63)) for i in range(64)})
    limit = width * min(tried, key=lambda window: expected[window - 64])
    lo, hi = observer.range()
    assert (lo, hi) == (max(min(x.min().item(), 0), -limit), min(max(x.max().item(), 0), limit))


def test_entropy_cuts_the_outlier_and_keeps_the_bulk():
    lo, hi = observed(EntropyObserver(), normal(100_000), [40.0]).range()
    assert -5 < lo < -3
    assert 3 < hi < 5


# ---- both ----


@pytest.mark.parametrize("cls", [MSEObserver, EntropyObserver, PercentileObserver])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, -0.0], (0.0, 0.0)),
        ([5.0], (0.0, 5.0)),
        ([-5.0] * 1000, (-5.0, 0.0)),
        ([FLT_MAX, -FLT_MAX], (-FLT_MAX, FLT_MAX)),
        ([2.0**-149, -(2.0**-149)], None),  # below FLT_MIN a scale is 1 anyway
        ([1e-45, 1e38], None),
    ],
    ids=str,
)
def test_degenerate_data(cls, values, expected):
    """For one value, a constant, zeros, and extreme floats, the range is min-max, or finite and inside it."""
    x = torch.tensor(values)
    observer = observed(cls(), x)
    lo, hi = observer.range()
    if expected:
        assert (lo, hi) == pytest.approx(expected, rel=1e-2)
        assert cls is not MSEObserver or (lo, hi) == expected
    assert min(x.min(), 0) <= lo <= 0 <= hi <= max(x.max(), 0)
    scale, zero_point = observer.qparams()
    assert scale.isfinite()
    assert scale > 0
    assert 0 <= zero_point <= 255


@pytest.mark.parametrize("cls", [MSEObserver, EntropyObserver])
@repeatable
@given(batches_of_floats)
def test_the_range_lies_within_the_values(cls, batches):
    x = torch.tensor([value for batch in batches for value in batch] + [1.0])
    lo, hi = observed(cls(256), x).range()
    assert min(x.min().item(), 0) <= lo <= 0 <= hi <= max(x.max().item(), 0)


@repeatable
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=50))
def test_mse_is_never_much_worse_than_min_max(values):
    """With few values, bins are not evenly filled: each rms error may be off by up to one bin, 2^e / 1024."""
    x = torch.tensor(values)
    observer = observed(MSEObserver(), x)
    bin_width = 2.0 ** observer.exponent.item() / 1024
    found, covering = (mse(x, *(b.item() for b in each.range())) for each in (observer, observed(MinMaxObserver(), x)))
    assert math.sqrt(found) <= math.sqrt(covering) + 2 * bin_width


# ---- cases where clipping wins and where it loses ----


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
    # The steps are 200 / 255 and about 7 / 255, which gives 20 log10(200 / 7) = 29 dB. Clipping 0.1 % costs some of it.
    assert clipped > minmax + 10


def test_clipping_loses_where_the_outliers_are_the_signal():
    """With outlier channels, as in transformers: 4 of 768 have most of the energy."""
    x = normal(128, 768, seed=1)
    x[:, :4] *= 60
    clipped, minmax = clip_and_minmax_db(x, measured_on=x, percentile=99.8)
    assert minmax > clipped + 10


def test_clipping_loses_on_heavy_tails():
    """Student's t with 2 degrees of freedom: a small share of the values has most of the energy."""
    x = heavy_tailed()
    clipped, minmax = clip_and_minmax_db(x, measured_on=x)
    assert minmax > clipped + 3
