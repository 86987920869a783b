"""What the code of a model's modules says, where no calibration data have shown it: what follows each convolution, and
which layers nobody calls, but for their weight.

A module is read if its code is a row of children, with a sum of two such rows perhaps (`modules.flow`), or if it is an
nn.Sequential. It may hold such modules in its turn. What its code says, every call of it would show.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

from torchq.calibration.calibrate import Evidence
from torchq.calibration.readers import ADDITION, PADDING, Chain
from torchq.modules.activations import activation_of
from torchq.modules.conv_stages import is_sequential
from torchq.modules.flow import Step, Zeros, flow_of
from torchq.modules.folding import IDLE
from torchq.modules.norms import full_row, is_foldable
from torchq.ops import Activation
from torchq.planning.layers import has_hooks
from torchq.planning.reach import Reach


def with_code_read(evidence: Evidence) -> Evidence:
    """The evidence with chains, norms and weights that are only read, if there are no data to have them from."""
    if evidence.batches:
        return evidence
    reach = Reach(evidence.model)
    read = {name for name, layer in evidence.layers.items() if not layer.part and reach.only_reads(name)}
    evidence = dataclasses.replace(evidence, weights_read=read)
    if not evidence.config.fuse:
        return evidence
    chains, found = _Reader(evidence).chains(), _norms(evidence.model)
    norms = _alone(reach, {name: chain[0] for name, chain in chains.items() if chain[0] in found})
    handovers = {name: chain[-1:] for name, chain in chains.items() if _hands_on(chain, evidence, found)}
    return dataclasses.replace(evidence, chains=chains, norms=norms, handovers=handovers)


def _norms(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if is_foldable(module)}


def _alone(reach: Reach, norms: dict[str, str]) -> dict[str, str]:
    """Those norms, by convolution, of which other code calls neither."""
    return {name: norm for name, norm in norms.items() if not (reach.reaches(name) or reach.reaches(norm))}


def _hands_on(chain: Chain, evidence: Evidence, norms: set[str]) -> bool:
    """Whether a convolution reads what it makes of an output, and nobody else does: of a sum that is not known."""
    absorbs = chain[-1] in evidence.layers and evidence.layers[chain[-1]].kind.absorbs
    return absorbs and ADDITION not in chain and norms.isdisjoint(chain[1:])


_Row = list[str | None]
"""Names of modules that are called one after the other, additions and paddings; None for anything else."""


class _Reader:
    """Reads the modules of a model."""

    def __init__(self, evidence: Evidence) -> None:
        self._model = evidence.model
        self._convolutions = {name for name, layer in evidence.layers.items() if layer.kind.absorbs}
        self._names = {id(module): name for name, module in evidence.model.named_modules()}
        places = Counter(id(module) for _, module in evidence.model.named_modules(remove_duplicate=False))
        self._shared = {key for key, count in places.items() if count > 1}

    def chains(self) -> dict[str, Chain]:
        """By convolution that has one place, and is called once: what follows it, up to another one."""
        found: dict[str, Chain] = {}
        for module in self._model.modules() if self._convolutions else ():
            rows = list(self._rows(module))
            calls = Counter(name for row in rows for name in row)
            for row in rows:
                for i, name in enumerate(row):
                    chain = self._behind(row[i + 1 :], calls)
                    if name in self._convolutions and calls[name] == 1 and len(chain) > len(found.get(name, ())):
                        found[name] = chain
        return found

    def _behind(self, row: _Row, calls: Counter[str | None]) -> Chain:
        chain: list[str] = []
        for name in row:
            if name is None or (calls[name] > 1 and is_foldable(self._module(name))):
                break  # a norm that is called twice is no part of one weight
            chain.append(name)
            if name in self._convolutions:
                break
        return tuple(chain)

    def _rows(self, module: nn.Module) -> Iterator[_Row]:
        """What the code of a module calls, one after the other. A sum belongs to the row that it is the end of."""
        if "forward" in vars(module):
            return
        if is_sequential(type(module)):
            yield self._leaves(module, module._modules)
            return
        flow = flow_of(module, type(module))
        if flow is None:
            return
        one, other, last = (self._leaves(module, steps or ()) for steps in (flow.one, flow.other, flow.last))
        if flow.other is None:
            yield one
        elif self._may_add(one):
            yield from ([*one, ADDITION, *last], other)
        elif self._may_add(other) and not flow.in_place:
            yield from ([*other, ADDITION, *last], one)
        else:
            yield from (one, other, last)

    def _may_add(self, row: _Row) -> bool:
        """Whether it ends with a convolution, or with one and its norm."""
        end = row[:-1] if row and is_foldable(self._module(row[-1])) else row
        return bool(end) and end[-1] in self._convolutions

    def _module(self, name: str | None) -> nn.Module | None:
        return None if name is None or name in (ADDITION, PADDING) else self._model.get_submodule(name)

    def _leaves(self, owner: nn.Module, steps: Iterable[Step]) -> _Row:
        row: _Row = []
        for step in steps:
            row += [PADDING] if isinstance(step, Zeros) else self._inside(owner._modules[step])
        return row

    def _inside(self, module: nn.Module | None) -> _Row:
        if module is None or has_hooks(module):
            return [None]
        name = self._names[id(module)]
        if activation_of(module) != Activation.NONE:
            return [name]
        if type(module) in IDLE:
            return []
        if id(module) in self._shared:
            return [None]
        if is_foldable(module):
            return [*full_row(name, module)]
        if name in self._convolutions:
            return [name]
        rows = list(self._rows(module))
        return rows[0] if len(rows) == 1 else [None]
