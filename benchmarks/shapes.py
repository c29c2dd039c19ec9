"""Every official shape, by name, with random weights made on the fly."""

import torch

from neo import GPTNeoConfig, GPTNeoForCausalLM
from neox import GPTNeoXConfig, GPTNeoXForCausalLM


def alternating(layers):
    return [[["global", "local"], layers // 2]]


def pythia(layers, width, heads, vocab_size=50304):
    return GPTNeoXConfig(vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers,
                         num_attention_heads=heads, intermediate_size=4 * width, eos_token_id=0)


SHAPES = {
    "gpt-neo-125m": GPTNeoConfig(hidden_size=768, num_layers=12, num_heads=12,
                                 attention_types=alternating(12)),
    "gpt-neo-1.3B": GPTNeoConfig(),
    "gpt-neo-2.7B": GPTNeoConfig(hidden_size=2560, num_layers=32, num_heads=20,
                                 attention_types=alternating(32)),
    "gpt-neox-20b": GPTNeoXConfig(),
    "pythia-70m": pythia(6, 512, 8),
    "pythia-160m": pythia(12, 768, 12),
    "pythia-410m": pythia(24, 1024, 16),
    "pythia-1b": pythia(16, 2048, 8),
    "pythia-1.4b": pythia(24, 2048, 16),
    "pythia-2.8b": pythia(32, 2560, 32),
    "pythia-6.9b": pythia(32, 4096, 32, 50432),
    "pythia-12b": pythia(36, 5120, 40, 50688),
}


def model_class(config):
    return GPTNeoForCausalLM if isinstance(config, GPTNeoConfig) else GPTNeoXForCausalLM


def write(shape, folder, dtype=torch.float32):
    """A checkpoint of that shape with random weights."""
    torch.manual_seed(0)
    model_class(SHAPES[shape])(SHAPES[shape]).to(dtype).save_pretrained(folder)
    return folder
