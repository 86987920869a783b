"""The public interface: its names, its types, and no dependency that nothing imports."""

import importlib
import importlib.util
import re
import subprocess
import sys
import types

import pytest

import torchq
from helpers import ROOT

PACKAGE = ROOT / "torchq"


def test_public_names():
    """Lists the whole interface, so that a new name is a deliberate decision. dir() shows exactly these names."""
    functions = {"apply_plan", "choose_qparams", "convert", "dequantize", "fake_quantize", "freeze_ranges", "plan_of"}
    functions |= {"prepare_qat", "profile_layers", "quantize", "report", "simulate", "sqnr_db", "watch_drift"}
    functions |= {"compile_options", "load", "save", "verify"}
    assert set(torchq.__all__) == functions | {"Plan", "QConfig", "QuantizedLinear", "kernels", "observers", "ops"}
    assert dir(torchq) == sorted([*torchq.__all__, "__version__"])


def test_no_public_name_hides_a_module():
    """`import torchq.<name>` and `torchq.<name>` must be the same object."""
    for name in torchq.__all__:
        is_module = importlib.util.find_spec(f"torchq.{name}") is not None
        assert is_module == isinstance(getattr(torchq, name), types.ModuleType), name


def resolve(dotted):
    """The object that a user finds under this name, after `import torchq` or an import of a part of it."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ImportError(dotted)


def names_in(text):
    return {match[0] for match in re.finditer(r"(?<![\w/.:-])torchq(\.[A-Za-z_]\w*)+(?!\w*[:{])", text)}


WRITTEN = [*sorted(PACKAGE.rglob("*.py")), *sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_that_is_written_exists(path):
    """Every torchq name in messages, docstrings and documentation exists."""
    for name in names_in(path.read_text()):
        resolve(name)


def test_the_check_above_can_fail():
    assert names_in("torchq.convert: see torchq.nothing_like_it() or `torchq.ops.pack`, torchq/ops.py") >= {
        *("torchq.nothing_like_it", "torchq.ops.pack")
    }
    with pytest.raises(AttributeError):
        resolve("torchq.nothing_like_it")
    with pytest.raises(AttributeError):
        resolve("torchq.convert.apply_plan")  # a function has no such attribute


SPARING = """
import sys, warnings
sys.modules["numpy"] = None  # importing it is an ImportError
warnings.simplefilter("ignore")  # torch's own
import pickle, torch, torchq
from torch import nn
data = torch.randn(64, 16)
qmodel = torchq.convert(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)), [data])
assert "layer" in str(torchq.report(qmodel))
assert torch.equal(pickle.loads(pickle.dumps(qmodel))(data), qmodel(data))
assert torchq.verify(qmodel, data).ok
torchq.prepare_qat(nn.Sequential(nn.Linear(16, 64)), [data])(data).sum().backward()
images = torch.randn(4, 8, 16, 16)
block = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
with torch.inference_mode():
    torchq.convert(block, [images])(images)
assert "torch._dynamo" not in sys.modules  # to import it takes as long as torch itself
"""


@pytest.mark.subprocess
@pytest.mark.slow(seconds=5)
def test_numpy_is_needed_to_save_only_and_the_compiler_to_compile():
    run = subprocess.run([sys.executable, "-c", SPARING], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_run_time_dependencies_are_imported():
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*)\]", text, re.MULTILINE)[1]
    imported = {
        match[1]
        for path in PACKAGE.rglob("*.py")
        for match in re.finditer(r"^(?:from|import) (\w+)", path.read_text(), re.M)
    }
    of_others = {"numpy"}  # safetensors needs it to write tensors, and does not install it
    for name in set(re.findall(r'"(\w+)', listed)) - of_others:
        assert name in imported, f"{name} is a run-time dependency that nothing imports"
