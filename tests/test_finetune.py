"""Fine-tuning by train.py: the reference's losses, gradients in parts, processes, kills, bad files."""

import dataclasses
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
import transformers

import train
from helpers import FOLDER, relative
from load_weights import AutoModelForSequenceClassification, AutoTokenizer
from training.tasks import Label
from training_cases import (
    TASKS,
    errors,
    examples,
    metrics,
    refused,
    run,
    run_two,
    torchrun,
    wait_for_lines,
    watch_gradients,
    write_data,
    write_examples,
)

RECIPE = ["--context", "48", "--batch-size", "7", "--lr", "3e-3", "--warmup", "5", "--threads", "1",
          "--steps", "50"]
ONE_STEP = ["--steps", "1", "--warmup", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("finetune"))


def command(folder, out, task, *more, init="neo-0.0"):
    files = {"lm": ["--text", str(folder / "text.txt"), "--valid", str(folder / "held.txt")],
             "classify": ["--train", str(folder / "train.csv"), "--valid", str(folder / "valid.jsonl")]}[task]
    return ["--task", task, *files, "--init", str(folder / init), "--out", str(folder / out), *RECIPE, *more]


def started(arguments):
    """A run in this process, before its first step, with the definition's attention."""
    run = train.start(train.parse([*arguments, "--out", str(Path(tempfile.mkdtemp(dir=FOLDER.name), "out"))]))
    run.model.set_attn_implementation("naive")
    run.model.train()
    return run


# ------------------------------------------------------------------------------------------------
# The same numbers as the reference's model
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["neo", "neox"])
@pytest.mark.parametrize("task", TASKS)
def test_fifty_steps_beside_the_reference(folder, tmp_path, family, task):
    """Data, seed and optimizer are the same; first loss within 1e-6, all fifty within 1e-4."""
    mine = started(command(folder, "-", task, init=f"{family}-0.0"))
    theirs = started(command(folder, "-", task, init=f"{family}-0.0"))
    mine.model.save_pretrained(tmp_path)
    auto = {"lm": transformers.AutoModelForCausalLM,
            "classify": transformers.AutoModelForSequenceClassification}[task]
    model = auto.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    model.config.head_dim = mine.model.config.head_dim
    theirs.task.model = model.train()
    theirs = dataclasses.replace(theirs)                    # with an optimizer for this model
    losses = [(mine.update()["loss"], theirs.update()["loss"]) for _ in range(50)]
    apart = [abs(a - b) / abs(b) for a, b in losses]
    print(f"{family} {task}: loss {losses[0][1]:.3f} to {losses[-1][1]:.3f}; relative difference "
          f"{apart[0]:.1e} at step 1, at most {max(apart):.1e}")
    assert sum(b for _, b in losses[-5:]) < sum(b for _, b in losses[:5])    # they have learned something
    assert apart[0] <= 1e-6 and max(apart) <= 1e-4


# ------------------------------------------------------------------------------------------------
# A batch in parts
# ------------------------------------------------------------------------------------------------

def gradients(run):
    run.model.zero_grad()
    loss = run.backward()
    return loss, torch.cat([p.grad.reshape(-1) for p in run.model.parameters()])


@pytest.mark.parametrize("turns", [2, 3, 7])
@pytest.mark.parametrize("task", TASKS)
def test_accumulated_gradients_are_the_whole_batch_s(folder, task, turns):
    """Seven rows cannot be shared evenly, and the rows hold different numbers of scored labels, one none."""
    run = started(command(folder, "-", task))
    batch = run.task.batch(0)
    labels = batch["labels"].clone()
    if task == "lm":
        for row, scored in enumerate([48, 3, 30, 0, 11, 48, 2]):
            labels[row, scored:] = -100
    else:
        labels[3] = -100
    run.task.batch = lambda step: batch | dict(labels=labels)
    loss, whole = gradients(run)
    run.accumulate = turns
    loss_in_parts, parts = gradients(run)
    print(f"{task}, {turns} turns: {relative(parts, whole):.1e}")
    assert relative(parts, whole) <= 1e-6
    assert loss_in_parts == pytest.approx(loss, rel=1e-6)
    expected = run.model(**run.task.batch(0)).loss.item()
    assert loss == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", TASKS)
