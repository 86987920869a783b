"""How torchq times: contestants interleaved in one process, the best of several rounds.

Other work on a machine only ever makes a run slower, so the best round is the estimate, and interleaving lets clock
changes fall on every contestant alike. Ratios within one run are what to quote.
"""

import time
from collections.abc import Callable, Mapping


def interleaved(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int = 15, seconds: float = 0.02
) -> dict[str, float]:
    """Seconds a call takes, for each contestant: the best of `rounds` rounds of about `seconds` each.

    >>> sorted(interleaved({"a": lambda: None, "b": lambda: None}, rounds=2, seconds=0.001))
    ['a', 'b']
    """
    repeats = {name: _repeats(call, seconds) for name, call in contestants.items()}
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / repeats[name])
    return best


def _repeats(call: Callable[[], object], seconds: float) -> int:
    for _ in range(4):  # first calls allocate and start threads; one is enough where a call takes longer than that
        start = time.perf_counter()
        call()
        elapsed = time.perf_counter() - start
        if elapsed > seconds:
            break
    return max(1, int(seconds / max(elapsed, 1e-7)))
