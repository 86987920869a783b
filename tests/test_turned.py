"""Convolutions whose output is turned, so that its channels lie last, give it so at once. Nobody sees it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from helpers.compare import assert_identical
from helpers.convolutional import by_itself
from helpers.numbers import normal
from torchq import Plan, QConfig, apply_plan, convert, plan_of
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

DYNAMIC = QConfig(activation="dynamic", rounding="nearest", smoothing="none")
DATA = [normal(2, 16, 120, seed=i) for i in range(4)]
X = normal(2, 16, 120, seed=9)
IMAGES = [normal(2, 16, 12, 10, seed=i) for i in range(4)]


class Encoder(nn.Module):
    """Two convolutions, then rows for each place, as in Whisper's encoder; and what else may read these."""

    ask = ""

    def __init__(self, kind=nn.Conv1d, order=(0, 2, 1)):
        super().__init__()
        self.one, self.two, self.order = kind(16, 64, 3, padding=1), kind(64, 64, 3, padding=1), order
        self.three, self.behind = kind(64, 16, 3), nn.Linear(64, 32)

    def forward(self, x):
        y = relu(self.two(relu(self.one(x))))
        if self.ask == "before":
            self.seen = y * 2
        rows = y.transpose(1, 2) if self.order is None else y.permute(self.order)
        self.strides = rows.stride()
        if self.ask == "view":
            self.seen = y.view(len(y), -1) + 0
        elif self.ask == "sum":
            self.seen = y + 1
        elif self.ask == "write":
            rows.mul_(2.0)
            self.seen = y.clone()
        elif self.ask == "write to it":
            y.mul_(2.0)
        elif self.ask == "strides":
            self.seen = torch.as_strided(y, (len(y), 64), (64 * 120, 120), 5) + 0
        elif self.ask == "random":
            torch.manual_seed(0)
            self.seen = torch.rand_like(y)
        elif self.ask == "product":
            self.seen = y @ torch.ones(120, 3)
        elif self.ask == "group norm":
            self.seen = nn.functional.group_norm(y, 4)
        elif self.ask == "views":
            view = y.view(len(y), -1)
            rows.mul_(2.0)
            view[0].add_(1.0)
            y.split(32, 1)[1][0].view(-1)[:100].zero_()
            torch.add(view, view, out=view)
            self.seen = view * 1 + rows.mT.flatten(1)
        elif self.ask == "return a view":
            return y.view(len(y), -1), self.behind(rows)
        elif self.ask == "return":
            return rows, self.behind(rows)
        elif self.ask == "convolution":
            return self.behind(rows), self.three(y)
        return self.behind(rows)


def converted(model, data=DATA):
    with torch.no_grad():
        return convert(model.eval(), data, config=DYNAMIC, progress=False)


def parts(y):
    return y if isinstance(y, tuple) else (y,)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("kind", "order", "data"),
    [(nn.Conv1d, (0, 2, 1), DATA), (nn.Conv1d, None, DATA), (nn.Conv2d, (0, 2, 3, -3), IMAGES)],
)
def test_rows_lie_as_they_are_computed(kind, order, data, mode):
    model = Encoder(kind, order)
    qmodel = converted(model, data)
    plans = qmodel.torchq_plan.layers
    assert (plans["one"].hands, plans["one"].turned) == (("two",), False)
    assert (plans["two"].hands, plans["two"].turned) == ((), True)
    x, twin = data[0], by_itself(qmodel)
    with mode():
        assert_identical(qmodel(x), twin(x))
        assert qmodel.strides == normal(2, *x.shape[2:], 64).stride()
        assert twin.strides != qmodel.strides
        assert sqnr_db(model(x), qmodel(x)) > 30


