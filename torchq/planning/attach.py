"""The plan of a converted model, on the model, and on each part of it that can save itself.

transformers asks the `hf_quantizer` of a model how it is saved, and each PreTrainedModel in a model may be saved alone.
Without one, `save_pretrained` would write int8 tensors that `from_pretrained` does not find, and fills with random
numbers. transformers is also told of "torchq" then, so that the process which converted a model can load it again.
"""

import contextlib
import importlib
import sys
from typing import Any

from torch import nn

from torchq.modules.attention import attends
from torchq.modules.base import Int8Module
from torchq.planning.plan import Plan


def attach_plan(model: nn.Module, plan: Plan) -> None:
    """Makes `plan` that of the converted model: its attribute `torchq_plan`, and what `save_pretrained` writes."""
    _offer_save_pretrained(model)
    model.torchq_plan = plan.without_weights()  # type: ignore[assignment]
    for path, module in model.named_modules():
        quantizer = vars(module).get("hf_quantizer")
        if hasattr(quantizer, "take_plan"):
            quantizer.take_plan(model.torchq_plan, path)


def _offer_save_pretrained(model: nn.Module) -> None:
    """Lets the parts of a model that could save themselves do so with their int8 layers; or say why they can't."""
    for module in model.modules():
        saves = hasattr(module, "save_pretrained") and getattr(module, "hf_quantizer", None) is None
        if saves and any(isinstance(child, Int8Module) or attends(child) for child in module.modules()):
            module.hf_quantizer = _quantizer(module)


def _quantizer(module: nn.Module) -> Any:
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return NotSaved()
    from torchq.planning.pretrained import Int8Quantizer

    with contextlib.suppress(ImportError):  # an older transformers, which can save the model and not load it
        importlib.import_module("torchq.hf")
    return Int8Quantizer()


class NotSaved:
    """Stands where a library other than transformers keeps the quantizer of a model."""

    def is_serializable(self) -> bool:
        """No: its from_pretrained could not read int8 layers."""
        return False

    @property
    def quantization_config(self) -> None:
        """Asked for where a model is saved.

        Raises:
            RuntimeError: always, with what to do.
        """
        raise RuntimeError(
            "torchq: this library's save_pretrained can't save int8 layers. Save the converted model by "
            "torchq.save(qmodel, path), and load it by torchq.load(path, model), with the float model."
        )
