"""From logits to text: settings, the choice of a token, the loop that generates.

    B  rows of the batch · T  tokens so far · V  vocabulary

The loop is short: read the prompt into a KV cache, turn the last logits into a choice, feed the
chosen token back.  `choose` holds what temperature, top-k and top-p mean.  Meanings, defaults and
the order of steps are those of transformers' generate (v5.23.0, generation/utils.py and
logits_process.py), so the same seed draws the same tokens.
"""

import warnings
from dataclasses import dataclass, fields

import torch

from attention import KVCache, choose_backend
from base import check_inputs, key_mask_of


# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------

class _Unset:
    def __repr__(self):
        return "the checkpoint's, else the reference's default"


UNSET = _Unset()                                           # None has meanings of its own


@dataclass
class Settings:
    """How to generate.  The defaults are the reference's; generation_config.json goes before them."""

    do_sample: bool = False               # False: greedy, always the likeliest token
    temperature: float = 1.0              # below 1 sharpens, above 1 flattens
    top_k: int | None = 50                # only the k likeliest; 0 or None: all
    top_p: float | None = 1.0             # only the fewest that hold this much probability
    repetition_penalty: float = 1.0       # above 1 makes what already stands in the text unlikelier
    max_length: int | None = None         # prompt and continuation together
    max_new_tokens: int | None = None     # continuation alone; wins over max_length
    num_return_sequences: int = 1
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None

    @classmethod
    def of(cls, model, given):
        """Given by the caller, else by generation_config.json, else (ids only) by config.json."""
        known = {f.name: f.default for f in fields(cls)}
        for name in ("eos_token_id", "pad_token_id"):
            known[name] = getattr(model.config, name)
        stored = {k: v for k, v in model.generation_config.items() if k in known and v is not None}
        chosen = {k: v for k, v in given.items() if v is not UNSET}
        if {"max_length", "max_new_tokens"} & chosen.keys():           # a stored length gives way
            stored = {k: v for k, v in stored.items() if not k.startswith("max_")}
        settings = cls(**{**known, **stored, **chosen})
        settings.check()
        return settings

    def check(self):
        """Raise ValueError for values that mean nothing."""
        number = isinstance(self.temperature, (int, float))
        if self.do_sample and not (number and 0 < self.temperature < float("inf")):
            raise ValueError(f"temperature must be above 0, got {self.temperature} "
                             "(do_sample=False is the limit towards 0)")
        if self.do_sample and self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.do_sample and self.top_k is not None and not (self.top_k >= 0 and self.top_k % 1 == 0):
            raise ValueError("top_k must be a whole number from 1, or 0 or None for all, got "
                             f"{self.top_k}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.num_return_sequences < 1:
            raise ValueError(f"num_return_sequences must be at least 1, got {self.num_return_sequences}")
        if self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError("num_return_sequences above 1 needs do_sample=True: greedy ones are "
                             "all equal")

    @property
    def eos_ids(self):
        return self.eos_token_id if isinstance(self.eos_token_id, list) else \
            [] if self.eos_token_id is None else [self.eos_token_id]

    def total_length(self, prompt, config):
        """Tokens of prompt and continuation, or ValueError with the numbers if they cannot be."""
        if self.max_new_tokens is not None:
            total = prompt + self.max_new_tokens
            if self.max_length is not None:
                warnings.warn(f"both max_new_tokens={self.max_new_tokens} and max_length="
                              f"{self.max_length} are set; max_new_tokens wins", stacklevel=4)
        elif self.max_length is not None:
            total = self.max_length
        else:
            total = min(prompt + 20, config.max_position_embeddings)
        if total <= prompt:
            raise ValueError(f"the prompt has {prompt} tokens, which leaves nothing to generate within "
                             f"a total length of {total}")
        if config.position_limit is not None and total > config.position_limit:
            raise ValueError(f"{prompt} prompt tokens + {total - prompt} new ones = {total}, more than "
                             f"the {config.position_limit} positions that this model has learned")
        return total


# ------------------------------------------------------------------------------------------------
# From logits to a token
# ------------------------------------------------------------------------------------------------

def choose(scores, settings, generator=None):
    """One token for each row.  scores (B, V) float32 -> ids (B,)

    Sampling draws for every row, finished or not, so that the draws of the others do not depend
    on when a row ends.
    """
    if not settings.do_sample:
        return scores.argmax(-1)
    scores = scores / settings.temperature
    if settings.top_k:
        scores = keep_top_k(scores, settings.top_k)
    if settings.top_p is not None and settings.top_p < 1.0:
        scores = keep_top_p(scores, settings.top_p)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def keep_top_k(scores, k):
    """-inf for all but the k highest of each row; ties with the k-th stay.  (B, V) -> (B, V)"""
    kth = scores.topk(min(int(k), scores.size(-1))).values[:, -1:]              # (B, 1)
    return scores.masked_fill(scores < kth, float("-inf"))


def keep_top_p(scores, p):
    """-inf outside the smallest set of tokens that holds probability p.  (B, V) -> (B, V)

    From the unlikeliest up, tokens go as long as all that went is at most 1 - p together; the
    likeliest always stays.
    """
    ranked, order = scores.sort(descending=False)                          # (B, V)
    drop = ranked.softmax(-1).cumsum(-1) <= 1 - p
    drop[:, -1] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))


