"""What the Triton kernels compile to, without a GPU: counted and computed, not timed.

    python benchmark.py kernels

It prints two tables.  The first is read from the compiled code: registers, bytes spilled from them,
shared memory and tensor-core instructions of every kernel, for an A100 (sm_80) and an H100 (sm_90).
The second is computed from what the kernels visit: tiles, operations, bytes, and the least time in
which either GPU could do this at its published peak.  `python benchmark.py attention` measures the
time that a GPU really takes.
"""

import concurrent.futures
import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch

import attention as A

WIDTHS = (64, 80, 96, 128, 256)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Compute capability, shared memory that a block may have (CUDA programming guide), dense
# half-precision operations and bytes a second (NVIDIA's data sheets of the A100 80GB SXM and the
# H100 SXM).
GPUS = {"A100": (80, 163 * 1024, 312e12, 2.039e12), "H100": (90, 227 * 1024, 989e12, 3.35e12)}
KERNELS = {"forward": A.forward_kernel, "dq": A.dq_kernel, "dk, dv": A.dkv_kernel}
DOTS = {"forward": 2, "dq": 5, "dk, dv": 4}               # tl.dot for each tile: test_triton counts
# Rows of D numbers that a kernel reads or writes once for each row of its own side, and those that
# it reads for each row of a tile.
OWN = {"forward": 2, "dq": 3, "dk, dv": 4}                # q, o;  q, do, dq;  k, v, dk, dv
OTHER = {"forward": 2, "dq": 4, "dk, dv": 2}              # k, v;  k, v in two sweeps;  q, do
TENSORS = {"forward": 4, "dq": 5, "dk, dv": 6}            # those that must be read or written once


# ------------------------------------------------------------------------------------------------
# Read off the compiled code
# ------------------------------------------------------------------------------------------------

def source(kernel, dtype, D, padded):
    """The kernel as a launch specialises it: addresses and strides multiples of 16, rows dense."""
    from triton.compiler import ASTSource
    sizes = A.block_sizes(kernel, D, DTYPES[dtype])
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    aligned = [["tt.divisibility", 16]]
    signature, constants, attributes = {}, {}, {}
    for n, name in enumerate(kernel.arg_names):
        if name in sizes:
            signature[name], constants[n,] = "constexpr", sizes[name]
        elif name == "KEY_MASK" and not padded or name == "SHRINK" and dtype != "fp16":
            signature[name], constants[n,] = "constexpr", None
        elif name.endswith("_strides"):
            signature[name], constants[n, 3] = ("i32", "i32", "i32", "constexpr"), 1
            attributes |= {(n, dim): aligned for dim in range(3)}
        elif name in ("H", "T", "S", "window"):
            signature[name] = "i32"
        elif name == "scale":
            signature[name] = "fp32"
        else:                                              # a tensor
            kind = {"KEY_MASK": "i1", "M": "fp32", "L": "fp32", "DELTA": "fp32",
                    "SHRINK": "fp32"}.get(name, dtype)
            signature[name], attributes[n,] = f"*{kind}", aligned
    return ASTSource(kernel, signature, constants, attributes), options


