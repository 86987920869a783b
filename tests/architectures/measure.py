"""What of a model's weights became int8, what is said of the rest, and what the whole would take at its real size."""

import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchq import QConfig, convert, ops, report, sqnr_db
from torchq.modules.base import Int8Module, model_bytes, own_tensors
from torchq.modules.registry import find_layers
from torchq.ops.lookup import residual_width
from torchq.planning.tables import find_tables, have_residuals

from .models import Architecture, made

_PRODUCTS = (
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "convolution", "_trilinear", "_grouped_mm"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer", "_native_multi_head_attention"),
    "_transformer_encoder_layer_fwd",
)


class Multiplied(TorchDispatchMode):
    """Finds the parameters of a model that its run multiplies an input by, also as views and copies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._of: dict[int, set[str]] = {}
        self._kept: list[Tensor] = []  # so that no storage's address is used again
        self.found: set[str] = set()
        for name, parameter in model.named_parameters():
            self._of[_key(parameter)] = {name}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, and notes whose weights it takes."""
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sources = [self._of.get(_key(tensor), set()) for tensor in given]
        is_product = func._schema.name.removeprefix("aten::") in _PRODUCTS
        if given and all(sources) and not is_product:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._kept.append(tensor)
                    self._of.setdefault(_key(tensor), set()).update(*sources)
        elif is_product and not all(sources):
            self.found.update(*sources)
        return result


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Row(NamedTuple):
    """What is measured of one architecture.

    Args:
        int8: the share of the bytes of multiplied weights that is int8.
        named: the share that is int8, or named in the plan or the report with a reason.
        left: the multiplied parameters in float, by the class of their module.
        resident: bytes of the whole model at its real size, as a share of float's.
        db: SQNR of the output without data and calibrated: the median of the JUDGES. Routers choose as in float.
        free: the same where routers choose by themselves: the median of MANY batches, since a few rows decide.
    """

    int8: float
    named: float
    left: tuple[str, ...]
    resident: float
    db: tuple[float, float]
    free: tuple[float, float]


BATCHES = 4  # of 4, so that a layer behind a pooling sees 16 rows


JUDGES = range(95, 100)
"""The seeds of the batches that are measured. One alone says little of a model whose layers amplify errors: of gated T5
without data these five have 16 to 21 dB."""

MANY = range(95, 125)
"""The seeds where routers choose by themselves."""


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The model's main output."""
    y = model(**inputs)
    if isinstance(y, Tensor):
        return y
    for name in ("logits", "last_hidden_state", "image_embeds"):
        if name in y:
            return y[name]  # type: ignore[no-any-return]
    raise AssertionError(f"no output among {list(y)}")


QUICK = QConfig(observer="minmax", rounding="nearest", smoothing="none", attention="float32")
"""What takes a tenth of the time of all that `convert` tries by default."""


