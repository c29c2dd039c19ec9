"""The tokenizers of GPT-Neo and GPT-NeoX, on tiktoken, read from the checkpoint's own files.

Byte-level BPE in five lines:

    1. A regex cuts the text into words; a space goes with the word after it: "Hello", " world".
    2. Each word becomes its UTF-8 bytes, and every byte is a token: no text is unknown.
    3. Training joined the commonest pair of neighbours into a new token, 50,000 times over.
       The list of these merges, in order, is the tokenizer.
    4. Encoding a word: do the earliest merge in the list that fits, until none fits.
    5. Decoding: join the bytes of the tokens.  A token may end in the middle of a character.

The two families:

                   GPT-Neo (GPT-2's tokenizer)     GPT-NeoX and Pythia
    files          vocab.json + merges.txt         tokenizer.json
    normalizing    none: every text comes back     NFC: "e" + accent is the same as "é"
    runs of spaces left to the regex               2 to 24 spaces are one token, cut out first
    "a   b"        "a", " ", " ", " b"             "a", "   ", "b"

so code, which is indented, takes fewer tokens in GPT-NeoX.  Neither adds a begin or end token of
its own accord, and both recognise "<|endoftext|>" wherever it is written in the text.
"""

import codecs
import json
import operator
import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import tiktoken

from files import fetch

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
SETTINGS = ("padding_side", "model_max_length")
UNLIMITED = int(1e30)                  # transformers' model_max_length where no file gives one
OFF = (None, False)

# GPT-2's regex (openai/gpt-2, src/encoder.py) as tiktoken spells it: the same words, with
# possessive quantifiers (++), which do not backtrack.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


# ------------------------------------------------------------------------------------------------
# Bytes and characters
# ------------------------------------------------------------------------------------------------