def penalize(scores, ids, first, penalty):
    """Push down what already stands in each row, prompt included, once however often it stands.

    scores (B, V); ids (B, T); first (B,) the row's first real slot: padding does not count.
    A negative score is multiplied, a positive one divided: both ways it falls if penalty > 1.
    """
    V = scores.size(-1)
    padding = torch.arange(ids.size(1), device=ids.device) < first[:, None]           # (B, T)
    ids = ids.masked_fill(padding, V)                                      # a column to throw away
    scores = torch.nn.functional.pad(scores, (0, 1))                       # (B, V + 1)
    seen = scores.gather(1, ids)
    seen = torch.where(seen < 0, seen * penalty, seen / penalty)
    return scores.scatter(1, ids, seen)[:, :V]


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def stream(model, input_ids, attention_mask=None, *, settings, generator=None, real_vocab=None,
           compile=False):
    """Yield the next token of every row, (B,), until all rows have ended or the length is reached.

    input_ids (B, T), padded on the left where rows differ, with attention_mask (B, T) to say where.
    A row that has ended yields pad_token_id.  real_vocab: ids from there on are never chosen (they
    are rows that only round up the size of the matrix).  compile: read the prompt as always, then
    take the compiled step of fast/step.py for each new token.
    """
    pad = settings.pad_token_id if settings.pad_token_id is not None else (settings.eos_ids or [None])[0]
    mask = infer_mask(input_ids, attention_mask, pad, settings.eos_ids)                # (B, T)
    B, T = input_ids.shape
    total = settings.total_length(T, model.config)
    first = (mask != 0).int().argmax(1)                                                # (B,)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)      # counted from the first real token
    cache = KVCache(model.config, B, total - 1, model.dtype, model.device)
    step = compiled_step(model, cache) if compile else None
    eos = torch.tensor(settings.eos_ids, device=input_ids.device, dtype=torch.long)
    done = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    shrinks = step is None and choose_backend(model.attn_implementation) != "naive"
    rows = torch.arange(B, device=input_ids.device)        # those that the model still reads
    ids, new = input_ids, input_ids
    while True:
        if step is None or not cache.length:
            logits = read(model, new, mask, position_ids, cache)
        else:
            logits = step(new, mask, position_ids)
        scores = logits.float()
        if len(rows) < B:                                  # ended rows draw too, whatever from
            scores = scores.new_zeros(B, scores.size(1)).index_copy(0, rows, scores)   # (B, V)
        if settings.repetition_penalty != 1.0:
            scores = penalize(scores, ids, first, settings.repetition_penalty)
        if real_vocab is not None:
            scores[:, real_vocab:] = float("-inf")
        token = choose(scores, settings, generator)                                    # (B,)
        if len(eos):
            token = token.masked_fill(done, pad)
            done = done | torch.isin(token, eos)
        yield token
        ids = torch.cat([ids, token[:, None]], dim=1)
        if ids.size(1) >= total or done.all():
            return
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        position_ids = position_ids[:, -1:] + 1
        if shrinks and done[rows].any():                   # no more reading for rows that have ended
            going = ~done[rows]
            cache.keep(going)
            rows, mask, position_ids = rows[going], mask[going], position_ids[going]
        new = token[rows, None]                                                        # (rows, 1)


