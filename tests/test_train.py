"""train.py: it learns, it measures right, it survives being killed, and its files are official."""

import json
import math
import pickle
import shutil
import signal
import sys
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import neo
import neox
import train
from load_weights import AutoModelForCausalLM, AutoTokenizer
from training.model import learning_rate, new_model, parameter_groups
from training.texts import Batches, read_examples, read_plain
from training_cases import SHAPE as SIZES
from training_cases import metrics, nonsense, refused, run, write_data

SHAPE = ["--hidden-size", "32", "--layers", "2", "--heads", "2", "--context", "32", "--vocab-size", "320"]
WINDOW = {"neo": ["--window", "8"], "neox": []}
RECIPE = ["--steps", "60", "--batch-size", "8", "--lr", "1e-2", "--warmup", "5", "--dropout", "0.1",
          "--dtype", "bfloat16", "--threads", "1", "--eval-every", "25", "--save-every", "8"]
ODD = "Zoë — “naïve”  日本 🜁\t\n\n   x  y<|endoftext|>\r\n e\u0301 " + " " * 30 + "end "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    (folder / "one.txt").write_text(nonsense(1, 600), encoding="utf-8")
    (folder / "two.txt").write_text(nonsense(2, 300), encoding="utf-8")
    (folder / "held_out.txt").write_text(nonsense(3, 70) + ODD, encoding="utf-8", newline="")
    (folder / "held_out_too.txt").write_text("a", encoding="utf-8")
    return folder


def command(folder, out, family, *more):
    return ["--text", str(folder / "one.txt"), str(folder / "two.txt"), "--valid",
            str(folder / "held_out.txt"), str(folder / "held_out_too.txt"), "--out",
            str(folder / out), "--family", family, *SHAPE, *WINDOW[family], *RECIPE, *more]


@pytest.fixture(scope="module")
def finished(folder):
    """The folder of an uninterrupted run: finished["neo"], finished["neox"], run when first wanted."""
    class Finished(dict):
        def __missing__(self, family):
            assert train.main(command(folder, family, family)) == 0
            self[family] = folder / family
            return self[family]

    return Finished()


# ------------------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["neo", "neox"])
def test_learns_more_than_token_counts(folder, finished, family):
    tokenizer = AutoTokenizer.from_pretrained(finished[family])
    counts = Counter(tokenizer.encode((folder / "one.txt").read_text(encoding="utf-8")))
    total = sum(counts.values())
    unigram = -sum(n / total * math.log(n / total) for n in counts.values())
    losses = [record["loss"] for record in metrics(finished[family]) if "loss" in record]
    assert len(losses) == 60
    assert losses[0] > math.log(320) - 0.5
    assert sum(losses[-8:]) / 8 < 0.6 * unigram


