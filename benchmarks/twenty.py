"""GPT-NeoX-20B: its true shape, with random weights of 4 or 8 bits, on a machine without a GPU.

    python benchmark.py 20b                       int4, a prompt of 128 tokens, 24 new ones
    python benchmark.py 20b --layers 4            the same with 4 of the 44 layers, for a first look

The folder has the official layout: config.json and an index of 46 shards in float16, 41 GB.  They
take only 2 GB on the disk, because the shards of all 44 layers are hard links to one file, which
holds layer 0.  While loading, `read_shard` gives the tensors of each shard the number of its layer.
Everything else is from_pretrained as it is: every layer is read, quantized and kept by itself.

After the first layer, the files come from the system's cache, so the load time is the time of
quantizing.  The time that the disk itself needs to read the files is printed beside it.
Every figure is printed as soon as it is known, so an interrupted run has shown the earlier ones.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

import load_weights
from benchmarks.generation import bandwidth
from benchmarks.shapes import SHAPES
from generate import peak_memory
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
        tensors = {name: random_tensor(name, names[name].shape) for name in part}
        save_file(tensors, Path(folder, file))
    for file in files[2:-1]:
        os.link(Path(folder, files[1]), Path(folder, file))
    index = {"weight_map": {name: file for file, part in zip(files, parts) for name in part}}
    Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
    fields = config.to_dict() | {"torch_dtype": "float16"}
    Path(folder, "config.json").write_text(json.dumps(fields))


def random_tensor(name, shape):
    """Matrices and biases N(0, 0.02²), LayerNorms' weights 1, float16."""
    norm = "norm" in name and name.endswith("weight")
    return torch.ones(shape).half() if norm else torch.randn(shape).mul_(0.02).half()


def read_shard(path, apart=False, read=load_weights.read_tensors):
    """What load_weights.read_tensors yields, under the names that the index has for this shard."""
    _, number, _, count = path.stem.split("-")
    for name, tensor in read(path, apart):
        yield name.replace(".layers.0.", f".layers.{int(number) - 2}."), tensor
    print(f"  shard {int(number)} of {int(count)}, memory so far {memory():.1f} GiB", flush=True)


def memory():
    """The most memory that this process has ever held, in GiB."""
    return peak_memory(torch.device("cpu")) / 2**30


def disk_rate(folder):
    """How many bytes a second the disk reads of the largest file.

    None on a system that cannot drop the file from its cache first.
    """
    path = max(Path(folder).glob("*.safetensors"), key=os.path.getsize)
    with open(path, "rb", buffering=0) as file:
        with contextlib.suppress(AttributeError):          # not every system has it
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            while file.read(2**24):
                pass
            return os.path.getsize(path) / (time.perf_counter() - start)
    return None


def load(folder, kind, dtype, report):
    """The model, with the time that loading took, and what bounded it."""
    wall, processor = time.perf_counter(), time.process_time()
    with mock.patch.object(load_weights, "read_tensors", read_shard):
        model = AutoModelForCausalLM.from_pretrained(folder, weights=kind, torch_dtype=dtype)
    report("load, seconds", time.perf_counter() - wall)
    report("load, seconds of processor time", time.process_time() - processor)
    report("peak of loading, GiB", memory())
    return model


def generate(model, new_tokens, report):
    """Read a random prompt twice and generate after it -> the median of tokens a second.

    The first reading also compiles, so it is timed by itself.
    """
    ids = torch.randint(1, model.config.vocab_size, (1, PROMPT),
                        generator=torch.Generator().manual_seed(0))
    settings = Settings(max_new_tokens=new_tokens + 2, eos_token_id=None, pad_token_id=0)
    start = time.perf_counter()
    next(stream(model, ids, settings=settings, compile=True))
    report("first prompt, with compiling, seconds", time.perf_counter() - start)
    times = [time.perf_counter()]
    for _ in stream(model, ids, settings=settings, compile=True):
        times.append(time.perf_counter())
        seconds = times[-1] - times[-2]
        if len(times) == 2:
            report("prompt, tokens/s", PROMPT / seconds)
        else:
            print(f"  token {len(times) - 1} after {seconds:.2f} s", flush=True)
    seconds = [after - before for before, after in zip(times, times[1:])]
    report("first compiled token, seconds", seconds[1])
    report("tokens/s", 1 / statistics.median(seconds[2:]))
    report("tokens/s, the fastest", 1 / min(seconds[2:]))
    return 1 / statistics.median(seconds[2:])


def run(weights, dtype, new_tokens, layers):
    dtype, result = dtype or "bfloat16", {}
    config = SHAPES["gpt-neox-20b"]
    config = dataclasses.replace(config, num_hidden_layers=layers or config.num_hidden_layers)

    def report(name, value):
        result[name] = value
        print(f"{name:40s} {value:8.2f}", flush=True)

    print(f"\ngpt-neox-20b shape, {config.num_hidden_layers} layers, {weights}, the rest {dtype}",
          flush=True)
    report("read bandwidth of the memory, GB/s", (read := bandwidth()) / 1e9)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(config, folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        report("the files as they would be, GB", size / 1e9)
        if rate := disk_rate(folder):
            report("read rate of the disk, GB/s", rate / 1e9)
            report("least seconds to read the files", size / rate)
        model = load(folder, weights, dtype, report)
        step = sum(b.nbytes for layer in model.modules() if isinstance(layer, QuantizedLinear)
                   for b in layer.buffers())
        report("bytes of a step, GiB", step / 2**30)
        speed = generate(model, new_tokens, report)
    report("share of the bandwidth", step * speed / read)
    report("peak memory, GiB", memory())
    return result
