"""PackedWeights: the int8 weight of a layer, as memory, as a checkpoint, and as what foreign code reads.

The packed weight is the only copy in memory. A checkpoint (`state_dict()`, pickle) holds canonical tensors, which are
the same on every CPU; the packed form is made of them wherever they arrive. The int8 codes have a name of their own,
`weight_int8`, in both: a float model that is given such a checkpoint reports it as missing and unexpected keys. To
foreign code the layer has `weight` and `bias` in float (`FloatView`).
"""

from functools import partial
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from torchq import _C, ops
from torchq.modules.base import Int8Module
from torchq.modules.float_view import FloatView, FloatViews, bias_view, float_weight, read_only, weight_view
from torchq.modules.huge_pages import in_huge_pages
from torchq.modules.refusals import not_settable
from torchq.modules.sending import received, sendable
from torchq.numerics.qparams import FLT_MAX, FLT_MIN, QParams
from torchq.numerics.residual import residuals_of
from torchq.ops.lookup import pack_residuals, residual_width
from torchq.ops.weights import weight_blocks

_in_one_step = itemgetter("_buffers", "input_qparams")  # nothing of Python runs between the two
RESIDUAL = "weight_residual"
"""The one key that a checkpoint may lack: that of an earlier version has the codes alone."""

_OWN = ("weight_int8", "weight_scale", RESIDUAL, "bias", "channel_scale", "input_scale", "input_zero_point")
_READ_ONLY = ("weight", "bias", "weight_int8", "weight_scale", "channel_scale")


