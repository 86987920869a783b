"""Parameters of tests in fewer combinations than all of them."""

from collections.abc import Collection
from itertools import combinations, product
from typing import Any


def pairs_of(*parameters: Collection[Any]) -> list[tuple[Any, ...]]:
    """Combinations in which every value of a parameter meets every value of each other one.

    So a fault that two values together bring about is found, as by all combinations. The choice is greedy, and the same
    in every run.

    >>> pairs_of("ab", [1, 2], [True, False])
    [('a', 1, True), ('a', 2, False), ('b', 1, False), ('b', 2, True)]
    """
    values = [list(parameter) for parameter in parameters]
    met_by = {
        places: set(combinations(enumerate(places), 2)) for places in product(*(range(len(each)) for each in values))
    }
    missing, chosen = set().union(*met_by.values()), []
    while missing:
        places = max(met_by, key=lambda places: len(met_by[places] & missing))
        missing -= met_by.pop(places)
        chosen.append(places)
    return [tuple(each[i] for each, i in zip(values, places, strict=True)) for places in sorted(chosen)]
