"""What the code of a self-attention of transformers is proven to compute."""

import pytest
from torch import nn

from helpers.self_attention import class_of
from torchq.modules.attention_code import self_attention_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
registry = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS

PROJECTIONS = """
    rows = x.shape[:-1]
    shape = (*rows, -1, self.size)
    q = self.q(x).view(shape).transpose(1, 2)
    k = self.k(x).view(*shape).transpose(1, 2)
    v = self.v(x).view(shape).transpose(1, 2)
"""
ASK = "    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)\n"
ATTEND = "    y, w = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scale, **kwargs)\n"
RETURN = "    y = y.reshape(*rows, -1).contiguous()\n    return self.o(y), w\n"
HEAD = "(self, x, attention_mask=None, **kwargs):"
SOURCE = HEAD + PROJECTIONS + ASK + ATTEND + RETURN


def test_a_self_attention_is_found():
    code = self_attention_of(class_of(SOURCE))
    found = code.found
    assert (found.projections, found.size, found.scale, found.behind) == (("q", "k", "v"), "size", "scale", ("o",))
    assert (found.norms, found.turn, found.cache, found.handed) == (((), (), ()), None, None, ())
    assert (code.names, code.takes_more) == (("x", "attention_mask"), True)
    code = self_attention_of(transformers.models.bert.modeling_bert.BertSelfAttention)
    assert (code.found.projections, code.found.behind) == (("query", "key", "value"), ())
    assert code.inner is not code.forward
    assert {"past_key_values", "dropout", "self"} <= code.refused
    assert not code.required
    assert self_attention_of(class_of(SOURCE.replace("=None", "", 1))).required == {"attention_mask"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.q(x)", "self.q(x) * self.scale"),
        ("self.q(x)", "self.q(self.norm(x))"),
        ("self.q(x).view(shape)", "self.q(x).view(shape)[:]"),
        ("k = self.k(x).view(*shape).transpose(1, 2)", "k = self.k(x).view(*shape).transpose(2, 1)"),
        ("v = self.v(x).view(shape).transpose(1, 2)", "v = self.v(x).view(shape)"),
        ("v = self.v(x).view(shape)", "v = self.v(x).view((*rows, -1, self.other))"),
        ("v = self.v(x).view(shape)", "v = self.v(x).view((rows[0], -1, rows[1], self.size))"),
        ("x.shape[:-1]", "x.shape[1:]"),
        (ASK, "    self.v(x)\n" + ASK),  # a call whose output is dropped
        (ASK, ASK + "    self.last = q\n"),
        (ASK, ASK + "    print(q)\n"),
        (ASK, ASK + "    q = torch.relu(q)\n"),
        (ASK, ASK + "    for _ in rows: pass\n"),
        (ASK, ASK + "    while True: pass\n"),
        (ASK, ASK + "    if self.rotary: q = k\n"),
        (ASK, ASK + "    if self.norm is not None: q = self.norm(q)\n"),
        (ASK, ASK + "    if self.norm is None: q = k\n"),
        (ASK, ASK + "    if attention_mask is None: q = k\n"),
        (ASK, ASK + "    if self.config.swaps is None: q, k = k, q\n"),
        (ASK, ASK + "    if x.__class__ is None: q = k\n"),
        (ASK, ASK + "    if self.q is self.k: q = v\n"),
        (ASK, ASK + "    if x is attention_mask: q = k\n"),
        (ASK, ASK + "    if self.q is not self.config.main: attention_mask = None\n"),
        (ASK, ASK + "    attention_mask = attention_mask[:, :, :, :1]\n"),
        (ASK, ASK + "    kwargs['scaling'] = 1.0\n"),
        (ASK, ASK + "    if kwargs: q = k\n"),
        (ASK, ASK + "    if kwargs is not None and kwargs: q = k\n"),
        (ASK, ASK + "    k = kwargs.get('flag', k)\n"),
        (ASK, ASK + "    if kwargs.get('flag', 1) is None: q = k\n"),
        (ASK, ASK + "    if {**kwargs}.get('flag', 1) is None: q = k\n"),
        (ASK, ASK + "    if [*kwargs.keys()] == ['flag']: q = k\n"),
        (ASK, ASK + "    if 'flag' in kwargs: q = k\n"),
        (ASK, ASK + "    kwargs = {}\n"),
        (", **kwargs)\n", ")\n"),
        (ASK, ASK + "    assert self.config\n"),
        (ASK, "    attend = eager\n"),
        (ASK, "    attend = ALL_ATTENTION_FUNCTIONS['sdpa']\n"),
        (ASK, ASK.replace("self.config._attn_implementation", "'sdpa'")),
        ("q, k, v, attention_mask", "q, k, v, None"),
        ("q, k, v, attention_mask", "k, q, q, attention_mask"),
        ("dropout=0.0", "dropout=self.p"),
        ("dropout=0.0", "dropout=0.1"),
        ("scaling=self.scale", "scaling=self.config.scale"),
        ("scaling=self.scale", "scaling=self.scale, is_causal=True"),
        ("attend(self,", "attend(self.config,"),
        ("return self.o(y), w", "return self.o(y)"),
        ("return self.o(y), w", "return w, self.o(y)"),
        ("return self.o(y), w", "return self.o(y), None"),
        ("return self.o(y), w", "return self.o(y) + x, w"),
        ("y.reshape(*rows, -1)", "y.reshape(-1, *rows)"),
        ("self.o(y)", "self.o(y, y)"),
        ("self.o(y)", "self.zero_grad(y)"),
        ("attention_mask=None", "attention_mask=()"),
        ("attention_mask=None", "attention_mask=None, twice=True"),
        ("attention_mask=None", "attention_mask=None, *more"),
        ("attention_mask=None", "attention_mask=None, *, more=None"),
    ],
)
def test_all_else_is_no_self_attention(old, new):
    assert old in SOURCE
    assert self_attention_of(class_of(SOURCE.replace(old, new, 1))) is None


def test_it_runs_nothing_of_the_users():
    ran = []
    source = SOURCE.replace(ASK, ASK + "    noted()\n")
    assert self_attention_of(class_of(source, noted=lambda: ran.append(1))) is None
    assert not ran


def test_a_registry_or_a_decorator_of_another_kind_is_unknown():
    assert self_attention_of(class_of(SOURCE, ALL_ATTENTION_FUNCTIONS={"sdpa": None})) is None

    class Mine(type(registry)):
        pass

    assert self_attention_of(class_of(SOURCE, ALL_ATTENTION_FUNCTIONS=Mine())) is None
    kind = class_of(SOURCE)
    forward = kind.forward

    def decorated(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    decorated.__wrapped__ = forward
    kind.forward = decorated
    assert self_attention_of(kind) is None
    assert self_attention_of(nn.Linear) is self_attention_of(nn.MultiheadAttention) is None