CHUNK = 512                                                # tokens that pass through the model at once


def read(model, ids, mask, position_ids, cache):
    """Let the cache grow by ids (B, T); logits (B, V) after the last.

    A long prompt is read in chunks, so that memory does not grow with its square.  The definition
    reads it in one piece, as the reference does: its last bits depend on the shapes multiplied.
    """
    past, T = cache.length, ids.size(1)
    chunk = T if choose_backend(model.attn_implementation) == "naive" else CHUNK
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        out = model(ids[:, start:end], mask[:, :past + end], position_ids[:, start:end], cache=cache,
                    logits_to_keep=1)
    return out.logits[:, -1]


def compiled_step(model, cache):
    """fast/step.py's step; imported here, for only --compile needs torch's compiler."""
    from fast.step import Step
    return Step(model, cache)


def infer_mask(input_ids, attention_mask, pad, eos_ids):
    """attention_mask, or what the reference makes of none: padding only if it cannot be an eos."""
    if attention_mask is not None:
        return attention_mask.long()
    if pad is not None and pad not in eos_ids:
        return (input_ids != pad).long()
    return torch.ones_like(input_ids)


def generate(self, input_ids, attention_mask=None, *, do_sample=UNSET, temperature=UNSET, top_k=UNSET,
             top_p=UNSET, repetition_penalty=UNSET, max_length=UNSET, max_new_tokens=UNSET,
             num_return_sequences=UNSET, eos_token_id=UNSET, pad_token_id=UNSET, generator=None,
             compile=False):
    """Prompt and continuation as ids, (B * num_return_sequences, total); see Settings for each name.

    input_ids (B, T) integer, rows of different length padded on the left; attention_mask (B, T)
    says where.  eos_token_id: one id or several; None never stops.  With neither length given, 20
    new tokens.  generator: a torch.Generator to draw from, else torch's global one.  compile: decode
    with the compiled step of fast/step.py, which takes some seconds to make, once.
    Raises ValueError before any compute for settings that mean nothing, ids outside the vocabulary,
    an empty prompt, more positions than the model has; RuntimeError for compile=True without a C++
    compiler.
    """
    given = dict(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p,
                 repetition_penalty=repetition_penalty, max_length=max_length,
                 max_new_tokens=max_new_tokens, num_return_sequences=num_return_sequences,
                 eos_token_id=eos_token_id, pad_token_id=pad_token_id)
    settings = Settings.of(self, given)
    check_prompt(self, input_ids, attention_mask)
    n = settings.num_return_sequences
    input_ids = input_ids.repeat_interleave(n, 0)                          # rows a a a b b b
    if attention_mask is not None:
        attention_mask = attention_mask.repeat_interleave(n, 0)
    new = stream(self, input_ids, attention_mask, settings=settings, generator=generator, compile=compile)
    return torch.cat([input_ids, *(token[:, None] for token in new)], dim=1)


def check_prompt(model, input_ids, attention_mask):
    """Raise ValueError for a prompt that cannot be continued; warn where padding is on the right."""
    check_inputs(input_ids, None, model.config)
    key_mask_of(attention_mask, *input_ids.shape)
    if attention_mask is not None and not attention_mask[:, -1].all():
        warnings.warn("a row of the prompt ends in padding: the continuation would start after it. "
                      "Pad on the left (tokenizer.padding_side = 'left')", stacklevel=3)
