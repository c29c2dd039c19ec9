"""The Triton kernel against the definition, in Triton's interpreter (conftest.py switches it on).

The interpreter does not show tensor cores, tf32, shared memory and races.  Some of that can be read
off the compiled code: `python benchmark.py kernels`, of which test_benchmark.py runs a part.
"""

import importlib.util
import itertools
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.utils.deterministic
from hypothesis import given, settings, strategies
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import attention as A
import generate
from attention_cases import (
    LAYOUTS,
    NAMES,
    all_of,
    error_ratios,
    key_blocks,
    padding,
    query_blocks,
    random_call,
    tensors,
)
from conftest import ROOT
from helpers import ours, random_case, relative
from neo import GPTNeoForCausalLM
from neox import GPTNeoXForCausalLM

SLOW = pytest.mark.slow
ERRORS = [(torch.float32, False), (torch.float16, True), (torch.float16, False), (torch.bfloat16, True),
          pytest.param(torch.bfloat16, False, marks=SLOW)]     # interpreted as the line before it


# The bounds are the project's promise.  Measured over OPENBLAS_CORETYPE=Haswell, Zen and SkylakeX
# (numpy multiplies in the interpreter), ATEN_CPU_CAPABILITY=default and avx2, MKL_ENABLE_INSTRUCTIONS=
# SSE4_2 and AVX2, ONEDNN_MAX_CPU_ISA=AVX2 and 1, 2 and 4 threads, with 20 seeds: outputs at most 0.85,
# gradients 1.01; with 100 seeds under Haswell 0.97 and 1.33.
@pytest.mark.parametrize("seeds", [range(10), pytest.param(range(20), marks=SLOW), pytest.param(range(20, 120), marks=SLOW)],
                         ids=["10", "20", "100"])
@pytest.mark.parametrize("dtype, upcast", ERRORS, ids=str)
def test_error_against_float64(dtype, upcast, seeds):
    """At most 1.2 times naive's own error in the same dtype, 2 times for the gradients."""
    ratios = error_ratios("triton", dtype, upcast, seeds)
    print(dtype, f"upcast={upcast}", {name: f"{ratio:.2f}" for name, ratio in ratios.items()})
    assert ratios["out"] <= 1.2 and max(ratios.values()) <= 2.0


