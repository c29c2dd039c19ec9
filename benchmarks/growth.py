"""How cost grows with the text, for both families, beside transformers.

    python benchmark.py growth --rounds 3 --plot benchmarks/growth      decode.png and prefill.png

Decoding: tokens a second and bytes of the cache against the context, and one query's attention in a
local and in a global layer.  Prefill: seconds and peak memory against the length of the
prompt.  GPT-Neo's local layers keep a window of 256 tokens, so half of its cache and of its
attention stops growing there.
"""

import copy
import statistics
import tempfile
from pathlib import Path

import torch

from attention import KVCache, attention
from benchmarks.common import COLOURS, in_fresh_process, in_turns, name_of, ratio, seconds
from benchmarks.competitors import competitor
from benchmarks.shapes import write
from pictures import pyplot

MODELS = {"gpt-neo-125m": "-", "pythia-160m": "--"}        # and their lines in the plots
CONTEXTS = (16, 64, 128, 256, 384, 512, 1024, 1536, 2000)
LENGTHS = (128, 256, 512, 1024, 2048)
NAMES = ("compiled", "ours", "transformers")


def run(dtype, rounds, new_tokens, plot):
    dtype = getattr(torch, dtype or "float32")
    result = {"decode": {}, "cache": {}, "prefill": {}, "memory": {}}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            write(model, folder, dtype)
            players = {name: competitor(name, folder, dtype) for name in NAMES}
            result["decode"][model] = decoding(players, new_tokens, rounds)
            result["cache"][model] = {n: cache_bytes(players, n, dtype) for n in CONTEXTS}
            result["prefill"][model] = prefill(players, rounds)
            del players
            result["memory"][model] = {T: {name: peak(name, folder, dtype, T) for name in NAMES[1:]}
                                      for T in LENGTHS}
    result["layer"] = one_query(dtype, rounds)
    report(result, name_of(dtype))
    if plot:
        draw(result, name_of(dtype), plot)
    return result


def prompt(T):
    return torch.randint(1, 50000, (1, T), generator=torch.Generator().manual_seed(0))


def by_turns(points, runs_at, rounds):
    """{point: {name: figures}}.

    In each round every name is measured at every point, so that a minute in which the machine is
    slow changes all points and makes no bump in a curve.
    """
    runs = {(point, name): run for point in points for name, run in runs_at(point).items()}
    result = {point: {} for point in points}
    for (point, name), figures in in_turns(runs, rounds).items():
        result[point][name] = figures
    return result


def decoding(players, new_tokens, rounds):
    """Seconds a token at each context."""
    def runs_at(context):
        # A shallow copy shares the weights and has a cache, and a compiled step, of its own.
        filled = {name: copy.copy(player) for name, player in players.items()}
        for player in filled.values():
            player.fill_cache(prompt(context), new_tokens)
        return {name: lambda p=p: statistics.median(p.decode(new_tokens))
                for name, p in filled.items()}
    return by_turns(CONTEXTS, runs_at, rounds)


def cache_bytes(players, context, dtype):
    """Bytes of keys and values after so many tokens, in a cache with just enough room."""
    players["transformers"].fill_cache(prompt(context), 0)
    layers = players["transformers"].cache.layers
    theirs = sum(x.nbytes for layer in layers for x in (layer.keys, layer.values))
    return {"ours": KVCache(players["ours"].model.config, 1, context, dtype).nbytes,
            "transformers": theirs}


def prefill(players, rounds):
    """Seconds of a prompt of each length; compiling changes nothing there."""
    def runs_at(T):
        return {name: seconds(lambda p=players[name]: p.prefill(prompt(T))) for name in NAMES[1:]}
    return by_turns(LENGTHS, runs_at, rounds)


PREFILL = """
from benchmarks.competitors import competitor
from benchmarks.growth import prompt
competitor({name!r}, {folder!r}, torch.{dtype}).prefill(prompt({T}))
"""


def peak(name, folder, dtype, T):
    """Peak bytes of a process that loads the model and prefills a prompt."""
    return in_fresh_process(PREFILL.format(name=name, folder=folder, dtype=name_of(dtype), T=T))


