"""LoRA adapters of PEFT on int8 layers. To be imported only where PEFT is installed."""

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import layer as lora

from torchq.modules.quantized_linear import QuantizedLinear


class Int8Lora(lora.Linear):  # type: ignore[misc]
    """`y = base(x) + scaling · B(A(x))` on a QuantizedLinear, which hands gradients to its input."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """An error: there is no float weight to add to.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "torchq: an adapter can't be merged into an int8 weight. Keep it beside the layer, or merge it into the "
            "float model and convert that."
        )


def register(config: Any) -> None:
    """Tells a LoraConfig of int8 layers, by PEFT's way for layer types that it does not know.

    Raises:
        TypeError: `config` is another one.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"torchq.hf.int8_lora: config must be a peft.LoraConfig, got {type(config).__name__}.")
    config._register_custom_module({QuantizedLinear: Int8Lora})