def byte_alphabet():
    """{character: byte}: how the files write bytes.  Space is "Ġ", newline "Ċ", "a" is "a".

    Bytes that would be invisible get the characters from U+0100 on, in increasing order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    invisible = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(invisible)}


BYTE = byte_alphabet()
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}                # GPT-NeoX has no tokens for these


def token_bytes(token):
    """The bytes that a token stands for.  tokenizers: byte_level.rs, decode_chain."""
    try:
        return bytes([BYTE[c] for c in token])
    except KeyError:                               # an added token such as "    " is plain text
        return token.encode()


# tokenizers' NFC is that of Unicode 9: it does not know combining marks of later versions.  Python
# knows more of them in each release, so the text between such characters is normalized piecewise.
LATER_THAN_UNICODE_9 = re.compile(
    "([\u05C8\u05C9\u07FD\u0897-\u08D3\u09FE\u0C3C\u0D3B\u0D3C\u0EBA\u1715\u1ABF-\u1AF0"
    "\u1DF6-\u1DFA\uA82C\U000105C9-\U000105E4\U00010D24-\U00010F85\U00011070\U0001133B"
    "\U000113B8-\U000113D0\U0001145E\U00011839-\U00011A99\U00011D42-\U00011F42"
    "\U0001611E-\U0001612F\U00016D67\U00016D68\U00016FF0\U00016FF1\U0001D127\U0001D128"
    "\U0001D250-\U0001D281\U0001E08F-\U0001E6F5])")


def nfc(text):
    """Unicode normal form C: a letter and its accents become one character where there is one."""
    if text.isascii():
        return text
    pieces = LATER_THAN_UNICODE_9.split(text)
    return "".join(unicodedata.normalize("NFC", piece) for piece in pieces)


# ------------------------------------------------------------------------------------------------
# Reading the files
# ------------------------------------------------------------------------------------------------

def find_file(name_or_folder, filename, revision, required=False):
    """Path of one file, in a folder or on the hub; None if it is not there and not required."""
    path = Path(name_or_folder) / filename
    if not path.parent.is_dir():
        return fetch(name_or_folder, filename, revision, required)
    if required and not path.is_file():
        raise FileNotFoundError(f"no tokenizer.json and no {filename} in {path.parent}: copy the "
                                "checkpoint's tokenizer.json, or vocab.json and merges.txt, there")
    return path if path.is_file() else None


def find_files(name_or_folder, revision=None):
    """{file name: path}.  tokenizer.json comes before vocab.json + merges.txt (transformers)."""
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json"]
    found = {f: find_file(name_or_folder, f, revision) for f in names}
    if not found["tokenizer.json"]:
        for f in ("vocab.json", "merges.txt"):
            found[f] = find_file(name_or_folder, f, revision, required=True)
    return {f: path for f, path in found.items() if path}


def read_json(path):
    """The JSON object in a file; {} where there is no file."""
    if path is None:
        return {}
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): get the file again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(data).__name__}")
    return data


def read_merges(path):
    """The pairs of merges.txt: one merge a line, earliest first, after a "#version" line."""
    pairs = []
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), start=1):
        if line.startswith("#version"):
            continue
        pairs.append(line.split(" "))
        if len(pairs[-1]) != 2 or not all(pairs[-1]):
            raise ValueError(f"{path}, line {number}: {line!r} is not two tokens and a space")
    return pairs


def demand(where, settings, **supported):
    """What would change the ids or the text must have a value that is implemented here."""
    for key, values in supported.items():
        if (value := (settings or {}).get(key)) not in values:
            names = " or ".join(repr(v) for v in values)
            raise ValueError(f"{where}: {key} is {value!r}; what is supported is {names}")


def read_tokenizer_json(path):
    """tokenizer.json -> vocabulary, merges, list of added tokens, whether it normalizes to NFC."""
    data = read_json(path)
    model, normalizer = data.get("model"), data.get("normalizer")
    if not isinstance(model, dict) or "vocab" not in model or "merges" not in model:
        raise ValueError(f"{path}: no model with vocab and merges; what is supported is BPE")
    demand(f"{path}, model", model, type=(None, "BPE"), dropout=(None, 0), byte_fallback=OFF,
           ignore_merges=OFF, continuing_subword_prefix=(None, ""), end_of_word_suffix=(None, ""))
    demand(f"{path}, normalizer", normalizer, type=(None, "NFC"))
    demand(f"{path}, pre_tokenizer", data.get("pre_tokenizer"), type=("ByteLevel",),
           add_prefix_space=OFF, use_regex=(None, True))
    demand(f"{path}, decoder", data.get("decoder"), type=("ByteLevel",))
    demand(f"{path}, post_processor", data.get("post_processor"), special_tokens=(None, {}),
           type=(None, "ByteLevel", "TemplateProcessing"))       # a template that adds no tokens
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    for i, pair in enumerate(merges):
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"{path}: model.merges[{i}] is {model['merges'][i]!r}, not two tokens")
    return model["vocab"], merges, data.get("added_tokens") or [], normalizer is not None


def read_config(paths):
    """tokenizer_config.json, with special_tokens_map.json where transformers reads that as well."""
    path = paths.get("tokenizer_config.json")
    config = read_json(path)
    demand(path, config, add_prefix_space=OFF, split_special_tokens=OFF)
    if "tokenizer.json" not in paths:                            # whose post_processor says it
        demand(path, config, add_bos_token=OFF, add_eos_token=OFF)
    if "added_tokens_decoder" not in config:                     # newer configs hold everything
        config |= read_json(paths.get("special_tokens_map.json"))
    return config


def content(token):
    """Tokens are written "<|x|>", or {"content": "<|x|>", ...} with flags."""
    return token["content"] if isinstance(token, dict) else token


def special_names(config):
    """The texts of all tokens that a config calls special."""
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more = list(more.values()) if isinstance(more, dict) else more
    named = [config.get(name) for name in NAMED]
    return [content(token) for token in named + more if token is not None]


class AddedToken(NamedTuple):
    """A token that is cut out of the text before BPE sees it."""
    id: int
    special: bool              # decode(..., skip_special_tokens=True) leaves it out
    normalized: bool           # sought in the normalized text, not in the raw text


def read_added_tokens(paths, config, entries):
    """{text: AddedToken}: of tokenizer.json (entries), added_tokens.json, tokenizer_config.json."""
    special = special_names(config)
    if "added_tokens_decoder" not in config:
        entries = entries + [dict(id=id, content=text, special=text in special)
                             for text, id in read_json(paths.get("added_tokens.json")).items()]
    entries = entries + [dict(token, id=int(id))
                         for id, token in config.get("added_tokens_decoder", {}).items()]
    added = {}
    for entry in entries:
        text, is_special = entry["content"], entry.get("special", False)
        demand(f"added token {text!r}", entry, single_word=OFF, lstrip=OFF, rstrip=OFF)
        added[text] = AddedToken(entry["id"], is_special, entry.get("normalized", not is_special))
    return added


# ------------------------------------------------------------------------------------------------
# Byte-pair encoding
# ------------------------------------------------------------------------------------------------

def check_vocab(path, vocab):
    """Ids are different whole numbers, and every byte of UTF-8 text has one."""
    if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise ValueError(f"{path}: in a vocabulary each token has an id that is a whole number")
    if len(set(vocab.values())) != len(vocab):
        raise ValueError(f"{path}: two tokens of the vocabulary have the same id")
    missing = [f"{b:02X}" for c, b in BYTE.items() if c not in vocab and b not in NEVER_IN_UTF8]
    if missing:
        raise ValueError(f"{path} is not a byte-level vocabulary: {len(missing)} of the bytes have "
                         f"no token, such as {missing[0]}")


def rival(left, right, vocab, halves):
    """The pair, if any, that merges across the seam of left|right before both have come about.

    Goes back in time: undo the later of the two tokens' own merges, and see whether the pieces
    that then meet at the seam could merge earlier than what was undone.
    """
    while len(left) > 1 or len(right) > 1:
        if len(right) == 1 or (len(left) > 1 and vocab[left] > vocab[right]):
            undone, left = vocab[left], halves[left][1]
        else:                                      # in a tie the seam, being further left, is first
            undone, right = vocab[right] + 1, halves[right][0]
        if left + right in halves and vocab[left + right] < undone:
            return left, right


def mergeable_ranks(path, vocab, merges):
    """{bytes: id} for tiktoken, after a proof that it will merge exactly as the merges say.

    The files list merges of pairs.  tiktoken knows only tokens: it joins any two neighbours that
    together are a token, lowest id first, and takes a word that is a token as it is.  That is the
    same if ids grow with the merges and no token can come about but by its own merge.
    """
    halves, last = {}, -1
    for left, right in merges:
        token, where = left + right, f"{path}: merge {left!r} {right!r}"
        for part in (left, right):
            if part not in vocab or not (part in BYTE or part in halves):
                raise ValueError(f"{where} uses {part!r}, which no byte and no earlier merge makes")
        if vocab.get(token, -1) <= last:
            raise ValueError(f"{where}: ids must grow with the merges, but {token!r} has "
                             f"{vocab.get(token, 'none')}, after {last}")
        if pair := rival(left, right, vocab, halves):
            raise ValueError(f"{where} can never happen, for {pair[0]!r} {pair[1]!r} comes first; "
                             "tiktoken would do it all the same, so this file cannot be used")
        halves[token], last = (left, right), vocab[token]
    return {token_bytes(t): vocab[t] for t in (*(c for c in BYTE if c in vocab), *halves)}


def matcher(texts):
    """Regex that cuts out any of these texts: at each place the longest, as tokenizers does."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


