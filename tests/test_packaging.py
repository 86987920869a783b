"""The build says what is missing, and the package contains all its files."""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import _torchq_autoload
import torchq
from helpers import ROOT
from torchq import _C

THIS_TORCH = f"__version__ = {torch.__version__!r}"  # to import it takes longer than what is tested
RELEASE = re.compile(r"(?m)^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$")


def build(tmp_path, *, path, torch_stub=None, **environment):
    """Runs `setup.py build_ext` with this PATH, and `torch_stub` in place of torch; returns its stderr."""
    if torch_stub is not None:
        (tmp_path / "torch.py").write_text(torch_stub)
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "setup.py"),
            "build_ext",
            "--build-temp",
            str(tmp_path),
            "--build-lib",
            str(tmp_path),
        ],
        cwd=ROOT,
        env={"PATH": path, "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    return run.stderr


@pytest.mark.subprocess
def test_build_without_a_compiler_says_so(tmp_path):
    error = build(tmp_path, path=str(tmp_path), torch_stub=THIS_TORCH)
    assert "needs a C++17 compiler" in error
    assert "apt-get install g++" in error


@pytest.mark.subprocess
def test_build_with_a_wrong_cxx_names_it(tmp_path):
    error = build(tmp_path, path=os.environ["PATH"], torch_stub=THIS_TORCH, CXX="no-such-compiler")
    assert "'no-such-compiler' was not found" in error


@pytest.mark.subprocess
def test_build_without_torch_says_so(tmp_path):
    error = build(tmp_path, path=os.environ["PATH"], torch_stub="raise ImportError('none')")
    assert "building needs torch" in error
    assert "--no-build-isolation" in error


@pytest.mark.subprocess
@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cpu"])
def test_build_with_an_old_torch_says_so(tmp_path, version):
    error = build(tmp_path, path=os.environ["PATH"], torch_stub=f"__version__ = {version!r}")
    assert f"needs torch >= 2.10 (the stable ABI), found {version}" in error


@pytest.mark.subprocess
def test_build_without_its_tools_says_so(tmp_path):
    """As in a new environment: without isolation, pip brings none of them."""
    (tmp_path / "pybind11.py").write_text("raise ImportError('none')")
    error = build(tmp_path, path=os.environ["PATH"], torch_stub=THIS_TORCH)
    assert error.endswith(
        "building needs pybind11, which is missing here. Install what builds need: "
        "pip install 'setuptools>=77' pybind11 ninja\n"
    )
    (tmp_path / "pybind11.py").write_text("")
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\nsetup = print")
    error = build(tmp_path, path=os.environ["PATH"], torch_stub=THIS_TORCH)
    assert "building needs a later setuptools than 65.5.0. Install it: pip install 'setuptools>=77' " in error


@pytest.mark.parametrize("page", ["README.md", "docs/install.md"])
def test_what_builds_need_is_installed_before_they_are(page):
    """By the lines that a reader copies, in the words that setup.py has where it is missing."""
    tools = "pip install 'setuptools>=77' pybind11 ninja"
    assert f'TOOLS = f"{tools.replace("77", "{MIN_SETUPTOOLS}")}"' in (ROOT / "setup.py").read_text()
    found = re.findall(r"(?m)^```\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL)
    builds = [block for block in found if re.search(r"pip install --no-build-isolation '?\.", block)]
    assert builds
    assert [block for block in builds if tools not in block.partition("--no-build-isolation")[0]] == []


def test_stub_declares_exactly_what_the_module_has():
    tree = ast.parse((ROOT / "torchq" / "_C.pyi").read_text())
    declared = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    declared |= {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    assert declared == {name for name in dir(_C) if not name.startswith("_")}


def test_typed_marker_is_shipped():
    assert (Path(torchq.__file__).parent / "py.typed").exists()


def test_versions_agree():
    assert f'version = "{torchq.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert RELEASE.findall((ROOT / "CHANGELOG.md").read_text())[0][0] == torchq.__version__


def test_the_changelog_is_in_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = RELEASE.findall(text)
    dates = [date for _, date in releases]
    assert dates == sorted(dates, reverse=True)
    assert re.findall(r"(?m)^## (.*)", text) == ["[Unreleased]", *(f"[{name}] - {date}" for name, date in releases)]
    sections = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for part in re.split(r"(?m)^## ", text)[1:]:
        found = re.findall(r"(?m)^### (.*)", part)
        assert found == [name for name in sections if name in found]
    assert set(re.findall(r"(?m)^\[(.+)\]: http", text)) == {"Unreleased", *(name for name, _ in releases)}


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """The folder of the package's metadata."""
    folder = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def metadata_in(folder):
    """What the package says of itself, as `email` reads it."""
    return email.message_from_string((folder / "torchq.egg-info/PKG-INFO").read_text())


@pytest.mark.subprocess
def test_the_metadata_are_complete(described):
    metadata = metadata_in(described)
    urls = {url.partition(",")[0] for url in metadata.get_all("Project-URL")}
    assert urls == {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    assert {"hf", "cli", "bench", "docs", "plot", "test", "dev"} == set(metadata.get_all("Provides-Extra"))
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.subprocess
@pytest.mark.slow(seconds=4)
def test_wheels_are_described_for_every_python_and_architecture(described):
    """By cibuildwheel; the classifiers name the same Pythons."""
    command = shutil.which("cibuildwheel", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if command is None:
        pytest.skip("cibuildwheel is not installed")
    pythons = ["3.10", "3.11", "3.12", "3.13", "3.14"]
    for machine in ("x86_64", "aarch64"):
        asked = [command, "--print-build-identifiers", "--platform", "linux", "--archs", machine]
        printed = subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert printed.split() == [f"cp{python.replace('.', '')}-manylinux_{machine}" for python in pythons]
    classifiers = metadata_in(described).get_all("Classifier")
    versions = [line.removeprefix("Programming Language :: Python :: ") for line in classifiers]
    assert [version for version in versions if version[:2] == "3."] == pythons


@pytest.mark.slow(seconds=4)
def test_a_source_distribution_has_what_the_build_reads(tmp_path):
    copy = tmp_path / "copy"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "tests", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    read = [path for folder in ("csrc", "torchq") for path in (copy / folder).rglob("*") if path.is_file()]
    assert len(read) > 100
    assert [path for path in read if str(path.relative_to(copy)) not in held] == []


@pytest.mark.slow(seconds=8)
@pytest.mark.subprocess
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_exported_program_loads_where_nobody_imports_torchq(tmp_path, described):
    """The entry point of the package tells torch where `torch.ops.torchq` comes from."""
    model = torchq.convert(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)))
    x = torch.linspace(-1, 1, 4 * 64).reshape(4, 64)
    program, numbers = tmp_path / "model.pt2", tmp_path / "y.pt"
    torch.export.save(torch.export.export(model, (x,)), program)
    code = (
        "import sys, torch; assert 'torchq' not in sys.modules\n"
        f"y = torch.export.load({str(program)!r}).module()(torch.linspace(-1, 1, 256).reshape(4, 64))\n"
        f"torch.save(y.detach(), {str(numbers)!r})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(described), str(ROOT)])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert torch.equal(torch.load(numbers), model(x).detach())


def test_ops_have_the_same_names_with_and_without_the_entry_point():
    """A saved program holds these names."""
    own, plain = _torchq_autoload._Ops("torchq"), torch._ops._OpNamespace("torchq")
    assert own.linear_dynamic.__module__ == plain.linear_dynamic.__module__ == "torch._ops.torchq"
    assert str(own.linear_dynamic.default) == str(plain.linear_dynamic.default)
