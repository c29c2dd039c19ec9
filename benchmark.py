"""Speed and memory, side by side with transformers in one run.

    python benchmark.py prefill         read a prompt of 2048 tokens           (benchmarks/generation.py)
    python benchmark.py decode          one token more, at contexts 16 and 1900
    python benchmark.py batch           tokens a second of 1, 4 and 16 rows
    python benchmark.py memory          peak memory of reading and writing 2048 tokens
    python benchmark.py train           one training step: time and peak memory (benchmarks/training.py)
    python benchmark.py growth          speed and memory against the length of the text, with plots
    python benchmark.py ceilings        what this machine reads and multiplies at most
    python benchmark.py load            from_pretrained and one look at every weight: time, peak memory
    python benchmark.py first-token     from the command line to the first token of text
    python benchmark.py attention       one layer through every backend (benchmarks/backends.py)
    python benchmark.py kernels         the Triton kernels compiled, without a GPU (benchmarks/kernels.py)
    python benchmark.py all             ceilings, prefill, decode, batch, memory, train, load, first-token

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
from pathlib import Path

if "kernels" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "0")         # attention.py then imports triton without a GPU

import torch

from benchmarks import backends, generation, growth, kernels, training
from benchmarks.generation import in_turns, seconds
from benchmarks.shapes import SHAPES, model_class, write
from neo import GPTNeoForCausalLM

HERE = Path(__file__).resolve().parent


def show(title, figures, unit, base="transformers"):
    """Median and spread of each, and the ratio to `base` round by round."""
    print(f"\n{title}")
    for name, values in figures.items():
        ratios = [b / v for b, v in zip(figures[base], values)]
        spread = f"({min(values):.3f} to {max(values):.3f})"
        versus = "" if name == base else f"   {statistics.median(ratios):.2f} times less than {base}"
        print(f"  {name:14s} {statistics.median(values):9.3f} {unit}  {spread}{versus}")


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
        write(args.model, folder)
        kind = model_class(SHAPES[args.model])
        small = dict(vocab_size=8, hidden_size=8, max_position_embeddings=8)
        small |= (dict(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]])
                  if kind is GPTNeoForCausalLM else
                  dict(num_hidden_layers=1, num_attention_heads=2, rotary_pct=1.0, intermediate_size=8))
        kind(kind.config_class(**small)).save_pretrained(tiny)    # to import everything
        size = os.path.getsize(f"{folder}/model.safetensors")

        def measure(name):
            code = MEASURE.format(imports=LOADERS[name], folder=folder, tiny=tiny)
            out = subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True,
                                 capture_output=True, text=True)
            return json.loads(out.stdout.splitlines()[-1])

        both = in_turns({name: lambda name=name: measure(name) for name in LOADERS}, args.rounds)
    time_figures = {name: [pair[0] for pair in pairs] for name, pairs in both.items()}
    peak_figures = {name: [pair[1] / size for pair in pairs] for name, pairs in both.items()}
    show(f"from_pretrained, {args.model} shape, float32 safetensors of {size / 1e6:.0f} MB",
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


COMMANDS = {**generation.COMMANDS, "growth": growth.run, "train": training.run, "load": load, "first-token": first_token,
            "attention": backends.run, "kernels": kernels.run}

ALL = ("ceilings", "prefill", "decode", "batch", "memory", "train", "load", "first-token")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*COMMANDS, "all"])
    parser.add_argument("--model", choices=SHAPES, default="gpt-neo-125m", help="an official shape; its weights are random")
    parser.add_argument("--against", metavar="NAMES", help="transformers (default), llama.cpp, or both with a comma")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="default float32; attention on a GPU float16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help="prefill: length of the prompt")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="T", help="prefill and attention: several lengths")
    parser.add_argument("--contexts", type=int, nargs="+", metavar="T", default=[16, 1900], help="decode")
    parser.add_argument("--new-tokens", type=int, default=24, metavar="N", help="decode and batch: tokens a turn")
    parser.add_argument("--device", help="attention: default cuda where there is one")
    parser.add_argument("--heads", type=int, default=12, help="attention")
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="attention")
    parser.add_argument("--window", type=int, default=256, metavar="W", help="attention")
    parser.add_argument("--plot", metavar="FILE", help="prefill, decode, attention: also a picture; growth: a folder for two")
    parser.add_argument("--json", metavar="FILE", help="also write every figure to a file")
    args = parser.parse_args()
    versions = (f"python {platform.python_version()}, torch {torch.__version__}, "
                f"{torch.get_num_threads()} threads")
    print(f"{processor()}, {platform.system()} {platform.machine()}, {versions}")
    chosen = ALL if args.what == "all" else [args.what]
    result = {name: COMMANDS[name](args) for name in chosen}
    if args.json:
        Path(args.json).write_text(json.dumps({"versions": versions, **result}, indent=2) + "\n")


def processor():
    """Its name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


if __name__ == "__main__":
    main()