@pytest.mark.parametrize("family", ["neo", "neox"])
def test_bits_per_byte_is_what_the_reference_finds(folder, finished, family):
    """Every token once, after <|endoftext|>, in windows; divided by the bytes of the files."""
    model = transformers.AutoModelForCausalLM.from_pretrained(finished[family], dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished[family])
    bits, size, context = 0.0, 0, 32
    for name in ("held_out.txt", "held_out_too.txt"):
        data = (folder / name).read_bytes().replace(b"\r\n", b"\n")        # as train.py reads it
        ids = [tokenizer.eos_token_id] + tokenizer(data.decode("utf-8")).input_ids
        for first in range(0, len(ids) - 1, context - 1):
            window = torch.tensor([ids[first : first + context]])
            with torch.no_grad():
                log_p = model(window).logits[0, :-1].double().log_softmax(-1)
            bits -= log_p.gather(1, window[0, 1:, None]).sum().item() / math.log(2)
        size += len(data)
    record = json.loads((finished[family] / "training.json").read_text(encoding="utf-8"))
    assert record["valid_bytes"] == size
    assert record["valid_bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
    logged = [r["valid_bits_per_byte"] for r in metrics(finished[family]) if "sample" in r]
    assert len(logged) == 3                                 # steps 25, 50 and the last, 60
    assert logged[-1] == pytest.approx(bits / size, rel=0.02)   # in bfloat16


def test_learning_rate():
    rates = [learning_rate(step, 2.0, 4, 20) for step in range(20)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[12] == pytest.approx(1.0)                  # half way down the cosine
    assert all(a > b > 0 for a, b in zip(rates[4:], rates[5:]))
    assert learning_rate(20, 2.0, 4, 20) == pytest.approx(0)
    assert learning_rate(0, 2.0, 0, 20) == 2.0


@pytest.mark.parametrize("family, matrices", [("neo", 2 * 6), ("neox", 2 * 4 + 1)])
@pytest.mark.parametrize("fresh", [True, False])
def test_parameter_groups(family, matrices, fresh):
    """Decay for the matrices of linear layers (NeoX's output is one; GPT-Neo's is the embedding, which
    must not fade); a fresh GPT-Neo's q weights learn at 1/sqrt(D) of the rate, with decay to match."""
    model = new_model(family, context=32, dropout=0.1, **SIZES)
    decayed, kept, folded = parameter_groups(model, 0.25, fresh)
    share = model.config.head_dim ** -0.5
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.25, 0.0)
    assert folded["share"] == share and folded["share"] * folded["weight_decay"] == pytest.approx(0.25)
    assert decayed["share"] == kept["share"] == 1.0
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept, folded = [{names[id(p)] for p in group["params"]} for group in (decayed, kept, folded)]
    assert len(decayed | folded) == matrices and len(decayed) + len(kept) + len(folded) == len(names)
    assert folded == {n for n in names.values() if fresh and "q_proj" in n}
    assert decayed | folded == {name for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}


def test_a_fresh_gpt_neo_has_the_scale_folded_in():
    """q weights at 0.02 / sqrt(D), so that unscaled scores start as scaled ones would."""
    model = new_model("neo", context=32, dropout=0.1, **SIZES)
    attn = model.transformer.blocks[0].attn
    assert attn.q_proj.weight.std().item() == pytest.approx(0.02 * model.config.head_dim ** -0.5, rel=0.1)
    assert attn.k_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_every_epoch_takes_every_window_once():
    batches = Batches(torch.arange(1000), context=16, batch_size=5, seed=3)
    assert batches.windows == 62
    starts = []
    for step in range(2 * 62):                              # 2 * 62 * 5 windows are 10 epochs
        rows = batches[step]
        assert rows.shape == (5, 16) and (rows.diff(dim=1) == 1).all()
        starts += rows[:, 0].tolist()
    epochs = [starts[i : i + 62] for i in range(0, len(starts), 62)]
    assert all(sorted(b - min(epoch) for b in epoch) == list(range(0, 992, 16)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10 and len({min(epoch) for epoch in epochs}) > 1
    again = Batches(torch.arange(1000), context=16, batch_size=5, seed=3)
    assert again[77][:, 0].tolist() == starts[77 * 5 : 78 * 5]     # no need to have been elsewhere
    assert Batches(torch.arange(1000), 16, 5, seed=4)[0].tolist() != again[0].tolist()


# ------------------------------------------------------------------------------------------------
# Stopping and going on
# ------------------------------------------------------------------------------------------------

@pytest.mark.slow                                          # test_finetune.py kills runs in the quick half
def test_killed_twice_and_resumed_is_the_same_run(folder, finished):
    """Once before the first save, once between two; weights to the bit, and no line of the log more."""
    arguments = command(folder, "killed", "neo")
    for after in (3, 30):
        status, _, _ = run(arguments, stop_with=signal.SIGKILL, after=after)
        assert status == -signal.SIGKILL
        assert not (folder / "killed").exists()
    status, _, err = run(arguments)
    assert status == 0 and "going on after step" in err
    for name in ("model.safetensors", "config.json", "vocab.json", "merges.txt"):
        assert (folder / "killed" / name).read_bytes() == (finished["neo"] / name).read_bytes(), name
    assert metrics(folder / "killed") == metrics(finished["neo"])


def test_interrupted_saves_at_once_and_looking_changes_nothing(folder, finished):
    """Ctrl-C; then the rest with more evaluations and samples than the uninterrupted run had."""
    arguments = command(folder, "interrupted", "neox", "--save-every", "1000", "--eval-every", "20")
    status, _, err = run(arguments, stop_with=signal.SIGINT, after=11)
    assert status == 130 and "Traceback" not in err
    steps = max(record["step"] for record in metrics(folder / "interrupted"))
    assert 11 <= steps < 60 and f"stopped after step {steps}:" in err
    status, _, err = run([*arguments, "--eval-every", "7"])
    assert status == 0 and f"going on after step {steps} of 60" in err
    assert ((folder / "interrupted" / "model.safetensors").read_bytes()
            == (finished["neox"] / "model.safetensors").read_bytes())


def test_finished_run_is_left_alone(folder, finished, capsys):
    """Not even its files' times change."""
    before = (finished["neo"] / "model.safetensors").stat().st_mtime_ns
    assert train.main(command(folder, "neo", "neo")) == 0
    assert "finished" in capsys.readouterr().out
    assert (finished["neo"] / "model.safetensors").stat().st_mtime_ns == before


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["neo", "neox"])
def test_tokenizer_is_official_and_all_three_agree(folder, finished, family):
    theirs = transformers.AutoTokenizer.from_pretrained(finished[family])
    ours = AutoTokenizer.from_pretrained(finished[family])
    assert type(theirs).__name__.startswith({"neo": "GPT2", "neox": "GPTNeoX"}[family])
    assert len(theirs) == len(ours) == 320
    assert theirs.eos_token_id == ours.eos_token_id == {"neo": 319, "neox": 0}[family]
    every_byte = "".join(map(chr, [*range(0x250), 0x800, 0xFFFD, 0x1F701, 0x10FFFF]))
    for text in (nonsense(3, 50), ODD, every_byte, "  def f(x):\n        return x", " " * 49 + "y"):
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        expected = text if family == "neo" else unicodedata.normalize("NFC", text)
        assert ours.decode(ids) == theirs.decode(ids) == expected


def test_neo_vocabulary_is_laid_out_as_gpt2s(finished):
    vocab = json.loads((finished["neo"] / "vocab.json").read_text(encoding="utf-8"))
    header, *merges, end = (finished["neo"] / "merges.txt").read_text(encoding="utf-8").split("\n")
    assert header.startswith("#version") and end == "" and len(merges) == 320 - 257
    assert list(vocab.values()) == list(range(320)) and vocab["<|endoftext|>"] == 319
    assert [vocab["!"], vocab["Ċ"], vocab["Ġ"]] == [0, 198, 220]   # as in the official file
    assert [vocab[merge.replace(" ", "")] for merge in merges] == list(range(256, 319))


def test_neox_tokenizer_has_the_official_parts(finished):
    """All but vocabulary and merges equals GPT-NeoX-20B's file (shared/tokenizers/README.md)."""
    found = json.loads((finished["neox"] / "tokenizer.json").read_text(encoding="utf-8"))
    vocab, merges = found["model"].pop("vocab"), found["model"].pop("merges")
    added = found.pop("added_tokens")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    assert found == {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None}}
    assert list(vocab.values()) == list(range(320 - 23))
    assert [vocab[c] for c in ("<|endoftext|>", "<|padding|>", "!", "Ċ", "Ġ")] == [0, 1, 2, 187, 209]
    assert [vocab[merge.replace(" ", "")] for merge in merges] == list(range(245, 320 - 23))
    assert not any("ĠĠ" in token for token in vocab)        # encode could never use such a token
    assert [(t["id"], t["content"]) for t in added] == [
        (0, "<|endoftext|>"), (1, "<|padding|>"), *((321 - n, " " * n) for n in range(24, 1, -1))]
    for t in added:
        special = t["id"] < 2
        assert (t["special"], t["normalized"]) == (special, not special)
        assert not (t["lstrip"] or t["rstrip"] or t["single_word"])


def test_checkpoint_and_its_record(folder, finished):
    out = finished["neo"]
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert record["tokens"] == 60 * 8 * 32 and record["steps"] == 60
    assert record["command"].startswith("python ") and "--lr 1e-2" in record["command"]
    assert record["parameters"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(out).parameters())
    assert not list(out.glob("*.part")) and not (out / "state.pt").exists()
    pytest.importorskip("matplotlib")
    assert Path(f"{out}.run", "loss.png").read_bytes().startswith(b"\x89PNG")


def test_goes_on_from_a_checkpoint(folder, finished):
    """--init: the loss begins where the checkpoint's ended, and the tokenizer is the checkpoint's."""
    arguments = ["--text", str(folder / "two.txt"), "--out", str(folder / "tuned"), "--init",
                 str(finished["neox"]), "--context", "24", "--lr", "1e-4", "--steps", "3", "--warmup",
                 "0", "--threads", "1", "--save-dtype", "float16"]
    status, out, err = run(arguments)
    assert status == 0, err
    assert metrics(folder / "tuned")[0]["loss"] < metrics(finished["neox"])[45]["loss"]
    assert ((folder / "tuned" / "tokenizer.json").read_bytes()
            == (finished["neox"] / "tokenizer.json").read_bytes())
    tuned = AutoModelForCausalLM.from_pretrained(folder / "tuned", torch_dtype="auto")
    assert tuned.dtype == torch.float16
    assert "valid_bits_per_byte" not in json.loads((folder / "tuned" / "training.json").read_text())


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------

def test_bad_texts(folder, capsys):
    (folder / "latin.txt").write_bytes("Zoë".encode("latin-1"))
    (folder / "empty.txt").write_bytes(b"\n \n")
    (folder / "short.txt").write_text("the queen sees nobody", encoding="utf-8")

    def error(text, *more):
        return refused(capsys, ["--text", str(folder / text), "--out", str(folder / "bad"), *more])

    assert "no.txt: No such file" in error("no.txt")
    assert "latin.txt: not UTF-8, the byte at offset 2 is 0xeb" in error("latin.txt")
    assert "empty.txt: there is no text in it" in error("empty.txt")
    (folder / "wide.txt").write_text("the queen", encoding="utf-16")
    assert "wide.txt: not UTF-8, the byte at offset 0 is 0xff (line 1): save it as UTF-8" in error("wide.txt")
    (folder / "wide.txt").write_text("the queen", encoding="utf-16-le")
    assert "wide.txt: not a text in UTF-8, it has zero bytes" in error("wide.txt")
    assert "no.txt" in error("one.txt", "--valid", str(folder / "no.txt"))
    assert "fewer than one --context of 32" in error("short.txt", *SHAPE[:-1], "258")
    assert "more than the text has bytes" in error("short.txt", *SHAPE)
    assert "the text gives" in error("short.txt", *SHAPE[:-1], "270")
    assert "too small" in error("one.txt", *SHAPE[:-1], "257")
    assert not (folder / "bad").exists()


def test_out_of_another_run(folder, finished, capsys):
    finished["neo"], finished["neox"]
    capsys.readouterr()                                    # what training them, if only now, has printed
    error = refused(capsys, command(folder, "neo", "neo", "--lr", "3e-3"))
    assert "other settings (lr was 0.01 and is 0.003)" in error
    (finished["neox"] / "training.json").rename(folder / "aside")  # now only its state is there
    try:
        error = refused(capsys, command(folder, "neox", "neox", "--seed", "1"))
        assert "other settings (seed was 0 and is 1)" in error
    finally:
        (folder / "aside").rename(finished["neox"] / "training.json")
    one = folder / "one.txt"
    text = one.read_text(encoding="utf-8")
    one.write_text(text + "more", encoding="utf-8")
    assert "other settings (text has changed" in refused(capsys, command(folder, "neo", "neo"))
    one.write_text(text, encoding="utf-8")
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.tex").write_text("precious")
    assert "not written by train.py" in refused(capsys, command(folder, "mine", "neo"))


@pytest.mark.parametrize("more, words", [
    (["--lr", "nan"], "--lr must be above 0"), (["--steps", "0"], "--steps must be above 0"),
    (["--warmup", "60"], "--warmup must be in 0 … 59"), (["--context", "1"], "--context must be"),
    (["--init", "nowhere"], "with --init the checkpoint decides that"),
    (["--heads", "3"], "hidden_size"), (["--prompt", "no " * 40], "--prompt must be shorter")])
def test_bad_numbers(folder, capsys, more, words):
    assert words in refused(capsys, command(folder, "bad", "neo", *more))


def test_init_that_cannot_be(folder, finished, capsys):
    start = ["--text", str(folder / "one.txt"), "--out", str(folder / "bad"), "--init"]
    assert "folder" in refused(capsys, [*start, str(folder / "nowhere")])
    assert "one.txt is a file" in refused(capsys, [*start, str(folder / "one.txt")])
    error = refused(capsys, [*start, str(finished["neo"]), "--context", "33"])
    assert "--context 33 is more than the 32 positions" in error


# ------------------------------------------------------------------------------------------------
# What cannot work: one line before the first step, and nothing left
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function that changes a copy of a small checkpoint and returns its folder."""
    data = write_data(tmp_path_factory.mktemp("checkpoints"))

    def changed(folder, family="neo", config=(), tokenizer_config=(), weights=None, head=None):
        out = folder / "init"
        if head:
            module = {"neo": neo.GPTNeoForCausalLM, "neox": neox.GPTNeoXForCausalLM}[family].__module__
            kind = getattr(sys.modules[module], {"neo": "GPTNeoFor", "neox": "GPTNeoXFor"}[family] + head)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind.from_pretrained(data / f"{family}-0.0").save_pretrained(out)
            AutoTokenizer.from_pretrained(data / f"{family}-0.0").save_pretrained(out)
        else:
            shutil.copytree(data / f"{family}-0.0", out)
        for name, change in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
            content = json.loads((out / name).read_text(encoding="utf-8")) | dict(change)
            (out / name).write_text(json.dumps(content), encoding="utf-8")
        if weights:
            tensors = load_file(out / "model.safetensors")
            weights(tensors)
            save_file(tensors, out / "model.safetensors")
        return out
    changed.data = data
    return changed


def cut_vocabulary(tensors):
    for name, tensor in tensors.items():
        if tensor.shape[0] == 320:
            tensors[name] = tensor[:300].clone()


def not_a_number(tensors):
    next(tensor for name, tensor in tensors.items() if name.endswith("ln_f.bias")).fill_(math.nan)


def too_large(tensors):
    for tensor in tensors.values():
        tensor.fill_(3e38)


NO_END = dict(eos_token=None, bos_token=None, unk_token=None)


@pytest.mark.parametrize("task", ["lm", "classify"])
@pytest.mark.parametrize("change, words", [
    (dict(tokenizer_config=NO_END), "has no eos_token|neither pad_token nor eos_token"),
    (dict(config=dict(vocab_size=300), weights=cut_vocabulary), "its tokenizer has 320 tokens and its model only 300"),
    (dict(weights=not_a_number), "transformer.ln_f.bias has numbers that are not finite"),
    (dict(weights=too_large), "the gradient of step 0 is not finite: these weights cannot be trained"),
    (dict(head="QuestionAnswering"), "is a GPTNeoForQuestionAnswering, and this task starts from a checkpoint For"),
    (dict(head="TokenClassification"), "is a GPTNeoForTokenClassification, and this"),
    (dict(head="QuestionAnswering", family="neox"), "is a GPTNeoXForQuestionAnswering, and this")])
def test_a_checkpoint_that_cannot_be_trained(checkpoint, tmp_path, capsys, task, change, words):
    init, data = checkpoint(tmp_path, **change), checkpoint.data
    files = {"lm": ["--text", data / "text.txt"], "classify": ["--train", data / "train.csv"]}[task]
    assert train.main(list(map(str, ["--task", task, *files, "--init", init, "--out", tmp_path / "a/b/out",
                                     "--context", "16"]))) == 2
    out, err = capsys.readouterr()
    assert out == "" and any(word in err.splitlines()[-1] for word in words.split("|")), err
    assert ("step 0" in words) == ("to train on" in err)    # all others before there is a run
    assert [path.name for path in tmp_path.iterdir()] == ["init"]


def test_a_classifier_is_no_language_model(checkpoint, tmp_path, capsys):
    init = checkpoint(tmp_path, head="SequenceClassification")
    error = refused(capsys, ["--text", checkpoint.data / "text.txt", "--init", init, "--out", tmp_path / "out"])
    assert "is a GPTNeoForSequenceClassification, and this task starts from a checkpoint ForCausalLM" in error


@pytest.mark.parametrize("more, words", [
    (["--weight-decay", "nan"], "--weight-decay must be at least 0, not nan"),
    (["--weight-decay", "-1"], "--weight-decay"), (["--dropout", "1.0"], "--dropout must be at least 0 and below 1"),
    (["--clip", "inf"], "--clip must be above 0"), (["--layers", "0"], "--layers must be above 0"),
    (["--heads", "-2"], "--heads must be above 0"), (["--window", "0"], "--window must be above 0"),
    (["--seed", "-1"], "--seed must be at least 0"), (["--seed", str(10**23)], "--seed must be at least 0"),
    (["--steps", str(10**23)], "--steps must be above 0 and below 2^31"), (["--threads", "2000"], "--threads must be"),
    (["--vocab-size", str(10**23)], "--vocab-size must be above 0 and below 2^31"),
    (["--hidden-size", str(6 * 10**7)], "out of memory"),
    (["--family", "gpt2"], "argument --family: invalid choice: 'gpt2'"), (["--valid"], "argument --valid: expected"),
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"), (["--nonsense"], "unrecognized arguments"),
    (["--device", "gpu"], "--device gpu cannot be used here"), (["--device", "meta"], "--device meta cannot"),
    (["--out", ""], "argument --out: '' is not a name: it is empty"), (["--out", "/"], "--out must name a folder"),
    (["--out", ".."], "--out must name a folder"), (["--out", "/proc/nothing/out"], "/proc"),
    (["--out", "{}/one.txt/out"], "one.txt"), (["--out", "{}/one.txt"], "one.txt: Not a directory: name another folder"),
    (["--out", "{}/" + "x" * 300], "it is too long"), (["--out", "{}/" + "x" * 252], "File name too long"),
    (["--out", "\udcff"], "--out is not UTF-8"), (["--batch-size", str(2**30)], "--batch-size must be"),
    (["--vocab-size", str(2**30)], "more than the text has bytes"), (["--init", ""], "argument --init: ''"),
    (["--family", "neox", "--window", "3"], "--window is for --family neo"),
    (["--prompt", "\udcff"], "--prompt is not UTF-8"),
    (["--text", "{}"], "Is a directory"), (["--valid", "{}"], "Is a directory")])
def test_options_that_cannot_be(folder, tmp_path, capsys, more, words):
    before = sorted(folder.rglob("*"))
    more = [part.format(folder) for part in more]
    assert words in refused(capsys, command(folder, tmp_path / "out", "neo", *more))
    assert not list(tmp_path.iterdir()) and sorted(folder.rglob("*")) == before


def test_what_a_run_finds_in_its_place(folder, tmp_path, capsys):
    """A damaged state, a training.json that is none, a file in the place of OUT.run: one line each."""
    out, run_folder = tmp_path / "out", tmp_path / "out.run"
    run_folder.mkdir()
    for damaged in (b"", b"not a pickle", pickle.dumps(dict(step=3))):
        (run_folder / "state.pt").write_bytes(damaged)
        assert "state.pt is damaged" in refused(capsys, command(folder, out, "neo"))
    torch.save(dict(step=3), run_folder / "state.pt")
    assert "state.pt is damaged ('settings')" in refused(capsys, command(folder, out, "neo"))
    shutil.rmtree(run_folder)
    run_folder.write_text("mine")
    assert "out.run: Not a directory" in refused(capsys, command(folder, out, "neo"))
    assert run_folder.read_text() == "mine"
    run_folder.unlink()
    out.mkdir()
    for record in ("{", "[]", "{}"):
        (out / "training.json").write_text(record)
        assert "training.json" in refused(capsys, command(folder, out, "neo"))


def test_a_failure_before_the_first_save_leaves_nothing_and_after_it_the_run(folder, tmp_path, monkeypatch):
    update = train.Run.update

    def fails(run):
        if run.step == 10:
            raise OSError(28, "No space left on device", "/disk")
        return update(run)
    monkeypatch.setattr(train.Run, "update", fails)
    assert train.main(command(folder, tmp_path / "new" / "out", "neo", "--save-every", "100")) == 2
    assert not list(tmp_path.iterdir())
    assert train.main(command(folder, tmp_path / "new" / "out", "neo")) == 2        # saved after step 8
    assert torch.load(tmp_path / "new" / "out.run" / "state.pt")["step"] == 8


def test_a_closed_standard_error_stops_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert train.main(command(folder, tmp_path / "out", "neo", "--steps", "1", "--warmup", "0")) == 0


def test_what_killed_saves_left_is_removed(folder, tmp_path):
    (tmp_path / "out.run").mkdir()
    for name in (".state.pt.abcdefgh.part", ".loss.png.abcdefgh.part"):
        (tmp_path / "out.run" / name).write_bytes(b"half of it")
    assert train.main(command(folder, tmp_path / "out", "neox", "--steps", "1", "--warmup", "0")) == 0
    assert not list(tmp_path.rglob(".*"))


# ------------------------------------------------------------------------------------------------
# Texts as people save them
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content", [
    ("a.csv", "text,label\none,x\ntwo,y\n"), ("a.csv", "\ufefftext,label\r\none, x\r\ntwo,y \r\n"),
    ("a.csv", 'text, label\r\n"one","\tx"\r\n\r\n"two"," y"\r\n'), ("a.CSV", "label,text\rx,one\ry,two\r"),
    ("a.jsonl", '\ufeff{"text": "one", "label": " x"}\r\n{"text": "two", "label": "y\\n"}\r\n')])
def test_labels_are_trimmed_and_marks_are_no_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("utf-8"))
    assert [row[:2] for row in read_examples([tmp_path / name])] == [("one", "x"), ("two", "y")]


def test_texts_keep_their_spaces_and_lose_a_mark_and_carriage_returns(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,label\r\n"  one\r\n two ",x\r\n')
    assert read_examples([tmp_path / "a.csv"])[0][:2] == ("  one\n two ", "x")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n two\rthree\n")
    assert read_plain(tmp_path / "a.txt") == "one\n two\rthree\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\r\n")
    with pytest.raises(ValueError, match="there is no text in it"):
        read_plain(tmp_path / "a.txt")
