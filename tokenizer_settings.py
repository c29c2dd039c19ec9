"""Reading the tokenizer files of a checkpoint, and checking them field by field.

    tokenizer.json             the whole tokenizer, as the library `tokenizers` writes it
    vocab.json + merges.txt    the older form, without added tokens
    tokenizer_config.json      named tokens, sides, lengths, and the class
    special_tokens_map.json, added_tokens.json    older forms of what is in tokenizer_config.json

Each table below lists the fields of one JSON object and the supported values.  A field that changes
the ids or the text has the effect that it has in transformers, or it is refused with one line that
names the file and the field.  No field is ignored without a rule.
"""

import json
from typing import NamedTuple

from files import fetch, plain, read_json, read_small, shown

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")
UNLIMITED = int(1e30)                  # transformers' model_max_length if no file gives one
LARGE = int(1e20)                      # from here on transformers assumes no limit


class AddedToken(NamedTuple):
    """A token that is found in the text before BPE."""
    content: str
    special: bool = False              # decode(..., skip_special_tokens=True) leaves it out
    normalized: bool = True            # searched for in the normalized text, not in the raw text
    id: int | None = None              # as given in a file


class Contents(NamedTuple):
    """The contents of the files of one tokenizer."""
    source: object                     # the path of the vocabulary, for messages
    vocab: dict                        # {token: id}
    merges: list                       # [(left, right)], earliest first
    nfc: bool                          # whether texts are normalized to Unicode's form C
    in_file: list                      # AddedTokens of tokenizer.json
    listed: list                       # AddedTokens that transformers adds, in increasing id
    lister: object                     # the path of the file with this list, for messages
    config: dict                       # tokenizer_config.json and the caller's settings


# ------------------------------------------------------------------------------------------------
# Checking
# ------------------------------------------------------------------------------------------------

def wrong(path, field, problem):
    """The error for one field of a file: a line of at most 300 characters, besides a long path."""
    return ValueError(f"{plain(path, 1000)}: field {plain(field)}: {plain(problem, 200)}")


class Rule(NamedTuple):
    """The values that a field may have: a test for them, and their description for messages."""
    allows: object
    words: str


def is_among(value, values):
    """Is the value one of these, and of the same type?  (In Python True equals 1.)

    A text may be of a subclass, like transformers' TensorType.PYTORCH, which equals "pt".
    """
    return any((type(value) is type(v) or isinstance(value, str)) and value == v for v in values)


def one_of(*values):
    """The rule for a field that may have one of these values."""
    words = " or ".join(dict.fromkeys(json.dumps(value) for value in values))
    return Rule(lambda value: is_among(value, values), words)


def is_text(value):
    """Is it a text that is not empty and that UTF-8 can hold (no half of a surrogate pair)?"""
    return type(value) is str and value == value.encode("utf-8", "ignore").decode() != ""


def is_id(value):
    return type(value) is int and 0 <= value < 2**32       # `tokenizers` keeps ids in 32 bits


def is_length(value):
    return value is None or (type(value) is int and value > 0) or (
        type(value) is float and LARGE < value < float("inf"))


def is_named_token(value):
    return value is None or is_text(value) or (
        isinstance(value, dict) and value.get("__type") == "AddedToken")


def is_extra(value):
    return not value and value in (None, [], {}) or (
        isinstance(value, list) and all(token is not None and is_named_token(token)
                                        for token in value))


def is_chat_template(value):
    """Chat templates are not used here, but transformers reads them."""
    return value is None or isinstance(value, (str, dict)) or (isinstance(value, list) and all(
        isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in value))


def is_input_names(value):
    names = ("input_ids", "token_type_ids", "attention_mask")
    return isinstance(value, list) and value[:1] == ["input_ids"] and all(
        type(name) is str and name in names for name in value) and len({*value}) == len(value)


FLAG, OFF, ANY = one_of(True, False), one_of(None, False), Rule(lambda value: True, "anything")
NEUTRAL_FLAG, NOTHING = one_of(None, True, False), one_of(None)
ABSENT = Rule(lambda value: False, "only a file without this field")   # null fails in transformers
TEXT = Rule(is_text, "a text that is not empty and has no half of a surrogate pair")
ID = Rule(is_id, "a whole number from 0 to 4294967295")
COUNT = Rule(lambda value: value is None or (is_id(value) and value > 0),
             "null or a whole number above 0")
