"""The classifier of notebooks 6 and 6b: its passages, its training loop, and its runs with other seeds.

    python notebooks/kinds.py          writes data/kinds_runs.json: five runs, about 3 minutes of one core

A seed decides how the head begins, the order of the passages, and dropout.  The notebooks run one seed
each again and compare it with the file.

    B  passages in a batch · T  tokens of a passage · C  width of the model
"""

import csv
import json
import math
import re
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from load_weights import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from score import log_probs  # noqa: E402
from training.finetune_shakespeare import acts  # noqa: E402
from training.tasks import evaluating, score_texts  # noqa: E402
from training.texts import padded  # noqa: E402

DEMO = HERE.parent / "checkpoints" / "demo-neo"
RUNS = HERE / "data" / "kinds_runs.json"
KINDS = ["comedy", "history", "tragedy"]
LONGEST = 96                                               # tokens read of each passage, to be quick
tokenizer = AutoTokenizer.from_pretrained(DEMO)
pad = tokenizer.eos_token_id                               # GPT-Neo has no token for padding alone


# ------------------------------------------------------------------------------------------------
# Passages and batches
# ------------------------------------------------------------------------------------------------

def read(part):
    """The rows of data/passages_train.csv or data/passages_valid.csv: {"text", "label", "play"}."""
    with open(HERE / "data" / f"passages_{part}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def encode(passages):
    """[(ids, class id)]: the first LONGEST tokens of each passage, and the index of its kind."""
    return [(tokenizer.encode(p["text"])[:LONGEST], KINDS.index(p["label"])) for p in passages]


def collate(rows):
    """[(ids, class id)] -> ids (B, T) and mask (B, T), padded on the right, and labels (B,)."""
    ids, labels = zip(*rows)
    return padded(ids, pad), padded([[1] * len(row) for row in ids], 0), torch.tensor(labels)


def shuffled(rows, seed, size=16):
    """All rows once, in batches, in an order that the seed decides."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [collate([rows[i] for i in order[k:k + size]]) for k in range(0, len(order), size)]


# ------------------------------------------------------------------------------------------------
# Model, training, evaluation
# ------------------------------------------------------------------------------------------------

def fresh(seed=0):
    """The demo checkpoint's backbone with a new head, which the seed decides."""
    torch.manual_seed(seed)
    with warnings.catch_warnings(record=True) as said:
        model = AutoModelForSequenceClassification.from_pretrained(
            DEMO, id2label=dict(enumerate(KINDS)), pad_token_id=pad)
    print("warning:", str(said[0].message).replace(f"{HERE.parent}", ".."))
    return model


def finetune(model, batches, lr):
    """One step for each batch (ids, mask, labels); returns losses and gradient norms (steps, 2)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    log = []
    model.train()                                          # dropout on
    for step, (ids, mask, labels) in enumerate(batches):
        for group in optimizer.param_groups:               # six steps of warm-up, then down to 0
            group["lr"] = lr * min((step + 1) / 6, 1 - step / len(batches))
        loss = model(ids, mask, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append((loss.item(), norm.item()))
    model.eval()                                           # dropout off
    return torch.tensor(log)


def evaluate(model, rows):
    """The mean loss, and the class ids that the model answers (texts,)."""
    nats, found = 0.0, []
    with evaluating(model, "float32"):
        for i in range(0, len(rows), 24):
            ids, mask, labels = collate(rows[i:i + 24])
            out = model(ids, mask, labels=labels)
            nats += out.loss.item() * len(labels)
            found.append(out.logits.argmax(-1))
    return nats / len(rows), torch.cat(found)


# ------------------------------------------------------------------------------------------------
# A head on the frozen backbone
# ------------------------------------------------------------------------------------------------

def states(model, rows):
    """The backbone's output for each token (texts, LONGEST, C), with ids and labels."""
    with evaluating(model, "float32"):
        ids, mask, labels = collate(rows)
        parts = [model.transformer(*part) for part in zip(ids.split(24), mask.split(24))]
    return torch.cat([part.last_hidden_state for part in parts]), ids, labels


def last(model, x, ids):
    """The vector of each text's last token: x (texts, T, C), ids (texts, T) -> (texts, C)."""
    return x[torch.arange(len(x)), model.last_token(ids)]


def train_head(train, valid, lr=3e-3, steps=150, seed=0):
    """Train a head on (vectors (texts, C), labels (texts,)); returns it and its history.

    The history (steps, 2, 2) has loss and accuracy, of the training texts and of the others.
    """
    torch.manual_seed(seed)
    head, history = torch.nn.Linear(train[0].size(1), len(KINDS), bias=False), []
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    for _ in range(steps):
        F.cross_entropy(head(train[0]), train[1]).backward()
        optimizer.step()
        optimizer.zero_grad()                              # or the gradients would add up
        with torch.no_grad():
            scores = [(head(x), y) for x, y in (train, valid)]
            history.append([(F.cross_entropy(z, y).item(), (z.argmax(-1) == y).float().mean().item())
                            for z, y in scores])
    return head, torch.tensor(history)


# ------------------------------------------------------------------------------------------------
# A language model that reads on
# ------------------------------------------------------------------------------------------------

def read_on(seed):
    """demo-neo after 24 batches of four windows from acts 1 to 4 of Macbeth; (model, act 5)."""
    *first, final = acts((HERE / "data" / "macbeth.txt").read_text(encoding="utf-8"))
    ids = torch.tensor(tokenizer.encode("".join(first)))
    windows = ids[:len(ids) // 128 * 128].view(-1, 128)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:96]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    finetune(model, [(part, None, part) for part in windows[order].split(4)], 3e-4)
    return model, final


def gains(before, after, text):
    """What each token but the first gained, in bits (tokens - 1,); its text; and whether it is a name.

    A name is a token within a word in capitals, as the speakers' names are written.
    """
    ids = tokenizer.encode(text)
    pieces, place, names = [tokenizer.decode([i]) for i in ids], 0, []
    capitals = [word.span() for word in re.finditer(r"\b[A-Z]{2,}\b", text)]
    for piece in pieces:
        end = place + len(piece)
        names.append(any(a < end and place < b for a, b in capitals))
        place = end
    nats = log_probs(after, torch.tensor(ids)) - log_probs(before, torch.tensor(ids))
    return nats / math.log(2), pieces[1:], torch.tensor(names[1:])


# ------------------------------------------------------------------------------------------------
# The stored runs
# ------------------------------------------------------------------------------------------------

def one_run(seed, train, valid):
    """All weights trained with a seed: the loss and the answers for the held-out passages, one digit each."""
    model = fresh(seed)
    finetune(model, shuffled(encode(train), seed), 3e-4)
    flat = [p | {"text": p["text"].replace("\n", " ")} for p in valid]
    found = {"all weights": evaluate(model, encode(valid)), "without line breaks": evaluate(model, encode(flat))}
    lm, final = read_on(seed)
    after = score_texts(lm, [final], tokenizer, context=128)
    bits, _, name = gains(AutoModelForCausalLM.from_pretrained(DEMO), lm, final)
    after |= {"bits gained in names": bits[name].mean().item(), "bits gained elsewhere": bits[~name].mean().item()}
    act = ("perplexity", "bits_per_byte", "bits gained in names", "bits gained elsewhere")
    return {"seed": seed, "act 5": {name: after[name] for name in act}} | {
        name: {"loss": loss, "answers": "".join(map(str, ids.tolist()))} for name, (loss, ids) in found.items()}


def main():
    torch.set_num_threads(1)
    train, valid = read("train"), read("valid")
    runs = [one_run(seed, train, valid) for seed in range(5)]
    text = json.dumps(runs, indent=1)
    RUNS.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
