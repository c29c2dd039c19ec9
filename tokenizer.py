"""The tokenizers of GPT-Neo and GPT-NeoX, on tiktoken, read from the checkpoint's own files.

Byte-level BPE in five steps:

    1. A regex splits the text into words; a space goes with the word after it: "Hello", " world".
    2. Each word becomes its UTF-8 bytes.  Every byte is a token, so every text can be encoded.
    3. Training merged the most frequent pair of neighbours into a new token, 50,000 times.
       The list of these merges, in order, is the tokenizer.
    4. To encode a word: apply the earliest merge in the list that fits, until none fits.
    5. To decode: join the bytes of the tokens.  A token may end in the middle of a character.

The two families:

                   GPT-Neo (GPT-2's tokenizer)     GPT-NeoX and Pythia
    files          vocab.json + merges.txt         tokenizer.json
    normalizing    none: decoding gives the text   NFC: "e" + accent is the same as "é"
    runs of spaces left to the regex               2 to 24 spaces are one token, found first
    "a   b"        "a", " ", " ", " b"             "a", "   ", "b"

so code, which is indented, takes fewer tokens in GPT-NeoX.  Neither adds a token at the beginning
or the end of a text, and both recognize "<|endoftext|>" wherever it is written in the text.
tokenizer_settings.py reads and checks the files.
"""

import codecs
import json
import operator
import re
import unicodedata
import warnings
from pathlib import Path

import tiktoken

from files import shown, write_files
from tokenizer_settings import (
    CONFIG,
    EXTRA,
    NAMED,
    UNLIMITED,
    AddedToken,
    check_config,
    check_vocab,
    content,
    find_files,
    is_among,
    is_text,
    mergeable_ranks,
    read_files,
    token_bytes,
    wrong,
)

# GPT-2's regex (openai/gpt-2, src/encoder.py) as tiktoken writes it: it finds the same words, with
# possessive quantifiers (++), which do not backtrack.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


# ------------------------------------------------------------------------------------------------
# Byte-pair encoding
# ------------------------------------------------------------------------------------------------

def bpe(word, ranks):
    """Byte-pair encoding: the ids of one word, which is given as bytes.

    ranks: {bytes: id} of all tokens.  Tokens got their ids in the order in which they were learned,
    so the earliest merge that fits is the pair of neighbours whose joined bytes have the smallest
    id.  The rest of this file calls tiktoken, which gives the same ids, about 100 times as fast.
    """
    parts = [word[i:i + 1] for i in range(len(word))]
    while True:
        joined = [left + right for left, right in zip(parts, parts[1:])]
        fits = [(ranks[token], i) for i, token in enumerate(joined) if token in ranks]
        if not fits:
            return [ranks[part] for part in parts]
        _, first = min(fits)
        parts[first:first + 2] = [joined[first]]


# ------------------------------------------------------------------------------------------------
# The tokenizers
# ------------------------------------------------------------------------------------------------

def named_token(name):
    """Two properties of Tokenizer for a named token: pad_token and pad_token_id, for example."""
    def token(self):
        return self._named[name]

    def set_token(self, token):
        if token is not None and token not in self._ids:
            raise ValueError(f"{name} cannot be {shown(token)}: there is no such token, and the "
                             f"model has no row for it; tokenizer.{name} = "
                             "tokenizer.eos_token would do")
        self._named[name] = token

    def id(self):
        return self._ids.get(self._named[name])

    def set_id(self, id):
        set_token(self, None if id is None else self._tokens.get(id, f"id {id}"))

    return property(token, set_token), property(id, set_id)


def side(name):
    """The property padding_side or truncation_side of Tokenizer."""
    def set_side(self, side):
        check_option(name, side, ("left", "right"))
        self.__dict__["_" + name] = side
    return property(lambda self: self.__dict__["_" + name], set_side)


