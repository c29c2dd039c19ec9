"""checkpoints/demo-induction copies, by a previous-token head in layer 0 and induction heads in layer 1."""

import hashlib
import json

import pytest
import torch
import torch.nn.functional as F
import transformers

from conftest import ROOT
from load_weights import AutoModelForCausalLM, AutoTokenizer
from training.prepare_copying import WORDS, write_texts

FOLDER = ROOT / "checkpoints" / "demo-induction"
LENGTHS = [7, 12, 20, 28]                                  # words of a text before it is repeated


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="naive").requires_grad_(False)


def texts(n, count=32):
    """`count` texts of n random words, each written twice: (count, 2n) ids."""
    ids = [AutoTokenizer.from_pretrained(FOLDER).encode(f" {word}") for word in WORDS]
    assert all(len(word) == 1 for word in ids), "each word is one token"
    generator = torch.Generator().manual_seed(n)
    orders = [torch.randperm(len(ids), generator=generator)[:n] for _ in range(count)]
    return torch.tensor(ids)[torch.stack(orders), 0].repeat(1, 2)


def losses(model, twice):
    """Mean loss of the first copy and of the second."""
    n = twice.size(1) // 2
    logits = model(twice).logits[:, :-1]
    each = F.cross_entropy(logits.transpose(1, 2), twice[:, 1:], reduction="none")     # (B, 2n - 1)
    return each[:, :n - 1].mean().item(), each[:, n:].mean().item()


def without(model, twice, head):
    """The loss of the second copy where a head of layer 0 writes nothing."""
    keep = torch.ones(model.config.hidden_size)
    keep[head * model.config.head_dim:(head + 1) * model.config.head_dim] = 0
    hook = model.transformer.blocks[0].attn.out_proj.register_forward_pre_hook(lambda _, x: (x[0] * keep,))
    second = losses(model, twice)[1]
    hook.remove()
    return second


def test_it_is_small_and_made_by_its_recipe(tmp_path):
    """At most 2 MB; its training texts are those of prepare_copying.py, as training.json says."""
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 2e6
    settings = json.loads((FOLDER / "training.json").read_text())["settings"]
    for name, text in zip(("text", "valid"), write_texts(tmp_path).values()):
        assert settings[name] == hashlib.sha256(json.dumps([text]).encode()).hexdigest()


def test_transformers_gives_the_same_logits(model):
    twice = texts(20)
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(theirs(twice).logits, model(twice).logits)


@pytest.mark.parametrize("n", LENGTHS)
def test_it_copies_by_two_heads(model, n):
    """The second copy is easy, but not with the one previous-token head silent; the other heads hardly matter."""
    twice = texts(n)
    first, second = losses(model, twice)
    assert first > 4 and second < first / 4
    maps = model(twice, output_attentions=True).attentions
    previous = maps[0].diagonal(-1, -2, -1).mean((0, -1))                      # (H,) of layer 0
    induction = maps[1].diagonal(1 - n, -2, -1)[..., 1:].mean((0, -1))         # (H,) of layer 1
    head = previous.argmax().item()
    assert previous[head] > 0.8 and previous.sort().values[-2] < 0.5 and induction.max() > 0.5
    silent = [without(model, twice, h) for h in range(4)]
    assert silent.pop(head) > 3 and max(silent) < 1
