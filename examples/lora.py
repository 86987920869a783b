"""LoRA on int8: an int8 model stays as it is, and a small adapter learns a new task beside it.

    python examples/lora.py

A BERT was trained to tell four packages of the standard library apart, and is int8 now. The adapter learns four others.
"""

import argparse
import tempfile

import torch
from data import snippets
from peft import LoraConfig, PeftModel, get_peft_model
from text_classifier import make_tokenizer, predict, train
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

import torchq.hf

OTHERS = ("importlib", "json", "logging", "multiprocessing")


def adapt(model, tokenizer, texts: list[str], labels: torch.Tensor, epochs: int) -> None:
    """Trains what of the model can be trained: the adapter, and the new head."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-3)
    model.train()
    for _ in range(epochs):
        for picked in DataLoader(range(len(texts)), batch_size=32, shuffle=True):
            inputs = tokenizer([texts[i] for i in picked], padding=True, return_tensors="pt")
            optimizer.zero_grad()
            model(**inputs, labels=labels[picked]).loss.backward()
            optimizer.step()
    model.eval()


def main() -> None:
    """Trains in float, converts, adapts, saves and loads the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=400, help="of each package")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()

    texts, labels = snippets(of_each=options.texts)
    new_texts, new_labels = snippets(of_each=options.texts, packages=OTHERS)
    tokenizer = make_tokenizer(texts + new_texts)
    model = train(tokenizer, texts, labels, options.epochs)
    batches = [tokenizer(texts[i : i + 32], padding=True, return_tensors="pt") for i in range(0, 128, 32)]
    qmodel = torchq.convert(model, batches)

    with tempfile.TemporaryDirectory() as folder:
        qmodel.save_pretrained(f"{folder}/int8")
        base = AutoModelForSequenceClassification.from_pretrained(f"{folder}/int8")
        query = base.bert.encoder.layer[0].attention.self.query  # PEFT puts its adapter around it
        codes = query.weight_int8.clone()

        config = LoraConfig(r=8, target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
        torch.manual_seed(0)
        tuned = get_peft_model(base, torchq.hf.int8_lora(config))
        trained, total = tuned.get_nb_trainable_parameters()
        print(f"{trained} of {total} parameters are trained")

        held_out = len(new_texts) // 5
        for moment in ("before", "after"):
            right = 100 * (predict(tuned, tokenizer, new_texts[:held_out]) == new_labels[:held_out]).float().mean()
            print(f"{moment} training: accuracy {right:.1f} % of {held_out} new texts")
            if moment == "before":
                adapt(tuned, tokenizer, new_texts[held_out:], new_labels[held_out:], options.epochs)
        print("int8 weights unchanged:", torch.equal(codes, query.weight_int8))

        tuned.save_pretrained(f"{folder}/adapter")
        fresh = AutoModelForSequenceClassification.from_pretrained(f"{folder}/int8")
        adapter = torchq.hf.int8_lora(LoraConfig.from_pretrained(f"{folder}/adapter"))
        loaded = PeftModel.from_pretrained(fresh, f"{folder}/adapter", config=adapter).eval()
        inputs = tokenizer(new_texts[:8], padding=True, return_tensors="pt")
        with torch.inference_mode():
            same = torch.equal(loaded(**inputs).logits, tuned(**inputs).logits)
        print("adapter saved and loaded: the same answers:", same)


if __name__ == "__main__":
    main()