class Tokenizer:
    """Text to ids and ids to text, as a checkpoint's files say."""
    defaults = dict.fromkeys(NAMED)                    # named tokens that no file gives
    normalizes = None                                  # True, False; None: as tokenizer.json says
    saved_class = None                                 # the name of transformers' own class
    is_fast = True
    bos_token, bos_token_id = named_token("bos_token")
    eos_token, eos_token_id = named_token("eos_token")
    unk_token, unk_token_id = named_token("unk_token")
    sep_token, sep_token_id = named_token("sep_token")
    pad_token, pad_token_id = named_token("pad_token")
    cls_token, cls_token_id = named_token("cls_token")
    mask_token, mask_token_id = named_token("mask_token")
    padding_side = side("padding_side")                # "left" to generate, "right" to train
    truncation_side = side("truncation_side")          # the side that is cut off

    # -- text -> ids -----------------------------------------------------------------------------

    def encode(self, text, text_pair=None, **options):
        """Ids of a text.  Special tokens written in it are recognised; none are added.

        options: those of calling the tokenizer, such as return_tensors="pt", which gives (1, T).
        """
        if text_pair is not None or options:
            return self(text, text_pair, **options)["input_ids"]
        return self._encode(text)

    def _encode(self, text):
        """The ids of a text, in the order of tokenizers' added_vocabulary.rs.

        First the added tokens are found in the raw text.  Each piece between them is normalized,
        and those added tokens are found that are searched for in normalized text (GPT-NeoX's runs
        of spaces).  Each piece that is left goes through BPE by itself.
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

    def tokenize(self, text, pair=None, add_special_tokens=False):
        """The tokens of a text as they are written in the files: ["Hello", "Ġworld"]."""
        return self.convert_ids_to_tokens(self._encode(text) + (self._encode(pair) if pair else []))

    def __call__(self, text, text_pair=None, *, return_tensors=None, padding=False, truncation=None,
                 max_length=None, pad_to_multiple_of=None, padding_side=None,
                 add_special_tokens=True, return_attention_mask=None, return_token_type_ids=None,
                 **neutral):
        """One text or a list of B texts -> Encoding with input_ids and attention_mask, each (B, T).

        text_pair: a second text for each, whose ids are appended; pairs cannot be truncated.
        padding, pad_to_multiple_of, padding_side: as for pad.  truncation: to max_length or
        model_max_length, on the truncation_side; max_length alone switches it on.  return_tensors:
        "pt", "np", "jax" or None (lists).  add_special_tokens has no effect: these tokenizers add
        none.  return_token_type_ids: 0 for the ids of text and 1 for those of text_pair.  Raises
        TypeError or ValueError, naming the argument, for what is not supported.
        """
        if not isinstance(text, (str, list, tuple)):
            raise TypeError("a tokenizer is called with a str or a list of str, not "
                            f"{type(text).__name__}")
        check_neutral("calling a tokenizer", neutral, NEUTRAL_IN_CALL)
        check_option("padding", padding, (False, None, True, "longest", "max_length", "do_not_pad"))
        check_option("truncation", truncation,
                     (False, None, True, "longest_first", "only_first", "do_not_truncate"))
        check_count("max_length", max_length)
        rows = [self._encode(t) for t in ([text] if isinstance(text, str) else text)]
        if not rows:
            raise ValueError("the list of texts is empty")
        if truncation is None and max_length and padding is False:         # as in transformers
            truncation = True
        truncation = truncation not in (None, False, "do_not_truncate")
        pairs = self._encode_pairs(text, text_pair, rows, truncation)
        if truncation:
            rows = self._truncate(rows, max_length or self.model_max_length,
                                  padding and pad_to_multiple_of)
        out = self._inputs(rows, pairs, token_type_ids=return_token_type_ids,
                           attention_mask=return_attention_mask)
        self._pad(out, padding, max_length, pad_to_multiple_of, padding_side)
        if return_tensors is None and isinstance(text, str):
            return Encoding({name: rows[0] for name, rows in out.items()})
        return as_tensors(out, return_tensors)

    batch_encode_plus = encode_plus = __call__

    def _encode_pairs(self, text, text_pair, rows, truncation):
        """The ids of the second texts; [] for each text where there is none."""
        if text_pair is None:
            return [[] for _ in rows]
        pairs = [text_pair] if isinstance(text_pair, str) else text_pair
        if len(pairs) != len(rows) or isinstance(text, str) != isinstance(text_pair, str):
            raise ValueError(f"{len(rows)} texts, but text_pair has {len(pairs)}")
        if truncation:
            raise ValueError("pairs of texts are not truncated here: leave out truncation "
                             "and max_length")
        return [self._encode(pair) for pair in pairs]

    def _inputs(self, rows, pairs, **wanted):
        """{name: rows} of what a model is called with, before padding.

        wanted: {name: whether it was asked for, or None where model_input_names decides}.
        """
        both = [*zip(rows, pairs)]
        out = {"input_ids": [row + pair for row, pair in both],
               "token_type_ids": [[0] * len(row) + [1] * len(pair) for row, pair in both],
               "attention_mask": [[1] * (len(row) + len(pair)) for row, pair in both]}
        for name, want in wanted.items():
            if not (name in self.model_input_names if want is None else want):
                del out[name]
        return out

    def _truncate(self, rows, length, multiple):
        """At most `length` ids of each row.  multiple: what the rows will be padded to, or None."""
        if multiple and length < UNLIMITED and length % multiple:
            raise ValueError(f"truncation to {length} tokens, which is not a multiple of "
                             f"pad_to_multiple_of ({multiple})")
        return [row[-length:] if self.truncation_side == "left" else row[:length] for row in rows]

    def pad(self, encoded, padding=True, max_length=None, pad_to_multiple_of=None,
            padding_side=None, return_attention_mask=None, return_tensors=None, verbose=True):
        """Pad what calling the tokenizer returned, a dict or a list of dicts, to one length.

        padding: True or "longest"; "max_length", which means max_length or model_max_length; or
        False.  pad_to_multiple_of: round that length up to a multiple.  padding_side: default is
        the tokenizer's own.  Values other than ids and masks, such as labels, stay as they are.
        Raises ValueError if the tokenizer has no pad token.
        """
        if isinstance(encoded, (list, tuple)):
            if not encoded or not all(isinstance(row, dict) for row in encoded):
                raise TypeError("pad takes a dict with input_ids, or a list of such dicts")
            encoded = {name: [row[name] for row in encoded] for name in encoded[0]}
        if not isinstance(encoded, dict) or "input_ids" not in encoded:
            raise ValueError("pad needs input_ids: give it what calling the tokenizer returned")
        if return_tensors is None:
            return_tensors = tensor_kind(encoded["input_ids"])
        out = {name: as_lists(value) for name, value in encoded.items()}
        alone = bool(out["input_ids"]) and isinstance(out["input_ids"][0], int)
        if alone:
            out = {name: [value] for name, value in out.items()}
        if len({len(rows) for rows in out.values()}) > 1:
            raise ValueError("pad needs as many rows of each: " + ", ".join(
                f"{name} has {len(rows)}" for name, rows in out.items()))
        usual = return_attention_mask is None and "attention_mask" in self.model_input_names
        if return_attention_mask or usual:
            out.setdefault("attention_mask", [[1] * len(row) for row in out["input_ids"]])
        self._pad(out, padding, max_length, pad_to_multiple_of, padding_side)
        if alone:
            out = {name: rows[0] for name, rows in out.items()}
        return as_tensors(out, return_tensors)

    def _pad(self, out, padding, max_length, multiple, padding_side):
        """Pad in place the rows of input_ids, and of all else that has a value for each id."""
        check_option("padding", padding, (False, None, True, "longest", "max_length", "do_not_pad"))
        check_option("padding_side", padding_side, (None, "left", "right"))
        check_count("pad_to_multiple_of", multiple)
        check_count("max_length", max_length)
        if padding in (False, None, "do_not_pad") or not out["input_ids"]:
            return
        length = self._padded_length(out["input_ids"], padding, max_length)
        length += -length % (multiple or 1)
        fills = dict(input_ids=self.pad_token_id, attention_mask=0, token_type_ids=0,
                     special_tokens_mask=1)
        left = (padding_side or self.padding_side) == "left"
        for name in fills.keys() & out.keys():
            filled = [(row, [fills[name]] * (length - len(row))) for row in out[name]]
            out[name] = [fill + row if left else row + fill for row, fill in filled]

    def _padded_length(self, rows, padding, max_length):
        if self.pad_token is None:
            raise ValueError("padding needs a pad token, and this tokenizer has none: set "
                             "tokenizer.pad_token = tokenizer.eos_token (the mask will hide it)")
        if padding != "max_length":
            return max(map(len, rows))
        if (length := max_length or self.model_max_length) >= UNLIMITED:
            raise ValueError("padding='max_length' needs max_length: the checkpoint gives none")
        return length

    # -- ids -> text -----------------------------------------------------------------------------

    def _pieces(self, ids, skip_special_tokens):
        """The bytes of each id; b"" for an id >= len(self), for which some models have rows."""
        skip = self._special_ids if skip_special_tokens else ()
        return (b"" if i in skip else self._bytes.get(i, b"") for i in ids)

    def decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None,
               **neutral):
        """The text of a list or tensor of ids, or of one id.  Bytes that are not UTF-8 give U+FFFD.

        clean_up_tokenization_spaces has no effect: transformers 5 ignores it for BPE as well.
        """
        check_option("clean_up_tokenization_spaces", clean_up_tokenization_spaces,
                     (None, False, True))
        check_neutral("decode", neutral, NEUTRAL_IN_DECODE)
        if clean_up_tokenization_spaces:
            warnings.warn("clean_up_tokenization_spaces=True is ignored for a byte-level BPE",
                          stacklevel=2)
        pieces = self._pieces(id_list(token_ids), skip_special_tokens)
        return b"".join(pieces).decode("utf-8", "replace")

    def batch_decode(self, sequences, skip_special_tokens=False, **options):
        """The texts of many rows of ids, such as model.generate returns; ids alone are one row."""
        rows = as_lists(sequences)
        if not (isinstance(rows, (list, tuple)) and rows and isinstance(rows[0], (list, tuple))):
            rows = [rows]
        return [self.decode(row, skip_special_tokens, **options) for row in rows]

    def stream(self, ids, skip_special_tokens=False):
        """Yield the text of ids while they arrive; joined, the pieces are what decode returns.

        Bytes of an incomplete character are kept back until the character is complete.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for id in ids:
            if text := utf8.decode(b"".join(self._pieces(id_list(id), skip_special_tokens))):
                yield text
        if text := utf8.decode(b"", final=True):
            yield text

    # -- tokens and ids --------------------------------------------------------------------------

    def __len__(self):
        return len(self._ids)                          # a model's embedding may have more rows

    def get_vocab(self):
        """{token: id} of all tokens, the added ones among them."""
        return dict(self._ids)

    vocab = property(get_vocab)

    def get_added_vocab(self):
        """{token: id} of the added tokens, in increasing id."""
        return {text: self._ids[text] for text in sorted(self._added, key=self._ids.get)}

    added_tokens_encoder = property(get_added_vocab)

    @property
    def special_tokens_map(self):
        """{name: token} of the named tokens that there are."""
        return {name: token for name, token in self._named.items() if token is not None}

    @property
    def all_special_tokens(self):
        """The named tokens, then the extra special tokens, each once."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self):
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def convert_ids_to_tokens(self, ids, skip_special_tokens=False):
        """The tokens as written in the files ("Ġworld"); None for an id without a token."""
        special = self.all_special_tokens if skip_special_tokens else ()
        skip = {self._ids[token] for token in special}
        tokens = [self._tokens.get(i) for i in id_list(ids)
                  if i not in skip or isinstance(ids, int)]
        return tokens[0] if isinstance(ids, int) else tokens

    def convert_tokens_to_ids(self, tokens):
        """The ids of tokens; a ValueError for an unknown token, not the id of unk_token."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        if tokens not in self._ids:
            raise ValueError(f"the vocabulary has no token {shown(tokens)} (a space "
                             "is written 'Ġ')")
        return self._ids[tokens]

    def convert_tokens_to_string(self, tokens):
        """The text of tokens, which are given as written in the files."""
        return b"".join(map(token_bytes, tokens)).decode("utf-8", "replace")

    def num_special_tokens_to_add(self, pair=False):
        return 0

    # -- more tokens -----------------------------------------------------------------------------

    def add_tokens(self, tokens, special_tokens=False):
        """Add tokens after the last id, and return how many of them were new.

        tokens: a text, an AddedToken, or a list of them.  Call
        model.resize_token_embeddings(len(tokenizer)) before you give the model their ids.
        """
        if isinstance(tokens, AddedToken) or not isinstance(tokens, (list, tuple)):
            tokens = [tokens]
        tokens = [as_added_token(token, special_tokens) for token in tokens]
        count = self._add(tokens)
        self._index()
        return count

    def add_special_tokens(self, special_tokens, replace_extra_special_tokens=True):
        """Set {"pad_token": "<pad>", "extra_special_tokens": [...]}, and add the new ones."""
        if not isinstance(special_tokens, dict):
            raise TypeError('special tokens are a dict such as {"pad_token": "<pad>"}, not a '
                            f"{type(special_tokens).__name__}: add_tokens takes a list")
        tokens, named, extra = [], {}, list(self.extra_special_tokens)
        for name, value in special_tokens.items():
            if name in EXTRA and isinstance(value, (list, tuple)):
                new = [as_added_token(token, True) for token in value]
                texts = [token.content for token in new]
                extra = texts if texts and replace_extra_special_tokens else extra + [
                    text for text in texts if text not in extra]
                tokens += new
            elif name in NAMED:
                tokens.append(as_added_token(value, True))
                named[name] = tokens[-1].content
            else:
                raise ValueError(f"{shown(name)} is not a special token; they are "
                                 f"{', '.join(NAMED)} and {EXTRA[0]}, which is a list")
        count = self.add_tokens(tokens)
        self._named |= named
        self.extra_special_tokens = extra
        return count

    def _add(self, tokens):
        """Add tokens with the ids that `tokenizers` gives them; return how many changed anything.

        As in `tokenizers`, the first free id is looked up once, before the first token is added.
        """
        free = max([self.vocab_size - 1, *(self._ids[text] for text in self._added)]) + 1
        changed = 0
        for token in tokens:
            text = token.content
            if text not in self._ids:
                if free in self._taken:
                    raise wrong(self._source, f"added token {shown(text)}",
                                f"would have id {free}, which is taken")
                self._ids[text] = free
                self._taken.add(free)
                free += 1
            token = token._replace(id=self._ids[text])
            changed += self._added.get(text) != token
            self._added[text] = token
            if token.special:                          # and stays special, as in `tokenizers`
                self._special.add(text)
        return changed

    # -- files -----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_folder, *, revision=None, cache_dir=None,
                        local_files_only=False, token=None, **overrides):
        """Read the tokenizer of a checkpoint: a folder or a hub id.

        overrides: values of tokenizer_settings.CONFIG, such as pad_token or padding_side, which
        replace those of the files.  Raises OSError for files that are missing, ValueError, naming
        file and field, for what is not supported, and TypeError for an unknown argument.
        """
        hub = dict(cache_dir=cache_dir, local_files_only=local_files_only, token=token)
        neutral = {name: overrides.pop(name) for name in NEUTRAL_IN_LOADING if name in overrides}
        check_neutral("from_pretrained", neutral, NEUTRAL_IN_LOADING)
        if unknown := overrides.keys() - CONFIG.keys():
            raise TypeError(f"from_pretrained does not know {shown(sorted(unknown))}; it knows "
                            "revision, cache_dir, local_files_only, token and the fields of "
                            "tokenizer_config.json, such as pad_token and padding_side")
        check_config("from_pretrained", overrides, cls, False)
        paths = find_files(name_or_folder, revision, **{name: v for name, v in hub.items() if v})
        tokenizer = cls(paths, overrides)
        tokenizer.name_or_path = str(name_or_folder)
        return tokenizer

    def __init__(self, paths, overrides):
        read = read_files(paths, overrides, type(self))
        self._files = {name: path.read_bytes() for name, path in paths.items()}
        check_vocab(read.source, read.vocab)
        self._source, self._nfc, self._config = read.source, read.nfc, read.config
        self._bpe = tiktoken.Encoding("bpe", pat_str=WORDS, special_tokens={}, mergeable_ranks=(
            mergeable_ranks(read.source, read.vocab, read.merges)))
        self.vocab_size = len(read.vocab)              # without added tokens, as in transformers
        self._ids, self._taken = dict(read.vocab), set(read.vocab.values())
        self._added, self._special = {}, set()
        self._add_all(read)
        self._index()
        self.padding_side = read.config.get("padding_side", "right")
        self.truncation_side = read.config.get("truncation_side", "right")
        length = read.config.get("model_max_length", read.config.get("max_len"))
        self.model_max_length = int(length or UNLIMITED)
        self.model_input_names = read.config.get("model_input_names",
                                                 ["input_ids", "attention_mask"])

    def _add_all(self, read):
        """Add the tokens of the files, in the order of transformers' TokenizersBackend.

        A token without an id gets the next free one.  transformers does not read the ids in the
        files; so an id that is given there must be the one that transformers would assign.
        """
        named = {name: read.config.get(name, default) for name, default in self.defaults.items()}
        self._named = {name: token and content(token) for name, token in named.items()}
        extra = (read.config.get("extra_special_tokens")
                 or read.config.get("additional_special_tokens") or [])
        self.extra_special_tokens = [content(token) for token in extra]
        in_file = [] if self.normalizes is not None else read.in_file
        tokens = [token._replace(special=token.special or token.content in self._named.values())
                  for token in read.listed]
        listed = {token.content for token in in_file + tokens}
        for token in [*named.values(), *extra]:
            if token is not None and content(token) not in listed:
                listed.add(content(token))
                special = content(token) in self._named.values() or (
                    isinstance(token, str) and token in self.extra_special_tokens)
                tokens.append(as_added_token(token, special))
        self._add(in_file)
        self._add(tokens)
        for token in read.in_file + read.listed:
            path = read.source if token in read.in_file else read.lister
            if self._ids.get(token.content) != token.id:
                raise wrong(path, f"added token {shown(token.content)}",
                            f"its id is given as {token.id}, "
                            f"but would be {self._ids.get(token.content, 'none')} in transformers")

    def _index(self):
        """Make the tables between tokens, ids and bytes, and the regexes for added tokens."""
        self._tokens = {id: self._written(text) for text, id in self._ids.items()}
        self._bytes = {id: token_bytes(text) for id, text in self._tokens.items()}
        self._special_ids = {id for id, text in self._tokens.items() if text in self._special}
        self._raw = {text: token.id for text, token in self._added.items() if not token.normalized}
        self._normalized = {self._written(text): token.id
                            for text, token in self._added.items() if token.normalized}
        if len(self._raw) + len(self._normalized) < len(self._added):
            twins = [text for text in self._added if self._written(text) != text]
            raise wrong(self._source, f"added token {shown(twins[0])}",
                        "is the same as another one in normalized text")
        self._cut_raw, self._cut_normalized = matcher(self._raw), matcher(self._normalized)

    def _written(self, text):
        """A token as it is found in a text: normalized, if it is an added token with that flag."""
        token = self._added.get(text)
        return self._normalize(text) if token and token.normalized else text

    def save_pretrained(self, folder, **neutral):
        """Write the files that were read, unchanged, and tokenizer_config.json with the settings.

        tokenizer.json is changed only where tokens have been added since.  Raises ValueError if
        the folder has another tokenizer.json, and OSError if it cannot be written.
        """
        check_neutral("save_pretrained", neutral, NEUTRAL_IN_SAVING)
        folder = Path(folder)
        if "tokenizer.json" not in self._files and (folder / "tokenizer.json").exists():
            raise ValueError(f"{folder} has a tokenizer.json already, which would be read instead "
                             "of what is saved now: remove it, or save to another folder")
        added = {self._ids[text]: dict(
            content=text, special=text in self._special, lstrip=False, rstrip=False,
            single_word=False, normalized=self._added[text].normalized)
                 for text in self.get_added_vocab()}
        config = self._config | self._named | dict(
            tokenizer_class=self.saved_class, padding_side=self.padding_side,
            truncation_side=self.truncation_side, model_max_length=self.model_max_length,
            extra_special_tokens=self.extra_special_tokens, added_tokens_decoder=added)
        config.pop("additional_special_tokens", None)
        files = self._files | {"tokenizer_config.json": pretty(config)}
        if "tokenizer.json" in files:
            data = json.loads(files["tokenizer.json"])
            if len(added) > len(data["added_tokens"]):
                data["added_tokens"] = [dict(id=id, **token) for id, token in added.items()]
                files["tokenizer.json"] = pretty(data)
        essential = "tokenizer.json" if "tokenizer.json" in files else "vocab.json"
        write_files(folder, dict(sorted(files.items(), key=lambda file: file[0] == essential)))


