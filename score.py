"""How likely a text is to a model, and which token it expects next.

    python generate.py --score FILE                  loss, bits per byte and perplexity of a text
    python generate.py --top 5 "To be, or not to"    the likeliest next tokens

    N  tokens of the text · L  window · S  stride · V  vocabulary

A model sees at most L tokens, so a window of L slides over a longer text, S tokens at a time, and
each window evaluates the tokens that no window before it has evaluated:

    0 1 2 3 4 5 6 7                    L = 8, S = 4: the first window evaluates 1 to 7,
            · · · · 8 9 10 11          the second 8 to 11, and token 8 is given four tokens

Every token but the first, which has nothing before it, is evaluated once, given at least L - S
tokens (one if S = L).  A smaller stride gives each token more context and needs more forward
passes, N / S of them.  The windows are those of transformers' documentation, "Perplexity of
fixed-length models"; the average computed there leaves out one token of every window after the
first.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from commands import not_a_command
from tokenizer import token_bytes

SLICE = 256                                            # rows of logits that become float32 at once


@dataclass
class Score:
    """What evaluating a text gives."""
    loss: float                 # mean cross entropy of a token given those before it (nats)
    bits_per_byte: float        # the same for a byte, in bits: comparable between tokenizers
    perplexity: float           # exp(loss)
    tokens: int                 # evaluated: all but the first
    bytes: int                  # UTF-8 bytes that these tokens stand for


def windows(N, L, S):
    """Yield (begin, first, end): the window ids[begin:end] evaluates ids[first:end]."""
    first = 1
    for start in range(0, N, S):
        end = min(start + L, N)
        if end > first:
            yield min(start, first - 1), first, end    # where S = L: the token before it too
            first = end


def window_and_stride(config, stride=None):
    """(L, S): the number of the model's positions, and the stride, half of it unless given.

    Raises ValueError for a stride outside 1 … L.
    """
    L = config.max_position_embeddings
    S = max(1, L // 2) if stride is None else stride
    if not 1 <= S <= L:
        raise ValueError(f"the stride must be 1 to {L}, the tokens that this model sees at once, "
                         f"got {S}")
    return L, S


@torch.no_grad()
def log_probs(model, ids, stride=None):
    """Log-probability of each token but the first, given those before it in its window.

    model: a causal language model in eval mode.  ids (N,) int64, on its device -> (N - 1,), in the
    logits' dtype but at least float32.
    Raises ValueError for fewer than two ids, ids outside the vocabulary, a stride outside 1 … L.
    """
    L, S = window_and_stride(model.config, stride)
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} token: nothing stands before the first, so two "
                         "are needed")
    parts, steps = [], [*windows(len(ids), L, S)]
    for begin, first, end in tqdm(steps, desc="evaluating", unit=" windows", leave=False,
                                  disable=None):
        out = model(ids[None, begin:end - 1], logits_to_keep=end - first)  # the last has no next
        for rows, targets in zip(out.logits[0].split(SLICE), ids[first:end].split(SLICE)):
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))             # (SLICE, V)
            parts.append(-F.cross_entropy(rows, targets, reduction="none"))
        del out                                        # before the next window's logits are made
    return torch.cat(parts)


def score_text(model, tokenizer, text, stride=None):
    """The Score of a text.  Bytes are counted from the evaluated tokens themselves.

    model, stride: as for `log_probs`, whose errors it raises.
    """
    ids = tokenizer.encode(text)
    ids_tensor = torch.tensor(ids, dtype=torch.long, device=model.device)              # (N,)
    log_p = log_probs(model, ids_tensor, stride)                                       # (N - 1,)
    loss = -log_p.double().mean()
    size = sum(len(token_bytes(token)) for token in tokenizer.convert_ids_to_tokens(ids[1:]))
    bits = loss.item() * len(log_p) / math.log(2)
    return Score(loss.item(), bits / size, loss.exp().item(), len(log_p), size)


@torch.no_grad()
def likeliest(model, tokenizer, prompt, count):
    """The `count` likeliest next tokens after a prompt: [(probability, id, text as shown), …].

    Probabilities are the softmax over all V rows of the matrix.  Rows without a token, which only
    round up its size, are left out of the list, as generate.py never chooses them.
    Raises ValueError for an empty prompt and for one of more tokens than the model has positions.
    """
    ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.long, device=model.device)
    logits = model(ids, logits_to_keep=1).logits[0, -1]                                # (V,)
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    order = p.argsort(descending=True, stable=True).tolist()
    ranked = ((p[id].item(), id, shown(token)) for id in order
              if (token := tokenizer.convert_ids_to_tokens(id)) is not None)
    return [*itertools.islice(ranked, min(count, len(p)))]


def shown(token):
    """A token as Python writes it: 'text', or b'bytes' if it is only a part of a character."""
    try:
        return repr(token_bytes(token).decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token_bytes(token))


if __name__ == "__main__":
    not_a_command("python generate.py --score FILE, or --top N")
