"""Transformers of the usual kinds and sizes, built from their configs with fixed seeds: nothing is downloaded.

Weights are normal with a standard deviation of 1/sqrt(K), about that of trained ones: transformers' own initial 0.02
would leave a residual stream that hardly changes. `CELLS` lists what benchmarks/transformers.py measures.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

DECODED_AFTER = 64  # tokens in the cache of a decoding cell
BERT_VOCABULARY, GPT2_VOCABULARY, LLAMA_VOCABULARY = 30522, 50257, 32000


class Cell(NamedTuple):
    """A model and the shape of its input. `sample(batch, generator)` draws an input."""

    name: str
    kind: str  # encoder, prefill or decoding
    model: Callable[[], nn.Module]
    sample: Callable[[int, Generator], Tensor]
    batch: int


class First(nn.Module):
    """The first output of a model of Hugging Face, as a function of its first input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Any input -> last hidden state."""
        return self.model(x)[0]  # type: ignore[no-any-return]


class Prompt(nn.Module):
    """What generate() wants of a prompt, the logits of its last token. The cache is left out: few exporters know it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, 1, vocabulary)."""
        mask = torch.ones_like(x)  # as generate() passes it; without one, transformers looks for packed sequences
        return self.model(x, attention_mask=mask, use_cache=False, logits_to_keep=1).logits  # type: ignore[no-any-return]


class DecodingStep(nn.Module):
    """The logits of the next tokens behind a fixed cache of keys and values, so that every call does the same work."""

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            cache = model(prompt, use_cache=True).past_key_values
        for i, layer in enumerate(cache.layers):
            self.register_buffer(f"keys{i}", layer.keys)
            self.register_buffer(f"values{i}", layer.values)
        self.depth = len(cache.layers)

    def forward(self, x: Tensor) -> Tensor:
        """(1, tokens) -> (1, tokens, vocabulary)."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = DynamicCache()
        for i in range(self.depth):
            layer = DynamicLayer()
            layer.lazy_initialization(getattr(self, f"keys{i}"), getattr(self, f"values{i}"))
            layer.keys, layer.values = getattr(self, f"keys{i}"), getattr(self, f"values{i}")
            cache.layers.append(layer)
        return self.model(x, past_key_values=cache, use_cache=True).logits  # type: ignore[no-any-return]


def with_weights(model: nn.Module) -> nn.Module:
    """The model in eval mode, the weights of its linear layers and convolutions drawn anew (above)."""
    from transformers.pytorch_utils import Conv1D

    generator = Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            weight: Tensor = module.in_proj_weight
        elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)):
            weight = module.weight
        else:
            continue
        depth = weight.shape[0] if isinstance(module, Conv1D) else weight[0].numel()
        nn.init.normal_(weight, std=depth**-0.5, generator=generator)
    return model.eval()


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return First(with_weights(BertModel(BertConfig(), add_pooling_layer=False)))


def _sentence_encoder() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return First(with_weights(BertModel(config, add_pooling_layer=False)))


def _distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertModel

    return First(with_weights(DistilBertModel(DistilBertConfig())))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return First(with_weights(ViTModel(ViTConfig(), add_pooling_layer=False)))


def _whisper_encoder() -> nn.Module:
    from transformers import WhisperConfig, WhisperModel

    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    config = WhisperConfig(d_model=512, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=2048, **heads)
    return First(with_weights(WhisperModel(config).encoder))


def _torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
    return with_weights(nn.TransformerEncoder(layer, 6, enable_nested_tensor=False))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return with_weights(GPT2LMHeadModel(GPT2Config()))


def _llama() -> nn.Module:
    """200 million parameters: 12 blocks of width 1024, 4 groups of keys and values for 16 heads, SwiGLU, RMSNorm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    return with_weights(LlamaForCausalLM(LlamaConfig(vocab_size=LLAMA_VOCABULARY, **width, **heads)))


def _prefill(model: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Prompt(model())


def _decoding(model: Callable[[], nn.Module], vocabulary: int) -> Callable[[], nn.Module]:
    prompt = _tokens(DECODED_AFTER, vocabulary)(1, Generator().manual_seed(2))
    return lambda: DecodingStep(model(), prompt)


def _tokens(length: int, vocabulary: int) -> Callable[[int, Generator], Tensor]:
    return lambda batch, generator: torch.randint(vocabulary, (batch, length), generator=generator)


def _normal(*shape: int) -> Callable[[int, Generator], Tensor]:
    return lambda batch, generator: torch.randn(batch, *shape, generator=generator)


CELLS = [
    *(
        Cell(f"BERT-base {batch}x{length}", "encoder", _bert, _tokens(length, BERT_VOCABULARY), batch)
        for batch, length in ((1, 128), (1, 16), (8, 128))
    ),
    Cell("DistilBERT 1x128", "encoder", _distilbert, _tokens(128, BERT_VOCABULARY), 1),
    Cell("sentence encoder 16x64", "encoder", _sentence_encoder, _tokens(64, BERT_VOCABULARY), 16),
    Cell("ViT-B/16 1x197", "encoder", _vit, _normal(3, 224, 224), 1),
    Cell("Whisper-base encoder 1x1500", "encoder", _whisper_encoder, _normal(80, 3000), 1),
    Cell("nn.TransformerEncoder 1x128", "encoder", _torch_encoder, _normal(128, 768), 1),
    Cell("GPT-2 prefill 1x128", "prefill", _prefill(_gpt2), _tokens(128, GPT2_VOCABULARY), 1),
    Cell("GPT-2 decoding", "decoding", _decoding(_gpt2, GPT2_VOCABULARY), _tokens(1, GPT2_VOCABULARY), 1),
    Cell("Llama 200M prefill 1x64", "prefill", _prefill(_llama), _tokens(64, LLAMA_VOCABULARY), 1),
    Cell("Llama 200M decoding", "decoding", _decoding(_llama, LLAMA_VOCABULARY), _tokens(1, LLAMA_VOCABULARY), 1),
]