class GPT2Tokenizer(Tokenizer):
    """The tokenizer of GPT-Neo.  It has no pad token unless the files or the caller name one."""
    defaults = Tokenizer.defaults | dict.fromkeys(["bos_token", "eos_token", "unk_token"],
                                                  "<|endoftext|>")
    normalizes = False
    saved_class = "GPT2Tokenizer"


class GPTNeoXTokenizerFast(Tokenizer):
    """The tokenizer of GPT-NeoX and Pythia, under transformers' name."""
    defaults = GPT2Tokenizer.defaults | {"pad_token": "<|padding|>"}
    normalizes = True
    saved_class = "GPTNeoXTokenizer"


class PreTrainedTokenizerFast(Tokenizer):
    """A tokenizer.json of another kind, as in Polyglot-Ko; it has no named tokens by default."""
    saved_class = "PreTrainedTokenizerFast"


# transformers' names, as tokenizer_config.json gives them in tokenizer_class.
CLASSES = {
    "GPT2Tokenizer": GPT2Tokenizer, "GPT2TokenizerFast": GPT2Tokenizer,
    "GPTNeoXTokenizer": GPTNeoXTokenizerFast, "GPTNeoXTokenizerFast": GPTNeoXTokenizerFast,
    "PreTrainedTokenizerFast": PreTrainedTokenizerFast,
    "TokenizersBackend": PreTrainedTokenizerFast}


