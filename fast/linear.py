"""A linear layer for one new token, and how it takes the place of torch's.

Layers are always called, never read: only the product inside them is another.  So hooks, wrappers,
subclasses, parametrizations and quantized layers do what they always do.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Instead(TorchFunctionMode):
    """Within it other functions take the place of torch's: `with Instead({F.linear: mine}): ...`"""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.table.get(function, function)(*args, **(kwargs or {}))


def few_rows(x, weight, bias=None):
    """Linear layer for x (N, K), N <= 16, float32 on a CPU: weight xᵀ instead of x weightᵀ.

    BLAS shares a product among the cores by rows of its first factor.  With the weight there, each core
    reads its own part of it; the other way round, or for a single column, one core reads it all (hence the
    one row twice).  `benchmark.py ceilings` measures both.
    """
    columns = x.T if x.size(0) > 1 else torch.cat([x, x]).T
    y = (weight @ columns)[:, :x.size(0)].T.contiguous()                   # (N, rows of weight)
    return y if bias is None else y + bias


def is_few(x):
    """Is x (B, 1, K) what few_rows is for?  No gradient, no autocast, nothing that traces."""
    return (x.dim() == 3 and x.size(1) == 1 and x.size(0) <= 16 and x.dtype == torch.float32
            and x.device.type == "cpu" and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling())


def weight_first(x, weight, bias=None):
    """F.linear, by few_rows where x and a plain weight are what it is for."""
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype == x.dtype
    if plain and is_few(x):
        return few_rows(x[:, 0], weight, bias)[:, None]
    return F.linear(x, weight, bias)


WEIGHT_FIRST = {F.linear: weight_first}
