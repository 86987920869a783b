"""What load() refuses, and in which words: damaged, later and hostile files, and models that are not the saved one."""

import json
import re
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import torchq
from helpers.compare import snapshot
from helpers.models import DATA, mlp
from helpers.smoothable import DATA as OUTLIERS
from helpers.smoothable import Block
from torchq import QConfig, convert, files

pytestmark = pytest.mark.usefixtures("seeded")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.body = nn.LayerNorm(24), mlp(24, 32, 8)
        self.register_buffer("places", torch.randn(24), persistent=False)

    def forward(self, x):
        return self.body(self.norm(x) + self.places)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "m.safetensors"
    torchq.save(convert(Net().eval(), DATA, config=QConfig(activation="static", observer="minmax")), path)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path, saved):
    (tmp_path / "m.safetensors").write_bytes(saved)
    return tmp_path / "m.safetensors"


def contents(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()["torchq"]  # noqa: SIM118


def written(path, tensors, text, version=1):
    """A file whose metadata is this text, with its right checksum."""
    save_file(tensors, path, {"torchq": f"{version} {zlib.crc32(text.encode()):08x} {text}"})


def forged(path, change):
    """Rewrites the file with what `change(tensors, about)` does to it, and right checksums."""
    tensors, metadata = contents(path)
    tensors, about = {key: tensor.clone() for key, tensor in tensors.items()}, json.loads(metadata.split(" ", 2)[2])
    change(tensors, about)
    about["checksums"] = {key: files._checksum(key, tensor) for key, tensor in tensors.items()}
    written(path, tensors, json.dumps(about))


def refused(path, model, words):
    before = snapshot(model)
    with pytest.raises(ValueError, match=words) as error:
        torchq.load(path, model)
    assert str(error.value).startswith("torchq.load: ")
    assert snapshot(model) == before
    return str(error.value)


# ---- Damaged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(path, Net(), "is damaged, or no safetensors file")


def test_a_longer_file(path):
    path.write_bytes(path.read_bytes() + b"x")
    refused(path, Net(), "is damaged, or no safetensors file")


def test_a_flipped_bit_anywhere(path):
    """It is refused, or it is one that nothing of torchq reads and the model is the same, bit for bit."""
    whole, model = path.read_bytes(), Net()
    expected = torchq.load(path, model)(DATA[0])
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, len(whole) * 8, (100,), generator=generator).tolist()
    names = []
    for place in [*range(64), *places]:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            assert torch.equal(torchq.load(path, model)(DATA[0]), expected), place
        except ValueError as error:
            names.append(str(error))
    assert len(names) > 150
    assert any("the values of body.0.weight_int8 are not those that were saved" in name for name in names)
    assert any("its metadata is not what was saved" in name for name in names)


def test_another_file(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", Net(), "no file of torchq.save: its metadata lacks 'torchq'")
    (tmp_path / "text").write_text("hello")
    refused(tmp_path / "text", Net(), "is damaged, or no safetensors file")
    refused(tmp_path, Net(), "is a folder. What save_pretrained wrote is loaded by from_pretrained, after `import")
    with pytest.raises(FileNotFoundError, match="missing"):
        torchq.load(tmp_path / "missing", Net())


def test_a_later_version(path):
    tensors = {key: tensor.clone() for key, tensor in contents(path)[0].items()}
    written(path, tensors, "a text of other kind", version=2)
    refused(path, Net(), "has format '2', and this torchq reads 1. Update torchq")


# ---- Another model ---------------------------------------------------------------------------------------------------


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.body = mlp(24, 40, 8)


class WithoutNorm(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()


class More(Net):
    def __init__(self):
        super().__init__()
        self.more = nn.LayerNorm(24)


class OtherBuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("other", torch.zeros(1), persistent=False)


class WithoutLayer(Net):
    def __init__(self):
        super().__init__()
        self.body = nn.Identity()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Wider, r"body.0.weight_int8: expected torch.int8 \(40, 24\), got torch.int8 \(32, 24\)"),
        (WithoutNorm, r'Unexpected key\(s\) in state_dict: "norm.bias", "norm.weight"'),
        (More, r'Missing key\(s\) in state_dict: "more.bias", "more.weight"'),
        (WithoutLayer, "the plan names layer 'body.0', which is no"),
        (OtherBuffer, "other: the buffer is missing in the file"),
        (lambda: Net().to(torch.bfloat16), "norm.weight: torch.float32 in the file, torch.bfloat16 in the model"),
        (lambda: Net().to(torch.bfloat16), "body.0: torch.float32 in the file, torch.bfloat16 in the model"),
    ],
)
def test_a_model_that_is_not_the_saved_one(path, make, words):
    refused(path, make(), words)


def test_no_module_and_a_converted_model(path):
    with pytest.raises(TypeError, match=r"torchq.load: model must be an nn.Module, .* got str"):
        torchq.load(path, "m")
    refused(path, convert(Net()), "converted already .* Pass the float model")


def test_an_attribute_that_has_no_values(path):
    with torch.device("meta"):
        model = Net()
        model.extra = torch.ones(2)
    refused(path, model, "has no values for extra, a tensor on the meta device. Build the model on the CPU")


# ---- Hostile ---------------------------------------------------------------------------------------------------------


def put(key, value):
    def change(tensors, about):
        tensors[key] = value(tensors[key])

    return change


def filled(value):
    return lambda tensor: torch.full_like(tensor, value)