class PackedWeights(Int8Module):
    """Weight int8 (N, K), its scales (N,), a bias (N,) or none, and what quantizes the input.

    That is the input's channel_scale (K,), if any, and its static qparams, if any.
    """

    packed: Tensor
    residual: Tensor | None  # where the weight is a table too: 4 more bits for each code, for look-ups alone
    in_features: int
    out_features: int
    has_bias: bool
    dtype: torch.dtype
    input_qparams: QParams | None
    fixed: ClassVar[tuple[str, ...]] = ("in_features", "out_features")  # what the packed weight was made for
    transposed: bool = False  # whether `weight` is (in_features, out_features) to foreign code

    def replace_weight(self, weight_int8: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        """Takes other codes (N, K), scales (N,) and bias (N,) of the same layer, for the same channel_scale.

        Residuals, which were those of the codes before, become zeros.
        """
        packed = self._pack(weight_int8, weight_scale, bias, self.channel_scale)
        self._set_packed(packed, self._no_residual(), has_bias=bias is not None)

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Codes (N, K), scales (N,), bias (N,), zeros if there is none, and the channel_scale or None."""
        weight, scale, bias, channel_scale = self._unpacked()
        return weight, scale, bias, channel_scale if channel_scale.numel() else None

    def share(self, packed: Tensor, residual: Tensor | None = None) -> None:
        """Takes the packed weight, and a table's residuals, of another layer like this one, which keeps them too."""
        self._set_packed(packed, residual)

    def settle(self) -> None:
        """Asks the system for huge pages under the packed weight: for a layer that is kept, since it takes a copy."""
        packed, _ = self.table()
        if type(packed) is Tensor and packed.device.type == "cpu":  # otherwise it has no memory
            _C.gather_into_huge_pages(packed.data_ptr(), packed.nbytes)

    # ---- As a table: an embedding may share the weight ---------------------------------------------------------------

    def table(self) -> tuple[Tensor, Tensor | None]:
        """What look-ups read: the packed weight, and its residuals or None, of one moment between two `_set_packed`."""
        if is_dynamo_compiling():
            return self.packed, self.residual
        buffers = self._buffers
        return buffers["packed"], buffers.get("residual")  # type: ignore[return-value]

    def add_residual(self, weight: Tensor) -> None:
        """Gives each code 4 more bits for look-ups, from the float weight (N, K) that the codes were made of."""
        codes, scale, _, channel_scale = self.rows()
        blocks = weight_blocks(weight.detach(), channel_scale)
        parts = [pack_residuals(residuals_of(values, codes[rows], scale[rows])) for rows, values in blocks]
        self._set_packed(self.packed, torch.cat(parts))

    def await_residual(self) -> None:
        """The same on the meta device, without values."""
        shape = (self.out_features, residual_width(self.in_features))
        self._set_packed(self.packed, torch.empty(shape, dtype=torch.uint8, device="meta"))

    def _no_residual(self) -> Tensor | None:
        """What it has beside codes that come without residuals: zeros, if it has residuals."""
        device = self.packed.device
        return None if self.residual is None else torch.zeros_like(self.residual, device=device)

    # ---- How they are packed: a layer of another kind has its own ----------------------------------------------------

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    @property
    def _channels(self) -> int:
        """How many numbers a channel_scale has."""
        return self.in_features

    def _pack(self, weight_int8: Tensor, scale: Tensor, bias: Tensor | None, channel_scale: Tensor | None) -> Tensor:
        return ops.pack(weight_int8, scale, bias, channel_scale)

    def _unpacked(self, packed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        packed = self.packed if packed is None else packed
        return torch.ops.torchq.unpack(packed, self.in_features)  # type: ignore[no-any-return]

    def _scales_channels(self, packed: Tensor) -> bool:
        return ops.has_channel_scale(packed, self.in_features)

    def _float_weight(self, packed: Tensor) -> Tensor:
        return float_weight(packed, self.in_features)

    def _weight_view(self, packed: Tensor) -> FloatView:
        return weight_view(packed, self.out_features, self.in_features, self.dtype)

    def _set_packed(self, packed: Tensor, residual: Tensor | None = None, **others: Any) -> None:
        """Takes a packed weight, its residuals, and other attributes that belong to it, all at once.

        Other threads may be in a call of the layer. dict.update() is one step to them, as long as nothing of Python
        runs in it: so what it replaces is kept until it is over.
        """
        for name in DERIVED - self._buffers.keys():
            self.register_buffer(name, None, persistent=False)
        weight = self._weight_view(packed)
        views = FloatViews(weight=weight.t() if self.transposed else weight)
        if others.get("has_bias", self.has_bias):
            views["bias"] = bias_view(partial(self._unpacked, packed), self.out_features, self.dtype, packed.device)
        replaced = dict(self.__dict__)
        buffers = {**self._buffers, "packed": packed, "residual": residual}
        self.__dict__.update(others, _buffers=buffers, _parameters=views)
        del replaced

    def _moment(self) -> tuple[Tensor, QParams | None]:
        """The packed weight and the qparams of the input, of one moment between two `_set_packed`."""
        if is_dynamo_compiling():
            return self.packed, self.input_qparams
        buffers, input_qparams = _in_one_step(self.__dict__)
        return buffers["packed"], input_qparams

    # ---- What foreign code reads -------------------------------------------------------------------------------------

    def present_transposed(self) -> None:
        """From now on `weight` is (in_features, out_features), as the float module stored it."""
        self.transposed = True
        self._set_packed(*self.table())

    @property
    def weight(self) -> Tensor:
        """The weight (out_features, in_features) as the float layer had it, in the model's dtype: a `FloatView`.

        Read only. Dequantized, and times the channel_scale: the layer approximates `F.linear(x, weight, bias)`. Where
        the float module stored its weight transposed, so is this.
        """
        if is_dynamo_compiling():  # which can't trace a tensor subclass: it gets the values
            weight = self._float_weight(self.packed).to(self.dtype)
            return weight.t() if self.transposed else weight
        return self._parameters["weight"]  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias (out_features,) in the model's dtype, read only; None without one."""
        if is_dynamo_compiling():
            return self._unpacked()[2].to(self.dtype) if self.has_bias else None
        return self._parameters.get("bias")

    @property
    def weight_int8(self) -> Tensor:
        """The codes, int8 (out_features, in_features): unpacked from the only copy, a new tensor at each access."""
        return self._unpacked()[0]

    @property
    def weight_scale(self) -> Tensor:
        """float32 (out_features,)."""
        return self._unpacked()[1]

    @property
    def channel_scale(self) -> Tensor | None:
        """float32 (in_features,): what every row of the input is multiplied by before it is quantized, or None."""
        return self._unpacked()[3] if self._scales_channels(self.packed) else None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _READ_ONLY:
            raise read_only(name)
        if name in self.fixed and value != self.__dict__.get(name, value):
            raise not_settable(name, f"a {type(self).__name__}, whose packed weight was made for what it is")
        super().__setattr__(name, value)

    # ---- Checkpoints -------------------------------------------------------------------------------------------------

    def _canonical(self) -> dict[str, Tensor]:
        buffers, pair = _in_one_step(self.__dict__)
        packed, residual = buffers["packed"], buffers.get("residual")
        weight, scale, bias, channel_scale = self._unpacked(packed)
        tensors = {"weight_int8": weight, "weight_scale": scale}
        if residual is not None:
            tensors[RESIDUAL] = residual
        if self.has_bias:
            tensors["bias"] = bias
        if channel_scale.numel():
            tensors["channel_scale"] = channel_scale
        if pair is not None:
            tensors["input_scale"] = torch.tensor(pair.scale, dtype=torch.float32, device=packed.device)
            tensors["input_zero_point"] = torch.tensor(pair.zero_point, dtype=torch.int32, device=packed.device)
        return tensors

    def expected(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor of a checkpoint."""
        n = self.out_features
        tensors = {"weight_int8": (torch.int8, self._weight_shape), "weight_scale": (torch.float32, (n,))}
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = dict(tensors)
        if self.residual is not None:
            expected[RESIDUAL] = (torch.uint8, (n, residual_width(self.in_features)))
        if self.has_bias:
            expected["bias"] = (torch.float32, (n,))
        if self._scales_channels(self.packed):
            expected["channel_scale"] = (torch.float32, (self._channels,))
        if self.input_qparams is not None:
            expected |= {"input_scale": (torch.float32, ()), "input_zero_point": (torch.int32, ())}
        return expected

    def _adopt(self, tensors: dict[str, Tensor]) -> None:
        """Takes these canonical tensors over; the inverse of `_canonical`."""
        others = {}
        if "input_scale" in tensors:
            others["input_qparams"] = QParams(float(tensors["input_scale"]), int(tensors["input_zero_point"]))
        vectors = (tensors.get("bias"), tensors.get("channel_scale"))
        packed = self._pack(tensors["weight_int8"], tensors["weight_scale"], *vectors)
        self._set_packed(in_huge_pages(packed), tensors.get(RESIDUAL), **others)

    def problems(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """What is wrong with this layer's tensors in a checkpoint, each with its key; missing keys are not."""
        expected, found = self.expected(), []
        for name in _OWN:
            key = prefix + name
            if key not in state_dict:
                continue
            tensor = state_dict[key]
            if not isinstance(tensor, Tensor):
                found.append(f"{key}: expected a tensor, got {type(tensor).__name__}.")
            elif name not in expected:
                found.append(f"{key}: {self._other_scheme(name)}")
            elif (tensor.dtype, tuple(tensor.shape)) != expected[name]:
                dtype, shape = expected[name]
                found.append(f"{key}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}.")
            elif tensor.is_meta:
                found.append(f"{key}: is on the meta device and has no values. Load the checkpoint to the CPU.")
            elif name.endswith("_scale") and not bool(((tensor >= FLT_MIN) & (tensor <= FLT_MAX)).all()):
                found.append(f"{key}: scales must be positive normal float32 numbers; this one has others.")
            elif name.endswith("_zero_point") and not 0 <= int(tensor) <= 255:
                found.append(f"{key}: a zero point must be in [0, 255], got {int(tensor)}.")
        return found

    def _other_scheme(self, name: str) -> str:
        what = _HAS.get(name, "is static")
        return (
            f"the saved layer {what}, this one is not so. Make the model by the saved one's plan first: "
            "torchq.apply_plan(model, plan), with the plan of the saved model (qmodel.torchq_plan.to_dict() is JSON)."
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + key: tensor for key, tensor in self._canonical().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        expected = self.expected()
        given = {key: state_dict[prefix + key] for key in expected if prefix + key in state_dict}
        for group in _GROUPS:  # codes mean nothing without their scales: all or none
            if any(key in expected and key not in given for key in group if key != RESIDUAL):
                given = {key: tensor for key, tensor in given.items() if key not in group}
        if strict:
            missing_keys.extend(prefix + key for key in expected if key != RESIDUAL and prefix + key not in state_dict)
            ours = [key for key in state_dict if key.startswith(prefix)]
            unexpected_keys.extend(key for key in ours if key[len(prefix) :] not in _OWN)
        found = self.problems(state_dict, prefix)
        error_msgs.extend(found)
        if not found and given:
            if "weight_int8" in given and RESIDUAL in expected:  # which is kept as it comes: no packing copies it
                dtype, shape = expected[RESIDUAL]
                residual = given.get(RESIDUAL, torch.zeros(shape, dtype=dtype, device="cpu")).contiguous()
                given[RESIDUAL] = residual if local_metadata.get("assign_to_params_buffers") else residual.clone()
            own = {} if given.keys() == expected.keys() else self._canonical()
            self._adopt({**own, **given})

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_buffers"] = {key: value for key, value in self._buffers.items() if key not in DERIVED}
        state["_parameters"] = {}
        state["canonical"] = sendable(self._canonical())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        canonical = received(state.pop("canonical"))
        super().__setstate__(state)
        self._adopt(canonical)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedWeights":
        # model.half() and friends: the weights stay int8, but the dtype given back to a float neighbour follows.
        self.__dict__["_parameters"] = {}  # views are made anew, not converted
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        self._set_packed(*self.table())
        return self


DERIVED = frozenset(("packed", "residual"))
"""The buffers that a checkpoint has in their canonical form."""

_HAS = {
    "bias": "has a bias",
    "channel_scale": "scales the channels of its input",
    RESIDUAL: "has 4 more bits for look-ups",
}
_GROUPS = (("weight_int8", "weight_scale", RESIDUAL, "channel_scale"), ("input_scale", "input_zero_point"))
