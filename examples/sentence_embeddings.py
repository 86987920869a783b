"""Sentence embeddings: a small SentenceTransformer learns which two pieces of code belong together, and becomes int8.

    python examples/sentence_embeddings.py

The task is a search: given the first half of a piece, find its second half among all of them. With a model of your own,
replace `train` by `SentenceTransformer(name)`.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from data import snippets
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from text_classifier import make_tokenizer
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

import torchq.hf


def halves(texts: list[str]) -> tuple[list[str], list[str]]:
    """Gives the first and the second half of each text."""
    words = [text.split() for text in texts]
    return [" ".join(each[: len(each) // 2]) for each in words], [" ".join(each[len(each) // 2 :]) for each in words]


def train(firsts: list[str], seconds: list[str], folder: Path, epochs: int) -> SentenceTransformer:
    """Gives a model that puts both halves of a text near each other, and all others apart."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(firsts + seconds)
    tokenizer.save_pretrained(folder / "bert")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder / "bert")
    model = SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(128)], device="cpu").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def embed(texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(model(model.preprocess(texts))["sentence_embedding"])

    for _ in range(epochs):
        for picked in DataLoader(range(len(firsts)), batch_size=64, shuffle=True):
            scores = 20 * embed([firsts[i] for i in picked]) @ embed([seconds[i] for i in picked]).T
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(scores, torch.arange(len(picked))).backward()
            optimizer.step()
    return model.eval()


def found(model: SentenceTransformer, firsts: list[str], seconds: list[str]) -> tuple[torch.Tensor, float]:
    """Gives for each first half the number of the nearest second half, and the texts a second that this took."""
    start = time.perf_counter()
    queries, texts = (
        model.encode(each, convert_to_tensor=True, normalize_embeddings=True) for each in (firsts, seconds)
    )
    return (queries @ texts.T).argmax(dim=1), 2 * len(firsts) / (time.perf_counter() - start)


def main() -> None:
    """Trains, converts, saves, loads, searches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=500, help="of each of four packages")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()

    firsts, seconds = halves(snippets(of_each=options.texts)[0])
    new = len(firsts) // 8
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = train(firsts[new:], seconds[new:], folder, options.epochs)
        qmodel = torchq.hf.convert_sentence_transformer(model, (firsts + seconds)[:256])
        print(str(torchq.report(qmodel)).splitlines()[0])

        qmodel.save(str(folder / "int8"))
        loaded = SentenceTransformer(str(folder / "int8"), device="cpu")
        same = bool((loaded.encode(firsts[:32]) == qmodel.encode(firsts[:32])).all())
        print(f"saved and loaded: the same embeddings, bit for bit: {same}")

    answers = {}
    for kind, each in (("float", model), ("int8", qmodel)):
        answers[kind], speed = found(each, firsts[:new], seconds[:new])
        right = 100 * (answers[kind] == torch.arange(new)).float().mean()
        print(f"{kind}: {right:.1f} % of {new} new halves found, {speed:.0f} texts/s")
    print(f"same answer: {100 * (answers['float'] == answers['int8']).float().mean():.1f} %")


if __name__ == "__main__":
    main()