def plan(**fields):
    def change(tensors, about):
        about["plan"]["layers"]["body.0"].update(fields)

    return change


def about(**values):
    return lambda tensors, about: about.update(values)


HOSTILE = {
    "nan scale": (put("body.0.weight_scale", filled(torch.nan)), "body.0.weight_scale: scales must be positive normal"),
    "zero scale": (put("body.2.weight_scale", filled(0.0)), "body.2.weight_scale: scales must be positive normal"),
    "static scale": (
        put("body.0.input_scale", filled(torch.inf)),
        "body.0.input_scale: scales must be positive",
    ),
    "zero point": (put("body.0.input_zero_point", filled(256)), r"body.0.input_zero_point: .* in \[0, 255\], got 256"),
    "shape": (put("body.0.weight_scale", lambda t: t[:-1].clone()), r"body.0.weight_scale: expected .* \(32,\), got"),
    "dtype": (put("body.0.weight_int8", lambda t: t.to(torch.uint8)), "body.0.weight_int8: expected torch.int8"),
    "float codes": (put("body.0.weight_int8", lambda t: t.float()), "body.0.weight_int8: expected torch.int8"),
    "missing": (lambda tensors, about: tensors.pop("body.0.bias"), r'Missing key\(s\) in state_dict: "body.0.bias"'),
    "unexpected": (lambda tensors, about: tensors.update(x=torch.ones(1)), r'Unexpected key\(s\) .* "x"'),
    "no plan": (about(plan={}), "its plan is not one of this version of torchq: KeyError: 'layers'"),
    "a list for a plan": (about(plan=[]), "plan in its metadata is no dict"),
    "unknown kind": (plan(kind="int4"), "layer 'body.0' is to be 'int4'"),
    "negative scale": (plan(input_qparams=[-1.0, 0]), "layer 'body.0' has scale -1.0"),
    "scales without end": (plan(channel_scale=10**18), "channel_scale is 10{18}, expected the number"),
    "scales of another layer": (
        plan(channel_scale=23),
        "has a channel_scale of 23 numbers, expected 24",
    ),
    "code to run": (plan(activation="__class__.__init__"), "'__class__.__init__' folded in, which is no activation"),
    "a list for a name": (plan(feeds=["body.2"]), "does not fit this Net"),
    "an unknown field": (plan(more=1), "its plan is not one of this version of torchq"),
    "a tie to nothing": (about(shared={"norm.bias": "nothing"}), "norm.bias is said to be 'nothing', which is missing"),
    "a buffer of nobody": (about(buffers=["places", "norm.x.y"]), "norm.x.y: the model has no such buffer"),
    "float in float's place": (put("norm.weight", lambda t: t.double()), "norm.weight: torch.float64 in the file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file(path, case):
    change, words = HOSTILE[case]
    forged(path, change)
    refused(path, Net(), words)


def test_metadata_that_is_no_json(path):
    tensors = {key: tensor.clone() for key, tensor in contents(path)[0].items()}
    for text in ("{", "[" * 10**5, "{}", "1", '{"plan": 1e999}'):
        written(path, tensors, text)
        refused(path, Net(), "its metadata can't be read")


def test_tables_that_own_each_other(path):
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Embedding(200, 24), nn.Embedding(200, 24)

    qmodel = convert(Tables(), config=QConfig(embeddings=True))
    torchq.save(qmodel, path)
    row = {"kind": "int8", "reason": "", "sqnr_db": None}
    forged(path, lambda _, about: about["plan"].update(tables={"a": row | {"owner": "b"}, "b": row | {"owner": "a"}}))
    refused(path, Tables(), "does not fit this Tables: maximum recursion")


def test_a_layer_deeper_than_sums_are_exact(path):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = nn.Linear(65794, 1)

    with torch.device("meta"):
        model = Deep()
    whole = nn.Sequential(nn.Linear(8, 8))
    qmodel = convert(whole)
    torchq.save(qmodel, path)

    def rename(tensors, about):
        about["plan"]["layers"] = {"deep": about["plan"]["layers"]["0"]}

    forged(path, rename)
    refused(path, model, "layer 'deep' has in_features = 65794; int32 sums are exact up to 65793")


def test_a_channel_scale_that_is_no_number(path):
    torchq.save(convert(Block(), OUTLIERS), path)
    assert "a.channel_scale" in contents(path)[0]
    forged(path, put("a.channel_scale", filled(-1.0)))
    refused(path, Block(), "a.channel_scale: scales must be positive normal")


# ---- What can't be saved ---------------------------------------------------------------------------------------------


def test_what_is_no_converted_model(tmp_path):
    with pytest.raises(ValueError, match=r"torchq.save: this Linear has no torchq_plan. Pass the model that"):
        torchq.save(nn.Linear(2, 2), tmp_path / "m")


def test_what_a_file_can_not_hold(tmp_path):
    class State(nn.Linear):
        def get_extra_state(self):
            return {"more": 1}

    for part, words in {
        "extra": (State(8, 8), r"extra._extra_state is a dict, and a file holds tensors only"),
        "empty": (nn.LayerNorm(8, device="meta"), "empty.weight is on the meta device"),
    }.items():
        model = nn.Sequential(nn.Linear(8, 8))
        model.add_module(part, words[0])
        qmodel = convert(model, config=QConfig(exclude=("extra",) if part == "extra" else ()))
        with pytest.raises(ValueError, match=re.escape(words[1])):
            torchq.save(qmodel, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
