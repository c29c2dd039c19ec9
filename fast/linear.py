"""A faster matrix product for one new token, and how the layers of a model are made to use it.

Layers are called as always, with their hooks and wrappers.  Only what a call of a plain nn.Linear
computes is replaced, and only while a block or the output head runs.
"""

import contextlib
import functools
import threading
from contextvars import ContextVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import is_traced


def few_rows(x, weight, bias=None):
    """F.linear for x (N, K), N <= 16, float32 on a CPU: weight xᵀ instead of x weightᵀ.

    BLAS divides a product among the cores by rows of its first factor.  If that is the weight, each
    core reads its own part of it; if it is x, one core reads the whole weight.  One core also reads
    it all if x has a single row, so that row is computed twice.  `benchmark.py ceilings` measures
    both orders.  weight (M, K), bias (M,) -> (N, M)
    """
    columns = x.T if x.size(0) > 1 else torch.cat([x, x]).T
    y = (weight @ columns)[:, :x.size(0)].T.contiguous()                   # (N, M)
    return y if bias is None else y + bias


def is_few(x):
    """Can few_rows take x?  It needs (B, 1, K), B <= 16, float32 on a CPU, and no gradient,
    autocast or tracing."""
    return (x.dim() == 3 and x.size(1) == 1 and x.size(0) <= 16 and x.dtype == torch.float32
            and x.device.type == "cpu" and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu") and not is_traced())


def linear(layer, x):
    """nn.Linear.forward, by few_rows if it can take x and the weight is a plain tensor."""
    weight = layer.weight
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype == x.dtype
    # A copy of a layer, made inside weight_first, keeps this forward; it is not in CHANGED.
    if plain and is_few(x) and layer in CHANGED:
        return few_rows(x[:, 0], weight, layer.bias)[:, None]
    return F.linear(x, weight, layer.bias)


# {model: what calls its parts} in the thread in which fast/step.py computes a token.
RUNNERS = ContextVar("RUNNERS", default={})
TORCHS_OWN = nn.Linear.forward, F.linear
LOCK = threading.Lock()
INSIDE = {}             # part: [how many threads are inside weight_first(part), its changed layers]
CHANGED = set()         # the changed layers of all parts


@contextlib.contextmanager
def weight_first(part):
    """A context in which the plain linear layers of `part`, a module, compute by `linear`.

    A plain layer is exactly an nn.Linear.  A subclass, a wrapper, a quantized or parametrized layer
    and a layer with a forward of its own compute what they always do.  A layer is changed by an
    attribute of its own, so no other model is, and it is changed back when no thread is inside.
    """
    with LOCK:
        if part not in INSIDE:
            INSIDE[part] = [0, changed_layers(part)]
        INSIDE[part][0] += 1
    try:
        yield
    finally:
        with LOCK:
            INSIDE[part][0] -= 1
            if not INSIDE[part][0]:
                layers = INSIDE.pop(part)[1]
                CHANGED.difference_update(layers)
                for layer in layers:
                    vars(layer).pop("forward", None)


def changed_layers(part):
    """Give the plain layers of `part` another forward, and return them."""
    if (nn.Linear.forward, F.linear) != TORCHS_OWN:        # a tool has replaced them, so that it is
        return []                                          # called: `linear` would go past it
    layers = [x for x in part.modules() if type(x) is nn.Linear and "forward" not in vars(x)]
    for layer in layers:
        vars(layer)["forward"] = functools.partial(linear, layer)
    CHANGED.update(layers)
    return layers
