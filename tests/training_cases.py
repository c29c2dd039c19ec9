"""What the tests of train.py share: texts that can be learned, small checkpoints, ways to run it."""

import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

import train
from conftest import ROOT
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


def run(arguments, stop_with=None, after=0):
    """train.py in a process of its own; with stop_with, that signal once `after` lines are logged."""
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if stop_with:
        wait_for_lines(arguments[arguments.index("--out") + 1], after, process)
        process.send_signal(stop_with)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def wait_for_lines(out, count, process):
    """Until that many lines are in the log of the run, or the process has ended."""
    log = Path(f"{out}.run", "metrics.jsonl")
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= count):
        time.sleep(0.002)


def metrics(out):
    lines = Path(f"{out}.run", "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def refused(capsys, arguments):
    """The one line that train.py says when it refuses."""
    assert train.main(list(map(str, arguments))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("train.py: error: ") and err.count("\n") == 1, err
    return err
