"""GPT-NeoX-20B: its true shape, with random weights of 4 or 8 bits, on a machine without a GPU.

    python benchmark.py 20b                       int4, a prompt of 128 tokens, 24 new ones

The folder has the official layout: config.json and an index of 46 shards in float16, 41 GB.  On the
disk are only 2 GB, because the shards of all 44 layers are hard links to one file, which holds layer
0.  While loading, `read_shard` gives the tensors of each shard the number of its layer.  Everything
else is from_pretrained as it is: every layer is read, quantized and kept by itself.

So the files come from the system's cache after the first layer, and the load time is that of
quantizing.  A load of 41 GB from a disk takes at least their size over the disk's speed.
"""

import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import load_weights
from benchmarks.common import in_fresh_process
from benchmarks.generation import bandwidth
from benchmarks.shapes import SHAPES
from load_weights import AutoModelForCausalLM, official_state
from neox import GPTNeoXForCausalLM
from quantize import QuantizedLinear
from sampling import Settings, stream

PROMPT = 128                                               # tokens


def write_folder(config, folder):
    """A checkpoint of this shape, with one shard for each layer and two for what is around them."""
    with torch.device("meta"):
        names = official_state(GPTNeoXForCausalLM(dataclasses.replace(config, num_hidden_layers=1)))
    layer = [name for name in names if ".layers.0." in name]
    head = ["embed_out.weight"]
    around = [name for name in names if name not in layer + head]
    layers = [[name.replace(".layers.0.", f".layers.{i}.") for name in layer]
              for i in range(config.num_hidden_layers)]
    parts = [around, *layers, head]
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for file, part in ((files[0], around), (files[1], layer), (files[-1], head)):
        save_file({name: random_tensor(name, names[name].shape) for name in part}, Path(folder, file))
    for file in files[2:-1]:
        os.link(Path(folder, files[1]), Path(folder, file))
    index = {"weight_map": {name: file for file, part in zip(files, parts) for name in part}}
    Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
    Path(folder, "config.json").write_text(json.dumps(config.to_dict() | {"torch_dtype": "float16"}))


def random_tensor(name, shape):
    """Matrices and biases N(0, 0.02²), LayerNorms' weights 1, float16."""
    norm = "norm" in name and name.endswith("weight")
    return torch.ones(shape).half() if norm else torch.randn(shape).mul_(0.02).half()


def read_shard(path, apart=False, read=load_weights.read_tensors):
    """What load_weights.read_tensors yields, under the names that the index has for this shard."""
    layer = int(path.name.split("-")[1]) - 2
    for name, tensor in read(path, apart):
        yield name.replace(".layers.0.", f".layers.{layer}."), tensor


def measure(folder, kind, dtype, new_tokens):
    """Load the folder, read a prompt, write new tokens: a dict of figures.  For a process of its own."""
    load_weights.read_tensors = read_shard
    wall, processor = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder, weights=kind, torch_dtype=dtype)
    found = {"load, seconds": time.perf_counter() - wall,
             "load, seconds of one core": time.process_time() - processor}
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    found["bytes of a step"] = sum(b.nbytes for layer in layers for b in layer.buffers())
    ids = torch.randint(1, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    times = [time.perf_counter()]
    for _ in stream(model, ids, settings=Settings(max_new_tokens=new_tokens + 2), compile=True):
        times.append(time.perf_counter())
    seconds = [after - before for before, after in zip(times, times[1:])]
    return found | {"prompt, tokens/s": PROMPT / seconds[0], "first compiled token, seconds": seconds[1],
                    "tokens/s": 1 / statistics.median(seconds[2:]), "best, tokens/s": 1 / min(seconds[2:])}


def run(weights, dtype, new_tokens):
    dtype = dtype or "bfloat16"
    read = bandwidth()
    with tempfile.TemporaryDirectory() as folder:
        write_folder(SHAPES["gpt-neox-20b"], folder)
        code = ("from benchmarks.twenty import measure\n"
                f"found = measure({folder!r}, {weights!r}, {dtype!r}, {new_tokens})")
        found = in_fresh_process(code, "found | {'peak, bytes': peak()}")
    found["share of the bandwidth"] = found["bytes of a step"] * found["tokens/s"] / read
    print(f"\ngpt-neox-20b shape, {weights}, the rest {dtype}; read bandwidth {read / 1e9:.1f} GB/s")
    for name, value in found.items():
        if "bytes" in name:
            name, value = name.replace("bytes", "GiB"), value / 2**30
        print(f"  {name:32s} {value:8.2f}", flush=True)
    return found
