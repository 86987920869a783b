"""The command `torchq` as a user meets it: what it prints where, exit codes, errors without a traceback."""

import importlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

import torchq
from conftest import TOO_SMALL
from helpers import ROOT
from helpers.commands import environment_here
from torchq import kernels
from torchq.command_line import bench, environment, look, models
from torchq.command_line.app import run
from torchq.command_line.console import UserError, guarded
from torchq.planning import layers

WORDS = [f"word{i}" for i in range(295)]


@pytest.fixture
def torchq_command(monkeypatch, capsys):
    """Runs `torchq ...` in this process. Gives its exit code and what it wrote to stdout and stderr."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["torchq", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            run()
        return (done.value.code, *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A directory as save_pretrained writes it, with a tokenizer and a README, and texts beside it."""
    root = tmp_path_factory.mktemp("models")
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        vocab_size=300,
        max_position_embeddings=40,
    )
    BertForSequenceClassification(config).save_pretrained(root / "bert")
    BertTokenizerFast(str(root / "vocab.txt")).save_pretrained(root / "bert")
    (root / "bert" / "README.md").write_text("how to use it")
    generator = torch.Generator().manual_seed(1)
    lines = [[WORDS[i] for i in torch.randint(295, (12,), generator=generator)] for _ in range(40)]
    (root / "texts.txt").write_text("\n\n".join(map(" ".join, lines)))
    return root


