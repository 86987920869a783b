"""QConfig: every choice of a conversion, checked when it is made."""

from dataclasses import dataclass
from typing import Literal, get_args

WeightScheme = Literal["per_channel", "per_tensor"]
ActivationScheme = Literal["auto", "static", "dynamic"]
ObserverName = Literal["auto", "minmax", "moving_average", "percentile"]


@dataclass(frozen=True)
class QConfig:
    """How `convert` quantizes. The defaults choose by measuring.

    Args:
        weight: int8 weights with one scale per output channel, or one per tensor.
        activation: "dynamic": a scale and zero point per row (token), computed at run time. "static": one pair per
            layer, from calibration. "auto": per layer, static where it costs no more than `margin_db` of output SQNR.
        observer: what turns calibration data into a static range. "auto": min-max or percentile, whichever gives the
            layer's output the higher SQNR.
        percentile: the share of values, in %, that the percentile observer keeps inside the range.
        min_sqnr_db: a layer whose output SQNR on its calibration sample is below this stays in float.
        margin_db: how much output SQNR static may lose against dynamic and still be chosen.
        sample_rows: how many input rows of each layer are kept to measure on (at most 4 MiB a layer, either way).
        exclude: patterns (as in `fnmatch`) of module names to leave in float; a pattern that names a module excludes
            everything in it.

    Raises:
        ValueError: a value outside these.

    >>> QConfig(activation="dynamic", exclude=("head",)).weight
    'per_channel'
    """

    weight: WeightScheme = "per_channel"
    activation: ActivationScheme = "auto"
    observer: ObserverName = "auto"
    percentile: float = 99.9
    min_sqnr_db: float = 10.0
    margin_db: float = 1.0
    sample_rows: int = 256
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, choices in (("weight", WeightScheme), ("activation", ActivationScheme), ("observer", ObserverName)):
            _check_choice(field, getattr(self, field), get_args(choices))
        _check(0 < self.percentile <= 100, "percentile", "in (0, 100]", self.percentile)
        _check(self.min_sqnr_db == self.min_sqnr_db, "min_sqnr_db", "a number of dB", self.min_sqnr_db)
        _check(self.margin_db >= 0, "margin_db", "at least 0 dB", self.margin_db)
        _check(
            isinstance(self.sample_rows, int) and self.sample_rows >= 1, "sample_rows", "at least 1", self.sample_rows
        )
        _check(not isinstance(self.exclude, str), "exclude", "a tuple of patterns, such as ('head',)", self.exclude)
        object.__setattr__(self, "exclude", tuple(self.exclude))


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    _check(value in choices, field, "one of " + ", ".join(map(repr, choices)), value)


def _check(ok: bool, field: str, expected: str, value: object) -> None:
    if not ok:
        raise ValueError(f"QConfig: {field} must be {expected}, got {value!r}.")