def one_query(dtype, rounds, heads=12, width=64, window=256):
    """Seconds of one query's attention over the cache of a global and of a local layer."""
    q = torch.randn(1, heads, 1, width).to(dtype)

    def runs_at(context):
        caches = {kind: torch.randn(1, heads, n, width).to(dtype) for kind, n in
                  (("global", context), ("local", min(window, context)))}
        return {kind: seconds(lambda k=k: [attention(q, k, k, scale=1.0) for _ in range(50)])
                for kind, k in caches.items()}

    result = by_turns(CONTEXTS, runs_at, max(rounds, 5))
    return {n: {kind: [x / 50 for x in values] for kind, values in kinds.items()}
            for n, kinds in result.items()}


def report(result, dtype):
    """The same as tables."""
    middle = statistics.median
    for model in MODELS:
        print(f"\ndecoding, {model} shape, {dtype}\n| context | "
              + " | ".join(f"{name}, ms a token" for name in NAMES)
              + " | times as fast, compiled / plain | cache, MB, ours / theirs |\n|---|"
              + "---|" * (len(NAMES) + 2))
        for n, figures in result["decode"][model].items():
            cache = result["cache"][model][n]
            print(f"| {n} | " + " | ".join(f"{1e3 * middle(figures[name]):.1f}" for name in NAMES)
                  + f" | {ratio(figures, 'compiled', 'transformers'):.2f}"
                  f" / {ratio(figures, 'ours', 'transformers'):.2f}"
                  f" | {cache['ours'] / 1e6:.1f} / {cache['transformers'] / 1e6:.1f} |")
        print(f"\nprefill, {model} shape, {dtype}\n"
              "| tokens | ours, s | transformers, s | times as fast | peak, MB, ours / theirs |"
              "\n|---|---|---|---|---|")
        for T, figures in result["prefill"][model].items():
            peaks = result["memory"][model][T]
            print(f"| {T} | {middle(figures['ours']):.3f} | "
                  f"{middle(figures['transformers']):.3f} | "
                  f"{ratio(figures, 'ours', 'transformers'):.2f} | "
                  f"{peaks['ours'] / 1e6:.0f} / {peaks['transformers'] / 1e6:.0f} |")
    print(f"\none query's attention, 12 heads 64 wide, {dtype}\n"
          "| context | global layer, µs | local layer, µs |\n|---|---|---|")
    for n, figures in result["layer"].items():
        both = (f"{1e6 * middle(figures[kind]):.0f}" for kind in ("global", "local"))
        print(f"| {n} | " + " | ".join(both) + " |")


def draw(result, dtype, prefix):
    """prefix/decode.png and prefix/prefill.png: speed on the left, memory on the right."""
    plt = pyplot()
    Path(prefix).mkdir(parents=True, exist_ok=True)
    middle = statistics.median
    pages = {"decode": ("decoding", "context, tokens", "tokens a second", lambda x: 1 / middle(x),
                        "cache",
                        "keys and values, MB"),
             "prefill": ("prefill", "prompt, tokens", "seconds", middle, "memory",
                         "peak memory of the process, MB")}
    for page, (doing, x_label, y_label, shown, bytes_of, bytes_label) in pages.items():
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for model, line in MODELS.items():
            for name in NAMES:
                for axes, what, value in ((left, page, shown),
                                          (right, bytes_of, lambda x: x / 1e6)):
                    rows = result[what][model]
                    if name in next(iter(rows.values())):
                        axes.plot(list(rows), [value(figures[name]) for figures in rows.values()],
                                  line, marker="o",
                                  markersize=3, color=COLOURS[name], label=f"{model}, {name}")
        for axes, label in ((left, y_label), (right, bytes_label)):
            axes.set(xlabel=x_label, ylabel=label, ylim=(0, None))
            axes.grid(alpha=0.3)
        figure.suptitle(f"{doing}, {dtype}, {torch.get_num_threads()} CPU threads")
        handles = {h.get_label(): h for axes in (left, right) for h in axes.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3,
                      frameon=False)
        figure.savefig(f"{prefix}/{page}.png", dpi=110)
        plt.close(figure)
        print(f"wrote {prefix}/{page}.png")