@pytest.fixture(scope="module")
def converted(bert):
    """The same in int8, calibrated on the texts, and what the command wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(bert)
        patch.setattr(layers, "too_small", TOO_SMALL)
        patch.setattr(sys, "argv", ["torchq", "convert", "bert", "int8", "--calib", "texts.txt", "--batch-size", "4"])
        with pytest.raises(SystemExit) as done:
            run()
    assert done.value.code == 0, err.getvalue()
    return bert / "int8", out.getvalue(), err.getvalue()


# ---- env ----


def test_env_names_every_kernel_and_why(torchq_command):
    code, out, err = torchq_command("env")
    assert (code, err) == (0, "")
    for name in torchq._C.known_names():
        line = next(line for line in out.splitlines() if line.startswith(name))
        if name == kernels.active():
            assert line.endswith("  active")
        else:
            assert line.endswith(f"  {kernels.why_not(name) or 'can run'}")
    assert f"torchq    {torchq.__version__} on torch {torch.__version__}" in out
    assert f"threads   {torch.get_num_threads()} of torch" in out
    assert "\x1b" not in out  # no colours in a pipe


def test_env_as_json(torchq_command, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    code, out, _ = torchq_command("env", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["variables"]["OMP_NUM_THREADS"] == "7"
    assert [each["name"] for each in found["kernels"] if each["active"]] == [kernels.active()]
    assert {each["name"]: each["why_not"] for each in found["kernels"]} == {
        name: kernels.why_not(name) for name in torchq._C.known_names()
    }
    assert found["packages"]["safetensors"]


def test_more_threads_than_cores_are_remarked(torchq_command, monkeypatch):
    monkeypatch.setattr(environment, "usable_cores", lambda: 0.5)
    assert "torch has more threads than it may use cores: set OMP_NUM_THREADS" in torchq_command("env")[1]


# ---- convert, report, verify, bench of a model ----


@pytest.mark.slow(seconds=4)
def test_convert_writes_a_directory_that_loads(converted, bert):
    import torchq.hf

    directory, out, err = converted
    assert torchq.hf
    assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in (bert / "bert").iterdir())
    assert (directory / "README.md").read_text() == "how to use it"
    loaded = BertForSequenceClassification.from_pretrained(directory)
    assert isinstance(loaded.bert.encoder.layer[0].output.dense, torchq.QuantizedLinear)
    assert loaded.torchq_plan.checked.batches > 0
    assert out.splitlines()[0].startswith("whole model: ")
    assert out.splitlines()[-1].startswith("wrote int8, ")
    lines = err.splitlines()
    assert lines[0] == "loading bert"
    assert "calibrating on 40 texts in 10 batches" in lines
    assert not [name for name in os.listdir(bert) if name.startswith(".int8")]


@pytest.mark.small_layers_stay_float
def test_a_converted_model_gives_what_python_gives(converted, bert):
    """The command is convert() on the same batches."""
    float_model = models.open_float(bert / "bert")
    texts = models.read_texts(bert / "texts.txt", 256)
    batches = list(models.tokenized(float_model, texts, 4, None))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 14)] * 10
    expected = torchq.convert(float_model.model, batches)
    with torch.no_grad():
        loaded = models.open_int8(converted[0]).model
        assert torch.equal(loaded(**batches[0]).logits, expected(**batches[0]).logits)


def test_report(converted, torchq_command, tmp_path):
    code, out, err = torchq_command("report", converted[0])
    assert (code, err) == (0, f"loading {converted[0]}\n")
    assert out.startswith("whole model: ")
    assert "bert.encoder.layer.0.intermediate.dense" in out or "intermediate.dense" in out
    code, out, _ = torchq_command("report", converted[0], "--json")
    data = json.loads(out)
    assert (code, data["model_type"]) == (0, "BertForSequenceClassification")
    assert data["layers"][0]["int8_seconds"] is None
    code, out, err = torchq_command("report", converted[0], "--html", tmp_path / "page.html", "--times", "--json")
    assert json.loads(out)["layers"][0]["int8_seconds"] > 0
    assert "<title>torchq report: BertForSequenceClassification</title>" in (tmp_path / "page.html").read_text()
    assert f"wrote {tmp_path / 'page.html'}" in err


def test_report_as_a_page_without_a_name(converted, torchq_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = torchq_command("report", "--html", converted[0])
    assert (code, out) == (0, "")
    assert "<title>torchq report: " in (tmp_path / "report.html").read_text()
    assert "wrote report.html, " in err
    code, out, _ = torchq_command("report", converted[0], "other.html")
    assert (code, out) == (0, "")
    assert (tmp_path / "other.html").exists()
    code, _, err = torchq_command("report", converted[0], "--html", "nowhere/report.html")
    assert code == 2
    assert "No such file or directory: 'nowhere/report.html'" in err


@pytest.mark.parametrize("texts", [False, True])
def test_verify(converted, bert, torchq_command, texts):
    more = ("--texts", bert / "texts.txt", "--batch", "2") if texts else ("--tokens", "14", "--batch", "2")
    code, out, _ = torchq_command("verify", converted[0], *more)
    assert code == 0
    assert "ok: " in out
    assert "28x64x128" in out  # two texts of 12 words and two marks
    assert json.loads(torchq_command("verify", converted[0], *more, "--json")[1])["ok"] is True


def test_verify_exits_with_1_if_a_kernel_is_wrong(converted, torchq_command, monkeypatch):
    real = torchq.verify

    def wrong(model, example):
        result = real(model, example)
        difference = torchq.reporting.verified.Difference((0, 1), 1.0, 2.0, 3, 4, "a.layer", "avx2", "reference")
        object.__setattr__(result.calls[0], "differences", (difference,))
        return result

    monkeypatch.setattr(look.torchq, "verify", wrong)
    code, out, _ = torchq_command("verify", converted[0], "--tokens", "4")
    assert code == 1
    assert "WRONG: layer 'a.layer': kernel avx2 differs from reference in 3 of 4 elements, first at (0, 1)" in out


@pytest.mark.parametrize("which", ["bert", "int8"])
def test_bench_of_a_model(converted, bert, torchq_command, which, monkeypatch):
    monkeypatch.setattr(
        bench, "interleaved", lambda calls, **_: {name: bool(call()) * 2e-3 for name, call in calls.items()}
    )
    code, out, _ = torchq_command("bench", bert / which, "--shape", "2x8", "--json")
    data = json.loads(out)
    assert (code, data["model"], len(data["shapes"])) == (0, "BertForSequenceClassification", 1)
    assert data["shapes"][0] == {"batch": 2, "tokens": 8, "float_seconds": 2e-3, "int8_seconds": 2e-3, "speedup": 1.0}
    assert data["bytes_int8"] < data["bytes_float"] / 2
    line = torchq_command("bench", bert / which, "--shape", "2x8")[1].splitlines()[-1]
    assert line.split() == ["2", "x", "8", "2.0", "ms", "2.0", "ms", "1.00x", "8,000"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sentence_transformer_keeps_all_its_files(bert, torchq_command, tmp_path):
    """Its pooling, its limit of tokens and its prompts; the model inside becomes int8, calibrated up to that limit."""
    package = pytest.importorskip("sentence_transformers")
    kinds = importlib.import_module("sentence_transformers.models")
    parts = kinds.Transformer(str(bert / "bert"), max_seq_length=10), kinds.Pooling(64, "max")
    before = package.SentenceTransformer(modules=parts, prompts={"query": "word1 "}, device="cpu")
    before.save_pretrained(str(tmp_path / "float"))
    opened = models.open_float(tmp_path / "float")
    limit = opened.longest(opened.tokenizer())
    code, _, err = torchq_command("convert", tmp_path / "float", tmp_path / "int8", "--calib", bert / "texts.txt")
    assert (code, limit) == (0, 10), err
    after = package.SentenceTransformer(str(tmp_path / "int8"), device="cpu")
    assert isinstance(after[0].auto_model.encoder.layer[0].output.dense, torchq.QuantizedLinear)
    assert (after.max_seq_length, after[1].pooling_mode, after.prompts["query"]) == (10, "max", "word1 ")
    texts = models.read_texts(bert / "texts.txt", 8)
    embeddings = [torch.from_numpy(model.encode(texts, prompt_name="query")) for model in (before, after)]
    assert 20 < torchq.sqnr_db(*embeddings) < 100
    assert torchq_command("verify", tmp_path / "int8", "--tokens", "8")[0] == 0


def test_bench_of_layers(torchq_command):
    code, out, _ = torchq_command("bench", "--shape", "3x64x32", "--rounds", "1", "--threads", "1")
    title, head, _, line = out.splitlines()
    assert code == 0
    assert title == f"one layer, dynamic; kernel {kernels.active()}, 1 thread"
    assert head.split() == ["rows", "layer", "float", "int8", "faster"]
    assert line.split()[:4] == ["3", "64", "->", "32"]
    (found,) = json.loads(torchq_command("bench", "--shape", "3x64x32", "--rounds", "1", "--json")[1])
    assert found["speedup"] == pytest.approx(found["float_seconds"] / found["int8_seconds"])


# ---- Errors ----


def test_wrong_input_is_a_line_that_says_what_to_do(bert, converted, torchq_command, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "folder").mkdir()
    source, int8, out = bert / "bert", converted[0], tmp_path / "out"
    cases = {
        (
            "convert",
            tmp_path / "none",
            out,
        ): f"error: {tmp_path / 'none'} is no directory. Download a model: hf download",
        ("convert", tmp_path / "folder", out): "holds no config.json. Pass a directory that save_pretrained wrote.",
        ("convert", int8, out): f"error: {int8} is quantized already, by torchq. Pass the float model.",
        ("convert", source, int8): f"error: {int8} exists. Remove it, or choose another name.",
        ("convert", source, tmp_path / "a" / "b"): f"error: {tmp_path / 'a'} is no directory. Create it first.",
        ("convert", source, out, "--calib", tmp_path / "no.txt"): f"error: {tmp_path / 'no.txt'} can't be read as text",
        ("convert", source, out, "--calib", tmp_path / "empty.txt"): "has no texts. Write one in each line",
        ("convert", source, out, "--exclude", "nothing"): "error: ValueError: torchq.convert: ",
        ("report", source): f"error: {source} is in float. Convert it first: torchq convert {source} OUT",
        ("verify", int8, "--tokens", "41"): "error: BertForSequenceClassification takes 40 tokens at most, got 41.",
        ("bench", "--shape", "8x128"): "error: --shape 8x128: expected ROWSxINxOUT, such as 16x768x3072.",
        ("bench", source, "--shape", "8"): "error: --shape 8: expected BATCHxTOKENS, such as 8x128.",
    }
    for arguments, message in cases.items():
        code, printed, err = torchq_command(*arguments)
        assert code == 2, arguments
        assert printed == "", arguments
        assert message in err, arguments
        assert "Traceback" not in err
        assert not out.exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "config.json can't be read: Expecting property name"),
        ("config.json", "[1]", "config.json should hold a dict, and holds a list."),
        ("modules.json", "{}", "modules.json should hold a list, and holds a dict."),
        ("config.json", '{"quantization_config": 8}', "is quantized already, by another tool."),
    ],
)
def test_files_of_a_directory_that_are_damaged(torchq_command, tmp_path, name, text, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(text)
    code, printed, err = torchq_command("convert", tmp_path, tmp_path / "out")
    assert (code, printed) == (2, "")
    assert message in err


def test_weights_that_were_cut_off(torchq_command, bert, converted, tmp_path):
    for command, source in (("report", converted[0]), ("verify", converted[0]), ("convert", bert / "bert")):
        directory = tmp_path / command
        shutil.copytree(source, directory)
        (directory / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:1000])
        code, printed, err = torchq_command(command, directory, *([tmp_path / "out"] if command == "convert" else []))
        assert (code, printed) == (2, "")
        assert f"error: the weights in {directory} can't be read: " in err
        assert err.endswith("Were they copied as a whole?\n")
        assert not (tmp_path / "out").exists()


def test_what_to_run_next_is_quoted(torchq_command, bert, tmp_path):
    out = tmp_path / "with a space"
    _, printed, _ = torchq_command("convert", bert / "bert", out)
    assert shlex.split(printed.rpartition("next: ")[2]) == ["torchq", "verify", str(out)]


def test_wrong_usage(torchq_command):
    for arguments, message in {
        ("envv",): "Did you mean 'env'?",
        ("convert", "here"): "Missing argument 'OUT'",
        ("verify", "here", "--tokens", "0"): "Invalid value for '--tokens'",
        ("convert", "a", "b", "--rounding", "up"): "'up' is not one of",
    }.items():
        code, _, err = torchq_command(*arguments)
        assert code == 2
        assert message in " ".join(err.split())


def test_help_says_what_a_command_takes(torchq_command):
    code, out, _ = torchq_command("--help")
    assert code == 0
    for name in ("env", "convert", "report", "verify", "bench", "Exit codes"):
        assert name in out
    out = torchq_command("convert", "-h")[1]
    for option in ("DIR", "OUT", "--calib", "--exclude", "--max-length"):
        assert option in out
    assert torchq_command("--version") == (0, f"torchq {torchq.__version__}\n", "")


def test_exit_codes_and_tracebacks(capsys):
    def raises(error):
        def command():
            raise error

        return command

    assert guarded(lambda: 1, show_traceback=False) == 1
    assert guarded(raises(UserError("say [what]")), show_traceback=False) == 2
    assert guarded(raises(OSError("no space")), show_traceback=False) == 2
    assert guarded(raises(KeyboardInterrupt()), show_traceback=False) == 130
    assert guarded(raises(AssertionError("broken")), show_traceback=False) == 3
    err = capsys.readouterr().err
    first = ["error: say [what]", "error: OSError: no space", "interrupted", "error: AssertionError: broken"]
    assert err.splitlines()[:4] == first
    assert "please report it" in err.lower()
    assert "Traceback" not in err
    assert guarded(raises(ValueError("x")), show_traceback=True) == 2
    assert "Traceback" in capsys.readouterr().err


def test_warnings_are_a_line_each_said_once(capsys):
    def command():
        for _ in range(2):
            warnings.warn("few rows", stacklevel=1)
            warnings.warn("old", DeprecationWarning, stacklevel=1)
        return 0

    assert guarded(command, show_traceback=False) == 0
    assert capsys.readouterr().err == "warning: few rows\n"


@pytest.mark.subprocess
@pytest.mark.slow(seconds=3)
def test_the_command_is_installed():
    """As `torchq`, by pyproject.toml, and as `python -m torchq`."""
    assert '\n[project.scripts]\ntorchq = "_torchq_command:main"\n' in (ROOT / "pyproject.toml").read_text()
    command, variables = [sys.executable, "-m", "torchq", "--version"], environment_here()
    run = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert run.stdout == f"torchq {torchq.__version__}\n"


def test_models_without_transformers(monkeypatch, torchq_command, tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "torchq"}}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = torchq_command("report", tmp_path)
    assert code == 2
    assert "models need transformers" in err
    assert "pip install transformers" in err
