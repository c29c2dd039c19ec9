"""Damaged checkpoints: each loads and equals the reference, or is refused in one line that names the file.

A failure says its seed; `attempt(seed, folder)` makes the same file again.
"""

import functools
import json
import random
import resource
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save

from fuzzing import json_text, mutated_bytes, mutated_json, outcome
from helpers import FOLDER
from load_weights import AutoModelForCausalLM

IDS = torch.arange(12)[None] % 11
NEO = dict(vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
           window_size=3, intermediate_size=16, max_position_embeddings=16, bos_token_id=0, eos_token_id=0)
NEOX = dict(vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=0, rotary_pct=0.5)


@functools.cache
def parts(family):
    """(config.json, tensors) of a checkpoint as transformers writes it."""
    torch.manual_seed(0)
    if family == "gpt_neo":
        model = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**NEO))
        state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    else:
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**NEOX))
        state = {k.replace("lm_head", "embed_out"): v for k, v in model.state_dict().items()}
    config = json.loads(model.config.to_json_string(use_diff=False))
    if family == "gpt_neox":                               # both spellings of the rotation
        config |= {"rotary_pct": 0.5, "rotary_emb_base": 10000, "rope_scaling": None}
    return config, {name: tensor.contiguous() for name, tensor in state.items()}


def write_damaged(seed, folder):
    """One checkpoint, of which one file is damaged; returns which."""
    draw = random.Random(seed)
    config, tensors = parts(draw.choice(["gpt_neo", "gpt_neox"]))
    kind = draw.choice(["config", "config", "config text", "header", "data", "index", "bin"])
    if kind == "config":
        config = mutated_json(config, draw)
    text = json_text(config).encode()
    (folder / "config.json").write_bytes(mutated_bytes(text, draw) if kind == "config text" else text)
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=draw.random() < 0.5)
        damaged = mutated_bytes((folder / "pytorch_model.bin").read_bytes(), draw)
        (folder / "pytorch_model.bin").write_bytes(damaged)
    elif kind == "index":
        index = {"metadata": {}, "weight_map": {name: "model-00001-of-00001.safetensors" for name in tensors}}
        (folder / "model-00001-of-00001.safetensors").write_bytes(save(tensors, {"format": "pt"}))
        (folder / "model.safetensors.index.json").write_text(json_text(mutated_json(index, draw)))
    else:
        data = save(tensors, {"format": "pt"})
        size = 8 + int.from_bytes(data[:8], "little")
        if kind == "header":
            head = draw.choice([mutated_bytes(data[:size], draw), with_other_header(data[8:size], draw)])
            data = head + data[size:]
        elif kind == "data":
            data = data[:size] + mutated_bytes(data[size:], draw)
        (folder / "model.safetensors").write_bytes(data)
    return kind


def with_other_header(header, draw):
    header = json_text(mutated_json(json.loads(header), draw)).encode()
    return len(header).to_bytes(8, "little") + header


def logits(model):
    with torch.no_grad():
        return model(IDS[:, :model.config.max_position_embeddings].clamp(max=model.config.vocab_size - 1)).logits


def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32).eval()


@functools.cache
def whole(family):
    """The undamaged checkpoint.  An index that is read decides nothing but which files are opened, and
    transformers cannot do without its 'metadata', which we do not need."""
    folder = Path(FOLDER.name) / f"fuzz-{family}"
    folder.mkdir()
    config, tensors = parts(family)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    return folder


def attempt(seed, folder):
    """Write the file of this seed and load it; raises where the rule is broken."""
    folder.mkdir()
    kind = write_damaged(seed, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = outcome(lambda: AutoModelForCausalLM.from_pretrained(folder, attn_implementation="naive"), folder)
        if model is not None:
            theirs = reference(folder if kind != "index" else whole(model.config.model_type))
            torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=0, equal_nan=True)
    return kind, model is not None


def run(seeds, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded, broken = 0, []
    for seed in seeds:
        try:
            loaded += attempt(seed, tmp_path / str(seed))[1]
        except Exception as error:
            broken.append(f"seed {seed}: {type(error).__name__} {str(error)[:400]}")
    assert not broken, f"{len(broken)} of {len(seeds)}:\n" + "\n".join(broken[:10])
    assert 0.1 < loaded / len(seeds) < 0.9                 # else the damage is too small, or too large
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, f"{grown} KiB of memory"         # ru_maxrss is in KiB


def test_damaged_checkpoints(tmp_path):
    run(range(300), tmp_path)


@pytest.mark.slow
def test_more_damaged_checkpoints(tmp_path):
    run(range(300, 5300), tmp_path)
