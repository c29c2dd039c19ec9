"""Weight files that are odd rather than broken: loaded as the reference does, or refused in one short line.

Every refusal names the file, and comes before much time or memory has gone.
"""

import json
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers import ours, random_case, saved
from load_weights import NAMES, AutoModelForCausalLM, problem_text

CASE = random_case(1)                                      # GPT-NeoX


@pytest.fixture
def folder(tmp_path):
    """config.json alone; weights come from the test."""
    (tmp_path / "config.json").write_bytes((saved(CASE) / "config.json").read_bytes())
    return tmp_path


def weights():
    return {name: x.clone() for name, x in load_file(saved(CASE) / "model.safetensors").items()}


def refusal(folder, *words):
    with pytest.raises((ValueError, OSError)) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.isprintable() and len(message.replace(str(folder), "")) <= 300, message


def name_of_a_matrix(tensors):
    return next(name for name in sorted(tensors) if name.endswith("dense_h_to_4h.weight"))


# --- tensors of odd kinds in a .bin -----------------------------------------------------------------

ODD = {
    "sparse": lambda x: x.to_sparse(), "csr": lambda x: x.to_sparse_csr(), "meta": lambda x: x.to("meta"),
    "complex": lambda x: torch.complex(x, x), "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "int8": lambda x: x.to(torch.int8), "bool": lambda x: x > 0, "float8": lambda x: x.to(torch.float8_e4m3fn),
    "float4": lambda x: torch.zeros(x.shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_are_refused_by_name(kind, folder):
    tensors = weights()
    name = name_of_a_matrix(tensors)
    tensors[name] = ODD[kind](tensors[name])
    torch.save(tensors, folder / "pytorch_model.bin")
    refusal(folder, name)


EQUAL = {
    "Parameter": lambda x: torch.nn.Parameter(x), "transposed": lambda x: x.T.contiguous().T,
    "part of a larger one": lambda x: torch.cat([x, x])[:len(x)], "float64": lambda x: x.double(),
    "float16": lambda x: x.half(), "negated view": lambda x: torch._neg_view(x),
    "requires grad": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("kind", EQUAL)
def test_tensors_that_the_reference_reads_are_read_alike(kind, folder):
    tensors = weights()
    name = name_of_a_matrix(tensors)
    tensors[name] = EQUAL[kind](tensors[name])
    torch.save(tensors, folder / "pytorch_model.bin")
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                             attn_implementation="eager")
    with torch.no_grad():
        mine = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="naive")(CASE.ids).logits
        assert torch.equal(mine, theirs(CASE.ids).logits)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "I64", "U8", "BOOL", "C64"])
def test_safetensors_of_other_dtypes_are_refused_while_loading(dtype, folder):
    """Such a tensor loads, and the first forward pass would fail on it."""
    tensors = weights()
    name = name_of_a_matrix(tensors)
    save_file(tensors, folder / "model.safetensors")
    raw = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8:8 + length]), raw[8 + length:]
    begin, _ = header[name]["data_offsets"]
    bits = {"F4": 4, "I64": 64, "C64": 64}.get(dtype, 8)
    size = header[name]["shape"][0] * header[name]["shape"][1] * bits // 8
    del header[name]
    header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [len(data), len(data) + size]}
    del begin
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data + bytes(size))
    refusal(folder)


# --- time and memory -------------------------------------------------------------------------------

@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_of_very_many_names(zipped, folder):
    tensor = torch.zeros(1)
    torch.save({f"name.{i}": tensor for i in range(100_000)}, folder / "pytorch_model.bin",
               _use_new_zipfile_serialization=zipped)
    begun = time.process_time()
    refusal(folder, "pytorch_model.bin", "more tensors than any model has")
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("body", [b"(" * 900_000 + b".", b"\x80\x02)" + b"\x85" * 900_000 + b"."], ids=["marks", "tuples"])
def test_a_pickle_of_very_many_steps(body, folder):
    """Each step is one byte, and unpickling them takes seconds."""
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", body)
    begun = time.process_time()
    refusal(folder, "pytorch_model.bin", "more tensors than any model has")
    assert time.process_time() - begun < 2


