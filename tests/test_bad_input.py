"""Bad input: one clear error, never a traceback from deep inside and never a silent wrong answer.

Every test starts from a folder that loads and generates, and breaks one thing in it.
"""

import functools
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compare
import generate
from commands import what_failed
from helpers import TINY_POSITIONS, TINY_VOCAB, good
from load_weights import AutoModelForCausalLM
from neo import GPTNeoForCausalLM

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ["gpt_neo", "gpt_neox"]
V, P = TINY_VOCAB, TINY_POSITIONS
NAN, INF = float("nan"), float("inf")


# ------------------------------------------------------------------------------------------------
# A folder that works
# ------------------------------------------------------------------------------------------------

@functools.cache
def good_model(family):
    return AutoModelForCausalLM.from_pretrained(good(family))


@functools.cache
def shown_to_work(family):
    """The folder that all copies are of: it loads, and generates from Python and from the command line."""
    ids = good_model(family).generate(torch.tensor([[5, 6]]), max_new_tokens=2, eos_token_id=None)
    assert ids.shape == (1, 4)
    assert generate.main(["hi", "--model", str(good(family)), "--max-new-tokens", "2", "--greedy"]) == 0
    return good(family)


def working_copy(family, folder):
    return Path(shutil.copytree(shown_to_work(family), folder, dirs_exist_ok=True))


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path, capsys):
    copy = working_copy(request.param, tmp_path / "checkpoint")
    capsys.readouterr()
    return copy


@pytest.fixture
def neo_folder(tmp_path, capsys):
    copy = working_copy("gpt_neo", tmp_path / "checkpoint")
    capsys.readouterr()
    return copy


@pytest.fixture
def neox_folder(tmp_path, capsys):
    copy = working_copy("gpt_neox", tmp_path / "checkpoint")
    capsys.readouterr()
    return copy


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, capsys, exception, *says, lines=1):
    """Python gets `exception` with these words, the command line the same text and exit status 2."""
    with pytest.raises(exception) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    message = str(caught.value)
    for word in says:
        assert word in message, message
    assert len(message.splitlines()) == lines, message
    assert generate.main(["hi", "--model", str(folder), "--max-new-tokens", "2"]) == 2
    out, err = capsys.readouterr()
    said = what_failed(caught.value)                       # the same, but for the middle of a very long path
    assert (out, err) == ("", f"error: {said}\n") and said[:60] == message[:60]


# ------------------------------------------------------------------------------------------------
# config.json
# ------------------------------------------------------------------------------------------------

def test_no_config(folder, capsys):
    """The wrong folder: say what is missing, and where."""
    (folder / "config.json").unlink()
    refused(folder, capsys, FileNotFoundError, "no config.json in", str(folder))


@pytest.mark.parametrize("content", [b"", b"{", b'{"hidden_size": }', b"\xff\xfe", b"[" * 100_000],
                         ids=["empty", "cut", "comma", "not text", "deep"])
def test_config_is_not_json(folder, capsys, content):
    """A download that broke off, or an error page saved as a file."""
    (folder / "config.json").write_bytes(content)
    refused(folder, capsys, ValueError, "config.json is not valid JSON")


@pytest.mark.parametrize("content", ["[1]", "null", '"gpt_neo"', "3"])
def test_config_is_not_an_object(folder, capsys, content):
    (folder / "config.json").write_text(content)
    refused(folder, capsys, ValueError, "config.json must hold a JSON object")


@pytest.mark.parametrize("value", ["64", True, None, 0, -1, 1.5, [64]], ids=str)
@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "max_position_embeddings"])
def test_a_size_of_the_wrong_kind(folder, capsys, field, value):
    """Edited by hand: the field is named, and what stands there."""
    change_config(folder, **{field: value})
    refused(folder, capsys, ValueError, f"config field '{field}' must be", repr(value))


@pytest.mark.parametrize("changes", [
    {"initializer_range": "small"}, {"tie_word_embeddings": 1}, {"eos_token_id": "end"}, {"bos_token_id": 1.5},
    {"intermediate_size": 0}, {"attention_dropout": None}], ids=str)
def test_another_field_of_the_wrong_kind(folder, capsys, changes):
    change_config(folder, **changes)
    refused(folder, capsys, ValueError, "config field", *(repr(name) for name in changes))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox_japanese", None, ["gpt_neo"], {}, 3], ids=str)
