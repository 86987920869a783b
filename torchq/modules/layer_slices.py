"""A layer of transformers on a few samples at a time, so that what its calls hand each other stays in L2.

Where products are fast, memory decides: on AMX BERT-base takes 26.7 ms for one sample of 128 rows and 242 ms for eight
(docs/performance-models.md), which one after the other would be 213. A few samples at a time, a layer reads its weights
more often, from L3, and its activations less.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchq import _C
from torchq.modules.layer_steps import LayerSteps
from torchq.modules.pending import MIN_VALUES
from torchq.modules.self_attention import Call

STAYS_IN_L2 = {"amx_int8": 3 << 19}
"""By kernel: how many bytes a layer's widest value may have, for each thread. CPUs with AMX have 2 MiB of L2 a core.

With `avx512_vnni` on Zen 4 BERT-base takes as long in slices of 128 rows as on all 1024, or 2 % longer.
"""

PAYS_FROM = 8 << 20
"""How many bytes it may have before slices pay: 4096 rows of 1536 values, 25 MB, take 4 % less so on Zen 4 where tiles
multiply nothing, and 1024 rows, 6 MB, take 6 % longer."""


def in_slices(steps: LayerSteps, calls: Sequence[Call], output: int) -> Tensor | None:
    """The layer's output, with the bits of a call on all samples at once. None: it had better be called on them all.

    Args:
        steps: those of the layer.
        calls: the calls of its attentions, each with the layer's input (batch, rows, columns).
        output: which of the layer's values it gives.
    """
    x: Tensor = calls[0].x
    batch, rows, _ = x.shape
    count = 0 if batch == 1 else _samples_at_once(batch, rows * steps.width * 4)
    if not 0 < count < batch or torch.is_grad_enabled():  # where norms learn, the steps end in Python
        return None
    if not all(_has_samples(call, batch) for call in calls):
        return None
    # An activation is computed with its layer only where there are many values, else by itself, with other last bits.
    least = rows * (batch % count or count)
    if any(least * columns < MIN_VALUES <= batch * rows * columns for columns in steps.waiting):
        return None
    y: Tensor | None = None
    for first in range(0, batch, count):
        values, done, _ = steps.run([_part(call, batch, slice(first, first + count)) for call in calls])
        if done < len(steps.places):
            return None
        one: Tensor = values[output]
        y = one.new_empty((batch, *one.shape[1:])) if y is None else y
        y[first : first + count] = one
    return y


def _samples_at_once(batch: int, bytes_of_sample: int) -> int:
    """For how many samples a layer's widest value stays in L2; 0 for none, or where slices are of no use."""
    if batch * bytes_of_sample <= PAYS_FROM:
        return 0
    return STAYS_IN_L2.get(_C.active(), 0) * torch.get_num_threads() // bytes_of_sample


def _has_samples(call: Call, batch: int) -> bool:
    """Whether there is no cache, and mask and angles have each sample by itself, or the same for all."""
    cos, sin = call.angles or (None, None)
    given = [(of, dims) for of, dims in ((call.mask, 4), (cos, 3), (sin, 3)) if of is not None]
    of_samples = all(type(of) is Tensor and of.dim() == dims and of.shape[0] in (1, batch) for of, dims in given)
    return call.cache is None and of_samples


def _part(call: Call, batch: int, samples: slice) -> Call:
    """The call on some samples."""
    cos, sin = call.angles or (None, None)
    mask, cos, sin = (of[samples] if of is not None and of.shape[0] == batch else of for of in (call.mask, cos, sin))
    return call._replace(x=call.x[samples], mask=mask, angles=None if call.angles is None else (cos, sin))
