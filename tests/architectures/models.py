"""The architectures: each as a tiny model with inputs, and at its real size on the meta device. Nothing is downloaded.

Weights are normal with a standard deviation of 1/sqrt(K), about that of trained ones: an initial 0.02 would leave a
residual stream that hardly changes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCABULARY = 128
HIDDEN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = {**HIDDEN, "intermediate_size": 128, "vocab_size": VOCABULARY}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = {**HIDDEN, "intermediate_size": 128, "image_size": 32, "patch_size": 8}
EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
SPEECH = {
    **TINY,
    "conv_dim": (32, 32),
    "conv_kernel": (10, 8),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "group",
    "apply_spec_augment": False,
}
Inputs = dict[str, Any]


class Architecture(NamedTuple):
    """One row of the table.

    Args:
        tiny: makes the tiny model, in eval mode.
        real: makes the model at its usual size; on the meta device it takes no memory.
        inputs: a batch of inputs, by seed.
        generates: whether it has generate().
    """

    tiny: Callable[[], nn.Module]
    real: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    generates: bool = False


# ---- Inputs ---------------------------------------------------------------------------------------------------------


def _ids(seed: int, batch: int = 4, length: int = 16) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(seed: int) -> Inputs:
    """Token ids."""
    return {"input_ids": _ids(seed)}


def two_texts(seed: int) -> Inputs:
    """Token ids of an encoder and of a decoder."""
    return {"input_ids": _ids(seed), "decoder_input_ids": _ids(seed + 100, length=8)}


def image(seed: int) -> Inputs:
    """Images of 32 x 32."""
    return {"pixel_values": _normal(seed, 4, 3, 32, 32)}


def image_and_text(seed: int) -> Inputs:
    """Images and captions."""
    return {**image(seed), **text(seed)}


def patches_and_text(seed: int) -> Inputs:
    """SigLIP2's: patches of images of several shapes, and captions."""
    shapes = torch.tensor([[4, 4], [2, 4], [4, 2], [3, 3]])
    mask = (torch.arange(16) < shapes.prod(1, keepdim=True)).long()
    patches = {"pixel_values": _normal(seed, 4, 16, 3 * 8 * 8), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {**patches, **text(seed)}


def sound(seed: int) -> Inputs:
    """Samples of sound."""
    return {"input_values": _normal(seed, 4, 1000)}


def spectrum(seed: int) -> Inputs:
    """Whisper's: frames of a spectrogram, and tokens."""
    return {"input_features": _normal(seed, 4, 16, 32), "decoder_input_ids": _ids(seed, length=8)}


# ---- transformers ---------------------------------------------------------------------------------------------------


def _of(name: str, real: Inputs | None = None, inputs: Callable[[int], Inputs] = text, **tiny: Any) -> Architecture:
    """A model of transformers by the name of its class, with a tiny config and its usual one."""

    def make(given: Inputs) -> nn.Module:
        import transformers

        kind = getattr(transformers, name)
        model: nn.Module = kind(kind.config_class(**given))
        return model

    def generates() -> bool:
        return any(part in name for part in ("LMHead", "CausalLM", "ConditionalGeneration", "MTModel"))

    return Architecture(lambda: make(tiny), lambda: make(real or {}), inputs, generates())


_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
_BART = {
    "d_model": 64,
    **{
        f"{half}_{what}": n
        for half in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))
    },
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    **TOKENS,
    "decoder_start_token_id": 2,
}
_WHISPER = {**_BART, "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 64}
_BERT = {**TINY, "max_position_embeddings": 64, "pad_token_id": 0}
_LLAMA = {**TINY, **TOKENS, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
_MAMBA = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCABULARY, **TOKENS}
_TOWERS = {"text_config": {**TINY, "max_position_embeddings": 64, **TOKENS}, "vision_config": IMAGE}
_DETR_SIZES = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_queries": 8,
}


def _detr(tiny: bool) -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    small = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    backbone = ResNetConfig(out_features=["stage2" if tiny else "stage4"], **(small if tiny else {}))
    sizes = _DETR_SIZES if tiny else {}
    model: nn.Module = DetrForObjectDetection(
        DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, **sizes
        )
    )
    return model


