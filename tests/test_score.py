"""Scores and likeliest tokens: the reference's numbers, each token once, and a command line that behaves."""

import functools
import io
import math
import sys
from dataclasses import replace

import pytest
import torch
import transformers

import generate
import score
from conftest import ROOT
from helpers import good, ours, random_case, reference, relative
from load_weights import AutoModelForCausalLM, AutoTokenizer

DEMOS = ["demo-neo", "demo-neox"]
FAMILIES = ["gpt_neo", "gpt_neox"]
L = 24                                                     # of the random models


@functools.cache
def demo(name):
    """(the reference, ours, tokenizer) of a demo checkpoint, in float32 by the definition."""
    folder = ROOT / "checkpoints" / name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                               attn_implementation="eager").eval()
    return (theirs, AutoModelForCausalLM.from_pretrained(folder, attn_implementation="naive"),
            AutoTokenizer.from_pretrained(folder))


@functools.cache
def small(family):
    """(the reference, ours) of a random model that sees L tokens, GPT-Neo's local layers fewer."""
    case = random_case(300 if family == "gpt_neo" else 301)
    settings = dict(case.settings) | {"max_position_embeddings": L}
    case = replace(case, settings=tuple(settings.items()))
    return reference(case), ours(case)


@functools.cache
def tiny(family):
    """(ours, tokenizer): 32 tokens at once, 257 of them, bytes but for the end of text, in 264 rows."""
    return AutoModelForCausalLM.from_pretrained(good(family)), AutoTokenizer.from_pretrained(good(family))


def some_ids(N):
    return torch.randint(1, 97, (N,), generator=torch.Generator().manual_seed(N))


def their_log_prob(model, ids):
    """The reference's log-probability of the last of ids, given the others."""
    return model(ids[None, :-1]).logits[0, -1].double().log_softmax(-1)[ids[-1]]


# --- the numbers ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", DEMOS)
def test_loss_of_a_short_text_is_the_references(name):
    """Of real text, and of as many tokens as fit."""
    theirs, mine, tokenizer = demo(name)
    ids = torch.tensor(tokenizer.encode((ROOT / "README.md").read_text(encoding="utf-8"))[:512])
    for n in (2, 3, 100, 511, 512):
        with torch.no_grad():
            expected = theirs(ids[None, :n], labels=ids[None, :n]).loss.item()
        found = -score.log_probs(mine, ids[:n])
        assert len(found) == n - 1 and found.dtype == torch.float32
        assert found.double().mean().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name, stride", [
    ("demo-neo", 100), ("demo-neox", None), pytest.param("demo-neo", None, marks=pytest.mark.slow),
    pytest.param("demo-neox", 100, marks=pytest.mark.slow)])
def test_a_long_text_by_the_documentations_recipe(name, stride):
    """transformers' windows with labels of -100: each one's mean, times the tokens it is a mean of."""
    theirs, mine, tokenizer = demo(name)
    text = (ROOT / "README.md").read_text(encoding="utf-8")[:3500]
    ids = torch.tensor([tokenizer.encode(text)])
    size, step, nats, count, last = ids.size(1), stride or 256, 0.0, 0, 0
    assert size > 2 * 512
    for begin in range(0, size, step):
        end = min(begin + 512, size)
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, :-(end - last)] = -100                   # scored by an earlier window
        with torch.no_grad():
            loss = theirs(window, labels=labels).loss.item()
        n = (labels[:, 1:] != -100).sum().item()
        nats, count, last = nats + loss * n, count + n, end
        if end == size:
            break
    found = score.score_text(mine, tokenizer, text, stride)
    assert found.tokens == count == size - 1
    assert found.loss == pytest.approx(nats / count, rel=1e-6)


