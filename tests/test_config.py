"""QConfig: its defaults, and that it refuses a wrong value at once, and not in the middle of a conversion."""

import dataclasses
import math
import typing

import pytest

from torchq import QConfig
from torchq.config import ObserverName
from torchq.observers import OBSERVERS


def test_defaults():
    assert dataclasses.asdict(QConfig()) == {
        "weight": "per_channel",
        "activation": "auto",
        "observer": "auto",
        "percentile": 99.9,
        "min_sqnr_db": 10.0,
        "margin_db": 0.3,
        "sample_rows": 256,
        "smoothing": "auto",
        "rounding": "auto",
        "attention": "auto",
        "embeddings": "auto",
        "fuse": True,
        "exclude": (),
    }


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("weight", ("per_channel", "per_tensor")),
        ("activation", ("auto", "static", "dynamic")),
        ("observer", ("auto", "minmax", "moving_average", "percentile")),
        ("percentile", (1e-9, 50, 100)),
        ("min_sqnr_db", (-math.inf, -3, 0, math.inf)),
        ("margin_db", (0, 0.5, math.inf)),
        ("sample_rows", (1, 10**9)),
        ("exclude", ((), ("head", "*.fc1"))),
    ],
)
def test_every_value_in_range_is_taken(field, values):
    for value in values:
        assert getattr(QConfig(**{field: value}), field) == value


def test_observer_names_are_the_observers():
    assert set(typing.get_args(ObserverName)) == {"auto", *OBSERVERS}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("weight", "per_row", "one of 'per_channel', 'per_tensor', got 'per_row'"),
        ("weight", None, "one of 'per_channel', 'per_tensor', got None"),
        ("activation", "Static", "one of 'auto', 'static', 'dynamic', got 'Static'"),
        ("activation", True, "one of 'auto', 'static', 'dynamic', got True"),
        ("observer", "max", "one of 'auto', 'minmax', 'moving_average', 'percentile', 'mse', 'entropy', got 'max'"),
        ("percentile", 0, r"in \(0, 100\], got 0"),
        ("percentile", -1.0, r"in \(0, 100\], got -1.0"),
        ("percentile", 100.1, r"in \(0, 100\], got 100.1"),
        ("percentile", math.nan, r"in \(0, 100\], got nan"),
        ("min_sqnr_db", math.nan, "a number of dB, got nan"),
        ("margin_db", -0.1, "at least 0 dB, got -0.1"),
        ("margin_db", math.nan, "at least 0 dB, got nan"),
        ("sample_rows", 0, "at least 1, got 0"),
        ("sample_rows", 2.5, "at least 1, got 2.5"),
        ("exclude", "head", r"a tuple of patterns, such as \('head',\), got 'head'"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_right(field, value, expected):
    with pytest.raises(ValueError, match=rf"^QConfig: {field} must be {expected}\.$"):
        QConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("percentile", "99.9"),
        ("percentile", None),
        ("min_sqnr_db", "10"),
        ("min_sqnr_db", None),
        ("margin_db", "1"),
        ("margin_db", None),
        ("sample_rows", "256"),
        ("exclude", None),
        ("exclude", 5),
        ("exclude", (1,)),
        ("exclude", (None, "head")),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name_too(field, value):
    with pytest.raises((TypeError, ValueError), match=rf"^QConfig: {field} must be .*, got .*\.$"):
        QConfig(**{field: value})


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'activations'"):
        QConfig(activations="static")


def test_frozen():
    config = QConfig()
    with pytest.raises(dataclasses.FrozenInstanceError, match="weight"):
        config.weight = "per_tensor"


@pytest.mark.parametrize("given", [["a", "b*"], ("a", "b*"), (name for name in ("a", "b*")), {"a": 1, "b*": 2}])
def test_exclude_becomes_a_tuple(given):
    config = QConfig(exclude=given)
    assert config.exclude == ("a", "b*")
    assert config == QConfig(exclude=("a", "b*"))
    assert hash(config) == hash(QConfig(exclude=("a", "b*")))


def test_a_changed_copy_is_checked_too():
    config = QConfig(exclude=("head",))
    assert dataclasses.replace(config, activation="dynamic") == QConfig(activation="dynamic", exclude=("head",))
    with pytest.raises(ValueError, match="percentile"):
        dataclasses.replace(config, percentile=0)
