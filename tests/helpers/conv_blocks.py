"""What tests of blocks of convolutions have in common. The fixture `ran` is in conftest.py."""

from helpers.numbers import normal
from torchq import QConfig

STATIC = QConfig(activation="static", rounding="nearest", smoothing="none")
DATA = [normal(4, 32, 20, 20, seed=i) for i in range(4)]
X = normal(2, 32, 20, 20, seed=9)
