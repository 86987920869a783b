"""Whether one wheel runs on several versions of torch: `python -m tools.torch_versions WHEEL FOLDER 2.13.0 2.14.1`.

For each version it makes an environment in FOLDER, where there is none yet, with that torch and the wheel, and runs
tools/smoke.py in it. It is run by hand, since torch takes up to 5 GB a version where pip finds it with CUDA only.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(folder: Path, version: str) -> Path:
    """The Python of an environment with this torch."""
    python = folder / version / "bin" / "python"
    if not (folder / version / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", folder / version], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-cache-dir", f"torch=={version}"], check=True)
        (folder / version / "complete").touch()
    return python


def main() -> None:
    """Prints the line of the smoke test for each version, or what went wrong."""
    wheel, folder, *versions = sys.argv[1:]
    for version in versions:
        python = environment(Path(folder).resolve(), version)
        path = Path(wheel).resolve()
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchq"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", path], check=True)  # and what it needs
        subprocess.run([python, ROOT / "tools/smoke.py"], cwd=folder, check=True)


if __name__ == "__main__":
    main()
