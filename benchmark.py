"""Speed and memory, side by side with transformers in one run.

    python benchmark.py prefill         read a prompt of 2048 tokens: all logits, and the last alone
    python benchmark.py load            from_pretrained and one look at every weight: time, peak memory
    python benchmark.py first-token     from the command line to the first token of text
    python benchmark.py attention       one layer through every backend (benchmarks/backends.py)
    python benchmark.py kernels         the Triton kernels compiled, without a GPU (benchmarks/kernels.py)

Both sides get the same weights (random, in an official shape), the same dtype and threads, and turns
one after the other, since machines drift; ratios are taken turn by turn.  The reference runs as its
users run it: its own default attention (eager for GPT-Neo, which has no other on a CPU; sdpa for
GPT-NeoX).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import backends, kernels
from neo import GPTNeoConfig, GPTNeoForCausalLM
from neox import GPTNeoXConfig, GPTNeoXForCausalLM

HERE = Path(__file__).resolve().parent
SHAPES = {
    "gpt-neo-125m": (GPTNeoForCausalLM, GPTNeoConfig(
        hidden_size=768, num_layers=12, num_heads=12, attention_types=[[["global", "local"], 6]])),
    "pythia-160m": (GPTNeoXForCausalLM, GPTNeoXConfig(
        vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, eos_token_id=0)),
}


def weights(shape, folder):
    """A checkpoint of an official shape with random weights, in float32."""
    torch.manual_seed(0)
    model_class, config = SHAPES[shape]
    model_class(config).save_pretrained(folder)
    return folder


def in_turns(runs, rounds):
    """{name: function that measures} -> {name: its figures}, everyone once in each round."""
    figures = {name: [] for name in runs}
    for i in range(rounds + 1):                            # the first round warms up
        for name, run in runs.items():
            figure = run()
            if i:
                figures[name].append(figure)
    return figures


def show(title, figures, unit, base="transformers"):
    """Median and spread of each, and the ratio to `base` round by round."""
    print(f"\n{title}")
    for name, values in figures.items():
        ratios = [b / v for b, v in zip(figures[base], values)]
        spread = f"({min(values):.3f} to {max(values):.3f})"
        versus = "" if name == base else f"   {statistics.median(ratios):.2f} times less than {base}"
        print(f"  {name:14s} {statistics.median(values):9.3f} {unit}  {spread}{versus}")


def seconds(function):
    """A function that runs `function` and returns how long it took."""
    def run():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    return run


# ------------------------------------------------------------------------------------------------

def prefill(args):
    """Forward pass over a long prompt, without a cache."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    dtype = getattr(torch, args.dtype or "float32")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        weights(args.shape, folder)
        ours = SHAPES[args.shape][0].from_pretrained(folder, torch_dtype=dtype)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        ids = torch.randint(0, 50000, (1, args.tokens))
        result = {}
        for keep, title in ((0, "logits of every token"), (1, "logits of the last token")):
            figures = in_turns({
                "ours": seconds(lambda: ours(ids, logits_to_keep=keep)),
                "transformers": seconds(lambda: theirs(ids, logits_to_keep=keep, use_cache=False)),
            }, args.rounds)
            show(f"prefill of {args.tokens} tokens, {args.shape} shape, {str(dtype)[6:]}, {title}",
                 figures, "s")
            result[title] = figures
    return result


LOADERS = {
    "ours": "from load_weights import AutoModelForCausalLM as Auto; "
            "load = lambda f: Auto.from_pretrained(f)",
    "transformers": "import transformers; from transformers import AutoModelForCausalLM as Auto; "
                    "transformers.utils.logging.disable_progress_bar(); "
                    "load = lambda f: Auto.from_pretrained(f, dtype='float32')",
}
# The class is imported before the clock starts: `load` is loading, not importing.
MEASURE = """
import json, time, torch
from generate import peak_memory
{imports}
load({tiny!r})
peak = lambda: peak_memory(torch.device("cpu"))
before, start = peak(), time.perf_counter()
model = load({folder!r})
total = sum(p.sum() for p in model.parameters())
print(json.dumps([time.perf_counter() - start, peak() - before]))
"""


