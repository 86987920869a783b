"""Plan: what each layer becomes, and why. Plain data: printable, JSON, and editable before it is applied.

Every stage of planning takes a Plan and the evidence, and returns a Plan: `choose` picks the scheme of each layer,
`smooth` moves outliers out of activations, `fuse` joins neighbours, `round_weights` rounds by GPTQ, `describe` measures
what quantization did, and `fit` keeps an accuracy budget. `apply_plan` then applies the plan to a model.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchq.errors import BadValueError
from torchq.numerics.qparams import QParams
from torchq.planning.frontier import Frontier
from torchq.text import to_json


class InputHistogram(NamedTuple):
    """Counts of the values of a layer's input, in equal bins.

    Args:
        lo: the lowest value.
        hi: the highest value.
        counts: of each bin from lo to hi.
    """

    lo: float
    hi: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class LayerStats:
    """What quantization did to one int8 layer, measured on the layer's calibration sample.

    Args:
        weight_db: SQNR of the int8 weight against the float one, in dB.
        input_db: SQNR of the sample's u8 codes against the sample, in dB.
        clipped_below: the share of the sample's values below the static range (see `count_clipped`); 0 for a dynamic
            layer.
        clipped_above: the share above it.
        rows: the mean number of rows (tokens) per call in calibration.
        histogram: the sample's values, for the report page.
        input_shape: of a convolution: what it was called with last, (N, C, *spatial); with padding, if not of zeros.
    """

    weight_db: float
    input_db: float
    clipped_below: float
    clipped_above: float
    rows: int
    histogram: InputHistogram | None = None
    input_shape: tuple[int, ...] | None = None

    @property
    def clipped(self) -> float:
        """The share of values outside the range, on either side."""
        return self.clipped_below + self.clipped_above

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayerStats":
        """The inverse of `dataclasses.asdict`, and of the strings that JSON has for inf and nan."""
        numbers = {key: float(data[key]) for key in data if key not in ("rows", "histogram", "input_shape")}
        lo, hi, counts = data.get("histogram") or (0.0, 0.0, ())
        histogram = InputHistogram(float(lo), float(hi), tuple(map(int, counts))) if counts else None
        shape = data.get("input_shape") and tuple(map(int, data["input_shape"]))
        return cls(rows=int(data["rows"]), histogram=histogram, input_shape=shape or None, **numbers)


class Rounded(NamedTuple):
    """A layer's int8 weight (N, K), its scales (N,) and its bias (N,), rounded with calibration data.

    They are for this channel_scale (K,), or for none.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    channel_scale: Tensor | None = None


Kind = Literal["int8 dynamic", "int8 static", "float"]