def class_named(name, path, has_json):
    """The class for the tokenizer_class in the file `path`; ValueError for an unsupported one."""
    if isinstance(name, str) and name in CLASSES:
        return CLASSES[name]
    if has_json and isinstance(name, str) and name.removesuffix("Fast") == "LlamaTokenizer":
        return PreTrainedTokenizerFast                 # as transformers does where it is byte-level
    raise wrong(path, "tokenizer_class", f"{shown(name)} is not supported; supported are "
                                         f"{', '.join(CLASSES)}: use transformers' "
                                         "tokenizer for it")


# ------------------------------------------------------------------------------------------------
# What a tokenizer takes and returns
# ------------------------------------------------------------------------------------------------

class Encoding(dict):
    """What a tokenizer returns: input_ids and attention_mask, as items and as attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name} here, only {', '.join(self)}") from None

    def to(self, *args, **kwargs):
        """Move the tensors, in place: .to("cuda").  A dtype given here does not change the ids."""
        if not all(hasattr(value, "to") for value in self.values()):
            raise ValueError('lists have no device: ask the tokenizer for return_tensors="pt"')
        for name, value in self.items():
            moved = value.to(*args, **kwargs)
            same = moved.is_floating_point() == value.is_floating_point()
            self[name] = moved if same else value.to(moved.device)
        return self


# Arguments of transformers' tokenizers that are not implemented here, with the values at which
# they change nothing.
NEUTRAL_IN_CALL = {
    "text_target": (None,), "text_pair_target": (None,), "stride": (0,),
    "is_split_into_words": (False,), "return_overflowing_tokens": (False,),
    "return_special_tokens_mask": (False,), "return_offsets_mapping": (False,),
    "return_length": (False,), "split_special_tokens": (None, False),
    "tokenizer_kwargs": (None, {}), "verbose": (True, False)}
NEUTRAL_IN_DECODE = {"spaces_between_special_tokens": (True, False),
                     "use_source_tokenizer": (False,)}
NEUTRAL_IN_LOADING = {
    "use_fast": (True, False, None), "trust_remote_code": (False, None), "force_download": (False,),
    "subfolder": (None, ""), "proxies": (None, {}), "legacy": (None, True, False),
    "gguf_file": (None,), "code_revision": (None,), "tokenizer_type": (None,),
    "use_auth_token": (None,), "resume_download": (None, True, False), "from_slow": (None, False),
    "verbose": (True, False), "tokenizer_file": (None,), "config": (None,)}
NEUTRAL_IN_SAVING = {"legacy_format": (None, True, False), "filename_prefix": (None,),
                     "push_to_hub": (None, False), "token": (None,)}


def check_neutral(function, arguments, neutral):
    """Raise TypeError for an unknown argument, and for a value that would change something."""
    for name, value in arguments.items():
        if name not in neutral:
            raise TypeError(f"{function} does not know {shown(name)}")
        if not is_among(value, neutral[name]):
            raise TypeError(f"{function}: {name}={shown(value)} is not implemented here; accepted "
                            "is " + " or ".join(map(repr, neutral[name])))


def check_option(name, value, supported):
    """Raise ValueError unless the value is one of the supported ones."""
    if not is_among(value, supported):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, supported))}, not "
                         f"{shown(value)}")


def check_count(name, value):
    """Raise ValueError unless the value is None or an int above 0."""
    if value is not None and not (type(value) is int and value > 0):
        raise ValueError(f"{name} must be a whole number, at least 1, not {shown(value)}")


def tensor(rows, kind):
    """Rows of ids (B, T), or single numbers (B,), int64: a tensor for kind "pt", an array for "np".

    For "jax" JAX's array, int32.  Labels may be fractions; these keep their type.
    """
    rows_of_ids = [row for row in rows if isinstance(row, (list, tuple))]
    if len(lengths := {len(row) for row in rows_of_ids}) > 1:
        raise ValueError(f"the texts have {min(lengths)} to {max(lengths)} tokens, and a tensor "
                         "needs rows of one length: pass padding=True")
    firsts = [row[0] for row in rows_of_ids if row] if rows_of_ids else rows
    fractions = any(isinstance(number, float) for number in firsts)
    if kind == "np":
        import numpy  # imported here, like torch, because the rest of this file needs neither
        return numpy.array(rows, dtype=None if fractions else numpy.int64)
    if kind == "jax":
        try:
            import jax
        except ImportError:
            raise ImportError('return_tensors="jax" needs the package jax: '
                              'pip install jax') from None
        return jax.numpy.array(rows, dtype=None if fractions else int)
    import torch
    return torch.tensor(rows, dtype=None if fractions else torch.long)


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


def as_added_token(token, special):
    """An AddedToken from a text, an entry of a file, or a token object of transformers'."""
    if isinstance(token, str):
        token = AddedToken(token, special, not special)
    elif isinstance(token, dict):
        special = special or token.get("special", False)
        token = AddedToken(token["content"], special,
                           token.get("normalized", not token.get("special", False)))
    elif any(getattr(token, flag, False) for flag in ("lstrip", "rstrip", "single_word")):
        raise ValueError(f"added token {shown(token.content)}: lstrip, rstrip and single_word are "
                         "not implemented here")
    elif not isinstance(token, AddedToken):
        if not hasattr(token, "content"):
            raise TypeError(f"a token must be a str or an AddedToken, not {type(token).__name__}")
        token = AddedToken(token.content, special or token.special, token.normalized)
    if not is_text(token.content):
        raise ValueError(f"a token cannot be {shown(token.content)}")
    return token._replace(special=token.special or special)