def output_of(*command):
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def compiled(job):
    """(kernel, GPU, dtype, D, padded?) -> what its machine code needs, by ptxas and nvdisasm."""
    import triton
    from triton.backends.compiler import GPUTarget
    name, gpu, dtype, D, padded = job
    kernel, options = source(KERNELS[name], dtype, D, padded)
    capability, shared_limit, *_ = GPUS[gpu]
    code = triton.compile(kernel, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(code.asm["ptx"])
        arch = re.search(r"^\.target (\w+)", code.asm["ptx"], re.M)[1]
        tools = triton.knobs.nvidia
        report = output_of(tools.ptxas.path, "-v", f"-arch={arch}", ptx, "-o", cubin)
        instructions = len(re.findall(r"\bHG?MMA\.", output_of(tools.nvdisasm.path, cubin)))
    return dict(kernel=name, gpu=gpu, dtype=dtype, width=D, padded=padded,
                registers=int(re.search(r"Used (\d+) registers", report)[1]),
                spilled=sum(map(int, re.findall(r"(\d+) bytes spill", report))),
                shared=code.metadata.shared, shared_limit=shared_limit,
                tensor_core_instructions=instructions)


def failures(result):
    """Kernels that spill, need too much shared memory, or use no tensor cores in half precision."""
    return [x for x in result if x["spilled"] or x["shared"] > x["shared_limit"]
            or (x["dtype"] != "fp32" and not x["tensor_core_instructions"])]


def combinations(widths, dtypes):
    """What `compiled` takes: every kernel for both GPUs, with and without key padding."""
    return [(name, gpu, dtype, D, padded) for D in widths for name in KERNELS for gpu in GPUS
            for dtype in dtypes for padded in (False, True)]


def compile_all(jobs):
    """Compile these combinations in parallel, in a fresh cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        # Each process imports Triton first, so that attention.py has its kernels without a GPU.
        with concurrent.futures.ProcessPoolExecutor(
                mp_context=multiprocessing.get_context("spawn"),
                initializer=importlib.import_module, initargs=("triton",)) as pool:
            return list(pool.map(compiled, jobs))


def show_compiled(result):
    """A row for each kernel and width: the worst of dtypes and padding."""
    columns = "registers | spilled bytes | shared KiB | tensor-core instructions"
    print("| width | kernel | precision " + "".join(f"| {gpu}: {columns} " for gpu in GPUS) + "|")
    print("|" + "---|" * (3 + 4 * len(GPUS)))
    for D in WIDTHS:
        for name in KERNELS:
            for title, dtypes in (("half", ("fp16", "bf16")), ("float32", ("fp32",))):
                cells = []
                for gpu in GPUS:
                    same = [x for x in result if x["dtype"] in dtypes
                            and (x["width"], x["kernel"], x["gpu"]) == (D, name, gpu)]
                    if same:
                        cells += [max(x["registers"] for x in same),
                                  max(x["spilled"] for x in same),
                                  f"{max(x['shared'] for x in same) / 1024:.0f}",
                                  min(x["tensor_core_instructions"] for x in same)]
                if cells:
                    print("| " + " | ".join(map(str, [D, name, title, *cells])) + " |")


# ------------------------------------------------------------------------------------------------
# Computed
# ------------------------------------------------------------------------------------------------

def tiles(name, T, window, D):
    """How many tiles each program of a kernel visits, for T = S: a list of one number a program."""
    sizes = A.block_sizes(KERNELS[name], D, torch.float16)
    own, other = sizes["ROWS"], sizes["COLS"]
    if name == "dk, dv":               # from its first key's block of queries to its last reader
        lengths = [min(first + own - 1 + window, T) - first // other * other
                   for first in range(0, T, own)]
    else:                              # from its first query's first key to its last query
        lengths = [min(first + own, T) - max(0, first - window + 1) for first in range(0, T, own)]
    return [-(-length // other) for length in lengths]


def work(name, T, window, D):
    """What one head in half precision takes, as a dict.

    tiles: those visited; operations: of its dots, padding included; loaded: bytes that its programs
    load and store; least: bytes that memory must move if each tensor is moved once.
    """
    sizes, visits = A.block_sizes(KERNELS[name], D, torch.float16), tiles(name, T, window, D)
    own, other, wide = sizes["ROWS"], sizes["COLS"], sizes["D_PAD"]
    return dict(tiles=sum(visits), operations=sum(visits) * DOTS[name] * 2 * own * other * wide,
                loaded=2 * D * (OWN[name] * T + OTHER[name] * other * sum(visits)),
                least=2 * D * TENSORS[name] * T)


def show_computed(T, window, heads, D):
    """Print the table of local and global layers.

    The least time is that of all operations or that of all bytes at the GPU's published peak, the
    longer of the two.
    """
    print(f"\nComputed, not timed: T = {T}, {heads} heads {D} wide (one layer, one text), half "
          f"precision, W = {window} "
          "against every earlier key\n")
    print("| kernel | layer | tiles a head | G operations | MB loaded and stored | MB at least | "
          + " | ".join(f"µs at {gpu}'s peak" for gpu in GPUS) + " |")
    print("|" + "---|" * (6 + len(GPUS)))
    for name in KERNELS:
        for title, w in (("local", window), ("global", T)):
            x = work(name, T, w, D)
            times = [max(heads * x["operations"] / flops, heads * x["least"] / bandwidth) * 1e6
                     for _, _, flops, bandwidth in GPUS.values()]
            cells = [name, title, x["tiles"], f"{heads * x['operations'] / 1e9:.1f}",
                     f"{heads * x['loaded'] / 1e6:.0f}",
                     f"{heads * x['least'] / 1e6:.1f}", *(f"{time:.1f}" for time in times)]
            print("| " + " | ".join(map(str, cells)) + " |")


def run():
    """Print both tables; exit with status 1 if there are failures."""
    if A.triton is None or A.INTERPRETED:
        raise SystemExit("benchmark.py kernels needs triton 3.7.1, and TRITON_INTERPRET must not "
                         "be 1, because it compiles the kernels")
    result = compile_all(combinations(WIDTHS, DTYPES))
    print("\nCompiled ahead of time, without a GPU: the most registers, spilled bytes and shared "
          "memory, and the fewest tensor-core\ninstructions, of float16 and bfloat16, with key "
          "padding and without\n")
    show_compiled(result)
    show_computed(2048, 256, 12, 64)
    show_computed(2048, 256, 20, 128)
    failed = failures(result)
    if failed:
        raise SystemExit("\n".join(
            ["spilled, too large, or without tensor cores:", *map(str, failed)]))
    return result
