"""What the code of a self-attention of a decoder is proven to compute: angles, caches, and norms of heads."""

import pytest

from helpers.decoders import ROTARY, turning
from helpers.self_attention import class_of
from torchq.modules.attention_code import self_attention_of
from torchq.modules.attention_symbols import CacheCall, Turn

pytest.importorskip("transformers", reason="transformers is not installed")

PROJECTIONS = """
    rows = x.shape[:-1]
    shape = (*rows, -1, self.size)
    q = self.q(x).view(shape).transpose(1, 2)
    k = self.k(x).view(shape).transpose(1, 2)
    v = self.v(x).view(shape).transpose(1, 2)
"""
TURN = "    cos, sin = angles\n    q, k = turned(q, k, cos, sin)\n"
CACHE = "    if cache is not None:\n        k, v = cache.update(k, v, self.place, kwargs=kwargs)\n"
ASK = "    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)\n"
ATTEND = (
    "    y, w = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scale, window=self.window, **kwargs)\n"
)
RETURN = "    y = y.reshape(*rows, -1).contiguous()\n    return self.o(y), w\n"
HEAD = "(self, x, angles, attention_mask=None, cache=None, other=None, **kwargs):"
SOURCE = HEAD + PROJECTIONS + TURN + CACHE + ASK + ATTEND + RETURN
OTHER = ROTARY.replace("(-x2, x1)", "(x2, -x1)")


def code_of(source):
    return self_attention_of(class_of(source, turned=turning(ROTARY), other_turned=turning(OTHER)))


def test_a_decoder_is_found():
    code = code_of(SOURCE)
    found = code.found
    assert (found.projections, found.size, found.scale, found.behind) == (("q", "k", "v"), "size", "scale", ("o",))
    assert (found.turn, found.cache) == (Turn("turned", "angles"), CacheCall("cache", "place", True))
    assert (found.norms, found.handed) == (((), (), ()), (("window", "window"),))
    assert (code.names, code.required) == (("x", "angles", "attention_mask", "cache", "other"), {"angles"})
    assert "window" in code.refused
    assert code.turns()


def test_its_parts_may_be_absent():
    assert code_of(SOURCE.replace(CACHE, "")).found.cache is None
    assert code_of(SOURCE.replace(", kwargs=kwargs", "")).found.cache == CacheCall("cache", "place", False)
    assert code_of(SOURCE.replace("self.window", "getattr(self.config, 'window', None)")).found.handed == (
        ("window", "config.window"),
    )
    without = code_of(SOURCE.replace(TURN, "")).found  # of calls without a cache, as an encoder's
    assert (without.turn, without.cache) == (None, None)
    normalized = SOURCE.replace("self.q(x).view(shape)", "self.norm(self.q(x).view(shape))")
    assert code_of(normalized).found.norms == (("norm",), (), ())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("turned(q, k, cos, sin)", "turned(k, q, cos, sin)"),
        ("turned(q, k, cos, sin)", "turned(q, v, cos, sin)"),
        ("turned(q, k, cos, sin)", "turned(q, k, sin, cos)"),
        ("turned(q, k, cos, sin)", "turned(q, k, cos, cos)"),
        ("turned(q, k, cos, sin)", "turned(q, k, cos, sin, 1)"),
        ("turned(q, k, cos, sin)", "turned(q, k, cos, sin, unsqueeze_dim=1)"),
        ("turned(q, k, cos, sin)", "other_turned(q, k, cos, sin)"),
        ("cos, sin = angles", "sin, cos = angles"),
        ("cos, sin = angles", "cos, sin, *_ = angles"),
        ("cos, sin = angles", "cos, _ = angles\n    _, sin = cache"),
        ("cos, sin = angles", "cos, sin = angles[:2]"),
        ("cos, sin = angles", "cos, sin = self.angles"),
        ("    q, k = turned", "    q, k = turned(q, k, cos, sin)\n    q, k = turned"),  # twice
        (TURN, "    cos, sin = angles\n    q, _ = turned(q, k, cos, sin)\n"),
        (TURN, TURN + "    k, v = turned(k, v, cos, sin)\n"),
        (TURN + CACHE, CACHE + TURN),  # keys of the cache are turned already
        ("cache.update(k, v,", "cache.update(v, k,"),
        ("cache.update(k, v,", "cache.update(q, v,"),
        ("k, v = cache.update", "v, k = cache.update"),
        ("k, v = cache.update", "_ = cache.update"),
        ("k, v = cache.update", "k, _ = cache.update"),
        ("k, v = cache.update", "cache.update(k, v, self.place)\n        k, v = cache.update"),
        ("self.place", "0"),
        ("self.place", "self.config.place"),
        ("kwargs=kwargs", "kwargs={}"),
        ("kwargs=kwargs", "**kwargs"),
        ("kwargs=kwargs", "other=kwargs"),
        ("kwargs=kwargs", "sin=sin"),
        ("if cache is not None:", "if cache is None:"),
        ("if cache is not None:", "if cache:"),
        ("if cache is not None:", "if attention_mask is not None:"),
        (CACHE, CACHE + "    else:\n        q = k\n"),
        (CACHE, CACHE + "    cache.reset()\n"),
        (CACHE, CACHE + "    if other is not None: q = k\n"),
        ("k, v = cache.update", "k, v = other.update"),
        ("self.q(x).view(shape)", "self.norm(self.q(x)).view(shape)"),
        ("window=self.window", "softcap=self.window"),
        ("window=self.window", "position_bias=self.window"),
        ("window=self.window", "window=x"),
        ("window=self.window", "window=kwargs"),
        ("self.window", "getattr(self, 'window', None)"),
        ("self.window", "getattr(self.config, 'window', 3)"),
        ("self.window", "getattr(self.config, 'window')"),
        ("angles, attention_mask=None", "angles=(), attention_mask=None"),
    ],
)
def test_all_else_is_none(old, new):
    assert old in SOURCE
    assert code_of(SOURCE.replace(old, new, 1)) is None
