"""From logits to text: settings, the choice of a token, the loop that generates.

    B  rows of the batch · T  tokens so far · V  vocabulary

The loop is short: prefill the prompt into a KV cache, turn the last logits into a choice, feed the
chosen token back.  `STEPS` lists what can happen to the scores on the way.  Meanings, defaults and
the order of the steps are those of transformers' generate (v5.23.0, generation/utils.py and
logits_process.py), so the same seed draws the same tokens.
"""

import contextlib
import math
import warnings
from dataclasses import dataclass, fields

import torch

from attention import KVCache
from base import check_inputs, key_mask_of
from files import error_line, shown
from tokenizer import token_bytes
from transformers_arguments import settings_dict

# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------

@dataclass
class Settings:
    """How to generate.  The defaults are those of the reference; a checkpoint may name others."""

    do_sample: bool = False               # False: greedy, always the likeliest token
    temperature: float | None = 1.0       # below 1 sharpens the distribution, above 1 flattens
    top_k: int | None = 50                # only the k likeliest; 0 or None: all
    top_p: float | None = 1.0             # only the fewest that together have this probability
    min_p: float | None = None            # only those with at least this share of the largest
    repetition_penalty: float = 1.0       # above 1: tokens of the text become less likely
    no_repeat_ngram_size: int = 0         # the same n tokens in a row never occur twice
    bad_words_ids: list | None = None     # lists of ids that are never written
    suppress_tokens: list | None = None   # ids that are never written
    begin_suppress_tokens: list | None = None   # ids that are not written first
    max_length: int | None = None         # prompt and continuation together
    max_new_tokens: int | None = None     # continuation alone; wins over max_length
    min_length: int | None = None         # no end of text before this length, with the prompt
    min_new_tokens: int | None = None     # the same without the prompt; wins over min_length
    stop_strings: str | list | None = None      # a row ends when one of these texts is complete
    num_return_sequences: int = 1
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None       # accepted, but not used: there is always a prompt

    @classmethod
    def of(cls, model, given, config=None):
        """Each setting from `given`, else from `config`, the checkpoint, or the default.

        given: {name: value}, what the caller asks for; None switches a setting off.  config: a dict
        or an object like transformers' GenerationConfig, where None means not set.  The ids of the
        end of text and of padding come from config.json only where the checkpoint has no generation
        settings at all.
        Raises ValueError, naming the setting, for what this project does not do and for values
        without a meaning.
        """
        stored = settings_dict(model.generation_config)
        where = getattr(model.generation_config, "file", "generation_config.json")
        if not stored:
            where, names = "config.json", ("eos_token_id", "pad_token_id")
            stored = {name: getattr(model.config, name) for name in names}
        chosen, source = {}, {}
        config = settings_dict(config)
        for where, settings in ((f"{where}: ", stored), ("generation_config: ", config)):
            values = {name: as_python(value) for name, value in settings.items()
                      if value is not None}
            chosen |= values
            source |= dict.fromkeys(values, where)
        chosen |= {name: as_python(value) for name, value in given.items()}
        source |= dict.fromkeys(given, "")
        names = [f.name for f in fields(cls)]
        for name in sorted(chosen.keys() - set(names)):
            refuse(name, chosen, source[name], names)
        settings = cls(**{name: value for name, value in chosen.items() if name in names})
        settings.check(source)
        return settings

    def check(self, source):
        """Raise ValueError, naming the setting and its file, for a value without a meaning."""
        for name, (right, must) in CHECKS.items():
            value = getattr(self, name)
            read = self.do_sample or name not in SAMPLING_ONLY
            if read and value is not None and not right(value):
                raise ValueError(f"{source.get(name, '')}{name} must be {must}, got {shown(value)}")
        self.do_sample = bool(self.do_sample)
        self.num_return_sequences = self.num_return_sequences or 1
        if self.min_length and self.min_new_tokens is not None:
            warnings.warn(f"both min_new_tokens={self.min_new_tokens} and min_length="
                          f"{self.min_length} are set; min_new_tokens wins", stacklevel=4)
            self.min_length = None
        if self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError(f"{source['num_return_sequences']}num_return_sequences above 1 needs "
                             "do_sample=True: greedy sequences would all be equal")

    @property
    def steps(self):
        """(name, value, function) of what happens to the scores, see STEPS."""
        return [(name, value, step) for name, off, step in STEPS
                if (value := getattr(self, name)) is not None and value != off
                and (self.do_sample or name not in SAMPLING_ONLY)]

    @property
    def eos_ids(self):
        ids = self.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    @property
    def pad(self):
        """The id written after a row's end: pad_token_id, else the first eos id, else None."""
        return self.pad_token_id if self.pad_token_id is not None else (self.eos_ids or [None])[0]

    def total_length(self, prompt, config):
        """The number of tokens of prompt and continuation together.

        Raises ValueError, with the numbers, where so many are not possible.
        """
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
            limit = f"max_length={total}" if self.max_length is not None else f"{total} positions"
            raise ValueError(f"the prompt has {prompt} tokens, which leaves nothing to generate "
                             f"within a total length of {limit}: give max_new_tokens")
        least = max(self.min_length or 0, prompt + (self.min_new_tokens or 0))
        if least > total:
            warnings.warn(f"the least length, {least} tokens, is more than the {total} at which "
                          "generation stops", stacklevel=4)
        if config.position_limit is not None and total > config.position_limit:
            raise ValueError(f"{prompt} prompt tokens + {total - prompt} new ones = {total}, more "
                             f"than the {config.position_limit} positions that this model has "
                             "learned")
        return total