def test_a_compressed_bin_is_refused_before_it_is_unpacked(folder):
    path = folder / "pytorch_model.bin"
    torch.save(weights(), folder / "plain")
    with zipfile.ZipFile(folder / "plain") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
        bomb.writestr("archive/data/99", bytes(50_000_000))
    refusal(folder, str(path), "compressed")


def test_many_entries(folder):
    """Python's zipfile alone would take seconds to list them."""
    path = folder / "pytorch_model.bin"
    entry = b"PK\x01\x02" + bytes(42)
    count = 200_000
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, count * len(entry), 0, 0)
    path.write_bytes(entry * count + end)
    begun = time.process_time()
    refusal(folder, str(path))
    assert time.process_time() - begun < 2


# --- names -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix, words", [
    ("module.", ["'module.'", "DataParallel"]), ("_orig_mod.", ["'_orig_mod.'", "torch.compile"]),
    ("_orig_mod.module.", ["'_orig_mod.'"]), ("model.", ["'model.'"])])
def test_a_prefix_before_every_name_is_one_line(prefix, words, folder):
    save_file({prefix + name: x for name, x in weights().items()}, folder / "model.safetensors")
    refusal(folder, *words)


@pytest.mark.parametrize("ending, tool", [(".qweight", "GPTQ"), (".qzeros", "AWQ"), (".weight.absmax", "bitsandbytes"),
                                          (".SCB", "bitsandbytes")])
def test_quantized_weights_are_one_line(ending, tool, folder):
    tensors = weights()
    for name in [name for name in tensors if name.endswith(".dense.weight")]:
        tensors[name.removesuffix(".weight") + ending] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    refusal(folder, "quantized by", tool)


def test_a_long_list_is_cut():
    problems = [f"missing tensor a.{i} (3, 4)" for i in range(500)]
    text = problem_text(problems, NAMES["gpt_neox"])
    assert len(text.splitlines()) == 12 and "and 490 more" in text


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "two\nlines", "x" * 2000, "\u202e"])
def test_names_are_shown_harmlessly(name, folder):
    tensors = weights() | {name: torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors")
    refusal(folder, "unexpected tensor")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name + ".safetensors"}}))
    refusal(folder, "names a shard")


# --- the reference's arguments ---------------------------------------------------------------------

@pytest.mark.parametrize("given", [
    {"cache_dir": "/nowhere"}, {"local_files_only": True}, {"token": "x"}, {"token": True}, {"device_map": "cpu"},
    {"device_map": None}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}, {"trust_remote_code": False},
    {"use_safetensors": True}, {"use_safetensors": None}, {"subfolder": ""}, {"force_download": False},
    {"device_map": torch.device("cpu"), "device": "cpu"}], ids=str)
def test_arguments_that_change_nothing(given):
    model = AutoModelForCausalLM.from_pretrained(saved(CASE), attn_implementation="naive", **given)
    with torch.no_grad():
        assert torch.equal(model(CASE.ids).logits, ours(CASE)(CASE.ids).logits)


@pytest.mark.parametrize("given", [
    {"trust_remote_code": True}, {"device_map": {"transformer.h.0": 0}}, {"device_map": "balanced"},
    {"load_in_8bit": True}, {"quantization_config": {"bits": 4}}, {"subfolder": "x"}, {"variant": "fp16"},
    {"use_safetensors": "yes"}, {"from_tf": True}, {"low_cpu_mem_usage": "yes"}, {"tp_plan": "rows"},
    {"no_such_argument": 1}, {"device_map": "cpu", "device": "meta"}, {"dtype": torch.float8_e4m3fn},
    {"dtype": "int8"}], ids=str)
def test_arguments_that_are_refused_by_name(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        AutoModelForCausalLM.from_pretrained(saved(CASE), **given)


def test_use_safetensors_chooses_the_file(folder):
    tensors = weights()
    torch.save({name: x + 1 for name, x in tensors.items()}, folder / "pytorch_model.bin")
    save_file(tensors, folder / "model.safetensors")
    first = {given: next(AutoModelForCausalLM.from_pretrained(folder, use_safetensors=given).parameters())[0, 0].item()
             for given in (None, True, False)}
    assert first[None] == first[True] == pytest.approx(first[False] - 1)
    Path(folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="looked for model.safetensors, model.safetensors.index.json"):
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
