"""A function that treats each row by itself, computed for a few rows at a time."""

import functools

import torch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from attention import is_traced

LARGE = 2**20            # with more numbers than this, x is computed in slices


def in_slices(numbers, on=None):
    """Decorator: compute function(x, *others) a slice of rows at a time where x is large.

    x (..., C) and what the function returns have the same leading dimensions; each of `others` has
    one row for each row of x.  The function must compute every row by itself; then the result has
    the same bits as without slices.  numbers: about how many numbers of x make a slice.  on: slice
    only tensors on this type of device.  torch.compile, torch.export and torch.func.functionalize
    use the function itself.
    """
    def decorate(function):
        @functools.wraps(function)
        def sliced(x, *others):
            whole = (x.numel() <= LARGE or on not in (None, x.device.type) or x.is_meta
                     or is_traced() or within_functionalize())
            if whole:
                return function(x, *others)
            width = x.size(-1)
            rows = max(1, min(numbers, LARGE) // width)
            y = InSlices.apply(function, rows, x.reshape(-1, width), *others)
            return y.view(*x.shape[:-1], y.size(-1))
        return sliced
    return decorate


def within_functionalize():
    """torch.func.functionalize takes no autograd.Function, however deep it is within others."""
    return torch._C._are_functorch_transforms_active() and any(
        level.key() == TransformType.Functionalize
        for level in retrieve_all_functorch_interpreters())


class InSlices(torch.autograd.Function):
    """function(x, *others) in slices of `rows` rows, forward and backward; only x gets a gradient.

    The backward pass computes each slice again, so no intermediate result is kept.  If the gradient
    itself is to be differentiated, it is computed without slices.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(function, rows, x, *others):
        results = [function(*parts) for parts in zip(*(t.split(rows) for t in (x, *others)))]
        with torch.autocast(x.device.type, enabled=False):     # autocast: cat refuses some dtypes
            return torch.cat(results)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function, ctx.rows, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        kind = tensors[0].device.type
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind),
                                      torch.is_autocast_enabled(kind))

    @staticmethod
    def backward(ctx, grad):
        x, *others = ctx.saved_tensors
        if torch.is_grad_enabled():                            # create_graph, torch.func
            _, pull = torch.func.vjp(whole(ctx, others), x)
            return None, None, *pull(grad), *(None for _ in others)
        dx = (x[:0] * grad[:0]).new_empty(x.shape)             # under vmap: batched if x or grad is
        for target, g, part, *rest in zip(*(t.split(ctx.rows) for t in (dx, grad, x, *others))):
            with torch.enable_grad(), ctx.autocast:
                part = part.detach().requires_grad_()
                y = ctx.function(part, *rest)
            target.copy_(torch.autograd.grad(y, part, g)[0])
        return None, None, dx, *(None for _ in others)

    @staticmethod
    def jvp(ctx, _function, _rows, tangent, *_others):
        """The forward-mode derivative, from two backward passes.

        The first gives pull, the product of a vector with the Jacobian.  It is linear, and the
        second, through pull, gives the product of the Jacobian with the tangent.
        """
        x, *others = ctx.saved_tensors
        y, pull = torch.func.vjp(whole(ctx, others), x)
        _, push = torch.func.vjp(lambda grad: pull(grad)[0], torch.zeros_like(y))
        return push(tangent)[0]


def whole(ctx, others):
    """The unsliced function of x alone, under the autocast of the forward pass."""
    def function(x):
        with ctx.autocast:
            return ctx.function(x, *others)
    return function
