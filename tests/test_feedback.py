"""round_with_feedback, GPTQ's inner loop: the values of its definition, and what it refuses."""

import pytest
import torch

from helpers.compare import assert_identical
from torchq.ops.feedback import round_with_feedback


def multiples(*shape, seed, step, limit):
    """Multiples of `step` up to `limit` times it: so that no sum of a few is rounded in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).float() * step


def by_definition(targets, weight, factor, scale):
    """The codes and errors in float64, one row at a time."""
    targets, weight, factor, scale = (x.double() for x in (targets, weight, factor, scale))
    codes, errors = torch.zeros_like(targets), torch.zeros_like(targets)
    for j in reversed(range(len(targets))):
        target = targets[j] + factor[j, j + 1 :] @ errors[j + 1 :]
        codes[j] = (target / scale).round().clamp(-127, 127)
        errors[j] = weight[j] - codes[j] * scale
    return codes.to(torch.int8), errors.float()


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_values_are_those_of_the_definition(rows, columns):
    weight = multiples(rows, columns, seed=1, step=1 / 16, limit=200)
    targets = weight + multiples(rows, columns, seed=2, step=1 / 16, limit=40)
    factor = multiples(rows, rows, seed=3, step=1 / 4, limit=4)
    scale = 2.0 ** multiples(columns, seed=4, step=1, limit=1)
    codes, errors = round_with_feedback(targets, weight, factor, scale)
    expected = by_definition(targets, weight, factor, scale)
    assert_identical(codes, expected[0])
    assert_identical(errors, expected[1])


def test_codes_stay_within_their_range_and_ties_go_to_even():
    targets = torch.tensor([[1000.0, -1000.0, 2.5, -0.5, 127.5]])
    codes, errors = round_with_feedback(targets, targets, torch.ones(1, 1), torch.ones(5))
    assert codes.tolist() == [[127, -127, 2, 0, 127]]
    assert errors.tolist() == [[873.0, -873.0, 0.5, -0.5, 0.5]]


@pytest.mark.parametrize("threads", [1, 3])
def test_all_columns_are_rounded_alike(set_threads, threads):
    """Whichever column of a vector, of how many, and on which thread it is."""
    set_threads(threads)
    generator = torch.Generator().manual_seed(0)
    weight, factor = (torch.randn(128, n, generator=generator) for n in (1, 128))
    alone = round_with_feedback(weight, weight, factor, torch.full((1,), 0.02))
    many = round_with_feedback(*[weight.expand(128, 909)] * 2, factor, torch.full((909,), 0.02))
    for one, all_of_them in zip(alone, many, strict=True):
        assert_identical(one.expand(128, 909), all_of_them)


def test_below_the_diagonal_of_the_factor_nothing_is_read():
    weight, factor = multiples(5, 9, seed=1, step=1 / 16, limit=200), multiples(5, 5, seed=2, step=1 / 4, limit=4)
    given = round_with_feedback(weight, weight, factor, torch.ones(9))
    nothing = round_with_feedback(weight, weight, factor.triu(1) + torch.full((5, 5), torch.nan).tril(), torch.ones(9))
    for one, other in zip(given, nothing, strict=True):
        assert_identical(one, other)


def test_opcheck():
    weight = multiples(5, 9, seed=1, step=1 / 16, limit=200)
    arguments = (weight, weight, multiples(5, 5, seed=2, step=1 / 4, limit=4), torch.ones(9))
    assert set(torch.library.opcheck(torch.ops.torchq.round_with_feedback, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (4, 0)])
def test_empty(rows, columns):
    weight = torch.empty(rows, columns)
    codes, errors = round_with_feedback(weight, weight, torch.empty(rows, rows), torch.empty(columns))
    assert codes.shape == errors.shape == (rows, columns)


@pytest.mark.parametrize(
    "change",
    [
        {"targets": torch.zeros(3)},
        {"weight": torch.zeros(3, 5)},
        {"factor": torch.zeros(3, 4)},
        {"scale": torch.ones(5)},
        {"scale": torch.ones(4, dtype=torch.float64)},
    ],
)
def test_what_does_not_fit_is_refused(change):
    given = {"targets": torch.zeros(3, 4), "weight": torch.zeros(3, 4), "factor": torch.zeros(3, 3)}
    arguments = {**given, "scale": torch.ones(4), **change}
    with pytest.raises(RuntimeError, match="round_with_feedback"):
        round_with_feedback(*(arguments[name] for name in ("targets", "weight", "factor", "scale")))
