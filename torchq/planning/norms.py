"""Which norms become a part of the convolution before them: that is decided first, for it changes the weights."""

import dataclasses
from collections import Counter

from torchq.calibration.calibrate import Evidence
from torchq.modules.norms import factors, is_foldable


def include_norms(evidence: Evidence) -> Evidence:
    """The evidence with layers that include the norm behind them, and the names of these norms.

    Runs, or code (`by_code.py`), have shown that the norm alone reads what the convolution gives, and reads nothing
    else. Both must have one place in the model, for whoever calls one of them would not get what the float model gives.
    """
    found = evidence.norms if evidence.config.fuse else {}
    places = Counter(id(child) for module in evidence.model.modules() for child in module._modules.values())
    norms, layers = {}, dict(evidence.layers)
    for name, norm_name in found.items():
        layer, norm = layers[name], evidence.model.get_submodule(norm_name)
        trained = layer.trained
        rank = layer.kind.weight(layer.module, layer.part).dim()  # as that of its input
        if places[id(norm)] != 1 or places[id(layer.module)] != 1 or not is_foldable(norm, rank):
            continue
        if not all(bool(each.isfinite().all()) for each in factors(norm)):
            continue
        if trained is not None and not trained.per_channel:  # one scale for all would not be that of the training
            continue
        layers[name], norms[name] = dataclasses.replace(layer, norm=norm), norm_name
    return dataclasses.replace(evidence, layers=layers, norms=norms)