TRANSFORMERS: dict[str, Architecture] = {
    "BERT": _of("BertModel", **_BERT),
    "RoBERTa": _of("RobertaModel", **_BERT),
    "DistilBERT": _of("DistilBertModel", **_BERT, hidden_dim=128),
    "ALBERT": _of("AlbertModel", **_BERT, embedding_size=32),
    "DeBERTa": _of("DebertaModel", **_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "DeBERTa v2": _of("DebertaV2Model", **_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "ELECTRA": _of("ElectraModel", **_BERT, embedding_size=32),
    "MPNet": _of("MPNetModel", **_BERT),
    "ModernBERT": _of(
        "ModernBertModel",
        **_BERT,
        cls_token_id=1,
        sep_token_id=2,
        **{k: v for k, v in TOKENS.items() if k != "pad_token_id"},
    ),
    "T5": _of("T5ForConditionalGeneration", inputs=two_texts, **_T5, decoder_start_token_id=0),
    "gated T5": _of(
        "T5ForConditionalGeneration",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        two_texts,
        **_T5,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "BART": _of("BartForConditionalGeneration", inputs=two_texts, **_BART),
    "Marian": _of("MarianMTModel", inputs=two_texts, **_BART),
    "GPT-2": _of("GPT2LMHeadModel", **TINY, **TOKENS),
    "GPT-Neo": _of(
        "GPTNeoForCausalLM", **TINY, **TOKENS, attention_types=[[["global", "local"], 1]], max_position_embeddings=64
    ),
    "GPT-NeoX": _of("GPTNeoXForCausalLM", **TINY, **TOKENS),
    "OPT": _of("OPTForCausalLM", **TINY, **TOKENS, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64),
    "Bloom": _of("BloomForCausalLM", {"hidden_size": 1024, "n_layer": 24, "n_head": 16}, **TINY, **TOKENS),
    "Llama": _of("LlamaForCausalLM", **_LLAMA),
    "Mistral": _of("MistralForCausalLM", **_LLAMA),
    "Qwen2": _of("Qwen2ForCausalLM", **_LLAMA),
    "Qwen3": _of("Qwen3ForCausalLM", **_LLAMA),
    "Gemma": _of("GemmaForCausalLM", **_LLAMA),
    "Gemma2": _of("Gemma2ForCausalLM", **_LLAMA),
    "Phi": _of("PhiForCausalLM", **_LLAMA),
    "Phi3": _of("Phi3ForCausalLM", **_LLAMA),
    "Falcon": _of("FalconForCausalLM", **TINY, **TOKENS),
    "Mixtral": _of("MixtralForCausalLM", **_LLAMA, num_experts_per_tok=2, num_local_experts=4),
    "Qwen2-MoE": _of(
        "Qwen2MoeForCausalLM",
        **_LLAMA,
        num_experts_per_tok=2,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
    ),
    "Qwen3-MoE": _of("Qwen3MoeForCausalLM", **_LLAMA, num_experts_per_tok=2, num_experts=4, moe_intermediate_size=32),
    "OLMoE": _of("OlmoeForCausalLM", **_LLAMA, num_experts_per_tok=2, num_experts=4),
    "Mamba": _of("MambaForCausalLM", **_MAMBA),
    "Mamba2": _of("Mamba2ForCausalLM", **_MAMBA, num_heads=8, head_dim=16, state_size=16, n_groups=2),
    "ViT": _of("ViTModel", inputs=image, **IMAGE),
    "Swin": _of(
        "SwinModel",
        inputs=image,
        image_size=32,
        patch_size=4,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "BEiT": _of("BeitModel", inputs=image, **IMAGE),
    "CLIP": _of("CLIPModel", inputs=image_and_text, **_TOWERS, projection_dim=64),
    "SigLIP": _of("SiglipModel", inputs=image_and_text, **_TOWERS),
    "SigLIP2": _of(
        "Siglip2Model",
        inputs=patches_and_text,
        text_config=_TOWERS["text_config"],
        vision_config={**HIDDEN, "intermediate_size": 128, "patch_size": 8, "num_patches": 16},
    ),
    "DINOv2": _of("Dinov2Model", inputs=image, **IMAGE),
    "ConvNeXt": _of("ConvNextModel", inputs=image, image_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_stages=2),
    "Whisper": _of("WhisperForConditionalGeneration", inputs=spectrum, **_WHISPER),
    "wav2vec2": _of("Wav2Vec2Model", inputs=sound, **SPEECH),
    "HuBERT": _of("HubertModel", inputs=sound, **SPEECH),
    "WavLM": _of("WavLMModel", inputs=sound, **SPEECH),
    "DETR": Architecture(lambda: _detr(True), lambda: _detr(False), image),
    "YOLOS": _of("YolosForObjectDetection", inputs=image, **{**IMAGE, "image_size": [32, 32]}, num_detection_tokens=8),
}


# ---- torch ----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A module under the name "body", called by keyword as those of transformers are, and perhaps a head."""

    def __init__(self, body: nn.Module, head: nn.Module | None = None, times: int = 1) -> None:
        super().__init__()
        self.body, self.head, self.times = body, head, times

    def forward(self, x: Tensor) -> Tensor:
        """What the body gives for x, as often as it takes inputs, through the head."""
        y = self.body(*[x] * self.times)
        y = y[0] if isinstance(y, tuple) else y
        return y if self.head is None else self.head(y)  # type: ignore[no-any-return]


class AttentionBlock(nn.Module):
    """nn.MultiheadAttention and a feed-forward network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width)."""
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(self.up(self.norm(x)).relu())  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """An MLP over tokens and one over channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 2 * width), nn.GELU(), nn.Linear(2 * width, tokens))
        self.over_channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width)."""
        x = x + self.over_tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norms[1](x))  # type: ignore[no-any-return]


class FusedQKV(nn.Module):
    """Attention whose three projections are one parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.empty(3 * width, width))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width)."""
        heads = nn.functional.linear(x, self.qkv).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*heads)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """A head whose weight is the embedding's table."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.body = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids -> logits."""
        return self.head(self.body(self.table(input_ids)))  # type: ignore[no-any-return]


class Lookups(nn.Module):
    """An nn.EmbeddingBag and an nn.Bilinear of two of its sums."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(vocabulary, width)
        self.pair = nn.Bilinear(width, width, width)
        self.head = nn.Linear(width, width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids -> (B, width)."""
        sums = self.table(input_ids)
        return self.head(self.pair(sums, sums.flip(0)))  # type: ignore[no-any-return]


class LoRA(nn.Module):
    """An adapter beside a frozen layer."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width)."""
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


class Convolutions(nn.Module):
    """A small convolutional network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2), nn.ReLU())
        self.head = nn.Linear(2 * width, 2 * width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W)."""
        return self.head(self.stem(pixel_values).mean((2, 3)))  # type: ignore[no-any-return]


def floats(seed: int) -> Inputs:
    """Rows of 64 numbers of unit scale, 16 tokens a sequence."""
    return {"x": _normal(seed, 4, 16, 64)}


def _torch(make: Callable[[int], nn.Module], width: int, inputs: Callable[[int], Inputs] = floats) -> Architecture:
    """A model by its width: 64, and the usual one."""
    return Architecture(lambda: make(64), lambda: make(width), inputs)


def _encoder(width: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
    return Model(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


TORCH: dict[str, Architecture] = {
    "nn.TransformerEncoder": _torch(_encoder, 512),
    "nn.Transformer": _torch(lambda w: Model(nn.Transformer(w, 4, 1, 1, 4 * w, batch_first=True), times=2), 512),
    "MHA and FF": _torch(AttentionBlock, 512),
    "LSTM": _torch(lambda w: Model(nn.LSTM(w, w, 2, batch_first=True), nn.Linear(w, w)), 512),
    "GRU": _torch(lambda w: Model(nn.GRU(w, w, 2, batch_first=True), nn.Linear(w, w)), 512),
    "CNN": _torch(Convolutions, 256, image),
    "MLP-Mixer": _torch(lambda w: Mixer(16, w), 512),
    "tied head": _torch(lambda w: Tied(VOCABULARY if w == 64 else 32000, w), 512, text),
    "Bilinear and EmbeddingBag": _torch(lambda w: Lookups(VOCABULARY if w == 64 else 32000, w), 128, text),
    "fused QKV parameter": _torch(FusedQKV, 512),
    "LoRA": _torch(lambda w: LoRA(w, 8), 1024),
}

ARCHITECTURES = TRANSFORMERS | TORCH


# ---- Weights --------------------------------------------------------------------------------------------------------


def made(architecture: Architecture) -> nn.Module:
    """The tiny model, in eval mode, its weights drawn by fixed seeds."""
    torch.manual_seed(0)
    model, generator = architecture.tiny().eval(), torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and any(part in name for part in ("weight", "proj", "qkv")):
                of_gpt2 = type(module).__name__ == "Conv1D"
                depth = (
                    parameter.shape[0]
                    if of_gpt2
                    else parameter.shape[-1]
                    if parameter.dim() == 3 and "proj" in name
                    else parameter[0].numel()
                )
                nn.init.normal_(parameter, std=depth**-0.5, generator=generator)
    return model
