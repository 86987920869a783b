"""For property tests: settings that make them repeatable, and batches of any floats."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=150)
batches_of_floats = st.lists(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=8), min_size=1, max_size=6
)


def observed(observer, *batches):
    for batch in batches:
        observer.observe(torch.as_tensor(batch, dtype=torch.float32))
    return observer
