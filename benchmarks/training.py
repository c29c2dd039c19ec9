"""One training step, beside transformers: forward, backward, AdamW.

    python benchmark.py train --rounds 3                       2 texts of 1024 tokens

Times are taken by turns in one process.  Each peak of memory is that of a process of its own, with
weights, gradients and the optimizer's two moments.
"""

import statistics
import tempfile

import torch

from benchmarks.common import in_fresh_process, in_turns, name_of, ratio, seconds
from benchmarks.competitors import competitor
from benchmarks.shapes import write

B, T = 2, 1024
NAMES = ("ours", "transformers")


def trainer(name, folder, dtype):
    """A function that does one step on the same random text, and returns its loss."""
    model = competitor(name, folder, dtype).model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(1, 50000, (B, T), generator=torch.Generator().manual_seed(0))

    def step():
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


STEPS = """
from benchmarks.training import trainer
step = trainer({name!r}, {folder!r}, torch.{dtype})
step(), step()
"""


def run(model, dtype, rounds):
    dtype = getattr(torch, dtype or "float32")
    with tempfile.TemporaryDirectory() as folder:
        write(model, folder, dtype)
        peaks = {name: in_fresh_process(STEPS.format(name=name, folder=folder,
                                                     dtype=name_of(dtype)))
                 for name in NAMES}
        steps = {name: trainer(name, folder, dtype) for name in NAMES}
        times = in_turns({name: seconds(step) for name, step in steps.items()}, rounds)
    print(f"\na training step of {B} × {T} tokens, {model} shape, {name_of(dtype)}")
    for name in NAMES:
        spread = f"({min(times[name]):.2f} to {max(times[name]):.2f})"
        print(f"  {name:14s} {statistics.median(times[name]):6.2f} s {spread}   "
              f"peak {peaks[name] / 1e6:6.0f} MB")
    print(f"  {ratio(times, 'ours', 'transformers'):.2f} times as fast, "
          f"{peaks['ours'] / peaks['transformers']:.2f} of the peak memory")
    return {"seconds": times, "peak bytes": peaks}
