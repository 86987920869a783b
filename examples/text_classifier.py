"""A text classifier of Hugging Face: which package of the standard library is this piece of code from?

    python examples/text_classifier.py

With a model of your own, replace `train` by `from_pretrained`; the rest stays.
"""

import argparse

import torch
from data import PACKAGES, snippets
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import torchq


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Gives a tokenizer with the 2000 most frequent words of these texts."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=2000, special_tokens=["[PAD]", "[UNK]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def train(tokenizer, texts: list[str], labels: torch.Tensor, epochs: int) -> BertForSequenceClassification:
    """Gives a small BERT, trained from scratch."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        num_labels=len(PACKAGES),
    )
    model = BertForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for picked in DataLoader(range(len(texts)), batch_size=64, shuffle=True):
            inputs = tokenizer([texts[i] for i in picked], padding=True, return_tensors="pt")
            optimizer.zero_grad()
            model(**inputs, labels=labels[picked]).loss.backward()
            optimizer.step()
    return model.eval()


@torch.inference_mode()
def predict(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Gives the number of the package of each text, as the model sees it."""
    batches = [tokenizer(texts[i : i + 64], padding=True, return_tensors="pt") for i in range(0, len(texts), 64)]
    return torch.cat([model(**batch).logits.argmax(dim=-1) for batch in batches])


def main() -> None:
    """Trains, converts, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1000, help="of each package")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()

    texts, labels = snippets(of_each=options.texts)
    tokenizer, held_out = make_tokenizer(texts), len(texts) // 5
    model = train(tokenizer, texts[held_out:], labels[held_out:], options.epochs)

    calibration = texts[held_out : held_out + 256]  # some hundred are enough
    batches = [tokenizer(calibration[i : i + 32], padding=True, return_tensors="pt") for i in range(0, 256, 32)]
    qmodel = torchq.convert(model, batches)
    print(str(torchq.report(qmodel)).splitlines()[0])

    expected, answers = predict(model, tokenizer, texts[:held_out]), predict(qmodel, tokenizer, texts[:held_out])
    for name, each in (("float", expected), ("int8", answers)):
        print(f"{name}: accuracy {100 * (each == labels[:held_out]).float().mean():.1f} % of {held_out} new texts")
    print(f"same answer: {100 * (expected == answers).float().mean():.1f} %")


if __name__ == "__main__":
    main()
