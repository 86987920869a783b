"""What the command `torchq` writes to terminals, wide and narrow, and into pipes."""

import io
import os
import pty
import subprocess
import sys
from multiprocessing.connection import wait

import pytest
import torch
from rich.console import Console

import torchq
from helpers.commands import environment_here, start_code
from torchq import kernels
from torchq.command_line import console, look

AS_A_USER = """
import os, runpy, sys
os.environ.clear()
os.environ.update({environment!r})
sys.argv = ["torchq", *{arguments!r}]
runpy.run_module("torchq", run_name="__main__")
"""


def on_a_terminal(*arguments, **variables):
    """What `python -m torchq ...` writes to a terminal of 100 columns, and its exit code."""
    parent, child = pty.openpty()
    environment = environment_here(TERM="xterm-256color", COLUMNS="100", **variables)
    code = AS_A_USER.format(environment=environment, arguments=arguments)
    process = start_code(code, [os.ttyname(child)] * 2, {})
    written = b""
    while parent in wait([parent, process.sentinel]):
        written += os.read(parent, 4096)
    process.join()
    os.close(child)
    os.close(parent)
    return written.decode(), process.exitcode


@pytest.mark.subprocess
def test_a_terminal_has_colours_unless_they_are_declined():
    coloured, code = on_a_terminal("env")
    assert code == 0
    assert "\x1b[32m" in coloured  # the active kernel in green
    plain, _ = on_a_terminal("env", NO_COLOR="1")
    assert "\x1b[32m" not in plain
    assert "\x1b[1m" in plain  # bold is no colour


@pytest.mark.parametrize("width", [80, 126])
def test_a_narrow_terminal_breaks_no_number(monkeypatch, width):
    model = torch.nn.Sequential(torch.nn.Linear(1024, 256), torch.nn.GELU(), torch.nn.Linear(256, 1024))
    result = torchq.verify(torchq.convert(model), torch.ones(128, 1024))
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, width=width, color_system=None, highlight=False)
    monkeypatch.setattr(console, "out", terminal)
    monkeypatch.setattr(look, "out", terminal)
    look.show(result)
    lines = written.getvalue().splitlines()
    for shape in ("128x1024x256", "128x256x1024"):
        assert [line for line in lines if shape in line]
    shown = {name for name in kernels.runnable() if name in lines[1].split()}
    assert shown == ({kernels.active(), "reference"} if width == 80 else set(kernels.runnable()))
    assert max(map(len, lines[:4])) <= width


@pytest.mark.subprocess
@pytest.mark.slow(seconds=3)
def test_a_reader_that_stops_reading_is_no_error():
    command = f"'{sys.executable}' -m torchq env | head -1; echo ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], env=environment_here(), capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert run.stdout.splitlines()[1] == "0"
