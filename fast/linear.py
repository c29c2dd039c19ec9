"""A faster matrix product for one new token, and how a layer is made to use it.

Layers are called as always and their weights are never read; only the function that they call,
F.linear, is replaced.  So hooks, wrappers, subclasses, parametrizations and quantized layers work
as usual.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Instead(TorchFunctionMode):
    """A context in which functions of torch are replaced: `with Instead({F.linear: mine}): ...`"""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.table.get(function, function)(*args, **(kwargs or {}))


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
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling())


def weight_first(x, weight, bias=None):
    """F.linear; by few_rows where it can take x, and the weight is a plain tensor of x's dtype."""
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype == x.dtype
    if plain and is_few(x):
        return few_rows(x[:, 0], weight, bias)[:, None]
    return F.linear(x, weight, bias)


WEIGHT_FIRST = {F.linear: weight_first}