LENGTH = Rule(is_length, "null or a whole number above 0")
SIDE = one_of("left", "right")
OBJECT = Rule(lambda v: isinstance(v, dict), "an object")
LIST = Rule(lambda v: isinstance(v, list), "a list")

ADDED = {"content": TEXT, "special": FLAG, "normalized": FLAG,
         "single_word": one_of(False), "lstrip": one_of(False), "rstrip": one_of(False)}
TYPED = {"__type": one_of("AddedToken"), **ADDED}


def check(path, prefix, data, rules, required=()):
    """Raise ValueError for the first field of an object that its table of rules does not allow."""
    if not isinstance(data, dict):
        raise wrong(path, prefix.rstrip(".") or "(all)", f"{shown(data)} is not an object")
    for key in required:
        if key not in data:
            raise wrong(path, prefix + key, "is missing")
    for key, value in data.items():
        name = prefix + (key if key.isidentifier() and len(key) < 60 else shown(key))
        if key not in rules:
            raise wrong(path, name, f"is not known; known are {', '.join(rules)}")
        if not rules[key].allows(value):
            raise wrong(path, name,
                        f"{shown(value)} is not supported; supported is {rules[key].words}")


# ------------------------------------------------------------------------------------------------
# tokenizer.json
# ------------------------------------------------------------------------------------------------

SECTIONS = {"version": one_of("1.0"), "truncation": ANY, "padding": ANY, "added_tokens": LIST,
            "normalizer": ANY, "pre_tokenizer": ANY, "post_processor": ANY, "decoder": ANY,
            "model": OBJECT}
MODEL = {"type": one_of("BPE"), "vocab": OBJECT, "merges": LIST, "dropout": one_of(None, 0, 0.0),
         "unk_token": Rule(lambda v: v is None or is_text(v), "null or a text"),
         "continuing_subword_prefix": one_of(None, ""), "end_of_word_suffix": one_of(None, ""),
         "fuse_unk": FLAG, "byte_fallback": one_of(False), "ignore_merges": one_of(False)}
PADDING = {"strategy": ANY, "direction": one_of("Left", "Right"), "pad_to_multiple_of": COUNT,
           "pad_id": ID, "pad_type_id": one_of(0), "pad_token": TEXT}
TRUNCATION = {"direction": one_of("Left", "Right"), "max_length": Rule(is_id, ID.words),
              "strategy": one_of("LongestFirst", "OnlyFirst", "OnlySecond"), "stride": one_of(0)}

# The steps of a tokenizer: {section: {type: its fields}}.  The flags of the decoder and of the
# post_processor change only offsets, which are not computed here.
A, B = ({"Sequence": {"id": id, "type_id": i}} for i, id in enumerate("AB"))
OFFSETS = {"add_prefix_space": FLAG, "trim_offsets": FLAG, "use_regex": FLAG}
STEPS = {
    "normalizer": {"NFC": {}},
    "pre_tokenizer": {"ByteLevel": {"add_prefix_space": one_of(False), "trim_offsets": FLAG,
                                    "use_regex": one_of(True)}},
    "decoder": {"ByteLevel": OFFSETS},
    "post_processor": {"ByteLevel": OFFSETS, "TemplateProcessing": {
        "single": one_of([A]), "pair": one_of([A, B]), "special_tokens": one_of({})}},
}
LISTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders",
         "post_processor": "processors"}