def whole(value, least=0):
    """Is it a whole number of at least this?  (True and False are not.)"""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def list_of(right, value, least=0):
    return isinstance(value, list) and len(value) >= least and all(right(each) for each in value)


def nonempty_text(value):
    return isinstance(value, str) and value != ""


TOKEN_IDS = (lambda x: list_of(whole, x), "a list of token ids")
CHECKS = {                                                 # what each setting must be, unless None
    "do_sample": (lambda x: isinstance(x, bool), "True or False"),
    "temperature": (lambda x: number(x) and 0 < x < math.inf,
                    "a number above 0 (do_sample=False is the limit towards 0)"),
    "top_k": (whole, "a whole number from 1, or 0 or None for all"),
    "top_p": (lambda x: number(x) and 0 < x <= 1, "a number above 0 and at most 1"),
    "min_p": (lambda x: number(x) and 0 <= x <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda x: number(x) and 0 < x < math.inf, "a number above 0"),
    "no_repeat_ngram_size": (whole, "a whole number from 1, or 0 for off"),
    "bad_words_ids": (lambda x: list_of(lambda word: list_of(whole, word, 1), x, 1),
                      "a list of lists of token ids, none of them empty"),
    "suppress_tokens": TOKEN_IDS,
    "begin_suppress_tokens": TOKEN_IDS,
    "max_length": (lambda x: whole(x, -math.inf), "a whole number"),
    "max_new_tokens": (lambda x: whole(x, 1), "a whole number and at least 1"),
    "min_length": (whole, "a whole number, not negative"),
    "min_new_tokens": (whole, "a whole number, not negative"),
    "stop_strings": (lambda x: x and (nonempty_text(x) or list_of(nonempty_text, x)),
                     "a text or a list of texts, none of them empty"),
    "num_return_sequences": (lambda x: whole(x, 1), "a whole number and at least 1"),
    "eos_token_id": (lambda x: whole(x) or list_of(whole, x), "a token id, a list of them or None"),
    "pad_token_id": (whole, "a token id or None"),
    "bos_token_id": (whole, "a token id or None"),
}
# Settings that only sampling uses; greedy decoding ignores them, here and in the reference.
SAMPLING_ONLY = {"temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff",
                 "eta_cutoff"}

# The reference's other settings and arguments, which this project does not have.  None and the
# values given here change nothing and are accepted; any other value is an error that names it.
REFUSED = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale", "typical_p",
                     "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("diversity_penalty", "penalty_alpha", "epsilon_cutoff", "eta_cutoff",
                     "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits",
                     "return_dict_in_generate", "renormalize_logits", "remove_invalid_values",
                     "token_healing", "use_mtp", "is_assistant", "low_memory", "synced_gpus",
                     "trust_remote_code"), (False,)),
    **dict.fromkeys(("logits_processor", "stopping_criteria"), ([],)),
    "cache_implementation": ("dynamic",),
    **dict.fromkeys(("top_h", "max_time", "forced_bos_token_id", "forced_eos_token_id",
                     "exponential_decay_length_penalty", "sequence_bias", "watermarking_config",
                     "constraints", "force_words_ids", "dola_layers", "prompt_lookup_num_tokens",
                     "assistant_early_exit", "speculation_type", "cache_config", "compile_config",
                     "continuous_batching_config", "prefill_chunk_size", "prefix_allowed_tokens_fn",
                     "assistant_model", "assistant_tokenizer", "streamer", "negative_prompt_ids",
                     "negative_prompt_attention_mask", "custom_generate", "inputs_embeds",
                     "position_ids", "past_key_values", "token_type_ids"), ()),
}
# Accepted with any value.  They act only together with a setting that is refused (beam search, an
# assistant model), change how the reference computes but not what, or only describe the file.
WITHOUT_EFFECT = {
    "early_stopping", "length_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "max_matching_ngram_size", "decoder_start_token_id", "use_cache",
    "max_cache_len", "disable_compile", "transformers_version", "_from_model_config",
    "_commit_hash",
}


