"""generate: the reference's tokens, one for one, and a command line that behaves."""

from dataclasses import replace

import pytest
import torch

import generate
import sampling as G
from conftest import ROOT
from helpers import ours, random_case, reference

LONG = {"max_position_embeddings": 600}


def long_case(family):
    """A model with room for 500 tokens and, for GPT-Neo, a window that they leave far behind."""
    case = random_case(300 if family == "gpt_neo" else 301)
    return replace(case, settings=tuple((dict(case.settings) | LONG).items()))


@pytest.fixture(scope="module", params=["gpt_neo", "gpt_neox"])
def pair(request):
    """(the reference, ours) in float32, ours with the backend that users get."""
    case = long_case(request.param)
    return reference(case), ours(case, backend="auto")


SETTINGS = [
    dict(),
    dict(max_length=30),
    dict(max_new_tokens=500, eos_token_id=None),
    dict(max_new_tokens=60, repetition_penalty=1.4, eos_token_id=None),
    dict(do_sample=True, max_new_tokens=500, eos_token_id=None),                       # top_k is 50
    dict(do_sample=True, max_new_tokens=500, eos_token_id=None, top_k=0, temperature=1.3),
    dict(do_sample=True, max_new_tokens=500, eos_token_id=None, temperature=0.8, top_k=20, top_p=0.9,
         repetition_penalty=1.3),
    dict(do_sample=True, max_new_tokens=50, num_return_sequences=3, eos_token_id=[5, 6, 7]),
    dict(do_sample=True, max_new_tokens=50, top_p=0.3, eos_token_id=5, pad_token_id=3),
]


CONTROLS = [                                               # the settings that look at the text, alone and together
    dict(min_new_tokens=25, eos_token_id=[5, 6, 7, 8, 9, 10]), dict(min_length=30, eos_token_id=[*range(30)]),
    dict(min_length=200, min_new_tokens=3, eos_token_id=[*range(60)]), dict(no_repeat_ngram_size=1, eos_token_id=None),
    dict(no_repeat_ngram_size=2, eos_token_id=5), dict(no_repeat_ngram_size=3, repetition_penalty=0.7),
    dict(bad_words_ids=[[i] for i in range(0, 60, 3)] + [[5]], eos_token_id=5),
    dict(bad_words_ids=[[i, j] for i in range(97) for j in range(0, 97, 2)] + [[1, 2, 3]]),
    dict(suppress_tokens=[*range(0, 90, 2), 3000], eos_token_id=[2, 3]), dict(suppress_tokens=()),
    dict(begin_suppress_tokens=[*range(0, 80)]), dict(min_p=0.2), dict(min_p=0.05, top_k=0, temperature=2.0), dict(min_p=1.0),
    dict(min_p=0.3, top_p=0.8, top_k=9, temperature=0.7, repetition_penalty=1.3, no_repeat_ngram_size=2,
         suppress_tokens=[4, 5, 9], begin_suppress_tokens=[1], bad_words_ids=[[7], [8, 9]], min_new_tokens=9,
         eos_token_id=(5, 6, 7, 9), pad_token_id=3),
    dict(no_repeat_ngram_size=2, min_length=40, begin_suppress_tokens=[*range(50)], eos_token_id=[*range(40)], min_p=0.1),
]


