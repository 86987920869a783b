"""Packed weights of loaded models lie side by side in memory of their own, with the values that were saved."""

import copy
import errno
import gc
import io
import mmap
import pickle

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq.modules import huge_pages, packed_weights
from torchq.modules.huge_pages import in_huge_pages
from torchq.modules.packed_weights import PackedWeights

pytestmark = pytest.mark.usefixtures("seeded")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _a_chunk_of_its_own(monkeypatch):
    """The memory that a test before has begun stays as it is."""
    monkeypatch.setattr(huge_pages, "_chunk", huge_pages._Chunk())


def linear_model():
    return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 300)).eval()


def conv_model():
    """A layer whose packed weight is a matrix: one row for each group."""
    return nn.Sequential(nn.Conv2d(128, 512, 3, groups=2), nn.Flatten(), nn.Linear(512, 300)).eval()


MODELS = {"linear": (linear_model, normal(8, 512, seed=0)), "conv": (conv_model, normal(2, 128, 3, 3, seed=0))}


def by_state(qmodel, model, path):
    again = torchq.apply_plan(model, torchq.plan_of(qmodel))
    again.load_state_dict(qmodel.state_dict())
    return again


def by_mapped_state(qmodel, model, path):
    again = torchq.apply_plan(model, torchq.plan_of(qmodel))
    torch.save(qmodel.state_dict(), path)
    again.load_state_dict(torch.load(path, mmap=True))
    return again


def by_torch_file(qmodel, model, path, **options):
    torch.save(qmodel, path)
    return torch.load(path, weights_only=False, **options)


def by_torchq_file(qmodel, model, path):
    torchq.save(qmodel, path)
    return torchq.load(path, model)


WAYS = {
    "deepcopy": lambda qmodel, model, path: copy.deepcopy(qmodel),
    "pickle": lambda qmodel, model, path: pickle.loads(pickle.dumps(qmodel)),
    "torch.load": by_torch_file,
    "torch.load, mapped": lambda *args: by_torch_file(*args, mmap=True),
    "load_state_dict": by_state,
    "load_state_dict, mapped": by_mapped_state,
    "torchq.load": by_torchq_file,
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_loaded_lies_together(way, kind, tmp_path, monkeypatch):
    placed = []

    def place(packed):
        placed.append(in_huge_pages(packed))
        return placed[-1]

    monkeypatch.setattr(packed_weights, "in_huge_pages", place)
    make, x = MODELS[kind]
    model = make()
    qmodel = torchq.convert(model)
    expected, file = qmodel(x), tmp_path / "model"
    assert not placed

    again = WAYS[way](qmodel, model, file)

    held = [module.packed for module in again.modules() if isinstance(module, PackedWeights)]
    assert len(held) == len(placed) == 2
    assert [each.data_ptr() for each in held] == [each.data_ptr() for each in placed]
    assert held[1].data_ptr() - held[0].data_ptr() == -(-held[0].nbytes // 64) * 64
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in held)
    assert_identical(again(x), expected)
    if file.exists() and not way.startswith("torchq"):  # and a file that was mapped has not changed
        saved = torch.load(file, weights_only=False)
        fresh = torchq.apply_plan(model, torchq.plan_of(qmodel))
        saved = saved if isinstance(saved, dict) else saved.state_dict()
        fresh.load_state_dict(saved)
        assert_identical(fresh(x), expected)


def test_so_does_what_from_pretrained_loads(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from torchq.hf import TorchqConfig

    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=1, num_attention_heads=4, intermediate_size=512, vocab_size=50
    )
    transformers.BertModel(config).eval().save_pretrained(tmp_path / "float")
    model = transformers.BertModel.from_pretrained(tmp_path / "float", quantization_config=TorchqConfig())
    model.save_pretrained(tmp_path / "int8")
    ids = torch.arange(8).view(1, 8)
    expected, placed = model(ids)[0], []
    monkeypatch.setattr(packed_weights, "in_huge_pages", lambda packed: placed.append(packed.nbytes) or packed)

    again = transformers.BertModel.from_pretrained(tmp_path / "int8")

    held = [module.packed.nbytes for module in again.modules() if type(module) is torchq.QuantizedLinear]
    assert held
    assert sorted(placed) == sorted(held)
    assert_identical(again(ids)[0], expected)


def test_small_ones_stay():
    small = torch.zeros((128 << 10) - 1, dtype=torch.uint8)
    assert in_huge_pages(small) is small
    meta = torch.zeros(MIB, dtype=torch.uint8, device="meta")
    assert in_huge_pages(meta) is meta


def test_where_nothing_more_can_be_mapped_weights_stay(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    qmodel, x = torchq.convert(linear_model()), normal(8, 512, seed=0)
    monkeypatch.setattr(mmap, "mmap", refuse)
    weight = torch.zeros(MIB, dtype=torch.uint8)
    assert in_huge_pages(weight) is weight
    assert_identical(copy.deepcopy(qmodel)(x), qmodel(x))


def test_memory_begins_at_a_huge_page_and_is_filled_without_overlaps():
    sizes = [3 * MIB + 7, 128 << 10, 40 * MIB, 20 * MIB, 12 * MIB + 1, 5 * MIB]
    weights = [torch.full((size,), i + 1, dtype=torch.uint8) for i, size in enumerate(sizes)]
    placed = [in_huge_pages(each) for each in weights]
    for each, weight in zip(placed, weights, strict=True):
        assert_identical(each, weight)
        assert each.data_ptr() != weight.data_ptr()
        assert each.data_ptr() % 64 == 0
    begins = [each.data_ptr() % (2 * MIB) == 0 for each in placed]
    assert begins == [True, False, True, False, True, False]  # the third has its own, the fifth found no room


def test_memory_is_free_with_its_last_weight():
    weights = [in_huge_pages(torch.ones(MIB, dtype=torch.uint8)) for _ in range(2)]
    memory = huge_pages._chunk.memory
    del weights[0]
    gc.collect()
    assert memory() is not None
    assert bool((weights[0] == 1).all())
    weights.clear()
    gc.collect()
    assert memory() is None
    assert bool((in_huge_pages(torch.ones(MIB, dtype=torch.uint8)) == 1).all())


def test_weights_move_to_shared_memory_alone():
    qmodel = torchq.convert(linear_model())
    again = copy.deepcopy(qmodel)
    x = normal(4, 512, seed=1)
    expected = again(x)
    others = again[2].packed.clone()
    again[0].share_memory()
    assert again[0].packed.is_shared()
    assert not again[2].packed.is_shared()
    assert_identical(again[2].packed, others)
    assert_identical(again(x), expected)


def test_saving_a_loaded_model_writes_no_more():
    qmodel = torchq.convert(linear_model())
    files = [io.BytesIO() for _ in range(2)]
    for file, model in zip(files, (qmodel, copy.deepcopy(qmodel)), strict=True):
        torch.save({"model": model, "packed": model[0].packed}, file)
    assert files[0].tell() == files[1].tell()
