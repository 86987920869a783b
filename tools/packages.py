"""Builds the source distribution and a wheel, and tries both: `python -m tools.packages [folder]`; `make dist`.

1. `python -m build` makes the source distribution of a clean copy, and the wheel from nothing but that.
2. auditwheel checks that the wheel runs on every Linux with glibc 2.28, and names it so (by pyproject.toml's command).
3. The wheel holds the files of torchq/ and no others.
4. Installed into an empty folder, it passes tools/smoke.py.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
UNWANTED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """Runs a command in this folder; ends the program with its output if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))} failed with {done.returncode}.")
    return done.stdout


def the_only(folder: Path, pattern: str) -> Path:
    """The one file of this name."""
    (path,) = folder.glob(pattern)
    return path


def built(folder: Path) -> Path:
    """Makes the source distribution, and the wheel from it, in folder/built. Gives the wheel."""
    copy = folder / "copy"
    shutil.copytree(ROOT, copy, ignore=UNWANTED)  # without what earlier builds left
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "built", folder=copy)
    return the_only(folder / "built", "*.whl")


def repaired(wheel: Path, folder: Path) -> Path:
    """The wheel as auditwheel names it, by the command that cibuildwheel runs in its image of manylinux_2_28."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        linux = tomllib.load(file)["tool"]["cibuildwheel"]["linux"]
    plat = f"{linux['manylinux-x86_64-image']}_{platform.machine()}"
    command = linux["repair-wheel-command"].format(dest_dir=folder / "repaired", wheel=wheel)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run("sh", "-c", command, folder=folder, AUDITWHEEL_PLAT=plat, PATH=path)
    return the_only(folder / "repaired", f"*{plat}.whl")


def check_contents(wheel: Path) -> None:
    """Ends the program if the wheel lacks a file of torchq/, or has others than these, the library and metadata."""
    with zipfile.ZipFile(wheel) as packed:
        held = {name for name in packed.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    sources = [path.relative_to(ROOT) for path in (ROOT / "torchq").rglob("*") if path.is_file()]
    wanted = {str(path) for path in sources if path.suffix != ".so" and "__pycache__" not in path.parts}
    wanted |= {path.name for path in ROOT.glob("_torchq_*.py")}
    libraries = {name for name in held if name.startswith("torchq/_C.") and name.endswith(".so")}
    if len(libraries) != 1 or held - libraries != wanted:
        sys.exit(f"{wheel.name} has {held - wanted}, and lacks {wanted - held}")


def tried(wheel: Path, folder: Path) -> str:
    """Installs the wheel into an empty folder and runs the smoke test there. Gives what that printed."""
    site, empty = folder / "site", folder / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, folder=empty)
    where = run(sys.executable, "-c", "import torchq; print(torchq.__file__)", folder=empty, PYTHONPATH=str(site))
    if site not in Path(where.strip()).parents:
        sys.exit(f"the smoke test would run {where.strip()}, and not what was installed into {site}")
    return run(sys.executable, ROOT / "tools/smoke.py", folder=empty, PYTHONPATH=str(site)).strip()


def main() -> None:
    """Makes both, tries them, and copies them to the folder given, if any."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = built(folder)
        source = the_only(folder / "built", "*.tar.gz")
        if sys.platform == "linux":
            wheel = repaired(wheel, folder)
        check_contents(wheel)
        said = tried(wheel, folder)
        for package in (source, wheel):
            print(f"{package.name}: {package.stat().st_size / 1e6:.2f} MB")
            if len(sys.argv) > 1:
                Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
                shutil.copy(package, sys.argv[1])
        print(said)


if __name__ == "__main__":
    main()