@pytest.mark.filterwarnings("ignore:.*min_new_tokens")      # "both are set": said by both
@pytest.mark.parametrize("settings", CONTROLS, ids=lambda s: str(s)[:60])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_settings_that_look_at_the_text_are_the_references(pair, do_sample, settings):
    """Left-padded rows, which end at different times: the reference's ids at the same seed."""
    ids = torch.randint(1, 97, (3, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :13], mask[1, :2] = 0, 0
    ids[mask == 0] = 0
    theirs, mine = both(pair, ids, mask, **{"do_sample": do_sample, "max_new_tokens": 40, **settings})
    assert torch.equal(mine, theirs)


def both(pair, ids, mask=None, **settings):
    results = []
    for model in pair:
        torch.manual_seed(11)
        results.append(model.generate(ids, attention_mask=mask, **settings))
    return results


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ids_are_the_references(pair, settings):
    """Greedy and sampled, 500 tokens, from the same seed."""
    ids = torch.randint(1, 97, (1, 7), generator=torch.Generator().manual_seed(1))
    theirs, mine = both(pair, ids, **settings)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("settings", [
    dict(max_new_tokens=100, eos_token_id=[5, 7]),
    dict(do_sample=True, max_new_tokens=100, top_p=0.9, repetition_penalty=1.2, eos_token_id=[5, 7],
         pad_token_id=3),
    dict(do_sample=True, max_new_tokens=100, num_return_sequences=2, eos_token_id=None),
], ids=str)
def test_left_padded_batches_are_the_references(pair, settings):
    """Rows that end early are filled with pad and still draw, so that the others' draws agree."""
    ids = torch.randint(1, 97, (3, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :13], mask[1, :2] = 0, 0
    ids[mask == 0] = 0
    theirs, mine = both(pair, ids, mask, **settings)
    assert torch.equal(mine, theirs)


def test_rows_that_have_ended_are_no_longer_read(pair, monkeypatch):
    """The model is called with the going rows alone, and the text of all is that of the definition, which
    reads every row to the end."""
    model, sizes = pair[1], []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, ids, *args, **how: (sizes.append(len(ids)),
                                                                                 forward(self, ids, *args, **how))[1])
    ids = torch.randint(1, 97, (6, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :13], mask[3, :2] = 0, 0
    settings = dict(attention_mask=mask, do_sample=True, temperature=2.0, max_new_tokens=80, repetition_penalty=1.2,
                    eos_token_id=[5, 6, 7], pad_token_id=3)
    texts = []
    for backend in ("auto", "naive"):
        model.set_attn_implementation(backend)
        sizes.clear()
        texts.append(model.generate(ids, generator=torch.Generator().manual_seed(4), **settings))
        ends = [next((i for i, t in enumerate(row) if t in (5, 6, 7)), 99) for row in texts[-1][:, 20:].tolist()]
        assert len(set(ends)) > 3, "rows must end at different times"
        assert sizes == ([6] * len(sizes) if backend == "naive" else [sum(end >= n for end in ends) for n in range(len(sizes))])
    model.set_attn_implementation("auto")
    assert torch.equal(*texts)


def test_a_long_prompt_is_read_in_chunks(pair, monkeypatch):
    """Pieces of CHUNK tokens with a short one at the end; the same text; the definition reads it whole."""
    model, calls = pair[1], []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, ids, *args, **how: (calls.append(ids.size(1)),
                                                                                 forward(self, ids, *args, **how))[1])
    monkeypatch.setattr(G, "CHUNK", 64)
    ids = torch.randint(1, 97, (2, 150), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :70] = 0                                       # a whole chunk of padding
    texts = []
    for backend, pieces in (("auto", [64, 64, 22]), ("naive", [150])):
        model.set_attn_implementation(backend)
        calls.clear()
        texts.append(model.generate(ids, mask, max_new_tokens=20, eos_token_id=None, pad_token_id=0))
        assert calls == pieces + [1] * 19
    model.set_attn_implementation("auto")
    assert torch.equal(*texts)


def test_mask_is_inferred_as_the_reference_infers_it(pair):
    """Without a mask, pad ids are padding only if pad cannot be an end of text."""
    ids = torch.randint(4, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    ids[0, :4] = 3
    for settings in (dict(pad_token_id=3, eos_token_id=0), dict(pad_token_id=3, eos_token_id=3)):
        theirs, mine = both(pair, ids, max_new_tokens=10, **settings)
        assert torch.equal(mine, theirs)


def test_generation_config_is_obeyed(pair):
    """What generation_config.json says goes before the defaults, what the caller says before that."""
    theirs, mine = pair
    ids = torch.tensor([[4, 5, 6]])
    mine.generation_config = {"do_sample": True, "top_k": 5, "max_length": 40, "eos_token_id": 9}
    try:
        torch.manual_seed(5)
        found = mine.generate(ids)
        torch.manual_seed(5)
        assert torch.equal(found, theirs.generate(ids, do_sample=True, top_k=5, max_length=40, eos_token_id=9))
        assert mine.generate(ids, do_sample=False, max_new_tokens=2).shape[1] <= 5
    finally:
        mine.generation_config = {}


def test_a_generator_of_ones_own(pair):
    """The same generator state gives the same text and leaves torch's global one alone."""
    ids, before = torch.tensor([[4, 5, 6]]), torch.get_rng_state()
    texts = [pair[1].generate(ids, do_sample=True, max_new_tokens=30, eos_token_id=None,
                              generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_stream_gives_each_token_when_it_is_chosen(pair):
    """One forward pass a token: nothing is computed ahead of what was asked for."""
    model, ids = pair[1], torch.tensor([[4, 5, 6]])
    settings = G.Settings.of(model, dict(max_new_tokens=10, eos_token_id=None))
    whole = model.generate(ids, max_new_tokens=10, eos_token_id=None)[0, 3:].tolist()
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        for i, token in enumerate(G.stream(model, ids, settings=settings)):
            assert token.tolist() == whole[i:i + 1] and len(passes) == i + 1
    finally:
        hook.remove()


def test_rows_without_a_token_are_not_chosen(pair, monkeypatch, capsys):
    """A model's matrix has more rows than its tokenizer has tokens; the command line leaves them out,
    generate does not, as the reference."""
    model, ids = pair[1], torch.tensor([[4, 5, 6]])
    settings = G.Settings.of(model, dict(do_sample=True, top_k=0, max_new_tokens=200, eos_token_id=None))
    draws = {real: [token.item() for token in G.stream(model, ids, settings=settings, real_vocab=real,
                                                       generator=torch.Generator().manual_seed(0))]
             for real in (None, 50)}
    assert max(draws[None]) >= 50 > max(draws[50])

    seen, stream = [], G.stream
    monkeypatch.setattr(generate, "stream", lambda *a, **k: seen.append(k["real_vocab"]) or stream(*a, **k))
    assert generate.main(["HAMLET.", "--model", str(ROOT / "checkpoints" / "demo-neox"), "--max-new-tokens", "1"]) == 0
    assert seen == [1472]


# --- choosing a token, with scores made by hand ---------------------------------------------------

def drawn(scores, n=2000, **settings):
    """The set of ids that n draws from these scores give."""
    settings = G.Settings(do_sample=True, **settings)
    generator = torch.Generator().manual_seed(0)
    return set(G.choose(scores.expand(n, -1), settings, generator).tolist())


SCORES = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]]))


