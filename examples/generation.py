"""Text from a decoder: a small Llama learns the standard library, becomes int8, and goes on writing code.

    python examples/generation.py

`generate`, its cache, sampling and beams work as before: nothing but the layers changed.
"""

import argparse
import time

import torch
from data import PACKAGES, sources
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import torchq

CONTEXT, VOCABULARY = 64, 1000


def windows(text: torch.Tensor, count: int) -> torch.Tensor:
    """Gives random pieces of the text, (count, CONTEXT)."""
    starts = torch.randint(len(text) - CONTEXT, (count, 1))
    return text[starts + torch.arange(CONTEXT)]


def train(text: torch.Tensor, width: int, steps: int) -> LlamaForCausalLM:
    """Gives a small Llama that has learned to continue the text."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = windows(text, 16)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def write(model: LlamaForCausalLM, prompt: torch.Tensor, length: int) -> tuple[torch.Tensor, float]:
    """Gives the likeliest continuation, and how many tokens a second it took."""
    model.generate(prompt, max_new_tokens=2, do_sample=False)  # the first call prepares things
    start = time.perf_counter()
    written = model.generate(prompt, max_new_tokens=length, do_sample=False)[0]
    return written[prompt.shape[1] :], length / (time.perf_counter() - start)


@torch.inference_mode()
def loss(model: LlamaForCausalLM, text: torch.Tensor) -> float:
    """Gives the cross entropy of the text in nats a token."""
    pieces = text[: 64 * CONTEXT].view(-1, CONTEXT)
    return model(input_ids=pieces, labels=pieces).loss.item()


def main() -> None:
    """Trains, converts, compares what both write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--characters", type=int, default=2_000_000, help="of the text to learn")
    parser.add_argument("--length", type=int, default=48, help="tokens to write")
    options = parser.parse_args()

    torch.manual_seed(0)
    code = "".join(map(sources, PACKAGES))[: options.characters]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([code], vocab_size=VOCABULARY, show_progress=False)
    text = torch.tensor(tokenizer.encode(code).ids)
    held_out, text = text[: 64 * CONTEXT], text[64 * CONTEXT :]
    model = train(text, options.width, options.steps)
    qmodel = torchq.convert(model, [{"input_ids": windows(text, 8)} for _ in range(8)])
    print(str(torchq.report(qmodel)).splitlines()[0])

    prompt = torch.tensor([tokenizer.encode("    def __init__(self").ids])
    for name, each in (("float", model), ("int8", qmodel)):
        written, speed = write(each, prompt, options.length)
        print(f"{name}: {loss(each, held_out):.3f} nats a token of new text, {speed:.0f} tokens/s, writes")
        print(f"    {tokenizer.decode(written.tolist())!r}")


if __name__ == "__main__":
    main()
