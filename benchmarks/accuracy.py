"""What is lost when weights are rounded to 8 or 4 bits.

    make .venv/texts                                       (Shakespeare's plays)
    python benchmark.py accuracy --texts .venv/texts

Each quantized model is compared with the model that it was made from, on Macbeth and Twelfth Night,
which the demo checkpoints have not read, and on random tokens for a random model of pythia-160m's
shape.  For every token, given those before it in a window:

    error    norm of the logits' difference over the norm of the logits, of all tokens together
    KL       mean Kullback-Leibler divergence between the next-token distributions, in nats
    top-1    share of positions at which both models predict the same most likely next token
    bits     bits per byte of the text, before and after
"""

import math
import tempfile

import torch
import torch.nn.functional as F

from benchmarks.common import ROOT
from benchmarks.shapes import write
from load_weights import AutoModelForCausalLM, AutoTokenizer
from quantize import BITS
from score import window_and_stride, windows
from tokenizer import token_bytes
from training.prepare_shakespeare import HELD_OUT, read_plays

DEMOS = ("demo-neo", "demo-neox")


@torch.no_grad()
def differences(whole, other, ids):
    """Compare `other` with `whole` on the text ids (N,), cut into windows as in score.py."""
    sums = torch.zeros(6, dtype=torch.float64)
    for begin, first, end in windows(len(ids), *window_and_stride(whole.config)):
        a, b = (model(ids[None, begin:end - 1], logits_to_keep=end - first).logits[0].float()
                for model in (whole, other))                                   # (end - first, V)
        p, q, targets = a.log_softmax(-1), b.log_softmax(-1), ids[first:end]
        sums += torch.stack([(a - b).square().sum(), a.square().sum(), (p.exp() * (p - q)).sum(),
                             (a.argmax(-1) == b.argmax(-1)).sum(),
                             F.nll_loss(p, targets, reduction="sum"),
                             F.nll_loss(q, targets, reduction="sum")]).double()
    difference, norm, kl, same, *losses = sums.tolist()
    n = len(ids) - 1
    return {"error": math.sqrt(difference / norm), "KL": kl / n, "top-1": same / n, "nats": losses}


def rows_for(name, folder, texts):
    """One row of the table for each kind of integers.

    texts: pairs of a list of ids and the number of bytes that they stand for (0: not a text).
    """
    whole = AutoModelForCausalLM.from_pretrained(folder)
    for kind in BITS:
        other = AutoModelForCausalLM.from_pretrained(folder, weights=kind)
        parts = [(differences(whole, other, torch.tensor(ids)), len(ids) - 1, size)
                 for ids, size in texts]
        n, size = (sum(part[i] for part in parts) for i in (1, 2))
        row = {key: sum(part[0][key] * part[1] for part in parts) / n
               for key in ("error", "KL", "top-1")}
        nats = [sum(part[0]["nats"][i] for part in parts) for i in (0, 1)]
        bits = [x / math.log(2) / size for x in nats] if size else []
        print(f"| {name} | {kind} | {row['error']:.1e} | {row['KL']:.1e} | {row['top-1']:.3f} | "
              f"{' → '.join(f'{x:.4f}' for x in bits) or '–'} |", flush=True)
        yield kind, row | {"bits": bits}


def run(texts):
    plays = read_plays(texts)
    result = {}
    print("| model | weights | error of the logits | KL, nats | same likeliest token "
          "| bits per byte |\n|---|---|---|---|---|---|")
    for name in DEMOS:
        folder = ROOT / "checkpoints" / name
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoded = [tokenizer.encode(plays[play]) for play in sorted(HELD_OUT)]
        sizes = [sum(len(token_bytes(token)) for token in tokenizer.convert_ids_to_tokens(ids[1:]))
                 for ids in encoded]
        result[name] = dict(rows_for(name, folder, [*zip(encoded, sizes)]))
    with tempfile.TemporaryDirectory() as folder:
        write("pythia-160m", folder)
        ids = torch.randint(1, 50000, (400,), generator=torch.Generator().manual_seed(0)).tolist()
        rows = rows_for("random, pythia-160m's shape", folder, [(ids, 0)])
        result["pythia-160m"] = dict(rows)
    return result