@dataclass(frozen=True)
class LayerPlan:
    """What one layer becomes.

    Args:
        kind: "int8 dynamic", "int8 static" or "float".
        reason: why, in a few words; the numbers are in the other fields.
        per_channel: one weight scale per output channel, or one per tensor.
        input_qparams: scale and zero point of a static layer's input.
        observer: the name of the observer that gave the static range.
        sqnr_db: output SQNR of each candidate, measured on the layer's input sample, in dB. "gptq" is the chosen scheme
            with weights rounded by GPTQ, measured on the held-out rows.
        norm: the name of the norm behind it that its weight and bias include.
        activation: the name of the activation's module, computed in this layer's epilogue.
        adds: whether a sum with another tensor lies before the activation, and is computed with it.
        sum_norm: the name of the nn.LayerNorm of the sum with another tensor, where both are computed with this layer.
        skipped: modules between this layer and `feeds` that have no effect in eval mode.
        feeds: the layer that reads this one's output as u8 codes, quantized with the reader's `input_qparams`.
        hands: the convolutions that alone read this one's output as floats, which therefore may stay channels last.
        turned: whether this one's output is turned so that its channels lie last, as they then may from the start.
        sum_qparams: scale and zero point of the u8 codes that its sum, after the activation, is handed over as.
        fine: whether each value of the input has two codes, the second for what the first leaves. Only of a dynamic
            linear layer. One row takes no longer with them, many take twice as long.
        channel_scale: what each channel of the input is multiplied by before it is quantized, K numbers, while the
            weight is divided by it (smoothing); `input_qparams` and `sqnr_db` are those of the product.
        alpha: the migration strength that gave it.
        smoothing_db: output SQNR without it, and with it, on held-out rows where rows were few. Where weights may be
            rounded by GPTQ, what is expected of that.
        no_smoothing: why it was not tried, where the config asked for it.
        rounding: how the weights are rounded: "nearest", or "gptq" with calibration data.
        gptq_db: output SQNR on held-out rows with weights rounded to nearest, and with GPTQ, whichever was chosen.
        no_gptq: why GPTQ was not tried, where the config asked for it.
        stats: what quantization did to the weight and the input, measured on the layer's input sample.
        weights: the rounded weights of a layer with `rounding="gptq"`. They are missing in JSON and in the plan of a
            converted model; `torchq.plan_of` reads them back from the model.
    """

    kind: Kind
    reason: str
    per_channel: bool = True
    input_qparams: QParams | None = None
    observer: str | None = None
    sqnr_db: dict[str, float] = field(default_factory=dict)
    norm: str | None = None
    activation: str | None = None
    adds: bool = False
    sum_norm: str | None = None
    skipped: tuple[str, ...] = ()
    feeds: str | None = None
    hands: tuple[str, ...] = ()
    turned: bool = False
    sum_qparams: QParams | None = None
    fine: bool = False
    channel_scale: tuple[float, ...] | None = field(default=None, repr=False)
    alpha: float | None = None
    smoothing_db: tuple[float, float] | None = None
    no_smoothing: str | None = None
    rounding: Literal["nearest", "gptq"] = "nearest"
    gptq_db: tuple[float, float] | None = None
    no_gptq: str | None = None
    stats: LayerStats | None = None
    weights: Rounded | None = field(default=None, repr=False, compare=False)

    @property
    def is_int8(self) -> bool:
        """Whether the layer runs in int8."""
        return self.kind != "float"

    @property
    def scale_vector(self) -> Tensor | None:
        """`channel_scale` as float32 (K,)."""
        if self.channel_scale is None:
            return None
        return torch.tensor(self.channel_scale, dtype=torch.float32, device="cpu")

    @property
    def folded(self) -> tuple[str, ...]:
        """The modules that this layer replaces: its activation, and the skipped ones."""
        return self.skipped if self.activation is None else (self.activation, *self.skipped)

    @property
    def measured_db(self) -> float | None:
        """The output SQNR of the chosen scheme; None for a float layer, and where nothing was measured."""
        if self.kind == "float":
            return None
        if self.rounding == "gptq":
            return self.sqnr_db.get("gptq")
        return self.sqnr_db.get(self.observer if self.kind == "int8 static" and self.observer else "dynamic")

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, without `weights`."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "weights"}
        values["stats"] = self.stats and dataclasses.asdict(self.stats)
        data: dict[str, Any] = to_json(values)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayerPlan":
        """The inverse of `to_dict`."""
        pair, stats, scale = data["input_qparams"], data["stats"], data["channel_scale"]
        sum_pair = data.get("sum_qparams")
        return cls(
            **{
                **data,
                "input_qparams": pair and QParams(*pair),
                "skipped": tuple(data["skipped"]),
                "hands": tuple(data.get("hands", ())),
                "sum_qparams": sum_pair and QParams(*sum_pair),
                "sqnr_db": {scheme: float(value) for scheme, value in data["sqnr_db"].items()},
                "channel_scale": scale and tuple(map(float, scale)),
                "smoothing_db": _pair(data["smoothing_db"]),
                "gptq_db": _pair(data["gptq_db"]),
                "stats": stats and LayerStats.from_dict(stats),
            }
        )


