"""The reference beside ours: random small models of both families with weights that hide nothing.

Weights are wide on purpose.  With the usual initialisation (std 0.02, biases 0, norm weights 1) a
LayerNorm too few or a rotation too coarse changes nothing that a test could see.
"""

import functools
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import neo
import neox

FOLDER = tempfile.TemporaryDirectory(prefix="reference-")      # goes when the tests end
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
REFERENCE = {"gpt_neo": (transformers.GPTNeoConfig, transformers.GPTNeoForCausalLM),
             "gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM)}


TINY_VOCAB, TINY_POSITIONS = 264, 32         # of `good`: 257 tokens in padded rows; what GPT-Neo can learn


@dataclass(frozen=True)
class Case:
    """A random model and a batch for it; two cases of the same seed are the same case."""
    seed: int
    family: str
    settings: tuple          # (name, value) pairs of the reference's config
    B: int
    T: int
    window: int | None

    def __str__(self):
        return f"seed {self.seed} {self.family} B={self.B} T={self.T} {dict(self.settings)}"

    @property
    def ids(self):
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(1, 97, (self.B, self.T), generator=generator)


def random_case(seed, family=None):
    """Sizes, layer kinds, windows, rotary fractions, residual forms and activations at random."""
    draw = random.Random(seed)
    family = family or ("gpt_neo", "gpt_neox")[seed % 2]
    H, D, L = draw.choice([1, 2, 3, 4]), draw.choice([4, 8, 16, 20, 24]), draw.choice([1, 2, 3, 4])
    common = dict(vocab_size=97, hidden_size=H * D, intermediate_size=draw.choice([2, 3, 4]) * H * D,
                  max_position_embeddings=128, bos_token_id=0, eos_token_id=0)
    window = None
    if family == "gpt_neo":
        window = draw.choice([1, 2, 3, 5, 8, 13])
        kinds = [draw.choice(["global", "local"]) for _ in range(L)]
        kinds[draw.randrange(L)] = "local"
        settings = dict(common, num_layers=L, num_heads=H, attention_types=((tuple(kinds), 1),), window_size=window,
                        activation_function=draw.choice(["gelu_new", "gelu_new", "gelu", "gelu_fast"]))
        T = draw.choice([2 * window + 1, 3 * window + 2, 40, 61])
    else:
        parts = [f for f in (0.25, 0.5, 1.0) if int(D * f) % 2 == 0 and int(D * f)]
        settings = dict(common, num_hidden_layers=L, num_attention_heads=H, rotary_pct=draw.choice(parts),
                        rotary_emb_base=draw.choice([10000, 500.0]),
                        use_parallel_residual=draw.random() < 0.6,
                        hidden_act=draw.choice(["gelu", "gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh"]),
                        attention_bias=draw.random() < 0.8, tie_word_embeddings=draw.random() < 0.2)
        T = draw.choice([1, 2, 7, 40, 61])
    return Case(seed, family, tuple(settings.items()),
                draw.choice([1, 2, 3]), T, window)


def widen(model, seed):
    """Matrices N(0, 0.2), biases away from 0, norm weights away from 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.2, generator=generator)
            if ("ln_" in name or "norm" in name) and name.endswith("weight"):
                p += 1
    return model


def byte_vocab():
    """GPT-2's 256 visible characters for bytes, without merges, and the end of text: 257 tokens."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {chr(c): i for i, c in enumerate(plain + [256 + n for n in range(256 - len(plain))])} | {"<|endoftext|>": 256}


def write_tokenizer(family, folder):
    if family == "gpt_neo":
        (folder / "vocab.json").write_text(json.dumps(byte_vocab()))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        return
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "normalizer": {"type": "NFC"}, "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": byte_level, "model": {"type": "BPE", "vocab": byte_vocab(), "merges": []},
        "added_tokens": [{"id": 256, "content": "<|endoftext|>", "special": True, "single_word": False,
                          "lstrip": False, "rstrip": False, "normalized": False}]}))


@functools.cache
def good(family, seed=3):
    """A tiny checkpoint of a family, tokenizer included, as one file of safetensors."""
    common = dict(vocab_size=TINY_VOCAB, hidden_size=16, intermediate_size=48, max_position_embeddings=TINY_POSITIONS,
                  bos_token_id=256, eos_token_id=256)
    if family == "gpt_neo":
        model = neo.GPTNeoForCausalLM(neo.GPTNeoConfig(num_layers=2, num_heads=2, window_size=3,
                                                       attention_types=[[["global", "local"], 1]], **common))
    else:
        model = neox.GPTNeoXForCausalLM(neox.GPTNeoXConfig(num_hidden_layers=2, num_attention_heads=2,
                                                          rotary_pct=0.5, **common))
    folder = Path(tempfile.mkdtemp(dir=FOLDER.name))
    widen(model, seed).save_pretrained(folder)
    write_tokenizer(family, folder)
    return folder


@functools.lru_cache(maxsize=None)
def saved(case):
    """Folder with the reference's own files for this case."""
    config_class, model_class = REFERENCE[case.family]
    settings = dict(case.settings)
    model = widen(model_class(config_class(**settings)), case.seed)
    folder = Path(tempfile.mkdtemp(dir=FOLDER.name))
    model.save_pretrained(folder)
    return folder


def reference(case, dtype=torch.float32):
    """The reference model in eval mode: eager, loaded in its dtype (a later cast rounds its tables)."""
    return REFERENCE[case.family][1].from_pretrained(
        saved(case), dtype=dtype, attn_implementation="eager").eval()


@functools.lru_cache(maxsize=None)
def reference_output(case, dtype):
    """Its logits and hidden states for the case's ids, computed once."""
    with torch.no_grad():
        out = reference(case, dtype)(case.ids, output_hidden_states=True)
    return out.logits, out.hidden_states


def ours(case, dtype=torch.float32, backend="naive", modules=None):
    """Our model of the same files; `modules` replaces neo and neox (for planted mistakes)."""
    modules = modules or {"gpt_neo": neo, "gpt_neox": neox}
    model_class = {"gpt_neo": "GPTNeoForCausalLM", "gpt_neox": "GPTNeoXForCausalLM"}[case.family]
    return getattr(modules[case.family], model_class).from_pretrained(
        saved(case), torch_dtype=dtype, attn_implementation=backend)


def assert_bit_equal(case, dtype, model=None):
    """Logits and every hidden state of the naive path, or of `model`, are the reference's, bit for bit."""
    logits, hidden_states = reference_output(case, dtype)
    assert logits.isfinite().all(), "a case that overflows proves nothing"
    with torch.no_grad():
        out = (model or ours(case, dtype))(case.ids, output_hidden_states=True)
    assert len(out.hidden_states) == len(hidden_states)
    for i, (mine, theirs) in enumerate([*zip(out.hidden_states, hidden_states), (out.logits, logits)]):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), (
            f"{case}, {dtype}: hidden state {i} of {len(hidden_states)} differs by "
            f"{(mine.float() - theirs.float()).abs().max().item():.2g}")


def relative(mine, theirs):
    """Norm of the difference over the norm of the reference, in float64."""
    mine, theirs = mine.double(), theirs.double()
    return ((mine - theirs).norm() / theirs.norm()).item()
