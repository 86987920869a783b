"""Other programs that tests start."""

import os

from helpers import ROOT


def environment_here(**more: str) -> dict[str, str]:
    """Gives the variables of a program that finds this checkout, and nothing of the user's own."""
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "/nonexistent", **more}
