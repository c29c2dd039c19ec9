"""What every benchmark needs: a clock, turns, a process of its own, and colours."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from pictures import BLUE, GREEN, ORANGE, PINK, RED

ROOT = Path(__file__).resolve().parent.parent

# The same in all pictures.
COLOURS = {"ours": BLUE, "compiled": GREEN, "transformers": RED, "llama.cpp": PINK,
           "naive": BLUE, "sdpa": ORANGE, "triton": GREEN, "flash": RED, "flex": PINK}


def name_of(dtype):
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def seconds(function):
    """A function that runs `function` and returns how many seconds it took."""
    def run():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    return run


def in_turns(runs, rounds):
    """{name: function that measures} -> {name: its figures}; in each round each measures once."""
    figures = {name: [] for name in runs}
    for i in range(rounds + 1):                            # the first round warms up
        for name, run in runs.items():
            figure = run()
            if i:
                figures[name].append(figure)
    return figures


def ratio(figures, name, base):
    """How many times as fast `name` is as `base`, taken turn by turn: the median."""
    return statistics.median(b / a for a, b in zip(figures[name], figures[base]))


FRESH_PROCESS = """
import json, sys, time, torch
sys.path.insert(0, {root!r})
from generate import peak_memory
def peak():
    return peak_memory(torch.device("cpu"))
{code}
print(json.dumps({result}))
"""


def in_fresh_process(code, result="peak()"):
    """Run code in a new Python process; returns the value that the expression `result` has there.

    By default that is the peak of its memory in bytes.  A peak never goes down, so each measurement
    needs a process that did nothing else.
    """
    script = FRESH_PROCESS.format(root=str(ROOT), code=code, result=result)
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True,
                          text=True)
    return json.loads(done.stdout.splitlines()[-1])
