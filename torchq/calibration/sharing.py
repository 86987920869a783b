"""Recorder: one record for all layers that read the same tensor.

q, k and v of an attention read one tensor. Binning, sampling and multiplying it (XᵀX) three times would give three
equal records. Which layers read the same tensor is not known in advance, so the recorder finds out during the runs:

* A layer called for the first time joins a record that has one call so far, if that call had the same tensor.
* It goes on sharing as long as each of its calls has the same tensor as the others' call.
* When a call differs, or is missing, the layer splits off. It gets a record of its own: a copy of the shared one from
  before the call that the layer did not make.

So every record is what it would be without sharing, with one exception: after a split, XᵀX of the layer still contains
the rows of that one call. They only influence how its weights are rounded, and the result is measured on the layer's
own rows.

"The same tensor" means the same storage, still alive, viewed with the same geometry, and not written to in between
(torch's version counter).
"""

import copy
import dataclasses
import math
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from torchq.calibration.padding import real_rows, without_padding
from torchq.calibration.record import Record
from torchq.config import QConfig
from torchq.modules.patches import Patches
from torchq.watching import storage_key


class _Identity:
    """Recognizes a tensor without keeping it alive.

    (While the weak reference to its storage exists, no other storage gets its address.)
    """

    def __init__(self, x: Tensor) -> None:
        self._fingerprint = _fingerprint(x)
        self._storage = None if self._fingerprint is None else StorageWeakRef(x.untyped_storage())

    def is_of(self, x: Tensor) -> bool:
        """Whether x is that tensor, with the same values."""
        return self._storage is not None and not self._storage.expired() and self._fingerprint == _fingerprint(x)


def _fingerprint(x: Tensor) -> tuple[Any, ...] | None:
    """Storage, geometry and version; None if x has no storage, or no version counter (inference mode)."""
    key = storage_key(x)
    if key is None or x.is_inference():
        return None
    return key, x.dtype, x.shape, x.stride(), x.storage_offset(), x._version


class _Stream:
    """A record, the layers that share it, and how many of its calls each of them has made."""

    def __init__(self, record: Record) -> None:
        self.record, self.before = record, record
        self.calls_made: dict[str, int] = {}
        self.latest: _Identity | None = None

    def observe(self, x: Tensor, real: Tensor | None, batch: int) -> None:
        """Records the next call, in this batch: of x, the rows that `real` says are data."""
        shared = len(self.calls_made) > 1
        if shared:  # a shallow copy of an observer is a snapshot, since observers never change their tensors in place
            self.before = dataclasses.replace(self.record, observer=copy.copy(self.record.observer))
        rows = self.record.patches is None  # patches of a convolution overlap with padding wherever they end
        self.record.observe(without_padding(x, real) if rows else x, batch)
        self.latest = _Identity(x)
        if not shared:  # no layer can split off, so the sample from before this call is not needed
            self.record.sample.forget()

    def is_latest(self, x: Tensor) -> bool:
        return self.latest is not None and self.latest.is_of(x)

    def behind(self) -> list[str]:
        """The layers that have not made the latest call."""
        return [name for name, calls_made in self.calls_made.items() if calls_made < self.record.calls]

    def branch(self) -> "_Stream":
        """A new stream, from before the latest call, for a layer that did not make that call."""
        gram = self.record.gram
        if gram is not None and self.before.gram_rows < self.record.gram_rows:
            gram = gram.clone()  # both will add rows to theirs; a complete XᵀX can be shared
        observer, sample = copy.copy(self.before.observer), self.record.sample.before_last_add()
        return _Stream(dataclasses.replace(self.before, observer=observer, sample=sample, gram=gram))


class Recorder:
    """Records the inputs of layers, by name.

    >>> import torch
    >>> recorder, x = Recorder(QConfig()), torch.ones(2, 3)
    >>> for name in ("q", "k", "v"):
    ...     recorder.observe(name, x)
    >>> records = recorder.records()
    >>> records["q"] is records["k"], records["q"].calls
    (True, 1)
    """

    def __init__(self, config: QConfig, *, gram_bytes: float = math.inf, first_batch: int = 0) -> None:
        """All XᵀX may take `gram_bytes`: inputs that come too late have none. Batches count from `first_batch`."""
        self._config = config
        self._room = gram_bytes
        self._streams: dict[str, _Stream] = {}
        self._new: list[_Stream] = []  # the streams with at most one call, which a layer may still join
        self._real: Tensor | None = None
        self._batch = first_batch - 1

    def begin(self, batch: Any) -> None:
        """The calls that follow are of this batch, whose padding is not recorded."""
        self._real = real_rows(batch)
        self._batch += 1

    def observe(self, name: str, x: Tensor, patches: Patches | None = None) -> None:
        """Records the input x (..., K) of one call of the layer `name`; or (N, C, *spatial), with its `patches`."""
        stream = self._streams.get(name) or self._join(name, x, patches)
        if stream.calls_made[name] < stream.record.calls:
            if stream.is_latest(x):
                stream.calls_made[name] += 1
                return
            stream = self._split_off(name, stream)
        for other in stream.behind():
            self._split_off(other, stream)
        stream.observe(x, self._real, max(0, self._batch))
        stream.calls_made[name] += 1
        self._new = [each for each in self._new if each.record.calls <= 1]

    def records(self) -> dict[str, Record]:
        """The record of every layer that was called. To be called once, after all calls are made."""
        for name, stream in list(self._streams.items()):
            if name in stream.behind():
                self._split_off(name, stream)
        for stream in self._streams.values():
            stream.record.sample.forget()
        return {name: stream.record for name, stream in self._streams.items()}

    def _join(self, name: str, x: Tensor, patches: Patches | None) -> _Stream:
        """The stream that a layer joins when it is called for the first time."""
        alike = (each for each in self._new if each.record.patches == patches)
        stream = next((each for each in alike if each.is_latest(x)), None)
        if stream is None:
            depth = x.shape[-1] if patches is None else patches.depth
            stream = _Stream(Record.empty(depth, self._config, room=self._room, patches=patches))
            self._room -= 0 if stream.record.gram is None else stream.record.gram.nbytes
            self._new.append(stream)
        self._streams[name] = stream
        stream.calls_made[name] = 0
        return stream

    def _split_off(self, name: str, stream: _Stream) -> _Stream:
        """Gives a layer that has not made the latest call its own stream."""
        own = stream.branch()
        own.calls_made[name] = stream.calls_made.pop(name)
        self._streams[name] = own
        return own
