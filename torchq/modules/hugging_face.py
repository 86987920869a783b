"""What a converted Hugging Face model owes to `save_pretrained`: an error, rather than files that load as noise.

`save_pretrained` writes the int8 tensors, and `from_pretrained` builds the float model, does not find its weights under
their names, and fills it with random ones, with a warning at most. transformers asks a model's `hf_quantizer` whether
it can be saved; this one says no, and what to do instead.
"""

from torch import nn

from torchq.modules.base import Int8Module


class Int8Quantizer:
    """Stands where transformers keeps the quantizer of a model."""

    is_trainable = True  # adapters beside the int8 layers
    is_qat_trainable = False
    is_compileable = True
    pre_quantized = True

    def is_serializable(self) -> bool:
        """No: from_pretrained could not read it."""
        return False

    @property
    def quantization_config(self) -> None:
        """Asked for where a model is saved.

        Raises:
            RuntimeError: always, with what to do.
        """
        raise RuntimeError(
            "torchq: save_pretrained can't save int8 layers: from_pretrained would load random weights for them. Save "
            "the float model with it, and of the converted one torch.save((qmodel.torchq_plan.to_dict(), "
            "qmodel.state_dict()), path). To load: torchq.apply_plan(model, torchq.Plan.from_dict(plan)), then "
            "load_state_dict(state)."
        )


def refuse_save_pretrained(model: nn.Module) -> None:
    """Puts an Int8Quantizer into each part of the model that could save itself and has int8 layers."""
    for module in model.modules():
        saves = hasattr(module, "save_pretrained") and getattr(module, "hf_quantizer", None) is None
        if saves and any(isinstance(child, Int8Module) for child in module.modules()):
            module.hf_quantizer = Int8Quantizer()  # type: ignore[assignment]