@pytest.mark.parametrize(
    "ask",
    [
        *("before", "view", "sum", "write", "write to it", "strides", "random", "product", "group norm", "views"),
        *("return a view", "return", "convolution"),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_other_readers_see_torchs_format(ask, mode):
    """Those that calibration has `seen`, and others."""
    model = Encoder()
    for seen in (True, False):
        model.ask = ask if seen else ""
        qmodel = converted(model)
        qmodel.ask = ask
        twin = by_itself(qmodel)
        assert qmodel.torchq_plan.layers["two"].turned == (not seen or ask in ("before", "convolution"))
        with mode():
            for one, other in zip(parts(qmodel(X)), parts(twin(X)), strict=True):
                assert type(one) is torch.Tensor
                assert_identical(one, other)
                assert not seen or one.stride() == other.stride()
            if hasattr(twin, "seen"):
                assert_identical(qmodel.seen + 0, twin.seen + 0)


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Sequential(nn.Conv1d(16, 64, 3, padding=1), nn.Conv1d(64, 64, 3))

    def forward(self, x):
        return self.rows(x)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.behind = Stem(), nn.Linear(64, 32)

    def forward(self, x):
        return self.behind(self.stem(x).transpose(1, 2))


def test_what_is_turned_outside_of_the_module_is_torchs():
    qmodel = converted(Whole())
    assert not any(layer.turned for layer in qmodel.torchq_plan.layers.values())
    assert_identical(qmodel(X), by_itself(qmodel)(X))


def test_a_sequential_is_no_owner():
    qmodel = converted(Inside())
    assert qmodel.torchq_plan.layers["rows.1"].turned
    assert_identical(qmodel(X), by_itself(qmodel)(X))


class Inside(Stem):
    def __init__(self):
        super().__init__()
        self.behind = nn.Linear(64, 32)

    def forward(self, x):
        return self.behind(self.rows(x).transpose(1, 2))


class Derived(nn.Module):
    """What comes of the rows is read by its strides, which in torch are those of the convolution."""

    def __init__(self, read, kind=nn.Conv1d):
        super().__init__()
        self.one, self.two, self.three = (kind(n, 64, 3, padding=1) for n in (16, 64, 64))
        self.read = read

    def forward(self, x):
        return self.read(self, relu(self.two(relu(self.one(x)))))


@pytest.mark.parametrize(
    "read",
    [
        lambda model, y: (y.mT + 1).mT.view(len(y), -1),
        lambda model, y: ((y.mT + 1).mT[:, :, :10] * 2).view(len(y), -1),
        lambda model, y: (y.mT + 1).mT[:, :, :10].view(len(y) * 64, 10),
        lambda model, y: (y.mT + 1).as_strided((2, 120, 64), (120 * 64, 1, 120)),
        lambda model, y: y.mT + torch.rand_like(y.mT),
        lambda model, y: nn.functional.dropout(y.mT * 2, 0.5, training=True),
    ],
)
def test_what_is_read_by_torchs_strides_has_them(read):
    model = Derived(read)
    qmodel = converted(model)
    assert not qmodel.torchq_plan.layers["two"].turned
    results = []
    for each in (qmodel, by_itself(qmodel)):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(each(X))
    assert_identical(*results)


@pytest.mark.parametrize(
    "read",
    [
        lambda model, y: model.three((y.permute(0, 2, 3, 1) * 2).permute(0, 3, 1, 2)).view(len(y), -1),
        lambda model, y: model.three(y.permute(0, 2, 3, 1).permute(0, 3, 1, 2)).view(len(y), -1),
    ],
)
def test_an_image_turned_back_has_torchs_format(read):
    """A convolution gives its output in the format of its input."""
    qmodel = converted(Derived(read, nn.Conv2d), IMAGES)
    assert not qmodel.torchq_plan.layers["two"].turned
    with torch.no_grad():
        assert_identical(qmodel(IMAGES[0]), by_itself(qmodel)(IMAGES[0]))


def test_what_outlives_its_call_has_torchs_views():
    model = Derived(lambda model, y: (model.kept.append(y), nn.functional.layer_norm(y.mT, (64,)))[1])
    model.kept = []
    qmodel = converted(model)
    qmodel.kept.clear()
    assert qmodel.torchq_plan.layers["two"].turned
    twin = by_itself(qmodel)
    with torch.no_grad():
        assert_identical(qmodel(X), twin(X))
    view = qmodel.kept[0].view(2, -1)
    assert type(view) is torch.Tensor
    view.mul_(2.0)
    assert_identical(qmodel.kept[0] + 0, twin.kept[0] * 2)


def written(source, copy):
    copy.mul_(2.0)
    return copy


def first_written(source, copy):
    source.mul_(2.0)
    return source


@pytest.mark.parametrize("write", [written, first_written])
@pytest.mark.parametrize(
    "copied",
    [lambda rows: rows.contiguous(), lambda rows: rows.reshape(-1, 64), lambda rows: rows[:, :9].contiguous()],
)
@pytest.mark.parametrize("derived", [0, 1])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_rows_and_their_copy_are_two(write, copied, derived, alone, mode):
    """In torch, where rows behind a convolution are not contiguous. Which of them is read behind the write?"""

    def read(model, y):
        with mode():
            rows = y.mT + derived if derived else y.mT
            copy = copied(rows)
            changed = write(rows, copy)
            other = copy if changed is rows else rows
            return (changed + 0 if alone else other * 1) + 0

    qmodel = converted(Derived(read))
    with mode():
        assert_identical(qmodel(X.clone()), by_itself(qmodel)(X.clone()))


def test_a_copy_that_is_written_may_be_all_that_is_read():
    norm = nn.LayerNorm(64)

    def read(model, y):
        rows = y.mT.contiguous()
        rows += 1.0
        return norm(rows)

    qmodel = converted(Derived(read))
    assert qmodel.torchq_plan.layers["two"].turned
    with torch.no_grad():
        assert_identical(qmodel(X), by_itself(qmodel)(X))


def test_a_convolution_reads_what_was_copied_before_a_write():
    def read(model, y):
        rows = y.mT.contiguous()
        rows += 1.0
        return rows, model.three(y)

    qmodel = converted(Derived(read))
    assert not qmodel.torchq_plan.layers["two"].turned


def test_what_keeps_the_rows_in_order_reads_them_turned():
    """As the layers of an encoder, or a token put before them."""
    norm = nn.LayerNorm(64)
    for read in (
        lambda model, y: norm(y.mT + torch.ones(120, 64)),
        lambda model, y: torch.cat([torch.ones(2, 1, 64), nn.functional.dropout(y.mT, 0.1, training=False)], 1),
        lambda model, y: norm((y.mT + 1)[:, 0]),
    ):
        assert converted(Derived(read)).torchq_plan.layers["two"].turned


def test_plans_copies_and_gradients():
    model = Encoder().eval()
    qmodel = converted(model)
    saved = plan_of(qmodel).to_dict()
    again = apply_plan(model, Plan.from_dict(saved))
    for each in (again, copy.deepcopy(qmodel)):
        with torch.no_grad():
            assert_identical(each(X), qmodel(X))
        assert each.strides == qmodel.strides == (120 * 64, 64, 1)
    for layer in saved["layers"].values():
        del layer["turned"]  # as the version before saved it
    assert not Plan.from_dict(saved).layers["two"].turned
    x, twin = X.clone().requires_grad_(), by_itself(qmodel)
    with torch.enable_grad():
        assert_identical(*(torch.autograd.grad(each(x).sum(), x)[0] for each in (qmodel, twin)))
