"""The examples run, small and offline, and what they print is right."""

import os
import re
import runpy
import socket
import subprocess
import sys

import pytest
import torch

from helpers import ROOT

pytestmark = [pytest.mark.small_layers_stay_float]
OPTIONAL = {"transformers", "tokenizers", "sentence_transformers", "peft"}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs an example as `python examples/<name>.py` does, and gives what it prints."""

    def run_one(name, *arguments):
        script = ROOT / "examples" / f"{name}.py"
        monkeypatch.syspath_prepend(str(script.parent))
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            pytest.skip(f"{error.name} is not installed")
        return capsys.readouterr().out

    before = torch.get_num_threads()
    yield run_one
    torch.set_num_threads(before)
    for module in ("data", "text_classifier"):
        sys.modules.pop(module, None)


@pytest.mark.subprocess
@pytest.mark.slow(seconds=30)
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_batch_inference_on_ray(run, monkeypatch):
    pytest.importorskip("ray", reason="Ray, with pyarrow and pandas, takes half a gigabyte: CI does without it")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for its workers
    printed = run("batch_inference", "--rows", 1000, "--workers", 2)
    assert numbers(r"(\d+) texts in (?:1|2) processes", printed) == [1000]
    assert "every worker maps the file: True" in printed
    assert "the topics of one process: True" in printed


def numbers(pattern, text):
    """The numbers that a pattern finds, one for each time."""
    return [float(found) for found in re.findall(pattern, text)]


def test_every_example_is_run_here():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"data"}
    here = (ROOT / "tests/test_examples.py").read_text()
    assert names == set(re.findall(r'run(?:_processes)?\("(\w+)"', here))


@pytest.mark.slow(seconds=2)
def test_digits(run):
    printed = run("digits", "--width", 256, "--epochs", 2)
    assert "100.0% of the weights of matrix products in int8" in printed
    accurate, int8 = numbers(r"accuracy ([\d.]+) %", printed)
    assert accurate > 80
    assert abs(accurate - int8) < 1


@pytest.mark.slow(seconds=2)
def test_an_accuracy_budget(run):
    printed = run("accuracy_budget")
    accurate, everything, within = numbers(r"accuracy ([\d.]+) %", printed)
    assert everything < accurate - 1 <= within
    assert "left in float: 0\n" in printed


@pytest.mark.slow(seconds=3)
def test_quantization_aware_training(run):
    printed = run("qat", "--steps", 200)
    accurate, converted, trained = numbers(r": +([\d.]+) %", printed)
    assert converted < trained <= accurate + 1
    assert "what was trained is what runs: True" in printed


@pytest.mark.slow(seconds=8)
def test_a_text_classifier(run):
    printed = run("text_classifier", "--texts", 120, "--epochs", 1)
    accurate, int8 = numbers(r"accuracy ([\d.]+) %", printed)
    (same,) = numbers(r"same answer: ([\d.]+) %", printed)
    assert same >= 97
    assert abs(accurate - int8) <= 100 - same + 0.15  # rounded to 0.1, all three: other answers are all that differs


@pytest.mark.slow(seconds=8)
def test_sentence_embeddings(run):
    printed = run("sentence_embeddings", "--texts", 60, "--epochs", 1)
    assert "saved and loaded: the same embeddings, bit for bit: True" in printed
    accurate, int8 = numbers(r"([\d.]+) % of 30 new halves found", printed)
    assert abs(accurate - int8) <= 7
    assert numbers(r"same answer: ([\d.]+) %", printed)[0] >= 90


@pytest.mark.slow(seconds=8)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks transformers for it
def test_lora_on_int8(run):
    printed = run("lora", "--texts", 80, "--epochs", 2)
    before, after = numbers(r"accuracy ([\d.]+) %", printed)
    assert after > before
    trained, everything = numbers(r"(\d+) of \d+ parameters", printed) + numbers(r"of (\d+) parameters", printed)
    assert trained < everything / 10
    assert "int8 weights unchanged: True" in printed
    assert "adapter saved and loaded: the same answers: True" in printed


@pytest.mark.slow(seconds=8)
def test_generation(run):
    printed = run("generation", "--width", 64, "--steps", 12, "--characters", 200_000, "--length", 8)
    accurate, int8 = numbers(r"([\d.]+) nats", printed)
    assert abs(accurate - int8) < 0.01
    assert printed.count("writes") == 2


@pytest.mark.slow(seconds=3)
@pytest.mark.parametrize("server", ["fastapi", "plain"])
def test_serving_from_threads(run, server):
    if server == "fastapi":
        pytest.importorskip("fastapi", reason="FastAPI is not installed")
        pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    printed = run("serving", "--check", "--requests", 50, "--port", port, *(["--plain"] if server == "plain" else []))
    (same,) = numbers(r"50 answers to 8 threads: (\d+) the same", printed)
    assert same == 50
    assert numbers(r"(\d+) right", printed)[0] > 40


def run_processes(name, *arguments):
    """Runs an example that starts processes of its own, and gives what they print."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow(seconds=12)
@pytest.mark.subprocess
def test_distributed_calibration():
    printed = run_processes("distributed_calibration", "--steps", 40)
    accurate, int8 = numbers(r"accuracy ([\d.]+) %", printed)
    assert abs(accurate - int8) < 1
    assert "2 processes, 650 images in this one; the same int8 model in all: True" in printed