@pytest.mark.parametrize("settings, expected", [
    (dict(top_k=0), {0, 1, 2, 3, 4}), (dict(top_k=None), {0, 1, 2, 3, 4}), (dict(top_k=2), {0, 1}),
    (dict(top_k=99), {0, 1, 2, 3, 4}), (dict(top_p=0.4), {0}), (dict(top_p=0.6), {0, 1}),
    (dict(top_p=0.76), {0, 1, 2}), (dict(top_p=1e-9), {0}), (dict(temperature=1e-4), {0}),
    (dict(top_k=3, top_p=0.99), {0, 1, 2}),
])
def test_which_tokens_can_be_drawn(settings, expected):
    """The smallest set with mass p, its boundary token included; k larger than V is all."""
    assert drawn(SCORES, **settings) == expected


def test_ties_with_the_kth_stay():
    assert drawn(torch.tensor([[2.0, 1, 1, 1, 0]]), top_k=2) == {0, 1, 2, 3}


def test_temperature_scales_the_odds():
    settings = G.Settings(do_sample=True, temperature=0.5, top_k=0)
    ids = G.choose(SCORES.expand(20000, -1), settings, torch.Generator().manual_seed(0))
    share = (ids == 0).float().mean().item()
    expected = (SCORES / 0.5).softmax(-1)[0, 0].item()                 # 0.25 / 0.3458 = 0.72
    assert abs(share - expected) < 0.012                               # 4 standard deviations


def test_penalty_pushes_down_both_signs_once():
    """A negative score is multiplied, a positive one divided, however often the id stands there;
    ids in padding do not count."""
    scores = torch.tensor([[2.0, -2.0, 2.0, 2.0]])
    found = G.penalize(scores, torch.tensor([[3, 0, 0, 1]]), torch.tensor([1]), 2.0)
    assert found.tolist() == [[1.0, -4.0, 2.0, 2.0]]


# --- the command line -----------------------------------------------------------------------------

@pytest.mark.parametrize("pieces, stops, expected", [
    (["ab", "cSTOPd", "e"], ["STOP"], "abc"), (["abS", "T", "OPd"], ["STOP"], "ab"),
    (["abS", "Tx"], ["STOP"], "abSTx"), (["abST"], ["STOP"], "abST"), (["aab"], ["ab", "a"], ""),
    (["x\n", "\ny"], ["\n\n"], "x"), (["abc"], [], "abc"), (["SSTOP"], ["STOP"], "S"),
])
def test_stop_texts(pieces, stops, expected):
    """Found across pieces, never half shown, not shown themselves."""
    assert "".join(generate.text_until(iter(pieces), stops)) == expected