def refuse(name, chosen, where, known):
    """Raise ValueError for a setting that Settings does not have, unless it changes nothing."""
    value = chosen[name]
    if name in WITHOUT_EFFECT or name in SAMPLING_ONLY and not chosen.get("do_sample"):
        return
    if name not in REFUSED:
        advice = "take it out of the file" if where else f"it knows {', '.join(known)}"
        raise ValueError(f"{where}{name!r} is not a setting of generate; {advice}")
    if value is not None and value not in REFUSED[name]:
        off = " or ".join(map(repr, (None, *REFUSED[name])))
        raise ValueError(f"{where}{name}={shown(value)} is not supported here, only in "
                         f"transformers: leave it out or set it to {off}")


def as_python(value):
    """A setting in Python's own numbers and lists, from tensors, numpy's types, tuples and sets."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [as_python(each) for each in value] if isinstance(value, (list, tuple, set)) else value


# ------------------------------------------------------------------------------------------------
# From logits to a token
# ------------------------------------------------------------------------------------------------

# What happens to the scores, in the reference's order.  Each entry: a setting, the value at which
# nothing happens (None is always one), and a function of scores (B, V), the setting's value and the
# Text so far, which returns scores (B, V).
STEPS = (
    ("repetition_penalty", 1, lambda scores, x, text: penalize(scores, text.ids, text.first, x)),
    ("no_repeat_ngram_size", 0, lambda scores, n, text: forbid_repeats(scores, text.ids, n)),
    ("bad_words_ids", None,
     lambda scores, words, text: forbid_words(scores, text.ids, words, text.eos)),
    ("min_length", 0,
     lambda scores, n, text: forbid(scores, text.eos) if text.length < n else scores),
    ("min_new_tokens", 0,
     lambda scores, n, text: forbid(scores, text.eos) if text.length - text.prompt < n else scores),
    ("suppress_tokens", None, lambda scores, ids, text: forbid(scores, ids)),
    ("begin_suppress_tokens", None,
     lambda scores, ids, text: forbid(scores, ids) if text.length == text.prompt else scores),
    ("temperature", 1, lambda scores, x, text: scores / x),        # from here on only if sampling
    ("top_k", 0, lambda scores, k, text: keep_top_k(scores, k)),
    ("top_p", 1, lambda scores, p, text: keep_top_p(scores, p)),
    ("min_p", 0, lambda scores, p, text: keep_min_p(scores, p)),
)


def nothing_left(settings, error):
    """The error for scores that torch cannot draw from: it names what forbids all tokens."""
    names = [name for name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
                               "no_repeat_ngram_size", "min_length", "min_new_tokens")
             if getattr(settings, name)]
    why = "the model's scores are not finite numbers"
    if names:
        why = f"{' and '.join(names)} forbid all of them"
    return ValueError(f"there is no token to draw: {why} ({error_line(error)})")


def choose(scores, settings, generator=None, text=None):
    """One token for each row.  scores (B, V) float32 -> ids (B,)

    text: the Text so far, for the settings that look at it.  Sampling draws a token for every row,
    also for rows that have ended, so that the other rows' draws do not depend on when a row ends.
    """
    for _, value, step in settings.steps:
        scores = step(scores, value, text)
    if not settings.do_sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def forbid(scores, ids):
    """-inf for these ids, a list; ids outside the vocabulary are ignored.  (B, V) -> (B, V)"""
    ids = [i for i in ids if i < scores.size(-1)]
    ids = torch.tensor(ids, dtype=torch.long, device=scores.device)
    return scores.index_fill(-1, ids, float("-inf"))


def forbid_words(scores, ids, words, eos):
    """-inf for every token that would complete one of the words, lists of ids.  (B, V) -> (B, V)

    ids (B, T) is the text so far.  A word of one token that is an end of text stays allowed.
    """
    words = [word for word in words if word not in [[i] for i in eos]]
    banned = torch.zeros_like(scores, dtype=torch.bool)
    banned[:, [word[0] for word in words if len(word) == 1]] = True
    for *beginning, last in words:
        if 0 < len(beginning) <= ids.size(1):
            before = torch.tensor(beginning, device=ids.device)
            banned[:, last] |= (ids[:, -len(beginning):] == before).all(-1)            # (B,)
    return scores.masked_fill(banned, float("-inf"))


def forbid_repeats(scores, ids, n):
    """-inf for tokens that would make n tokens in a row occur a second time.  (B, V) -> (B, V)

    The last n - 1 tokens of ids (B, T) are compared with every n - 1 tokens before them.  Where
    they agree, the token that followed there must not follow here.
    """
    V, T = scores.size(-1), ids.size(1)
    if T < n:
        return scores
    ngrams = ids.unfold(1, n, 1)                                           # (B, T - n + 1, n)
    same = (ngrams[..., :-1] == ids[:, None, T - n + 1:]).all(-1)          # (B, T - n + 1)
    followers = ngrams[..., -1].masked_fill(~same, V)              # V: a column to throw away
    scores = torch.nn.functional.pad(scores, (0, 1))                       # (B, V + 1)
    return scores.scatter(1, followers, float("-inf"))[:, :V]


def keep_top_k(scores, k):
    """-inf for all but the k highest of each row; ties with the k-th stay.  (B, V) -> (B, V)"""
    kth = scores.topk(min(int(k), scores.size(-1))).values[:, -1:]              # (B, 1)
    return scores.masked_fill(scores < kth, float("-inf"))


def keep_top_p(scores, p):
    """-inf outside the smallest set of tokens that holds probability p.  (B, V) -> (B, V)

    Starting from the least likely, tokens are removed as long as the removed ones together have a
    probability of at most 1 - p.  The likeliest token always stays.
    """
    ranked, order = scores.sort(descending=False)                          # (B, V)
    drop = ranked.softmax(-1).cumsum(-1) <= 1 - p
    drop[:, -1] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))


def keep_min_p(scores, p):
    """-inf for tokens with less than p times the row's largest probability.  (B, V) -> (B, V)"""
    probs = scores.softmax(-1)
    return scores.masked_fill(probs < p * probs.amax(-1, keepdim=True), float("-inf"))


