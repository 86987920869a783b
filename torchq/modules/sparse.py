"""Sparse tensors of a model, in any layout: the dense tensors that they consist of, and copies.

torch neither copies those of most layouts nor says how many bytes they take.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_BY_ROWS = ("crow_indices", "col_indices", "values")
_BY_COLUMNS = ("ccol_indices", "row_indices", "values")
_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _BY_ROWS,
    torch.sparse_bsr: _BY_ROWS,
    torch.sparse_csc: _BY_COLUMNS,
    torch.sparse_bsc: _BY_COLUMNS,
}
"""The methods that give them, by layout."""

LAYOUTS = {str(layout): layout for layout in _PARTS}


def parts_of(tensor: Tensor) -> dict[str, Tensor]:
    """The indices and values of a sparse tensor, as they are; nothing of a dense one.

    >>> sorted(parts_of(torch.eye(2).to_sparse())), parts_of(torch.eye(2))
    (['indices', 'values'], {})
    """
    return {name.strip("_"): getattr(tensor.detach(), name)() for name in _PARTS.get(tensor.layout, ())}


def made_of(parts: Mapping[str, Tensor], layout: torch.layout, size: list[int], *, coalesced: bool) -> Tensor:
    """The sparse tensor that these are the parts of; `coalesced` only means something to the COO layout.

    Raises:
        RuntimeError: they are the parts of no such tensor.

    >>> i, v = torch.tensor([[1, 1]]), torch.tensor([2.0, 3.0])
    >>> made_of({"indices": i, "values": v}, torch.sparse_coo, [3], coalesced=False).to_dense()
    tensor([0., 5., 0.])
    """
    *indices, values = (parts[name.strip("_")] for name in _PARTS[layout])
    if layout == torch.sparse_coo:
        return torch.sparse_coo_tensor(indices[0], values, size, is_coalesced=coalesced, check_invariants=True)
    rows, columns = indices
    return torch.sparse_compressed_tensor(rows, columns, values, size, layout=layout, check_invariants=True)


def sparse_copies(model: nn.Module) -> dict[int, Tensor]:
    """A memo for deepcopy, which refuses most sparse tensors: those that the modules hold."""
    held = [each for m in model.modules() for kind in (vars(m), m._buffers, m._parameters) for each in kind.values()]
    return {id(each): _copy(each) for each in held if isinstance(each, Tensor) and each.layout in _PARTS}


def _copy(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copied, tensor.requires_grad)
    return copied.requires_grad_(tensor.requires_grad)