def test_another_architecture(folder, capsys, kind):
    """gpt_neox_japanese loads without complaint into GPT-NeoX's shapes, and is another model."""
    change_config(folder, model_type=kind)
    refused(folder, capsys, ValueError, "'model_type'", repr(kind), "supported: gpt_neo, gpt_neox")


def test_no_model_type(folder, capsys):
    change_config(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_type"}))
    refused(folder, capsys, ValueError, "'model_type'", "supported: gpt_neo, gpt_neox")


def test_the_class_of_the_other_family():
    """The name of the class that would load it is in the error."""
    with pytest.raises(ValueError, match="gpt_neox checkpoint.*AutoModelForCausalLM"):
        GPTNeoForCausalLM.from_pretrained(good("gpt_neox"))


@pytest.mark.parametrize("name", ["relu", "GELU", "", "swish"])
def test_unknown_activation(folder, capsys, name):
    """Near misses of GELU are 5e-4 apart: a default would never be noticed."""
    field = "activation_function" if (folder / "vocab.json").exists() else "hidden_act"
    change_config(folder, **{field: name})
    refused(folder, capsys, ValueError, f"'{field}'", repr(name), "supported: gelu, gelu_new")


@pytest.mark.parametrize("heads", [3, 5, 32])
def test_heads_that_do_not_divide_the_width(folder, capsys, heads):
    field = "num_heads" if (folder / "vocab.json").exists() else "num_attention_heads"
    change_config(folder, **{field: heads})
    refused(folder, capsys, ValueError, "'hidden_size' (16)", f"'{field}' ({heads})")


@pytest.mark.parametrize("types, says", [
    ([[["global", "sparse"], 1]], "sparse"), ([[["global", 7], 1]], "7"), ([["global", 2]], "supported: global, local"),
    ([[["global", "local"], 2]], "describes 4 layers"), ([[["local"], 1]], "describes 1 layers"), ([], "describes 0 layers"),
    ([[["global", "local"], "1"]], "must be pairs"), ([["global", "local"]], "must be pairs"), ("global", "must be"),
    (2, "must be"), ([2], "must be pairs")], ids=str)
def test_attention_types(neo_folder, capsys, types, says):
    """Kinds that are unknown, or of another number of layers."""
    change_config(neo_folder, attention_types=types, attention_layers=None)
    refused(neo_folder, capsys, ValueError, "'attention_types'", says)


def test_attention_layers_that_contradict(neo_folder, capsys):
    """The reference would read one of the two and not say which."""
    change_config(neo_folder, attention_layers=["local", "global"])
    refused(neo_folder, capsys, ValueError, "'attention_layers'", "contradicts", "'attention_types'")


@pytest.mark.parametrize("rope, says", [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}}, "'yarn'"),
    ({"rope_scaling": "linear"}, "rope_scaling"), ({"rope_parameters": [0.5]}, "rope_parameters"),
    ({"rope_scaling": {"type": ["linear"]}}, "rope_type")], ids=str)
def test_scaled_rotation(neox_folder, capsys, rope, says):
    """Ignored, positions would be off by a factor and the text still fluent."""
    change_config(neox_folder, **rope)
    refused(neox_folder, capsys, ValueError, "rope_", says)


@pytest.mark.parametrize("changes, says", [
    ({"rotary_pct": 0.375}, "3 of 8 dims"), ({"rotary_pct": 0.0}, "0 of 8"), ({"rotary_pct": 1.5}, "12 of 8"),
    ({"rotary_pct": -0.5}, "supported: an even number"), ({"rotary_pct": NAN}, "rotary_pct"),
    ({"rotary_pct": "0.5"}, "must be float"), ({"rotary_emb_base": 0}, "above 0"),
    ({"rotary_emb_base": "10000"}, "must be float"),
    ({"rope_parameters": {"partial_rotary_factor": 0.375}}, "3 of 8 dims")], ids=str)
def test_rotary_dims(neox_folder, capsys, changes, says):
    """Dims rotate in pairs."""
    change_config(neox_folder, **changes)
    refused(neox_folder, capsys, ValueError, "'rotary_", says)


# ------------------------------------------------------------------------------------------------
# Weight files
# ------------------------------------------------------------------------------------------------

