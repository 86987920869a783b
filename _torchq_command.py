"""What the command `torchq` runs. Where torchq can't be imported, the reason is a line for the user, and no traceback.

TORCHQ_KERNEL may name a kernel that this CPU lacks, say, or the library be built for another Python. This module is
beside the package: within it, torchq would be imported before any line of it runs.
"""

import sys

WRONG_INPUT = 2  # as torchq.command_line.console has it, which can't be imported here


def main() -> None:
    """Runs the command of `sys.argv`, and exits."""
    try:
        from torchq.command_line import main as command
    except (ImportError, RuntimeError, ValueError) as error:
        if "--traceback" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    command()