def both(
    architecture: Architecture, config: QConfig, without_data: QConfig | None = None
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The float model, converted without data by one config, and calibrated by the other."""
    model = made(architecture)
    batches = [architecture.inputs(seed) for seed in range(BATCHES)]
    return model, convert(model, config=without_data), convert(model, batches, config=config, progress=False)


def measure(architecture: Architecture, models: tuple[nn.Module, nn.Module, nn.Module]) -> Row:
    """The row of an architecture, from what `both` gave."""
    model, plain, _ = models
    batches = [architecture.inputs(seed) for seed in JUDGES]
    with torch.no_grad(), Multiplied(model) as products:
        run(model, batches[0])
    judged = [_outputs(models, batch) for batch in batches]
    db = free = _medians(judged)
    if any(_routers(model)):
        free = _medians([[run(each, architecture.inputs(seed)) for each in models] for seed in MANY])
    sizes = {name: p.nbytes for name, p in model.named_parameters() if name in products.found and p.dim() >= 2}
    names: dict[str, list[str]] = {}  # of tied parameters, all names
    first = {id(p): name for name, p in model.named_parameters()}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(first[id(p)], []).append(name)
    total = sum(sizes.values())
    int8 = {name for name in sizes if any(_is_int8(plain, each) for each in names[name])}
    named = {name for name in sizes if name in int8 or any(_reason(plain, each) for each in names[name])}
    left = {type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in sizes.keys() - int8}
    with torch.device("meta"):
        real = architecture.real()
    shares = [sum(sizes[name] for name in group) / total for group in (int8, named)]
    return Row(*shares, tuple(sorted(left)), resident(real, plain) / model_bytes(real), db, free)


def _medians(judged: Sequence[Sequence[Tensor]]) -> tuple[float, float]:
    plain, calibrated = (statistics.median(sqnr_db(ys[0], ys[i]) for ys in judged) for i in (1, 2))
    return plain, calibrated


def _outputs(models: tuple[nn.Module, ...], batch: Mapping[str, Any]) -> list[Tensor]:
    """What each model gives, the later ones with the first one's choices of experts.

    A row whose experts are chosen otherwise is another row. So this is what int8 costs besides.
    """
    chosen: list[Any] = []
    with _hooked(models[0], lambda module, args, y: chosen.append(y)):
        outputs = [run(models[0], batch)]
    for model in models[1:]:
        known = iter(chosen)
        with _hooked(model, lambda module, args, y, known=known: next(known)):
            outputs.append(run(model, batch))
    return outputs


@contextmanager
def _hooked(model: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Calls `hook` behind each router of the model, which stay in float."""
    with ExitStack() as stack:
        for router in _routers(model):
            stack.enter_context(router.register_forward_hook(hook))
        yield


def _routers(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if type(module).__name__.endswith("TopKRouter"))


def _is_int8(qmodel: nn.Module, name: str) -> bool:
    """Whether the parameter of this name went into an int8 module."""
    return any(isinstance(module, Int8Module) for module in _owners(qmodel, name)) and all(
        layer.is_int8 for path, layer in qmodel.torchq_plan.layers.items() if path == name.rpartition(".")[0]
    )


def _owners(qmodel: nn.Module, name: str) -> Iterator[nn.Module]:
    """The module that holds a parameter, and all around it, as far as they are still there."""
    module: Any = qmodel
    for child in name.split(".")[:-1]:
        yield module
        module = getattr(module, child, None)
        if module is None:
            return
    yield module


def _reason(qmodel: nn.Module, name: str) -> str | None:
    """What the plan or the report says of a parameter that stayed in float."""
    planned = qmodel.torchq_plan.layers.get(name.rpartition(".")[0])
    if planned is not None:
        return planned.reason  # type: ignore[no-any-return]
    left = report(qmodel).model.left  # type: ignore[union-attr]
    return next((each.advice for each in left if name in each.matrices), None)


def resident(real: nn.Module, converted: nn.Module) -> float:
    """The bytes of a model at its real size, which may be on the meta device, if what is int8 in `converted` is in it.

    Layers in a row are the same layer: only the numbers in their names differ.
    """
    int8 = {_pattern(path) for path, module in converted.named_modules() if isinstance(module, Int8Module)}
    layers = {id(layer.module) for layer in find_layers(real).values() if _pattern(layer.path) in int8}
    taken = sum(
        ops.packed_bytes(layer.out_features, layer.in_features)
        for layer in find_layers(real).values()
        if id(layer.module) in layers
    )
    tables = find_tables(real, find_layers(real))
    if have_residuals(real, tables, QConfig()):
        fine = [module for path, module in tables.items() if _pattern(path) in int8]
        taken += sum(
            n * residual_width(k) for n, k in {id(module.weight): module.weight.shape for module in fine}.values()
        )
    paths = {id(module): path for path, module in real.named_modules()}
    held = {id(p) for module in real.modules() if id(module) in layers for p in module._parameters.values()}
    for module, tensor in own_tensors(real):
        if id(tensor) in held:  # by a layer, which an embedding may share it with
            continue
        in_int8 = _pattern(paths[id(module)]) in int8 and tensor.dim() >= 2
        taken += tensor.numel() + 4 * tensor.shape[:-1].numel() if in_int8 else tensor.nbytes
    return taken


def _pattern(path: str) -> str:
    return re.sub(r"\b\d+\b", "*", path)