def check_steps(path, data, section):
    """Check the steps of one section; return their types, [] if the section is null."""
    step, inside = data.get(section), f"{section}."
    if step is None:
        return []
    if isinstance(step, dict) and step.get("type") == "Sequence":
        check(path, inside, step, {"type": ANY, LISTS[section]: LIST}, [LISTS[section]])
        steps, inside = step[LISTS[section]], f"{section}.{LISTS[section]}."
    else:
        steps = [step]
    for step in steps:
        check(path, inside, step, dict.fromkeys(step if isinstance(step, dict) else (), ANY),
              ["type"])
        known = STEPS[section]
        if not (type(step["type"]) is str and step["type"] in known):
            raise wrong(path, f"{inside}type", f"{shown(step['type'])} is not supported; supported "
                                               f"is {' or '.join(known)}")
        rules = known[step["type"]]
        needed = [key for key in rules if key not in ("use_regex", "trim_offsets")]
        check(path, inside, step, {"type": ANY, **rules}, needed)
    return [step["type"] for step in steps]


def read_tokenizer_json(path, normalizes):
    """tokenizer.json -> vocabulary, merges, whether it normalizes, added tokens, settings.

    normalizes: True or False for a class of transformers that always or never normalizes, None for
    the class that follows the file.
    """
    data = read_json(path, unique=True)
    check(path, "", data, SECTIONS, ["model", "added_tokens"])
    model = data["model"]
    check(path, "model.", model, MODEL, ["vocab", "merges"])
    nfc = bool(check_steps(path, data, "normalizer"))
    if normalizes not in (None, nfc):
        raise wrong(path, "normalizer", f"{'NFC' if nfc else 'none'}, but this tokenizer class "
                    f"{'always' if normalizes else 'never'} normalizes to NFC in transformers; "
                    "PreTrainedTokenizerFast does as the file says")
    for section in ("pre_tokenizer", "decoder"):
        if check_steps(path, data, section) != ["ByteLevel"]:
            raise wrong(path, section, "must be one ByteLevel step")
    check_steps(path, data, "post_processor")
    settings = {}
    if (padding := data.get("padding")) is not None:
        check(path, "padding.", padding, PADDING, PADDING)
        strategy = padding["strategy"]
        if strategy != "BatchLongest" and not (isinstance(strategy, dict)
                                               and [*strategy] == ["Fixed"]
                                               and is_id(strategy["Fixed"])):
            raise wrong(path, "padding.strategy", 'must be "BatchLongest" or {"Fixed": length}')
        settings |= dict(padding_side=padding["direction"].lower(), pad_token=padding["pad_token"])
    if (truncation := data.get("truncation")) is not None:
        check(path, "truncation.", truncation, TRUNCATION, TRUNCATION)
        settings["truncation_side"] = truncation["direction"].lower()
    needed = ["id", *ADDED] if normalizes is None else ["id", "content"]    # `tokenizers` needs all
    added = [added_token(path, f"added_tokens[{i}].", entry, {"id": ID, **ADDED}, needed)
             for i, entry in enumerate(data["added_tokens"])]
    return model["vocab"], read_pairs(path, model["merges"]), nfc, added, settings


def read_pairs(path, merges):
    """The pairs in model.merges, where each pair is written "a b" or ["a", "b"]."""
    pairs = [merge.split(" ") if type(merge) is str else merge for merge in merges]
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(is_text, pair)) or (
                type(merges[i]) is not type(merges[0])):
            raise wrong(path, f"model.merges[{i}]", f"{shown(merges[i])} is not two tokens")
    return pairs


def added_token(path, prefix, entry, rules, required=("content",)):
    """The AddedToken of one entry of a file; ValueError for one that the rules do not allow."""
    check(path, prefix, entry, rules, required)
    special = entry.get("special", False)
    return AddedToken(entry["content"], special, entry.get("normalized", not special),
                      entry.get("id"))


# ------------------------------------------------------------------------------------------------
# vocab.json and merges.txt
# ------------------------------------------------------------------------------------------------

def read_merges(path):
    """The pairs of merges.txt: one merge a line, earliest first, after a "#version" line."""
    try:
        lines = read_small(path).decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise wrong(path, f"byte {error.start}", "is not UTF-8: get the file again") from None
    pairs = []
    for number, line in enumerate(lines if lines[-1] else lines[:-1], start=1):
        if line.startswith("#version"):
            continue
        pairs.append(line.split(" "))
        if len(pairs[-1]) != 2 or not all(pairs[-1]):
            raise wrong(path, f"line {number}", f"{shown(line)} is not two tokens and a space")
    return pairs


