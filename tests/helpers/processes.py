"""Processes of one torch.distributed group on this machine, with gloo."""

import datetime
from pathlib import Path

import torch
from torch import distributed

from helpers.commands import AFRESH
from torchq.planning import layers

SECONDS = 60  # an operation waits no longer for another process


def together(function, size, folder):
    """Calls function(rank) in so many processes of one group. Gives what each returned; None, if it died."""
    processes = [AFRESH.Process(target=_run, args=(function, rank, size, str(folder))) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(4 * SECONDS)
        alive = process.is_alive()
        process.kill()
        assert not alive, "a process hangs"
    paths = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def _run(function, rank, size, folder):
    torch.set_num_threads(1)
    layers.too_small = lambda layer: None  # as in the tests (conftest.py)
    timeout = datetime.timedelta(seconds=SECONDS)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    result = function(rank)
    torch.save(result, Path(folder) / f"{rank}.tmp")
    Path(folder, f"{rank}.tmp").rename(Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()
