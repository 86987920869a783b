"""What transformers asks of a converted model: how it is saved by `save_pretrained`, and what config.json says then.

The plan goes into config.json, and the tensors are those of `state_dict()`. To read them back takes `import torchq.hf`.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from torchq.config import QConfig
from torchq.errors import BadValueError
from torchq.modules.attention import NAME
from torchq.modules.base import Int8Module
from torchq.planning.names import renamed, within
from torchq.planning.plan import Plan
from torchq.planning.skeleton import to_stored

METHOD = "torchq"
"""The name under which transformers knows torchq."""

FORMAT = 1

ADVICE = "TO LOAD THIS INT8 MODEL: import torchq.hf"
"""The name of a tensor without values in each int8 checkpoint. Who can't load one is shown the names of its tensors."""


class TorchqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How transformers loads a model in int8: `from_pretrained(name, quantization_config=TorchqConfig())`.

    The model is read in float and converted, without calibration data. A model that was converted before it was saved
    needs no config: its own is in its config.json, with the plan.

    Args:
        modules_to_not_convert: names of modules to leave in float, as in transformers' other configs: a module of this
            name and all in it, and those whose names end like this.
        weight: see `torchq.QConfig`.
        attention: see there.
        embeddings: see there.
        fuse: see there.
        plan: what `save_pretrained` wrote, not for users.
        guard: what that of 0.2.0 wrote, and no one reads.
        format_version: likewise.
        quant_method: "torchq".

    Raises:
        ValueError: another value, or a format of a later torchq.
    """

    def __init__(
        self,
        modules_to_not_convert: Sequence[str] | None = None,
        *,
        weight: str = "per_channel",
        attention: str = "auto",
        embeddings: bool | str = "auto",
        fuse: bool = True,
        plan: dict[str, Any] | None = None,
        guard: str | None = None,
        format_version: int = FORMAT,
        quant_method: str = METHOD,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"TorchqConfig: quant_method must be {METHOD!r}, got {quant_method!r}.")
        if format_version != FORMAT:
            raise ValueError(
                f"TorchqConfig: this checkpoint has format {format_version!r}, and this torchq reads {FORMAT}. Update "
                "torchq, or convert the model again."
            )
        self.quant_method = METHOD
        self.format_version = FORMAT
        self.modules_to_not_convert = _list_of_names(modules_to_not_convert)
        self.weight, self.attention, self.embeddings, self.fuse = weight, attention, embeddings, fuse
        self.plan = plan
        self.qconfig(())

    def qconfig(self, exclude: tuple[str, ...]) -> QConfig:
        """The same for `torchq.convert`, which leaves these modules in float."""
        return QConfig(
            weight=self.weight,  # type: ignore[arg-type]
            attention=self.attention,
            embeddings=self.embeddings,  # type: ignore[arg-type]
            fuse=self.fuse,
            exclude=exclude,
        )


def _list_of_names(modules: Sequence[str] | None) -> list[str] | None:
    if modules is None:
        return None
    if not isinstance(modules, (list, tuple)) or not all(isinstance(name, str) for name in modules):
        raise ValueError(f"TorchqConfig: modules_to_not_convert must be a list of names of modules, got {modules!r}.")
    return list(modules)


class Int8Quantizer(HfQuantizer):  # type: ignore[misc]
    """Stands where transformers keeps the quantizer of a model, and says how it is saved.

    `plan` is that of the module that has this quantizer, under the names in it.
    """

    requires_calibration = False
    plan: Plan | None = None
    _why_not: str | None = None

    def __init__(self, quantization_config: TorchqConfig | None = None, **kwargs: Any) -> None:
        super().__init__(TorchqConfig() if quantization_config is None else quantization_config, **kwargs)

    def take_plan(self, plan: Plan, path: str) -> None:
        """Takes the rows of the whole model's plan that are about the module of this name."""
        try:
            self.plan, self._why_not = renamed(plan, within(path)), None
        except BadValueError as error:
            self.plan, self._why_not = None, str(error)

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the int8 layers are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile takes the model."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Whether `save_pretrained` may save the model.

        Raises:
            ValueError: it can't, with the reason.
        """
        if self._why_not is not None:
            raise ValueError(f"torchq: this part of a converted model can't be saved alone: {self._why_not}")
        return True

    def get_state_dict_and_metadata(
        self, model: nn.Module, *_: Any, **__: Any
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes. It puts the plan into the model's config, which is written next."""
        assert self.plan is not None
        config: Any = copy.copy(self.quantization_config)
        config.plan = to_stored(self.plan)
        model.config.quantization_config = config  # type: ignore[union-attr]
        model._weight_conversions = []  # type: ignore[assignment] # the tensors keep the model's own names
        extra = guards(model)
        if extra:
            extra[ADVICE] = torch.empty(0, dtype=torch.int8, device="cpu")
        else:  # attention alone: transformers refuses one that nobody has registered
            model.config.attn_implementation = NAME  # type: ignore[union-attr]
        state: dict[str, Tensor] = model.state_dict()
        return state | extra, {}


def guards(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that no float model takes: parameters of its int8 modules, of another shape.

    transformers without `import torchq.hf` warns that it does not know "torchq", and loads the checkpoint all the same,
    with random weights. A tensor of another shape stops it. There is one for each part of the model that has int8
    modules, since a part may be loaded alone: `vision_model.encoder`, `lm_head`.
    """
    found: dict[str, str] = {}
    inside: tuple[str, ...] = ()  # modules whose parts have no name in the float model
    for name, module in model.named_modules():
        if not isinstance(module, Int8Module) or name.startswith(inside):
            continue
        inside = (*inside, f"{name}.")
        if module.float_key is not None:
            found.setdefault(".".join(name.split(".")[:2]), f"{name}.{module.float_key}")
    return {key: torch.empty(0, dtype=torch.int8, device="cpu") for key in found.values()}
