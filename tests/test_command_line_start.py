"""What the command `torchq` says where it can't start: packages that are missing, a kernel that can't run."""

import pytest

import _torchq_command
from helpers.commands import run_code
from torchq import command_line


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "NEEDED", ("typer", "no_such_package"))
    with pytest.raises(SystemExit) as done:
        _torchq_command.main()
    assert done.value.code == 2
    assert "error: the command line needs no_such_package. Install it: pip install no_such_package " in (
        capsys.readouterr().err
    )


@pytest.mark.subprocess
@pytest.mark.slow(seconds=3)
@pytest.mark.parametrize(
    ("kernel", "words"),
    [("fast", "TORCHQ_KERNEL: 'fast' is not a kernel. Compiled in: "), ("neon", "TORCHQ_KERNEL: ")],
)
def test_a_wrong_kernel_is_a_line(kernel, words):
    """It stops the import of torchq, before any line of the command itself."""
    code = "import sys, _torchq_command\nsys.argv = ['torchq', 'env']\n_torchq_command.main()"
    code, out, err = run_code(code, TORCHQ_KERNEL=kernel)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {words}")
    assert len(err.splitlines()) == 1