def official(folder):
    """The tensors of the folder, which then holds none."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    (folder / "model.safetensors").unlink()
    return tensors


def write_index(folder, weight_map, **more):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **more}))


def test_no_weights(folder, capsys):
    official(folder)
    refused(folder, capsys, FileNotFoundError, "no weights in", str(folder), "model.safetensors",
            "pytorch_model.bin.index.json")


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": ["a.safetensors"]},
                                   {"weight_map": {"transformer.wte.weight": 1}}], ids=str)
def test_an_index_without_a_map(folder, capsys, index):
    official(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, capsys, ValueError, "model.safetensors.index.json", "'weight_map'")


def test_a_missing_shard(folder, capsys):
    """The disk was full, or git-lfs was not there: which file to get is in the error."""
    tensors = official(folder)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    write_index(folder, {name: file for file, part in parts.items() for name in part})
    AutoModelForCausalLM.from_pretrained(folder)           # whole, it loads
    (folder / "b.safetensors").unlink()
    refused(folder, capsys, FileNotFoundError, "shard", "missing", "b.safetensors")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "sub/../../outside.safetensors", "{absolute}", "..", "", "."])
def test_a_shard_outside_the_folder(folder, capsys, shard):
    """An index is data from the network: it must not say which files of this computer are read."""
    tensors, outside = official(folder), folder.parent / "outside.safetensors"
    save_file(tensors, outside)
    shard = shard.format(absolute=outside)
    write_index(folder, dict.fromkeys(tensors, shard))
    refused(folder, capsys, ValueError, "outside its folder", repr(shard)[:60])


@pytest.mark.parametrize("cut", ["nothing", "length", "length only", "header", "no data", "data", "last byte"])
def test_truncated_safetensors(folder, capsys, cut):
    """A download that broke off.  Every cut is noticed, and the file is named."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    keep = {"nothing": 0, "length": 5, "length only": 8, "header": header // 2, "no data": header,
            "data": (header + len(raw)) // 2, "last byte": len(raw) - 1}[cut]
    path.write_bytes(raw[:keep])
    refused(folder, capsys, ValueError, str(path), "not a whole safetensors file")