def test_two_processes_have_the_gradients_of_one(folder, tmp_path, task):
    """The global batch is the same; four rows go to one process and three to the other, then in two turns."""
    found, alone = {}, tmp_path / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)   # put back after
        watch_gradients(alone)
        assert train.main(command(folder, alone, task, *ONE_STEP)) == 0
    for name, more in (("two", []), ("two in turns", ["--accumulate", "2"])):
        out = tmp_path / name
        status, err = run_two(command(folder, out, task, *ONE_STEP, *more), gradients=str(out))
        assert status == [0, 0], err
        found, other, expected = (torch.load(f"{path}.pt") for path in (f"{out}-0", f"{out}-1", f"{alone}-0"))
        assert torch.equal(found, other)
        print(f"{task}, {name}: {relative(found, expected):.1e}")
        assert relative(found, expected) <= 1e-6
        assert metrics(out)[0]["loss"] == pytest.approx(metrics(alone)[0]["loss"], rel=1e-6)


ALL_FAIL = pytest.mark.parametrize("more, words", [
    (["--init", "nowhere"], "nowhere"), (["--batch-size", "1"], "too small for 2 x 1 pieces"),
    (["--lr", "fast"], "invalid float value")])


@ALL_FAIL
def test_an_error_in_all_processes_is_said_once(folder, tmp_path, more, words):
    status, err = run_two(command(folder, tmp_path / "bad", "lm", *more))
    assert status == [2, 2] and len(errors(err)) == 1 and words in errors(err)[0], err
    assert not list(tmp_path.iterdir())


def test_by_torchrun_too(folder, tmp_path):
    """The command itself, which ends every process as soon as one has failed."""
    process = torchrun(*command(folder, tmp_path / "bad", "lm", "--init", "nowhere"))
    _, err = process.communicate(timeout=120)
    assert process.returncode and len(errors(err)) == 1 and "nowhere" in errors(err)[0], err
    assert not list(tmp_path.iterdir())


def test_an_error_in_one_process_ends_all(folder, tmp_path):
    """No waiting for a process that is gone; its own words, and no others'."""
    began = time.time()
    status, err = run_two(command(folder, tmp_path / "burnt", "classify"), gradients=str(tmp_path / "g"),
                          failing_rank=1)
    assert status == [1, 2] and errors(err) == ["train.py: error: process 1: the disk is on fire"], err
    assert "gloo" not in err and time.time() - began < 100
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt"}         # nothing of the run


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_killed_interrupted_and_resumed(folder, tmp_path, task):
    """One of the two is killed; then torchrun gets a Ctrl-C; dropout's numbers are each process's own."""
    more = ["--accumulate", "2", "--save-every", "6", "--eval-every", "20"]

    def start(out):
        return torchrun(*command(folder, out, task, *more, init="neox-0.1"))

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = start(whole)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    process = start(parts)
    wait_for_lines(parts, 15, lambda: process.poll() is None)
    random.Random(task).choice(psutil.Process(process.pid).children()).kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode and not parts.exists()
    process = start(parts)
    wait_for_lines(parts, 31, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert "going on after step" in err and "stopped after step" in err and not parts.exists(), err
    stopped = torch.load(f"{parts}.run/state.pt")["step"]
    assert f"stopped after step {stopped}:" in err and stopped == metrics(parts)[-1]["step"]
    process = start(parts)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and f"going on after step {stopped} " in err, err
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert metrics(parts) == metrics(whole)


# ------------------------------------------------------------------------------------------------
# Killed, and going on
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task, init", [
    ("classify", "neo-0.1"), pytest.param("lm", "neox-0.1", marks=pytest.mark.slow),
    pytest.param("classify", "neox-0.1", marks=pytest.mark.slow)])
