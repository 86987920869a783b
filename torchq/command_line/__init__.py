"""The command `torchq`: env, convert, report, verify, bench. It needs the extra [cli], which torchq itself does not."""

import sys
from importlib.util import find_spec

NEEDED = ("typer", "rich")


def main() -> None:
    """Runs the command of `sys.argv`, and exits."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"error: the command line needs {' and '.join(missing)}. Install it: pip install {' '.join(missing)} "
            "(torchq's extra [cli]). In Python, torchq works without: torchq.convert, torchq.report, torchq.verify.",
            file=sys.stderr,
        )
        sys.exit(2)  # WRONG_INPUT of console.py, which needs rich
    from torchq.command_line.app import run

    run()
