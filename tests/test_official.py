"""Published outputs of the official weights.  Needs a network (or the hub's cache) and some gigabytes:

    .venv/bin/python -m pytest -m official

Sources: transformers' own tests of GPT-Neo and GPT-NeoX, lm-evaluation-harness' tests, TransformerLens'
tests.  Ids that those give as text were encoded once with the true tokenizer files.
"""

import functools

import pytest
import torch

from files import fetch
from load_weights import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.official


@functools.cache
def out_of_reach(name):
    """Why the weights cannot be had, or None; the hub client waits long before it says so."""
    try:
        fetch(name, "config.json")
    except ConnectionError as error:
        return str(error)


@functools.lru_cache(maxsize=1)
def load(name):
    """Model and tokenizer, or a skip where the weights cannot be downloaded."""
    if reason := out_of_reach("EleutherAI/pythia-70m") or out_of_reach(name):
        pytest.skip(reason)
    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def continued(name, prompts, **settings):
    """Greedy continuations of a left-padded batch, as text."""
    model, tokenizer = load(name)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    return tokenizer.batch_decode(model.generate(**inputs, **settings), skip_special_tokens=True)


def test_gpt_neo_1_3b_greedy():
    """transformers tests/models/gpt_neo: test_lm_generate_gpt_neo."""
    model, _ = load("EleutherAI/gpt-neo-1.3B")
    expected = [464, 3290, 12, 3380, 4866, 286, 262, 1492, 11, 543, 318, 257, 4947, 286, 27126, 416, 262, 2739,
                1772, 11]
    assert model.generate(torch.tensor([expected[:2]]), max_length=20)[0].tolist() == expected


def test_gpt_neo_1_3b_batch():
    """transformers tests/models/gpt_neo: test_batch_generation."""
    assert continued("EleutherAI/gpt-neo-1.3B", ["Hello, my dog is a little", "Today, I am"], max_length=20) == [
        "Hello, my dog is a little bit of a kitty. She is a very sweet and loving",
        "Today, I am going to talk about the best way to get a job in the"]


def test_gpt_neo_125m_batch():
    """transformers 4.40 tests/models/gpt_neo/test_modeling_flax_gpt_neo.py: test_batch_generation."""
    assert continued("EleutherAI/gpt-neo-125m", ["Hello this is a long string", "Hey"], max_length=20) == [
        "Hello this is a long string of text.\n\nI'm trying to get the text of the",
        "Hey, I'm a little late to the party. I'm going to"]


def test_pythia_410m_greedy():
    """transformers tests/models/gpt_neox: test_lm_generate_gptneox."""
    assert continued("EleutherAI/pythia-410m-deduped", ["My favorite food is"], max_new_tokens=20) == [
        "My favorite food is a good old-fashioned, old-fashioned, old-fashioned.\n\nI'm not sure"]


def test_pythia_70m_greedy():
    """lm-evaluation-harness tests/models/test_huggingface.py: generate to 10 tokens in all."""
    model, _ = load("EleutherAI/pythia-70m")
    expected = [12110, 2534, 187, 29, 31953, 12109, 31, 2195, 5374, 2534]
    assert model.generate(torch.tensor([expected[:2]]), max_length=10)[0].tolist() == expected


@pytest.mark.parametrize("name, ids, loss", [
    ("EleutherAI/gpt-neo-125m", [50256, 15496, 995, 0], 4.900552272796631),
    ("EleutherAI/pythia-70m", [0, 12092, 1533, 2], 4.659344673156738),
    ("roneneldan/TinyStories-33M", [50256, 15496, 995, 0], 12.203617095947266),
])
def test_losses(name, ids, loss):
    """TransformerLens tests/acceptance/test_hooked_transformer.py, which folds and centres weights first."""
    model, _ = load(name)
    ids = torch.tensor([ids])
    assert abs(model(ids, labels=ids).loss.item() - loss) < 1e-3


@pytest.mark.parametrize("name", ["EleutherAI/gpt-neo-125m", "EleutherAI/pythia-70m", "roneneldan/TinyStories-1M"])
def test_logits_are_bit_equal(name):
    """The claim itself, on the official weights: compare.py finds no difference."""
    import compare
    load(name)
    assert compare.main([name]) == 0
