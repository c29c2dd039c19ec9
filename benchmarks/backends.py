"""One attention layer through every backend, timed: local and global, forward and backward.

    python benchmark.py attention --plot attention.png     what runs on this machine
    python benchmark.py gpu --out DIR                      more, on a GPU (benchmarks/gpu.py)

Each backend is first compared with float64, on one head, and it is timed only if its error is at
most twice that of the definition in the same dtype.  FlexAttention is torch's own, with our rule as
its mask_mod.
"""

import functools
import statistics
import time

import torch

import attention as A
from benchmarks.common import COLOURS, name_of
from files import error_line
from pictures import pyplot


def flex(q, k, v, *, scale, window=None, upcast=False):
    """torch's FlexAttention, compiled, with `visible` as a mask_mod (T = S).

    `upcast` changes nothing, since it sums in float32 for every dtype.
    """
    from torch.nn.attention.flex_attention import flex_attention
    compiled = torch.compile(flex_attention, dynamic=False)
    return compiled(q, k, v, block_mask=block_mask(q.size(2), window, str(q.device)), scale=scale)


@functools.lru_cache(maxsize=4)
def block_mask(T, window, device):
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(b, h, i, j):
        return (j <= i) & (i - j < (window or T))

    return create_block_mask(rule, None, None, T, T, device=device)


BACKENDS = {**{name: functools.partial(A.attention, backend=name) for name in A.BACKENDS},
            "flex": flex}


def whole(backend, q, k, v, do, **how):
    """Forward and backward: output and gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = BACKENDS[backend](*leaves, **how)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


def results(backend, tensors, backward, **how):
    """[output] of q, k, v, do or, with `backward`, [output, dq, dk, dv]."""
    if backward:
        return whole(backend, *tensors, **how)
    with torch.no_grad():
        return [BACKENDS[backend](*tensors[:3], **how)]


def errors(backend, tensors, backward, **how):
    """Relative norms against float64 of the backend's results and of the definition's: two lists.

    Heads are independent of each other, so one is compared; but the backend computes all of them,
    since FlexAttention would be compiled anew for a single one.
    """
    head = [x[:1, :1] for x in tensors]
    truth = results("naive", [x.double() for x in head], backward, **how)
    computed = [x[:1, :1] for x in results(backend, tensors, backward, **how)]
    return [[((x.double() - true).norm() / true.norm()).item() for x, true in zip(some, truth)]
            for some in (computed, results("naive", head, backward, **how))]


def milliseconds(function, device, least=5, seconds=1.0):
    """Median of at least `least` runs, for about so many seconds; a GPU is timed by its events."""
    for _ in range(2):
        function()                                         # compiles, warms up
    times, end = [], time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            function()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def measure(backend, q, k, v, do, backward, seconds=1.0, **how):
    """Milliseconds (a float), or a sentence that says why there are none."""
    if backend == "triton" and A.INTERPRETED:
        return "interpreted: right, and not worth timing"
    try:
        mine, bound = errors(backend, (q, k, v, do), backward, **how)
        if any(not a <= 2 * b + 1e-7 for a, b in zip(mine, bound)):
            return f"WRONG: error {max(mine):.1e}, the definition's {max(bound):.1e}"
        run = functools.partial(results, backend, (q, k, v, do), backward, **how)
        return milliseconds(run, q.device, seconds=seconds)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    except (ImportError, ValueError, RuntimeError) as error:
        return error_line(error)


def inputs(B, heads, T, head_dim, dtype, device):
    """q, k, v and the gradient of the output, each (B, heads, T, head_dim), always the same."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (B, heads, T, head_dim)
    return [torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(4)]


def run(dtype, lengths, device, heads, head_dim, window, plot):
    """Print the tables and draw the plot; exit status 1 if a backend was wrong."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, dtype or ("float16" if on_gpu else "float32"))
    lengths = lengths or ([256, 512, 1024, 2048, 4096, 8192] if on_gpu else [256, 512, 1024, 2048])
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    print(f"{name}, {name_of(dtype)}, {heads} heads {head_dim} wide, W = {window}; "
          "milliseconds, median")
    result = []
    for backward in (False, True):
        for layer in ("local", "global"):
            result += table(layer, backward, lengths, heads, head_dim, window, dtype, device)
    if plot:
        draw(result, f"{name}, {heads} heads {head_dim} wide, W = {window}", plot)
    if any(str(x).startswith("WRONG") for row in result for x in row["milliseconds"].values()):
        raise SystemExit("a backend was wrong, see above")
    return result


def table(layer, backward, lengths, heads, head_dim, window, dtype, device):
    """Print one table, a row for each length; returns its rows."""
    print(f"\n{layer} layer, {'forward and backward' if backward else 'forward'}")
    print("| T | " + " | ".join(BACKENDS) + " |\n|" + "---|" * (1 + len(BACKENDS)))
    rows, reasons = [], {}
    how = dict(scale=head_dim ** -0.5, window=window if layer == "local" else None)
    for T in lengths:
        torch.compiler.reset()                             # FlexAttention compiles for each length
        tensors = inputs(1, heads, T, head_dim, dtype, device)
        measured = {name: measure(name, *tensors, backward, **how) for name in BACKENDS}
        cells = (f"{x:.3f}" if isinstance(x, float) else "–" for x in measured.values())
        print(f"| {T} | " + " | ".join(cells) + " |", flush=True)
        reasons |= {name: why for name, why in measured.items() if isinstance(why, str)}
        rows.append(dict(layer=layer, backward=backward, T=T, milliseconds=measured))
    for name, why in reasons.items():
        print(f"{name}: {why}")
    return rows


def draw(result, title, file):
    """How many times as fast as the definition, against T: a panel for each layer and direction."""
    figure, panels = pyplot().subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
    kinds = [(backward, layer) for backward in (False, True) for layer in ("local", "global")]
    for panel, (backward, layer) in zip(panels.flat, kinds):
        rows = sorted((row["T"], row["milliseconds"]) for row in result
                      if (row["backward"], row["layer"]) == (backward, layer))
        for marker, name in zip("osv^D", BACKENDS):
            points = [(T, times["naive"] / times[name]) for T, times in rows
                      if all(isinstance(times.get(x), float) for x in ("naive", name))]
            if points:
                panel.plot(*zip(*points), marker=marker, color=COLOURS[name], label=name)
        panel.set(title=f"{layer} layer, {'forward and backward' if backward else 'forward'}",
                  xscale="log")
        panel.set_ylim(bottom=0)
        panel.set_xticks([T for T, _ in rows], [str(T) for T, _ in rows])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.supxlabel("T, tokens")
    figure.supylabel("times as fast as the definition")
    if panels[0, 0].lines:
        panels[0, 0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    print(f"wrote {file}")
