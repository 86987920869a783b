"""Peers: the processes of a torch.distributed group that convert the same model, each with a shard of the data.

1. Each calibrates on the batches it has, which may be none.
2. Each tells the others how that went: an error, or what it recorded and a checksum of its model. Process 0 collects
   these and passes them on.
3. One of them decides: the first that has a batch to judge by. It adds up the records of all, in the order of their
   numbers, and makes the plan. It sends the plan, with its rounded weights, to the others, which apply it. So all end
   with the same plan and the same bits, also if their CPUs round differently.

Whoever fails tells it before it raises. Who waits for a process that died gets an error from gloo; for one that hangs,
after the group's timeout. Either becomes a `PeerError`.
"""

import copy
import dataclasses
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed, nn

from torchq.calibration.calibrate import NO_BATCH, Evidence
from torchq.calibration.record import Record
from torchq.errors import BadTypeError, BadValueError, PeerError

if TYPE_CHECKING:
    from types import TracebackType

    from torch.distributed import ProcessGroup
    from typing_extensions import Self

T = TypeVar("T")

_CPU = torch.device("cpu")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Status:
    """What a process tells the others when it has calibrated.

    Args:
        error: what it failed with; then all else is empty.
        same: what must be the same in every process, by how an error names it.
        records: for each layer that its batches reached, which of its records has it.
    """

    error: str | None = None
    same: dict[str, Any] = field(default_factory=dict)
    records: dict[str, int] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    handovers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    turned: set[str] = field(default_factory=set)
    sums: dict[str, tuple[str, ...]] = field(default_factory=dict)
    batches: int = 0
    batches_held_out: int = 0
    tables_called: set[str] = field(default_factory=set)
    tables_read: set[str] = field(default_factory=set)
    weights_read: set[str] = field(default_factory=set)
    written_attentions: tuple[str, ...] = ()


class _Answer(NamedTuple):
    """What the process that decides sends: what it decided, or the error it failed with."""

    value: Any
    error: str | None = None


