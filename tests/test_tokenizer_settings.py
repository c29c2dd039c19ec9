"""What the tokenizer files of a checkpoint say is obeyed as transformers obeys it, or refused in one line.

A small byte-level tokenizer, files with odd fields, and transformers' AutoTokenizer on the same folder.
"""

import itertools
import json
import random

import pytest
import torch
import transformers

from conftest import ROOT
from fuzzing import mutated_bytes
from load_weights import AutoModelForCausalLM, AutoTokenizer
from tokenizer import GPT2Tokenizer, bpe
from tokenizer_settings import BYTE

TEXTS = ["Hello  world", "naïve e\u0301 café", "<|endoftext|>a<x><|new|> b", "a\n\n  b\tc", "", "   ", "日本", "<pad>[MASK]"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġ", "Ġ")]
BYTES = {token: id for id, token in enumerate(BYTE)}
VOCAB = BYTES | {left + right: len(BYTES) + i for i, (left, right) in enumerate(MERGES)}
END = len(VOCAB)
ADDED = dict(id=END, content="<|endoftext|>", special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
FAMILY = {"neo": ("gpt_neo", "GPT2Tokenizer"), "neox": ("gpt_neox", "GPTNeoXTokenizer")}


def tokenizer_json(nfc):
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [dict(ADDED)],
            "normalizer": {"type": "NFC"} if nfc else None, "pre_tokenizer": level, "post_processor": dict(level),
            "decoder": dict(level),
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": VOCAB, "merges": [" ".join(pair) for pair in MERGES]}}


def write(folder, kind, config=None, data=None, **files):
    """A folder of one family: "neo" is vocab.json and merges.txt, "neox" is tokenizer.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": FAMILY[kind][0]}))
    if kind == "neo":
        (folder / "vocab.json").write_text(json.dumps(VOCAB | {"<|endoftext|>": END}))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, MERGES)) + "\n")
    else:
        (folder / "tokenizer.json").write_text(json.dumps(data or tokenizer_json(nfc=True)))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": FAMILY[kind][1]} if config is None else config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def loaded(auto, folder):
    try:
        return auto.from_pretrained(folder), None
    except Exception as error:                             # transformers raises whatever it likes
        return None, error


def same_or_refused(folder):
    """True where ours refused; else both must give the same ids, and the same text back."""
    ours, error = loaded(AutoTokenizer, folder)
    if error is not None:
        text = str(error)
        assert isinstance(error, (ValueError, OSError)), repr(error)
        assert str(folder) in text and "\n" not in text and text.isprintable(), text
        assert len(text.replace(str(folder), "")) <= 300, text
        return True
    theirs, problem = loaded(transformers.AutoTokenizer, folder)
    assert problem is None, f"loads here and not in transformers: {problem}"
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == list(ids), (text, ours.encode(text), ids)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    for name in ("pad_token", "pad_token_id", "eos_token", "eos_token_id", "padding_side", "truncation_side"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs)
    return False


ODD = [None, True, 0, -1, 1.5, 10**30, "", "x", "left", "<|endoftext|>", "<x>", [], ["<x>"], [1], {}, {"content": "<x>"},
       {"__type": "AddedToken", "content": "<x>"}, {"a": {"b": [1]}}, "\x1b[2J", "\ud800", [{"__type": "AddedToken", "content": "<x>"}],
       [{"__type": "AddedToken", "content": "<x>", "special": True}, "<|new|>"], 5 * [10**20]]
CONFIG = ["pad_token", "eos_token", "cls_token", "mask_token", "extra_special_tokens", "additional_special_tokens",
          "padding_side", "truncation_side", "model_max_length", "add_prefix_space", "split_special_tokens", "errors",
          "clean_up_tokenization_spaces", "add_bos_token", "added_tokens_decoder", "chat_template", "tokenizer_class",
          "model_input_names", "use_default_system_prompt", "name_or_path", "image_token"]
GRID = list(itertools.product(CONFIG, ODD))


def cases(grid, step):
    return [pytest.param(*case, id=f"{case[0]}-{i}", marks=[pytest.mark.slow] * bool(i % step)) for i, case in enumerate(grid)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("field, value", cases(GRID, 7))
def test_every_field_of_tokenizer_config(kind, field, value, tmp_path):
    same_or_refused(write(tmp_path / "f", kind, {"tokenizer_class": FAMILY[kind][1], field: value}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file, field, value", [
    pytest.param(*case, id=f"{case[0]}-{case[1]}-{i}", marks=[pytest.mark.slow] * bool(i % 11)) for i, case in enumerate(
        itertools.product(["special_tokens_map", "added_tokens"], ["pad_token", "<|new|>", " ", "extra_special_tokens"],
                          [*ODD, END, END + 1, 5]))])
@pytest.mark.parametrize("kind", FAMILY)
def test_every_entry_of_the_older_files(kind, file, field, value, tmp_path):
    same_or_refused(write(tmp_path / "f", kind, **{file: {field: value}}))


def change(data, path, value):
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


SECTIONS = [("truncation",), ("padding",), ("normalizer",), ("pre_tokenizer",), ("post_processor",), ("decoder",), ("version",),
            ("added_tokens",), ("model", "dropout"), ("model", "unk_token"), ("model", "byte_fallback"), ("model", "merges"),
            ("model", "end_of_word_suffix"), ("added_tokens", 0, "lstrip"), ("added_tokens", 0, "content"), ("new_section",),
            ("added_tokens", 0, "id"), ("added_tokens", 0, "normalized"), ("pre_tokenizer", "use_regex")]
STEPS = [{"type": "Lowercase"}, {"type": "NFD"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}, {"type": "NFC"},
         {"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
         {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
          "pad_token": "<|endoftext|>"}, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path, value", [
    pytest.param(*case, id=f"{case[0][-1]}-{i}", marks=[pytest.mark.slow] * bool(i % 9))
    for i, case in enumerate(itertools.product(SECTIONS, [*ODD, *STEPS]))])
def test_every_section_of_tokenizer_json(path, value, tmp_path):
    data = tokenizer_json(nfc=True)
    change(data, path, value)
    same_or_refused(write(tmp_path / "f", "neox", data=data))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FAMILY)
def test_the_plain_folders_load(kind, tmp_path):
    """The grids above would prove nothing if everything were refused."""
    assert not same_or_refused(write(tmp_path / "f", kind))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("named", ["GPT2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizer", "GPTNeoXTokenizerFast",
                                   "PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast"])
@pytest.mark.parametrize("nfc", [True, False])
def test_the_class_that_the_files_name(named, nfc, tmp_path):
    """Also in a folder that holds a tokenizer alone."""
    folder = write(tmp_path / "f", "neox", {"tokenizer_class": named}, tokenizer_json(nfc))
    refused = same_or_refused(folder)
    (folder / "config.json").unlink()
    assert same_or_refused(folder) == refused


@pytest.mark.parametrize("config", [None, {}, {"pad_token": "<pad>"}])
@pytest.mark.parametrize("nfc", [True, False])
def test_a_tokenizer_json_alone_is_obeyed_as_it_stands(config, nfc, tmp_path):
    folder = write(tmp_path / "f", "neox", config or {}, tokenizer_json(nfc))
    (folder / "config.json").unlink()
    if config is None:
        (folder / "tokenizer_config.json").unlink()
    assert not same_or_refused(folder)


def test_a_folder_without_any_of_the_files(tmp_path):
    folder = write(tmp_path / "f", "neo", {})
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("file, field", [("added_tokens.json", {"<|new|>": 5}),
                                         ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "<x>"}}})])
def test_the_file_that_gives_a_wrong_id_is_named(file, field, tmp_path):
    folder = write(tmp_path / "f", "neo")
    (folder / file).write_text(json.dumps(field))
    with pytest.raises(ValueError, match=f"{file}: field added token .*its id is given as 5"):
        GPT2Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("named", ["T5Tokenizer", "T5TokenizerFast", "LlamaTokenizer", "BertTokenizer"])
def test_other_kinds_of_tokenizer_are_named(named, tmp_path):
    folder = write(tmp_path / "f", "neo", {"tokenizer_class": named})
    with pytest.raises(ValueError, match=f"tokenizer_class: '{named}' is not supported.*transformers"):
        AutoTokenizer.from_pretrained(folder, use_fast=False)


@pytest.mark.parametrize("data", [b"h e\r\nl l\r\n", b"#version\r\nh e\r\n"])
def test_a_carriage_return_in_merges(data, tmp_path):
    folder = write(tmp_path / "f", "neo")
    (folder / "merges.txt").write_bytes(data)
    (folder / "vocab.json").write_text(json.dumps(BYTES | {"he": 256, "ll": 257, "<|endoftext|>": 258}))
    same_or_refused(folder)


# --- what one does with a tokenizer ---------------------------------------------------------------

@pytest.fixture
def both(tmp_path):
    folder = write(tmp_path / "f", "neox")
    return AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


def plain(result):
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in result.items()}


@pytest.mark.parametrize("call", [
    lambda t: t.encode("hello  world", add_special_tokens=False), lambda t: t.encode("hello", return_tensors="pt").tolist(),
    lambda t: t.tokenize("hello world"), lambda t: sorted(t.get_vocab().items()), lambda t: t.vocab_size,
    lambda t: t.convert_ids_to_tokens([1, 2, END]), lambda t: t.convert_ids_to_tokens(3),
    lambda t: t.convert_tokens_to_ids(["he", "Ġ"]), lambda t: t.convert_tokens_to_string(["hello", "Ġw"]),
    lambda t: t.get_added_vocab(), lambda t: t.all_special_tokens, lambda t: t.all_special_ids,
    lambda t: plain(t("hello", return_token_type_ids=True)), lambda t: plain(t("hello", return_attention_mask=False)),
    lambda t: plain(t(["hello", "a"], return_tensors="np", padding=True, pad_to_multiple_of=4)),
    lambda t: plain(t.pad({"input_ids": [[1, 2], [3]]}, return_tensors="pt")),
    lambda t: plain(t.pad([{"input_ids": [1, 2]}, {"input_ids": [3]}], padding="max_length", max_length=5)),
    lambda t: plain(t(["hello", "a"], padding="longest", return_tensors=transformers.TensorType.PYTORCH)),
    lambda t: plain(t(["a b c d", "a"], truncation=True, max_length=2)), lambda t: t.decode(END, skip_special_tokens=True),
    lambda t: t.batch_decode([[1, 2], [3]]), lambda t: t.batch_decode([1, 2]), lambda t: t.batch_decode(torch.tensor([1, 2])),
    lambda t: t.batch_decode([]), lambda t: t.batch_decode([torch.tensor([1, 2]), torch.tensor([3])]), lambda t: plain(t("hello", "world", return_token_type_ids=True)),
    lambda t: t.num_special_tokens_to_add(), lambda t: plain(t(["hello"], max_length=2, truncation=True, stride=0)),
    lambda t: t.batch_decode([1, 2]), lambda t: t.batch_decode(torch.tensor([1, 2])), lambda t: t.batch_decode([]),
    lambda t: t.batch_decode(sequences=[[1, 2], []]), lambda t: t.decode(token_ids=[1, 2]), lambda t: t.batch_decode(((1, 2), (3,))),
    lambda t: plain(t.pad([{"input_ids": [1, 2], "labels": 1}, {"input_ids": [3], "labels": 0}], return_tensors="pt")),
    lambda t: plain(t.pad([{"input_ids": [1, 2], "labels": 0.5}, {"input_ids": [3], "labels": 2.0}], return_tensors="pt")),
    lambda t: [str(x.dtype) for x in t("hello", return_tensors="pt").to(torch.float16).values()],
])
@pytest.mark.parametrize("side", ["left", "right"])
def test_calls(both, call, side):
    for tokenizer in both:
        tokenizer.pad_token = "<|endoftext|>"
        tokenizer.padding_side = tokenizer.truncation_side = side
    assert call(both[0]) == call(both[1])


@pytest.mark.parametrize("loading, saving", [
    (dict(resume_download=True, proxies={}, from_slow=False, verbose=False, use_fast=True), dict(legacy_format=False, push_to_hub=False))])
def test_usual_values_of_other_arguments(loading, saving, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "checkpoints" / "demo-neox", **loading)
    tokenizer.save_pretrained(tmp_path, **saving)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).encode("HAMLET.") == tokenizer.encode("HAMLET.")
    for call, name in ((tokenizer.save_pretrained, "filename_prefix"), (AutoTokenizer.from_pretrained, "tokenizer_file")):
        with pytest.raises(TypeError, match=f"{name}='x' is not implemented here"):
            call(tmp_path, **{name: "x"})


def test_tokens_are_added_saved_and_loaded_by_transformers(tmp_path):
    """And the model grows with them."""
    source = ROOT / "checkpoints" / "demo-neox"
    ours, theirs = AutoTokenizer.from_pretrained(source), transformers.AutoTokenizer.from_pretrained(source)
    for tokenizer in (ours, theirs):
        assert tokenizer.add_tokens(["<new>", "zzz"]) == 2 and tokenizer.add_tokens("<new>") == 0
        assert tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<a>"]}) == 2
    text = "HAMLET.<new> zzz<pad><a>"
    assert ours.encode(text) == theirs(text)["input_ids"] and len(ours) == len(theirs)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(len(ours))
    model.save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    for auto in (AutoTokenizer, transformers.AutoTokenizer):
        again = auto.from_pretrained(tmp_path)
        assert again(text)["input_ids"] == ours.encode(text) and again.pad_token == "<pad>" and len(again) == len(ours)
        assert again.decode(ours.encode(text), skip_special_tokens=True) == "HAMLET.<new> zzz"
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([ours.encode(text)])
    with torch.no_grad():
        mine = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="naive")(ids).logits
        assert torch.equal(mine, reference(ids).logits)


def test_bpe_is_what_tiktoken_computes():
    """The definition at the top of tokenizer.py, on words of the demo tokenizer's own texts and on noise."""
    tokenizer = GPT2Tokenizer.from_pretrained(ROOT / "checkpoints" / "demo-neo")
    ranks = {tokenizer._bytes[id]: id for id in range(len(tokenizer) - 1)}
    generator = torch.Generator().manual_seed(0)
    noise = [bytes(torch.randint(97, 123, (n,), generator=generator).tolist()) for n in range(1, 12) for _ in range(150)]
    words = [f" {word}".encode() for word in (ROOT / "LICENSE").read_text().split()]
    for word in {*noise, *words}:
        assert bpe(word, ranks) == tokenizer._bpe.encode_ordinary(word.decode()), word


# --- damaged at random ------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 3060), marks=pytest.mark.slow)], ids=["60", "3000"])
def test_files_damaged_at_random(seeds, tmp_path):
    """Bytes changed, cut or repeated in one file: the reference's ids, or one line that names the folder."""
    refused = 0
    for seed in seeds:
        draw = random.Random(seed)
        kind = draw.choice(list(FAMILY))
        folder = write(tmp_path / str(seed), kind, special_tokens_map={"pad_token": "<pad>"}, added_tokens={"<x>": END + 1})
        path = draw.choice(sorted(set(folder.iterdir()) - {folder / "config.json"}))
        path.write_bytes(mutated_bytes(path.read_bytes(), draw))
        refused += same_or_refused(folder)
    assert refused >= len(seeds) / 4


def test_ids_that_the_caller_gives_need_no_file(tmp_path):
    folder = write(tmp_path / "f", "neo", {})
    (folder / "tokenizer_config.json").unlink()
    listed = {str(END): dict(content="<|endoftext|>", special=True), str(END + 1): dict(content="<x>")}
    assert GPT2Tokenizer.from_pretrained(folder, added_tokens_decoder=listed).encode("<x>") == [END + 1]
    with pytest.raises(ValueError, match="from_pretrained: field added token '<x>': its id is given as 5"):
        GPT2Tokenizer.from_pretrained(folder, added_tokens_decoder={"5": dict(content="<x>")})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("named", ["GPTNeoXTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("config", [{}, {"padding_side": "right", "truncation_side": "right", "pad_token": None}])
def test_padding_and_truncation_sections_give_the_sides(named, config, tmp_path):
    """They give sides and, to the class without one of its own, the pad token; tokenizer_config.json wins."""
    data = tokenizer_json(nfc=True) | {"truncation": STEPS[4], "padding": STEPS[5]}
    assert not same_or_refused(write(tmp_path / "f", "neox", {"tokenizer_class": named, **config}, data))


@pytest.mark.parametrize("id", [2**32, 2**64, -1, True, 1.0, "7", None])
@pytest.mark.parametrize("kind, file, path", [("neo", "vocab.json", ("ĠĠ",)), ("neox", "tokenizer.json", ("model", "vocab", "ĠĠ")),
                                              ("neox", "tokenizer.json", ("added_tokens", 0, "id"))])
def test_ids_that_are_none(kind, file, path, id, tmp_path):
    folder = write(tmp_path / "f", kind)
    data = json.loads((folder / file).read_text())
    change(data, path, id)
    (folder / file).write_text(json.dumps(data))
    assert same_or_refused(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("text", ["e\u0301", "<e\u0301>"])
def test_an_added_token_that_normalizes_to_another_text(text, special, tmp_path):
    """`tokenizers` decodes it as normalized, and then no longer takes it for special."""
    data = tokenizer_json(nfc=True)
    data["added_tokens"].append(ADDED | dict(id=END + 1, content=text, special=special, normalized=True))
    assert not same_or_refused(write(tmp_path / "f", "neox", data=data))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("field", ["auto_map", "fast_tokenizer_files", "trim_offsets"])
def test_null_where_the_reference_takes_none(field, tmp_path):
    assert same_or_refused(write(tmp_path / "f", "neox", {"tokenizer_class": "GPTNeoXTokenizer", field: None}))


HOLES = {token: id + 5 * (id > 257) for token, id in VOCAB.items()} | {"<|endoftext|>": END + 5}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, config, files, equal", [
    # `tokenizers` looks for a free id once, before the first of several tokens: it may be one with a token
    ("neo", {"pad_token": "<pad>"}, {"vocab.json": json.dumps(HOLES)}, False),
    ("neo", {"pad_token": "<pad>"}, {"vocab.json": json.dumps(VOCAB | {"<|endoftext|>": 2**31})}, True),
    ("neo", {}, {"merges.txt": "h e\nl l\r"}, False),      # a line ends with "\n" or "\r\n"
    ("neo", {}, {"merges.txt": "h e\r\nl l\r\n"}, True),
    ("neo", {}, {"vocab.json": '{"x": NaN, ' + json.dumps(VOCAB | {"<|endoftext|>": END})[1:]}, False),
    ("neox", {}, {"tokenizer.json": '{"version": "1.0", ' + json.dumps(tokenizer_json(True))[1:]}, False),
    ("neo", {"tokenizer_class": "PreTrainedTokenizerFast"}, {}, False),        # has no use for vocab.json
    ("neo", {"tokenizer_class": None}, {"config.json": '{"model_type": "gpt_neo", "tokenizer_class": ""}'}, False),
    ("neox", {}, {"config.json": "{"}, False), ("neo", {}, {"config.json": "[]"}, False)])
def test_odd_files(kind, config, files, equal, tmp_path):
    folder = write(tmp_path / "f", kind, {"tokenizer_class": FAMILY[kind][1]} | config)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    assert same_or_refused(folder) != equal


@pytest.mark.parametrize("flag", ["special", "normalized", "single_word", "lstrip", "rstrip"])
def test_added_tokens_without_all_their_flags(flag, tmp_path):
    """`tokenizers` reads none."""
    data = tokenizer_json(nfc=True)
    del data["added_tokens"][0][flag]
    assert same_or_refused(write(tmp_path / "f", "neox", {"tokenizer_class": "PreTrainedTokenizerFast"}, data))


def test_two_added_tokens_that_are_one_normalized(tmp_path):
    """Which of the two is found depends, in `tokenizers`, on the order in which they came."""
    data = tokenizer_json(nfc=True)
    data["added_tokens"] += [ADDED | dict(id=END + 1 + i, content=text, special=bool(i), normalized=True)
                             for i, text in enumerate(["<e\u0301>", "<é>"])]
    assert same_or_refused(write(tmp_path / "f", "neox", data=data))


@pytest.mark.parametrize("kind, name", [("neox", "tokenizer.json"), ("neo", "merges.txt"), ("neo", "config.json")])
def test_a_file_that_is_far_too_large(kind, name, tmp_path):
    folder = write(tmp_path / "f", kind)
    with open(folder / name, "r+b") as file:
        file.truncate(2**40)                               # it takes no room on the disk
    assert same_or_refused(folder)