def test_killed_at_random_and_resumed_is_the_same_run(folder, tmp_path, task, init):
    """SIGKILL at two places; the weights, the log and the measurements are an uninterrupted run's."""
    more = ["--accumulate", "3", "--dtype", "bfloat16", "--save-every", "4", "--eval-every", "20"]
    status, _, err = run(command(folder, tmp_path / "whole", task, *more, init=init))
    assert status == 0, err
    arguments = command(folder, tmp_path / "parts", task, *more, init=init)
    for after in sorted(random.Random(f"{task} {init}").sample(range(1, 50), 2)):
        status, _, err = run(arguments, stop_with=signal.SIGKILL, after=after)
        assert status == -signal.SIGKILL and not (tmp_path / "parts").exists(), err
    status, _, err = run(arguments)
    assert status == 0 and "going on after step" in err
    whole, parts = (torch.load(tmp_path / f"{name}.run" / "state.pt") for name in ("whole", "parts"))
    assert whole["step"] == 50 and whole["model"].keys() == parts["model"].keys()
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------
# Labelled texts
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["neo", "neox"])
def test_classifier_learns_and_is_what_the_reference_reads(folder, tmp_path, family):
    """Held-out loss, accuracy and macro F1 are found again by transformers and by hand; so are the names."""
    arguments = command(folder, tmp_path / "out", "classify", "--steps", "150", init=f"{family}-0.0")
    assert train.main(arguments) == 0
    record = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "Zoë", 1: "nobody", 2: "wood"}      # as sorted() has them
    loss, found, truth = 0.0, [], []
    for text, label in examples(2, 60):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=48).input_ids
        with torch.no_grad():
            log_p = model(ids).logits[0].log_softmax(-1)
        truth.append(model.config.label2id[label])
        found.append(log_p.argmax().item())
        loss -= log_p[truth[-1]].item() / 60
    both = [(t, f) for t, f in zip(truth, found)]
    f1 = [2 * both.count((k, k)) / max(1, truth.count(k) + found.count(k)) for k in range(3)]
    assert record["valid_accuracy"] == pytest.approx(sum(t == f for t, f in both) / 60)
    assert record["valid_macro_f1"] == pytest.approx(sum(f1) / 3)
    assert record["valid_loss"] == pytest.approx(loss, rel=1e-4)
    assert record["valid_accuracy"] > 0.9 > max(map(truth.count, range(3))) / 60
    mine = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert mine.config.id2label == model.config.id2label
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == mine.config.pad_token_id
    assert record["settings"]["task"] == "classify"


@pytest.mark.parametrize("labels, names", [
    (["10", "9", "-1"], ["-1", "9", "10"]), ([10, 9, 2], ["2", "9", "10"]),
    (["b", "10", "9"], ["10", "9", "b"])])
def test_labels_are_in_their_natural_order(folder, tmp_path, labels, names):
    path = write_examples(tmp_path / "a.jsonl", [(f"text {label}", label) for label in labels])
    assert Label([path], [], context=48, batch_size=2, seed=0).names == names


@pytest.mark.parametrize("family", ["neo", "neox"])
def test_padding_is_not_a_text_s_last_token(folder, tmp_path, family):
    """GPT-Neo pads with <|endoftext|>, which a text may end with; padding changes no row's logits."""
    texts = ["the queen<|endoftext|>", "the fool hears nobody.<|endoftext|><|endoftext|>", "a b c d " * 30,
             "x<|padding|>", "a<|endoftext|>b"]
    path = write_examples(tmp_path / "a.csv", [(text, i % 2) for i, text in enumerate(texts)])
    run = started(["--task", "classify", "--train", path, "--init", str(folder / f"{family}-0.0"),
                   "--context", "40"])
    task = run.task
    assert task.tokenizer.pad_token == {"neo": "<|endoftext|>", "neox": "<|padding|>"}[family]
    assert task.longer == 1 and [label for _, label in task.train_rows] == [0, 1, 0, 1, 0]
    for (ids, _), text in zip(task.train_rows, texts):
        whole = task.tokenizer.encode(text)[:40]
        assert ids == whole[:len(ids)] and set(whole[len(ids):]) <= {task.pad} and ids[-1] != task.pad
    assert task.pad in task.train_rows[4][0] or family == "neox"            # inside, it stays
    batch = task.collate(task.train_rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, 40)
    run.model.eval()
    logits = run.model(**batch).logits
    for row, (ids, _) in enumerate(task.train_rows):
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (40 - len(ids))
        assert batch["input_ids"][row].tolist() == ids + [task.pad] * (40 - len(ids))
        alone = run.model.score(run.model.transformer(torch.tensor([ids])).last_hidden_state[0, -1])
        torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-5)