def penalize(scores, ids, first, penalty):
    """Lower the score of each token of the row, prompt included.  (B, V) -> (B, V)

    ids (B, T) is the text so far; first (B,) each row's first real slot, as padding does not count.
    A negative score is multiplied by the penalty and a positive one divided by it, once, however
    often the token occurs; with a penalty above 1 both become lower.
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
           compile=False, tokenizer=None):
    """Yield the next token of every row, (B,), until all rows have ended or the length is reached.

    input_ids (B, T): shorter rows are padded on the left, and attention_mask (B, T) is 0 there.
    A row that has ended yields padding.  real_vocab: ids from this one on are never chosen (they
    are rows that only round up the size of the matrix).  compile: decode with the compiled step of
    fast/step.py, after a prefill that unpacks the matrices of a quantized model by compiled code.
    tokenizer: to find stop_strings in the text.
    """
    mask = infer_mask(input_ids, attention_mask, settings)                 # (B, T)
    total = settings.total_length(input_ids.size(1), model.config)
    text = Text(input_ids, mask, settings, tokenizer)
    decoder = Decoder(model, mask, total, compile)
    new = input_ids
    while True:
        scores = decoder.scores(new)                                       # (B, V)
        if real_vocab is not None:
            scores[:, real_vocab:] = float("-inf")
        try:
            token = choose(scores, settings, generator, text)              # (B,)
        except RuntimeError as error:
            raise nothing_left(settings, error) from None
        token = text.append(token)
        yield token
        if text.length >= total or text.done.all():
            return
        new = token[:, None]                                               # (B, 1)
        if text.eos:                       # without an eos id ended rows go on, see Text.append
            decoder.leave_out(text.done)


class Text:
    """The text so far: its ids (B, T), and which rows have ended, done (B,) bool."""

    def __init__(self, ids, mask, settings, tokenizer):
        self.ids, self.prompt = ids, ids.size(1)
        self.first = (mask != 0).int().argmax(1)           # (B,) slot of a row's first real token
        self.eos, self.pad = settings.eos_ids, settings.pad
        self.done = torch.zeros_like(self.first, dtype=torch.bool)
        stops = settings.stop_strings or []
        self.stops = [s.encode() for s in ([stops] if isinstance(stops, str) else stops)]
        self.tokenizer = tokenizer
        if self.stops and tokenizer is None:
            raise ValueError("stop_strings are found in the text, so generate needs tokenizer= too")

    @property
    def length(self):
        return self.ids.size(1)

    def append(self, token):
        """Append one token to each row, or padding to a row that has ended; returns these, (B,).

        Without an eos id there is no padding: as in the reference, a row whose stop string is
        complete goes on until every row has one.
        """
        if self.eos:
            token = token.masked_fill(self.done, self.pad)
            self.done = self.done | torch.isin(token, torch.tensor(self.eos, device=token.device))
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        if self.stops:
            self.done = self.done | ends_in(self.ids, self.stops, self.tokenizer)
        return token


def ends_in(ids, stops, tokenizer):
    """Which rows have a stop string that is complete with the last token?  (B, T) -> (B,) bool

    As in the reference, bytes are compared, since a token may be a part of a character.  An id
    without a token counts as a byte that never occurs in UTF-8.
    """
    found = []
    for row in ids[:, -max(map(len, stops)):].tolist():
        tokens = tokenizer.convert_ids_to_tokens(row)
        *before, last = [b"\xff" if token is None else token_bytes(token) for token in tokens]
        tails = (b"".join(before)[1 - len(stop):] if len(stop) > 1 else b"" for stop in stops)
        found.append(any(stop in tail + last for stop, tail in zip(stops, tails)) and last != b"")
    return torch.tensor(found, device=ids.device)


class Decoder:
    """A model and its KV cache; it can leave out the rows that have ended."""

    def __init__(self, model, mask, total, compile):
        B = mask.size(0)
        self.model, self.mask = model, mask
        self.position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)    # padding: 0
        # A compiled step leaves one slot free: a layer whose slots are all taken is compiled anew.
        self.cache = new_cache(model, B, total + bool(compile))
        self.step = compiled_step(model, self.cache) if compile else None
        self.B, self.rows = B, torch.arange(B, device=mask.device)     # rows: those not left out

    def scores(self, new):
        """Logits (B, V), float32, after the new ids: first the prompt (B, T), then a token (B, 1).

        Rows that are left out are zeros.
        """
        if not self.cache.length:
            reading = self.step.compiled_unpacking if self.step else contextlib.nullcontext
            with reading():
                return prefill(self.model, new, self.mask, self.position_ids, self.cache).float()
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self.position_ids = self.position_ids[:, -1:] + 1
        decode = self.step or self.decode
        scores = decode(new[self.rows], self.mask, self.position_ids).float()
        if len(self.rows) == self.B:
            return scores
        return scores.new_zeros(self.B, scores.size(1)).index_copy(0, self.rows, scores)

    def decode(self, new, mask, position_ids):
        """Logits (rows, V) after one new token (rows, 1) of each row."""
        return self.model(new, mask, position_ids, cache=self.cache, logits_to_keep=1).logits[:, -1]

    def leave_out(self, done):
        """Stop computing the rows that have ended, done (B,) bool.

        A model that keeps to the reference's arithmetic computes all rows, as the reference does,
        since its last bits depend on the shapes that are multiplied.  The compiled step is made for
        one number of rows.
        """
        if self.step or self.model.exact:
            return
        going = ~done[self.rows]
        if not going.all():
            self.cache.keep(going)
            self.rows, self.mask = self.rows[going], self.mask[going]
            self.position_ids = self.position_ids[going]


CHUNK = 512                                                # tokens that a prefill takes at once


def prefill(model, ids, mask, position_ids, cache):
    """Read ids (B, T) into the cache; returns the logits (B, V) after the last token.

    A long prompt is read in chunks, so that memory does not grow with the square of its length.  A
    model that keeps to the reference's arithmetic reads it in one piece, since its last bits depend
    on the shapes that are multiplied.
    """
    past, T = cache.length, ids.size(1)
    chunk = T if model.exact else CHUNK
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        out = model(ids[:, start:end], mask[:, :past + end], position_ids[:, start:end],
                    cache=cache, logits_to_keep=1)
    return out.logits[:, -1]


def new_cache(model, B, total):
    """A KV cache for B rows of `total` tokens; ValueError where there is no memory for so many."""
    try:
        return KVCache(model.config, B, total - 1, model.dtype, model.device, model.shares)
    except (RuntimeError, OverflowError, MemoryError, TypeError) as error:
        raise ValueError(f"there is no room for the keys and values of {total} tokens in {B} rows "
                         f"({error_line(error)}): generate fewer") from None


def compiled_step(model, cache):
    """The compiled step; imported here, since only compile=True needs torch's compiler."""
    from fast.step import Step
    return Step(model, cache)


