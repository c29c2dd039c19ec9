"""What only a GPU can tell, in one command and at most eight minutes.

    python benchmark.py gpu --out DIR

It needs torch 2.6 or newer; each of triton, flash-attn, matplotlib, tiktoken and safetensors may be
missing, and then the report says what was left out because of it.  DIR receives gpu.md (the
tables), gpu.json (every figure) and gpu.png (times as fast as the definition).  They are written
anew after every part, so that a run that was killed leaves what it had found.

The parts, in this order (PARTS at the end of this file):

    backends     every attention backend against float64, forward and backward
    models       small random models of both families, logits and gradients against float64
    generation   greedy decoding on a cache, padded batches: is each token the likeliest in float64?
    compiled     the same with compile=True
    training     train.py on the GPU: the losses of the CPU, stopped and resumed, bfloat16
    whole models a prompt, a training step and a new token, by the definition and by "auto"
    timings      one attention layer through every backend, T = 256 ... 8192
    flex         the same for FlexAttention, which is compiled for each length

A part is a list of cases and a function of one case.  tests/test_gpu.py runs the same cases under
pytest. The function returns rows: what was measured, the figure, and the limit that it must not
exceed (None: it is a time and not a check).  It raises CannotRun where this machine lacks
something.  Each part must have ended at its share of the time; cases that did not fit are listed in
the report.

    B batch · H heads · T queries · S keys · D head width · W window
"""

import contextlib
import copy
import functools
import io
import itertools
import json
import math
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import attention as A
import train
from benchmarks import backends, gpu_report
from benchmarks.common import ROOT, name_of
from benchmarks.shapes import SHAPES, model_class
from files import error_line
from neo import GPTNeoConfig, GPTNeoForCausalLM
from neox import GPTNeoXConfig, GPTNeoXForCausalLM
from sampling import Settings, stream


@dataclass(frozen=True)
class Sizes:
    """How large everything is: LARGE on a GPU, SMALL on a CPU, where only the code is tried."""
    widths: tuple = (64, 128, 80, 96, 256, 16, 48, 20)     # the official ones, and other kinds
    tokens: int = 300                                      # several blocks, and not a multiple
    windows: tuple = (None, 1, 100, 256)
    head_dim: int = 64                                     # of the whole models
    new_tokens: int = 40
    steps: int = 4                                         # of training
    context: int = 128
    lengths: tuple = (2048, 8192, 512, 4096, 1024, 256)    # of the timings, the most telling first
    timed: tuple = (12, 64, 256)                           # their heads, head width and window
    batch_tokens: int = 8192                               # as many texts as make this many tokens
    shapes: tuple = ("gpt-neo-125m", "gpt-neo-1.3B", "pythia-160m")        # of whole models timed
    prompt: int = 1900                                     # their tokens
    moved: int = 2**30                                     # bytes copied to measure the bandwidth
    matrix: int = 8192                                     # side of the matrices multiplied
    patience: float = 0.3                                  # seconds of each timing


LARGE = Sizes()
SMALL = Sizes(widths=(16,), tokens=40, windows=(None, 9), head_dim=16, new_tokens=6, steps=3,
              context=16, lengths=(32, 64), timed=(2, 16, 16), batch_tokens=64,
              shapes=("gpt-neo-125m",), prompt=30, moved=2**20,
              matrix=64, patience=0.0)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The largest error allowed over the definition's own in the same dtype: forward, gradients.
LIMITS = {"sdpa": (1.1, 2.0), "triton": (1.2, 2.0), "flash": (2.0, 2.0)}
# torch's memory-efficient kernel sums float32 less exactly than the definition's matrix products:
# 2.12 and 4.49 were measured on an H200.
SDPA_FLOAT32_ON_GPU = (2.5, 5.0)


class CannotRun(Exception):
    """This machine lacks what the case needs; the message says what."""


def row(what, figure, limit):
    """One result.  It is right if the figure is at most the limit; NaN is never right."""
    return dict(what=what, figure=figure, limit=limit, right=limit is None or figure <= limit)


# ------------------------------------------------------------------------------------------------
# Every backend against float64
# ------------------------------------------------------------------------------------------------

def backend_cases(sizes):
    """(D, dtype, upcast, backend): upcast as GPT-Neo asks for it, or not, as GPT-NeoX does."""
    return list(itertools.product(sizes.widths, DTYPES, (False, True), LIMITS))


