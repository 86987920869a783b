"""Corrupt files: an error, or the same bits. Damage of any byte of a file of save(), and hostile values in all of it.

In a file of save() nothing is taken on trust. A checkpoint of transformers has no checksums, so of one only what could
not be run is an error: every tensor's key, dtype, shape and range, and the plan in config.json.
"""

import json
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import torchq
from helpers.fuzzing import MINUTES, seeds
from helpers.models import DATA, mlp
from torchq import QConfig, convert

pytestmark = [pytest.mark.usefixtures("seeded", "quiet_transformers"), pytest.mark.slow(seconds=30)]

Random = random.Random
ODD = [2**31 - 1, 2**40, 2**63 - 1, 2**64, -1, 0, 1e30, 1.5, None, "x", [], {}, True, [1] * 5, "int8 static", "float"]
SCALES = [float("nan"), float("inf"), -1.0, 0.0, 1e-45]


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its tensors."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: str, body: bytes) -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + body


def entry(header: dict[str, Any], rng: Random) -> str:
    return rng.choice([key for key in header if key != "__metadata__"])


def another_value(data: Any, rng: Random) -> Any:
    """The same JSON with one value replaced, or one key left out."""
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key in part if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], (dict, list)):
                walk(part[key])

    walk(data)
    part, key = rng.choice(places)
    if isinstance(part, dict) and rng.random() < 0.2:
        del part[key]
    else:
        part[key] = rng.choice(ODD)
    return data


# ---- What can happen to a safetensors file ----


def bits(data: bytes, rng: Random) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 8])):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def bits_of_the_header(data: bytes, rng: Random) -> bytes:
    size = len(data) - len(split(data)[1])
    return bits(data[:size], rng) + data[size:]


def shorter(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data))]


def longer(data: bytes, rng: Random) -> bytes:
    return data + bytes(rng.randrange(1, 100))


def size_of_the_header(data: bytes, rng: Random) -> bytes:
    return struct.pack("<Q", rng.choice([0, 1, 2**20, 2**40, 2**64 - 1])) + data[8:]


def shape(data: bytes, rng: Random) -> bytes:
    header, body = split(data)
    about = header[entry(header, rng)]
    huge = [[2**62, 2**62], [0, 2**40], [rng.choice(ODD)], [rng.choice(ODD), 0]]
    about["shape"] = rng.choice([*huge, [*about["shape"], 1], about["shape"][:-1], about["shape"][::-1]])
    return joined(json.dumps(header), body)


def dtype(data: bytes, rng: Random) -> bytes:
    header, body = split(data)
    names = ["F32", "I8", "U8", "BF16", "F16", "I64", "F64", "BOOL", "F8_E4M3", "X", None, 3]
    header[entry(header, rng)]["dtype"] = rng.choice(names)
    return joined(json.dumps(header), body)


def place(data: bytes, rng: Random) -> bytes:
    header, body = split(data)
    header[entry(header, rng)]["data_offsets"][rng.randrange(2)] = rng.choice(ODD)
    return joined(json.dumps(header), body)


def a_key_twice(data: bytes, rng: Random) -> bytes:
    header, body = split(data)
    one, other = entry(header, rng), entry(header, rng)
    return joined(f"{json.dumps(header)[:-1]}, {json.dumps(one)}: {json.dumps(header[other])}}}", body)


def another_name(data: bytes, rng: Random) -> bytes:
    header, body = split(data)
    key = entry(header, rng)
    header[rng.choice([f"{key}x", ""])] = header.pop(key)
    return joined(json.dumps(header), body)


def two_exchanged(data: bytes, rng: Random) -> bytes:
    header, body = split(data)
    one, other = entry(header, rng), entry(header, rng)
    header[one], header[other] = header[other], header[one]
    return joined(json.dumps(header), body)


def missing(data: bytes, rng: Random) -> bytes:
    tensors = load(data)
    del tensors[rng.choice(sorted(tensors))]
    return save(tensors, split(data)[0].get("__metadata__"))


def a_scale(data: bytes, rng: Random) -> bytes:
    tensors = load(data)
    key = rng.choice(sorted(key for key in tensors if key.endswith(("scale", "zero_point"))))
    flat = tensors[key].clone().reshape(-1)
    points = [-1, 256, -(2**31)] if flat.dtype == torch.int32 else [-128, 127]  # of compressed-tensors, these are right
    flat[rng.randrange(len(flat))] = rng.choice(SCALES if flat.is_floating_point() else points)
    return save(tensors | {key: flat.reshape(tensors[key].shape)}, split(data)[0].get("__metadata__"))


