"""The original formats: what another writer wrote is read to the bit, and what is damaged is refused by name."""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import convert
import load_weights
from conftest import ROOT
from helpers import REFERENCE, widen
from load_weights import AutoModelForCausalLM
from neo import GPTNeoForCausalLM, GPTNeoModel
from original_files import ENGINE, LINEAR, mesh_variables, neox_parts, write_bundle, write_neox
from originals.flax import read_flax, write_flax
from originals.neox import SUMMANDS, cut, joined
from originals.tensorflow import by_bits, crc32c, read_index

# Small random checkpoints, 1 MB, that EleutherAI's Mesh-TensorFlow code and transformers 4.57.6's Flax classes wrote,
# with the logits that these programs gave; too large to be part of the project.
SHARED = ROOT.parent / "shared" / "originals"
only_where_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs checkpoints that the original programs wrote")
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
        write_flax(tmp_path / "flax_model.msgpack", tensors)
        found = dict(read_flax(tmp_path / "flax_model.msgpack"))
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in tensors.items())
    tensors = official("gpt_neo")[1]
    write_flax(tmp_path / "flax_model.msgpack", tensors)
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


# ------------------------------------------------------------------------------------------------
# GPT-NeoX
# ------------------------------------------------------------------------------------------------

def settings_of(config, parts, **changes):
    """The .yml of an official config."""
    return {"pipe-parallel-size": 1, "model-parallel-size": parts, "num-layers": config["num_hidden_layers"],
            "hidden-size": config["hidden_size"], "num-attention-heads": config["num_attention_heads"],
            "max-position-embeddings": config["max_position_embeddings"], "norm": "layernorm", "pos-emb": "rotary",
            "rotary_pct": config["rope_parameters"]["partial_rotary_factor"],
            "rotary_emb_base": config["rope_parameters"]["rope_theta"],
            "no-weight-tying": not config["tie_word_embeddings"], "gpt_j_residual": config["use_parallel_residual"],
            "layernorm_epsilon": config["layer_norm_eps"], "attention-config": [[["flash"], 2]],
            "optimizer": {"type": "Adam", "params": {"lr": 0.0006}}} | changes


def neox_folder(tmp_path, parts=2, parallel=True, sequential=False, names={}, settings={}, dtype=torch.float32,
                tied=False, edit=None, bias=True):
    """(folder of layer files, the hub's folder, its tensors)."""
    hub, tensors = official("gpt_neox", dtype, use_parallel_residual=parallel, tie_word_embeddings=tied,
                            attention_bias=bias)
    files = neox_parts(tensors, 2, parts, parallel, names)
    if edit:
        edit(files)
    folder = tmp_path / "global_step3"
    write_neox(folder, files, sequential)
    (folder / "model.yml").write_text(json.dumps(settings_of(config_of(hub), parts) | settings, indent=1))
    return folder, hub, tensors


def assert_sums(model, tensors):
    """As assert_same_weights, but biases that are sums of independent parts are equal to rounding."""
    found = load_weights.official_state(model)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=4e-7)
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_neox_parts(parts, parallel, sequential, tmp_path):
    folder, hub, tensors = neox_folder(tmp_path, parts, parallel, sequential)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="naive")
    if parts == 1 or not parallel:
        assert_same_weights(model, tensors)
    assert_sums(model, tensors)
    expected = AutoModelForCausalLM.from_pretrained(hub, attn_implementation="naive")
    assert model.config == expected.config
    ids = torch.arange(20)[None] % 60
    with torch.no_grad():
        logits = expected(ids).logits
        assert (model(ids).logits - logits).norm() < 1e-6 * logits.norm()


@pytest.mark.parametrize("names", [LINEAR, ENGINE], ids=["GPT-NeoX 2", "transformer_engine"])
def test_neox_newer_names(names, tmp_path):
    folder, _, tensors = neox_folder(tmp_path, 2, parallel=False, names=names)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(folder), tensors)