def test_every_epoch_takes_every_text_once(folder):
    run = started(command(folder, "-", "classify"))
    order = []
    run.task.collate = lambda rows: order.extend(map(id, rows))
    for step in range(300):                                 # 300 * 7 rows are 14 epochs of 150
        run.task.batch(step)
    epochs = [order[i : i + 150] for i in range(0, 2100, 150)]
    assert all(set(epoch) == set(map(id, run.task.train_rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 14


# ------------------------------------------------------------------------------------------------
# Bad files
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, words", [
    ("a.csv", "", "there is no text in it"), ("a.csv", "text,label\n", "there are no rows"),
    ("a.csv", "good,1\nbad,0\n", "line 1: the header must name the columns text and label"),
    ("a.csv", "text,kind\ngood,1\n", "line 1: the header"),
    ("a.csv", 'text,label\n"two\nlines",1\nbad\n', "line 4: 1 fields, and the header has 2"),
    ("a.csv", "text,label\nwell, well,1\n", "line 2: 3 fields"),
    ("a.csv", "text,label\n  ,1\n", "line 2: the text is empty"),
    ("a.csv", "text,label\nx,\n", "line 2: label must be a word"),
    ("a.csv", 'text,label\nx,1\n"never closed,0\n', "line 3: unexpected end of data"),
    ("a.csv", "text,label\nx,1\ny,1\n", "every label is '1'"),
    ("a.csv", "text,label\nx,1\n<|endoftext|>,0\n", "line 3: there is nothing but <|endoftext|>"),
    ("a.csv", b"text,label\nx,1\nZo\xeb,2\n", "offset 17 is 0xeb (line 3)"),
    ("a.jsonl", '{"text": "x", "label": 1}\n\n{"text": "y"\n', "line 3: broken JSON: Expecting"),
    ("a.jsonl", '["x", 1]\n', "line 1: a line must be an object"),
    ("a.jsonl", '{"text": "x"}\n', 'an object with "text" and "label"'),
    ("a.jsonl", '{"text": 7, "label": 1}\n', "line 1: text must be a string"),
    ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "line 1: text must be a string of whole characters"),
    ("a.jsonl", '{"text": "x", "label": 0.5}\n', "line 1: label must be a word or a whole number, not 0.5"),
    ("a.jsonl", '{"text": "x", "label": true}\n', "not True"),
    ("a.jsonl", "[" * 100_000, "line 1: broken JSON"),
    ("a.txt", "x", "end in .csv or .jsonl")])
def test_bad_labelled_texts(folder, tmp_path, capsys, name, content, words):
    """As the training file and as the held-out one; nothing is written."""
    bad = tmp_path / name
    bad.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    good = str(folder / "train.csv")
    for files in ([str(bad)], [good, "--valid", str(bad)]):
        if words.startswith("every") and "--valid" in files:
            words = "line 2: label '1', which no training text has"
        if words.startswith("line 3: there is nothing") and "--valid" in files:
            bad.write_text("text,label\nx,wood\n<|endoftext|>,wood\n")
        error = refused(capsys, ["--task", "classify", "--train", *files, "--init", str(folder / "neo-0.0"),
                                 "--out", str(tmp_path / "out"), "--context", "48"])
        assert f"{bad}: " in error and words in error
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("arguments, words", [
    (["--task", "classify", "--train", "no.csv"], "--task classify needs --init"),
    (["--task", "classify", "--init", "x"], "--task classify needs --train"), ([], "--task lm needs --text"),
    (["--text", "x", "--train", "y"], "--train is for --task classify"),
    (["--task", "classify", "--train", "no.csv", "--init", "x"], "no.csv: No such file"),
    (["--text", "x", "--accumulate", "9"], "--batch-size 8 is too small for 1 x 9 pieces")])
