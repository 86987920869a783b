"""Prints the table: what of each architecture becomes int8 by default, and what that costs and saves.

python -m tests.architectures                  # some minutes
python -m tests.architectures BERT "GPT-2"     # some of them
python -m tests.architectures BERT --config embeddings=int8 activation=dynamic    # with other settings of QConfig
"""

import argparse
import logging
import sys
import warnings
from typing import Any

import torch

from torchq import QConfig, text
from torchq.planning import layers, stems, tables

from .measure import both, measure
from .models import ARCHITECTURES

HEAD = ("architecture", "int8", "named", "resident", "dB", "calibrated", "routers free", "multiplied in float")


def main(names: list[str], config: QConfig) -> None:
    """A line for each architecture."""
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    layers.too_small = lambda layer: None  # the layers of the tiny models stand for large ones
    tables.MIN_BYTES, stems.SMALL_SHARE = 4096, 0.2
    rows = []
    with torch.no_grad():
        for name in names or ARCHITECTURES:
            row = measure(ARCHITECTURES[name], both(ARCHITECTURES[name], config, config))
            shares = (f"{row.int8:.1%}", f"{row.named:.1%}", f"{row.resident:.2f}")
            free = "-" if row.free == row.db else "{:.1f}, {:.1f}".format(*row.free)
            rows.append((name, *shares, *(f"{db:.1f}" for db in row.db), free, ", ".join(row.left) or "-"))
            print(name, file=sys.stderr, flush=True)
    print("\n".join(text.table(HEAD, rows)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="architecture", help="all, unless named")
    parser.add_argument("--config", nargs="+", default=[], metavar="NAME=VALUE", help="settings of QConfig")
    arguments = parser.parse_args()
    settings: dict[str, Any] = dict(setting.split("=") for setting in arguments.config)
    truths = {name: value == "True" for name, value in settings.items() if value in ("True", "False")}
    lists = {name: tuple(value.split(",")) for name, value in settings.items() if name == "exclude"}
    main(arguments.names, QConfig(**(settings | truths | lists)))
