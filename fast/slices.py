"""A function of rows, computed a slice of rows at a time."""

import torch


class InSlices(torch.autograd.Function):
    """function(x, *others) a slice of rows at a time, where each row is computed by itself: the same bits.

    What lies between a function's steps stays in the processor's cache, and none of it is kept for the
    backward pass, which computes each slice once more.  Only x gets a gradient, and only a first one.
    """

    @staticmethod
    def forward(ctx, function, rows, x, *others):
        ctx.function, ctx.rows, kind = function, rows, x.device.type
        ctx.save_for_backward(x, *others)
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        found = [function(*parts) for parts in zip(*(t.split(rows) for t in (x, *others)))]
        with torch.autocast(kind, enabled=False):          # whose cat knows only one half precision
            return torch.cat(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *others = ctx.saved_tensors
        dx = torch.empty_like(x)
        for target, g, part, *rest in zip(*(t.split(ctx.rows) for t in (dx, grad, x, *others))):
            with torch.enable_grad(), ctx.autocast:
                part = part.detach().requires_grad_()
                y = ctx.function(part, *rest)
            target.copy_(torch.autograd.grad(y, part, g)[0])
        return None, None, dx, *(None for _ in others)