@dataclass(frozen=True)
class AttentionPlan:
    """How one attention of the model is computed.

    Args:
        scheme: of `torchq.ops.attention`, or "sdpa" where torch goes on computing it.
        reason: why, in a few words.
        sqnr_db: SQNR of the attention's output under the faster schemes, on calibration batches, in dB.
    """

    scheme: str
    reason: str
    sqnr_db: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AttentionPlan":
        """The inverse of `dataclasses.asdict`, and of the strings that JSON has for inf and nan."""
        _refuse_unknown(cls, data)
        return cls(data["scheme"], data["reason"], {scheme: float(db) for scheme, db in data["sqnr_db"].items()})


@dataclass(frozen=True)
class TablePlan:
    """What the table of one nn.Embedding or nn.EmbeddingBag becomes.

    Args:
        kind: "int8" or "float".
        reason: why, in a few words.
        owner: the layer or embedding whose int8 weight the table is, where the float model ties them; None if it is one
            of its own. A table whose owner stays in float stays so too.
        sqnr_db: SQNR of the int8 table against the float one, in dB: of what look-ups give.
        residual: whether look-ups have 4 more bits for each code, which lie beside the table. A head that shares it
            multiplies by the codes alone. Tables that share one int8 copy have them all, or none has.
        scaled: whether a table of its own has a channel_scale: that of a smoothed head, which a checkpoint was loaded
            without.
    """

    kind: Literal["int8", "float"]
    reason: str
    owner: str | None = None
    sqnr_db: float | None = None
    residual: bool = False
    scaled: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TablePlan":
        """The inverse of `dataclasses.asdict`, and of the strings that JSON has for inf and nan."""
        _refuse_unknown(cls, data)
        db = data["sqnr_db"]
        more = {key: data.get(key, False) for key in ("residual", "scaled")}  # plans of earlier versions have neither
        return cls(data["kind"], data["reason"], data["owner"], None if db is None else float(db), **more)


def attention_schemes(rows: Mapping[str, AttentionPlan]) -> dict[str, str]:
    """The schemes of `torchq.ops.attention` by the module's name, without what stays torch's."""
    return {name: row.scheme for name, row in rows.items() if row.scheme != "sdpa"}


@dataclass(frozen=True)
class Checked:
    """What the converted model gave on calibration batches, compared with the float model.

    Args:
        output_db: SQNR of the model's output in dB, of the plan as made and of others; far worse ones on fewer batches.
        chosen: which of them this plan is.
        batches: on how many batches.
        apart: whether these are batches that no weight was rounded by.
    """

    output_db: dict[str, float]
    chosen: str
    batches: int
    apart: bool

    @property
    def model_db(self) -> float:
        """SQNR of the model's output in dB, of the plan chosen."""
        return self.output_db[self.chosen]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Checked":
        """The inverse of `dataclasses.asdict`, and of the strings that JSON has for inf and nan."""
        output_db = {name: float(db) for name, db in data["output_db"].items()}
        return cls(output_db, data["chosen"], int(data["batches"]), bool(data["apart"]))


