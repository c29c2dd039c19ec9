"""Random calls of `attention`, and odd small models: what several tests of attention share.

Functions that run attention take the module as `A`, so that test_mistakes.py can pass a changed one.
"""

import random

import torch

import attention
from helpers import Case

WIDTHS = [4, 8, 16, 32, 48, 64, 80, 96, 128, 256]          # every head width of the official models
NAMES = ("out", "dq", "dk", "dv")
LAYOUTS = ["(B, H, T, D)", "(B, T, H, D)", "part of a larger one", "last dimension strided"]


def tensors(generator, B, H, T, S, D, dtype=torch.float64, layout="(B, H, T, D)"):
    """q, k, v and the gradient of the output, in one of the layouts that models and caches use."""
    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def one(n):
        if layout == "(B, T, H, D)":                       # a projection's view
            return draw(B, n, H, D).transpose(1, 2)
        if layout == "part of a larger one":               # a cache, or a third of a fused projection
            return draw(B, H, n + 5, D + 3)[:, :, 2:n + 2, 1:D + 1]
        if layout == "last dimension strided":
            return draw(B, H, D, n).mT
        return draw(B, H, n, D)

    return one(T), one(S), one(S), one(T)


def padding(generator, B, T, S, side):
    """key_mask (B, S): up to a third of each row is padding on that side, row 0 none."""
    if side is None:
        return None
    n = torch.randint(0, S // 3 + 1, (B, 1), generator=generator)
    n[0] = 0
    j = torch.arange(S)[None]
    return j >= n if side == "left" else j < S - n


def readers(T, S, window, key_mask):
    """(B or 1, 1, T, 1) bool: which queries may read anything?"""
    seen = attention.visible(T, S, window)[None]
    if key_mask is not None:
        seen = seen & key_mask[:, None, :]
    return seen.any(-1)[:, None, :, None]


def all_of(backend, q, k, v, do, how, dtype=None, A=attention):
    """Output and gradients; queries that may read nothing are left out of both."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
    real = readers(q.size(2), k.size(2), how["window"], how["key_mask"])
    out = A.attention(*leaves, **how, backend=backend) * real
    out.backward(do.to(out.dtype) * real)
    return [out.detach(), *(x.grad for x in leaves)]


def random_call(seed, dtype):
    """Any width, any T and S, windows about the block sizes, all layouts, padding."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    D, S = WIDTHS[seed % len(WIDTHS)], draw.choice([1, 15, 16, 17, 40, 64, 65, 130])
    T = draw.choice([S, S, 1, draw.randint(1, S)])
    B, H = draw.choice([(1, 1), (1, 2), (2, 1)])
    window = draw.choice([None, 1, 2, 15, 16, 17, 63, 64, 65, 400])
    inputs = tensors(generator, B, H, T, S, D, dtype, draw.choice(LAYOUTS))
    key_mask = padding(generator, B, T, S, draw.choice([None, None, "left", "right"]))
    return inputs, dict(scale=draw.choice([1.0, D ** -0.5]), window=window, key_mask=key_mask)


def error_ratios(backend, dtype, upcast, seeds):
    """{output: the backend's error over naive's}, both against float64, normed over all calls."""
    error = {name: dict.fromkeys(NAMES, 0.0) for name in ("naive", backend)}
    for seed in seeds:
        (q, k, v, do), how = random_call(seed, dtype)
        how["upcast"] = upcast
        truth = all_of("naive", q, k, v, do, how, torch.float64)
        for name in error:
            for part, x, true in zip(NAMES, all_of(name, q, k, v, do, how), truth):
                error[name][part] += (x.double() - true).norm().item() ** 2
    return {part: (error[backend][part] / error["naive"][part]) ** 0.5 for part in NAMES}


def key_blocks(T, S, window, own, other):
    """For each block of `own` queries, the number of blocks of `other` keys that it must visit."""
    window = window or S
    counts = []
    for first in range(S - T, S, own):
        begin, end = max(0, first - window + 1), min(first + own, S)
        counts.append(-(-(end - begin) // other))
    return counts


def query_blocks(T, S, window, own, other):
    """The same for each block of `own` keys; blocks of queries begin at multiples of `other`."""
    counts = []
    for first in range(0, S, own):
        begin = max(0, first - (S - T)) // other * other
        end = min(T, first + own - 1 + (window or S) - (S - T))
        counts.append(max(0, -(-(end - begin) // other)))
    return counts


def chunkings(T, window, seed):
    """One token at a time; two parts; and random chunks that are often about as long as the window."""
    draw = random.Random(seed)
    yield [1] * T
    yield [T - 1, 1]
    for _ in range(3):
        sizes = []
        while sum(sizes) < T:
            about = draw.choice([1, 2, window or 3, (window or 3) + 1, 17])
            sizes.append(min(about, T - sum(sizes)))
        yield sizes


def run_in_chunks(model, ids, sizes, mask=None, position_ids=None, A=attention):
    """Logits of ids (B, T), read through a cache in chunks of these sizes."""
    cache = A.KVCache(model.config, ids.size(0), ids.size(1), model.dtype)
    parts, start = [], 0
    for n in sizes:
        end = start + n
        parts.append(model(ids[:, start:end], cache=cache,
                           attention_mask=None if mask is None else mask[:, :end],
                           position_ids=None if position_ids is None
                           else position_ids[:, start:end]).logits)
        start = end
    assert cache.length == ids.size(1)
    return torch.cat(parts, 1)


def cached_errors(model, ids, window, padded, seed, A=attention):
    """For several chunkings: how far logits through the cache are from those without, relative norm.

    Where `padded`, one row has left padding longer than the window, another a little.
    """
    T = ids.size(1)
    mask = position_ids = None
    real = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask = (torch.arange(T)[None] >= torch.tensor([[31], [3]])).long()
        position_ids, real = (mask.cumsum(-1) - 1).clamp(min=0), mask.bool()
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=position_ids).logits[real]
        for sizes in chunkings(T, window, seed):
            parts = run_in_chunks(model, ids, sizes, mask, position_ids, A)[real]
            yield sizes, ((parts - whole).norm() / whole.norm()).item()


def odd_case(seed, family):
    """A small model with sizes that no official one has: heads 1 to 26 wide, inner widths that are no
    multiple of the width, 1 to 33 tokens."""
    draw = random.Random(f"{seed} {family}")
    H, L = draw.choice([1, 2, 3, 5, 6, 7]), draw.choice([1, 2, 3])
    D = draw.choice([1, 2, 3, 4, 5, 6, 9, 14, 18, 26] if family == "gpt_neo" else
                    [2, 4, 6, 8, 10, 14, 18, 26])
    act = draw.choice(["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"])
    inner = draw.choice([5, 17, H * D, 2 * H * D, 4 * H * D + 1])
    settings = dict(vocab_size=97, hidden_size=H * D, intermediate_size=inner,
                    max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
    window = None
    if family == "gpt_neo":
        window, kinds = draw.choice([1, 2, 3, 5, 8]), draw.choices(["global", "local"], k=L)
        settings |= dict(num_layers=L, num_heads=H, attention_types=((tuple(kinds), 1),),
                         window_size=window, activation_function=act)
    else:
        parts = [f for f in (0.25, 0.5, 1.0) if int(D * f) and int(D * f) % 2 == 0]
        settings |= dict(num_hidden_layers=L, num_attention_heads=H, rotary_pct=draw.choice(parts),
                         hidden_act=act, use_parallel_residual=draw.random() < 0.6,
                         attention_bias=draw.random() < 0.8)
    return Case(seed, family, tuple(settings.items()), draw.choice([1, 2, 3]),
                draw.choice([1, 2, 3, 4, 4, 5, 7, 9, 13, 20, 33]), window)


def odd_mask(seed, B, T):
    """attention_mask (B, T): padding on the left, on the right, gaps, or a row of padding alone."""
    draw, mask = random.Random(seed), torch.ones(B, T, dtype=torch.long)
    kind = ("left", "right", "gaps", "empty")[seed % 4]
    for row in mask:
        n = draw.randint(0, T - 1)
        if kind == "left":
            row[:n] = 0
        if kind == "right":
            row[T - n:] = 0
        if kind == "gaps":
            row[torch.tensor([draw.random() < 0.4 for _ in range(T)])] = 0
    if kind == "empty":
        mask[draw.randrange(B)] = 0
    return mask
