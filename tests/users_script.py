"""What a user writes, for mypy: strict, like all that `make lint` checks. It is not run.

convert, prepare_qat and apply_plan return the type they are given, so mypy finds a wrong use of it. If it did not find
the one here, it would report that there is nothing to ignore.
"""

import torch
from torch import Tensor, nn

import torchq


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y

    def embed(self, x: Tensor) -> Tensor:
        return self.forward(x)


data = [torch.randn(4, 8)]
model: Net = torchq.prepare_qat(Net(), data)
qmodel: Net = torchq.convert(model, data, config=torchq.QConfig(activation="dynamic"))
qmodel.embed(data[0])
qmodel.embeds(data[0])  # type: ignore[operator]
again: Net = torchq.apply_plan(Net(), torchq.plan_of(qmodel))
plan: torchq.Plan = torchq.Plan.from_dict(torchq.plan_of(qmodel).to_dict())
db: float = torchq.sqnr_db(data[0], again.embed(data[0]))
with torchq.simulate(), torchq.kernels.use("reference"):
    print(torchq.report(qmodel), db, plan)
with torchq.watch_drift(qmodel) as drift:
    print(drift.recalibrate)
ok: bool = torchq.verify(qmodel, data[0]).ok
