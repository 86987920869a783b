"""save() and load(): every kind of converted model comes back bit for bit, from a model without values too."""

import copy
import hashlib
import os
import pathlib
import signal
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import torchq
from helpers import ROOT
from helpers.commands import run_code
from helpers.compare import assert_identical
from helpers.models import DATA, Nested, X, mlp
from helpers.numbers import normal
from helpers.smoothable import DATA as OUTLIERS
from helpers.smoothable import Block
from torchq import QConfig, convert, prepare_qat
from torchq.planning import tables

pytestmark = pytest.mark.usefixtures("seeded")

IDS = [torch.randint(0, 90, (12, 6), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
SEQUENCES = [normal(4, 6, 24, seed=seed) for seed in range(4)]


class Tied(nn.Module):
    """An embedding and a head that share one parameter, and a buffer that no state_dict has."""

    def __init__(self):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(90, 24), mlp(24, 32, 24), nn.Linear(24, 90, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("places", torch.randn(6, 24), persistent=False)

    def forward(self, ids):
        return self.head(self.body(self.table(ids) + self.places))


class Shared(nn.Module):
    """A layer under two names, and float parameters that are one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.blocks = nn.ModuleList([nn.LayerNorm(24), nn.LayerNorm(24)])
        self.blocks[1].weight = self.blocks[0].weight
        self.again = self.first

    def forward(self, x):
        return self.blocks[1](self.again(self.blocks[0](self.first(x))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True, add_bias_kv=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Convolutions(nn.Module):
    """Rows as channels of one dimension: a norm that a convolution includes, groups, and a stride."""

    def __init__(self):
        super().__init__()
        first = (nn.Conv1d(24, 32, 3, padding=1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 32, 1))
        self.body = nn.Sequential(*first, nn.ReLU(), nn.Conv1d(32, 32, 3, stride=2, groups=2), nn.Conv1d(32, 8, 1))

    def forward(self, x):
        return self.body(x.transpose(1, 2))


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(24, 16, num_layers=2, proj_size=8, bidirectional=True, batch_first=True)
        self.cell, self.gru = nn.GRUCell(16, 24), nn.GRU(24, 12, batch_first=True)

    def forward(self, x):
        return self.gru(self.cell(self.layer(x)[0][:, -1])[:, None])[0]


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(90, 24, mode="mean"), nn.Linear(24, 8)

    def forward(self, ids):
        return self.head(self.bag(ids))


def of_transformers(name, **more):
    def make():
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}
        config = getattr(transformers, f"{name}Config")(**sizes, pad_token_id=0, **more)
        kind = getattr(transformers, f"{name}{'Model' if name == 'Bert' else 'ForCausalLM'}", None)
        model = kind(config) if kind else transformers.GPT2LMHeadModel(config)
        return Logits(model)

    return make


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids)[0]


GOLDEN = "b15a36eb48476ff63650d2db83b095014e4e15e2186d2df5147dedd77ecaf1b5"
STATIC, GPTQ = QConfig(activation="static", observer="minmax"), QConfig(rounding="gptq")
LAYER = nn.TransformerEncoderLayer
CASES = {
    "dynamic": (lambda: mlp(24, 40, 32, 8), None, QConfig()),
    "static, u8 from layer to layer": (lambda: mlp(24, 40, 32, 8), DATA, STATIC),
    "bias by correction": (Nested, DATA, GPTQ),
    "channel scale": (Block, OUTLIERS, GPTQ),
    "per tensor": (Nested, DATA, QConfig(weight="per_tensor")),
    "one scale per tensor, in float": (Nested, DATA, QConfig(min_sqnr_db=1e9)),
    "tied head": (Tied, IDS, QConfig(embeddings=True)),
    "tied in float": (Tied, IDS, QConfig(exclude=("head",))),
    "bag": (Bags, IDS, QConfig(embeddings=True)),
    "shared": (Shared, SEQUENCES, QConfig()),
    "attention": (Attention, SEQUENCES, QConfig(attention="int8")),
    "attention in part": (Attention, SEQUENCES, QConfig(exclude=("attention.k_proj",))),
    "encoder": (lambda: nn.TransformerEncoder(LAYER(24, 4, 32, batch_first=True), 2), SEQUENCES, QConfig()),
    "convolutions": (Convolutions, SEQUENCES, STATIC),
    "convolutions with channel scales": (Convolutions, SEQUENCES, GPTQ),
    "recurrent": (Cells, SEQUENCES, QConfig()),
    "recurrent in part": (Cells, SEQUENCES, QConfig(exclude=("layer.hh_l0",))),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(24, 32)), nn.GELU(), nn.Linear(32, 8)), DATA, GPTQ),
    "Conv1D": (of_transformers("GPT2"), IDS, STATIC),
    "rotary": (of_transformers("Llama", intermediate_size=48, num_key_value_heads=2), IDS, QConfig(attention="int8")),
    "experts": (of_transformers("Mixtral", intermediate_size=48, num_key_value_heads=2), IDS, GPTQ),
    "encoder of Hugging Face": (of_transformers("Bert", intermediate_size=48), IDS, QConfig(attention="bfloat16")),
}


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    monkeypatch.setattr(tables, "MIN_BYTES", 1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.safetensors"


def without_values(make):
    with torch.device("meta"):
        return make()


def assert_same(loaded, qmodel, x):
    assert_identical(loaded(x), qmodel(x))
    assert str(loaded) == str(qmodel)
    assert loaded.torchq_plan == qmodel.torchq_plan
    states = loaded.state_dict(), qmodel.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert_identical(tensor, states[1][key], key)
    assert not loaded.training


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_loaded(case, path):
    make, data, config = CASES[case]
    model = make().eval()
    qmodel = convert(model, data, config=config, progress=False)
    x = (data or DATA)[1]
    torchq.save(qmodel, path)
    for source in (model, without_values(make)):
        assert_same(torchq.load(path, source), qmodel, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(dtype, path):
    make = CASES["encoder of Hugging Face"][0]
    model = make().to(dtype).eval()
    qmodel = convert(model, IDS, progress=False)
    torchq.save(qmodel, path)
    loaded = torchq.load(path, without_values(make).to(dtype))
    assert_same(loaded, qmodel, IDS[0])
    assert loaded(IDS[0]).dtype == dtype


def test_a_trained_model_loads_into_the_plain_float_one(path):
    model = Block()
    trained = prepare_qat(model, OUTLIERS)
    with torch.enable_grad():
        trained(OUTLIERS[0]).square().mean().backward()
    torch.optim.SGD(trained.parameters(), 1e-2).step()
    qmodel = convert(trained.eval())
    torchq.save(qmodel, path)
    for source in (trained, model, without_values(Block)):
        assert_same(torchq.load(path, source), qmodel, OUTLIERS[1])


def test_the_float_model_is_left_alone_and_shares_nothing(path):
    model = Tied().eval()
    qmodel = convert(model, IDS, config=QConfig(exclude=("body.0",)))
    torchq.save(qmodel, path)
    before = copy.deepcopy(model.state_dict())
    loaded = torchq.load(path, model)
    for parameter in loaded.body[0].parameters():
        parameter.zero_()
    loaded.places.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert_same(torchq.load(path, model), qmodel, IDS[0])  # and the file keeps its values


def test_what_was_one_parameter_is_one_again(path):
    torchq.save(convert(Shared().eval(), SEQUENCES), path)
    with torch.device("meta"):
        model = Shared()
        model.blocks[1].weight = nn.Parameter(torch.empty(24))
    loaded = torchq.load(path, model)
    assert loaded.blocks[1].weight is loaded.blocks[0].weight
    assert loaded.again is loaded.first
    assert not loaded.first.packed.is_meta


def test_the_mode_is_the_saved_one(path):
    model = mlp(24, 32, 8)
    torchq.save(convert(model).train(), path)
    assert torchq.load(path, model).training


def test_a_loaded_model_is_a_converted_one(path):
    """It can be saved, copied, planned and reported, as the one that was saved."""
    model = Nested().eval()
    qmodel = convert(model, DATA, config=GPTQ)
    torchq.save(qmodel, path)
    loaded = torchq.load(path, model)
    again = path.with_name("again.safetensors")
    torchq.save(loaded, again)
    assert again.read_bytes() == path.read_bytes()
    assert torchq.report(loaded).to_dict() == torchq.report(qmodel).to_dict()
    assert_same(copy.deepcopy(loaded), qmodel, X)
    assert_same(torchq.apply_plan(model, torchq.plan_of(loaded)), qmodel, X)


def test_no_float_weight_is_made(path):
    """Neither a tensor of floats as large as a weight, nor the weights of the model, which has none."""
    make = lambda: mlp(512, 512, 512)  # noqa: E731
    torchq.save(convert(make()), path)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            y = func(*args, **(kwargs or {}))
            if isinstance(y, torch.Tensor) and y.is_floating_point() and not y.is_meta:
                made.append(y.numel())
            return y

    model = without_values(make)
    with Watch():
        torchq.load(path, model)
    assert max(made, default=0) < 512 * 512


def is_mapped(tensor, path):
    """Whether the tensor's memory is the file's."""
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(str(path))
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/maps is Linux's")
def test_floats_are_mapped_and_the_file_may_go(path):
    """What the file's name stands for may change while a loaded model uses it."""
    model = nn.Sequential(nn.Linear(24, 24), nn.Embedding(900, 24)).eval()
    qmodel = convert(model, config=QConfig(embeddings=False))
    torchq.save(qmodel, path)
    loaded = torchq.load(path, model)
    assert is_mapped(loaded[1].weight, path)
    torchq.save(convert(mlp(24, 8)), path)
    assert torch.equal(loaded[1].weight, model[1].weight)
    path.unlink()
    assert torch.equal(loaded[1].weight, model[1].weight)


def test_the_size_is_a_quarter(path):
    """Of 4 bytes each, and 1.05 times that: scales, biases, norms and the plan are the rest."""
    layer = nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
    qmodel = convert(nn.TransformerEncoder(layer, 1).eval())
    torchq.save(qmodel, path)
    floats = sum(parameter.numel() for parameter in layer.parameters()) * 4
    assert path.stat().st_size <= 1.05 * floats / 4


def test_others_read_the_tensors(path):
    qmodel = convert(mlp(24, 32, 8), DATA, config=STATIC)
    torchq.save(qmodel, path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(qmodel.state_dict())
        assert_identical(file.get_tensor("0.weight_int8"), qmodel[0].weight_int8)
        assert file.metadata()["torchq"].startswith("1 ")


class Golden(nn.Module):
    """What tests/format-1.safetensors holds: every step of it is bit exact on every CPU."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(64, 24), mlp(24, 32, 24)
        self.conv, self.head = nn.Conv1d(24, 16, 3), nn.Linear(16, 8, bias=False)

    def forward(self, ids):
        return self.head(self.conv(self.body(self.table(ids)).transpose(1, 2)).transpose(1, 2))


def test_a_file_of_the_first_release_gives_its_bits(kernel):
    """On every kernel: layers static and dynamic, with a bias by correction, with a channel scale; and a table."""
    loaded = torchq.load(ROOT / "tests" / "format-1.safetensors", without_values(Golden))
    kinds = {name: row.kind for name, row in loaded.torchq_plan.layers.items()}
    assert set(kinds.values()) == {"int8 static", "int8 dynamic"}
    assert loaded.head.has_bias
    assert not loaded.head.had_bias
    assert loaded.body[2].channel_scale is not None
    y = loaded(torch.arange(120).reshape(6, 20) * 7 % 64)
    assert hashlib.sha256(y.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() == GOLDEN


# ---- Whatever happens ------------------------------------------------------------------------------------------------


KILLED = """
import os, signal, torch, torchq, torchq.files
from torch import nn
whole = torchq.files.save_file
def half(tensors, path, metadata):
    whole(tensors, path, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
torchq.files.save_file = half
torchq.save(torchq.convert(nn.Sequential(nn.Linear(64, 64))), {path!r})
"""


@pytest.mark.subprocess
def test_a_kill_leaves_the_old_file(path):
    torchq.save(convert(mlp(24, 32, 8)), path)
    before = path.read_bytes()
    code, _, err = run_code(KILLED.format(path=str(path)))
    assert code == -signal.SIGKILL, err
    assert path.read_bytes() == before


def test_an_error_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    qmodel = convert(mlp(24, 32, 8))
    torchq.save(qmodel, path)
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        torchq.save(convert(mlp(24, 8)), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(OSError, match=r"torchq.save: .*nowhere/m can't be written: "):
        torchq.save(convert(mlp(24, 8)), tmp_path / "nowhere" / "m")


def test_what_is_no_regular_file_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link", tmp_path):
        with pytest.raises(OSError, match=f"torchq.save: {path} is no regular file"):
            torchq.save(convert(mlp(24, 8)), path)
    assert pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_link_goes_on_pointing_to_the_file(tmp_path, path):
    link = tmp_path / "link"
    link.symlink_to(path)
    torchq.save(convert(mlp(24, 8)), link)
    assert link.is_symlink()
    assert path.exists()