class Peers:
    """The processes of `group`; with None, this one alone, which then decides. Used as a context.

    An error inside the context is told to the others before it leaves it.

    Args:
        group: the processes.
        model: what each calls by itself, as often as it has batches.

    Raises:
        TypeError: `group` is no process group.
        ValueError: it can't send CPU tensors, this process is not in it, or a call of the model waits for others.

    >>> with Peers(None, nn.Identity()) as peers:
    ...     peers.send("a plan")  # to nobody
    >>> peers.shard is None
    True
    """

    def __init__(self, group: "ProcessGroup | None", model: nn.Module) -> None:
        _check(group, model)
        self._group = group
        self._rank = 0 if group is None else distributed.get_rank(group)
        self._size = 1 if group is None else distributed.get_world_size(group)
        self._decider = 0
        self._reported = self._answered = group is None

    @property
    def shard(self) -> int | None:
        """The number of this process, or None if it is alone."""
        return None if self._group is None else self._rank

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        if not isinstance(error, Exception):
            return
        with suppress(PeerError):  # the error that is on its way says more
            if not self._reported:
                self._exchange(_Status(_in_words(error)))
            elif self._rank == self._decider and not self._answered:
                self._send_to_all(_Answer(None, _in_words(error)))

    def merged(self, evidence: Evidence, *, data: bool) -> Evidence | None:
        """What all of them saw, in the process that decides; None in the others, which wait for `received`.

        Args:
            evidence: what this one saw. It is used up.
            data: whether it was given a loader.

        Raises:
            PeerError: another process failed or was lost.
            ValueError: their models, configs or arguments differ; or they were given loaders, and none had a batch.
        """
        if self._group is None:
            return evidence
        records = list({id(record): record for record in evidence.records.values() if record.calls}.values())
        index = {id(record): i for i, record in enumerate(records)}
        statuses = self._exchange(
            _Status(
                same=_what_must_be_the_same(evidence, data),
                records={name: index[id(record)] for name, record in evidence.records.items() if record.calls},
                activations=evidence.activations,
                norms=evidence.norms,
                chains=evidence.chains,
                handovers=evidence.handovers,
                turned=evidence.turned,
                sums=evidence.sums,
                batches=evidence.batches,
                batches_held_out=evidence.batches_held_out,
                tables_called=evidence.tables_called,
                tables_read=evidence.tables_read,
                weights_read=evidence.weights_read,
                written_attentions=evidence.written_attentions,
            )
        )
        self._check(statuses)
        if data and not any(status.batches for status in statuses):
            self._answered = True  # all raise this
            raise BadValueError(f"{NO_BATCH} (In none of the {self._size} processes was there one.)")
        numbers = range(self._size)
        self._decider = max(numbers, key=lambda i: (bool(statuses[i].batches_held_out), bool(statuses[i].batches), -i))
        if self._rank != self._decider:
            for record in records:
                self._send(record, self._decider)
            return None
        return _joined(evidence, statuses, self._records(evidence, records, statuses))

    def send(self, value: Any) -> None:
        """Gives the others what this one decided."""
        self._send_to_all(_Answer(value))

    def received(self) -> Any:
        """What the other process decided.

        Raises:
            PeerError: it failed, or was lost.
        """
        answer = self._receive(self._decider)
        if answer.error is not None:
            raise PeerError(f"process {self._decider} of {self._size} failed: {answer.error}")
        return answer.value

    def _exchange(self, own: _Status) -> list[_Status]:
        """The statuses of all."""
        self._reported = True
        if self._rank:
            self._send(own, 0)
            received: list[_Status] = self._receive(0)
            return received
        statuses, lost = [own], []
        for rank in range(1, self._size):
            try:
                statuses.append(self._receive(rank))
            except PeerError as error:
                lost.append(rank)
                statuses.append(_Status(f"{error} ({error.__cause__})"))
        for rank in range(1, self._size):
            if rank not in lost:
                with suppress(PeerError):  # whoever decides will miss it
                    self._send(statuses, rank)
        return statuses

    def _check(self, statuses: list[_Status]) -> None:
        """Raises the same error in every process if one of them failed, or has another model."""
        for rank, status in enumerate(statuses):
            if status.error is not None:
                self._answered = True
                raise PeerError(f"process {rank} of {self._size} failed: {status.error}")
        for rank, status in enumerate(statuses):
            keys = {**statuses[0].same, **status.same}
            different = [key for key in keys if statuses[0].same.get(key) != status.same.get(key)]
            if different:
                self._answered = True
                raise BadValueError(
                    f"every process must convert the same model in the same way, but {different[0]} is not the same in "
                    f"process {rank} as in process 0. Load the same checkpoint in both, or send parameters and buffers "
                    "from process 0 with torch.distributed.broadcast, and pass the same arguments."
                )

    def _records(
        self, evidence: Evidence, own: list[Record], statuses: list[_Status]
    ) -> dict[tuple[int | None, ...], Record]:
        """The joined records, by which of the records of each process they were joined from."""
        keys = dict.fromkeys(_sources(name, statuses) for name in evidence.layers)
        joined: dict[tuple[int | None, ...], Record] = {}
        for rank, status in enumerate(statuses):
            for index in range(len(set(status.records.values()))):
                record = own[index] if rank == self._rank else self._receive(rank)
                takers = [key for key in keys if key[rank] == index]
                for key in takers:
                    if key in joined:
                        joined[key].merge(record)
                    else:
                        joined[key] = copy.deepcopy(record) if len(takers) > 1 else record
        return joined

    def _send_to_all(self, answer: _Answer) -> None:
        self._answered = True
        lost: PeerError | None = None
        for rank in range(self._size):
            if rank != self._rank:
                try:
                    self._send(answer, rank)
                except PeerError as error:  # the others shall have it still
                    lost = error
        if lost is not None:
            raise lost

    def _send(self, value: Any, rank: int) -> None:
        try:
            distributed.send_object_list([value], group=self._group, group_dst=rank, device=_CPU)
        except RuntimeError as error:
            raise self._lost(rank) from error

    def _receive(self, rank: int) -> Any:
        box: list[Any] = [None]
        try:
            distributed.recv_object_list(box, group=self._group, group_src=rank, device=_CPU)
        except RuntimeError as error:
            raise self._lost(rank) from error
        return box[0]

    def _lost(self, rank: int) -> PeerError:
        return PeerError(
            f"process {rank} of {self._size} died, or did not answer within the group's timeout "
            "(torch.distributed.init_process_group(timeout=...)). The first error in the logs of all says why; start "
            "all of them again."
        )


