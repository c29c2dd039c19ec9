"""Prefill and decoding, beside transformers and llama.cpp in one run.

    python benchmark.py prefill --dtype bfloat16     a prompt of 2048 tokens
    python benchmark.py decode --contexts 16 1900    one token more, at a context
    python benchmark.py batch                        tokens a second of 1, 4, 16 rows
    python benchmark.py memory                       peak of a process: 1984 tokens, 64 new ones
    python benchmark.py ceilings                     how fast it can read and multiply

All take turns within one run, because the speed of a machine drifts; ratios are taken turn by turn,
and the median is reported.  The floor is the least possible time: the bytes of weights and cache
divided by the read bandwidth, or the operations divided by the speed of a matrix product, both
measured just before.  The "share of the floor" is this least time divided by the measured time.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

import quantize
from benchmarks.common import COLOURS, in_fresh_process, in_turns, name_of, ratio, seconds
from benchmarks.competitors import competitor
from benchmarks.shapes import SHAPES, write
from fast.linear import few_rows
from fast.step import one_row
from pictures import pyplot
from quantize import BITS, QuantizedLinear


def competitors(model, against, *ours):
    """Names to compare: ours, and those of --against that can run this shape."""
    wanted = [x for x in (against or "transformers").split(",") if x]
    unknown = set(wanted) - {"transformers", "llama.cpp"}
    if unknown:
        raise SystemExit(f"--against knows transformers and llama.cpp, not {', '.join(unknown)}")
    if "llama.cpp" in wanted and model.startswith("gpt-neo-"):
        print("llama.cpp has no GPT-Neo: left out")
        wanted.remove("llama.cpp")
    return [*ours, *wanted]


def bandwidth(size=600e6):
    """Bytes a second that torch reads: the best of several sums over a large tensor."""
    x = torch.ones(int(size / 4))
    x.sum()
    return x.nbytes / min(seconds(x.sum)() for _ in range(7))


def matrix_rate(dtype):
    """Operations a second of a product of the prefill's own size."""
    a, b = torch.randn(2048, 768).to(dtype), torch.randn(768, 3072).to(dtype)
    a @ b
    return 2 * 2048 * 768 * 3072 / min(seconds(lambda: a @ b)() for _ in range(15))


def bytes_of_a_step(config, context, dtype):
    """Bytes that decoding one token must read: every matrix, and the keys and values in view."""
    C, V, size = config.hidden_size, config.vocab_size, torch.finfo(dtype).bits // 8
    inner = config.intermediate_size or 4 * C
    weights = config.num_hidden_layers * (4 * C * C + 2 * C * inner) + C * V
    slots = sum(context if window is None else min(window, context) for window in config.windows)
    return size * (weights + 2 * C * slots)


def operations_of_a_prefill(config, T):
    """Multiplications and additions of a prefill of T tokens with the logits of the last one.

    They are those of the matrices, and of scores and weighted sums within each layer's window.
    """
    C, inner = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
    pairs = sum(sum(min(i + 1, window or T) for i in range(T)) for window in config.windows)
    matrices = T * config.num_hidden_layers * (4 * C * C + 2 * C * inner) + C * config.vocab_size
    return 2 * matrices + 4 * C * pairs


def row(label, figures, names, unit, shown, extra):
    """One line for each competitor: median, spread, how we compare, and its share of the floor."""
    mine = [name for name in names if name in ("ours", "compiled")]
    print(f"\n{label}")
    print(f"| | {unit} | from – to | {' / '.join(mine)}: times as fast as this row "
          "| share of the floor |")
    print("|---|---|---|---|---|")
    for name in names:
        values = sorted(shown(x) for x in figures[name])
        versus = " / ".join(f"{ratio(figures, x, name):.2f}" for x in mine)
        spread = f"{values[0]:.2f} – {values[-1]:.2f}"
        print(f"| {name} | {statistics.median(values):.2f} | {spread} | {versus} | "
              f"{extra(statistics.median(figures[name])):.0%} |", flush=True)