def infer_mask(input_ids, attention_mask, settings):
    """attention_mask (B, T), int64; where none is given, the one that the reference infers.

    Padding is then masked only if the padding id is not also an end of text.
    """
    if attention_mask is not None:
        return attention_mask.long()
    if settings.pad is not None and settings.pad not in settings.eos_ids:
        return (input_ids != settings.pad).long()
    return torch.ones_like(input_ids)


def generate(self, input_ids=None, attention_mask=None, *, generator=None, compile=False,
             tokenizer=None, generation_config=None, **settings):
    """Prompt and continuation as ids, (B * num_return_sequences, total) int64.

    input_ids (B, T) integer: shorter rows are padded on the left, and attention_mask (B, T) is 0
    there.  settings: the fields of Settings, where each is explained.  eos_token_id: one id or
    several; with None no row ends.  Without max_length and max_new_tokens, 20 new tokens.
    generator: a torch.Generator to draw from, else torch's global one.  compile: decode with the
    compiled step of fast/step.py, after a prefill that unpacks the matrices of a quantized model by
    compiled code; both take some seconds to compile, once.  tokenizer: needed for stop_strings.
    generation_config: settings as a dict or as transformers' object; settings given by name win
    over it.  inputs: another name of input_ids.
    Raises ValueError, before anything is computed, for settings that have no meaning or that this
    project does not have, ids outside the vocabulary, an empty prompt, and more positions than the
    model has; RuntimeError for compile=True without a C++ compiler.
    """
    inputs = settings.pop("inputs", None)
    if inputs is not None and input_ids is not None:
        raise ValueError("inputs and input_ids are two names of the same: give one")
    input_ids = inputs if input_ids is None else input_ids
    settings = Settings.of(self, settings, generation_config)
    check_prompt(self, input_ids, attention_mask, settings)
    n = settings.num_return_sequences
    input_ids = input_ids.repeat_interleave(n, 0)                          # rows a a a b b b
    if attention_mask is not None:
        attention_mask = attention_mask.repeat_interleave(n, 0)
    new = stream(self, input_ids, attention_mask, settings=settings, generator=generator,
                 compile=compile, tokenizer=tokenizer)
    return torch.cat([input_ids, *(token[:, None] for token in new)], dim=1)