@pytest.mark.parametrize("family", FAMILIES)
def test_corrupt_safetensors_headers(family, tmp_path):
    """One byte of the header at random, 60 times: refused with a reason, or what it says is unchanged."""
    working_copy(family, tmp_path)
    path = tmp_path / "model.safetensors"
    raw, draw, refusals = path.read_bytes(), random.Random(0), 0
    header = 8 + int.from_bytes(raw[:8], "little")
    right = good_model(family).state_dict()
    for _ in range(60):
        damaged = bytearray(raw)
        damaged[draw.randrange(header)] = draw.choice([draw.randrange(256), draw.choice(b'0123456789FIU"[]{},:')])
        path.write_bytes(damaged)
        try:
            state = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
        except ValueError as error:
            refusals += 1
            assert str(tmp_path) in str(error)
        else:
            assert all(torch.equal(state[name], right[name]) for name in right)
    assert refusals > 30


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_truncated_bin(folder, capsys, zipped):
    """The same for pickles, of both kinds, cut at 20 places."""
    tensors, path = official(folder), folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    AutoModelForCausalLM.from_pretrained(folder)           # whole, it loads
    raw = path.read_bytes()
    for keep in range(0, len(raw) - 1, len(raw) // 20):
        path.write_bytes(raw[:keep])
        with pytest.raises(ValueError) as caught:
            AutoModelForCausalLM.from_pretrained(folder)
        assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    refused(folder, capsys, ValueError, str(path))


class Trap:
    """Unpickled, it makes a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_code_in_a_pickle_does_not_run(folder, capsys, zipped):
    """A checkpoint is data from the network.  The trap is shown to be a real one first."""
    tensors, sprung, path = official(folder), folder / "sprung", folder / "pytorch_model.bin"
    torch.save(tensors | {"trap": Trap(sprung)}, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)
    assert sprung.exists()
    sprung.rmdir()
    refused(folder, capsys, ValueError, str(path), "refused", "could run code")
    assert not sprung.exists()


@pytest.mark.parametrize("content, says", [
    ([1, 2], "holds a list"), ({"model": {"a": 1}}, "its entry 'model' is of type dict"), ({"step": 3}, "its entry 'step' is of type int"),
    ({"epoch": 1, "state_dict": {"a": torch.zeros(1)}}, "has one in its entry 'state_dict'"), ({1: torch.zeros(2)}, "its entry 1 is of type Tensor"),
    ({"model": {"a": torch.zeros(1)}}, "has one in its entry 'model': save that entry by itself"),
    (torch.zeros(3), "holds a Tensor")], ids=["list", "nested", "number", "run", "no name", "inside", "tensor"])
def test_a_bin_of_something_else(folder, capsys, content, says):
    """Such as a training checkpoint with the optimizer's state in it."""
    official(folder)
    torch.save(content, folder / "pytorch_model.bin")
    refused(folder, capsys, ValueError, f"pytorch_model.bin must hold a dict of tensors, but {says}")


def test_a_bin_that_is_a_plain_pickle(folder, capsys):
    official(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    refused(folder, capsys, ValueError, "pytorch_model.bin")


def test_tensors_that_do_not_fit_are_listed_together(folder, capsys):
    """One error with all of them: fixing a conversion script name by name takes a day."""
    tensors = official(folder)
    base = "transformer" if (folder / "vocab.json").exists() else "gpt_neox"
    layers, mlp = {"transformer": ("h", "c_fc"), "gpt_neox": ("layers", "dense_h_to_4h")}[base]
    final = {"transformer": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}[base]
    one, two = f"{base}.{layers}.0.mlp.{mlp}.weight", f"{base}.{layers}.1.mlp.{mlp}.bias"
    tensors[one] = tensors[one].T.contiguous()
    tensors[two] = tensors[two].to(torch.int8)
    tensors[f"{base}.{layers}.2.mlp.{mlp}.bias"] = torch.zeros(48)         # there is no layer 2
    tensors["score.weight"] = torch.zeros(2, 16)
    del tensors[f"{final}.weight"], tensors[f"{final}.bias"]
    save_file(tensors, folder / "model.safetensors")
    refused(folder, capsys, ValueError, "do not fit its config.json",
            f"tensor {one} has shape (16, 48), expected (48, 16)", f"tensor {two} holds torch.int8, expected floating point",
            f"unexpected tensor {base}.{layers}.2.mlp.{mlp}.bias (48,)", "unexpected tensor score.weight (2, 16)",
            f"missing tensor {final}.weight (16,)", f"missing tensor {final}.bias (16,)", lines=7)


def test_a_tensor_in_two_shards(folder, capsys):
    """Which of them is right cannot be known."""
    tensors = official(folder)
    name = sorted(tensors)[0]
    save_file(tensors, folder / "a.safetensors")
    save_file({name: tensors[name] + 1}, folder / "b.safetensors")
    write_index(folder, {**dict.fromkeys(tensors, "a.safetensors"), "again": "b.safetensors"})
    refused(folder, capsys, ValueError, f"{name} is there twice")


def test_weights_of_another_size(folder, capsys):
    """config.json of one model beside the weights of another."""
    change_config(folder, vocab_size=300)
    refused(folder, capsys, ValueError, "has shape (264, 16), expected (300, 16)",
            lines=1 if (folder / "vocab.json").exists() else 3)


@pytest.mark.parametrize("name, says", [
    ("/no/such/folder", "no folder /no/such/folder"), ("./none", "no folder ./none"), ("a/b/c", "no folder a/b/c")],
    ids=repr)
def test_no_such_folder(capsys, name, says, monkeypatch, tmp_path):
    """Told apart from a hub id without asking the network."""
    monkeypatch.chdir(tmp_path)
    assert generate.main(["hi", "--model", name]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and says in err and err.count("\n") == 1


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(NotADirectoryError, match="is a file: give the folder"):
        AutoModelForCausalLM.from_pretrained(folder / "model.safetensors")


def test_a_revision_of_a_folder(folder):
    """A folder has no branches: loading it all the same would be another training step than asked for."""
    AutoModelForCausalLM.from_pretrained(folder, revision="main")
    with pytest.raises(ValueError, match="revision 'step3000' means something on the hub"):
        AutoModelForCausalLM.from_pretrained(folder, revision="step3000")


# ------------------------------------------------------------------------------------------------
# What the model is asked
# ------------------------------------------------------------------------------------------------

@pytest.fixture(params=FAMILIES)
def model(request):
    """A working model; computing anything while an error is expected fails the test."""
    model = good_model(request.param)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, eos_token_id=None).shape == (1, 5)
    hook = model.transformer.embed.register_forward_pre_hook(lambda *_: pytest.fail("computed before the check"))
    yield model
    hook.remove()


@pytest.mark.parametrize("ids, says", [
    (torch.tensor([[1, V]]), f"from 1 to {V}"), (torch.tensor([[-1, 5]]), "from -1 to 5"),
    (torch.tensor([[1.0, 2.0]]), "float32"), (torch.tensor([[True]]), "bool"), (torch.tensor([1, 2]), "shape (2,)"),
    (torch.tensor(3), "shape ()"), (torch.zeros(1, 2, 3, dtype=torch.long), "shape (1, 2, 3)"),
    (torch.zeros(1, 0, dtype=torch.long), "empty"), (torch.zeros(0, 3, dtype=torch.long), "empty"),
    ([[1, 2]], "list"), ("text", "str"), (None, "NoneType")], ids=lambda x: "" if torch.is_tensor(x) else str(x))
def test_ids(model, ids, says):
    """On a GPU an id out of range kills the process; ids as floats are a forgotten .long()."""
    for ask in (model, model.transformer, model.generate):
        with pytest.raises(ValueError) as caught:
            ask(ids)
        assert says in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16], ids=str)
