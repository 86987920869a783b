"""How torchq times: contestants interleaved in one process, the best of several rounds.

Other work on the machine can only make a run slower, so the best round is the estimate. Interleaving makes changes of
the clock affect every contestant alike. Quote ratios within one run, not times of different runs.
"""

import time
from collections.abc import Callable, Mapping


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    seconds: float = 0.02,
    before: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The seconds one call of each contestant takes: the best of `rounds` rounds of about `seconds` each.

    Each turn starts with `before()` and one call, both untimed. With `clock=time.thread_time` what one thread computes
    is timed without the time in which others have its core.

    >>> sorted(interleaved({"a": lambda: None, "b": lambda: None}, rounds=2, seconds=0.001))
    ['a', 'b']
    """
    repeats = {}
    for name, call in contestants.items():
        before()
        repeats[name] = _repeats(call, seconds)
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds):
        for name, call in contestants.items():
            before()
            call()
            start = clock()
            for _ in range(repeats[name]):
                call()
            best[name] = min(best[name], (clock() - start) / repeats[name])
    return best


def _repeats(call: Callable[[], object], seconds: float) -> int:
    """How many calls fill `seconds`, estimated by the fastest of several: the first ones allocate and start threads."""
    best, end = float("inf"), time.perf_counter() + seconds
    for _ in range(100):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return max(1, int(seconds / max(best, 1e-7)))