# ------------------------------------------------------------------------------------------------
# Vocabulary and merges, and why tiktoken gives the ids that the merges say
# ------------------------------------------------------------------------------------------------

def byte_alphabet():
    """{character: byte}, as the files write bytes.  Space is "Ġ", newline "Ċ", "a" is "a".

    Bytes without a visible character get the characters from U+0100 on, in increasing order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    invisible = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(invisible)}


BYTE = byte_alphabet()
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}                # GPT-NeoX has no tokens for these


def token_bytes(token):
    """The bytes of a token (tokenizers: byte_level.rs, decode_chain)."""
    try:
        return bytes([BYTE[c] for c in token])
    except KeyError:                               # an added token such as "    " is plain text
        return token.encode()


def check_vocab(path, vocab):
    """Raise ValueError unless ids are distinct integers and every byte of UTF-8 text has one."""
    for token, id in vocab.items():
        if not (is_text(token) and is_id(id)):
            raise wrong(path, f"vocabulary, {shown(token)}",
                        f"{shown(id)} is not an id (a whole number from 0 to 4294967295) of a text")
    if len(set(vocab.values())) != len(vocab):
        raise wrong(path, "vocabulary", "two tokens have the same id")
    missing = [f"{b:02X}" for c, b in BYTE.items() if c not in vocab and b not in NEVER_IN_UTF8]
    if missing:
        raise wrong(path, "vocabulary", f"is not byte-level: {len(missing)} of the bytes have no "
                                        f"token, such as {missing[0]}")


def rival(left, right, vocab, halves):
    """A pair that merges across the boundary of left and right before both exist, or None.

    If there is such a pair, left and right never become neighbours, and their merge never happens.
    To find it, undo the merges of the two tokens, the latest first, and check after each step
    whether the pieces at the boundary form a merge that comes before the one just undone.
    halves: {token: its pair}.
    """
    while len(left) > 1 or len(right) > 1:
        if len(right) == 1 or (len(left) > 1 and vocab[left] > vocab[right]):
            undone, left = vocab[left], halves[left][1]
        else:                # + 1: of two equal merges the left one, at the boundary, is first
            undone, right = vocab[right] + 1, halves[right][0]
        if left + right in halves and vocab[left + right] < undone:
            return left, right


def merge_of(left, right):
    """A merge, as an error names it."""
    return f"merge {shown(left)} {shown(right)}"


def mergeable_ranks(path, vocab, merges):
    """{bytes: id} for tiktoken, after a proof that it gives the same ids as the list of merges.

    The files list merges of pairs.  tiktoken has only tokens: it merges any two neighbours that
    together are a token, lowest id first, and does not split a word that is a token.  This gives
    the same ids if ids increase in the order of the merges, and if every token is made by its own
    merge and by no other.  Raises ValueError, naming the merge, for files where that is not so.
    """
    halves, last = {}, -1
    for left, right in merges:
        token = left + right
        for part in (left, right):
            if part not in vocab or not (part in BYTE or part in halves):
                raise wrong(path, merge_of(left, right),
                            f"uses {shown(part)}, which no byte and no earlier merge makes")
        if vocab.get(token, -1) <= last:
            raise wrong(path, merge_of(left, right),
                        f"ids must grow with the merges, but {shown(token)} has "
                        f"{vocab.get(token, 'none')}, after {last}")
        if pair := rival(left, right, vocab, halves):
            raise wrong(path, merge_of(left, right),
                        f"can never happen, because {shown(pair[0])} {shown(pair[1])} comes "
                        "first; tiktoken would still make it, so this file cannot be used")
        halves[token], last = (left, right), vocab[token]
    return {token_bytes(t): vocab[t] for t in (*(c for c in BYTE if c in vocab), *halves)}


# ------------------------------------------------------------------------------------------------
# tokenizer_config.json and its older forms
# ------------------------------------------------------------------------------------------------

TOKEN = Rule(is_named_token, 'null, a text, or {"__type": "AddedToken", "content": ...}')
CONFIG = {
    **dict.fromkeys(NAMED, TOKEN),
    **dict.fromkeys(EXTRA, Rule(is_extra, "null or a list of tokens")),
    "padding_side": SIDE, "truncation_side": SIDE, "model_max_length": LENGTH, "max_len": LENGTH,
    "add_prefix_space": one_of(False), "split_special_tokens": one_of(False),
    "errors": one_of(None, "replace"),
    "clean_up_tokenization_spaces": NEUTRAL_FLAG,       # without effect on BPE in transformers
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": OFF,
    "trim_offsets": NEUTRAL_FLAG, "add_bos_token": OFF, "add_eos_token": OFF,
    "added_tokens_decoder": OBJECT, "chat_template": Rule(is_chat_template, "a text"),
    "chat_control_tokens": Rule(lambda v: v is None or isinstance(v, list), "null or a list"),
    "tokenizer_class": Rule(lambda v: v is None or is_text(v), "null or a text"),
    "model_input_names": Rule(is_input_names, 'a list of "input_ids", "attention_mask"'),
    "auto_map": ABSENT, "fast_tokenizer_files": ABSENT, "model_specific_special_tokens": NOTHING,
}
# Arguments of transformers' constructors, which no file of a checkpoint should set.
CONSTRUCTOR_ARGUMENTS = (
    "vocab", "merges", "tokenizer_object", "gguf_file", "init_inputs", "post_processor",
    "tokenizer_padding", "tokenizer_truncation", "_json_padding", "_json_truncation",
    "_spm_precompiled_charsmap", "config", "args", "kwargs", "self", "cls", "__type")


def check_config(path, config, cls, has_tokenizer_json):
    """Check tokenizer_config.json.  A field that transformers does not use either is accepted."""
    rules = dict(CONFIG)
    if cls.normalizes:                                 # GPT-NeoX's class gives it to `tokenizers`
        rules["trim_offsets"] = FLAG
    if has_tokenizer_json:                             # then its post_processor decides
        rules |= dict(add_bos_token=NEUTRAL_FLAG, add_eos_token=NEUTRAL_FLAG)
    for key in config.keys() - rules.keys():
        if key in CONSTRUCTOR_ARGUMENTS or callable(getattr(cls, key, None)):
            raise wrong(path, shown(key), "is not a setting of a tokenizer")
        rules[key] = NOTHING if key.endswith("_token") else ANY
    check(path, "", config, rules)
    for name in NAMED:
        if isinstance(config.get(name), dict):
            check(path, f"{name}.", config[name], TYPED, ["content"])
    for name in EXTRA:
        for i, token in enumerate(config.get(name) or []):
            if isinstance(token, dict):
                check(path, f"{name}[{i}].", token, TYPED, ["content"])


def read_special_tokens_map(path, config, overrides):
    """Add special_tokens_map.json, which transformers reads if there is no added_tokens_decoder."""
    rules = {**dict.fromkeys(NAMED,
                             Rule(lambda v: is_named_token(v) or isinstance(v, dict), TOKEN.words)),
             **dict.fromkeys(EXTRA, CONFIG[EXTRA[0]])}
    data = read_json(path)
    check(path, "", data, rules)
    for name, value in data.items():
        if isinstance(value, dict) and name in NAMED:
            check(path, f"{name}.", value, ADDED, ["content"])
            value = dict(value, special=True)
        if overrides.get(name):
            continue
        if name in EXTRA and any(isinstance(token, dict) for token in value or []):
            raise wrong(path, name, "is supported as a list of texts only")
        if name == "extra_special_tokens":
            known = list(config.get(name) or [])
            value = known + [token for token in value or [] if token not in known]
        config[name] = value


def content(token):
    """The text of a token, which is written "<|x|>" or, with flags, {"content": "<|x|>", ...}."""
    return token["content"] if isinstance(token, dict) else token


def read_config(paths, overrides, cls):
    """tokenizer_config.json, updated by the caller's settings and by special_tokens_map.json."""
    path = paths.get("tokenizer_config.json")
    config = read_json(path) if path else {}
    check_config(path, config, cls, "tokenizer.json" in paths)
    config |= overrides
    if config.get("additional_special_tokens") and not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
    if "added_tokens_decoder" not in config and "special_tokens_map.json" in paths:
        read_special_tokens_map(paths["special_tokens_map.json"], config, overrides)
    return config


