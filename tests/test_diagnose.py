"""Every mistake of the table is named, alone and in pairs, and nothing else ever is."""

import functools
import io
import itertools
import re
import sys

import pytest
import torch

import diagnose as D
import mistakes as M
from helpers import widen
from mistakes import planted, variants
from neo import GPTNeoConfig, GPTNeoForCausalLM
from neox import GPTNeoXConfig, GPTNeoXForCausalLM

T = 60
SHARED = dict(vocab_size=97, hidden_size=64, max_position_embeddings=128, bos_token_id=0, eos_token_id=0)


def model_of(family, seed=0, parallel=True):
    """The sizes at which the costs of mistakes are stated: 64 wide, 4 heads, wide random weights."""
    if family == "gpt_neo":
        model = GPTNeoForCausalLM(GPTNeoConfig(**SHARED, num_layers=4, num_heads=4, window_size=8,
                                               attention_types=[[["global", "local"], 2]]), "naive")
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**SHARED, num_hidden_layers=3, num_attention_heads=4,
                                                 intermediate_size=256, use_parallel_residual=parallel,
                                                 hidden_act="gelu" if parallel else "gelu_fast"), "naive")
    return widen(model, seed).eval()


def port_of(model, ids, patches, logits_only=False):
    """What a port that makes these mistakes would save: with float32's rounding of another order."""
    rows = [None] * (model.config.num_hidden_layers + 3)

    def keep(row, x):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(row))
        rows[row] = (x * (1 + 2e-7 * noise)).nan_to_num()

    D.run(model, ids, patches, keep)
    rows[-3] = None                                        # a port's file has no row for the last block
    return [None] * (len(rows) - 1) + [rows[-1]] if logits_only else rows


FAMILIES = ["gpt_neo", "gpt_neox"]
MODELS = [("gpt_neo", True), ("gpt_neox", True), ("gpt_neox", False)]
ids_of = D.make_ids(0, 1, T, 97)


def once(variants_of_models):
    """Of the three models' mistakes, each in one variant, where the fewest others are: (model, mistake, patches)."""
    chosen, load = {}, [0] * len(variants_of_models)
    for mistake in M.MISTAKES:
        found = [(n, v) for n, all_of in enumerate(variants_of_models) for v in all_of if v[0].id == mistake.id]
        n, variant = min(found, key=lambda x: load[x[0]])
        chosen[mistake.id], load[n] = (n, *variant), load[n] + 1
    return chosen.values()


def test_every_mistake_is_named():
    """Once each; with every variant, in every model, below."""
    models = [model_of(family, 0, parallel) for family, parallel in MODELS]
    for n, mistake, patches in once([list(variants(model)) for model in models]):
        found = D.diagnose(models[n], ids_of, port_of(models[n], ids_of, patches))
        assert [f.ids for f in found] == [(mistake.id,)], mistake.id


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.long) for s in (1, 2))])
@pytest.mark.parametrize("family, parallel", MODELS)
@pytest.mark.parametrize("logits_only", [False, pytest.param(True, marks=pytest.mark.long)])
def test_every_variant_is_named_and_no_other(family, parallel, logits_only, seed):
    model = model_of(family, seed, parallel)
    for mistake, patches in variants(model):
        found = D.diagnose(model, ids_of, port_of(model, ids_of, patches, logits_only))
        assert [f.ids for f in found] == [(mistake.id,)], mistake.id


def test_every_mistake_of_the_table_can_be_made():
    made = {mistake.id for family, parallel in MODELS for mistake, _ in variants(model_of(family, 0, parallel))}
    assert made == {mistake.id for mistake in M.MISTAKES} and len(M.BY_ID) == len(M.MISTAKES)


def test_the_costs_in_the_table_are_measured(capsys):
    """Those that round differ by a few roundings from one processor to another."""
    costs = M.measured()
    for mistake in M.MISTAKES:
        assert mistake.cost == pytest.approx(costs[mistake.id], rel=0.2), mistake.id
    M.main()
    assert capsys.readouterr().out.count("\n") == len(M.MISTAKES) + 2


@pytest.mark.parametrize("family, parallel", MODELS)
def test_planting_leaves_nothing_behind(family, parallel):
    """Also when the model is run with a mistake in between."""
    model = model_of(family, 0, parallel)
    with torch.no_grad():
        right = model(ids_of).logits
        for mistake, patches in variants(model):
            with planted(patches):
                model(ids_of[:, :20])
            assert torch.equal(model(ids_of).logits, right), mistake.id