LONG_SPACE = re.compile(r"[^\S\x1c-\x1f]{1000,}")     # Python's \s has U+001C to U+001F, WORDS' not


def cut_long_space(text):
    """Cuts where WORDS cuts too: before the last space of a run, which belongs to the next word.

    WORDS backtracks only in \\s+(?!\\S), but from 1,000,000 spaces on tiktoken panics there.
    """
    if len(text) < 1_000_000:
        return [text]
    cuts = [run.end() - 1 for run in LONG_SPACE.finditer(text) if run.end() < len(text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]


# ------------------------------------------------------------------------------------------------
# The tokenizers
# ------------------------------------------------------------------------------------------------

class Encoding(dict):
    """What a tokenizer returns: input_ids and attention_mask, as items and as attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name} here, only {', '.join(self)}") from None

    def to(self, *args, **kwargs):
        """Move the tensors, in place: .to("cuda")."""
        if any(isinstance(value, list) for value in self.values()):
            raise ValueError('lists have no device: ask the tokenizer for return_tensors="pt"')
        self.update({name: value.to(*args, **kwargs) for name, value in self.items()})
        return self


def check_option(name, value, supported):
    if value not in supported:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, supported))}, not {value!r}")


def tensor(rows):
    """(B, T) int64."""
    import torch                                       # here: the rest of this file does without
    if len(lengths := {len(row) for row in rows}) > 1:
        raise ValueError(f"the texts have {min(lengths)} to {max(lengths)} tokens, and a tensor "
                         "needs rows of one length: pass padding=True")
    return torch.tensor(rows, dtype=torch.long)


def id_list(ids):
    """Ids as a list of int, from a list, a tensor, an array or a single id."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    ids = [ids] if isinstance(ids, int) else ids
    try:
        ids = [operator.index(i) for i in ids]
    except TypeError:
        raise TypeError("ids must be one row of whole numbers: a list, a 1-d tensor or an int "
                        "(batch_decode takes many rows)") from None
    if ids and min(ids) < 0:
        raise ValueError(f"ids are not negative, but one is {min(ids)} (-100 is for labels only)")
    return ids


def named_token(name):
    """The properties of a named token, such as pad_token and pad_token_id.  Both can be set."""
    def token(self):
        return self._named[name]

    def set_token(self, token):
        if token is not None and token not in self._ids:
            raise ValueError(f"{name} cannot be {token!r}: there is no such token, and the model "
                             f"has no row for it; tokenizer.{name} = tokenizer.eos_token would do")
        self._named[name] = token

    def id(self):
        return self._ids.get(self._named[name])

    def set_id(self, id):
        set_token(self, None if id is None else self._tokens.get(id, f"id {id}"))

    return property(token, set_token), property(id, set_id)


class Tokenizer:
    """Reads a checkpoint's files; turns text into ids and ids into text."""
    defaults = dict.fromkeys(NAMED, "<|endoftext|>")   # where no file says otherwise
    normalizes = False                                 # vocab.json + merges.txt cannot say it
    saved_class = None                                 # by this name transformers finds its own
    bos_token, bos_token_id = named_token("bos_token")
    eos_token, eos_token_id = named_token("eos_token")
    unk_token, unk_token_id = named_token("unk_token")
    pad_token, pad_token_id = named_token("pad_token")

    @classmethod
    def from_pretrained(cls, name_or_folder, *, revision=None, **overrides):
        """From a folder or a hub id.  Overrides: the named tokens, padding_side, ..."""
        if unknown := overrides.keys() - {*NAMED, *SETTINGS}:
            raise TypeError(f"from_pretrained does not know {', '.join(sorted(unknown))}; it knows "
                            f"revision, {', '.join((*NAMED, *SETTINGS))}")
        paths = find_files(name_or_folder, revision)
        try:
            return cls(paths, overrides)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the tokenizer files of {name_or_folder} are not in the official "
                             f"format ({error!r})") from error

    def __init__(self, paths, overrides):
        self._files = {name: path.read_bytes() for name, path in paths.items()}
        if source := paths.get("tokenizer.json"):
            vocab, merges, entries, self._nfc = read_tokenizer_json(source)
        else:
            source, self._nfc = paths["vocab.json"], self.normalizes
            vocab, merges, entries = read_json(source), read_merges(paths["merges.txt"]), []
        check_vocab(source, vocab)
        self._bpe = tiktoken.Encoding("bpe", pat_str=WORDS, special_tokens={},
                                      mergeable_ranks=mergeable_ranks(source, vocab, merges))
        self._config = read_config(paths) | overrides
        self._index(source, vocab, read_added_tokens(paths, self._config, entries))
        self.vocab_size = len(vocab)                   # without added tokens, as in transformers
        self.padding_side = self._config.get("padding_side", "right")
        self.model_max_length = int(self._config.get("model_max_length") or UNLIMITED)

    def _index(self, source, vocab, added):
        """The tables between tokens, ids and bytes, the named tokens, the texts to cut out."""
        self._ids = vocab | {text: token.id for text, token in added.items()}
        self._tokens = {id: text for text, id in self._ids.items()}
        if len(self._tokens) != len(self._ids) or self._ids != self._ids | vocab:
            raise ValueError(f"{source}: vocabulary and added tokens disagree about an id")
        self._bytes = {id: token_bytes(text) for id, text in self._tokens.items()}
        self._named = {}
        for name, default in self.defaults.items():
            usual = default if default in self._ids else None
            token = content(self._config[name]) if name in self._config else usual
            setattr(self, name, token)
        for text in special_names(self._config | self._named):
            if text not in self._ids:
                raise ValueError(f"special token {text!r} has no id in {source} or beside it")
            token = added.get(text, AddedToken(self._ids[text], True, normalized=False))
            added[text] = token._replace(special=True)
        self._added = added
        self._special = {token.id for token in added.values() if token.special}
        self._raw = {text: token.id for text, token in added.items() if not token.normalized}
        self._normalized = {self._normalize(text): token.id
                            for text, token in added.items() if token.normalized}
        self._cut_raw, self._cut_normalized = matcher(self._raw), matcher(self._normalized)

    @property
    def padding_side(self):
        """The side on which a batch is padded: "left" for generation, "right" for training."""
        return self._padding_side

    @padding_side.setter
    def padding_side(self, side):
        check_option("padding_side", side, ("left", "right"))
        self._padding_side = side

    def __len__(self):
        return len(self._ids)                          # a model may have more rows than this

    # -- text -> ids -----------------------------------------------------------------------------

    def encode(self, text):
        """Ids of a text.  Special tokens written in it are recognised; none are added.

        In the order of tokenizers' added_vocabulary.rs, extract_and_normalize: cut added tokens out
        of the raw text; normalize each piece left; cut out those that are sought in normalized text
        (GPT-NeoX's runs of spaces); each piece left then goes through BPE by itself.
        """
        if not isinstance(text, str):
            hint = ": .decode('utf-8') it first" if isinstance(text, bytes) else ""
            raise TypeError(f"a text must be str, not {type(text).__name__}{hint}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} of the text, {text[error.start]!r}, is half "
                             "of a surrogate pair, which UTF-8 cannot hold") from None
        ids = []
        for i, piece in enumerate(self._cut_raw.split(text)):    # every second piece is a token
            ids += [self._raw[piece]] if i % 2 else self._encode_piece(piece)
        return ids

    def _encode_piece(self, text):
        ids = []
        for i, piece in enumerate(self._cut_normalized.split(self._normalize(text))):
            if i % 2:
                ids.append(self._normalized[piece])
            elif piece:
                for part in cut_long_space(piece):
                    ids += self._bpe.encode_ordinary(part)
        return ids

    def _normalize(self, text):
        return nfc(text) if self._nfc else text

    def __call__(self, text, text_pair=None, *, return_tensors=None, padding=False, truncation=None,
                 max_length=None, add_special_tokens=True):
        """One text or a list of them -> Encoding(input_ids, attention_mask), for **inputs.

        text_pair: a second text for each, whose ids follow at once; pairs are not truncated.
        add_special_tokens: taken either way, for these tokenizers have none to add.
        padding: True or "longest", "max_length", or False.  truncation: on the right, to max_length
        or model_max_length; max_length alone switches it on.  return_tensors: "pt" or None (lists).
        """
        if not isinstance(text, (str, list, tuple)):
            raise TypeError(f"tokenized is a str or a list of str, not {type(text).__name__}")
        check_option("return_tensors", return_tensors, (None, "pt"))
        check_option("padding", padding, (False, None, True, "longest", "max_length"))
        check_option("truncation", truncation, (False, None, True, "longest_first"))
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        rows = [self.encode(t) for t in ([text] if isinstance(text, str) else text)]
        if not rows:
            raise ValueError("the list of texts is empty")
        if text_pair is not None:
            pairs = [text_pair] if isinstance(text_pair, str) else text_pair
            if len(pairs) != len(rows):
                raise ValueError(f"{len(rows)} texts, but text_pair has {len(pairs)}")
            if truncation or (max_length and not padding):
                raise ValueError("pairs of texts are not truncated here: leave out truncation and max_length")
            rows = [row + self.encode(pair) for row, pair in zip(rows, pairs)]
        if truncation or (truncation is None and max_length and not padding):  # as in transformers
            rows = [row[:max_length or self.model_max_length] for row in rows]
        masks = [[1] * len(row) for row in rows]
        if padding:
            length = self._padded_length(rows, padding, max_length)
            masks = [self._pad(mask, 0, length) for mask in masks]
            rows = [self._pad(row, self.pad_token_id, length) for row in rows]
        if return_tensors == "pt":
            return Encoding(input_ids=tensor(rows), attention_mask=tensor(masks))
        rows, masks = (rows[0], masks[0]) if isinstance(text, str) else (rows, masks)
        return Encoding(input_ids=rows, attention_mask=masks)

    def _padded_length(self, rows, padding, max_length):
        if self.pad_token is None:
            raise ValueError("padding needs a pad token, and this tokenizer has none: set "
                             "tokenizer.pad_token = tokenizer.eos_token (the mask will hide it)")
        if padding != "max_length":
            return max(map(len, rows))
        if (length := max_length or self.model_max_length) >= UNLIMITED:
            raise ValueError("padding='max_length' needs max_length: the checkpoint gives none")
        return length

    def _pad(self, row, value, length):
        fill = [value] * (length - len(row))
        return fill + row if self.padding_side == "left" else row + fill

    # -- ids -> text -----------------------------------------------------------------------------

    def _pieces(self, ids, skip_special_tokens):
        """The bytes of each id.  Rows that pad a model's embedding beyond len(self) have none."""
        skip = self._special if skip_special_tokens else ()
        return (b"" if i in skip else self._bytes.get(i, b"") for i in ids)

    def decode(self, ids, skip_special_tokens=False):
        """Text of a list or tensor of ids, or of one id.  What is not UTF-8 becomes U+FFFD."""
        return b"".join(self._pieces(id_list(ids), skip_special_tokens)).decode("utf-8", "replace")

    def batch_decode(self, rows, skip_special_tokens=False):
        """The texts of many rows of ids, such as model.generate returns."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def stream(self, ids, skip_special_tokens=False):
        """Yields the text of ids as they come.  All of it together is what decode gives.

        Bytes that end in the middle of a character are held back until the character is whole.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for id in ids:
            if text := utf8.decode(b"".join(self._pieces(id_list(id), skip_special_tokens))):
                yield text
        if text := utf8.decode(b"", final=True):
            yield text

    def convert_ids_to_tokens(self, ids):
        """Tokens as the files write them ("Ġworld"); None for an id that has none."""
        tokens = [self._tokens.get(i) for i in id_list(ids)]
        return tokens[0] if isinstance(ids, int) else tokens

    def convert_tokens_to_ids(self, tokens):
        """The reverse.  A token that does not exist is an error, not the id of unk_token."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        if tokens not in self._ids:
            raise ValueError(f"the vocabulary has no token {tokens!r} (a space is written 'Ġ')")
        return self._ids[tokens]

    # -- saving ----------------------------------------------------------------------------------

    def save_pretrained(self, folder):
        """Writes the very files that were read, and tokenizer_config.json with today's settings."""
        folder = Path(folder)
        if "tokenizer.json" not in self._files and (folder / "tokenizer.json").exists():
            raise ValueError(f"{folder} has a tokenizer.json already, which would be read instead "
                             "of what is saved now: remove it, or save to another folder")
        added = {str(token.id): dict(content=text, special=token.special, lstrip=False,
                                     rstrip=False, single_word=False, normalized=token.normalized)
                 for text, token in self._added.items()}
        config = self._config | self._named | dict(
            tokenizer_class=self.saved_class, padding_side=self.padding_side,
            model_max_length=self.model_max_length, added_tokens_decoder=added)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in (self._files | {"tokenizer_config.json": text.encode()}).items():
            beside = folder / f".{name}.{os.getpid()}"
            beside.write_bytes(data)
            os.replace(beside, folder / name)          # so that nobody ever reads half a file


class GPT2Tokenizer(Tokenizer):
    """GPT-Neo's.  It has no pad token unless the checkpoint or the caller names one."""
    defaults = Tokenizer.defaults | {"pad_token": None}
    saved_class = "GPT2Tokenizer"


class GPTNeoXTokenizerFast(Tokenizer):
    """GPT-NeoX's and Pythia's.  "Fast" is only the name that transformers gave it."""
    defaults = Tokenizer.defaults | {"pad_token": "<|padding|>"}
    normalizes = True
    saved_class = "GPTNeoXTokenizer"