def pretty(data):
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def as_lists(value):
    """Lists in place of tensors and arrays, and of lists of them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if not isinstance(value, (list, tuple)):
        return value
    return [v.tolist() if hasattr(v, "tolist") else v for v in value]


def tensor_kind(ids):
    """"pt", "np" or "jax" where the ids are tensors or arrays, or a list of them; else None."""
    first = ids if hasattr(ids, "tolist") else next(iter(ids), None)
    if not hasattr(first, "tolist"):
        return None
    package = type(first).__module__.split(".")[0]
    return {"numpy": "np", "jax": "jax", "jaxlib": "jax"}.get(package, "pt")


def as_tensors(out, kind):
    check_option("return_tensors", kind, (None, "pt", "np", "jax"))
    if kind is None:
        return Encoding(out)
    return Encoding({name: tensor(rows, kind) for name, rows in out.items()})


# ------------------------------------------------------------------------------------------------
# Cutting text
# ------------------------------------------------------------------------------------------------

def matcher(texts):
    """A regex that finds these texts, at each place the longest one, as `tokenizers` does."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


LONG_SPACE = re.compile(r"[^\S\x1c-\x1f]{1000,}")     # Python's \s has U+001C to U+001F, WORDS' not


def cut_long_space(text):
    """The text in pieces, split in long runs of spaces: tiktoken fails on 1,000,000 spaces.

    (Its regex engine gives up while it backtracks in \\s+(?!\\S).)  The split is before the last
    space of a run, which WORDS joins to the next word, so the words stay the same.
    """
    if len(text) < 1_000_000:
        return [text]
    cuts = [run.end() - 1 for run in LONG_SPACE.finditer(text) if run.end() < len(text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]


# ------------------------------------------------------------------------------------------------
# Unicode normalization, exactly as the library `tokenizers` does it
# ------------------------------------------------------------------------------------------------

# tokenizers' NFC is that of Unicode 9 and leaves the combining marks of later versions as they are.
# Python's NFC knows more of them, so only the pieces of text between these marks are normalized.
LATER_THAN_UNICODE_9 = re.compile(
    "([\u05C8\u05C9\u07FD\u0897-\u08D3\u09FE\u0C3C\u0D3B\u0D3C\u0EBA\u1715\u1ABF-\u1AF0"
    "\u1DF6-\u1DFA\uA82C\U000105C9-\U000105E4\U00010D24-\U00010F85\U00011070\U0001133B"
    "\U000113B8-\U000113D0\U0001145E\U00011839-\U00011A99\U00011D42-\U00011F42"
    "\U0001611E-\U0001612F\U00016D67\U00016D68\U00016FF0\U00016FF1\U0001D127\U0001D128"
    "\U0001D250-\U0001D281\U0001E08F-\U0001E6F5])")


def nfc(text):
    """Unicode normal form C: a letter and its accents become one character if one exists."""
    if text.isascii():
        return text
    pieces = LATER_THAN_UNICODE_9.split(text)
    return "".join(unicodedata.normalize("NFC", piece) for piece in pieces)