def test_ids_of_a_narrow_kind(model, dtype):
    """Data sets are stored as uint16: torch's look-up takes int32 and int64, so say what to call."""
    for ask in (model, model.generate):
        with pytest.raises(ValueError, match=str(dtype)):
            ask(torch.tensor([[1, 2, 3]], dtype=dtype))


def test_ids_of_32_bits():
    for family in FAMILIES:
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(good_model(family)(ids.int()).logits, good_model(family)(ids).logits)


def test_more_positions_than_learned():
    """GPT-Neo has no row for position 2048 (here 32): numbers, not an index error.  NeoX has no limit."""
    neo, neox = (good_model(family) for family in FAMILIES)
    ids = torch.ones(1, P, dtype=torch.long)
    assert neo(ids).logits.shape == (1, P, V)
    assert neo.generate(ids[:, :P - 3], max_new_tokens=3, eos_token_id=None).shape == (1, P)
    for ask, says in ((lambda: neo(torch.ones(1, P + 1, dtype=torch.long)), "33 tokens"),
                      (lambda: neo.generate(ids, max_new_tokens=1), "32 prompt tokens + 1 new ones = 33"),
                      (lambda: neo.generate(ids[:, :9], max_new_tokens=24), "9 prompt tokens + 24 new ones = 33"),
                      (lambda: neo.generate(ids[:, :9], max_length=33), "33"),
                      (lambda: neo(ids[:, :1], position_ids=torch.tensor([[P]])), "position_ids range from 32 to 32")):
        with pytest.raises(ValueError) as caught:
            ask()
        assert says in str(caught.value) and "position" in str(caught.value)
    assert neox.generate(ids, max_new_tokens=5, eos_token_id=None).shape == (1, P + 5)


SAMPLING = [
    (dict(temperature=0), "temperature"), (dict(temperature=-0.5), "temperature"), (dict(temperature=NAN), "temperature"),
    (dict(temperature=INF), "temperature"), (dict(temperature="1"), "temperature"),
    (dict(top_p=0), "top_p"), (dict(top_p=0.0), "top_p"), (dict(top_p=1.5), "top_p"), (dict(top_p=NAN), "top_p"),
    (dict(top_p=-0.1), "top_p"), (dict(top_k=-1), "top_k"), (dict(top_k=2.5), "top_k")]
ALWAYS = [
    (dict(repetition_penalty=0), "repetition_penalty"), (dict(repetition_penalty=-1.0), "repetition_penalty"),
    (dict(repetition_penalty=NAN), "repetition_penalty"),
    (dict(max_new_tokens=0), "max_new_tokens"), (dict(max_new_tokens=-3), "max_new_tokens"),
    (dict(max_length=4), "4 tokens"), (dict(max_length=2), "4 tokens"), (dict(max_length=0), "4 tokens"),
    (dict(num_return_sequences=0), "num_return_sequences"), (dict(num_return_sequences=2), "do_sample")]