@dataclass(frozen=True)
class Plan:
    """The layer plans by name, in model order.

    To undo a smoothing, make the layer dynamic with `channel_scale=None`. `frontier` is what the search for an accuracy
    budget measured, `checked` what the converted model's output showed, `model_bytes` the bytes of the float model's
    parameters and buffers. `attentions` are those that torchq can compute, by the names of the modules that do:
    nn.MultiheadAttention, those of Hugging Face models, and those that call torch's function themselves. `tables` are
    those of embeddings. `written_attentions` are the modules whose code computes attention operation by operation, as
    the calibration runs showed; torchq computes none of them.

    >>> plan = Plan({"fc": LayerPlan("int8 dynamic", "no calibration data")})
    >>> print(plan)
    fc: int8 dynamic (no calibration data)
    >>> Plan.from_dict(plan.to_dict()) == plan
    True
    """

    layers: dict[str, LayerPlan]
    frontier: Frontier | None = None
    checked: Checked | None = None
    model_bytes: int | None = None
    attentions: dict[str, AttentionPlan] = field(default_factory=dict)
    tables: dict[str, TablePlan] = field(default_factory=dict)
    written_attentions: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(f"{name or '(root)'}: {layer.kind} ({layer.reason})" for name, layer in self.layers.items())

    def int8_layers(self) -> list[str]:
        """The names of the layers in int8."""
        return [name for name, layer in self.layers.items() if layer.is_int8]

    def norms(self) -> list[str]:
        """The names of the norms that int8 layers include."""
        return [layer.norm for layer in self.layers.values() if layer.is_int8 and layer.norm is not None]

    def int8_tables(self) -> list[str]:
        """The names of the embeddings in int8, an owner before the tables that are its own."""
        return sorted((name for name in self.tables if self._is_int8_table(name)), key=self._is_tied)

    def _is_int8_table(self, name: str) -> bool:
        table = self.tables[name]
        if table.kind != "int8" or table.owner is None:
            return table.kind == "int8"
        if table.owner in self.tables:
            return self._is_int8_table(table.owner)
        return table.owner in self.layers and self.layers[table.owner].is_int8

    def _is_tied(self, name: str) -> bool:
        return self.tables[name].owner is not None

    def without_weights(self) -> "Plan":
        """The plan without the rounded weights: a converted model already holds them, packed."""
        layers = {name: dataclasses.replace(layer, weights=None) for name, layer in self.layers.items()}
        return dataclasses.replace(self, layers=layers)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values: dicts, lists, strings and numbers. Rounded weights are not included."""
        layers = {name: layer.to_dict() for name, layer in self.layers.items()}
        checked = self.checked and to_json(dataclasses.asdict(self.checked))
        frontier = self.frontier and self.frontier.to_dict()
        return {
            "layers": layers,
            "frontier": frontier,
            "checked": checked,
            "model_bytes": self.model_bytes,
            "attentions": {name: to_json(dataclasses.asdict(row)) for name, row in self.attentions.items()},
            "tables": {name: to_json(dataclasses.asdict(row)) for name, row in self.tables.items()},
            "written_attentions": list(self.written_attentions),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing or unknown, as in plans that torchq 0.1.0 saved, or holds what it can't.
        """
        try:
            _refuse_unknown(cls, data)
            return cls(
                {name: LayerPlan.from_dict(values) for name, values in data["layers"].items()},
                data["frontier"] and Frontier.from_dict(data["frontier"]),
                data.get("checked") and Checked.from_dict(data["checked"]),
                data.get("model_bytes"),
                {name: AttentionPlan.from_dict(values) for name, values in data.get("attentions", {}).items()},
                {name: TablePlan.from_dict(values) for name, values in data.get("tables", {}).items()},
                tuple(map(str, data.get("written_attentions", ()))),
            )
        except (AttributeError, LookupError, TypeError, ValueError) as wrong:
            raise ValueError(
                "torchq.Plan.from_dict: data must be what Plan.to_dict() of this version gives. It does not fit: "
                f"{type(wrong).__name__} {wrong}. If another version of torchq saved it, convert the model again."
            ) from wrong


def _refuse_unknown(kind: type, data: Mapping[str, Any]) -> None:
    unknown = data.keys() - {each.name for each in dataclasses.fields(kind)}
    if unknown:
        raise TypeError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")


def _pair(data: Any) -> tuple[float, float] | None:
    return data and (float(data[0]), float(data[1]))


def attached_plan(qmodel: nn.Module) -> Plan:
    """The plan stored in a converted model. The rounded weights are not in it: they are in the model's layers.

    Raises:
        ValueError: `qmodel` did not come from `torchq.convert`.
    """
    plan = getattr(qmodel, "torchq_plan", None)
    if not isinstance(plan, Plan):
        raise BadValueError(
            f"this {type(qmodel).__name__} has no torchq_plan. Pass the model that torchq.convert returned."
        )
    return plan
