"""Make the text of checkpoints/demo-induction, and the model with random weights that it began as.

    python training/prepare_copying.py data

A line has 63 words: 3 to 31 random words, and then the same words in the same order again and
again.  How many they are differs from line to line.  Nothing tells which word comes next the first
time; later it is the word that followed the last time.  So a model that learns from this text can
only learn to copy, and a head that always looks back by the same distance does not help.

There are 80 words of one consonant and one vowel.  Each is one token, and with its line end a line
has 64 tokens, so windows of --context 64 do not mix two lines.

copying_init is for --init.  It differs from a new model of train.py in two ways.  All dims of a
head rotate: of a quarter of 32 dims, only one pair would be fast enough to tell a token from its
neighbours.  And tokens that the text does not have, such as most single bytes, are improbable from
the start.  A model that had to learn that first had no head that copies after 500 steps.  Its seed
is 1, because then one head of layer 0 reads the previous token; with 0 and 2, two heads share that.
"""

import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from neox import GPTNeoXConfig, GPTNeoXForCausalLM  # noqa: E402
from training.new_tokenizer import new_tokenizer  # noqa: E402

WORDS = [consonant + vowel for consonant in "bcdfghklmnprstvz" for vowel in "aeiou"]
LINES = {"train": 16_000, "valid": 160}
LENGTH = 63


def line(rng):
    """One line; the space before each word is a part of the word's token."""
    words = rng.choices(WORDS, k=rng.randint(3, 31))
    return "".join(f" {words[i % len(words)]}" for i in range(LENGTH)) + "\n"


def write_texts(target):
    """Write copying_train.txt and copying_valid.txt into the folder; returns {part: text}."""
    rng = random.Random(0)
    texts = {part: "".join(line(rng) for _ in range(count)) for part, count in LINES.items()}
    for part, text in texts.items():
        Path(target, f"copying_{part}.txt").write_bytes(text.encode())
    return texts


def write_model(text, folder):
    """Write a GPT-NeoX of two layers with random weights, and a tokenizer learned from the text."""
    tokenizer = new_tokenizer([text], "neox", 364, context=64)
    torch.manual_seed(1)                                    # see above
    model = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=512, rotary_pct=1.0, max_position_embeddings=64, bos_token_id=0,
        eos_token_id=0))
    unused = torch.ones(len(tokenizer), dtype=torch.bool)
    unused[tokenizer.encode(text)] = False
    with torch.no_grad():                                   # the logits of unused tokens fall by 16
        model.transformer.ln_f.bias[0] = 4
        model.lm_head.weight[unused, 0] -= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} OUT")
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    write_model(write_texts(sys.argv[1])["train"], Path(sys.argv[1], "copying_init"))
