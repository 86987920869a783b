"""Tensors on their way to a process that is being spawned."""

import io
from multiprocessing.context import get_spawning_popen

import torch
from torch import Tensor


def sendable(tensors: dict[str, Tensor]) -> dict[str, Tensor] | bytes:
    """These tensors, made for pickling; as plain bytes where what is pickled are the arguments of a new process.

    Torch sends such arguments as shared memory, by the file descriptors of storages that must live until the process
    has started. Those of a model do. Those of tensors that pickling itself made are closed by then, or, worse, closed
    and given to the next tensor: "bad value(s) in fds_to_keep".
    """
    if get_spawning_popen() is None:
        return tensors
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def received(sent: dict[str, Tensor] | bytes) -> dict[str, Tensor]:
    """The tensors that were made `sendable`.

    >>> received(sendable({"a": torch.ones(1)}))
    {'a': tensor([1.])}
    """
    if isinstance(sent, bytes):
        return torch.load(io.BytesIO(sent), weights_only=True)  # type: ignore[no-any-return]
    return sent
