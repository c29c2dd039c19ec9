"""One training run: the steps, the saves, and what it writes.

    Run(task, folder, settings, ...)   its model, its optimizer and its place in the data
    run.train(stopping)                steps, evaluations and saves until the end or Ctrl-C
    run.finish(out, ...)               the checkpoint and training.json
"""

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from files import write_files
from pictures import plain_label, pyplot
from processes import SharedError, gathered, processes, rank, total
from training.model import learning_rate, parameter_groups
from training.tasks import autocast, to_device


@dataclass
class Run:
    """A training run.  All that changes during it is in its saved state, so it can be killed."""

    task: object                                            # see tasks.py: its model, its batches
    folder: Path                                            # OUT.run
    settings: dict                                          # what the result depends on
    fresh: bool                                             # are the weights new?
    device: str
    dtype: str
    steps: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    accumulate: int
    eval_every: int
    save_every: int
    step: int = 0
    seconds: float = 0.0
    history: list = field(default_factory=list)

    def __post_init__(self):
        self.model = self.replica = self.task.model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, self.weight_decay, self.fresh), lr=self.lr,
            betas=(0.9, 0.95), fused=True)

    def save(self):
        """Write the state; a kill at any moment leaves the old state or the new one, whole."""
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        random = gathered([torch.get_rng_state(), *gpus])
        if rank() == 0:
            state = dict(
                settings=self.settings, step=self.step, seconds=self.seconds, history=self.history,
                model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), random=random)
            write_files(self.folder, {"state.pt": lambda path: torch.save(state, path)})

    def restore(self, state):
        """Go back to a state that `save` has written, this process's random numbers included."""
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        cpu, *gpus = state["random"][rank()]
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

    def backward(self):
        """Compute the gradients of the whole batch's mean loss; returns that loss.

        The batch is cut into one piece for each process and each turn of gradient accumulation.  A
        piece's loss is a mean, so it is weighted by the piece's share of all predicted labels.
        DistributedDataParallel averages gradients where a sum is needed, so the loss is also
        multiplied by the number of processes.
        """
        turns, batch = self.accumulate, self.task.batch(self.step)
        predicted, parts = self.task.count(batch["labels"]), turns * processes()
        cut = zip(*(tensor.tensor_split(parts) for tensor in batch.values()))
        pieces, loss = [dict(zip(batch, tensors)) for tensors in cut], 0.0
        for turn, piece in enumerate(pieces[rank() * turns : (rank() + 1) * turns]):
            share = self.task.count(piece["labels"]) / predicted
            alone = turn + 1 < turns and processes() > 1    # exchange gradients in the last turn
            with self.replica.no_sync() if alone else contextlib.nullcontext():
                with autocast(self.device, self.dtype):
                    out = self.replica(**to_device(piece, self.device))
                mean = out.loss if share else 0 * out.logits.sum()     # the mean of nothing is NaN
                (mean * (share * processes())).backward()
            loss += mean.item() * share
        return total(loss)

    def update(self):
        """One step of the optimizer; returns a dict of what to log.

        Raises SharedError where the gradient is not finite.
        """
        lr = learning_rate(self.step, self.lr, self.warmup, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        loss = self.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if not norm.isfinite():                             # in every process, once averaged
            advice = "lower --lr" if self.step else "these weights cannot be trained"
            raise SharedError(f"the gradient of step {self.step} is not finite: {advice}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return dict(step=self.step, loss=loss, lr=lr, grad_norm=norm.item())

    def train(self, stopping):
        """Train until the last step, or until Ctrl-C puts something into `stopping` somewhere."""
        began, first = time.time() - self.seconds, rank() == 0
        if processes() > 1:                                 # the same weights, gradients averaged
            self.replica = DistributedDataParallel(self.model)
        bar = tqdm(total=self.steps, initial=self.step, unit="step", disable=not first)
        metrics = self.folder / "metrics.jsonl" if first else os.devnull
        metrics = open(metrics, "w", encoding="utf-8")

        def log(record):
            metrics.write(json.dumps(record, ensure_ascii=False) + "\n")
            metrics.flush()
            return record

        with metrics, bar:
            for record in self.history:                     # what came after the last save is
                log(record)                                 # computed and logged once more
            self.model.train()
            while self.step < self.steps and not total(len(stopping)):
                self.history.append(log(self.update()))
                bar.set_postfix_str(f"loss {self.history[-1]['loss']:.3f}", refresh=False)
                bar.update()
                if first and (self.step % self.eval_every == 0 or self.step == self.steps):
                    evaluated = dict(step=self.step) | self.task.evaluate(self.model, self.dtype)
                    self.history.append(log(evaluated))
                    draw(self.history, self.task, self.folder / "loss.png")
                    bar.write(describe(evaluated), file=sys.stderr)
                self.seconds = time.time() - began
                if self.step % self.save_every == 0:
                    self.save()
            self.save()

    def finish(self, out, save_dtype, command):
        """Write the checkpoint; returns the content of training.json.

        training.json is written last, so where it is, the run is complete.
        """
        task = self.task
        self.model.to(getattr(torch, save_dtype)).save_pretrained(out)
        task.tokenizer.save_pretrained(out)
        saved = type(self.model).from_pretrained(out).to(self.device)  # from the file, as users do
        record = dict(
            command=command, settings=self.settings, steps=self.step,
            tokens=self.step * task.batch_size * task.context, seconds=round(self.seconds),
            parameters=sum(p.numel() for p in self.model.parameters()),
            threads=torch.get_num_threads(), python=sys.version.split()[0], torch=torch.__version__,
            **task.metrics(saved, "float32"))
        write_files(out, {"training.json": (json.dumps(record, indent=2) + "\n").encode()})
        return record


def draw(history, task, path):
    """Plot smoothed training loss and held-out loss; for a language model, in bits per byte."""
    try:
        plt = pyplot()
    except ImportError:                                    # optional: metrics.jsonl has the numbers
        return
    steps = [record["step"] for record in history if "loss" in record]
    losses = [record["loss"] * task.scale for record in history if "loss" in record]
    valid = [(r["step"], r[task.curve]) for r in history if task.curve in r]
    smooth, mean = [], 0.0
    for i, value in enumerate(losses):
        mean += (value - mean) / min(i + 1, 50)             # a running mean of about 50 steps
        smooth.append(mean)
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(steps, smooth, label="training, smoothed")
    if valid:
        axes.plot(*zip(*valid), "o-", markersize=3, label="held out")
    unit = task.curve.removeprefix("valid_").replace("_", " ")
    axes.set(xlabel="step", ylabel=unit, title=plain_label(path.parent.name))
    axes.grid(alpha=0.3)
    axes.legend()
    write_files(path.parent, {path.name: lambda part: figure.savefig(
        part, format="png", dpi=120, bbox_inches="tight")})
    plt.close(figure)


def describe(record):
    """One line about an evaluation, and its sample below it."""
    metrics = ", ".join(f"{name.removeprefix('valid_').replace('_', ' ')} {value:.4f}"
                        for name, value in record.items()
                        if name.startswith("valid_") and isinstance(value, float))
    held_out = f", held out: {metrics}" if metrics else ""
    sample = f"\n{record['sample']}\n" if "sample" in record else ""
    return f"step {record.get('step', record.get('steps'))}{held_out}{sample}"