@pytest.mark.parametrize("changes", [dict(tied=True), dict(bias=False), dict(dtype=torch.float16)], ids=str)
def test_neox_kinds(changes, tmp_path):
    folder, hub, tensors = neox_folder(tmp_path, 2, parallel=False, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert_same_weights(model, tensors)
    assert model.config == AutoModelForCausalLM.from_pretrained(hub).config


def test_summed_biases_are_not_copies(tmp_path):
    """With gpt_j_residual the sum of equal biases is not their mean; without it the mean of copies is not their sum."""
    def same(files):
        for (layer, rank), state in files.items():
            for key in state:
                if key.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
                    state[key] = torch.full_like(state[key], 0.5)
    for parallel, expected in ((True, 1.0), (False, 0.5)):
        folder, _, _ = neox_folder(tmp_path / str(parallel), 2, parallel, edit=same)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.transformer.blocks[1].attn.out_proj.bias.eq(expected).all()
        assert model.transformer.blocks[0].mlp.down_proj.bias.eq(expected).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("parts", [2, 4])
def test_norms_that_have_drifted_are_averaged(parts, dtype, tmp_path):
    """In the file's dtype and the order of the ranks: the bits of EleutherAI's script."""
    kept = []

    def drift(files):
        for (layer, rank), state in files.items():
            if "norm.weight" in state:
                state["norm.weight"] = state["norm.weight"] * (1 + 0.003 * rank)
                kept.append(state["norm.weight"])
    folder, _, _ = neox_folder(tmp_path, parts, dtype=dtype, edit=drift)
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").transformer.ln_f.weight
    expected = sum(kept) / parts
    assert torch.equal(found, expected) and not torch.equal(found, kept[0])


def inv_freq(files):
    """As released: the frequencies of 2 of the 4 dims of each of 4 heads."""
    for (layer, rank), state in files.items():
        if "input_layernorm.weight" in state:
            state["attention.rotary_emb.inv_freq"] = torch.tensor([1.0], dtype=torch.float16)


@pytest.mark.parametrize("settings, says", [
    ({"num-layers": 4, "num-attention-heads": 2}, "exchanged"),            # the published pythia-12b-deduped.yml
    ({"num-layers": 4}, "num_layers is 4; the weights say 2"), ({"hidden-size": 32}, "hidden_size is 32"),
    ({"no-weight-tying": False}, "no_weight_tying is False"), ({"model-parallel-size": 8}, "model_parallel_size is 8")])
def test_shapes_win_over_the_yml(settings, says, tmp_path):
    folder, hub, tensors = neox_folder(tmp_path, 2, parallel=False, settings=settings, edit=inv_freq)
    with pytest.warns(UserWarning, match=says):
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_weights(model, tensors)
    assert model.config == AutoModelForCausalLM.from_pretrained(hub).config


@pytest.mark.parametrize("settings, says", [
    ({"pos-emb": "learned"}, "pos_emb is 'learned'"), ({"norm": "rmsnorm"}, "norm is"), ({"gpt-j-tied": True}, "gpt_j_tied"),
    ({"activation": "geglu"}, "activation"), ({"num_kv_heads": 2}, "num_kv_heads"), ({"use_qk_layernorm": True}, "qk_layernorm"),
    ({"attention-config": [[["global", "local"], 1]]}, "attention_config names local"),
    ({"num-attention-heads": 3}, "num_attention_heads is 3"), ({"rotary_pct": "much"}, "rotary_pct is 'much'"),
    ({"max-position-embeddings": None}, "no max_position_embeddings"), ({"num_layers": 3}, "num_layers is 3, but in another|num_layers")])
def test_settings_of_other_models(settings, says, tmp_path):
    folder, _, _ = neox_folder(tmp_path, 1, settings=settings)
    if "num_layers" in settings:                           # both spellings, which contradict each other
        (folder / "more.yml").write_text("num_layers: 5\n")
    with pytest.raises(ValueError, match=says) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_yaml_builds_no_objects_and_reads_numbers(tmp_path):
    folder, hub, tensors = neox_folder(tmp_path, 1)
    assert "1e-05" in (folder / "model.yml").read_text(), "of which YAML 1.1 makes a text"
    assert AutoModelForCausalLM.from_pretrained(folder).config.layer_norm_eps == 1e-5
    for content in ("a: !!python/object/apply:os.system ['touch /tmp/x']", "a: [", "- 1", "\x00"):
        (folder / "model.yml").write_text(content)
        with pytest.raises(ValueError, match="model.yml"):
            AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.yml").unlink()
    with pytest.raises(FileNotFoundError, match="no .yml in"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / "config.json").write_text((hub / "config.json").read_text())  # the hub's does as well
    assert_same_weights(AutoModelForCausalLM.from_pretrained(folder), tensors)


def test_the_step_that_latest_names(tmp_path):
    folder, _, tensors = neox_folder(tmp_path, 1)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), tensors)          # the only one
    (tmp_path / "global_step9").mkdir()
    torch.save({}, tmp_path / "global_step9" / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="2 steps"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "latest").write_text("global_step3\n")
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), tensors)
    (tmp_path / "latest").write_text("global_step4")
    with pytest.raises(FileNotFoundError, match="latest names 'global_step4'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------
# Parts that are damaged, exchanged or missing
# ------------------------------------------------------------------------------------------------

def swap(folder, a, b):
    paths = [folder / f"layer_{name}-model_states.pt" for name in (a, b)]
    paths[0].rename(folder / "aside")
    paths[1].rename(paths[0])
    (folder / "aside").rename(paths[1])


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "no part": (lambda f: (f / "layer_03-model_01-model_states.pt").unlink(), "no layer_03-model_01"),
    "no first part": (lambda f: (f / "layer_03-model_00-model_states.pt").unlink(), "no layer_03-model_00"),
    "no second parts": (lambda f: [p.unlink() for p in f.glob("*model_01*")], "no layer_02-model_01"),
    "no block": (lambda f: [p.unlink() for p in f.glob("layer_02*")], "no layer_02-model_00"),
    "no embedding": (lambda f: [p.unlink() for p in f.glob("layer_00*")], "no layer_00-model_00"),
    "no norm": (lambda f: [p.unlink() for p in f.glob("layer_05*")], "no layer_05-model_00"),
    "no head": (lambda f: [p.unlink() for p in f.glob("layer_06*")], "no layer_06-model_00"),
    "cut": (lambda f: cut_short(f / "layer_03-model_01-model_states.pt"), "layer_03-model_01"),
    "empty": (lambda f: (f / "layer_03-model_01-model_states.pt").write_bytes(b""), "layer_03-model_01"),
    "text": (lambda f: (f / "layer_03-model_01-model_states.pt").write_text("hello"), "layer_03-model_01"),
    "ranks exchanged": (lambda f: swap(f, "03-model_00", "03-model_01"), "layer_03-model_0[01].* was saved as"),
    "layers exchanged": (lambda f: swap(f, "02-model_00", "03-model_00"), "layer_0[23]-model_00.* was saved as"),
    "another kind": (lambda f: torch.save(torch.load(f / "layer_05-model_00-model_states.pt"),
                                          f / "layer_03-model_00-model_states.pt"), "layer_03-model_0"),
    "another shape": (lambda f: edit(f / "layer_03-model_01-model_states.pt", "mlp.dense_h_to_4h.bias", torch.zeros(31)),
                      "layer_03-model_01.*dense_h_to_4h.bias"),
    "another dtype": (lambda f: edit(f / "layer_03-model_01-model_states.pt", "norm", torch.zeros(1)), "layer_03-model_01.*norm"),
    "no copies": (lambda f: edit(f / "layer_05-model_01-model_states.pt", "norm.bias", torch.ones(16)),
                  "layer_05-model_00.*norm.bias should be the same"),
    "code": (lambda f: torch.save({"a": swap}, f / "layer_03-model_01-model_states.pt"), "layer_03-model_01.* was refused"),
}


