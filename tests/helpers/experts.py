"""Stacked experts of a mixture-of-experts layer, alone and behind a router."""

import torch
from torch import nn
from torch.nn.functional import linear

from helpers.numbers import normal

EXPERTS, HIDDEN, INNER, ROWS = 4, 32, 48, 24


class Experts(nn.Module):
    """The formula, written for clarity, of matrices stored as they are or transposed, with and without a gate."""

    def __init__(self, gated=True, transposed=False, bias=False):
        super().__init__()
        self.num_experts, self.is_transposed, self.act_fn = EXPERTS, transposed, nn.SiLU()
        self.up = "gate_up_proj" if gated else "up_proj"
        shapes = {self.up: (INNER * (1 + gated), HIDDEN), "down_proj": (HIDDEN, INNER)}
        for seed, (name, (n, k)) in enumerate(shapes.items()):
            weight = normal(EXPERTS, *((k, n) if transposed else (n, k)), seed=seed) / k**0.5
            self.register_parameter(name, nn.Parameter(weight))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(normal(EXPERTS, n, seed=seed + 9)))

    def matrix(self, name, expert):
        bias = getattr(self, f"{name}_bias", None)
        weight = getattr(self, name)[expert]
        return weight.T if self.is_transposed else weight, None if bias is None else bias[expert]

    def expert(self, expert, x):
        y = linear(x, *self.matrix(self.up, expert))
        if self.up == "gate_up_proj":
            gate, value = y.chunk(2, dim=-1)
            y = self.act_fn(gate) * value
        else:
            y = self.act_fn(y)
        return linear(y, *self.matrix("down_proj", expert))

    def forward(self, hidden_states, router_indices, routing_weights):
        total = torch.zeros_like(hidden_states)
        for row, (ids, weights) in enumerate(zip(router_indices, routing_weights, strict=True)):
            for expert, weight in zip(ids.tolist(), weights, strict=True):
                if expert < EXPERTS:
                    total[row] += weight * self.expert(expert, hidden_states[row])
        return total


class Layer(nn.Module):
    """Experts behind a router."""

    def __init__(self, experts=None, reached=EXPERTS):
        super().__init__()
        self.router, self.experts = nn.Linear(HIDDEN, EXPERTS), experts or Experts()
        self.reached = reached
        with torch.no_grad():
            self.router.weight.copy_(normal(EXPERTS, HIDDEN, seed=5))
            self.router.bias.zero_()

    def forward(self, x):
        weights, ids = self.router(x)[:, : self.reached].softmax(dim=-1).topk(2)
        return self.experts(x, ids, weights)


FORMS = {
    "gated": {},
    "transposed, biases": {"transposed": True, "bias": True},
    "no gate": {"gated": False},
    "no gate, transposed": {"gated": False, "transposed": True},
}