@pytest.mark.parametrize("N", [2, L - 1, L, L + 1, L + 2, 3 * L + 5])
@pytest.mark.parametrize("stride", [1, 5, L // 2, L - 1, L])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_against_a_forward_of_its_own(family, stride, N):
    """The reference reads what a token's window holds before it, token by token, and nothing else."""
    (theirs, mine), ids, expected = small(family), some_ids(N), []
    for t in range(1, N):
        begin = 0 if t < L else stride * math.ceil((t - L + 1) / stride) - (stride == L)
        with torch.no_grad():
            expected.append(their_log_prob(theirs, ids[begin:t + 1]))
    expected, found = torch.stack(expected), score.log_probs(mine, ids, stride)
    assert found.dtype == torch.float32 and found.shape == (N - 1,)
    assert relative(found, expected) <= 1e-6
    assert found.double().mean().item() == pytest.approx(expected.mean().item(), rel=1e-6)


def test_each_token_once_with_enough_before_it():
    """For every length, window and stride up to 20."""
    for length in range(1, 21):
        for N in range(2, 21):
            for stride in range(1, length + 1):
                found = [*score.windows(N, length, stride)]
                assert [t for _, first, end in found for t in range(first, end)] == [*range(1, N)]
                for i, (begin, first, end) in enumerate(found):
                    assert first - begin >= (max(1, length - stride) if i else 1)
                    assert end - begin <= length + (stride == length) and end - 1 - begin <= length


def test_logits_are_made_for_the_scored_tokens_alone(monkeypatch):
    """Tokens that two windows share are not paid for twice; slices change nothing."""
    mine, sizes = small("gpt_neox")[1], []
    forward = type(mine).forward
    monkeypatch.setattr(type(mine), "forward", lambda self, ids, **how: (
        sizes.append((ids.size(1), how["logits_to_keep"])), forward(self, ids, **how))[1])
    whole = score.log_probs(mine, some_ids(60))
    assert sizes == [(23, 23), (23, 12), (23, 12), (23, 12)]
    monkeypatch.setattr(score, "SLICE", 5)
    assert torch.equal(score.log_probs(mine, some_ids(60)), whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text, tokens, size", [
    ("plain text", 9, 9), ("naïve café", 11, 11), ("é at first", 10, 10),
    ("猫が\U0001F431好き" * 8, 127, 127), ("a<|endoftext|>b", 2, 14)])
def test_bytes_perplexity_and_bits_per_byte(family, text, tokens, size):
    """Every token of these tokenizers is a byte, so a text can begin with half a character for a token."""
    model, tokenizer = tiny(family)
    found = score.score_text(model, tokenizer, text)
    assert (found.tokens, found.bytes) == (tokens, size)
    assert found.perplexity == pytest.approx(math.exp(found.loss), rel=1e-12)
    assert found.bits_per_byte * size == pytest.approx(found.loss * tokens / math.log(2), rel=1e-12)
    assert found.loss == -score.log_probs(model, torch.tensor(tokenizer.encode(text))).double().mean().item()


def test_bytes_are_the_tokens_own():
    """GPT-NeoX's tokenizer composes an accent with its letter, GPT-2's leaves the text as it is."""
    assert [score.score_text(*tiny(family), "ae\u0301").bytes for family in FAMILIES] == [3, 2]


# --- the likeliest tokens -------------------------------------------------------------------------

@pytest.mark.parametrize("name", DEMOS)
def test_likeliest_tokens_are_the_references(name):
    theirs, mine, tokenizer = demo(name)
    with torch.no_grad():
        p = theirs(torch.tensor([tokenizer.encode("HAMLET. To be, or not")])).logits[0, -1].softmax(-1)
    values, ids = p.topk(20)
    found = score.likeliest(mine, tokenizer, "HAMLET. To be, or not", 20)
    assert [id for _, id, _ in found] == ids.tolist()
    assert [text for _, _, text in found] == [repr(tokenizer.decode(id)) for id in ids.tolist()]
    assert relative(torch.tensor([p for p, _, _ in found]), values) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_a_token_are_not_listed(family):
    """The probabilities are those of all rows, so that the list falls short of 1."""
    model, tokenizer = tiny(family)
    with torch.no_grad():
        p = model(torch.tensor([tokenizer.encode("hi")])).logits[0, -1].softmax(-1)
    found = score.likeliest(model, tokenizer, "hi", 1000)
    known = len(tokenizer)                                 # GPT-NeoX's has added its <|padding|>, as in transformers
    assert sorted(id for _, id, _ in found) == [*range(known)] and known in (257, 258)
    assert p[known:].sum() > 1e-4
    assert sum(p for p, _, _ in found) == pytest.approx(p[:known].sum().item(), rel=1e-5)
    assert [p for p, _, _ in found] == sorted((p for p, _, _ in found), reverse=True)


def test_how_a_token_is_shown():
    for token, text in [("Ġworld", "' world'"), ("Ċ", r"'\n'"), ("'", '"\'"'), ("Ã©", "'é'"),
                        ("Ã", r"b'\xc3'"), ("   ", "'   '"), ("<|endoftext|>", "'<|endoftext|>'")]:
        assert score.shown(token) == text


# --- the command line -----------------------------------------------------------------------------

def printed(capsys, *argv, status=0):
    assert generate.main([*map(str, argv)]) == status
    return capsys.readouterr()


def their_score(folder, text):
    """Loss, bits a byte and perplexity of a text of at most one window, from the reference."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        loss = demo(folder.name)[0](ids, labels=ids).loss.item()
    size = len(text.encode()) - len(tokenizer.decode(ids[0, 0].item()).encode())
    return loss, loss * (ids.size(1) - 1) / math.log(2) / size, math.exp(loss)


@pytest.mark.parametrize("name", DEMOS)
@pytest.mark.parametrize("backend", ["naive", "auto"])
def test_score_of_a_file(name, backend, tmp_path, capsys):
    """What is printed are the reference's numbers; newlines of any kind are part of the text."""
    text = "HAMLET.\r\nTo be, or not to be:\nthat is the question – café\n"
    folder = ROOT / "checkpoints" / name
    (tmp_path / "text").write_bytes(text.encode())
    out, err = printed(capsys, "--score", tmp_path / "text", "--model", folder, "--backend", backend)
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines] == ["loss", "bits", "perplexity", "scored", "window"] and err == ""
    found = [float(lines[0][1]), float(lines[1][3]), float(lines[2][1])]
    assert found == pytest.approx(their_score(folder, text), rel=2e-6 if backend == "naive" else 1e-5)
    ids = AutoTokenizer.from_pretrained(folder).encode(text)
    assert int(lines[3][1]) == len(ids) - 1 and lines[4] == ["window", "512", "tokens,", "stride", "256"]


