"""Benchmarks: a peer whose answer is wrong is shown with its SQNR, and is no baseline for torchq's speed."""

from benchmarks import conv, linear, mlp, transformers
from benchmarks.peers import MOST_LOST_DB, Peer, wrong

NAN = float("nan")


def contestant(name, int8=True):
    return Peer(name, int8, lambda *arguments: None)


def test_what_lost_more_than_the_margin_is_wrong():
    """17.2 dB is what sums give that saturate in int16; 7 bits and coarser scales give 33 dB and more."""
    sqnr_db = {"ours": 41.7, "saturated": 17.2, "7 bits": 33.9, "at the margin": 41.7 - MOST_LOST_DB, "NaN": NAN}
    assert wrong(sqnr_db, "ours") == ["saturated", "NaN"]


def test_the_best_peer_for_a_linear_layer_is_right():
    us = {"torchq": 10.0, "fast": 5.0, "slow": 12.0, "torch float32": 40.0}
    errors = {"torchq": 41.5, "fast": 17.2, "slow": 39.0, "torch float32": float("inf")}
    result = {"shape": (1, 8, 8), "us": us, "sqnr_db": errors, "wrong": wrong(errors, "torchq"), "limit_us": 5.0}
    assert linear.best(result, ["fast", "slow"]) == ("slow", 12.0)
    peers = [contestant("torchq"), contestant("fast"), contestant("slow"), contestant("torch float32", int8=False)]
    text = linear.table([result], peers)
    assert "slow, 12.0 us" in text
    assert "geometric mean 1.20x" in text
    assert "5.0 us, 17.2 dB" in text


def test_the_best_peer_for_a_convolution_is_right():
    seconds = {"torchq": 2e-6, **dict.fromkeys(conv.PEERS, 4e-6), "OpenVINO": 1e-6}
    times = conv.Times(seconds, wrong=["OpenVINO"])
    assert times.best == 4e-6
    (shape,) = conv.conformer()[:1]
    cells = conv.row(shape, times, peak=1e12)
    assert "1!" in cells
    assert cells[-1] == "2.00"
    assert conv.compared([times]).startswith("2.00x the best int8 peer")
    assert "OpenVINO 0.00 ms!" in conv.compared([times])


def test_the_best_setting_of_a_model_is_right():
    ms = {"torchq": 2.0, "peer: 8 bits": 1.0, "peer: 7 bits": 3.0, transformers.USUAL: 1.5}
    errors = {"torchq": 35.0, "peer: 8 bits": 15.0, "peer: 7 bits": 30.0, transformers.USUAL: 18.0}
    result = {"cell": "a cell", "ms": ms, "sqnr_db": errors, "wrong": wrong(errors, "torchq"), "failed": {}}
    assert transformers.fastest(result, "peer") == "peer: 7 bits"
    assert transformers.ratios([result], ["torchq"], ["peer"]) == {"a cell": 1.5}
    assert transformers.ratios([result], ["torchq"], [transformers.USUAL]) == {}
    text = transformers.table([result], [contestant(name) for name in ms])
    assert "3.00 (30.0)" in text
    assert "- a cell: peer: 8 bits 1.00 (15.0, wrong)" in text


def test_the_best_setting_of_a_chain_is_right():
    us = {mlp.OURS: 10.0, "peer: 8 bits": 5.0, "peer: 7 bits": 15.0}
    errors = {mlp.OURS: 44.0, "peer: 8 bits": 17.0, "peer: 7 bits": 38.0}
    text = mlp.table([{"batch": 1, "us": us, "sqnr_db": errors, "wrong": wrong(errors, mlp.OURS)}])
    assert "batch 1: 1.50x (peer: 7 bits)" in text
    assert "peer: 8 bits at batch 1, 5.0 us, 17.0 dB" in text