@pytest.mark.parametrize("settings, says", SAMPLING, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_sampling_settings(model, settings, says):
    """Softmax of scores over nothing, or over zero, is NaN, and then any token."""
    ids = torch.tensor([[1, 2, 3, 4]])
    with pytest.raises(ValueError, match=says):
        model.generate(ids, do_sample=True, max_new_tokens=2, **settings)


@pytest.mark.parametrize("settings, says", ALWAYS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_settings(model, settings, says):
    with pytest.raises(ValueError, match=says):
        model.generate(torch.tensor([[1, 2, 3, 4]]), **settings)


@pytest.mark.parametrize("settings", [dict(temperature=0), dict(top_p=0), dict(top_k=-1)], ids=str)
def test_greedy_does_not_read_the_sampling_settings(settings):
    """A checkpoint's generation_config.json may say temperature 0 and mean greedy."""
    for family in FAMILIES:
        ids = torch.tensor([[1, 2, 3]])
        plain = good_model(family).generate(ids, max_new_tokens=4, eos_token_id=None)
        assert torch.equal(good_model(family).generate(ids, max_new_tokens=4, eos_token_id=None, **settings), plain)


@pytest.mark.parametrize("off", [dict(top_k=0), dict(top_k=None), dict(top_p=None), dict(top_k=10 ** 6)], ids=str)
def test_filters_that_are_off(off):
    """0 and None mean off; a top_k beyond the vocabulary is all of it."""
    model = good_model("gpt_neox")
    drawn = [model.generate(torch.tensor([[1, 2, 3]]), do_sample=True, max_new_tokens=4, eos_token_id=None,
                            generator=torch.Generator().manual_seed(1), **{"top_k": 0, **settings})
             for settings in ({}, off)]
    assert torch.equal(*drawn)


def test_both_lengths_warn():
    """As in the reference: max_new_tokens wins, and says so."""
    with pytest.warns(UserWarning, match="max_new_tokens=2 and max_length=30.*max_new_tokens wins"):
        ids = good_model("gpt_neo").generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, max_length=30, eos_token_id=None)
    assert ids.shape == (1, 5)


@pytest.mark.parametrize("shape", [(1, 3), (1, 5), (2, 4), (4,), (1, 1, 4), (1, 1, 4, 4)], ids=str)
def test_a_mask_of_the_wrong_shape(model, shape):
    """Broadcast, a mask for one row would mask the others too."""
    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.ones(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=r"attention_mask must have shape .* \(1, 4\)"):
        model.generate(ids, mask, max_new_tokens=2)
    model.transformer.embed._forward_pre_hooks.clear()     # in forward the check comes after the look-up
    with pytest.raises(ValueError, match=r"attention_mask must have shape .* \(1, 4\)"):
        model(ids, mask)


def test_an_unknown_backend():
    """Never a silent substitute: another backend has other rounding, or another speed."""
    for family in FAMILIES:
        for name in ("magic", "", "SDPA", None):
            if name is not None:                           # which is "auto" there, as in transformers
                with pytest.raises(ValueError, match="unknown attention backend"):
                    AutoModelForCausalLM.from_pretrained(good(family), attn_implementation=name)
            with pytest.raises(ValueError, match="unknown attention backend"):
                good_model(family).set_attn_implementation(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_maps_of_a_fused_backend(family):
    """sdpa asked for by name cannot show what it never forms; auto takes naive."""
    ids = torch.tensor([[1, 2, 3]])
    fused = AutoModelForCausalLM.from_pretrained(good(family), attn_implementation="sdpa")
    assert fused(ids).logits.isfinite().all()
    with pytest.raises(ValueError, match="'sdpa' never forms the attention weights"):
        fused(ids, output_attentions=True)
    auto = AutoModelForCausalLM.from_pretrained(good(family))(ids, output_attentions=True)
    assert len(auto.attentions) == 2 and auto.attentions[0].shape == (1, 2, 3, 3)


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, says", [
    (["--temperature", "-1"], "temperature"), (["--temperature", "nan"], "temperature"),
    (["--temperature", "inf"], "temperature"), (["--top-p", "0"], "top_p"), (["--top-p", "1.5"], "top_p"),
    (["--top-p", "nan"], "top_p"), (["--top-k", "-1"], "top_k"), (["--repetition-penalty", "0"], "repetition_penalty"),
    (["--repetition-penalty", "nan"], "repetition_penalty"), (["--max-new-tokens", "0"], "max_new_tokens"),
    (["--backend", "magic"], "unknown attention backend 'magic'"), (["--dtype", "float17"], "float17"),
    (["--device", "abacus"], "abacus"), (["--revision", "step3000"], "step3000")], ids=" ".join)
