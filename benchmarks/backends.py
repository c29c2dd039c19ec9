"""One attention layer through every backend, timed: local and global, forward and backward.

    python benchmark.py attention --device cuda --plot attention.png
    python benchmark.py attention                             what runs on a CPU

Each backend is first held against float64, on one head, and is timed only if it errs no more than twice as
much as the definition does in that dtype.  FlexAttention is torch's own, given our rule as its mask_mod.
"""

import functools
import statistics
import time

import torch

import attention as A


def flex(q, k, v, *, scale, window=None):
    """torch's FlexAttention, compiled, with `visible` as a mask_mod (T = S)."""
    from torch.nn.attention.flex_attention import flex_attention
    compiled = torch.compile(flex_attention, dynamic=False)
    return compiled(q, k, v, block_mask=block_mask(q.size(2), window, str(q.device)), scale=scale)


@functools.lru_cache(maxsize=4)
def block_mask(T, window, device):
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(b, h, i, j):
        return (j <= i) & (i - j < (window or T))

    return create_block_mask(rule, None, None, T, T, device=device)


BACKENDS = {**{name: functools.partial(A.attention, backend=name) for name in A.BACKENDS}, "flex": flex}


COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"]          # told apart by everyone (Okabe and Ito)


def whole(backend, q, k, v, do, **how):
    """Forward and backward: output and gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = BACKENDS[backend](*leaves, **how)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


def errors(backend, tensors, backward, **how):
    """Relative norm against float64 of the output and, with `backward`, of the three gradients."""
    def both(name, inputs):
        return whole(name, *inputs, **how) if backward else [BACKENDS[name](*inputs[:3], **how)]

    truth = both("naive", [x.double() for x in tensors])
    return [((x.double() - true).norm() / true.norm()).item() for x, true in zip(both(backend, tensors), truth)]


def milliseconds(function, device, least=5, seconds=1.0):
    """Median of many runs, by device events on a GPU; at least `least` runs, and about `seconds` of them."""
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


def measure(backend, q, k, v, do, backward, **how):
    """Milliseconds, or in words why there are none."""
    if backend == "triton" and A.INTERPRETED:
        return "interpreted: right, and not worth timing"
    try:
        head = [x[:1, :1] for x in (q, k, v, do)]
        mine, bound = (errors(name, head, backward, **how) for name in (backend, "naive"))
        if any(not a <= 2 * b + 1e-7 for a, b in zip(mine, bound)):
            return f"WRONG: error {max(mine):.1e}, the definition's {max(bound):.1e}"
        run = functools.partial(whole, backend, q, k, v, do) if backward else functools.partial(BACKENDS[backend], q, k, v)
        with torch.set_grad_enabled(backward):
            return milliseconds(functools.partial(run, **how), q.device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    except (ImportError, ValueError, RuntimeError) as error:
        return str(error).strip().splitlines()[0][:160]


def run(args):
    """Table, plot, and exit status 1 if a backend was wrong."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, args.dtype or ("float16" if device.type == "cuda" else "float32"))
    lengths = args.lengths or ([256, 512, 1024, 2048, 4096, 8192] if device.type == "cuda" else [256, 512, 1024, 2048])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {str(dtype).removeprefix('torch.')}, {args.heads} heads {args.head_dim} wide, W = {args.window}; "
          "milliseconds, median")
    result = []
    for backward in (False, True):
        for layer, window in (("local", args.window), ("global", None)):
            print(f"\n{layer} layer, {'forward and backward' if backward else 'forward'}")
            print("| T | " + " | ".join(BACKENDS) + " |\n|" + "---|" * (1 + len(BACKENDS)))
            reasons = {}
            for T in lengths:
                torch.compiler.reset()                     # flex compiles for each length
                generator = torch.Generator(device).manual_seed(0)
                tensors = [torch.randn(1, args.heads, T, args.head_dim, device=device, generator=generator).to(dtype)
                           for _ in range(4)]
                found = {b: measure(b, *tensors, backward, scale=args.head_dim ** -0.5, window=window) for b in BACKENDS}
                print(f"| {T} | " + " | ".join(f"{x:.3f}" if isinstance(x, float) else "–" for x in found.values()) + " |",
                      flush=True)
                reasons |= {b: why for b, why in found.items() if isinstance(why, str)}
                result.append(dict(layer=layer, backward=backward, T=T, milliseconds=found))
            for backend, why in reasons.items():
                print(f"{backend}: {why}")
    if args.plot:
        plot(result, lengths, f"{name}, {args.heads} heads {args.head_dim} wide, W = {args.window}", args.plot)
    if any(str(x).startswith("WRONG") for row in result for x in row["milliseconds"].values()):
        raise SystemExit("a backend was wrong, see above")
    return result


def plot(result, lengths, title, file):
    """How many times as fast as the definition, against T: a panel each for local and global, one way and both."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
    for panel, (backward, layer) in zip(panels.flat, [(b, l) for b in (False, True) for l in ("local", "global")]):
        rows = [r["milliseconds"] for r in result if (r["backward"], r["layer"]) == (backward, layer)]
        for n, backend in enumerate(BACKENDS):
            points = [(T, r["naive"] / r[backend]) for T, r in zip(lengths, rows)
                      if isinstance(r["naive"], float) and isinstance(r[backend], float)]
            if points:
                panel.plot(*zip(*points), marker="osv^D"[n], color=COLOURS[n], label=backend)
        panel.set(title=f"{layer} layer, {'forward and backward' if backward else 'forward'}", xscale="log")
        panel.set_ylim(bottom=0)
        panel.set_xticks(lengths, [str(T) for T in lengths])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.supxlabel("T, tokens")
    figure.supylabel("times as fast as the definition")
    panels[0, 0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    print(f"wrote {file}")
