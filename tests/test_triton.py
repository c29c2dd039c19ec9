"""The Triton kernel against the definition, in Triton's interpreter (conftest.py switches it on).

What the interpreter cannot show (tensor cores, tf32, shared memory, races) is looked for in the compiled
code instead: `python benchmark.py kernels`, of which a part runs here.
"""

import random
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.utils.deterministic
from hypothesis import given, settings, strategies
from triton.runtime.interpreter import InterpreterBuilder

import attention as A
from conftest import ROOT
from helpers import ours, random_case, relative
from neo import GPTNeoForCausalLM
from neox import GPTNeoXForCausalLM

WIDTHS = [4, 8, 16, 32, 48, 64, 80, 96, 128, 256]          # every head width of the official models
NAMES = ("out", "dq", "dk", "dv")


def tensors(generator, B, H, T, S, D, dtype=torch.float64, layout="(B, H, T, D)"):
    """q, k, v and the gradient of the output, in one of the layouts that models and caches hand over."""
    def one(n):
        if layout == "(B, T, H, D)":                       # a projection's view
            return torch.randn(B, n, H, D, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        if layout == "part of a larger one":               # a cache, or a third of a fused projection
            whole = torch.randn(B, H, n + 5, D + 3, generator=generator, dtype=torch.float64).to(dtype)
            return whole[:, :, 2:n + 2, 1:D + 1]
        if layout == "last dimension strided":
            return torch.randn(B, H, D, n, generator=generator, dtype=torch.float64).to(dtype).mT
        return torch.randn(B, H, n, D, generator=generator, dtype=torch.float64).to(dtype)
    return one(T), one(S), one(S), one(T)


LAYOUTS = ["(B, H, T, D)", "(B, T, H, D)", "part of a larger one", "last dimension strided"]


def padding(generator, B, T, S, side):
    """key_mask (B, S): up to a third of each row is padding on that side, row 0 none."""
    if side is None:
        return None
    n = torch.randint(0, S // 3 + 1, (B, 1), generator=generator)
    n[0] = 0
    j = torch.arange(S)[None]
    return j >= n if side == "left" else j < S - n


def readers(T, S, window, key_mask):
    """(B or 1, 1, T, 1) bool: which queries may read anything?"""
    seen = A.visible(T, S, window)[None]
    if key_mask is not None:
        seen = seen & key_mask[:, None, :]
    return seen.any(-1)[:, None, :, None]


def all_of(backend, q, k, v, do, how, dtype=None):
    """Output and gradients; queries that may read nothing are left out of both."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
    real = readers(q.size(2), k.size(2), how["window"], how["key_mask"])
    out = A.attention(*leaves, **how, backend=backend) * real
    out.backward(do.to(out.dtype) * real)
    return [out.detach(), *(x.grad for x in leaves)]


def random_call(seed, dtype):
    """Any width, any T and S, windows about the block sizes, all layouts, padding."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    D, S = WIDTHS[seed % len(WIDTHS)], draw.choice([1, 15, 16, 17, 40, 64, 65, 130])
    T, B, H = draw.choice([S, S, 1, draw.randint(1, S)]), draw.choice([1, 2]), draw.choice([1, 2])
    window = draw.choice([None, 1, 2, 15, 16, 17, 63, 64, 65, 400])
    inputs = tensors(generator, B, H, T, S, D, dtype, draw.choice(LAYOUTS))
    key_mask = padding(generator, B, T, S, draw.choice([None, None, "left", "right"]))
    return inputs, dict(scale=draw.choice([1.0, D ** -0.5]), window=window, key_mask=key_mask)


def error_ratios(dtype, upcast, seeds):
    """{output: the kernel's error over naive's}, both against float64, normed over all calls together."""
    error = {backend: dict.fromkeys(NAMES, 0.0) for backend in ("naive", "triton")}
    for seed in seeds:
        (q, k, v, do), how = random_call(seed, dtype)
        how["upcast"] = upcast
        truth = all_of("naive", q, k, v, do, how, torch.float64)
        for backend in error:
            for name, x, true in zip(NAMES, all_of(backend, q, k, v, do, how), truth):
                error[backend][name] += (x.double() - true).norm().item() ** 2
    return {name: (error["triton"][name] / error["naive"][name]) ** 0.5 for name in NAMES}


@pytest.mark.parametrize("upcast", [True, False], ids=["GPT-Neo", "GPT-NeoX"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(20, 120), marks=pytest.mark.slow)], ids=["20", "100"])
def test_error_against_float64(dtype, upcast, seeds):
    """At most 1.2 times naive's own error in the same dtype, 2 times for the gradients.  (float32 is the
    same function with and without upcast.)"""
    if upcast and dtype == torch.float32:
        seeds = [seed + 1000 for seed in seeds]
    ratios = error_ratios(dtype, upcast, seeds)
    print(dtype, f"upcast={upcast}", {name: f"{ratio:.2f}" for name, ratio in ratios.items()})
    assert ratios["out"] <= 1.2 and max(ratios.values()) <= 2.0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(strategies.data())
def test_every_number_is_right(data):
    """Float32, element by element, on shapes that hypothesis shrinks to the smallest wrong one."""
    def draw(name, *values):
        return data.draw(strategies.sampled_from(values), label=name)

    S = data.draw(strategies.integers(1, 70), label="S")
    T = data.draw(strategies.integers(1, S), label="T")
    B, H, D = draw("B", 1, 2), draw("H", 1, 3), draw("D", 4, 16, 48, 80)
    window = draw("window", None, 1, 2, 15, 16, 17, 33, S, S + 1)
    generator = torch.Generator().manual_seed(S * 100 + T)
    q, k, v, do = tensors(generator, B, H, T, S, D, torch.float32, draw("layout", *LAYOUTS))
    how = dict(scale=D ** -0.5, window=window,
               key_mask=padding(generator, B, T, S, draw("padding", None, "left", "right")))
    truth = all_of("naive", q, k, v, do, how, torch.float64)
    for name, mine, true in zip(NAMES, all_of("triton", q, k, v, do, how), truth):
        assert mine.shape == true.shape
        assert (mine - true).abs().max() <= 1e-5 * max(1.0, true.abs().max()), name


@pytest.mark.parametrize("dim", range(4))
def test_expanded_tensors(dim):
    """A dimension of stride 0, in every place; the gradient of a sum has stride 0 everywhere."""
    shape = [2, 3, 20, 16]
    shape[dim] = 1
    q, k, v = (torch.randn(shape).expand(2, 3, 20, 16).detach() for _ in range(3))
    results = []
    for backend in ("naive", "triton"):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        A.attention(*leaves, scale=0.5, window=7, backend=backend).sum().backward()
        results.append([x.grad for x in leaves])
        q, k, v = (x.detach() for x in leaves)
    for name, a, b in zip("qkv", *results):
        assert (a - b).abs().max() < 1e-5, name


# What a key or value holds reaches those that may read it, and nobody else.

def test_a_nan_key_reaches_those_who_see_it_and_no_other():
    """In q kᵀ a masked score is replaced before anything is summed."""
    q, k, v, _ = tensors(torch.Generator().manual_seed(0), 1, 1, 200, 200, 16, torch.float32)
    k[0, 0, 100] = float("nan")
    out = A.attention(q, k, v, scale=1.0, window=30, backend="triton")
    assert out[0, 0].isnan().any(-1).nonzero().flatten().tolist() == list(range(100, 130))


def test_a_nan_value_stays_among_the_query_blocks_that_visit_it():
    """0 · NaN is NaN, so block-mates of its readers get it too; naive spreads it to every query."""
    q, k, v, _ = tensors(torch.Generator().manual_seed(0), 1, 1, 200, 200, 16, torch.float32)
    v[0, 0, 100] = float("nan")
    out = A.attention(q, k, v, scale=1.0, window=30, backend="triton")
    reached = set(out[0, 0].isnan().any(-1).nonzero().flatten().tolist())
    block = A.block_sizes(A.forward_kernel, 16, torch.float32)["ROWS"]
    assert set(range(100, 130)) <= reached <= set(range(100 // block * block, (129 // block + 1) * block))
    assert A.attention(q, k, v, scale=1.0, window=30, backend="naive").isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")      # in masked scores
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_nothing_is_read_outside_the_band(poison):
    """Before the first query's window, after the last query, in padding: poison there changes nothing, in
    the output or in any gradient."""
    q, k, v, do = tensors(torch.Generator().manual_seed(0), 2, 2, 50, 130, 16, torch.float32)
    key_mask = torch.ones(2, 130, dtype=torch.bool)
    key_mask[1, 90:95] = False
    how = dict(scale=1.0, window=20, key_mask=key_mask)
    clean = all_of("triton", q, k, v, do, how)
    k[:, :, :61], v[:, :, :61] = poison, poison            # query 80 reads 61 ... 80
    k[1, :, 90:95], v[1, :, 90:95] = poison, poison
    for a, b in zip(all_of("triton", q, k, v, do, how), clean):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [1e-30, 1e4, 1e15])
def test_large_and_small_scores(size):
    """Softmax is taken from the largest score down, so nothing overflows."""
    q, k, v, do = tensors(torch.Generator().manual_seed(0), 1, 2, 70, 70, 16, torch.float32)
    how = dict(scale=1.0, window=20, key_mask=None)
    out = A.attention(q * size, k, v, **how, backend="triton")
    assert (out - A.attention(q * size, k, v, **how, backend="naive")).abs().max() < 1e-4
    assert all(x.isfinite().all() for x in all_of("triton", q * size, k, v, do, how))


def test_every_element_is_written():
    """Fresh memory is filled with NaN first; also the results of two runs are the same to the bit."""
    calls = [random_call(seed, torch.float32) for seed in range(0, 20, 3)]
    plain = [all_of("triton", *inputs, how) for inputs, how in calls]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        again = [all_of("triton", *inputs, how) for inputs, how in calls]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for one, two in zip(plain, again) for a, b in zip(one, two))


# Work

@pytest.fixture
def dots(monkeypatch):
    """Counter of tl.dot calls by program."""
    counter, create_dot = Counter(), InterpreterBuilder.create_dot

    def counting(self, *args):
        counter[self.grid_idx] += 1
        return create_dot(self, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    return counter


def touched(T, S, window, own, other):
    """For each block of `own` queries, the number of blocks of `other` keys that its band needs."""
    window = window or S
    counts = []
    for first in range(S - T, S, own):
        begin, end = max(0, first - window + 1), min(first + own, S)
        counts.append(-(-(end - begin) // other))
    return counts


@pytest.mark.parametrize("T, S, window", [(1024, 1024, 256), (1024, 1024, None), (100, 700, 256), (1, 600, 256)])
def test_key_blocks_visited(dots, T, S, window):
    """Counted, not argued: at W = 256 a block of 64 queries meets at most 5 blocks of 64 keys."""
    q, k, v, do = tensors(torch.Generator().manual_seed(0), 1, 1, T, S, 64, torch.float16)
    how = dict(scale=0.125, window=window, key_mask=None)
    A.attention(q, k, v, **how, backend="triton")
    own, other, _ = A.BLOCKS[A.forward_kernel][64]
    visits = [dots[program] // 2 for program in sorted(dots)]              # q kᵀ and p v for each
    assert (own, other) == (64, 64) and visits == touched(T, S, window, own, other)
    assert window is None or max(visits) <= 5
    assert window or max(visits) == S // 64


def test_backward_work_is_in_proportion_too(dots):
    """dq meets the forward's keys twice, dk and dv each query block of the band once."""
    q, k, v, do = tensors(torch.Generator().manual_seed(0), 1, 1, 512, 512, 64, torch.float16)
    how = dict(scale=0.125, window=128, key_mask=None)
    forward = sum(touched(512, 512, 128, *A.BLOCKS[A.forward_kernel][64][:2]))
    dq = sum(touched(512, 512, 128, *A.BLOCKS[A.dq_kernel][64][:2]))
    own, other, _ = A.BLOCKS[A.dkv_kernel][64]
    dkv = sum(-(-(min(512, first + own - 1 + 128) - first) // other) for first in range(0, 512, own))
    all_of("triton", q, k, v, do, how)
    assert sum(dots.values()) == 2 * forward + 5 * dq + 4 * dkv


# As a PyTorch operator

@pytest.mark.parametrize("padded", [False, True])
def test_opcheck(padded):
    """torch's own checks of a custom operator: schema, autograd registration, fake tensors, tracing."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = tensors(generator, 2, 2, 20, 30, 16, torch.float32, "(B, T, H, D)")
    key_mask = padding(generator, 2, 20, 30, "left") if padded else None
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    torch.library.opcheck(A.triton_forward, (*inputs, key_mask, 0.25, 7))
    q, k, v = (x.detach() for x in inputs)
    _, m, l = A.triton_forward(q, k, v, key_mask, 0.25, 7)
    torch.library.opcheck(A.triton_backward, (q, k, v, key_mask, m, l, do, 0.25, 7))


def test_torch_compile_takes_it_whole():
    """No graph break; the same output and gradients."""
    def function(q, k, v):
        return A.attention(q * 2, k, v, scale=0.25, window=7, backend="triton").sin()

    q, k, v, do = tensors(torch.Generator().manual_seed(0), 2, 2, 30, 30, 16, torch.float32)
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        f(*leaves).backward(do)
        results.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_second_derivatives_are_refused():
    """The backward kernel has no backward of its own, and says so rather than being silently wrong."""
    q, k, v, _ = tensors(torch.Generator().manual_seed(0), 1, 1, 8, 8, 16, torch.float32)
    q.requires_grad_()
    out = A.attention(q, k, v, scale=0.25, backend="triton")
    gradient, = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), q)


# Whole models

@pytest.mark.parametrize("seed", range(8))
def test_models(seed):
    """Logits within 1e-5 of the definition's, at T > 2 · window; the gradients too."""
    case = random_case(seed)
    assert case.window is None or case.T > 2 * case.window
    results = []
    for backend in ("naive", "triton"):
        model = ours(case, backend=backend)
        out = model(case.ids, labels=case.ids)
        out.loss.backward()
        results.append([out.logits.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        assert relative(b, a) < 1e-5 or (b - a).abs().max() < 1e-7


@pytest.mark.parametrize("folder, model_class", [("demo-neo", GPTNeoForCausalLM), ("demo-neox", GPTNeoXForCausalLM)])
def test_demo_checkpoints(folder, model_class):
    """Trained weights, 150 tokens (demo-neo's window is 64), whole and then token by token on a cache."""
    naive, triton = (model_class.from_pretrained(ROOT / "checkpoints" / folder, attn_implementation=name)
                     for name in ("naive", "triton"))
    ids = torch.randint(0, 1400, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(triton(ids).logits, naive(ids).logits) < 1e-5
    prompt = ids[:, :70]
    texts = [model.generate(prompt, max_new_tokens=4, do_sample=False) for model in (naive, triton)]
    assert torch.equal(*texts)


def test_a_padded_batch_through_a_model():
    """Left padding, rows of different lengths: real tokens as the definition has them."""
    case = random_case(2)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        naive, triton = (ours(case, backend=name)(ids, mask).logits[mask.bool()] for name in ("naive", "triton"))
    assert relative(triton, naive) < 1e-5


# Refusals

def test_what_it_cannot_do_it_says(monkeypatch):
    q = torch.randn(1, 1, 4, 16)
    for change, message in (
            (dict(dropout=0.1), "no dropout"),
            (dict(dtype=torch.float64), "of float32, float16, bfloat16 on cpu, got torch.float64"),
            (dict(width=257), "256 wide, got 257")):
        x = torch.zeros(1, 1, 4, change.pop("width", 16), dtype=change.pop("dtype", torch.float32))
        with pytest.raises(ValueError, match=message):
            A.attention(x, x, x, scale=1.0, backend="triton", **change)
    with pytest.raises(ValueError, match="one dtype"):
        A.attention(q, q, q.half(), scale=1.0, backend="triton")
    with pytest.raises(ValueError, match="never forms"):
        A.attention(q, q, q, scale=1.0, backend="triton", return_weights=True)
    monkeypatch.setattr(A, "INTERPRETED", False)
    with pytest.raises(ValueError, match="runs on a CUDA GPU, got tensors on cpu; use 'sdpa', or set TRITON_INTERPRET=1"):
        A.attention(q, q, q, scale=1.0, backend="triton")


@pytest.mark.parametrize("broken, reason", [("sys.modules['triton'] = None", "import of triton halted"),
                                            ("sys.path.insert(0, {path!r})", "cannot find its compiler")])
def test_without_triton(tmp_path, broken, reason):
    """Missing or broken: the models import and run, and the backend says what it wants."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('cannot find its compiler')")
    code = (f"import sys; {broken.format(path=str(tmp_path))}\n"
            "import torch, attention, neo\n"
            "q = torch.zeros(1, 1, 3, 4)\n"
            "attention.attention(q, q, q, scale=1.0)\n"
            "try: attention.attention(q, q, q, scale=1.0, backend='triton')\n"
            "except ImportError as error: print(error)")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "backend 'triton' cannot run here: importing the triton package failed" in out and reason in out


def test_the_command_line_says_it_in_one_line():
    """Outside the interpreter, on a CPU."""
    out = subprocess.run([sys.executable, "generate.py", "HAMLET.", "--backend", "triton", "--device", "cpu"], cwd=ROOT,
                         capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "HOME": str(ROOT)})
    assert out.returncode == 2 and out.stderr.startswith("error: attention backend 'triton' cannot run here: there is no CUDA GPU")
    assert out.stderr.count("\n") == 1
