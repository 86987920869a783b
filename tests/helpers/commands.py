"""Other programs that tests start."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch import multiprocessing

from helpers import ROOT

# Its processes are forks of one that has imported torch, which takes seconds, and not torchq.
AFRESH = multiprocessing.get_context("forkserver")
AFRESH.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.fsdp"])


def environment_here(**more: str) -> dict[str, str]:
    """Gives the variables of a program that finds this checkout, and nothing of the user's own."""
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "/nonexistent", **more}


def run_code(code: str, **environment: str) -> tuple[int | None, str, str]:
    """Runs Python code in a process that has not imported torchq. Gives its exit code, and what it printed and said."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        process = start_code(code, files, environment)
        process.join()
        out, err = (file.read_text() if file.exists() else "" for file in files)
        return process.exitcode, out, err


def start_code(code: str, files: Sequence[str | Path], environment: Mapping[str, str]) -> BaseProcess:
    """The process, which writes its output and its errors to these two files."""
    process = AFRESH.Process(target=_execute, args=(code, files, environment))
    process.start()
    return process


def _execute(code: str, files: Sequence[str | Path], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    exec(code, {"__name__": "__main__"})
