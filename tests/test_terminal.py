"""What the command `torchq` writes to terminals, wide and narrow, and into pipes."""

import io
import os
import pty
import subprocess
import sys

import pytest
import torch
from rich.console import Console

import torchq
from helpers.commands import environment_here
from torchq import kernels
from torchq.command_line import console, look


def on_a_terminal(*arguments, **variables):
    """What `python -m torchq ...` writes to a terminal of 100 columns, and its exit code."""
    parent, child = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-m", "torchq", *arguments],
        env=environment_here(TERM="xterm-256color", COLUMNS="100", **variables),
        stdout=child,
        stderr=child,
    )
    os.close(child)
    written = b""
    while True:
        try:
            piece = os.read(parent, 4096)
        except OSError:  # the terminal is closed
            break
        if not piece:
            break
        written += piece
    os.close(parent)
    return written.decode(), run.wait()


@pytest.mark.subprocess
@pytest.mark.slow(seconds=6)
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