def load(args):
    """from_pretrained in a process of its own, every weight read once; peak above the interpreter's."""
    with tempfile.TemporaryDirectory() as root:
        folder, tiny = f"{root}/whole", f"{root}/tiny"
        weights(args.shape, folder)
        model_class, _ = SHAPES[args.shape]
        small = dict(vocab_size=8, hidden_size=8, max_position_embeddings=8)
        small |= (dict(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]])
                  if model_class is GPTNeoForCausalLM else
                  dict(num_hidden_layers=1, num_attention_heads=2, rotary_pct=1.0, intermediate_size=8))
        model_class(model_class.config_class(**small)).save_pretrained(tiny)    # to import everything
        size = os.path.getsize(f"{folder}/model.safetensors")

        def measure(name):
            code = MEASURE.format(imports=LOADERS[name], folder=folder, tiny=tiny)
            out = subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True,
                                 capture_output=True, text=True)
            return json.loads(out.stdout.splitlines()[-1])

        both = in_turns({name: lambda name=name: measure(name) for name in LOADERS}, args.rounds)
    time_figures = {name: [pair[0] for pair in pairs] for name, pairs in both.items()}
    peak_figures = {name: [pair[1] / size for pair in pairs] for name, pairs in both.items()}
    show(f"from_pretrained, {args.shape} shape, float32 safetensors of {size / 1e6:.0f} MB",
         time_figures, "s")
    show("peak memory above the interpreter's, in sizes of the file", peak_figures, "×")
    return {"seconds": time_figures, "peak / file": peak_figures}


def first_token(args):
    """Whole processes: the command line with the demo checkpoint, against importing torch alone."""
    def process(*arguments):
        return seconds(lambda: subprocess.run([sys.executable, *arguments], cwd=HERE, check=True,
                                              capture_output=True))

    one_token = process("generate.py", "HAMLET.", "--max-new-tokens", "1")
    figures = in_turns({"import torch": process("-c", "import torch"), "first token": one_token},
                       args.rounds)
    show("from the command line to the first token, checkpoints/demo-neo", figures, "s",
         base="import torch")
    more = [b - a for a, b in zip(*figures.values())]
    print(f"  {'difference':14s} {statistics.median(more):9.3f} s  ({min(more):.3f} to {max(more):.3f})")
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["prefill", "load", "first-token", "attention", "kernels", "all"])
    parser.add_argument("--shape", choices=SHAPES, default="gpt-neo-125m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="default float32; attention on a GPU float16")
    parser.add_argument("--rounds", type=int, default=5)
    layer = parser.add_argument_group("attention")
    layer.add_argument("--device", help="default: cuda where there is one")
    layer.add_argument("--lengths", type=int, nargs="+", metavar="T")
    layer.add_argument("--heads", type=int, default=12)
    layer.add_argument("--head-dim", type=int, default=64, metavar="D")
    layer.add_argument("--window", type=int, default=256, metavar="W")
    layer.add_argument("--plot", metavar="FILE")
    parser.add_argument("--json", metavar="FILE", help="also write every figure to a file")
    args = parser.parse_args()
    versions = (f"python {platform.python_version()}, torch {torch.__version__}, "
                f"{torch.get_num_threads()} threads")
    print(f"{platform.system()} {platform.machine()}, {versions}")
    commands = {"prefill": prefill, "load": load, "first-token": first_token,
                "attention": backends.run, "kernels": kernels.run}
    chosen = commands if args.what == "all" else [args.what]
    result = {name: commands[name](args) for name in chosen}
    if args.json:
        Path(args.json).write_text(json.dumps({"versions": versions, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