def listing_file(paths, config):
    """Which file lists added tokens besides tokenizer.json, or from_pretrained: for messages."""
    name = "tokenizer_config.json" if "added_tokens_decoder" in config else "added_tokens.json"
    return paths.get(name, "from_pretrained")


def read_listed_tokens(paths, config, in_file):
    """The added tokens of tokenizer_config.json, else of added_tokens.json, tokenizer.json."""
    found = {}
    if "added_tokens_decoder" in config:
        path = listing_file(paths, config)
        for id, entry in config["added_tokens_decoder"].items():
            field = f"added_tokens_decoder[{shown(id)}]"
            if not (id.isascii() and id.isdigit() and len(id) < 12 and is_id(int(id))):
                raise wrong(path, field, "the key must be an id")
            if int(id) in found:
                raise wrong(path, field, "the id is there twice")
            found[int(id)] = added_token(path, f"{field}.", entry, ADDED)._replace(id=int(id))
        return [found[id] for id in sorted(found)]
    if path := paths.get("added_tokens.json"):
        special = {content(token) for name in NAMED if (token := config.get(name))}
        special |= {content(token) for token in config.get("extra_special_tokens") or []}
        for text, id in read_json(path).items():
            if not is_text(text) or not is_id(id) or id in found:
                raise wrong(path, shown(text), f"{shown(id)} is not an id, or another token has it")
            found[id] = AddedToken(text, text in special, text not in special, id)
    found |= {token.id: token for token in in_file}
    return [found[id] for id in sorted(found)]