def test_a_byte_order_mark_is_no_text(tmp_path, capsys):
    """Editors on Windows put one before a file."""
    outputs = []
    for data in (b"hello", b"\xef\xbb\xbfhello"):
        (tmp_path / "text").write_bytes(data)
        outputs.append(printed(capsys, "--score", tmp_path / "text", "--model", good("gpt_neo")).out)
    assert outputs[0] == outputs[1] and "4 tokens" in outputs[0]


def test_standard_input_and_stride(monkeypatch, tmp_path, capsys):
    """- reads it; the stride is obeyed and changes the numbers of a long text; so does the dtype."""
    text = "To be, or not to be, that is the question. " * 3   # L is 32 here
    (tmp_path / "text").write_text(text)
    outputs = {}
    for options in (["--stride", "16"], ["--stride", "3"], ["--dtype", "bfloat16"]):
        options += ["--model", str(good("gpt_neo"))]
        outputs[options[1]] = printed(capsys, "--score", tmp_path / "text", *options).out
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert printed(capsys, "--score", "-", *options).out == outputs[options[1]]
    assert "stride 3\n" in outputs["3"] and "stride 16\n" in outputs["16"]
    assert len({out.splitlines()[0] for out in outputs.values()}) == 3


@pytest.mark.parametrize("data, options, says", [
    (None, [], "No such file"), (b"", [], "there is no text in it"), (b"x", [], "1 token: nothing"),
    (b"caf\xe9 au lait", [], "not UTF-8, the byte at offset 3 is 0xe9"),
    (b"hello", ["--stride", "33"], "stride must be 1 to 32"), (b"hello", ["--device", "abacus"], "abacus"),
    (b"hello", ["--backend", "magic"], "magic"), ("folder", [], "directory")], ids=str)
def test_texts_that_cannot_be_scored(data, options, says, tmp_path, capsys):
    """One line on standard error, status 2, nothing on standard output."""
    path = tmp_path / "text"
    if data == "folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    out, err = printed(capsys, "--score", path, "--model", good("gpt_neo"), *options, status=2)
    assert out == "" and err.startswith("error: ") and says in err and err.count("\n") == 1


@pytest.mark.parametrize("argv, says", [
    (["--score", "f", "--top", "3"], "--score and --top exclude each other"),
    (["--score", "f", "prompt"], "takes no prompt"),
    (["--score", "f", "--interactive"], "takes no --interactive"),
    (["--score", "f", "--seed", "1", "--greedy"], "takes no --greedy, --seed"),
    (["--score", "f", "--stride", "0"], "--stride must be at least 1, got 0"),
    (["hi", "--stride", "5"], "belongs to --score"),
    (["--top", "3"], "give a prompt"), ([], "give a prompt, or --interactive, or --score FILE"),
    (["hi", "--top", "0"], "--top must be at least 1, got 0"),
    (["hi", "--top", "3", "--top-k", "5"], "takes no --top-k"),
    (["hi", "--top", "3", "--stop", "x"], "--top writes no text"),
    (["--interactive", "--top", "3"], "takes no --interactive"),
    (["hi", "--num-samples", "0"], "--num-samples must be at least 1"), (["hi", "--stop", ""], "not empty")])
def test_contradictory_options(argv, says, capsys):
    with pytest.raises(SystemExit) as caught:
        generate.arguments(argv)
    assert caught.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("name", DEMOS)
def test_top_of_a_prompt(name, capsys):
    """Probability, id and text in columns."""
    theirs, _, tokenizer = demo(name)
    with torch.no_grad():
        p = theirs(torch.tensor([tokenizer.encode("HAMLET.")])).logits[0, -1].softmax(-1)
    values, ids = p.topk(5)
    out, err = printed(capsys, "HAMLET.", "--top", "5", "--model", ROOT / "checkpoints" / name,
                       "--backend", "naive")
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    assert err == "" and [int(id) for _, id, _ in lines] == ids.tolist()
    assert [text for *_, text in lines] == [repr(tokenizer.decode(id)) for id in ids.tolist()]
    assert [float(p) for p, *_ in lines] == pytest.approx(values.tolist(), abs=1e-6)   # six digits are shown


@pytest.mark.parametrize("prompt, says", [("", "empty"), ("x" * 33, "33")])
def test_prompts_that_have_no_next_token(prompt, says, capsys):
    out, err = printed(capsys, prompt, "--top", "3", "--model", good("gpt_neo"), status=2)
    assert out == "" and err.startswith("error: ") and says in err and err.count("\n") == 1