def prefill(model, against, dtype, rounds, tokens, lengths, plot):
    """A prompt of --tokens, without a cache; only the last token's logits, as for generation."""
    dtype = getattr(torch, dtype or "float32")
    config, rate = SHAPES[model], matrix_rate(dtype)
    names, result = competitors(model, against, "ours"), {}
    with tempfile.TemporaryDirectory() as folder:
        write(model, folder)
        players = {name: competitor(name, folder, dtype) for name in names}
        for T in lengths or [tokens]:
            ids = torch.randint(1, 50000, (1, T), generator=torch.Generator().manual_seed(0))
            runs = {name: seconds(lambda p=p: p.prefill(ids)) for name, p in players.items()}
            figures = in_turns(runs, rounds)
            floor = operations_of_a_prefill(config, T) / rate
            row(f"prefill of {T} tokens, {model} shape, {name_of(dtype)}", figures, names,
                "seconds", lambda x: x, lambda x: floor / x)
            result[T] = figures
    if plot:
        draw(result, names, f"{model} shape, {name_of(dtype)}: prefill", "T, tokens of the prompt",
             "seconds", lambda x: x, plot)
    return result


def decode(model, against, dtype, rounds, contexts, new_tokens, plot):
    """One more token at each context, greedily, --new-tokens a turn."""
    dtype = getattr(torch, dtype or "float32")
    config, read = SHAPES[model], bandwidth()
    names, result = competitors(model, against, "ours", "compiled"), {}
    print(f"read bandwidth {read / 1e9:.1f} GB/s")
    with tempfile.TemporaryDirectory() as folder:
        write(model, folder)
        players = {name: competitor(name, folder, dtype) for name in names}
        for context in contexts:
            ids = torch.randint(1, 50000, (1, context), generator=torch.Generator().manual_seed(0))
            for player in players.values():
                player.fill_cache(ids, new_tokens)
            runs = {name: lambda p=p: statistics.median(p.decode(new_tokens))
                    for name, p in players.items()}
            figures = in_turns(runs, rounds)
            floor = bytes_of_a_step(config, context, dtype) / read
            row(f"decoding at context {context}, {model} shape, {name_of(dtype)}", figures, names,
                "tokens/s", lambda x: 1 / x, lambda x: floor / x)
            result[context] = figures
    if plot:
        draw(result, names, f"{model} shape, {name_of(dtype)}: decoding", "context, tokens",
             "tokens a second", lambda x: 1 / x, plot)
    return result


def batch(model, dtype, rounds, new_tokens):
    """Tokens a second of 1, 4 and 16 rows of mixed length, left-padded, plain and compiled."""
    dtype = getattr(torch, dtype or "float32")
    with tempfile.TemporaryDirectory() as folder:
        write(model, folder)
        players = {name: competitor(name, folder, dtype)
                   for name in ("ours", "compiled", "transformers")}
        figures = {}
        for B in (1, 4, 16):
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(1, 50000, (B, 64), generator=generator)
            mask = torch.arange(64) >= torch.randint(0, 60, (B, 1), generator=generator)
            mask[0] = True
            runs = {name: (lambda p=p, c=(name == "compiled"):
                           generate_seconds(p, ids, mask.long(), new_tokens, c))
                    for name, p in players.items()}
            figures[B] = in_turns(runs, rounds)
        print(f"\n{new_tokens} new tokens after prompts of 4 to 64, {model} shape, "
              f"{name_of(dtype)}: tokens/s of all rows")
        print("| rows | " + " | ".join(players) + " |\n|---|" + "---|" * len(players))
        for B, times in figures.items():
            cells = (f"{statistics.median(B / x for x in times[name]):.0f}" for name in players)
            print(f"| {B} | " + " | ".join(cells) + " |")
    return figures


def generate_seconds(player, ids, mask, n, compile):
    """Seconds for each token of generate(), without the prefill.

    They are the difference between n + 1 new tokens and one, divided by n.
    """
    how = dict(attention_mask=mask, do_sample=False, eos_token_id=None, pad_token_id=0)
    if compile:
        how["compile"] = True
    times = []
    for new in (1, n + 1):
        start = time.perf_counter()
        if type(player).__name__ == "Transformers":
            player.model.generation_config.eos_token_id = None
            player.model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0,
                                  max_new_tokens=new)
        else:
            player.model.generate(ids, max_new_tokens=new, **how)
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / n


