"""QConfig: all options of a conversion. They are checked when the QConfig is created."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torchq.ops import ATTENTION_SCHEMES

WeightScheme = Literal["per_channel", "per_tensor"]
ActivationScheme = Literal["auto", "static", "dynamic"]
ObserverName = Literal["auto", "minmax", "moving_average", "percentile", "mse", "entropy"]
SmoothingScheme = Literal["auto", "none"]
Rounding = Literal["nearest", "gptq", "auto"]


@dataclass(frozen=True)
class QConfig:
    """How `convert` quantizes. The defaults choose by measuring.

    Args:
        weight: int8 weights with one scale per output channel, or one per tensor.
        activation: "dynamic": a scale and zero point per row (token), computed at run time. "static": one pair per
            layer, from calibration. "auto": per layer, static where it costs no more than `margin_db` of output SQNR.
            Of convolutions more are static: as many as cost the model's output no more than 1 dB (docs/accuracy.md).
        observer: how calibration data gives a static range (see `torchq.observers`). "auto": min-max, percentile, MSE
            or entropy, whichever gives the layer's output the highest SQNR.
        percentile: the share of values, in %, that the percentile observer keeps inside the range.
        min_sqnr_db: a layer whose output SQNR on its calibration sample is below this stays in float.
        margin_db: how much output SQNR static may lose against dynamic and still be chosen.
        sample_rows: how many input rows of each layer are kept to measure on. Never more than 2 MiB per layer.
        smoothing: "auto": activation outliers are moved into the weights (SmoothQuant, docs/accuracy.md) where the
            layer's output SQNR improves. The layer multiplies the channels of its input by fixed factors as it
            quantizes them; nothing else in the model changes. "none": no layer does.
        rounding: "nearest": each weight is rounded to its nearest int8 code. "gptq": the weights are rounded so that
            the layer's outputs on the calibration data change least, with bias correction (docs/accuracy.md), for
            layers of up to 8192 inputs with enough rows. "auto": the same for up to 4096 inputs, if it gains at least
            0.5 dB on held-out rows. GPTQ costs time, and K x K floats of memory per input during calibration, of all
            together at most twice the float32 weights.
        attention: how the attention of nn.MultiheadAttention is computed, of Hugging Face models where it is torch's
            now, and of modules that call torch's scaled_dot_product_attention (docs/accuracy.md). "auto": in float32,
            and with calibration data by faster schemes where the model's output loses less than 0.3 dB by all of them
            together. A scheme of `torchq.ops.attention`: all by this one. "none": as it is.
        embeddings: True: embeddings have int8 tables, with a scale for each row, and beside each code 4 more bits that
            only look-ups read. A table that is the weight of a head too is one int8 copy for both, and each value of
            the head's input has two codes. "int8": the same without the 4 bits and the second codes: a third less
            memory for a table, and 44 dB of it instead of 67. "auto": True, or "int8"
            where tables are more than 0.7 of the model's bytes; but with calibration data they stay in float where that
            costs more than 0.1 dB of the model's output, or 0.3 dB where a head shares the table. (inplace=True can't
            undo a swap, and leaves that out.) False: none has.
        fuse: whether layers may compute the activations that follow them, and pass u8 codes to static layers. It is
            never visible: what anybody else reads are the float model's values. Each fusion stands in the plan.
        exclude: patterns (as in `fnmatch`) of module names to leave in float. A pattern that matches a module excludes
            everything in it.

    Raises:
        ValueError: an option has any other value.

    >>> QConfig(activation="dynamic", exclude=("head",)).weight
    'per_channel'
    """

    weight: WeightScheme = "per_channel"
    activation: ActivationScheme = "auto"
    observer: ObserverName = "auto"
    percentile: float = 99.9
    min_sqnr_db: float = 10.0
    margin_db: float = 0.3
    sample_rows: int = 256
    smoothing: SmoothingScheme = "auto"
    rounding: Rounding = "auto"
    attention: str = "auto"
    embeddings: bool | Literal["auto", "int8"] = "auto"
    fuse: bool = True
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            _check_choice(field, getattr(self, field), get_args(choices))
        _check_choice("attention", self.attention, ("auto", *ATTENTION_SCHEMES, "none"))
        known = self.embeddings in ("auto", "int8") or isinstance(self.embeddings, bool)
        _check(known, "embeddings", "True, False, 'auto' or 'int8'", self.embeddings)
        _check(isinstance(self.fuse, bool), "fuse", "True or False", self.fuse)
        _check_number("percentile", self.percentile, "in (0, 100]", lambda value: 0 < value <= 100)
        _check_number("min_sqnr_db", self.min_sqnr_db, "a number of dB", lambda value: value == value)
        _check_number("margin_db", self.margin_db, "at least 0 dB", lambda value: value >= 0)
        _check(
            isinstance(self.sample_rows, int) and self.sample_rows >= 1, "sample_rows", "at least 1", self.sample_rows
        )
        object.__setattr__(self, "exclude", _patterns(self.exclude))


_CHOICES = {
    "weight": WeightScheme,
    "activation": ActivationScheme,
    "observer": ObserverName,
    "smoothing": SmoothingScheme,
    "rounding": Rounding,
}


def _patterns(exclude: object) -> tuple[str, ...]:
    patterns = tuple(exclude) if isinstance(exclude, Iterable) and not isinstance(exclude, str) else (None,)
    _check(
        all(isinstance(pattern, str) for pattern in patterns),
        "exclude",
        "a tuple of patterns, such as ('head',)",
        exclude,
    )
    return patterns


def _check_number(field: str, value: object, expected: str, ok: Callable[[float], bool]) -> None:
    _check(isinstance(value, (int, float)) and ok(value), field, expected, value)


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    _check(value in choices, field, "one of " + ", ".join(map(repr, choices)), value)


def _check(ok: bool, field: str, expected: str, value: object) -> None:
    if not ok:
        raise ValueError(f"QConfig: {field} must be {expected}, got {value!r}.")
