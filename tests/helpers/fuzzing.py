"""Random cases: tests go through those of seed 0, and `make fuzz` through new seeds for as long as it is told.

A failure prints the line that does it again. CI starts at the same seed each time: a failure there is of the commit.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

MINUTES = float(os.environ.get("TORCHQ_FUZZ_MINUTES", "0"))  # of each test; 0: the first seed and no more
ONLY_SEED = os.environ.get("TORCHQ_FUZZ_SEED")  # of a failure, to do it again
FIRST_SEED = os.environ.get("TORCHQ_FUZZ_FROM")  # and the seeds after it, as long as there is time; else a random one


def seeds() -> Iterator[int]:
    """Gives one seed after the other, as long as there is time. A failing test shows the last line printed."""
    first = int(ONLY_SEED or FIRST_SEED or (secrets.randbelow(10**9) if MINUTES else 0))
    test, end, number = os.environ["PYTEST_CURRENT_TEST"].split(" ")[0], time.monotonic() + 60 * MINUTES, first
    while number == first or (ONLY_SEED is None and time.monotonic() < end):
        print(f"seed {number}; again: TORCHQ_FUZZ_SEED={number} python -m pytest {test}")
        yield number
        number += 1


def fuzz(check: Callable[..., None], *cases: SearchStrategy[object], examples: int) -> None:
    """Calls `check` with what Hypothesis draws from these strategies: so many examples for each seed.

    Without minutes, half as many. Hypothesis makes a failing case as small as it can, and shows it.
    """
    examples = examples if MINUTES or ONLY_SEED else examples // 2
    options = settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    for number in seeds():
        seed(number)(options(given(*cases)(check)))()
