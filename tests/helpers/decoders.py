"""Converted decoders of transformers, as small as can be."""

import torch

from helpers.self_attention import converted, tokens
from torchq.modules.layer_form import LayerForm

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 99}
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Granite", "Ministral")

ROTARY = """
def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def turned(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
"""


def turning(source):
    """The function of such code that turns queries and keys."""
    scope = {"torch": torch}
    exec(source, scope)
    return scope["turned"]


def decoder(family="Llama", **more):
    import transformers

    more = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, **more}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**more)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def int8(family="Llama", **more):
    batches = [{"input_ids": tokens(4, 24, seed=seed)} for seed in range(4)]
    return converted(decoder(family, **more), batches, activation="dynamic")


def decoded(model, x, cache, steps=3):
    """The logits of a prompt, and of the tokens behind it, one by one."""
    with torch.inference_mode():
        found = [model(x, cache=cache, use_cache=True).logits]
        for step in range(steps):
            found.append(model(tokens(len(x), 1, seed=step), cache=cache, use_cache=True).logits)
    return found


def whole(monkeypatch):
    """How many calls of whole layers the forms have taken, in a list of one."""
    count, run = [0], LayerForm._run

    def counting(self, *call):
        y = run(self, *call)
        count[0] += y is not NotImplemented
        return y

    monkeypatch.setattr(LayerForm, "_run", counting)
    return count
