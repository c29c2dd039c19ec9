"""Decoding in JAX beside our compiled step in torch.

    python benchmark.py jax --contexts 16 900
"""

import tempfile

import torch

from benchmarks.common import in_turns, ratio, seconds
from benchmarks.shapes import SHAPES, write


def seconds_a_token(text, n):
    """Seconds of one new token.  text(n) generates n tokens; the prefill is not counted."""
    return (seconds(lambda: text(n + 1))() - seconds(lambda: text(1))()) / n


def run(model, rounds, contexts, new_tokens):
    """Seconds of one token at each context, of both in turns."""
    try:
        from neo_jax import FlaxGPTNeoForCausalLM  # imported here, because JAX is optional
    except ImportError:
        raise SystemExit("benchmark.py jax needs the package jax: pip install .[jax]") from None
    if not model.startswith("gpt-neo-"):
        raise SystemExit("benchmark.py jax needs a shape of GPT-Neo, as --model gpt-neo-125m")
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        write(model, folder)
        in_jax = FlaxGPTNeoForCausalLM.from_pretrained(folder)
        in_torch = type(in_jax).torch_class.from_pretrained(folder)
        for context in contexts:
            ids = torch.arange(context)[None] * 31 % SHAPES[model].vocab_size
            texts = {"jax": lambda n: in_jax.generate(
                         ids.numpy(), max_new_tokens=n, eos_token_id=None
                     ).sequences.block_until_ready(),
                     "torch": lambda n: in_torch.generate(ids, max_new_tokens=n, eos_token_id=None,
                                                          compile=True)}
            runs = {name: lambda text=text: seconds_a_token(text, new_tokens)
                    for name, text in texts.items()}
            result[context] = figures = in_turns(runs, rounds)
            print(f"\ndecoding at context {context}, {model} shape, float32, compiled")
            for name, values in figures.items():
                shown = sorted(1 / value for value in values)
                middle = shown[len(shown) // 2]
                print(f"  {name:6s} {middle:7.1f} tokens/s  ({shown[0]:.1f} to {shown[-1]:.1f})")
            print(f"  jax is {ratio(figures, 'jax', 'torch'):.2f} times as fast as torch")
    return result
