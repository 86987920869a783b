"""Recorder: one record for all layers that read the same tensor.

q, k and v of an attention read one tensor. Binning, sampling and multiplying it (XᵀX) three times would give three
equal records. Which layers read the same is not known before they run, so the recorder finds out as they do:

* A layer called for the first time joins a record whose only call so far took this very tensor.
* It stays as long as each of its calls takes the tensor that the others' call took.
* When a call differs, or is missing, the layer gets a record of its own: the shared one as it was before the call that
  the layer did not take part in.

So every record is what it would be without sharing, with one exception: XᵀX of a layer that leaves keeps the rows of
that one call. They only steer the rounding of its weights, which is judged on rows of the layer's own.

"The very tensor" means one storage, still alive, seen in the same way, with no write in between (torch's version
counter).
"""

import copy
import dataclasses
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from torchq.calibration.dataflow import geometry, storage_key
from torchq.calibration.record import Record
from torchq.config import QConfig


class _Identity:
    """Recognizes a tensor, without keeping it alive. (The weak reference keeps the storage's address from reuse.)"""

    def __init__(self, x: Tensor) -> None:
        self._look = _look(x)
        self._storage = None if self._look is None else StorageWeakRef(x.untyped_storage())

    def is_of(self, x: Tensor) -> bool:
        """Whether x is that tensor, with the same values."""
        return self._storage is not None and not self._storage.expired() and self._look == _look(x)


def _look(x: Tensor) -> tuple[Any, ...] | None:
    """Storage, geometry and version; None without a storage, or where torch counts no versions (inference mode)."""
    key = storage_key(x)
    return None if key is None or x.is_inference() else (key, *geometry(x), x._version)


class _Stream:
    """The calls that some layers have in common, and how many of them each has made."""

    def __init__(self, record: Record) -> None:
        self.record, self.before = record, record
        self.made: dict[str, int] = {}
        self.latest: _Identity | None = None

    def observe(self, x: Tensor) -> None:
        """Takes the next call."""
        shared = len(self.made) > 1
        if shared:  # observers replace their state and never change it in place, so a shallow copy of one is a snapshot
            self.before = dataclasses.replace(self.record, seen=copy.copy(self.record.seen))
        self.record.observe(x)
        self.latest = _Identity(x)
        if not shared:  # nobody will need the sample as it was
            self.record.sample.forget()

    def is_latest(self, x: Tensor) -> bool:
        return self.latest is not None and self.latest.is_of(x)

    def behind(self) -> list[str]:
        """The layers that have not made the latest call."""
        return [name for name, made in self.made.items() if made < self.record.calls]

    def branch(self) -> "_Stream":
        """A stream of its own for a layer that does not make the latest call."""
        gram = self.record.gram
        if gram is not None and self.before.gram_rows < self.record.gram_rows:
            gram = gram.clone()  # it will go on changing here; a complete one is shared
        seen, sample = copy.copy(self.before.seen), self.record.sample.before_last_add()
        return _Stream(dataclasses.replace(self.before, seen=seen, sample=sample, gram=gram))


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

    def __init__(self, config: QConfig) -> None:
        self._config = config
        self._streams: dict[str, _Stream] = {}
        self._new: list[_Stream] = []  # with one call so far: those that a layer may join

    def observe(self, name: str, x: Tensor) -> None:
        """Takes the input x (..., K) of one call of the layer `name`."""
        stream = self._streams.get(name) or self._joined(name, x)
        if stream.made[name] < stream.record.calls:
            if stream.is_latest(x):
                stream.made[name] += 1
                return
            stream = self._leave(name, stream)
        for other in stream.behind():
            self._leave(other, stream)
        stream.observe(x)
        stream.made[name] += 1
        self._new = [each for each in self._new if each.record.calls <= 1]

    def records(self) -> dict[str, Record]:
        """The record of every layer that was called. For when all calls are made."""
        for name, stream in list(self._streams.items()):
            if name in stream.behind():
                self._leave(name, stream)
        for stream in self._streams.values():
            stream.record.sample.forget()
        return {name: stream.record for name, stream in self._streams.items()}

    def _joined(self, name: str, x: Tensor) -> _Stream:
        """The stream of a layer that is called for the first time."""
        stream = next((each for each in self._new if each.is_latest(x)), None)
        if stream is None:
            stream = _Stream(Record.empty(x.shape[-1], self._config))
            self._new.append(stream)
        self._streams[name] = stream
        stream.made[name] = 0
        return stream

    def _leave(self, name: str, stream: _Stream) -> _Stream:
        """Gives a layer that has not made the latest call a stream of its own."""
        own = stream.branch()
        own.made[name] = stream.made.pop(name)
        self._streams[name] = own
        return own
