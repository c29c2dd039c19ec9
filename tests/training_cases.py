"""What the tests of train.py share: texts that can be learned, small checkpoints, ways to run it."""

import csv
import json
import multiprocessing.forkserver
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import train
from conftest import ROOT
from processes import rank
from training.model import new_model
from training.new_tokenizer import new_tokenizer

TASKS = ["lm", "classify"]
SHAPE = dict(hidden_size=32, layers=2, heads=2, window=8, vocab_size=320)


def nonsense(seed, lines):
    """Words in a fixed order of kinds: most of it can be predicted, but not by counting tokens."""
    draw = random.Random(seed).choice
    kinds = [["the", "a", "every"], ["queen", "porter", "fool", "messenger", "gentleman"],
             ["   sees", "   hears", "   remembers", "   follows"], ["Zoë,\n", "nobody.\n", "Birnam wood!\n"]]
    return "".join(" ".join(map(draw, kinds)) for _ in range(lines))


def examples(seed, count):
    """(text, label): one to three lines, and whether the last is about nobody, Zoë or a wood."""
    draw = random.Random(seed).randint
    texts = [nonsense(1000 * seed + i, draw(1, 3)) for i in range(count)]
    return [(text, {"n": "nobody", "Z": "Zoë", "B": "wood"}[text[:-1].split("  ")[-1].split(" ", 1)[1][0]])
            for text in texts]


def write_examples(path, rows):
    """Rows of (text, label) as a CSV file or as JSON lines, as the name says."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            csv.writer(file).writerows([("label", "text"), *((label, text) for text, label in rows)])
        else:
            file.writelines(json.dumps(dict(text=text, label=label)) + "\n" for text, label in rows)
    return str(path)


def write_data(folder):
    """Texts, labelled texts, and small checkpoints of both families, with dropout and without."""
    (folder / "text.txt").write_text(nonsense(1, 400), encoding="utf-8")
    (folder / "held.txt").write_text(nonsense(2, 40), encoding="utf-8")
    write_examples(folder / "train.csv", examples(1, 150))
    write_examples(folder / "valid.jsonl", examples(2, 60))
    for family in ("neo", "neox"):
        tokenizer = new_tokenizer([nonsense(1, 400)], family, 320, 48)
        for dropout in (0.0, 0.1):
            torch.manual_seed(1)
            out = folder / f"{family}-{dropout}"
            new_model(family, context=48, dropout=dropout, **SHAPE).save_pretrained(out)
            tokenizer.save_pretrained(out)
    return folder


# ------------------------------------------------------------------------------------------------
# train.py in processes of its own, forked from one that has imported torch already
# ------------------------------------------------------------------------------------------------

FORKS = multiprocessing.get_context("forkserver")


def begin(arguments, logs, env=(), gradients=None, failing_rank=None):
    """A process that runs train.main; what it prints goes to logs/out and logs/err.

    gradients: where to save each step's, as PATH-RANK.pt.  failing_rank: whose third step fails.
    """
    FORKS.set_forkserver_preload(["training_cases", "torch._dynamo", "matplotlib.pyplot", "sklearn.metrics"])
    with pytest.MonkeyPatch.context() as patch:             # the server that forks finds this file
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
        multiprocessing.forkserver.ensure_running()
    process = FORKS.Process(target=child, args=(list(map(str, arguments)), str(logs), dict(env),
                                                gradients, failing_rank))
    process.start()
    return process


def child(arguments, logs, env, gradients, failing_rank):
    os.environ |= env
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(logs, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if gradients:
        watch_gradients(gradients, failing_rank)
    sys.exit(train.main(arguments))


def watch_gradients(path, failing_rank=None):
    """Save the gradients that are clipped; the third step of one process may fail."""
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def watched(parameters, largest):
        parameters = list(parameters)
        steps.append(1)
        if rank() == failing_rank and len(steps) == 3:
            raise OSError("the disk is on fire")
        torch.save(torch.cat([p.grad.reshape(-1) for p in parameters]), f"{path}-{rank()}.pt")
        return clip(parameters, largest)
    torch.nn.utils.clip_grad_norm_ = watched


def run(arguments, stop_with=None, after=0):
    """train.py; with stop_with, that signal is sent once `after` lines are logged -> status, out, err."""
    with tempfile.TemporaryDirectory() as logs:
        process = begin(arguments, logs)
        if stop_with:
            wait_for_lines(arguments[arguments.index("--out") + 1], after, process.is_alive)
            os.kill(process.pid, stop_with)
        process.join(600)
        return process.exitcode, *(Path(logs, name).read_text(encoding="utf-8") for name in ("out", "err"))


def run_two(arguments, **how):
    """train.py in two processes, with the environment that torchrun gives them -> statuses, err."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as logs:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        env = dict(TORCHELASTIC_RUN_ID="test", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
        both = [begin(arguments, logs, env | dict(RANK=str(i), LOCAL_RANK=str(i)), **how) for i in range(2)]
        for process in both:
            process.join(120)
        return [process.exitcode for process in both], Path(logs, "err").read_text(encoding="utf-8")


def torchrun(*arguments):
    """train.py by torchrun as the README has it, in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen([*command, str(ROOT / "train.py"), *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for_lines(out, count, running):
    """Until that many lines are in the log of the run, or the process has ended."""
    log = Path(f"{out}.run", "metrics.jsonl")
    while running() and not (log.exists() and log.read_bytes().count(b"\n") >= count):
        time.sleep(0.002)


# ------------------------------------------------------------------------------------------------
# What it wrote and said
# ------------------------------------------------------------------------------------------------

def metrics(out):
    lines = Path(f"{out}.run", "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def errors(err):
    """The lines of an error among what processes say."""
    return [line for line in err.split("\n") if line.startswith("train.py: error:")]


def refused(capsys, arguments):
    """The one line that train.py says when it refuses."""
    assert train.main(list(map(str, arguments))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("train.py: error: ") and err.count("\n") == 1, err
    return err