LOAD = {
    "ours": "from load_weights import AutoModelForCausalLM as Auto\n"
            "model = Auto.from_pretrained({folder!r}, torch_dtype={dtype!r})\n",
    "transformers": "from transformers import AutoModelForCausalLM as Auto\n"
                    "model = Auto.from_pretrained({folder!r}, dtype={dtype!r})\n",
}
GENERATE = """
ids = torch.randint(1, 50000, (1, 1984), generator=torch.Generator().manual_seed(0))
model.generate(ids, max_new_tokens=64, eos_token_id=None, pad_token_id=0)
"""


def memory(model, dtype):
    """Peak of a whole process with Python and torch: from_pretrained, 1984 tokens, 64 new ones."""
    dtype = dtype or "float32"
    with tempfile.TemporaryDirectory() as folder:
        write(model, folder, getattr(torch, dtype))
        size = Path(folder, "model.safetensors").stat().st_size

        def measure(code):
            return lambda: in_fresh_process(code.format(folder=folder, dtype=dtype) + GENERATE)

        figures = in_turns({name: measure(code) for name, code in LOAD.items()}, 1)
    print(f"\npeak memory, a prompt of 1984 tokens and 64 new ones, {model} shape, {dtype} "
          f"({size / 1e6:.0f} MB of weights)")
    for name, values in figures.items():
        print(f"  {name:14s} {statistics.median(values) / 1e6:7.0f} MB   "
              f"{1 / ratio(figures, name, 'transformers'):.2f} of transformers'")
    return figures


def ceilings():
    """The two speeds behind the floors, and the product of one row and of 16 in each form."""
    result = {"read bandwidth, GB/s": bandwidth() / 1e9}
    for dtype in (torch.float32, torch.bfloat16):
        result[f"matrix product, {name_of(dtype)}, GFLOP/s"] = matrix_rate(dtype) / 1e9
        # more than any cache holds
        weights = [torch.randn(3072, 768).to(dtype) for _ in range(40)]
        for rows, title, function in ((1, "torch's linear", torch.nn.functional.linear),
                                      (1, "weight first", few_rows),
                                      (1, "multiply and sum, compiled", torch.compile(one_row)),
                                      (16, "torch's linear", torch.nn.functional.linear),
                                      (16, "weight first", few_rows)):
            x = torch.randn(rows, 768).to(dtype)
            function(x, weights[0])
            best = min(seconds(lambda: [function(x, w) for w in weights])() for _ in range(7))
            what = f"{rows} row{'s' * (rows > 1)}, {title}, {name_of(dtype)}, GB/s"
            result[what] = sum(w.nbytes for w in weights) / best / 1e9
    result |= {f"1 row, {form}, compiled, 10⁹ weights a second": rate
               for form, rate in packed_rates()}
    for name, value in result.items():
        print(f"  {name:55s} {value:7.1f}")
    return result


@torch.no_grad()
def packed_rates():
    """For each kind of integers: 10⁹ weights a second of a matrix times one row.

    The second figure is for words that are int32 to torch's compiler, as no layer has them.
    """
    x = torch.randn(1, 768)
    for kind in BITS:
        layers = [QuantizedLinear(768, 3072, False, kind) for _ in range(40)]
        for layer in layers:
            layer.words.random_(-2**31, 2**31 - 1)
            layer.scale.uniform_()
            layer.zero.uniform_()
        for form, name in ((kind, "words_as_float32"), (f"{kind} in int32 tensors", "words")):
            parts = [(getattr(layer, name), layer.scale, layer.zero, kind) for layer in layers]
            function = torch.compile(quantize.few_rows)
            function(x, *parts[0])
            best = min(seconds(lambda: [function(x, *part) for part in parts])() for _ in range(7))
            yield form, 40 * 768 * 3072 / best / 1e9


def draw(result, names, title, x_label, y_label, shown, file):
    """A line for each competitor, median with its spread."""
    figure, axes = pyplot().subplots(figsize=(7, 4), layout="constrained")
    for name in names:
        xs = list(result)
        values = [sorted(shown(x) for x in result[x_][name]) for x_ in xs]
        axes.plot(xs, [statistics.median(v) for v in values], marker="o", color=COLOURS[name],
                  label=name)
        axes.fill_between(xs, [v[0] for v in values], [v[-1] for v in values],
                          color=COLOURS[name], alpha=0.15, lw=0)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    print(f"wrote {file}")


COMMANDS = {"prefill": prefill, "decode": decode, "batch": batch, "memory": memory,
            "ceilings": ceilings}
