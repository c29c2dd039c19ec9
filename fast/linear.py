"""A linear layer for one new token."""

import torch
import torch.nn as nn


class Linear(nn.Linear):
    """nn.Linear, with a faster order of factors for one new token a row; `exact` is never so."""

    exact = False                                          # set with the model's backend: the definition's

    def forward(self, x):
        few = (x.dim() == 3 and x.size(1) == 1 and x.size(0) <= 16 and x.dtype == torch.float32
               and x.device.type == "cpu" and not torch.is_grad_enabled()
               and not torch.compiler.is_compiling())
        if self.exact or not few:
            return super().forward(x)
        return few_rows(x[:, 0], self.weight, self.bias)[:, None]


def few_rows(x, weight, bias=None):
    """Linear layer for x (N, K), N <= 16, float32 on a CPU: weight xᵀ instead of x weightᵀ.

    BLAS shares a product among the cores by rows of its first factor.  With the weight there, each core
    reads its own part of it; the other way round, or for a single column, one core reads it all (hence the
    one row twice).  `benchmark.py ceilings` measures both.
    """
    columns = x.T if x.size(0) > 1 else torch.cat([x, x]).T
    y = (weight @ columns)[:, :x.size(0)].T.contiguous()                   # (N, rows of weight)
    return y if bias is None else y + bias