# ------------------------------------------------------------------------------------------------
# All files together
# ------------------------------------------------------------------------------------------------

def find_files(name_or_folder, revision=None, **hub):
    """{file name: path}.  tokenizer.json comes before vocab.json + merges.txt (transformers)."""
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json"]
    found = {f: fetch(name_or_folder, f, revision, False, **hub) for f in names}
    if not found["tokenizer.json"]:
        for f in ("vocab.json", "merges.txt"):
            try:
                found[f] = fetch(name_or_folder, f, revision, True, **hub)
            except FileNotFoundError as error:
                raise FileNotFoundError(missing(name_or_folder, found, f, error)) from None
    return {f: path for f, path in found.items() if path}


def missing(name, found, filename, error):
    """The message if there is no tokenizer.json and vocab.json or merges.txt is missing."""
    path = found["tokenizer_config.json"]
    named = (read_json(path) if path else {}).get("tokenizer_class")
    kind = (f"{path}: field tokenizer_class: {shown(named)}; " if named else "")
    if kind and str(named).removesuffix("Fast") not in ("GPT2Tokenizer", "GPTNeoXTokenizer"):
        return (f"{kind}this is not a byte-level BPE, and there is no tokenizer.json: "
                "use transformers' tokenizer for it")
    return (f"no tokenizer.json and no {filename} in {name}: copy the checkpoint's tokenizer.json, "
            f"or vocab.json and merges.txt, there ({error})")[:300]


def read_files(paths, overrides, cls):
    """Read and check all files.  Raises ValueError, in one line, for what is not supported."""
    config = read_config(paths, overrides, cls)
    if source := paths.get("tokenizer.json"):
        vocab, merges, nfc, in_file, settings = read_tokenizer_json(source, cls.normalizes)
        if cls.normalizes is not None:                 # these classes have a pad token of their own
            settings.pop("pad_token", None)
    elif cls.normalizes is None:
        raise ValueError(f"{paths['vocab.json'].parent}: {cls.__name__} reads tokenizer.json, "
                         "which is not there: name GPT2Tokenizer in tokenizer_config.json, field "
                         "tokenizer_class")
    else:
        source, nfc, in_file, settings = paths["vocab.json"], bool(cls.normalizes), [], {}
        vocab, merges = read_json(source, unique=True), read_merges(paths["merges.txt"])
    listed = read_listed_tokens(paths, config, in_file)
    return Contents(source, vocab, merges, nfc, in_file, listed, listing_file(paths, config),
                    settings | config)
