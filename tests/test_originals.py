"""The original formats: what another writer wrote is read to the bit, and what is damaged is refused by name."""

import json
import tempfile
from functools import cache
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import load_weights
import originals
from conftest import ROOT
from helpers import REFERENCE, widen
from load_weights import AutoModelForCausalLM
from neo import GPTNeoForCausalLM, GPTNeoModel

SHARED = ROOT.parent / "shared" / "originals"              # files of real writers; not part of the project
only_where_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="files of 250 KB that are not part of the project")
SIZES = {"gpt_neo": dict(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=3),
         "gpt_neox": dict(num_hidden_layers=2, num_attention_heads=4, rotary_pct=0.5, rotary_emb_base=500.0)}


@cache
def official(family, dtype=torch.float32, **changes):
    """(folder, tensors) of a small checkpoint that the reference wrote."""
    config_class, model_class = REFERENCE[family]
    config = config_class(**dict(vocab_size=60, hidden_size=16, intermediate_size=64, max_position_embeddings=32,
                                 bos_token_id=0, eos_token_id=0, **SIZES[family]) | changes)
    folder = Path(tempfile.mkdtemp(prefix="official-"))
    widen(model_class(config), seed=5).to(dtype).save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors")


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def assert_same_weights(model, tensors):
    """The model has these official tensors, to the bit."""
    found = load_weights.official_state(model)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# ------------------------------------------------------------------------------------------------
# Flax
# ------------------------------------------------------------------------------------------------

def flax_bytes(tree):
    """A tree of numpy arrays as flax/serialization.py writes it."""
    def array(x):
        return msgpack.ExtType(1, msgpack.packb((x.shape, x.dtype.name, x.tobytes("C")), use_bin_type=True))
    return msgpack.packb(tree, default=array, strict_types=True)


def flax_tree(tensors, cut=()):
    """Official tensors as Flax's tree of numpy arrays, written independently of originals.py."""
    tree = {}
    for name, tensor in tensors.items():
        *above, last = name.split(".")
        array = tensor.numpy()
        if last == "weight" and ("wte" in name or "wpe" in name):
            last = "embedding"
        elif last == "weight" and ("ln_" in name):
            last = "scale"
        elif last == "weight":
            last, array = "kernel", array.T
        inner = tree
        for level in above[len(cut):]:
            inner = inner.setdefault(level, {})
        inner[last] = array
    return tree


def flax_folder(tmp_path, content, config=None):
    folder = tmp_path / "flax"
    folder.mkdir()
    (folder / "flax_model.msgpack").write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config or config_of(official("gpt_neo")[0])))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_flax_file(dtype, tmp_path):
    _, tensors = official("gpt_neo", dtype)
    folder = flax_folder(tmp_path, flax_bytes(flax_tree(tensors)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if dtype is torch.float32 else dtype)
    assert_same_weights(model, tensors)
    assert all(p.is_contiguous() for p in model.parameters())


def test_flax_file_of_a_base_model(tmp_path):
    _, tensors = official("gpt_neo")
    folder = flax_folder(tmp_path, flax_bytes(flax_tree(tensors, cut=["transformer"])))
    assert_same_weights(GPTNeoModel.from_pretrained(folder),
                        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()})


def test_flax_shards(tmp_path):
    """transformers 4 cut files over 10 GB into shards of flat names."""
    _, tensors = official("gpt_neo")
    folder = flax_folder(tmp_path, b"")
    (folder / "flax_model.msgpack").unlink()
    flat = {f"{'/'.join(name.split('.')[:-1])}/{last}": array for name in tensors
            for last, array in leaf(flax_tree({name: tensors[name]}))}
    names = list(flat)
    files = {"flax_model-00001-of-00002.msgpack": names[:9], "flax_model-00002-of-00002.msgpack": names[9:]}
    for file, part in files.items():
        (folder / file).write_bytes(flax_bytes({name: flat[name] for name in part}))
    (folder / "flax_model.msgpack.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}))
    assert_same_weights(GPTNeoForCausalLM.from_pretrained(folder), tensors)
    (folder / "flax_model-00002-of-00002.msgpack").unlink()
    with pytest.raises(FileNotFoundError, match="flax_model-00002-of-00002.msgpack"):
        GPTNeoForCausalLM.from_pretrained(folder)


def leaf(tree):
    """[(last name, array)] of a tree of one array."""
    while True:
        key, tree = next(iter(tree.items()))
        if not isinstance(tree, dict):
            return [(key, tree)]


def test_flax_files_that_we_write(tmp_path):
    """Read back to the bit, bfloat16 too, and by msgpack alone: the tree is the one that Flax would write."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {name: tensor.to(dtype) for name, tensor in official("gpt_neo")[1].items()}
        originals.write_flax(tmp_path / "flax_model.msgpack", tensors)
        found = dict(originals.read_flax(tmp_path / "flax_model.msgpack"))
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in tensors.items())
    tensors = official("gpt_neo")[1]
    originals.write_flax(tmp_path / "flax_model.msgpack", tensors)
    assert (tmp_path / "flax_model.msgpack").read_bytes() == flax_bytes(flax_tree(tensors))


def changed(content, kind):
    at = content.index(b"float32")
    return {"cut": content[:-20], "cut early": content[:300], "empty": b"", "more": content + b"\xc0",
            "another dtype": content[:at] + b"float8_" + content[at + 7:],
            "no map": msgpack.packb([1, 2]), "text": b"hello, this is no msgpack at all" * 9,
            "chunks": msgpack.packb({"transformer": {"wte": {"embedding": {
                "__msgpack_chunked_array__": True, "shape": {"0": 1}, "chunks": {}}}}}),
            "deep": b"\x81\xa1a" * 5000 + b"\xc0", "pickle": msgpack.packb({"a": msgpack.ExtType(4, b"x")})}[kind]


@pytest.mark.parametrize("kind", ["cut", "cut early", "empty", "more", "another dtype", "no map", "text", "chunks",
                                  "deep", "pickle"])
def test_flax_files_that_are_damaged(kind, tmp_path):
    folder = flax_folder(tmp_path, changed(flax_bytes(flax_tree(official("gpt_neo")[1])), kind))
    with pytest.raises(ValueError) as error:
        GPTNeoForCausalLM.from_pretrained(folder)
    assert "flax_model.msgpack is not a whole msgpack file" in str(error.value) and "\n" not in str(error.value)


@only_where_shared
def test_flax_file_of_transformers_4():
    """FlaxGPTNeoForCausalLM's own file gives the logits that transformers' PyTorch class gave."""
    folder = SHARED / "gpt-neo-flax"
    model, expected = GPTNeoForCausalLM.from_pretrained(folder), np.load(folder / "ref.npz")
    with torch.no_grad():
        out = model(torch.from_numpy(np.load(folder / "ids.npy")), output_hidden_states=True)
    logits = torch.from_numpy(expected["l64"])
    assert (out.logits.double() - logits).norm() < 3e-6 * logits.norm()
