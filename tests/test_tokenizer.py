"""tokenizer.py against transformers and tokenizers, on the official files."""

import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer as ours_module
import tokenizer_settings
from tokenizer import GPT2Tokenizer, GPTNeoXTokenizerFast
from tokenizer_files import GPT2, NEOX, official_folder

ROOT = Path(__file__).resolve().parents[1]
OURS = {"neo": GPT2Tokenizer, "neox": GPTNeoXTokenizerFast}
THEIRS = {"neo": transformers.GPT2Tokenizer, "neox": transformers.GPTNeoXTokenizerFast}
FAMILIES = pytest.mark.parametrize("family", ["neo", "neox"])
FUZZ = settings(max_examples=300, deadline=None, derandomize=True)
UNICODE = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
TEXT = st.text() | st.text(st.sampled_from(" \t\n\r\x0b\x1c\x85\xa0'sSlLtaé1²!\u0301\u0323👩\u200d"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("official")
    return {"neo": official_folder(GPT2, base / "gpt2"), "neox": official_folder(NEOX, base / "neox")}


@pytest.fixture(scope="module")
def pairs(folders):
    """{family: (ours, transformers')}"""
    return {f: (OURS[f].from_pretrained(folders[f]), THEIRS[f].from_pretrained(folders[f]))
            for f in OURS}


def edited(folder, out, change, file="tokenizer.json"):
    """A copy of a folder with one JSON file changed."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    data = json.loads((out / file).read_text()) if (out / file).exists() else {}
    change(data)
    (out / file).write_text(json.dumps(data))
    return out


# -- goldens ---------------------------------------------------------------------------------------

# huggingface/transformers, tests/test_tokenization_common.py
COMMON = ("This is a test 😊\nI was born in 92000, and this is falsé.\n生活的真谛是\nHi  Hello\nHi   Hello"
          "\n\n \n  \n Hello\n<s>\nhi<s>there\nThe following string should be properly encoded: Hello."
          "\nBut ird and ปี   ird   ด\nHey how are you doing")
# its tests/models/gpt2/test_tokenization_gpt2.py and gpt_neox/test_tokenization_gpt_neox.py
GOLDEN = {
    "neo": [1212, 318, 257, 1332, 30325, 232, 198, 40, 373, 4642, 287, 10190, 830, 11, 290, 428, 318,
            27807, 2634, 13, 198, 37955, 162, 112, 119, 21410, 40367, 253, 164, 108, 249, 42468, 198,
            17250, 220, 18435, 198, 17250, 220, 220, 18435, 628, 220, 198, 220, 220, 198, 18435, 198,
            27, 82, 29, 198, 5303, 27, 82, 29, 8117, 198, 464, 1708, 4731, 815, 307, 6105, 30240, 25,
            18435, 13, 198, 1537, 220, 1447, 290, 220, 19567, 249, 19567, 113, 220, 220, 220, 1447,
            220, 220, 220, 19567, 242, 198, 10814, 703, 389, 345, 1804],
    "neox": [1552, 310, 247, 1071, 49042, 221, 187, 42, 369, 5686, 275, 898, 6914, 13, 285, 436, 310,
             21649, 860, 15, 187, 20025, 46549, 5225, 48561, 33656, 238, 12105, 187, 12764, 50276,
             12092, 187, 12764, 50275, 12092, 46603, 50276, 187, 24387, 187, 29, 84, 31, 187, 5801,
             29, 84, 31, 9088, 187, 510, 1563, 2876, 943, 320, 6283, 16202, 27, 24387, 15, 187, 1989,
             209, 1817, 285, 209, 2869, 238, 26863, 50275, 1817, 50275, 35071, 187, 8262, 849, 403,
             368, 2509],
}
CASES = {
    "neo": [("Hello world", [15496, 995]), (" Hello world", [18435, 995]), ("\n ", [198, 220]),
            ("hi<|endoftext|>", [5303, 50256]), ("", [])],
    "neox": [("  def f(x):\n        return x",
              [50276, 1545, 269, 9, 89, 2262, 187, 50270, 2309, 1269]),
             ("Hello world", [12092, 1533]), (" Hello world", [24387, 1533]),
             ("Hello  world", [12092, 50276, 10186]), ("x" + " " * 30 + "y", [89, 50254, 50272, 90]),
             (" " * 25, [50254, 209]), (" " * 25 + "y", [50254, 340]),
             (" " * 26 + "y", [50254, 50276, 90]), ("\t\tx", [186, 186, 89]),
             ("\n\n\nx", [535, 187, 89]), (" \n", [2490]), ("e\u0301", [860]), ("\u00e9", [860]),
             ("hi <|endoftext|> there", [5801, 209, 0, 627]), ("<|endoftext|>hi", [0, 5801]),
             ("<|im_start|>system\nA chat between",
              [29, 93, 303, 64, 5478, 49651, 10394, 187, 34, 12939, 875]),
             ("foo bar", [12110, 2534]), ("bar foo", [2009, 17374]), ("", [])],
}


@FAMILIES
def test_goldens(pairs, family):
    ours = pairs[family][0]
    for text, ids in [(COMMON, GOLDEN[family]), *CASES[family]]:
        assert ours.encode(text) == ids
        assert ours.decode(ids) == (unicodedata.normalize("NFC", text) if family == "neox" else text)


def test_attributes(pairs):
    neo, neox = pairs["neo"][0], pairs["neox"][0]
    assert (len(neo), neo.vocab_size, len(neox), neox.vocab_size) == (50257, 50257, 50277, 50254)
    assert (neo.eos_token_id, neo.bos_token_id, neo.pad_token, neo.pad_token_id) == (50256, 50256, None, None)
    assert (neox.eos_token_id, neox.bos_token_id, neox.pad_token, neox.pad_token_id) == (0, 0, "<|padding|>", 1)
    for ours, theirs in pairs.values():
        for name in ("padding_side", "model_max_length", "eos_token", "unk_token", "unk_token_id"):
            assert getattr(ours, name) == getattr(theirs, name)
        ids = [0, 5, 1000, 50256, 60000]
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
        assert ours.convert_tokens_to_ids(["Ġworld", "!"]) == theirs.convert_tokens_to_ids(["Ġworld", "!"])


# -- against the reference, on random text ---------------------------------------------------------

SPACES = "\t\n\r \x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2003\u2028\u3000"
MARKS = [chr(c) for c in UNICODE if unicodedata.combining(chr(c))]
PHRASES = {
    "special": ["<|endoftext|>", "<|padding|>", "<|endoftext", "|>", "<|endoftext|><|endoftext|>"],
    "contraction": ["it's", "IT'S", "don't", "DON'T", "we'll", "'re", "'VE", "''s", "o'clock", " 'd"],
    "code": ["def f(x):\n    return x\n", "for i in range(10):\n\t\tpass\r\n", '{\n  "a": [1, 2]\n}',
             "        x = 1\n", "    ", "a->b", "__init__", "!=", "// ", "#" * 40],
    "script": ["生活的真谛是", "مرحبا بالعالم", "한국어", "\u1112\u1161\u11ab", "नमस्ते", "ปี", "²³½", "Ⅷ", "𝒳𝟙"],
    "emoji": ["👨\u200d👩\u200d👧", "🏳️\u200d🌈", "😊", "👍🏽", "1️⃣"],
    "word": ["hello", " world", "The", "aaaaaaa", "antidisestablishment", "2024", " 3.14", "!!!", "falsé"],
}


def random_piece(rng):
    kind = rng.choice(["spaces", "blank", "unicode", "marks", "ascii", *PHRASES])
    if kind in PHRASES:
        return rng.choice(PHRASES[kind])
    if kind == "spaces":
        return " " * rng.randint(1, 60)
    if kind == "marks":
        return rng.choice("aeiou\u0928\u1100") + "".join(rng.choices(MARKS, k=rng.randint(1, 3)))
    if kind == "unicode":
        return "".join(map(chr, rng.choices(UNICODE, k=rng.randint(1, 6))))
    return "".join(rng.choices(SPACES if kind == "blank" else [chr(c) for c in range(33, 127)],
                               k=rng.randint(1, 8)))


@FAMILIES
def test_10000_random_texts(pairs, folders, family):
    """The reference is the `tokenizers` library itself, for NeoX straight from the official file."""
    ours, theirs = pairs[family]
    theirs = theirs._tokenizer if family == "neo" else tokenizers.Tokenizer.from_file(
        str(folders["neox"] / "tokenizer.json"))
    rng = random.Random(20)
    texts = ["".join(random_piece(rng) for _ in range(rng.randint(1, 8))) for _ in range(10_000)]
    wrong = [t for t in texts if ours.encode(t) != theirs.encode(t, add_special_tokens=False).ids]
    assert not wrong, f"{len(wrong)} of 10000 differ, such as {wrong[0]!r}"
    for text in texts[::10]:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@FAMILIES
@FUZZ
@given(text=TEXT)
def test_any_text(pairs, family, text):
    ours, theirs = pairs[family]
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids) == (
        text if family == "neo" else theirs._tokenizer.normalizer.normalize_str(text))


@FAMILIES
@FUZZ
@given(ids=st.lists(st.integers(0, 50_300) | st.integers(0, 300) | st.sampled_from([50256, 50_688])),
       skip=st.booleans())
def test_any_ids_decode_and_stream(pairs, family, ids, skip):
    """Bytes that are no UTF-8, specials, and ids beyond len(tokenizer), which decode to nothing."""
    ours, theirs = pairs[family]
    text = ours.decode(ids, skip_special_tokens=skip)
    assert text == theirs.decode(ids, skip_special_tokens=skip)
    pieces = list(ours.stream(iter(ids), skip_special_tokens=skip))
    assert "".join(pieces) == text and all(pieces)


def test_normalization_of_every_mark(pairs):
    """tokenizers' NFC knows Unicode 9; whatever Python knows must not show."""
    reference = tokenizers.normalizers.NFC().normalize_str
    for mark in [*MARKS, "\U00011930", "\U000105C9", "\U000105D2"]:
        for text in (f"e{mark}\u0301", f"a\u0345{mark}\u0316", f"\U00011935{mark}", f"{mark}\u0307"):
            assert ours_module.nfc(text) == reference(text), ascii(text)


def test_streaming_holds_back_half_a_character(pairs):
    for ours, _ in pairs.values():
        ids = ours.encode("a😊b")
        assert len(ids) > 3
        pieces = []
        for piece in ours.stream(iter(ids)):
            pieces.append(piece)
        assert pieces == ["a", "😊", "b"]
        assert list(ours.stream(ids[:2])) == ["a", "\ufffd"]         # never completed


def test_streaming_is_lazy(pairs):
    """Text is yielded before the next id is asked for."""
    ours = pairs["neo"][0]
    asked = []
    stream = ours.stream(asked.append(i) or i for i in [15496, 995])
    assert next(stream) == "Hello" and asked == [15496]


def test_a_million_spaces(pairs):
    """tiktoken panics from 1,000,000 blanks before a word on; the reference needs 5 seconds."""
    for blank in (" ", "\t", "\u3000"):
        ids = pairs["neo"][0].encode("x" + blank * 1_000_001 + "y")
        text = "x" + blank * 1001 + "y"                      # the same end, at a length in easy reach
        assert ids[-2:] == pairs["neo"][1].encode(text)[-2:]
        assert pairs["neo"][0].decode(ids) == "x" + blank * 1_000_001 + "y"


# -- batches ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def padded_pairs(folders):
    """The same with a pad token; apart from the others, since the tests change the side."""
    out = {f: [c[f].from_pretrained(folders[f]) for c in (OURS, THEIRS)] for f in OURS}
    for tokenizer in (*out["neo"], *out["neox"]):
        tokenizer.pad_token = tokenizer.eos_token
    return out


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [
    dict(padding=True, return_tensors="pt"), dict(padding="longest"), dict(max_length=2), dict(),
    dict(padding="max_length", max_length=9), dict(padding="max_length", max_length=2),
    dict(padding=True, truncation=True, max_length=3, return_tensors="pt"), dict(truncation=True),
    dict(padding=True, max_length=2), dict(truncation=False, max_length=2)])
@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
def test_batches_equal_transformers(padded_pairs, family, side, options):
    ours, theirs = padded_pairs[family]
    ours.padding_side = theirs.padding_side = side
    for texts in (["Hello, my dog is a little", "Today, I", "x"], ["one"], "Hello world", ""):
        got, want = ours(texts, **options), theirs(texts, **options)
        for name in ("input_ids", "attention_mask"):
            if "return_tensors" in options:
                assert torch.equal(got[name], want[name]) and got[name].dtype == want[name].dtype
            else:
                assert got[name] == want[name]


def test_encoding_is_a_mapping(pairs):
    out = pairs["neo"][0]("Hello world", return_tensors="pt")
    assert (lambda input_ids, attention_mask: input_ids.tolist())(**out) == [[15496, 995]]
    assert out.input_ids is out["input_ids"] and out.to("meta").input_ids.device.type == "meta"
    assert out.attention_mask.device.type == "meta" and list(out) == ["input_ids", "attention_mask"]
    with pytest.raises(AttributeError, match="only input_ids, attention_mask"):
        out.token_type_ids
    with pytest.raises(ValueError, match="return_tensors"):
        pairs["neo"][0]("x").to("cpu")


def test_ids_may_be_tensors(pairs):
    ours = pairs["neo"][0]
    ids = torch.tensor([15496, 995])
    assert ours.decode(ids) == ours.decode(ids.numpy()) == ours.decode([15496, 995]) == "Hello world"
    assert ours.decode(995) == ours.decode(ids[1]) == ours.decode(list(ids)[1:]) == " world"
    assert ours.batch_decode(ids[None]) == ["Hello world"] and list(ours.stream(ids)) == ["Hello", " world"]


# -- files -----------------------------------------------------------------------------------------

@FAMILIES
def test_both_formats_agree(pairs, tmp_path, family):
    """What transformers saves as tokenizer.json, and the same as vocab.json + merges.txt."""
    ours, theirs = pairs[family]
    theirs.save_pretrained(tmp_path / "json")
    data = json.loads((tmp_path / "json/tokenizer.json").read_text())
    plain = tmp_path / "plain"
    plain.mkdir()
    merges = "".join(" ".join(pair) + "\n" for pair in data["model"]["merges"])
    (plain / "merges.txt").write_text("#version: 0.2\n" + merges)
    (plain / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
    runs = {t["content"]: t["id"] for t in data["added_tokens"] if not t["special"]}
    (plain / "added_tokens.json").write_text(json.dumps(runs))
    rng = random.Random(3)
    for folder in (tmp_path / "json", plain):
        again = OURS[family].from_pretrained(folder)
        assert len(again) == len(ours) and again.pad_token == ours.pad_token
        for _ in range(300):
            text = "".join(random_piece(rng) for _ in range(6))
            assert again.encode(text) == ours.encode(text)
            assert again.decode(again.encode(text)) == ours.decode(ours.encode(text))


def without_added(path):
    """A file's contents, and of tokenizer.json all but the added tokens: a pad token has joined them."""
    if path.name != "tokenizer.json":
        return path.read_bytes()
    data = json.loads(path.read_bytes())
    return {name: value for name, value in data.items() if name != "added_tokens"}


@FAMILIES
def test_save_and_load(folders, tmp_path, family):
    """The files are those that were read; settings are kept; transformers reads them as well."""
    ours = OURS[family].from_pretrained(folders[family], padding_side="left", model_max_length=2048)
    ours.pad_token_id = ours.convert_tokens_to_ids("!")
    for _ in range(2):                                       # the second time over its own files
        ours.save_pretrained(tmp_path / "out")
        for path in folders[family].iterdir():
            assert without_added(tmp_path / "out" / path.name) == without_added(path)
        assert {p.name for p in (tmp_path / "out").iterdir()} == {
            "tokenizer_config.json", *(p.name for p in folders[family].iterdir())}
        ours = OURS[family].from_pretrained(tmp_path / "out")
    theirs = THEIRS[family].from_pretrained(tmp_path / "out")
    for name in ("padding_side", "model_max_length", "pad_token", "pad_token_id", "eos_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (ours.padding_side, ours.model_max_length, ours.pad_token) == ("left", 2048, "!")
    text = "a!b<|endoftext|>  c"
    assert ours.encode(text) == theirs.encode(text)


def test_saving_beside_another_tokenizer_is_refused(pairs, folders, tmp_path):
    pairs["neox"][0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a tokenizer.json already"):
        pairs["neo"][0].save_pretrained(tmp_path)


def test_added_tokens_above_the_vocabulary(folders, tmp_path):
    """As in oasst-sft-1-pythia-12b; the golden is huggingface/text-generation-inference's, integration-tests."""
    names = {50278: "<|prompter|>", 50279: "<|system|>", 50280: "<|prefix_begin|>", 50281: "<|assistant|>"}

    def add(data):
        data["added_tokens"].append(dict(id=50277, content="<|prefix_end|>", special=True, normalized=False))
        data["added_tokens"] += [dict(id=i, content=t, special=True, normalized=False, single_word=False,
                                      lstrip=False, rstrip=False) for i, t in names.items()]
    ours = GPTNeoXTokenizerFast.from_pretrained(edited(folders["neox"], tmp_path / "a", add))
    text = ("<|prompter|>What is a meme, and what's the history behind this word?<|endoftext|>"
            "<|assistant|>")
    ids = [50278, 1276, 310, 247, 1167, 70, 13, 285, 752, 434, 253, 2892, 3212, 436, 3159, 32, 0, 50281]
    assert ours.encode(text) == ids and ours.decode(ids) == text and len(ours) == 50282
    assert ours.decode(ids, skip_special_tokens=True) == text.replace("<|prompter|>", "")[:-26]


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_beside_vocab_json(folders, tmp_path, where):
    def add(data):
        if where == "added_tokens.json":
            data |= {"<user>": 50257, "<pad>": 50258}
        else:
            data["added_tokens_decoder"] = {
                "50257": dict(content="<user>", special=False, normalized=True),
                "50258": dict(content="<pad>", special=True, normalized=False)}
            data["pad_token"] = "<pad>"
    folder = edited(folders["neo"], tmp_path / "a", add, file=where)
    if where == "added_tokens.json":
        (folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>"}}')
    ours, theirs = (c["neo"].from_pretrained(folder) for c in (OURS, THEIRS))
    assert (ours.pad_token, ours.pad_token_id, len(ours)) == ("<pad>", 50258, 50259)
    for text in ("<user> hi<pad><pad>  <|endoftext|>", "<user><user"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text) and ours.decode(ids) == theirs.decode(ids) == text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


def test_raw_before_normalized(folders, tmp_path):
    """Specials are cut out of the raw text first; the rest is sought in normalized text only."""
    def add(data):
        flags = dict(special=False, single_word=False, lstrip=False, rstrip=False)
        data["added_tokens"] += [dict(id=50277, content="ab<|", normalized=True, **flags),
                                 dict(id=50278, content="e\u0301", normalized=True, **flags),
                                 dict(id=50279, content="o\u0301", normalized=False, **flags)]
    folder = edited(folders["neox"], tmp_path / "a", add)
    ours = GPTNeoXTokenizerFast.from_pretrained(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("ab<|endoftext|>", "ab<|end", "e\u0301", "\u00e9", "e\u0301\u0323", "o\u0301", "\u00f3"):
        assert ours.encode(text) == theirs.encode(text).ids, ascii(text)


@FAMILIES
def test_a_small_bpe_of_our_own(tmp_path, family):
    """The kind of tokenizer that the demo checkpoints have, trained here by `tokenizers`."""
    reference = tokenizers.Tokenizer(tokenizers.models.BPE())
    reference.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = tokenizers.decoders.ByteLevel()
    if family == "neox":
        reference.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>", "<|padding|>"][:1 + (family == "neox")],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    corpus = [p.read_text() for p in ROOT.glob("*.py")]
    reference.train_from_iterator(corpus, trainer)
    if family == "neox":
        reference.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in range(8, 1, -1)])
        reference.save(str(tmp_path / "tokenizer.json"))
    else:
        reference.model.save(str(tmp_path))
    ours = OURS[family].from_pretrained(tmp_path)
    assert len(ours) == reference.get_vocab_size() == 600 + 7 * (family == "neox")
    assert ours.eos_token_id == 0 and ours.pad_token == {"neo": None, "neox": "<|padding|>"}[family]
    rng = random.Random(4)
    for text in [*corpus, *("".join(random_piece(rng) for _ in range(6)) for _ in range(500))]:
        ids = ours.encode(text)
        assert ids == reference.encode(text).ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("value, pad", [("<|padding|>", 1), ({"__type": "AddedToken", "content": "!"}, 2), (None, None)])
def test_pad_token_of_the_config(folders, tmp_path, value, pad):
    folder = edited(folders["neox"], tmp_path / "a", lambda d: d.update(pad_token=value),
                    file="tokenizer_config.json")
    assert GPTNeoXTokenizerFast.from_pretrained(folder).pad_token_id == pad
    assert GPTNeoXTokenizerFast.from_pretrained(folder, pad_token="<|endoftext|>").pad_token_id == 0


# -- a proof that tiktoken merges as the list of merges does ---------------------------------------

def tiny_vocab(*tokens):
    return {t: i for i, t in enumerate([*tokenizer_settings.BYTE, *tokens])}


@pytest.mark.parametrize("merges, problem", [
    ("ab bc abc:a", "two merges make abc"),             # a b | b c | ab c | a bc
    ("late", "uses 'ab', which no byte and no earlier merge makes"),
    ("never", "can never happen")])
def test_merges_that_tiktoken_would_do_otherwise(merges, problem):
    """Each is a file that `tokenizers` accepts and that gives other ids with tiktoken."""
    lists = {"ab bc abc:a": ["a b", "b c", "ab c", "a bc"], "late": ["ab c", "a b"],
             "never": ["b c", "a b", "ab c"]}
    problem = "ids must grow" if merges.startswith("ab") else problem
    pairs = [m.split() for m in lists[merges]]
    vocab = tiny_vocab(*dict.fromkeys(left + right for left, right in pairs))
    with pytest.raises(ValueError, match=problem):
        ours_module.mergeable_ranks("file", vocab, pairs)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(merges=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=10),
       words=st.lists(st.text("ab", max_size=12), max_size=8))
def test_accepted_merges_merge_alike(merges, words):
    """Whatever random list of merges is accepted, tiktoken and tokenizers agree on every word."""
    pool, pairs = ["a", "b"], []
    vocab = tiny_vocab()
    for i, j in merges:                                      # keep what the check lets through
        pair = [pool[i % len(pool)], pool[j % len(pool)]]
        grown = {**vocab, "".join(pair): len(vocab)} if "".join(pair) not in vocab else vocab
        try:
            ranks = ours_module.mergeable_ranks("file", grown, [*pairs, pair])
        except ValueError:
            continue
        vocab, pairs = grown, [*pairs, pair]
        pool.append("".join(pair))
    ranks = ours_module.mergeable_ranks("file", vocab, pairs)
    tik = ours_module.tiktoken.Encoding("x", pat_str=ours_module.WORDS, mergeable_ranks=ranks,
                                        special_tokens={})
    bpe = tokenizers.models.BPE(vocab, [tuple(p) for p in pairs])
    for word in [*words, *pool]:
        assert tik.encode_ordinary(word) == [t.id for t in bpe.tokenize(word)]


# -- bad input -------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, error, words", [
    (lambda t: t.encode(b"x"), TypeError, "must be str, not bytes: .decode"),
    (lambda t: t.encode(None), TypeError, "not NoneType"),
    (lambda t: t(3), TypeError, "str or a list of str, not int"),
    (lambda t: t(["a", 3]), TypeError, "must be str, not int"),
    (lambda t: t([]), ValueError, "empty"),
    (lambda t: t.encode("a\ud800"), ValueError, "character 1 .*surrogate"),
    (lambda t: t.encode("\ud83d\ude0a"), ValueError, "surrogate"),
    (lambda t: t("a", padding=True), ValueError, "tokenizer.pad_token = tokenizer.eos_token"),
    (lambda t: t("a", padding="left"), ValueError, "'left'"),
    (lambda t: t("a", truncation="no"), ValueError, "'no'"),
    (lambda t: t(["a", "a b"], return_tensors="pt"), ValueError, "1 to 2 tokens.*padding=True"),
    (lambda t: t("a", return_tensors="tf"), ValueError, "'tf'"),
    (lambda t: t("a", max_length=0), ValueError, "at least 1"),
    (lambda t: t.decode([5, -100]), ValueError, "-100"),
    (lambda t: list(t.stream([-1])), ValueError, "-1"),
    (lambda t: t.decode("5"), TypeError, "whole numbers"),
    (lambda t: t.decode([1.0]), TypeError, "whole numbers"),
    (lambda t: t.decode(torch.tensor([[1, 2]])), TypeError, "batch_decode"),
    (lambda t: t.convert_tokens_to_ids("zzzz"), ValueError, "no token 'zzzz'"),
    (lambda t: setattr(t, "pad_token", "[PAD]"), ValueError, r"cannot be '\[PAD\]'"),
    (lambda t: setattr(t, "pad_token_id", 60000), ValueError, "cannot be 'id 60000'"),
    (lambda t: setattr(t, "padding_side", "top"), ValueError, "'top'"),
    (lambda t: t.add_special_tokens(["<x>"]), TypeError, "a dict such as .*not a list: add_tokens"),
])
def test_bad_calls(pairs, call, error, words):
    with pytest.raises(error, match=words) as caught:
        call(pairs["neo"][0])
    assert "\n" not in str(caught.value)


def test_max_length_padding_needs_a_length(pairs):
    with pytest.raises(ValueError, match="needs max_length"):
        pairs["neox"][0]("a", padding="max_length")


def test_unknown_override(folders):
    with pytest.raises(TypeError, match="use_slow"):
        GPT2Tokenizer.from_pretrained(folders["neo"], use_slow=True)


def put(*path, value):
    """A change of tokenizer.json: set one field."""
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value
    return change


@pytest.mark.parametrize("change, words", [
    (put("normalizer", value={"type": "NFKC"}), "field normalizer.type: 'NFKC'.*supported is NFC"),
    (put("pre_tokenizer", value={"type": "Whitespace"}), "field pre_tokenizer.type: 'Whitespace'.*ByteLevel"),
    (put("pre_tokenizer", "use_regex", value=False), "pre_tokenizer.use_regex: False"),
    (put("pre_tokenizer", "add_prefix_space", value=True), "pre_tokenizer.add_prefix_space: True"),
    (put("decoder", value=None), "field decoder: must be one ByteLevel"),
    (put("post_processor", value={"type": "BertProcessing"}), "BertProcessing"),
    (put("model", "type", value="Unigram"), "field model.type: 'Unigram'.*BPE"),
    (put("model", "dropout", value=0.1), "field model.dropout: 0.1"),
    (put("model", "ignore_merges", value=True), "field model.ignore_merges: True"),
    (put("model", value=7), "field model: 7 is not supported"),
    (put("model", "merges", 7, value="a"), r"merges\[7\]"),
    (put("model", "merges", 7, value=["zz", "zz"]), "'zz'"),
    (put("model", "vocab", "Ġthe", value=7), "same id"),
    (put("model", "vocab", "Ġthe", value="7"), "whole number"),
    (put("added_tokens", 0, "lstrip", value=True), r"added_tokens\[0\].lstrip: True"),
    (put("added_tokens", 0, "id", value=9), "its id is given as 9, but would be 0 in transformers"),
    (lambda data: data["model"]["vocab"].pop("a"), "no token, such as 61"),
])
def test_bad_tokenizer_json(folders, tmp_path, change, words):
    folder = edited(folders["neox"], tmp_path / "bad", change)
    with pytest.raises(ValueError, match=words) as caught:
        GPTNeoXTokenizerFast.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file, data, words", [
    ("vocab.json", b'{"a": 1', "vocab.json is not valid JSON"),
    ("vocab.json", b"\xff\xfe", "vocab.json is not valid JSON"),
    ("vocab.json", b"[]", "vocab.json must hold a JSON object"),
    ("merges.txt", b"#version: 0.2\n\xc4\xa0 t\nabc\n", "merges.txt: field line 3: 'abc'"),
    ("tokenizer_config.json", b"{", "tokenizer_config.json is not valid JSON"),
    ("tokenizer_config.json", b'{"add_bos_token": true}', "field add_bos_token: True"),
    ("tokenizer_config.json", b'{"pad_token": 7}', "field pad_token: 7"),
    ("tokenizer_config.json", b'{"extra_special_tokens": "<x>"}', "field extra_special_tokens: '<x>'"),
    ("vocab.json", None, "no vocab.json in"), ("merges.txt", None, "no merges.txt in"),
])
def test_bad_files(folders, tmp_path, file, data, words):
    folder = edited(folders["neo"], tmp_path / "bad", lambda d: None, file="tokenizer_config.json")
    (folder / file).unlink() if data is None else (folder / file).write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError), match=words.replace("no vocab", ".*no vocab")) as caught:
        GPT2Tokenizer.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_any_damage_to_the_json_is_a_plain_error(folders, tmp_path):
    """Whatever stands in the place of a value: it loads, or it is a ValueError of one line."""
    small = json.loads((folders["neox"] / "tokenizer.json").read_text())
    small["model"]["vocab"] = {t: i for t, i in small["model"]["vocab"].items() if i < 248}
    small["model"]["merges"] = small["model"]["merges"][:3]
    small["added_tokens"] = [*small["added_tokens"][:2], small["added_tokens"][-1]]
    places = [("tokenizer.json", (key,)) for key in small]
    places += [("tokenizer.json", ("model", key)) for key in small["model"]]
    places += [("tokenizer.json", ("model", "merges", 1)), ("tokenizer.json", ("added_tokens", 1))]
    places += [("tokenizer.json", ("added_tokens", 1, key)) for key in small["added_tokens"][1]]
    places += [("tokenizer_config.json", (key,)) for key in (
        "pad_token", "eos_token", "added_tokens_decoder", "extra_special_tokens", "padding_side",
        "additional_special_tokens", "model_max_length")]
    for file, path in places:
        for junk in (None, 5, -1.5, "x", [5], [["a"]], {"type": 3}, {"5": "x"}, {"5": {"content": 7}}):
            data = {"tokenizer.json": json.loads(json.dumps(small)), "tokenizer_config.json": {}}
            put(*path, value=junk)(data[file])
            for name, content in data.items():
                (tmp_path / name).write_text(json.dumps(content))
            try:
                GPTNeoXTokenizerFast.from_pretrained(tmp_path).encode("a<|endoftext|>  b")
            except ValueError as error:
                assert "\n" not in str(error)


def test_hub_names_go_through_fetch(folders, monkeypatch):
    asked = []

    def fetch(name, filename, revision=None, required=True, **hub):
        asked.append((name, filename, revision, required))
        path = folders["neo"] / filename
        return path if path.is_file() else None
    monkeypatch.setattr(tokenizer_settings, "fetch", fetch)
    ours = GPT2Tokenizer.from_pretrained("EleutherAI/gpt-neo-125m", revision="main")
    assert ours.encode("Hello world") == [15496, 995]
    assert ("EleutherAI/gpt-neo-125m", "tokenizer.json", "main", False) in asked
    assert ("EleutherAI/gpt-neo-125m", "vocab.json", "main", True) in asked


def test_import_is_light():
    code = "import sys, tokenizer; assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