def test_arguments_that_do_not_go_together(tmp_path, capsys, arguments, words):
    assert words in refused(capsys, [*arguments, "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_start_leaves_nothing(folder, tmp_path, capsys):
    assert "33" in refused(capsys, command(folder, tmp_path / "out", "classify", "--context", "333"))
    assert "settings" not in refused(capsys, command(folder, tmp_path / "out", "lm", "--init", "nowhere"))
    (tmp_path / "short.txt").write_text("the queen sees nobody", encoding="utf-8")
    arguments = ["--text", str(tmp_path / "short.txt"), "--out", str(tmp_path / "out"), "--vocab-size", "258"]
    assert "fewer than one --context" in refused(capsys, arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_a_classifier_of_other_labels_is_no_start(folder, tmp_path, capsys):
    """Nor one of the same labels in another order, whose head would answer one for the other."""
    with pytest.warns(UserWarning, match="drawn at random"):
        model = AutoModelForSequenceClassification.from_pretrained(
            folder / "neo-0.0", id2label={0: "wood", 1: "nobody", 2: "Zoë"}, pad_token_id=0)
    model.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(folder / "neo-0.0").save_pretrained(tmp_path / "classifier")
    error = refused(capsys, command(folder, tmp_path / "out", "classify", init=tmp_path / "classifier"))
    assert "is a classifier already, of wood, nobody, Zoë, and the labels here are Zoë, nobody, wood" in error


@pytest.mark.filterwarnings("ignore:.*drawn at random")
def test_eleven_labels_are_in_order_whoever_saved_them(folder, tmp_path):
    """transformers sorts config.json by name: "10" comes before "2"."""
    names = [f"label {i:02}" for i in range(11)]
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "neo-0.0", id2label=dict(enumerate(names)), pad_token_id=0)
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(folder / "neo-0.0").save_pretrained(tmp_path / "theirs")
    path = write_examples(tmp_path / "a.csv", [(f"text {name}", name) for name in names])
    run = started(["--task", "classify", "--train", path, "--init", str(tmp_path / "theirs"), "--context", "40"])
    assert torch.equal(run.model.score.weight, model.score.weight)


def test_without_scikit_learn_it_says_so_at_the_start(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    assert "pip install scikit-learn" in refused(capsys, command(folder, tmp_path / "out", "classify"))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------
# The worked use
# ------------------------------------------------------------------------------------------------

def test_shakespeare_s_passages():
    """Ten lines that are not blank, none across a scene's end; every play is of one kind and on one side."""
    from training import finetune_shakespeare as use

    assert len(use.KIND) == 37 and sum(len(plays.split()) for plays in use.KINDS.values()) == 37
    assert sorted(use.KIND[play] for play in use.HELD_OUT) == sorted(2 * list(use.KINDS))
    assert set(use.UNREAD) < set(use.HELD_OUT)
    lines = [f"line {i}\n" + "\n" * (i % 3 == 0) for i in range(25)]
    scene = "".join(lines)
    play = f"CAST\n\nACT I.\n\nSCENE I. Here.\n{scene}SCENE II. There.\n{scene}ACT II.\n"
    found = use.passages(play)
    assert len(found) == 4 and found[:2] == found[2:]
    assert found[1].replace("\n\n", "\n").split("\n") == [f"line {i}" for i in range(10, 20)]
    assert use.acts(play) == [play[play.index("ACT I."):play.index("ACT II.")], "ACT II.\n"]
