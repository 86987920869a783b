"""Rows that the batch's attention mask says are padding are not data: not for ranges, rounding or checks."""

import pytest
import torch
from torch import nn

from helpers.calibration import recorded
from helpers.numbers import normal
from torchq import QConfig, convert
from torchq.calibration.padding import real_rows
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0]])  # padding at the end, and left of a text


class Masked(nn.Module):
    """`tokens` runs on (B, T, K), `texts` on their means over what is real, `flat` on the tokens as one (B T, K)."""

    def __init__(self):
        super().__init__()
        self.tokens, self.texts, self.flat = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, attention_mask=None):
        self.flat(x.reshape(-1, 8))
        y = torch.relu(self.tokens(x))
        real = torch.ones(x.shape[:2]) if attention_mask is None else (attention_mask == 1).float()
        return self.texts((y * real[..., None]).sum(1) / real.sum(1, keepdim=True))


def x_with_padding(value):
    x = normal(3, 4, 8)
    x[MASK == 0] = value
    return x


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("padding", [0.0, 1e4])
def test_rows_of_padding_are_not_recorded(dtype, padding):
    x = x_with_padding(padding)
    records = recorded(Masked(), [{"x": x, "attention_mask": MASK.to(dtype)}]).records
    assert torch.equal(records["tokens"].sample.rows, x[MASK == 1])
    assert torch.equal(records["tokens"].gram, x[MASK == 1].T @ x[MASK == 1])
    assert torch.equal(records["tokens"].extremes, torch.stack([x[MASK == 1].amin(0), x[MASK == 1].amax(0)]))
    assert records["texts"].sample.rows_seen == 3
    assert records["flat"].sample.rows_seen == 12  # which row is which token, its shape does not tell


@pytest.mark.parametrize(
    "mask",
    [
        torch.where(MASK == 1, 0.0, -1e9),  # to be added to scores
        MASK * 2,
        torch.zeros_like(MASK),  # nothing would be data
        MASK[:, None],
        MASK.tolist(),
        MASK.T.contiguous(),
        None,
    ],
    ids=["additive", "twos", "zeros", "three dimensions", "a list", "another shape", "none"],
)
def test_any_other_mask_changes_nothing(mask):
    x = x_with_padding(3.0)
    batch = {"x": x, "attention_mask": mask}
    record = recorded(Masked(), [batch], forward=lambda model, batch: model(batch["x"])).records["tokens"]
    assert torch.equal(record.sample.rows, x.reshape(-1, 8))


def test_a_mask_is_for_its_own_batch_only():
    x = normal(3, 4, 8)
    masked = {"x": x, "attention_mask": MASK}
    records = recorded(Masked(), [masked, {"x": x}, x, (masked, "a label")]).records
    assert records["tokens"].sample.rows_seen == 6 + 12 + 12 + 6


def test_padding_may_be_nan():
    """As attention gives it where a row may look at nothing."""
    x = x_with_padding(torch.nan)
    with pytest.raises(ValueError, match="not finite in batch 0"):
        convert(Masked(), [{"x": x}])
    tokens = nn.Linear(8, 8)
    batches = [{"x": x, "attention_mask": MASK}] * 4
    qmodel = convert(tokens, batches, forward=lambda model, batch: model(batch["x"]))
    assert qmodel.torchq_plan.layers[""].sqnr_db["dynamic"] > 30


@pytest.mark.parametrize("padding", [1e3, 0.0])
def test_weights_and_ranges_are_those_of_the_texts_alone(padding):
    torch.manual_seed(1)
    model, texts = Masked().eval(), [normal(8, 12, 8, seed=i) for i in range(8)]
    padded = [
        {
            "x": nn.functional.pad(x, (0, 0, 0, 20), value=padding),
            "attention_mask": nn.functional.pad(torch.ones(8, 12), (0, 20)),
        }
        for x in texts
    ]
    config = QConfig(activation="static", observer="minmax", exclude=("flat",))
    plain, converted = (convert(model, data, config=config) for data in (texts, padded))
    layers = plain.torchq_plan.layers["tokens"], converted.torchq_plan.layers["tokens"]
    assert layers[0].input_qparams == layers[1].input_qparams
    assert torch.equal(plain.tokens.weight, converted.tokens.weight)
    new = normal(8, 12, 8, seed=99)
    assert sqnr_db(model(new), converted(new)) == pytest.approx(sqnr_db(model(new), plain(new)), abs=0.01)


@pytest.mark.parametrize("name", ["src_key_padding_mask", "key_padding_mask"])
def test_the_masks_of_torchs_own_transformers_are_true_for_padding(name):
    batch = {"src": normal(3, 4, 8), name: MASK == 0}
    assert torch.equal(real_rows(batch), MASK == 1)
    assert torch.equal(real_rows((batch, "label")), MASK == 1)
    assert real_rows({**batch, name: torch.zeros(3, 4)}) is None  # added to the scores
    assert real_rows({**batch, name: torch.ones(3, 4, dtype=torch.bool)}) is None
    assert torch.equal(real_rows({**batch, "attention_mask": 1 - MASK}), MASK == 0)


def test_a_transformer_encoder_learns_nothing_of_padding():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    data = [{"src": normal(3, 4, 8, seed=i), "src_key_padding_mask": MASK == 0} for i in range(16)]
    config = QConfig(activation="static", observer="minmax", rounding="nearest", smoothing="none")
    plan = convert(model, data, config=config).torchq_plan
    for batch in data:
        batch["src"][MASK == 0] = 1e3
    assert convert(model, data, config=config).torchq_plan.layers == plan.layers
