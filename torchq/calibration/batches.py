"""How the model is called with a batch of the user's loader."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from torchq.errors import BadTypeError, BadValueError

Forward = Callable[[nn.Module, Any], object]
"""`forward(model, batch)`: runs one batch."""


def call_with_batch(model: nn.Module, batch: Any) -> object:
    """Calls `model` with a batch in one of the usual forms: a tensor, (input, label, ...), or a dict of arguments.

    >>> import torch
    >>> call_with_batch(nn.ReLU(), (torch.tensor(-1.0), "a label"))
    tensor(0.)
    """
    if isinstance(batch, Tensor):
        return model(batch)
    parameters = inspect.signature(model.forward).parameters
    if isinstance(batch, Mapping):
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return model(**{key: value for key, value in batch.items() if takes_all or key in parameters})
    if isinstance(batch, (tuple, list)):
        positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        required = max(1, sum(p.default is p.empty for p in positional))
        if len(batch) < required:
            raise BadValueError(
                f"{type(model).__name__}.forward requires {required} inputs, a batch of calib_loader has {len(batch)} "
                "elements. Pass forward=lambda model, batch: ... to say how to call it."
            )
        return model(*batch[:required])
    raise BadTypeError(
        f"calib_loader gave a batch of type {type(batch).__name__}; expected a tensor, a tuple or a dict. Pass "
        "forward=lambda model, batch: ... to say how to call the model with it."
    )