@settings(max_examples=16, deadline=None, derandomize=True)
@given(strategies.data())
def test_every_number_is_right(data):
    """Float32, element by element, on shapes that hypothesis shrinks to the smallest wrong one."""
    def draw(name, *values):
        return data.draw(strategies.sampled_from(values), label=name)

    S = data.draw(strategies.integers(1, 50), label="S")   # up to four blocks of 16
    T = data.draw(strategies.integers(1, S), label="T")
    (B, H), D = draw("B, H", (1, 1), (1, 2), (2, 1)), draw("D", 4, 16, 48, 80)
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
    blocks = range(100 // block * block, (129 // block + 1) * block)
    assert set(range(100, 130)) <= reached <= set(blocks)
    assert A.attention(q, k, v, scale=1.0, window=30, backend="naive").isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")      # in masked scores
def test_nothing_is_read_outside_the_band():
    """Poison before the first query's window and in padding changes nothing, in output or gradients."""
    q, k, v, do = tensors(torch.Generator().manual_seed(0), 2, 1, 50, 130, 16, torch.float32)
    key_mask = torch.ones(2, 130, dtype=torch.bool)
    key_mask[1, 90:95] = False
    how = dict(scale=1.0, window=20, key_mask=key_mask)
    clean = all_of("triton", q, k, v, do, how)
    for poison in (float("nan"), float("inf"), 1e30):
        k[:, :, :61], v[:, :, :61] = poison, poison        # query 80 reads 61 ... 80
        k[1, :, 90:95], v[1, :, 90:95] = poison, poison
        for a, b in zip(all_of("triton", q, k, v, do, how), clean):
            assert torch.equal(a, b), poison


def sum_in_another_order(monkeypatch, shift):
    """Let tl.dot add its products up from the shift(left tile)-th on, and so round otherwise."""
    create_dot = InterpreterBuilder.create_dot

    def another(self, a, b, *rest):
        n = a.data.shape[1]
        order = np.roll(np.arange(n), shift(a.data) % n)
        return create_dot(self, TensorHandle(a.data[:, order], a.dtype),
                          TensorHandle(b.data[order], b.dtype), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", another)


@pytest.mark.parametrize("rounding", ["as it comes", "by the left tile"])
def test_a_row_with_one_key_is_exact(monkeypatch, rounding):
    """With all weight on one key p is exactly 1 in the backward pass too: dv is do, dq and dk are 0.

    Some BLAS libraries round q kᵀ and k qᵀ differently; "by the left tile" any library does.
    """
    if rounding == "by the left tile":
        sum_in_another_order(monkeypatch, lambda tile: int(abs(tile).sum() * 100))
    for S in (40, 43):                                     # blocks of queries and keys aligned, and not
        q, k, v, do = tensors(torch.Generator().manual_seed(S), 1, 1, 40, S, 80, torch.float32)
        how = dict(scale=1.0, window=1, key_mask=None)
        out, dq, dk, dv = all_of("triton", 9 * q, k, v, do, how)
        assert torch.equal(out, v[:, :, S - 40:]) and torch.equal(dv[:, :, S - 40:], do)
        assert not (dq.any() or dk.any() or dv[:, :, :S - 40].any())


@pytest.mark.parametrize("size", [1e-30, 1e4, 1e15])
def test_large_and_small_scores(monkeypatch, size):
    """The largest score is subtracted before the exponential, so nothing overflows.

    Not in the backward pass either, if it rounds every score otherwise than the forward pass did.
    """
    q, k, v, do = tensors(torch.Generator().manual_seed(0), 1, 2, 40, 40, 16, torch.float32)
    how = dict(scale=1.0, window=20, key_mask=None)
    out = A.attention(q * size, k, v, **how, backend="triton")
    assert (out - A.attention(q * size, k, v, **how, backend="naive")).abs().max() < 1e-4
    calls = itertools.count()
    sum_in_another_order(monkeypatch, lambda tile: next(calls))
    assert all(x.isfinite().all() for x in all_of("triton", q * size, k, v, do, how))


def test_small_gradients_in_float16():
    """ds is often below float16's normal numbers, so do is multiplied by a power of two before.

    Without that dq and dk err 3.1 and 3.0 times as much as the definition's, with it 1.0.
    """
    how = dict(scale=1.0, window=100, key_mask=None, upcast=True)
    q, k, v, do = tensors(torch.Generator().manual_seed(0), 1, 1, 300, 300, 64, torch.float16)
    do = do * 1e-5
    true = all_of("naive", *(x.double() for x in (q, k, v, do)), how)
    naive, mine = (all_of(backend, q, k, v, do, how) for backend in ("naive", "triton"))
    assert all((c - a).norm() <= 1.5 * (b - a).norm() for a, b, c in zip(true, naive, mine))


def test_every_element_is_written():
    """Fresh memory is filled with NaN first; also the results of two runs are the same to the bit."""
    calls = [random_call(seed, torch.float32) for seed in (3, 6, 14)]
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


@pytest.mark.parametrize("T, S, window", [(512, 512, 256), (256, 256, None), (100, 500, 256),
                                          (1, 600, 256)])
def test_key_blocks_visited(dots, T, S, window):
    """At W = 256 a block of 64 queries visits at most 5 blocks of 64 keys."""
    q, k, v, do = tensors(torch.Generator().manual_seed(0), 1, 1, T, S, 64, torch.float16)
    how = dict(scale=0.125, window=window, key_mask=None)
    A.attention(q, k, v, **how, backend="triton")
    own, other, *_ = A.HALF[A.forward_kernel][64]
    visits = [dots[program] // 2 for program in sorted(dots)]              # q kᵀ and p v for each
    assert (own, other) == (64, 64) and visits == key_blocks(T, S, window, own, other)
    assert window is None or max(visits) <= 5
    assert window or max(visits) == S // 64


@pytest.mark.parametrize("T, S", [(512, 512), (300, 340)])
def test_backward_work_is_in_proportion_too(dots, T, S):
    """dq visits the forward pass's keys twice; dk and dv visit each query block in reach once."""
    q, k, v, do = tensors(torch.Generator().manual_seed(0), 1, 1, T, S, 64, torch.float16)
    all_of("triton", q, k, v, do, dict(scale=0.125, window=128, key_mask=None))
    forward, dq, dkv = (sum(count(T, S, 128, *A.HALF[kernel][64][:2])) for kernel, count in (
        (A.forward_kernel, key_blocks), (A.dq_kernel, key_blocks), (A.dkv_kernel, query_blocks)))
    assert sum(dots.values()) == 2 * forward + 5 * dq + 4 * dkv


# As a PyTorch operator

@pytest.mark.parametrize("padded", [False, True])
def test_opcheck(padded):
    """torch's own checks of a custom operator: schema, autograd registration, fake tensors, tracing."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = tensors(generator, 2, 1, 9, 18, 16, torch.float32, "(B, T, H, D)")
    key_mask = padding(generator, 2, 9, 18, "left") if padded else None
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


@pytest.mark.parametrize("padded", [False, True])
def test_second_derivatives_are_the_definitions(padded):
    """The backward kernel has no backward of its own; the definition's takes its place."""
    q, k, v, do = tensors(torch.Generator().manual_seed(0), 2, 1, 8, 8, 16, torch.float32)
    key_mask = padding(torch.Generator().manual_seed(1), 2, 8, 8, "left") if padded else None
    if padded:                                             # a query without a key gives 0 here
        do = do.masked_fill(~key_mask[:, None, :, None], 0.0)
    found = []
    for backend in ("naive", "triton"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = A.attention(*leaves, scale=0.25, window=3, key_mask=key_mask, backend=backend)
        first = torch.autograd.grad(out, leaves, do, create_graph=True)
        found.append(torch.autograd.grad(sum((x * x.detach().cos()).sum() for x in first), leaves))
    assert all(a.abs().max() > 0 for a in found[0])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found))


# Whole models

@pytest.mark.parametrize("seed", [1, 2, 3, *(pytest.param(n, marks=SLOW) for n in (0, 4, 5, 6, 7))])
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


@pytest.mark.parametrize("folder, model_class, T", [
    ("demo-neo", GPTNeoForCausalLM, 66), ("demo-neox", GPTNeoXForCausalLM, 20),
    pytest.param("demo-neo", GPTNeoForCausalLM, 80, marks=SLOW), pytest.param("demo-neox", GPTNeoXForCausalLM, 80, marks=SLOW)])
def test_demo_checkpoints(folder, model_class, T):
    """Trained weights, past demo-neo's window of 64: whole, and then token by token on a cache."""
    naive, triton = (model_class.from_pretrained(ROOT / "checkpoints" / folder, attn_implementation=name)
                     for name in ("naive", "triton"))
    ids = torch.randint(0, 1400, (1, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(triton(ids).logits, naive(ids).logits) < 1e-5
    prompt = ids[:, :min(63, T)]
    texts = [model.generate(prompt, max_new_tokens=3, do_sample=False) for model in (naive, triton)]
    assert torch.equal(*texts)


def test_a_padded_batch_through_a_model():
    """Left padding, rows of different lengths: logits of real tokens are the definition's."""
    case = random_case(2)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        naive, triton = (ours(case, backend=name)(ids, mask).logits[mask.bool()]
                         for name in ("naive", "triton"))
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
    words = "runs on a CUDA GPU, got tensors on cpu; use 'sdpa', or set TRITON_INTERPRET=1"
    with pytest.raises(ValueError, match=words):
        A.attention(q, q, q, scale=1.0, backend="triton")


def attention_anew(tmp_path):
    """attention.py read a second time, under another name, as the sys.modules and variables of now let it."""
    source = (ROOT / "attention.py").read_text().replace('"window_attention::', '"planted_attention::')
    (tmp_path / "attention_anew.py").write_text(source)    # operators have one name
    spec = importlib.util.spec_from_file_location("attention_anew", tmp_path / "attention_anew.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def without_triton(monkeypatch, tmp_path):
    """without_triton(kind) -> attention.py read again where Triton is missing, broken, or switched off."""
    def prepare(kind):
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text("raise OSError('cannot find its compiler')")
        if kind == "broken":
            monkeypatch.syspath_prepend(tmp_path)
        if kind == "off":
            monkeypatch.setenv("TRITON_INTERPRET", "0")
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        if kind == "missing":
            monkeypatch.setitem(sys.modules, "triton", None)
        else:
            monkeypatch.delitem(sys.modules, "triton")
        return attention_anew(tmp_path)
    return prepare


@pytest.mark.parametrize("kind, reason", [
    ("missing", "importing the triton package failed (import of triton halted"),
    ("broken", "importing the triton package failed (cannot find its compiler"), ("off", "there is no CUDA GPU")])
def test_without_triton(without_triton, monkeypatch, capsys, kind, reason):
    """Everything else runs, and the backend says what it needs; the command line in one line."""
    module = without_triton(kind)
    q = torch.zeros(1, 1, 3, 4)
    assert torch.equal(module.attention(q, q, q, scale=1.0), q)
    words = f"attention backend 'triton' cannot run here: {reason}"
    with pytest.raises(ImportError, match=re.escape(words)):
        module.attention(q, q, q, scale=1.0, backend="triton")
    for name in ("triton", "no_triton"):
        monkeypatch.setattr(A, name, getattr(module, name))
    assert generate.main(["HAMLET.", "--backend", "triton", "--device", "cpu"]) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith(f"error: {words}") and out.err.count("\n") == 1


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "on", "0", "", "false", "off", "no", "2"])
def test_the_interpreter_is_on_where_triton_says_so(monkeypatch, value):
    """TRITON_INTERPRET=0 means off, as for Triton itself."""
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert A.asked_to_interpret() == A.triton.knobs.runtime.interpret
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not A.asked_to_interpret()


def test_create_graph_changes_no_gradient_of_a_query_without_a_key():
    """Its output is 0 whatever q, k and v are, so nothing flows back from it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1, 5, 8, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[0, 0, 1, 0, 1], [0] * 5]).bool()
    for window in (None, 2):
        out = A.attention(q, k, v, scale=0.5, backend="triton", key_mask=mask, window=window)
        do = torch.randn_like(out)
        first = torch.autograd.grad(out, (q, k, v), do, retain_graph=True)
        for a, b in zip(first, torch.autograd.grad(out, (q, k, v), do, create_graph=True)):
            torch.testing.assert_close(a, b)


def test_functional_transforms_and_forward_mode_are_refused():
    """jvp returned a tangent of zeros without a word."""
    q, k, v = (torch.randn(1, 1, 3, 8) for _ in range(3))

    def f(q):
        return A.attention(q, k, v, scale=0.5, backend="triton")

    for call in (lambda: torch.func.jvp(f, (q,), (q,)), lambda: torch.func.grad(lambda q: f(q).sum())(q),
                 lambda: forward(f, q)):
        with pytest.raises(ValueError, match="torch.func"):
            call()


def forward(f, x):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, x))