def test_options(folder, capsys, options, says):
    """One line on standard error, status 2, nothing on standard output that a script would take for text."""
    assert generate.main(["hi", "--model", str(folder), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and says in err and err.count("\n") == 1, err


def test_an_empty_prompt(folder, capsys):
    """There is nothing to continue, and no begin token is made up."""
    assert generate.main(["", "--model", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "empty" in err and err.count("\n") == 1


@pytest.mark.parametrize("prompt, options", [("hi", ["--max-new-tokens", "31"]), ("x" * 33, []), ("x" * 32, [])],
                         ids=["too many new", "too long", "just full"])
def test_beyond_the_positions(neo_folder, capsys, prompt, options):
    """The numbers, before anything is computed or written."""
    assert generate.main([prompt, "--model", str(neo_folder), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "33" in err and "positions" in err and err.count("\n") == 1


def test_temperature_zero_is_greedy(folder, capsys):
    """What other tools call temperature 0."""
    texts = []
    for options in (["--temperature", "0"], ["--greedy"]):
        assert generate.main(["hi", "--model", str(folder), "--max-new-tokens", "12", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def test_no_tokenizer(folder, capsys):
    """Weights copied without it."""
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
    assert generate.main(["hi", "--model", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "tokenizer.json" in err and err.count("\n") == 1


@pytest.mark.parametrize("folder", ["gpt_neox"], indirect=True)
@pytest.mark.parametrize("number", ["9" * 23, "9" * 17, str(2**63 - 5)])
def test_more_tokens_than_any_memory_holds(folder, capsys, number):
    """GPT-NeoX has no last position, so the length is only bounded by the cache."""
    assert generate.main(["hi", "--model", str(folder), "--max-new-tokens", number]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: there is no room") and err.count("\n") == 1 and len(err) < 300


@pytest.mark.parametrize("options", [["--interactive"], ["--score", "-"]], ids=" ".join)
def test_standard_input_that_cannot_be_read(options, tmp_path, capsys, monkeypatch):
    """Closed before or after Python began, or a folder."""
    argv = [*options, "--model", str(good("gpt_neo"))]
    with open(os.devnull) as closed:
        pass
    folder = types.SimpleNamespace(buffer=types.SimpleNamespace(read=lambda: open(tmp_path)), readline=lambda: open(tmp_path))
    for stdin, says in ((None, "closed"), (closed, "closed"), (folder, "directory")):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert generate.main(argv) == 2
        out, err = capsys.readouterr()
        err = err.removeprefix("prompt> ")
        assert out == "" and err.startswith("error: ") and says in err and err.count("\n") == 1, err


def test_standard_output_that_cannot_be_written(capsys, monkeypatch):
    """Closed: there is no place for the text, and nothing pretends that there was."""
    monkeypatch.setattr(sys, "stdout", None)
    assert generate.main(["hi", "--model", str(good("gpt_neo"))]) == 2
    assert capsys.readouterr().err == "error: standard output is closed: there is nowhere to write the text\n"
    assert compare.main(["nowhere", "--lengths", "2"]) == 2
    assert capsys.readouterr().err == "error: standard output is closed: there is nowhere to write the result\n"


def test_a_closed_standard_error_stops_nothing(monkeypatch, capsys, tmp_path):
    """Standard output then still holds the text alone."""
    monkeypatch.setattr(sys, "stderr", None)
    demo = str(ROOT / "checkpoints" / "demo-neo")
    assert generate.main(["HAMLET.", "--greedy", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out == "HAMLET.\n\n"
    monkeypatch.setattr(sys, "stderr", None)
    assert compare.main([demo, "--lengths", "2", "--save-ours", str(tmp_path / "ours.safetensors")]) == 0


@pytest.mark.parametrize("encoding, begins", [("cp1252", "é?–".encode("cp1252")), ("ascii", b"???"), ("utf-8", "é猫–".encode())])
def test_standard_output_in_another_encoding(encoding, begins, capsys, monkeypatch):
    """What the encoding does not have is a question mark, and a line says which characters and what to do."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert generate.main(["é猫–", "--model", str(good("gpt_neox")), "--max-new-tokens", "3", "--greedy"]) == 0
    assert sys.stdout.buffer.getvalue().startswith(begins)
    note = [line for line in capsys.readouterr().err.splitlines() if line.startswith("standard output is")]
    assert len(note) == (encoding != "utf-8") and all(encoding in line and "猫" in line and "utf-8" in line for line in note)


def test_prompts_of_other_bytes(capsys, monkeypatch):
    """Not UTF-8 on the command line is refused; in a dialogue the next line is read."""
    bad = os.fsdecode(b"caf\xe9")
    for options in ([bad], [bad, "--top", "3"], ["hi", "--stop", bad]):
        assert generate.main([*options, "--model", str(good("gpt_neo"))]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "is not UTF-8 at character" in err and err.count("\n") == 1
    lines = b"\xef\xbb\xbfone\r\n  \r\ncaf\xe9\ntwo\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    monkeypatch.setattr(generate, "text_until", lambda pieces, stops: ["+"])
    assert generate.main(["--interactive", "--model", str(good("gpt_neo")), "--max-new-tokens", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == ["one+", "two+"] and "\r" not in out and err.count("is not UTF-8 at character 4") == 1


def test_a_seed_that_is_no_seed(capsys):
    with pytest.raises(SystemExit) as caught:
        generate.main(["hi", "--seed", str(2**64)])
    assert caught.value.code == 2 and "--seed must fit into 64 bits" in capsys.readouterr().err


def test_another_checkpoints_tokenizer(folder, tmp_path):
    """TinyStories' folder on the hub has none of its own; --revision is the model's."""
    own = tmp_path / "tokenizer"
    own.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        if (folder / name).exists():
            (folder / name).rename(own / name)
    shutil.copy(folder / "config.json", own)
    for options in ([], ["--top", "3"]):
        assert generate.main(["hi", "--model", str(folder), "--tokenizer", str(own), *options]) == 0
    (tmp_path / "text").write_text("hello")
    assert generate.main(["--score", str(tmp_path / "text"), "--model", str(folder), "--tokenizer", str(own)]) == 0


GENERATION = [({"num_beams": 4}, "num_beams=4"), ({"typical_p": 0.5}, "typical_p=0.5"), ({"eos_token_id": "x"}, "eos_token_id"),
              ({"suppress_tokens": ["a"]}, "suppress_tokens"), ({"future": 1}, "'future'"), ({"top_k": -1}, "top_k"),
              ({"stop_strings": [1]}, "stop_strings")]


@pytest.mark.parametrize("settings, says", GENERATION, ids=str)
def test_generation_config_that_cannot_be_obeyed(folder, capsys, settings, says):
    """One line that names the file and the setting."""
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert generate.main(["hi", "--model", str(folder), "--max-new-tokens", "2"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and "generation_config.json" in err and err.count("\n") == 1 and len(err) < 400, err


def test_generation_config_on_the_command_line(folder, capsys):
    """What the file says holds where no option says otherwise; the command line gives the tokenizer to stop_strings."""
    path = folder / "generation_config.json"
    outs = []
    for settings, options in (({}, ["--top-k", "1"]), ({"top_k": 1}, []), ({"temperature": 0}, []), ({"min_p": 1.0}, []),
                              ({"top_k": 1}, ["--top-k", "50", "--min-p", "1"])):
        path.write_text(json.dumps(settings))
        assert generate.main(["hi", "--model", str(folder), "--max-new-tokens", "12", *options]) == 0
        outs.append(capsys.readouterr().out)
    assert len(set(outs)) == 1
    path.write_text(json.dumps({"stop_strings": "i", "no_repeat_ngram_size": 1}))
    assert generate.main(["hi", "--model", str(folder), "--max-new-tokens", "12"]) == 0


def test_ctrl_c_while_generating(neox_folder):
    """What was written stays, the shell sees 130, and nobody sees a traceback."""
    change_config(neox_folder, eos_token_id=None)
    (neox_folder / "generation_config.json").unlink()
    process = subprocess.Popen(
        [sys.executable, "generate.py", "hi", "--model", neox_folder, "--max-new-tokens", "200000"], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))   # ignored in a shell's background
    text, deadline = b"", time.monotonic() + 60
    while len(text) <= 10 and time.monotonic() < deadline:
        text += os.read(process.stdout.fileno(), 4096)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in err, err
    assert (text + rest).startswith(b"hi") and len(text + rest) > 10


@pytest.mark.parametrize("option", ["--max-new-tokens", "--seed", "--num-samples", "--no-such-option", "--temperature"])
def test_an_option_of_thousands_of_characters(option, capsys):
    """argparse would repeat all of them."""
    with pytest.raises(SystemExit) as caught:
        generate.main(["hi", f"{option}={'9' * 5000}x"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and option in line and len(line) <= 300