@functools.lru_cache(maxsize=None)
def calls(D, sizes):
    """Calls of `attention` as models make them: (q, k, v, do, window, key_mask), in float64.

    Prefill, a chunk on a filled cache and one new token, each with every window; and at one width
    (since Triton compiles its kernels anew for them) batches that are padded on the left, with
    key_mask (B, S).
    """
    generator, B, H, S = torch.Generator().manual_seed(D), 2, 2, sizes.tokens

    def tensors(T):
        return [torch.randn(B, H, n, D, generator=generator, dtype=torch.float64)
                for n in (T, S, S, T)]

    padded = torch.arange(S) >= torch.tensor([[0], [S // 4]])              # (B, S)
    return ([(*tensors(T), window, None) for T in (S, S // 3, 1) for window in sizes.windows]
            + [(*tensors(S), window, padded) for window in sizes.windows if D == sizes.head_dim])


def output_and_gradients(backend, call, dtype, device, upcast):
    """[out, dq, dk, dv] of one call, float64, CPU.  Queries that may read nothing count as 0."""
    *tensors, window, key_mask = call
    q, k, v, do = (x.to(dtype).to(device) for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = A.attention(*leaves, scale=1.0 if upcast else q.size(-1) ** -0.5, window=window,
                      key_mask=None if key_mask is None else key_mask.to(device),
                      upcast=upcast, backend=backend)
    seen = A.visible(q.size(2), k.size(2), window)[None]                   # (1 or B, T, S)
    if key_mask is not None:
        seen = seen & key_mask[:, None, :]
    reads = seen.any(-1)[:, None, :, None].to(device)                      # (1 or B, 1, T, 1)
    out = out * reads
    return [x.detach().double().cpu() for x in (out, *torch.autograd.grad(out, leaves, do * reads))]


@functools.lru_cache(maxsize=2)
def truths(dtype, D, upcast, sizes):
    """For each call, the definition in float64 on the CPU, of the numbers that `dtype` can hold."""
    return [output_and_gradients("naive", (*(x.to(dtype).double() for x in call[:4]), *call[4:]),
                                 torch.float64, "cpu", upcast) for call in calls(D, sizes)]


@functools.lru_cache(maxsize=4)
def errors(backend, dtype, D, upcast, device, sizes):
    """[out, dq, dk, dv]: the norm of the difference from the truth, over all calls together."""
    squares = [0.0] * 4
    for call, truth in zip(calls(D, sizes), truths(dtype, D, upcast, sizes)):
        for i, x in enumerate(output_and_gradients(backend, call, dtype, device, upcast)):
            squares[i] += (x - truth[i]).norm().item() ** 2
    return [math.sqrt(x) for x in squares]


def need_gpu(backend, device):
    """Raise CannotRun for flash-attn on a CPU (tests/test_flash.py interprets it there)."""
    if device == "cpu" and backend == "flash":
        raise CannotRun("flash: it needs a GPU")


def check_backend(case, device, sizes):
    """The error of a backend over the definition's, both against float64, over all calls."""
    D, dtype, upcast, backend = case
    how = (dtype, D, upcast, device, sizes)
    need_gpu(backend, device)
    try:
        measured = errors(backend, *how)
    except (ImportError, ValueError) as error:             # missing, or not made for this call
        if isinstance(error, ValueError) and backend != "flash":
            raise
        raise CannotRun(f"{backend}: {error_line(error)}") from error
    ratios = [a / b for a, b in zip(measured, errors("naive", *how))]
    title = f"{backend} {name_of(dtype)} D={D} {'GPT-Neo' if upcast else 'GPT-NeoX'}"
    on_gpu = backend == "sdpa" and dtype == torch.float32 and device != "cpu"
    forward, gradients = SDPA_FLOAT32_ON_GPU if on_gpu else LIMITS[backend]
    return [row(f"{title} output", ratios[0], forward),
            row(f"{title} gradients", max(ratios[1:], key=nan_last), gradients)]


def nan_last(x):
    """For max(): NaN counts as the largest number."""
    return math.inf if math.isnan(x) else x


# ------------------------------------------------------------------------------------------------
# Whole models
# ------------------------------------------------------------------------------------------------

def tiny_model(family, sizes, seed=0):
    """A random model in float64 on the CPU: two heads, a window shorter than T, wide weights.

    (Weights of the usual size hide mistakes: with biases of 0 and norms of 1 many a step changes
    nothing.)
    """
    C, P = 2 * sizes.head_dim, 2 * sizes.tokens + sizes.new_tokens
    common = dict(vocab_size=97, hidden_size=C, max_position_embeddings=P,
                  bos_token_id=0, eos_token_id=0)
    if family == "neo":
        model = GPTNeoForCausalLM(GPTNeoConfig(
            **common, num_layers=4, num_heads=2, window_size=sizes.tokens // 3,
            attention_types=[[["global", "local"], 2]]))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(
            **common, num_hidden_layers=3, num_attention_heads=2, intermediate_size=4 * C,
            rotary_pct=0.5, use_parallel_residual=family == "neox"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            wide = p.dim() == 2 and "embed" not in name    # then the text does not repeat itself
            p.copy_(torch.randn(p.shape, generator=generator) * (1.1 * C ** -0.5 if wide else 0.1))
            if "ln_" in name and name.endswith("weight"):
                p += 1
    return model.double().eval()


FAMILIES = ("neo", "neox", "neox, one after the other")    # the last: without the parallel residual


def prompt(sizes):
    """ids and mask (2, T): the second row is padded on the left."""
    T = sizes.tokens
    ids = torch.randint(1, 97, (2, T), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(T) >= torch.tensor([[0], [T // 4]])).long()


def model_cases(sizes):
    return list(itertools.product(FAMILIES, ("sdpa", "triton", "flash"), DTYPES))


def logits_and_gradients(family, backend, dtype, device, sizes):
    """Logits of the real tokens and, in at least float32, all gradients: in float64 on the CPU."""
    model = tiny_model(family, sizes).to(dtype).to(device)
    model.set_attn_implementation(backend)
    ids, mask = (x.to(device) for x in prompt(sizes))
    # no loss for padding, nor for the first token, which padding would predict
    out = model(ids, mask, labels=ids.masked_fill(mask.cumsum(1) <= 1, -100))
    result = [out.logits[mask.bool()]]
    if dtype.itemsize >= 4:
        out.loss.backward()
        result += [torch.cat([p.grad.flatten() for p in model.parameters()])]
    return [x.detach().double().cpu() for x in result]


@functools.lru_cache(maxsize=None)
def model_truth(family, sizes):
    return logits_and_gradients(family, "naive", torch.float64, "cpu", sizes)


@functools.lru_cache(maxsize=None)
def model_errors(family, backend, dtype, device, sizes):
    """Relative errors against the same model in float64: [logits] or [logits, gradients].

    In half precision most of the error is of the weights' own rounding, and that is the
    definition's too.
    """
    computed = logits_and_gradients(family, backend, dtype, device, sizes)
    return [((x - true).norm() / true.norm()).item()
            for x, true in zip(computed, model_truth(family, sizes))]


def check_model(case, device, sizes):
    family, backend, dtype = case
    need_gpu(backend, device)
    try:
        measured = model_errors(family, backend, dtype, device, sizes)
    except (ImportError, ValueError) as error:
        if isinstance(error, ValueError) and backend != "flash":
            raise
        raise CannotRun(f"{backend}: {error_line(error)}") from error
    bound = model_errors(family, "naive", dtype, device, sizes)
    return [row(f"{family} {backend} {name_of(dtype)} {what}", a / b, limit) for what, a, b, limit
            in zip(("logits", "gradients"), measured, bound, LIMITS[backend])]


# ------------------------------------------------------------------------------------------------
# Generation, plain and compiled
# ------------------------------------------------------------------------------------------------

# How far below the best token's logit a chosen one's may be, in standard deviations of the logits.
# float32 may swap two tokens whose logits are almost equal.  Half precision errs more, above all in
# GPT-Neo, whose scores are not scaled: on a CPU the definition reaches 0.03 in float16 and 0.32 in
# bfloat16.  A forgotten window costs 0.9.
MARGIN = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.6}


def generation_cases(sizes):
    return [(family, backend, dtype, False) for family in FAMILIES[:2]
            for backend in ("naive", "sdpa", "triton") for dtype in DTYPES]


def compiled_cases(sizes):
    return [("neo", "sdpa", torch.float32, True), ("neox", "sdpa", torch.float32, True),
            ("neo", "sdpa", torch.bfloat16, True), ("neox", "sdpa", torch.float16, True)]


def check_generation(case, device, sizes):
    """Greedy text of a padded batch, past the window: is each token the likeliest in float64?

    And text that is sampled twice with one seed: how many tokens differ?
    """
    family, backend, dtype, compile = case
    model = tiny_model(family, sizes).to(dtype)
    exact = copy.deepcopy(model).double()                  # with the same rounded weights
    ids, mask = prompt(sizes)

    def generate(**how):
        return model.generate(ids.to(device), mask.to(device), eos_token_id=None, pad_token_id=0,
                              max_new_tokens=sizes.new_tokens, compile=compile, **how).cpu()

    try:
        model.to(device).set_attn_implementation(backend)
        text = generate(do_sample=False)
    except ImportError as error:
        raise CannotRun(f"{backend}: {error_line(error)}") from error
    twice = [generate(do_sample=True, generator=torch.Generator(device).manual_seed(3))
             for _ in range(2)]
    mask = torch.cat([mask, torch.ones(2, sizes.new_tokens, dtype=torch.long)], 1)
    exact.set_attn_implementation("naive")
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)                      # as generate counts them
        logits = exact(text, mask, positions).logits[:, ids.size(1) - 1:-1]    # (2, new, V)
    chosen = logits.gather(-1, text[:, ids.size(1):, None])[..., 0]
    behind = ((logits.max(-1).values - chosen) / logits.std(-1)).max().item()
    title = f"{family} {backend} {name_of(dtype)}{' compiled' * compile}"
    return [row(f"{title}, least likely token", behind, MARGIN[dtype]),
            row(f"{title}, tokens that differ", (twice[0] != twice[1]).sum().item(), 0)]


# ------------------------------------------------------------------------------------------------
# train.py
# ------------------------------------------------------------------------------------------------

def training_cases(sizes):
    return ["as on the CPU", "stopped and resumed", "bfloat16"]


def losses_of_training(folder, name, device, *options, sizes, stop_after=None):
    """Run train.py here; returns each step's loss.  `stop_after`: Ctrl-C after so many steps."""
    out, steps = Path(folder, name), itertools.count(1)
    argv = ["--text", str(ROOT / "LICENSE"), "--out", str(out), "--batch-size", "4",
            "--warmup", "1", "--context", str(sizes.context), "--steps", str(sizes.steps),
            "--device", device, *options]

    def press(*_):
        if next(steps) == stop_after:
            signal.raise_signal(signal.SIGINT)

    hook, before = register_optimizer_step_post_hook(press), signal.getsignal(signal.SIGINT)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = train.main.__wrapped__(argv)    # a missing package is an ImportError here
    finally:
        hook.remove()
        signal.signal(signal.SIGINT, before)
    if status != (130 if stop_after else 0):
        raise RuntimeError(f"train.py ended with status {status}: {said.getvalue()[-150:].strip()}")
    records = map(json.loads, Path(f"{out}.run", "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def without_dropout(folder):
    """A copy of demo-neo whose dropout is 0, because other devices draw other random numbers."""
    other = Path(folder, "no-dropout")
    shutil.copytree(ROOT / "checkpoints" / "demo-neo", other)
    config = json.loads((other / "config.json").read_text())
    config |= {name: 0.0 for name in config if "dropout" in name}
    (other / "config.json").write_text(json.dumps(config))
    return str(other)


def check_training(case, device, sizes):
    """Relative difference of losses: from a run on the CPU, or from a run that was not stopped."""
    with tempfile.TemporaryDirectory() as folder:
        run = functools.partial(losses_of_training, folder, sizes=sizes)
        try:
            if case == "stopped and resumed":              # dropout: random numbers go on too
                init = ("--init", str(ROOT / "checkpoints" / "demo-neo"))
                expected = run("whole", device, *init)
                run("parts", device, *init, stop_after=sizes.steps // 2)
                losses, limit = run("parts", device, *init), 1e-4
            else:
                init, half = ("--init", without_dropout(folder)), case == "bfloat16"
                expected = run("cpu", "cpu", *init)
                losses = run("device", device, *init, *(["--dtype", "bfloat16"] if half else []))
                limit = 1e-2 if half else 1e-4
        except ImportError as error:
            raise CannotRun(f"train.py: {error_line(error)}") from error
    if len(losses) != len(expected):
        raise RuntimeError(f"{len(losses)} losses where {len(expected)} were expected")
    figure = max(abs(a - b) / abs(b) for a, b in zip(losses, expected))
    return [row(f"train.py {case}, relative difference of losses", figure, limit)]


# ------------------------------------------------------------------------------------------------
# Timings
# ------------------------------------------------------------------------------------------------

def card_speed(device, sizes):
    """What this card reaches: bytes a second of a copy, operations a second of matrix products."""
    device = torch.device(device)
    x = torch.ones(sizes.moved // 4, device=device)
    y = torch.empty_like(x)
    speed = {"bytes/s": 2 * x.nbytes / fastest(lambda: y.copy_(x), device)}
    for dtype in DTYPES:
        a, b = (torch.randn(sizes.matrix, sizes.matrix, device=device).to(dtype) for _ in range(2))
        took = fastest(lambda: a @ b, device)
        speed[f"operations/s {name_of(dtype)}"] = 2 * sizes.matrix ** 3 / took
    return speed


def fastest(function, device):
    """Seconds of the fastest of several runs, the first of which warms up."""
    return min(backends.milliseconds(function, device, least=1, seconds=0) for _ in range(5)) / 1e3


def whole_cases(sizes):
    """(shape, what is timed, backend)"""
    kinds = ("a prompt", "a prompt forward and backward", "one new token")
    return [*itertools.product(sizes.shapes, kinds, ("naive", "auto")),
            *((shape, "one new token, compiled", "auto") for shape in sizes.shapes[:1])]


@functools.lru_cache(maxsize=1)
def timed_model(shape, device, sizes):
    """A random model of an official shape, float16 on a GPU; where nothing is timed, a tiny one."""
    if sizes == SMALL:
        return tiny_model("neo", sizes).float()
    config = SHAPES[shape]
    with torch.device(device):
        return model_class(config)(config).half().eval()


def time_whole(case, device, sizes):
    """Milliseconds of a whole model, one text: the median of at least five."""
    shape, what, backend = case
    model = timed_model(shape, device, sizes)
    model.set_attn_implementation(backend)
    ids = torch.randint(0, 97, (1, sizes.prompt), generator=torch.Generator().manual_seed(2))
    ids, device = ids.to(device), torch.device(device)

    def step():
        model(ids, labels=ids).loss.backward()
        model.zero_grad()

    if "new token" in what:
        took = milliseconds_a_token(model, ids, sizes.new_tokens, "compiled" in what)
    elif "backward" in what:
        took = backends.milliseconds(step, device, seconds=sizes.patience)
    else:
        with torch.no_grad():
            took = backends.milliseconds(lambda: model(ids), device, seconds=sizes.patience)
    return [row(f"{shape}, {what}, {backend}", took, None) | dict(shape=shape, kind=what,
                                                                  attention=backend)]


def milliseconds_a_token(model, ids, new_tokens, compile):
    """Median time from one token to the next while a text is generated."""
    settings = Settings(max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0)
    times = []
    with torch.no_grad():
        for token in stream(model, ids, settings=settings, compile=compile):
            token.tolist()                                 # waits for the GPU
            times.append(time.perf_counter())
    between = [b - a for a, b in itertools.pairwise(times)]
    return statistics.median(between[min(8, len(between) // 2):]) * 1e3    # the first ones compile


# Whether it is local, and whether scores are computed in at least float32: as models call it.
LAYERS = {"local": (True, True), "global": (False, True), "GPT-NeoX": (False, False)}


def timing_cases(sizes, names=("naive", "sdpa", "triton", "flash")):
    """(T, layer, backward, backend), the most telling lengths first."""
    return list(itertools.product(sizes.lengths, LAYERS, (False, True), names))


def flex_cases(sizes):
    return timing_cases(sizes, ("flex",))


def least(T, B, layer, backward, dtype, sizes):
    """(bytes, operations) that one layer's attention needs at least.

    Every tensor passes through memory once: q, k, v in, o out; backward q, k, v, o, do in, dq, dk,
    dv out. Every pair that is visible takes two products of D numbers forward (q kᵀ and p v), and
    five backward.
    """
    H, D, W = sizes.timed
    pairs = sum(min(i + 1, W if LAYERS[layer][0] else T) for i in range(T))
    tensors, products = (4 + 8, 2 + 5) if backward else (4, 2)
    return tensors * B * H * T * D * dtype.itemsize, products * B * H * pairs * 2 * D


def time_backend(case, device, sizes):
    """Milliseconds of one layer; a backend that errs is not timed and is reported as wrong."""
    T, layer, backward, backend = case
    (H, D, W), device, (local, upcast) = sizes.timed, torch.device(device), LAYERS[layer]
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    B = max(1, sizes.batch_tokens // T)
    if backend == "flex":
        torch.compiler.reset()                             # it is compiled for each length
    tensors = backends.inputs(B, H, T, D, dtype, device)
    result = backends.measure(backend, *tensors, backward, sizes.patience, scale=D ** -0.5,
                              window=W if local else None, upcast=upcast)
    title = f"{backend} T={T} {layer} {'forward and backward' if backward else 'forward'}"
    if isinstance(result, str):
        if (backend in ("flash", "flex") or result.startswith(("out of memory", "interpreted"))
                or (backend == "triton" and A.triton is None)):
            raise CannotRun(f"{backend}: {result}")
        return [dict(what=f"{title}: {result}", figure=math.nan, limit=0, right=False)]
    size, operations = least(T, B, layer, backward, dtype, sizes)
    return [row(title, result, None) | dict(
        T=T, B=B, layer=layer, backward=backward, backend=backend, dtype=name_of(dtype),
        bytes=size, operations=operations)]


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------

# Name, cases, function of a case, and the share of the time at which the part must have ended.
PARTS = (("backends", backend_cases, check_backend, 0.45),
         ("models", model_cases, check_model, 0.52),
         ("generation", generation_cases, check_generation, 0.57),
         ("compiled", compiled_cases, check_generation, 0.70),
         ("training", training_cases, check_training, 0.75),
         ("whole models", whole_cases, time_whole, 0.82),
         ("timings", timing_cases, time_backend, 0.90),
         ("flex", flex_cases, time_backend, 1.00))


def run_part(name, cases, function, device, sizes, end):
    """Run the cases one after the other until the clock says `end`; returns what to report."""
    begin, part = time.perf_counter(), dict(name=name, rows=[], cannot_run=[], left_out=[])
    for case in cases(sizes):
        if time.perf_counter() > end:
            part["left_out"].append(text_of(case))
            continue
        try:
            part["rows"] += function(case, device, sizes)
        except CannotRun as reason:
            part["cannot_run"].append(dict(case=text_of(case), reason=str(reason)))
        except Exception as error:                         # one case must not hide the others
            what = f"{text_of(case)} raised {type(error).__name__}: {error_line(error)}"
            part["rows"].append(dict(what=what, figure=math.nan, limit=0, right=False))
    part["seconds"] = time.perf_counter() - begin
    return part


def text_of(case):
    """A case in words: (torch.float32, "sdpa") -> "float32 sdpa"."""
    parts = case if isinstance(case, tuple) else (case,)
    return " ".join(name_of(x) if isinstance(x, torch.dtype) else str(x) for x in parts)


def run(out, device, minutes, missing=()):
    """Everything.  Exit status 2 without a GPU, 1 if something was wrong."""
    if device != "cpu" and not torch.cuda.is_available():
        print("benchmark.py gpu: error: torch finds no CUDA GPU on this machine", file=sys.stderr)
        raise SystemExit(2)
    begin, on_cpu = time.perf_counter(), device == "cpu"
    device, sizes = ("cpu", SMALL) if on_cpu else (device or "cuda", LARGE)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    report = dict(card=card_name(device), missing=list(missing), speed=card_speed(device, sizes),
                  parts=[])
    for name, cases, function, share in PARTS:
        if on_cpu and name in ("compiled", "flex"):        # a minute of compiling, for little
            continue
        part = run_part(name, cases, function, device, sizes, begin + 60 * minutes * share)
        report["parts"].append(part)
        print(gpu_report.summary(part), flush=True)
        gpu_report.write(report, folder)
    report["plot"] = gpu_report.plot(report, folder / "gpu.png")
    gpu_report.write(report, folder)
    print(f"wrote {folder}/gpu.md and gpu.json; {report['plot']}; "
          f"{time.perf_counter() - begin:.0f} s in all")
    wrong = sum(not x["right"] for part in report["parts"] for x in part["rows"])
    if wrong:
        raise SystemExit(f"{wrong} of the results are wrong, see {folder}/gpu.md")
    return report


def card_name(device):
    """The card (or the processor), torch, CUDA and triton in one line."""
    name = (torch.cuda.get_device_name(device) if device != "cpu"
            else f"no GPU, sizes too small to time ({platform.machine()})")
    triton = "no triton" if A.triton is None else f"triton {A.triton.__version__}"
    return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {triton}"
