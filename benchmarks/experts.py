"""Experts of a mixture-of-experts layer in int8 against each of transformers' own ways, one thread.

taskset -c 0 python -m benchmarks.experts
"""

from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from torchq import convert
from torchq.numerics.metrics import sqnr_db
from torchq.timing import interleaved

HIDDEN, INNER, EXPERTS, PER_TOKEN = 512, 1024, 8, 2
WAYS = ("eager", "grouped_mm", "batched_mm")


class Routed(torch.nn.Module):
    """Experts with a fixed routing."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
        config._experts_implementation = "eager"
        self.experts = MixtralExperts(config)
        for parameter in self.experts.parameters():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        self.weights, self.ids = torch.rand(rows, EXPERTS).softmax(-1).topk(PER_TOKEN)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, hidden)."""
        y: Tensor = self.experts(x, self.ids, self.weights)
        return y


class _Way:
    """A call of the layer, in one of transformers' ways."""

    def __init__(self, model: torch.nn.Module, x: Tensor, name: str | None = None) -> None:
        self._model: Any = model
        self._x, self._name = x, name

    def __call__(self) -> Tensor:
        if self._name is not None:
            self._model.experts.config._experts_implementation = self._name
        y: Tensor = self._model(self._x)
        return y


@torch.no_grad()
def main() -> None:
    """Prints a row for each number of tokens."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{EXPERTS} experts of {HIDDEN} x {INNER}, {PER_TOKEN} for each token; times in us")
    print(f"| tokens | {' | '.join(WAYS)} | int8 | faster than the best | SQNR |")
    print("|---" * (len(WAYS) + 4) + "|")
    for rows in (1, 16, 64, 256):
        model, x = Routed(rows).eval(), torch.randn(rows, HIDDEN)
        qmodel = convert(model)

        times = interleaved({**{name: _Way(model, x, name) for name in WAYS}, "int8": _Way(qmodel, x)}, rounds=9)
        best = min(times[name] for name in WAYS)
        cells = [f"{times[name] * 1e6:.0f}" for name in (*WAYS, "int8")]
        db = sqnr_db(_Way(model, x, "eager")(), qmodel(x))
        print(f"| {rows} | {' | '.join(cells)} | {best / times['int8']:.2f}x | {db:.1f} dB |")


if __name__ == "__main__":
    main()
