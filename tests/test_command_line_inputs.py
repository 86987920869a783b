"""What `torchq verify` and `bench` run models on that are given no texts, and what they say where they can't."""

import pytest
import torch

from helpers import ROOT
from helpers.texts import SIZES

pytest.importorskip("typer", reason="the command line needs typer")
transformers = pytest.importorskip("transformers", "5.17", reason="transformers 5.17 is not installed")

from torchq.command_line import models  # noqa: E402
from torchq.command_line.console import UserError  # noqa: E402

pytestmark = [pytest.mark.usefixtures("seeded", "quiet_transformers"), pytest.mark.slow(seconds=4)]

MORE = {"intermediate_size": 48, "num_hidden_layers": 1}
VISION = {"hidden_size": 32, "num_attention_heads": 4, "image_size": 16, "patch_size": 8, **MORE}
TEXT = {**SIZES, **MORE, "max_position_embeddings": 20}
CONVOLUTIONS = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
SOUND = {**SIZES, **MORE, **CONVOLUTIONS, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
WHISPER = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8}
WHISPER |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
WHISPER |= {"max_source_positions": 50, "max_target_positions": 20, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 99}
IDS = {"input_ids": (2, 6), "attention_mask": (2, 6)}
MODELS = {  # a config, and the shapes of two inputs of six tokens
    "BertModel": (TEXT, IDS),
    "T5Model": (T5, {**IDS, "decoder_input_ids": (2, 6)}),
    "ViTModel": (VISION, {"pixel_values": (2, 3, 16, 16)}),
    "CLIPModel": ({"text_config": TEXT, "vision_config": VISION}, {**IDS, "pixel_values": (2, 3, 16, 16)}),
    "Wav2Vec2Model": (SOUND, {"input_values": (2, 6 * 10 + 400)}),
    "WhisperModel": (
        {**WHISPER, "pad_token_id": 0, "decoder_start_token_id": 1},
        {"input_features": (2, 8, 100), "decoder_input_ids": (2, 6)},
    ),
}


def opened(name, config=None, dtype=torch.float32):
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**(config or MODELS[name][0]))).eval().to(dtype)
    return models.Opened(model, ROOT, model.config)


@pytest.mark.parametrize("name", MODELS)
def test_an_example_that_the_model_can_be_called_with(name):
    given = opened(name)
    batch = models.random_batch(given, 2, 6)
    assert {key: tuple(tensor.shape) for key, tensor in batch.items()} == MODELS[name][1]
    again = models.random_batch(given, 2, 6)
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert given.model(**batch)[0] is not None


def test_in_bfloat16():
    given = opened("ViTModel", {**VISION, "image_size": [32, 16], "num_channels": 1}, torch.bfloat16)
    pixels = models.random_batch(given, 3, 99)["pixel_values"]
    assert (pixels.shape, pixels.dtype) == ((3, 1, 32, 16), torch.bfloat16)


def test_more_tokens_than_a_model_takes():
    for name in ("BertModel", "WhisperModel", "CLIPModel"):
        with pytest.raises(UserError, match=f"{name} takes 20 tokens at most, got 21"):
            models.random_batch(opened(name), 1, 21)


def test_what_there_is_no_example_of():
    class Graph:
        main_input_name = "edges"

    with pytest.raises(UserError, match="Graph takes edges, of which torchq makes no example"):
        models.random_batch(models.Opened(Graph(), ROOT, object()), 1, 1)
    with pytest.raises(UserError, match="ViTModel takes pixel_values, and no texts"):
        list(models.tokenized(opened("ViTModel"), ["a"], 1, None))
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(
        UserError, match=r"CLIPModel can't be called with input_ids alone: .*Use torchq\.convert, verify"
    ):
        models.runs(opened("CLIPModel"), batch)