def _check(group: "ProcessGroup | None", model: nn.Module) -> None:
    if group is None:
        return
    if not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
        raise BadTypeError(
            f"group must be a process group of torch.distributed, or None, got {type(group).__name__}. After "
            "torch.distributed.init_process_group('gloo'), pass torch.distributed.group.WORLD."
        )
    backends = distributed.get_backend_config(group)
    if "cpu:" not in backends:
        raise BadValueError(
            f"group can't send CPU tensors, its backends are {backends}. Pass "
            "torch.distributed.new_group(backend='gloo')."
        )
    if distributed.get_rank(group) < 0:
        raise BadValueError("this process is not in group. Call it in the processes of the group only.")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise BadValueError("the model is wrapped in DistributedDataParallel. Pass model.module, the model within.")


def _in_words(error: Exception) -> str:
    kind = next((plain for plain in (ValueError, TypeError) if isinstance(error, plain)), type(error))
    return f"{kind.__name__}: {error}"


def _what_must_be_the_same(evidence: Evidence, data: bool) -> dict[str, Any]:
    model = evidence.model
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    # Each process has ranges of its own that it observed in training; the plan has those to take.
    tensors |= {name: buffer for name, buffer in model.named_buffers() if not name.endswith("input_range.ends")}
    return {
        "the config": repr(evidence.config),
        "whether there is a calib_loader": data,
        "the list of layers": tuple(evidence.layers),
        **{f"the tensor {name!r}": _checksum(tensor) for name, tensor in tensors.items()},
    }


@torch.no_grad()
def _checksum(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, dtype, and two sums over the bits."""
    about = (tuple(tensor.shape), str(tensor.dtype))
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or type(tensor) not in (Tensor, nn.Parameter):
        return about
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS.get(tensor.itemsize, torch.uint8))
    return *about, int(bits.sum(dtype=torch.int64)), int(bits[::2].sum(dtype=torch.int64))


def _sources(name: str, statuses: list[_Status]) -> tuple[int | None, ...]:
    """Which record of each process has this layer; None where no batch reached it."""
    return tuple(status.records.get(name) for status in statuses)


def _joined(evidence: Evidence, statuses: list[_Status], joined: dict[tuple[int | None, ...], Record]) -> Evidence:
    """The evidence of all. Layers share a record if they do so in every process that reached one of them."""
    reached = {name: joined.get(_sources(name, statuses)) for name in evidence.layers}
    records = {name: record or evidence.records[name] for name, record in reached.items() if evidence.records}
    reachers = {name: [status for status in statuses if name in status.records] for name in evidence.layers}
    activations = {name: _common([status.activations.get(name) for status in reachers[name]]) for name in reachers}
    chains = {name: _common([status.chains.get(name) for status in reachers[name]]) for name in reachers}
    handovers = {name: _common([status.handovers.get(name) for status in reachers[name]]) for name in reachers}
    turned = {name for name in reachers if reachers[name] and all(name in status.turned for status in reachers[name])}
    sums = {name: _common([status.sums.get(name) for status in reachers[name]]) for name in reachers}
    # A norm that one process saw read something else is no part of a layer.
    norms = {name: _common([each.norms.get(name) for each in statuses if each.batches]) for name in reachers}
    return dataclasses.replace(
        evidence,
        records=records,
        activations=_known(activations),
        norms=_known(norms),
        chains=_known(chains),
        handovers=_known(handovers),
        turned=turned,
        sums=_known(sums),
        batches=sum(status.batches for status in statuses),
        batches_held_out=sum(status.batches_held_out for status in statuses),
        tables_called=set().union(*(status.tables_called for status in statuses)),
        tables_read=set().union(*(status.tables_read for status in statuses)),
        weights_read=set().union(*(status.weights_read for status in statuses)),
        written_attentions=tuple(dict.fromkeys(name for each in statuses for name in each.written_attentions)),
    )


def _common(found: list[T | None]) -> T | None:
    """What all of them found; None if they differ."""
    return found[0] if found and all(each == found[0] for each in found) else None


def _known(found: dict[str, T | None]) -> dict[str, T]:
    return {name: value for name, value in found.items() if value is not None}