# The generation settings that an old config.json may hold; the loader reads them from here.
generate.settings = [*CHECKS, *REFUSED]


def check_prompt(model, input_ids, attention_mask, settings):
    """Raise ValueError for a prompt that cannot be continued; warn of padding on the right."""
    check_inputs(input_ids, None, model.config)
    key_mask_of(attention_mask, *input_ids.shape)
    B, V = input_ids.size(0) * settings.num_return_sequences, model.config.vocab_size
    ends = settings.stop_strings or any(i < V for i in settings.eos_ids)
    if B > 1 and ends and settings.pad is not None and settings.pad >= V:
        raise ValueError(f"pad_token_id is {settings.pad}, which is written after a row's end, and "
                         f"this model's vocabulary has ids 0 to {V - 1}")
    for word in settings.bad_words_ids or []:
        if max(word) >= V:
            raise ValueError(f"bad_words_ids has {max(word)}; this model's vocabulary has ids 0 to "
                             f"{V - 1}")
    if attention_mask is not None:
        right = not attention_mask[:, -1].all()
    else:                                                  # as in the reference: only if B > 1
        right = B > 1 and settings.pad is not None and (input_ids[:, -1] == settings.pad).any()
    if right:
        warnings.warn("a row of the prompt ends in padding: the continuation would start after it. "
                      "Pad on the left (tokenizer.padding_side = 'left')", stacklevel=3)