PAIRS = {"gpt_neo": ["gelu-sigmoid", "no-out-bias", "scaled-scores", "window-plus-one", "positions-from-one",
                     "no-final-norm", "relu", "q-transposed", "v-transposed", "weights-bfloat16",
                     "logits-shifted", "embedding-scaled"],
         "gpt_neox": ["qkv-thirds", "gelu-tanh", "no-scale", "rotary-neighbours", "rotary-opposite-sign", "one-norm",
                      "no-mlp-bias", "no-final-norm", "head-tied", "norm-eps", "out-transposed", "no-causal-mask"]}


def two(model, ids):
    """The patches of two mistakes, the second on top of the first."""
    first = next(patches for mistake, patches in variants(model) if mistake.id == ids[0])
    with planted(first):
        return first + next(patches for mistake, patches in variants(model) if mistake.id == ids[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", [range(0, 66, 26), pytest.param(range(13, 66, 26), marks=pytest.mark.slow),
                                  pytest.param(range(66), marks=pytest.mark.long)], ids=["some", "more", "all"])
def test_two_mistakes_at_once(family, part):
    model, named = model_of(family), 0
    pairs = list(itertools.combinations(PAIRS[family], 2))
    for i in part:
        found = D.diagnose(model, ids_of, port_of(model, ids_of, two(model, pairs[i])))
        named += [f.ids for f in found] == [tuple(sorted(pairs[i]))]
    assert named >= 0.95 * len(part)


def exchanged(model):
    blocks = model.transformer.blocks
    blocks[1], blocks[2] = blocks[2], blocks[1]


def matrix_of_another_layer(model):
    blocks = model.transformer.blocks
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight


def residual_halved(model):
    block = model.transformer.blocks[1]
    forward = block.forward
    block.forward = lambda x, **how: (forward(x, **how)[0] - 0.5 * x, None)


def dropout_left_on(model):
    model.transformer.blocks[1].dropout.p = 0.1
    model.transformer.blocks[1].dropout.train()


@pytest.mark.parametrize("logits_only", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("fault", [residual_halved, *(pytest.param(fault, marks=pytest.mark.long) for fault in (
    exchanged, matrix_of_another_layer, dropout_left_on))])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fault_that_is_in_no_table_is_given_no_name(family, fault, logits_only):
    port = model_of(family)
    fault(port)
    assert D.diagnose(model_of(family), ids_of, port_of(port, ids_of, [], logits_only)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_right_ports_are_given_no_name(family):
    """In another order of operations, and in float64."""
    model = model_of(family)
    for port, ids in ((model, ids_of), (model_of(family).double(), ids_of)):
        assert D.diagnose(model, ids, port_of(port, ids, [])) == []


@pytest.mark.parametrize("rows", [[0, 1, -1], pytest.param([1, -1, 0], marks=pytest.mark.slow),
                                  pytest.param([-1, 0, 1], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("family", ["gpt_neo", pytest.param("gpt_neox", marks=pytest.mark.long)])
def test_odd_numbers_never_end_in_a_traceback(family, rows):
    """A right port's numbers changed at random: infinities, NaN, zeros, another scale, rows exchanged."""
    model, generator = model_of(family), torch.Generator().manual_seed(0)
    for row, change in zip(itertools.cycle(rows), (
            lambda x: x * float("inf"), lambda x: x * float("nan"), torch.zeros_like, lambda x: x * 1e30,
            lambda x: x.flip(1), lambda x: x + torch.randn(x.shape, generator=generator))):
        port = port_of(model, ids_of, [])
        port[row] = change(port[row])
        assert D.diagnose(model, ids_of, port) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_bar(terminal, monkeypatch):
    """On a terminal it counts every trial and then goes away; elsewhere nothing is written."""
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(D, "tqdm", functools.partial(D.tqdm, mininterval=0, miniters=1))     # show each
    model = model_of("gpt_neox")
    patches = next(patches for mistake, patches in variants(model) if mistake.id == "no-scale")
    assert D.diagnose(model, ids_of, port_of(model, ids_of, patches))
    trials = [int(n) for n in re.findall(r"looking for the mistake: (\d+) trials", screen.getvalue())]
    assert trials == ([*range(len([*variants(model)]) + 1)] if terminal else [])
    assert not screen.getvalue() or not "".join(screen.getvalue().split("\r")[-2:]).strip()


def test_mistakes_that_these_ids_cannot_tell_apart():
    """With one token more than the window, three mistakes are one; a text that shows more is found."""
    model = model_of("gpt_neo")
    ids = ids_of[:, :9]                                    # W + 1: the first key that a local layer forgets
    patches = next(patches for mistake, patches in variants(model) if mistake.id == "all-global")
    found = D.diagnose(model, ids, port_of(model, ids, patches))
    assert {f.ids for f in found} == {("all-global",), ("window-plus-one",), ("window-in-blocks",)}
    longer = (D.make_ids(0, 1, T, 97) for T in (9, 16, 64))
    assert D.told_apart(model, found, longer).size(1) == 16
