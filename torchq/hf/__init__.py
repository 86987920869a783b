"""torchq in transformers: `from_pretrained` and `save_pretrained` of int8 models. Importing it registers "torchq".

import torchq.hf
model = AutoModel.from_pretrained(name, quantization_config=torchq.hf.TorchqConfig())
"""

from typing import Any

from torchq.hf import availability  # noqa: F401 first
from torchq.hf.compressed import from_compressed_tensors, save_compressed_tensors
from torchq.hf.quantizer import TorchqHfQuantizer
from torchq.hf.sentences import convert_sentence_transformer
from torchq.modules.attention import register as register_attention
from torchq.planning.pretrained import TorchqConfig

__all__ = [
    "TorchqConfig",
    "TorchqHfQuantizer",
    "convert_sentence_transformer",
    "from_compressed_tensors",
    "int8_lora",
    "save_compressed_tensors",
]


register_attention()  # a checkpoint may ask for it


def int8_lora(config: Any) -> Any:
    """Lets a LoraConfig of PEFT find int8 layers: pass `int8_lora(LoraConfig(...))` to `get_peft_model`.

    It is the same config, changed. What PEFT saves of an adapter does not say this, so loading one needs it again:
    `PeftModel.from_pretrained(qmodel, path, config=int8_lora(LoraConfig.from_pretrained(path)))`.

    Raises:
        TypeError: `config` is no LoraConfig.
    """
    from torchq.hf.adapters import register

    register(config)
    return config