def edit(path, key, tensor):
    torch.save(torch.load(path) | {key: tensor}, path)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_parts(kind, tmp_path, capsys):
    damage, says = DAMAGE[kind]
    folder, _, _ = neox_folder(tmp_path, 2)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)
    assert convert.main([str(folder), str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not [*(tmp_path / "out").glob("*")], "nothing half-written"


def test_biases_that_are_no_copies_without_gpt_j_residual(tmp_path):
    folder, _, _ = neox_folder(tmp_path, 2, parallel=True, settings={"gpt_j_residual": False})
    with pytest.raises(ValueError, match="layer_02-model_00.*dense.bias should be the same.*gpt_j_residual"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_rank_files_with_other_contents(tmp_path):
    """Of NumPy the random state alone is let through."""
    folder, _, _ = neox_folder(tmp_path, 1, sequential=True)
    path = folder / "mp_rank_00_model_states.pt"
    whole = torch.load(path, weights_only=False)
    for extra in (np.float64(1), np.random.default_rng(), swap, np.array(["a"], dtype=object)):
        torch.save(whole | {"extra": extra}, path)
        with pytest.raises(ValueError, match="mp_rank_00_model_states.pt was refused"):
            AutoModelForCausalLM.from_pretrained(folder)
    assert np.dtype not in torch.serialization.get_safe_globals(), "allowed for this file only"
    torch.save({"module": {"other.name": torch.ones(1)}}, path)
    with pytest.raises(ValueError, match="other.name is not of the form"):
        AutoModelForCausalLM.from_pretrained(folder)
    torch.save({"module": {}}, path)
    with pytest.raises(FileNotFoundError, match="mp_rank_00_model_states.pt holds no weights"):
        AutoModelForCausalLM.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------
# TensorFlow
# ------------------------------------------------------------------------------------------------

def mesh_config(hub, **changes):
    config = config_of(hub)
    return {"n_embd": config["hidden_size"], "n_head": config["num_heads"], "n_layer": config["num_layers"],
            "n_vocab": config["vocab_size"], "n_ctx": config["max_position_embeddings"],
            "attention_types": config["attention_types"], "local_attention_radius": config["window_size"],
            "attn_dropout": 0, "res_dropout": 0, "embed_dropout": 0, "activation_function": "gelu"} | changes


def mesh_folder(tmp_path, config={}, dtype=torch.float32, edit=lambda variables: None, **how):
    hub, tensors = official("gpt_neo", dtype)
    folder = tmp_path / "mesh"
    folder.mkdir(exist_ok=True)
    variables = mesh_variables(tensors)
    edit(variables)
    write_bundle(folder / "model.ckpt-7", variables, **how)
    (folder / "config.json").write_text(json.dumps(mesh_config(hub, **config)))
    return folder, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mesh_checkpoint(dtype, tmp_path):
    folder, tensors = mesh_folder(tmp_path, dtype=dtype, shards=3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert_same_weights(model, tensors)
    assert all(p.is_contiguous() for p in model.parameters())
    assert model.config.window_size == 3 and model.config.activation_function == "gelu_new"


def test_mesh_vocabulary_is_cut(tmp_path):
    folder, tensors = mesh_folder(tmp_path, config={"n_vocab": 50})
    assert_same_weights(AutoModelForCausalLM.from_pretrained(folder),
                        tensors | {"transformer.wte.weight": tensors["transformer.wte.weight"][:50]})


def test_tensorflow_s_own_saver():
    """tests/gpt-neo-tensorflow/make.py says how it was made: three shards, two dtypes, padding, an optimizer's slot."""
    folder = ROOT / "tests" / "gpt-neo-tensorflow"
    made = runpy.run_path(str(folder / "make.py"))         # its table of shapes and its values
    model = GPTNeoForCausalLM.from_pretrained(folder)
    state = {name: p for name, p in load_weights.official_state(model).items()}
    variables = mesh_variables(state)
    for number, (name, shape) in enumerate(made["SHAPES"].items()):
        expected = made["values"](number, shape)[:60]
        assert np.array_equal(variables[f"gpt2/{name}"], expected), name
    assert len(state) == len(made["SHAPES"])
    found = dict(load_weights.read_tensors(folder / "model.ckpt-7.index"))
    assert {found[name].dtype for name in found if ".h.1." in name} == {torch.bfloat16}


@only_where_shared
def test_the_original_code_s_logits():
    folder = SHARED / "gpt-neo-tensorflow"
    model, expected = GPTNeoForCausalLM.from_pretrained(folder, attn_implementation="naive"), np.load(folder / "ref.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["ids"]).long()).logits.numpy()
    assert np.abs(logits - expected["logits"]).max() <= 7e-7 * np.abs(expected["logits"]).max()


MESH_DAMAGE = {
    "index cut": (lambda f: cut_short(f / "model.ckpt-7.index"), "model.ckpt-7.index is not a whole"),
    "index empty": (lambda f: (f / "model.ckpt-7.index").write_bytes(b""), "model.ckpt-7.index is not a whole"),
    "a bit of the index": (lambda f: flip(f / "model.ckpt-7.index", 40), "index is not a whole.*checksum"),
    "a bit of the data": (lambda f: flip(f / "model.ckpt-7.data-00001-of-00002", 40),
                          "data-00001-of-00002 is damaged: the checksum of gpt2/"),
    "data cut": (lambda f: (f / "model.ckpt-7.data-00000-of-00002").write_bytes(b"x" * 99), "data-00000-of-00002 is damaged"),
    "no data": (lambda f: (f / "model.ckpt-7.data-00001-of-00002").unlink(), "no model.ckpt-7.data-00001-of-00002"),
    "shards exchanged": (lambda f: [(f / "model.ckpt-7.data-00001-of-00002").rename(f / "x"),
                                    (f / "model.ckpt-7.data-00000-of-00002").rename(f / "model.ckpt-7.data-00001-of-00002"),
                                    (f / "x").rename(f / "model.ckpt-7.data-00000-of-00002")], "is damaged"),
    "two steps": (lambda f: (f / "model.ckpt-8.index").write_bytes(b"x"), "no file 'checkpoint'"),
    "big endian": (lambda f: write_bundle(f / "model.ckpt-7", {}, shards=1), "missing tensor"),
}


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("kind", MESH_DAMAGE)
def test_damaged_mesh_checkpoints(kind, tmp_path):
    damage, says = MESH_DAMAGE[kind]
    folder, _ = mesh_folder(tmp_path)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        AutoModelForCausalLM.from_pretrained(folder)
    assert convert.main([str(folder), str(tmp_path / "out")]) == 2
    assert not [*(tmp_path / "out").glob("*")]


def test_damaged_bytes_of_an_index_are_noticed(tmp_path):
    """Wherever: every block has a checksum.  Of one alone, the metaindex of 13 bytes, nothing is read."""
    folder, _ = mesh_folder(tmp_path)
    path, unnoticed = folder / "model.ckpt-7.index", 0
    whole = path.read_bytes()
    for at in range(0, len(whole) - 48, 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1:])
        try:
            read_index(path)
            unnoticed += 1
        except ValueError as error:
            assert "model.ckpt-7.index is not a whole" in str(error)
    assert unnoticed <= 1


def test_the_step_that_checkpoint_names(tmp_path):
    folder, tensors = mesh_folder(tmp_path)
    (folder / "model.ckpt-9.index").write_bytes(b"x")
    (folder / "checkpoint").write_text('model_checkpoint_path: "gs://somewhere/model.ckpt-7"\nall_model_checkpoint_paths: "x"')
    assert_same_weights(AutoModelForCausalLM.from_pretrained(folder), tensors)


@pytest.mark.parametrize("config, says", [
    ({"rotary_emb": True}, "rotary_emb"), ({"moe_layers": [1]}, "moe_layers"), ({"scalenorm": True}, "scalenorm"),
    ({"activation_fn": "relu"}, "activation_fn"), ({"n_head": 3}, "num_heads"), ({"n_layer": 3}, "attention_types"),
    ({"attention_types": [[["linear"], 2]]}, "linear")])
def test_mesh_configs_of_other_models(config, says, tmp_path):
    folder, _ = mesh_folder(tmp_path, config=config)
    with pytest.raises(ValueError, match=f"config.json.*{says}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_mesh_configs_that_lack_a_field(tmp_path):
    folder, _ = mesh_folder(tmp_path)
    config = config_of(folder)
    del config["n_head"], config["n_ctx"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json has no field n_head, n_ctx"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_partitioned_and_unknown_variables(tmp_path):
    folder, _ = mesh_folder(tmp_path, partitioned=["gpt2/wte"])
    with pytest.raises(ValueError, match="gpt2/wte is a partitioned variable"):
        AutoModelForCausalLM.from_pretrained(folder)
    folder, _ = mesh_folder(tmp_path, edit=lambda variables: variables.update({"gpt2/h0/extra": np.ones(3, np.float32)}))
    with pytest.raises(ValueError, match="unexpected tensor gpt2/h0/extra"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_checksum():
    """Of RFC 3720's examples, and the definition bit by bit at every length up to where pairs are merged thrice."""
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(bytes(32)) == 0x8A9136AA
    data = np.random.default_rng(0).bytes(2**20 + 13)
    for size in [*range(40), 64, 1023]:
        assert crc32c(data[:size]) == by_bits(0xFFFFFFFF, data[:size]) ^ 0xFFFFFFFF
    # More than one chunk: the same bytes in one, whose size is patched up, and in many.
    assert crc32c(data) == by_bits(crc32c(data[:2**20]) ^ 0xFFFFFFFF, data[2**20:]) ^ 0xFFFFFFFF


# ------------------------------------------------------------------------------------------------
# convert.py
# ------------------------------------------------------------------------------------------------

def make_folder(kind, tmp_path, dtype):
    """(folder of this format, the hub's tensors)."""
    if kind == "mesh":
        return mesh_folder(tmp_path, dtype=dtype)
    if kind == "flax":
        tensors = official("gpt_neo", dtype)[1]
        folder = flax_folder(tmp_path, b"")
        write_flax(folder / "flax_model.msgpack", tensors)
        return folder, tensors
    if kind.startswith("hub"):
        return official("gpt_neo" if kind == "hub-neo" else "gpt_neox", dtype)
    folder, _, tensors = neox_folder(tmp_path, 2, parallel=False, dtype=dtype, sequential=kind == "ranks")
    return folder, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mesh", "flax", "layers", "ranks", "hub-neo", "hub-neox"])
def test_convert(kind, dtype, tmp_path, capsys):
    """Bit-equal, in the files' dtype, and transformers reads it."""
    folder, tensors = make_folder(kind, tmp_path, dtype)
    (tmp_path / "out").mkdir()
    assert convert.main([str(folder), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == dtype and torch.equal(found[name], tensors[name]) for name in tensors)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    original = AutoModelForCausalLM.from_pretrained(folder)
    assert original.config == AutoModelForCausalLM.from_pretrained(tmp_path / "out").config


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_convert_to_parts_and_back(parts, parallel, tmp_path):
    hub, tensors = official("gpt_neox", torch.float16, use_parallel_residual=parallel, tie_word_embeddings=False,
                            attention_bias=True)
    assert convert.main([str(hub), str(tmp_path / "parts"), "--parts", str(parts)]) == 0
    assert len([*(tmp_path / "parts").glob("layer_*")]) == parts * 5
    assert convert.main([str(tmp_path / "parts"), str(tmp_path / "back")]) == 0
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    (tmp_path / "parts" / "config.json").unlink()          # the .yml says the same
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "parts", dtype=torch.float16)
    assert_same_weights(again, tensors)
    assert again.config == AutoModelForCausalLM.from_pretrained(hub).config


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_summands_give_the_very_bias(dtype, parts):
    """Also where its parts cannot: the least numbers of a dtype, and thirds."""
    bias = torch.randn(3000, generator=torch.Generator().manual_seed(1)).mul(10.0 ** torch.linspace(-8, 2, 3000)).to(dtype)
    pieces = cut(bias, SUMMANDS, parts, parallel=True)
    assert len(pieces) == parts and torch.equal(joined(pieces, SUMMANDS, parallel=True), bias)
    if parts in (2, 4):
        usual = bias.abs() > 0.01                          # far from the least numbers
        assert torch.equal(pieces[0][usual], bias[usual] / parts), "each has its share, as in GPT-NeoX's script"


def test_a_vocabulary_that_cannot_be_cut_is_filled_up(tmp_path, capsys):
    hub, tensors = official("gpt_neox", vocab_size=61, tie_word_embeddings=False)
    assert convert.main([str(hub), str(tmp_path / "parts"), "--parts", "4"]) == 0
    assert "61 rows are filled up with zeros to 64" in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    assert model.config.vocab_size == 64
    assert torch.equal(model.lm_head.weight[:61], tensors["embed_out.weight"]) and not model.lm_head.weight[61:].any()


@pytest.mark.parametrize("parts, says", [(3, "cannot be cut into 3 parts"), (0, "cannot be cut into 0"), (-1, "into -1")])
def test_parts_that_cannot_be(parts, says, tmp_path, capsys):
    hub, _ = official("gpt_neox")
    assert convert.main([str(hub), str(tmp_path / "out"), "--parts", str(parts)]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_convert_refuses_what_cannot_be(tmp_path, capsys):
    neo_hub, neox_hub = official("gpt_neo")[0], official("gpt_neox")[0]
    assert convert.main([str(neo_hub), str(tmp_path / "out"), "--parts", "2"]) == 2
    assert "--parts is for GPT-NeoX" in capsys.readouterr().err
    assert convert.main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert convert.main([str(neox_hub), str(tmp_path / "out"), "--parts", "2"]) == 0
    assert convert.main([str(neox_hub), str(tmp_path / "out"), "--parts", "2"]) == 0      # once more
    for how in ([], ["--parts", "1"]):
        assert convert.main([str(neox_hub), str(tmp_path / "out"), *how]) == 2
        assert "out holds other weights (layer_00-model_0" in capsys.readouterr().err


def test_a_conversion_that_fails_writes_nothing(tmp_path, capsys, monkeypatch):
    hub, _ = official("gpt_neox")

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(convert, "write_part", full)
    monkeypatch.setattr(convert, "write_safetensors", full)
    for how in ([], ["--parts", "2"]):
        assert convert.main([str(hub), str(tmp_path / "out"), *how]) == 2
        assert "No space left" in capsys.readouterr().err and not [*(tmp_path / "out").iterdir()]


def test_the_tokenizer_goes_along(tmp_path):
    folder, _ = make_folder("layers", tmp_path, torch.float32)
    (folder / "20B_tokenizer.json").write_text("{}")
    assert convert.main([str(folder), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


# ------------------------------------------------------------------------------------------------
# GPT-NeoX-20B's true shape
# ------------------------------------------------------------------------------------------------

GIANT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from load_weights import read_config, read_tensors, weight_files


def resident(field="VmRSS"):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024


folder, count, largest = sys.argv[2], 0, 0
assert read_config(folder)["num_hidden_layers"] == 44
paths = weight_files(folder)
torch.ones(1000).sum()
Path("/proc/self/clear_refs").write_text("5")              # the peak is counted from here
before = resident()
for path in paths:
    for name, tensor in read_tensors(path):
        count += tensor.numel()
        largest = max(largest, tensor.nbytes)
        del tensor                                         # the target: one tensor at a time
print(count, largest, resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="measures memory as Linux counts it")
def test_joining_the_20b_takes_the_memory_of_one_tensor(tmp_path):
    """Two parts of 20 GB each in sparse files.  Beside the joined tensor nothing but its parts is in memory."""
    H, C, L = 64, 6144, 44
    half = {"input_layernorm": C, "post_attention_layernorm": C}
    block = {f"{name}.{kind}": (C,) for name in half for kind in ("weight", "bias")} | {
        "attention.query_key_value.weight": (9216, C), "attention.query_key_value.bias": (9216,),
        "attention.dense.weight": (C, 3072), "attention.dense.bias": (C,), "attention.rotary_emb.inv_freq": (12,),
        "mlp.dense_h_to_4h.weight": (12288, C), "mlp.dense_h_to_4h.bias": (12288,),
        "mlp.dense_4h_to_h.weight": (C, 12288), "mlp.dense_4h_to_h.bias": (C,)}
    stages = {0: {"word_embeddings.weight": (25216, C)}, **{layer: block for layer in range(2, L + 2)},
              L + 3: {"norm.weight": (C,), "norm.bias": (C,)}, L + 4: {"final_linear.weight": (25216, C)}}
    for layer, state in stages.items():
        for rank in range(2):
            with torch.serialization.skip_data():          # memory that is never touched, a file full of holes
                torch.save({key: torch.empty(shape, dtype=torch.float16) for key, shape in state.items()},
                           tmp_path / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
    (tmp_path / "20B.yml").write_text(json.dumps({
        "num-layers": L, "hidden-size": C, "num-attention-heads": H, "max-position-embeddings": 2048,
        "rotary_pct": 0.25, "gpt_j_residual": True, "no-weight-tying": True, "model-parallel-size": 2}))
    out = subprocess.run([sys.executable, "-c", GIANT, str(ROOT), str(tmp_path)], capture_output=True, text=True,
                         check=True).stdout
    count, largest, peak = map(int, out.split())
    assert count == 20_554_567_680 + L * 12 and largest == 50432 * C * 2
    print(f"peak beyond the start: {peak / largest:.3f} times the largest tensor, itself included")
    assert peak <= 2.1 * largest
