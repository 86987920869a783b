"""save() and load(): a converted model as one safetensors file, the same on every CPU.

The file holds the model's tensors in their canonical form, as its state_dict() does, and beside them the buffers that a
state_dict leaves out, since a model built on the meta device lacks their values. Its metadata has the plan, the names
of tensors that are one, and a checksum of each tensor. All of it is JSON; nothing in the file is run.
"""

import contextlib
import ctypes
import inspect
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchq.errors import BadTypeError, BadValueError, door
from torchq.modules.base import Int8Module
from torchq.modules.computed_weights import is_computed
from torchq.modules.packed_weights import DERIVED, PackedWeights
from torchq.modules.sparse import LAYOUTS, made_of, parts_of
from torchq.planning.plan import attached_plan
from torchq.planning.skeleton import complete_plan, from_stored, skeleton, to_stored
from torchq.scopes import outside_inference_mode

M = TypeVar("M", bound=nn.Module)

VERSION = 1
"""Of the format. A file of a later one is refused."""


@door("torchq.save")
def save(qmodel: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a converted model to one file, which `load` reads on any CPU.

    The file appears under its name when it is complete: until then, whatever happens, an older one of this name stays.

    Args:
        qmodel: what `torchq.convert`, `apply_plan` or `load` returned.
        path: usually ends in .safetensors.

    Raises:
        ValueError: `qmodel` is not a converted model, or has a tensor that safetensors can't hold.
        OSError: the file can't be written.

    >>> import tempfile
    >>> from torchq import convert
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> path, qmodel = f"{tempfile.mkdtemp()}/m.safetensors", convert(model)
    >>> save(qmodel, path)
    >>> x = torch.randn(2, 64)
    >>> torch.equal(load(path, model)(x), qmodel(x))
    True
    """
    plan = attached_plan(qmodel)
    found, shared = _named_once(qmodel)
    sparse = {key: parts for key, tensor in found.items() if (parts := _parts(key, tensor))}
    whole = {key: tensor for key, tensor in found.items() if key not in sparse}
    held = {**whole, **{f"{key}.{name}": part for key, parts in sparse.items() for name, part in parts.items()}}
    tensors = {key: _plain(key, tensor) for key, tensor in held.items()}
    about = {
        "plan": to_stored(plan),
        "shared": shared,
        "sparse": {key: _kind_of_sparse(found[key]) for key in sparse},
        "buffers": [key for key, _ in _lost_buffers(qmodel)],
        "dtypes": {name: str(part.dtype) for name, part in _packed(qmodel)},
        "training": qmodel.training,
        "checksums": {key: _checksum(key, tensor) for key, tensor in tensors.items()},
    }
    text = json.dumps(about, separators=(",", ":"), allow_nan=False)
    if os.path.exists(path) and not os.path.isfile(path):  # what took the place of /dev/null would be everybody's
        raise OSError(f"torchq.save: {os.fspath(path)} is no regular file, which a new one could replace.")
    with _replacing(os.path.realpath(path)) as temporary:  # one key: several would come in any order
        try:
            save_file(tensors, temporary, {"torchq": f"{VERSION} {_of_text(text)} {text}"})
        except SafetensorError as error:
            raise OSError(f"torchq.save: {os.fspath(path)} can't be written: {error}") from error


@door("torchq.load")
def load(path: str | os.PathLike[str], model: M) -> M:
    """Reads a file of `save`: the converted model, bit for bit, without calibration.

    Float tensors are mapped into memory, so they are read when they are used. The codes of int8 layers are packed for
    this CPU.

    Args:
        path: the file.
        model: the float model that was converted, with any weights, also on the meta device: `with
            torch.device("meta"): model = Net()`. It is left as it is. Shapes and dtypes must be the saved ones.

    Returns:
        A converted model of the class of `model`, in training or eval mode as the saved one was.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of a later version or not torchq's, or does not fit the model. The message
            names the tensor and the reason.
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise BadTypeError(f"model must be an nn.Module, the float model, got {type(model).__name__}.")
    converted = next((name for name, module in model.named_modules() if isinstance(module, Int8Module)), None)
    if converted is not None:
        raise BadValueError(f"the model is converted already ({converted!r} is in int8). Pass the float model.")
    path = os.fspath(path)
    with outside_inference_mode():
        tensors, about = _read(path)
        try:
            loaded = skeleton(model, from_stored(about["plan"]))
        except Exception as wrong:  # the plan may say anything
            raise BadValueError(f"{path} does not fit this {type(model).__name__}: {wrong}") from wrong
        _fill(path, loaded, tensors, about)
        complete_plan(loaded)
    return loaded.train(about["training"])


# ---- What a file holds ----------------------------------------------------------------------------------------------


def _named_once(qmodel: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a model, each once, and the other names of those that have several, with the first one."""
    first: dict[object, str] = {}
    tensors: dict[str, Tensor] = {}
    shared = {}
    prefixes = {f"{name}.": id(part) for name, part in _packed(qmodel)}
    for key, tensor in [*qmodel.state_dict(keep_vars=True).items(), *_lost_buffers(qmodel)]:
        prefix, _, own = key.rpartition(".")
        layer = prefixes.get(f"{prefix}.")
        same = first.setdefault(id(tensor) if layer is None else (layer, own), key)
        tensors[key] = tensor  # kept alive, so that an id means one tensor
        if same != key:
            shared[key] = same
    return {key: tensor for key, tensor in tensors.items() if key not in shared}, shared


def _packed(model: nn.Module) -> Iterator[tuple[str, PackedWeights]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedWeights):
            yield name, module


def _lost_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that are in no state_dict, such as the frequencies of rotary position embeddings."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in sorted(module._non_persistent_buffers_set):
            tensor = module._buffers.get(name)
            if tensor is not None and not (isinstance(module, PackedWeights) and name in DERIVED):
                yield f"{prefix}.{name}" if prefix else name, tensor


def _parts(key: str, tensor: Any) -> dict[str, Tensor]:
    """What a sparse tensor consists of, each part on its own; nothing of a dense one."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return {}
    return {name: part.clone() for name, part in parts_of(tensor).items()}


def _kind_of_sparse(tensor: Tensor) -> dict[str, Any]:
    """What its parts do not say."""
    coalesced = tensor.layout == torch.sparse_coo and tensor.is_coalesced()
    return {"layout": str(tensor.layout), "size": list(tensor.shape), "coalesced": coalesced}


def _plain(key: str, tensor: Any) -> Tensor:
    """The tensor as a file can hold it."""
    if not isinstance(tensor, Tensor):
        raise BadValueError(f"{key} is a {type(tensor).__name__}, and a file holds tensors only.")
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__} of layout {tensor.layout}"
        raise BadValueError(f"{key} is {kind}, which a file can't hold.")
    return tensor.detach().cpu().contiguous()


def _checksum(key: str, tensor: Tensor) -> int:
    """Of a tensor's bytes, with its name, dtype and shape."""
    start = _of_bytes(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
    if not tensor.nbytes:
        return start
    return zlib.crc32((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()), start)


def _of_bytes(data: bytes) -> int:
    return zlib.crc32(data)


def _of_text(text: str) -> str:
    return f"{_of_bytes(text.encode()):08x}"


# ---- Writing and reading ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[str]:
    """The name of a new file beside `path`. It takes the place of `path` in one step, once it is on the disk."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync(folder)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, mapped into memory, and what its metadata says; all of it is checked against checksums."""
    if os.path.isdir(path):
        raise BadValueError(f"{path} is a folder. {_OF_A_FOLDER}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = _about(path, file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 it is no dict
    except SafetensorError as error:
        raise BadValueError(f"{path} is damaged, or no safetensors file: {error}.") from error
    expected = about["checksums"]
    odd = sorted(expected.keys() ^ tensors.keys())
    if odd:
        raise BadValueError(f"{path} is damaged: {odd[0]} is {'missing' if odd[0] in expected else 'unexpected'}.")
    for key, tensor in tensors.items():
        if _checksum(key, tensor) != expected[key]:
            raise BadValueError(f"{path} is damaged: the values of {key} are not those that were saved.")
    for key, kind in about["sparse"].items():
        tensors[key] = _made_sparse(path, key, kind, tensors)
    for key, first in about["shared"].items():
        if first not in tensors:
            raise BadValueError(f"{path} is damaged: {key} is said to be {first!r}, which is missing.")
        tensors[key] = tensors[first]
    return tensors, about


def _made_sparse(path: str, key: str, kind: Mapping[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """The sparse tensor whose parts are taken out of `tensors`."""
    try:
        parts = {name.removeprefix(f"{key}."): tensors[name] for name in tensors if name.rpartition(".")[0] == key}
        made = made_of(parts, LAYOUTS[kind["layout"]], kind["size"], coalesced=kind["coalesced"])
    except (KeyError, TypeError, ValueError, RuntimeError) as wrong:
        raise BadValueError(f"{path} is damaged: {key} is no sparse tensor ({wrong}).") from wrong
    for name in parts:
        del tensors[f"{key}.{name}"]
    return made


def _about(path: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `save` wrote down: "version checksum JSON"."""
    if "torchq" not in metadata:
        raise BadValueError(f"{path} is no file of torchq.save: its metadata lacks 'torchq'. {_OF_A_FOLDER}")
    version, checksum, text = (*metadata["torchq"].split(" ", 2), "", "")[:3]
    if version != str(VERSION):
        raise BadValueError(
            f"{path} has format {version!r}, and this torchq reads {VERSION}. Update torchq, or save the model again."
        )
    if checksum != _of_text(text):
        raise BadValueError(f"{path} is damaged: its metadata is not what was saved.")
    try:
        about = {"sparse": {}, **json.loads(text)}  # earlier versions had none
        wrong = [key for key, kind in _KINDS.items() if not isinstance(about[key], kind)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadValueError(f"{path} is damaged: its metadata can't be read ({reason}).") from error
    if wrong:
        raise BadValueError(f"{path} is damaged: {wrong[0]} in its metadata is no {_KINDS[wrong[0]].__name__}.")
    return about


_OF_A_FOLDER = "What save_pretrained wrote is loaded by from_pretrained, after `import torchq.hf`."
_KINDS: dict[str, type] = {
    "plan": dict,
    "shared": dict,
    "sparse": dict,
    "buffers": list,
    "dtypes": dict,
    "training": bool,
    "checksums": dict,
}


# ---- Filling ---------------------------------------------------------------------------------------------------------


def _fill(path: str, loaded: nn.Module, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> None:
    """Gives a skeleton its tensors, after all of them were checked."""
    lost = {key: tensors.pop(key, None) for key in about["buffers"]}
    _make_sparse(loaded, lost, tensors)
    problems = [*_other_dtypes(loaded, tensors, about["dtypes"]), *_other_layouts(loaded, tensors)]
    problems += _other_buffers(loaded, lost)
    if problems:
        raise BadValueError(_does_not_fit(path, loaded, problems))
    own = inspect.signature(type(loaded).load_state_dict).parameters
    follows = "assign" in own or any(each.kind is each.VAR_KEYWORD for each in own.values())
    try:  # one of the model's own may be older than `assign`
        (type(loaded) if follows else nn.Module).load_state_dict(loaded, tensors, assign=True)
    except RuntimeError as error:
        raise BadValueError(_does_not_fit(path, loaded, [str(error)])) from error
    for key, tensor in lost.items():
        module, name = _owner(loaded, key)
        module._buffers[name] = tensor
    for key, first in about["shared"].items():
        _tie(_owner(loaded, key), _owner(loaded, first))
    empty = list(_without_values(loaded))
    if empty:
        raise BadValueError(
            f"{path} has no values for {empty[0]}, a tensor on the meta device. Build the model on the CPU."
        )


def _make_sparse(loaded: nn.Module, *held: dict[str, Any]) -> None:
    """Makes sparse buffers of dense tensors: earlier versions wrote them so."""
    for key in (key for key, buffer in loaded.named_buffers(remove_duplicate=False) if buffer.is_sparse):
        for tensors in held:
            if (dense := tensors.get(key)) is not None and dense.layout == torch.strided:
                tensors[key] = dense.to_sparse()


def _does_not_fit(path: str, model: nn.Module, problems: list[str]) -> str:
    return f"{path} does not fit this {type(model).__name__}:\n\t" + "\n\t".join(problems)


def _owner(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), name


def _other_dtypes(model: nn.Module, tensors: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> list[str]:
    """What the file has in another dtype than the model."""
    own: dict[str, tuple[str, str]] = {}
    for name, part in _packed(model):
        own[name] = (str(part.dtype), dtypes.get(name, "no int8 layer"))
    for key, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        path = key.rpartition(".")[0]
        if key in tensors and path not in own:
            own[key] = (str(tensor.dtype), str(tensors[key].dtype))
    return [
        f"{key}: {has} in the file, {wants} in the model. Build the float model in the saved dtype, by model.to(dtype)."
        for key, (wants, has) in own.items()
        if wants != has
    ]


def _other_layouts(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """What is sparse in the file and not in the model, or the other way round, or sparse in another way."""
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [
        f"{key}: {tensors[key].layout} in the file, {tensor.layout} in the model."
        for key, tensor in own
        if key in tensors and tensors[key].layout != tensor.layout
    ]


def _other_buffers(model: nn.Module, buffers: Mapping[str, Tensor | None]) -> list[str]:
    known = {key for key, _ in _lost_buffers(model)}
    missing = [f"{key}: the buffer is missing in the file." for key in known - buffers.keys()]
    return missing + [
        f"{key}: the model has no such buffer." if key not in known else f"{key}: the buffer is missing in the file."
        for key, tensor in buffers.items()
        if key not in known or tensor is None
    ]


def _tie(other: tuple[nn.Module, str], first: tuple[nn.Module, str]) -> None:
    """Makes two names of the model name one parameter or buffer."""
    for kind in ("_parameters", "_buffers"):
        owners = [getattr(module, kind) for module, _ in (other, first)]
        if all(name in owner for owner, (_, name) in zip(owners, (other, first), strict=True)):
            owners[0][other[1]] = owners[1][first[1]]


def _without_values(model: nn.Module) -> Iterator[str]:
    """The tensors of a model that are on the meta device still, plain attributes too."""
    for path, module in model.named_modules():
        held = {**vars(module), **module._buffers, **dict(module._parameters.items())}
        computed = {"weight"} if is_computed(module) else set()
        for name, value in held.items():
            if isinstance(value, Tensor) and value.is_meta and name not in computed:
                yield f"{path}.{name}" if path else name