CHANGES = [
    bits,
    bits_of_the_header,
    shorter,
    longer,
    size_of_the_header,
    shape,
    dtype,
    place,
    a_key_twice,
    another_name,
    two_exchanged,
    missing,
    a_scale,
]


def another_plan(data: bytes, rng: Random) -> bytes:
    """Another value in the metadata, with its right checksum: whoever forges a file can do that."""
    header, body = split(data)
    version, _, text = header["__metadata__"]["torchq"].split(" ", 2)
    text = json.dumps(another_value(json.loads(text), rng))
    header["__metadata__"]["torchq"] = f"{version} {zlib.crc32(text.encode()):08x} {text}"
    return joined(json.dumps(header), body)


def tried(read: Callable[[], Any], kind: type[Exception]) -> tuple[Any, str]:
    """What it gave, or None and what it said."""
    try:
        return read(), ""
    except kind as error:
        return None, str(error)


def test_corrupt_files_of_save(tmp_path):
    """Whatever is changed: the same bits, an error of load()'s own, or the plan that somebody wrote into the file."""
    model = nn.Sequential(nn.LayerNorm(24), *mlp(24, 32, 8)).eval()
    qmodel = convert(model, DATA, config=QConfig(activation="static", observer="minmax"))
    path, y = tmp_path / "m.safetensors", qmodel(DATA[0])
    torchq.save(qmodel, path)
    whole = path.read_bytes()
    for seed in seeds():
        rng, refused = Random(seed), Counter()
        for _ in range(3000 if MINUTES else 400):
            change = another_plan if rng.random() < 0.4 else rng.choice(CHANGES)
            path.write_bytes(change(whole, rng))
            loaded, said = tried(lambda: torchq.load(path, model), ValueError)
            if loaded is None:
                assert said.startswith("torchq.load: "), change
                refused[change.__name__] += 1
            else:
                found = loaded(DATA[0])
                assert found.shape == y.shape
                assert change is another_plan or torch.equal(found, y), change
        assert refused.keys() >= {change.__name__ for change in (*CHANGES, another_plan)} - {"a_key_twice"}


def test_corrupt_checkpoints_of_transformers(tmp_path):
    """Of an int8 one and of one of compressed-tensors: an error, or a model that runs; no crash, no half a model."""
    transformers = pytest.importorskip("transformers", "5.17", reason="transformers 5.17 is not installed")
    from torchq import hf

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    kind, ids = transformers.BertModel, torch.arange(128).reshape(16, 8) % 64
    model = kind(transformers.BertConfig(**sizes, vocab_size=64)).eval()
    config = QConfig(activation="static", observer="minmax", smoothing="none", rounding="nearest")
    qmodel = convert(model, [{"input_ids": ids}], config=config)
    qmodel.save_pretrained(tmp_path / "own")
    hf.save_compressed_tensors(qmodel, tmp_path / "compressed")
    readers = {"own": kind.from_pretrained, "compressed": lambda path: hf.from_compressed_tensors(kind, path)}
    for seed in seeds():
        rng, refused = Random(seed), Counter()
        for number in range(600 if MINUTES else 60):
            name = ("own", "compressed")[number % 2]
            weights, about = ((tmp_path / name / file).read_bytes() for file in ("model.safetensors", "config.json"))
            change = another_value if rng.random() < 0.4 else rng.choice(CHANGES)
            folder = tmp_path / "changed"
            folder.mkdir(exist_ok=True)
            said = json.loads(about)
            if change is another_value:
                another_value(said["quantization_config"], rng)
                said["quantization_config"]["quant_method"] = json.loads(about)["quantization_config"]["quant_method"]
            else:
                weights = change(weights, rng)
            (folder / "config.json").write_text(json.dumps(said))
            (folder / "model.safetensors").write_bytes(weights)
            loaded, message = tried(partial(readers[name], folder), Exception)
            if loaded is None:
                mine = message.startswith(("torchq", "QConfig", "TorchqConfig"))
                assert mine or change not in (another_value, a_scale) or "mismatched" in message, (change, message)
                refused[change.__name__] += 1
            else:
                assert loaded(ids)[0].shape == (16, 8, 32)
        assert sum(refused.values()) > 10
