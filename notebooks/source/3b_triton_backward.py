# %% [markdown]
# # 3b. The kernel's backward pass, and its precision
#
# **Time** 25 minutes to read and run, 65 minutes more for the exercises. **Needs** PyTorch, the `triton` package, and transformers for the last check; no GPU. Read notebook 3 before. [The words and letters](README.md) are explained in one place.
#
# **Objectives.** Afterwards you can
# * derive the gradients of attention without any T × S matrix in memory, and find the tiles that they need;
# * say which small choices cost digits: how m and l are kept, and where delta comes from;
# * judge a kernel in half precision with float64 as the truth;
# * name what an interpreter shows wrongly or not at all, and where else it can be checked.

# %%
import os, sys; sys.path[:0] = [".."]                      # the modules lie one folder up
import torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                   # before triton, which reads it
import attention as A

# %%
from lesson import exercise, official, same, show
from plots import *
from benchmarks import kernels
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"kernels run on {device},", "interpreted" if A.INTERPRETED else "compiled")

# %% [markdown]
# ## 1. The gradients, row by row
#
# We begin with what has to be computed. P holds the weights of a head, (T, S), and o = P v. The gradient of the loss with respect to o is called do; it is given. Then:
#
# * dv = Pᵀ do and dp = do vᵀ, as for any product of matrices;
# * through softmax, for each row: ds = p (dp - **delta**), where delta = Σ p dp is one number for each row;
# * dq = ds k · scale and dk = dsᵀ q · scale.
#
# ### Exercise 3b.1 · Back through softmax
#
# Difficulty 2 of 5 · 10 minutes
#
# Compute ds from `p` and `dp`, both (rows, S). The check compares it with autograd.

# %% tags=["stub"]
def score_gradient(p, dp):
    """ds (rows, S): the gradient of the scores, where p = softmax(s)."""
    ...

# %% tags=["check"]
with exercise("3b.1"):
    for rows, S in [(1, 2), (2, 5), (3, 3)]:
        s, dp = torch.randn(2, rows, S, generator=torch.Generator().manual_seed(S))
        p = s.requires_grad_().softmax(1)
        right, = torch.autograd.grad(p, s, dp)
        same(score_gradient(p.detach(), dp), right, f"{rows} rows, S = {S}", tolerance=1e-6)

# %% tags=["wrong"]
def score_gradient(p, dp):                                 # delta is forgotten
    return p * dp

# %% tags=["wrong"]
def score_gradient(p, dp):                                 # a mean where a sum is needed
    return p * (dp - (p * dp).mean(-1, keepdim=True))

# %% tags=["wrong"]
def score_gradient(p, dp):                                 # one delta for all rows
    return p * (dp - (p * dp).sum())

# %% tags=["wrong"]
def score_gradient(p, dp):                                 # sums without the weights
    return p * (dp - dp.sum(-1, keepdim=True))

# %% [markdown]
# <details><summary>Hint</summary>
#
# `keepdim=True` keeps the dimension that is summed, so that delta is (rows, 1).
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def score_gradient(p, dp):
#     """ds (rows, S): the gradient of the scores, where p = softmax(s)."""
#     delta = (p * dp).sum(-1, keepdim=True)
#     return p * (dp - delta)
# ```
# Each row of ds sums to 0: adding one number to all scores of a row changes nothing.
# </details>

# %% [markdown]
# ## 2. Two numbers for each row
#
# The forward pass stores no weights. It keeps m and l of each row, and the backward pass computes every p again: p = exp(s - m) / l. Many kernels keep one number instead, the log-sum-exp m + log l, and compute p = exp(s - (m + log l)). In exact arithmetic this is the same.
#
# **Predict:** the scores of GPT-Neo are not divided by √D, so they can be large. Which of the two ways has the larger error in float32, when m is about 100?

# %%
def weight_errors(seed, shift):
    """Mean relative error of p from m and l, and from their log-sum-exp, both in float32."""
    s = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) * 5 + shift
    m = s.amax(1, keepdim=True)
    l = (s - m).exp().sum(1, keepdim=True)
    true = s.double().softmax(1)
    ways = (s - m).exp() / l, (s - (m + l.log())).exp()
    return [((p - true).abs() / true).mean().item() for p in ways]

# %%
print("   m near    from m and l    from m + log l")
for shift in (0, 100, 1000):
    found = torch.tensor([weight_errors(seed, shift) for seed in range(5)])
    print(f"{shift:9} {found[:, 0].mean():15.1e} {found[:, 1].mean():17.1e}")
    if shift:
        assert (found[:, 1] > 10 * found[:, 0]).all()      # with each of the five seeds

# %% [markdown]
# The sum m + log l is rounded to the precision of a number near 100 or 1000, and exp turns this absolute error into a relative error of p. With m and l apart, s - m is exact or nearly so. That is why the project's kernel keeps both.
#
# ## 3. Where delta comes from
#
# `dq_kernel` has a block of queries and goes over their keys twice: in the first sweep it sums delta, in the second it uses it.

# %%
show(A.dq_kernel)

# %% [markdown]
# Most kernels avoid the first sweep. Since Σ p dp = Σ p (do · v) = do · o, delta can be computed from o, which the forward pass has stored. But o has been rounded to half precision. Where one key has nearly all the weight, dp - delta is a small difference of large numbers, and the rounding matters.
#
# We compute dq on real q, k and v, from the first local layer of `demo-neo` on a speech, with either delta. Everything else is in float32.

# %%
from unittest.mock import patch
from load_weights import AutoModelForCausalLM, AutoTokenizer
FOLDER, layers = "../checkpoints/demo-neo", []
SPEECH = """LEAR.
Blow, winds, and crack your cheeks! rage! blow!
You cataracts and hurricanoes, spout
Till you have drench'd our steeples, drown'd the cocks!
You sulphurous and thought-executing fires,
Vaunt-couriers to oak-cleaving thunderbolts,
Singe my white head! And thou, all-shaking thunder,
Strike flat the thick rotundity o' the world!"""

# %%
def keep(q, k, v, **how):
    layers.append((q, k, v))
    return A.attention(q, k, v, **how)
model = AutoModelForCausalLM.from_pretrained(FOLDER).requires_grad_(False)
ids = AutoTokenizer.from_pretrained(FOLDER)(SPEECH, return_tensors="pt").input_ids
with patch("neo.attention", keep):
    model(ids)

# %%
(q, k, v), T, W = layers[1], ids.size(1), 64
def dq_with(delta_from, dtype, do):
    """dq of the first local layer, with inputs that are exact in float16."""
    Q, K, V, DO = (x.half().to(dtype) for x in (q, k, v, do))
    P = (Q @ K.mT).masked_fill(~A.visible(T, T, W), float("-inf")).softmax(-1)
    dp = DO @ V.mT
    rounded_o = (P @ V).half().to(dtype)
    delta = (P * dp).sum(-1) if delta_from == "dp" else (DO * rounded_o).sum(-1)
    return (P * (dp - delta[..., None])) @ K

# %%
def dq_of_naive(do):
    """dq of the definition in float16, with all its rounding."""
    Q, K, V = (x.half().requires_grad_() for x in (q, k, v))
    o = A.naive(Q, K, V, scale=1.0, window=W, upcast=True)
    return torch.autograd.grad(o, Q, do.half())[0]

# %% [markdown]
# **Predict:** how much larger is the error of dq with delta from o: twice, ten times, a thousand times? Five random gradients do are tried.

# %%
ways = {"delta = do · o": lambda do: dq_with("o", torch.float32, do),
        "delta = Σ p dp": lambda do: dq_with("dp", torch.float32, do),
        "naive in float16": dq_of_naive}
relative = {name: [] for name in ways}
for seed in range(5):
    do = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed))
    true = dq_with("dp", torch.float64, do)
    for name, way in ways.items():
        relative[name].append(((way(do) - true).norm() / true.norm()).item())

# %%
for name, errors in relative.items():
    print(f"{name:18} dq off by {min(errors):.1e} to {max(errors):.1e}")
from_o, from_dp, of_naive = relative.values()
assert all(a > 500 * b and a > c for a, b, c in zip(from_o, from_dp, of_naive))

# %% [markdown]
# With delta from o, the error is more than 500 times as large. The rounding of o alone costs more than all the rounding of `naive` in float16. The price of the first sweep is work: two products in each sweep and one more in the second are five for a tile, where three would do.
#
# ## 4. Which queries read these keys
#
# A program should sum only what belongs to it. So dk and dv have a kernel of their own: `dkv_kernel` has a block of keys, and goes over the queries that read them.
#
# ### Exercise 3b.2 · First and last reader
#
# Difficulty 2 of 5 · 10 minutes
#
# The T queries are the last T of S positions; query row r is at position S - T + r. For the keys `first, …, last` (positions) give the first query *row* that reads one of them, and one past the last. If no query reads them, begin = end or begin > end. Use arithmetic only.

# %% tags=["stub"]
def reader_range(first, last, T, S, window):
    """(begin, end): rows begin, …, end - 1 are all that read these keys, none too many."""
    ...

# %% tags=["check"]
with exercise("3b.2"):
    for T_, S_, W_ in [(37, 37, 5), (37, 60, 20), (64, 64, 1), (40, 50, 50)]:
        for first in range(0, S_, 8):
            last = min(first + 7, S_ - 1)
            readers = A.visible(T_, S_, W_)[:, first:last + 1].any(1).nonzero()
            found, case = reader_range(first, last, T_, S_, W_), f"T {T_}, S {S_}, W {W_}"
            assert found is not None, "nothing came (None), expected two numbers"
            if len(readers) or found[0] < found[1]:
                right = [readers.min(), readers.max() + 1] if len(readers) else "none"
                same(found, right, f"keys {first} to {last}, {case}")

# %% tags=["wrong"]
def reader_range(first, last, T, S, window):               # positions in place of rows
    return first, min(last + window, S)

# %% tags=["wrong"]
def reader_range(first, last, T, S, window):               # the last key's readers are missing
    return max(first - (S - T), 0), min(first + window - (S - T), T)

# %% tags=["wrong"]
def reader_range(first, last, T, S, window):               # one query too many
    return max(first - (S - T), 0), min(last + window + 1 - (S - T), T)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Key j is read by the positions j, …, j + window - 1. The position p has the row p - (S - T), if that is between 0 and T - 1.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def reader_range(first, last, T, S, window):
#     """(begin, end): rows begin, …, end - 1 are all that read these keys, none too many."""
#     begin = max(first - (S - T), 0)
#     end = min(last + window - (S - T), T)
#     return begin, end
# ```
# </details>

# %% [markdown]
# ### Exercise 3b.3 · The gradient of v, by blocks
#
# Difficulty 4 of 5 · 30 minutes
#
# Write in plain torch what `dkv_kernel` does for dv. For each block of `rows` keys, take only the queries that read one of them, compute p from m and l, and sum pᵀ do. There is one head, and T = S: q, k, do are (T, D), m and l are (T,). In the second check some late queries hold NaN; blocks that they do not read must not notice it.

# %% tags=["stub"]
def dv_by_blocks(q, k, do, m, l, scale, window, rows):
    """dv (T, D); softmax's p is exp(s - m) / l where visible, 0 elsewhere."""
    ...

# %% tags=["check"]
with exercise("3b.3"):
    generator = torch.Generator().manual_seed(0)
    Q, K, V, DO = torch.randn(4, 1, 1, 50, 8, dtype=torch.float64, generator=generator)
    A.naive(Q, K, V.requires_grad_(), scale=0.5, window=12).backward(DO)
    Q, K, DO, right = Q[0, 0], K[0, 0], DO[0, 0], V.grad[0, 0]
    s_ = (0.5 * Q @ K.T).masked_fill(~A.visible(50, 50, 12), float("-inf"))
    m_ = s_.amax(1)
    l_ = (s_ - m_[:, None]).exp().sum(1)
    same(dv_by_blocks(Q, K, DO, m_, l_, 0.5, 12, 8), right, "dv, T = 50, W = 12", 1e-12)
    Q[40:], DO[40:] = float("nan"), float("nan")           # key 23 is read up to query 34
    found = dv_by_blocks(Q, K, DO, m_, l_, 0.5, 12, 8)
    same(found[:24], right[:24], "NaN in queries 40 to 49, keys 0 to 23", 1e-12)

# %% tags=["wrong"]
def dv_by_blocks(q, k, do, m, l, scale, window, rows):     # right, but looks at all queries
    gap = torch.arange(len(q))[:, None] - torch.arange(len(q))
    s = (scale * q @ k.T).masked_fill((gap < 0) | (gap >= window), float("-inf"))
    return (torch.exp(s - m[:, None]) / l[:, None]).T @ do

# %% tags=["wrong"]
def dv_by_blocks(q, k, do, m, l, scale, window, rows):     # l is forgotten: sums are not 1
    dv = torch.zeros_like(do)
    for first in range(0, len(q), rows):
        j = torch.arange(first, min(first + rows, len(q)))
        i = torch.arange(first, min(first + rows + window - 1, len(q)))
        gap = i[:, None] - j[None, :]
        s = (scale * q[i] @ k[j].T).masked_fill((gap < 0) | (gap >= window), float("-inf"))
        dv[j] = torch.exp(s - m[i, None]).T @ do[i]
    return dv

# %% tags=["wrong"]
def dv_by_blocks(q, k, do, m, l, scale, window, rows):     # a block's last readers are missing
    dv = torch.zeros_like(do)
    for first in range(0, len(q), rows):
        j = torch.arange(first, min(first + rows, len(q)))
        i = torch.arange(first, min(first + window, len(q)))
        gap = i[:, None] - j[None, :]
        s = (scale * q[i] @ k[j].T).masked_fill((gap < 0) | (gap >= window), float("-inf"))
        dv[j] = (torch.exp(s - m[i, None]) / l[i, None]).T @ do[i]
    return dv

# %% [markdown]
# <details><summary>Hint</summary>
#
# Exercise 3b.2 gives the queries of a block; with T = S they begin at the first key. Within the tile the rule 0 ≤ i - j < window decides.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def dv_by_blocks(q, k, do, m, l, scale, window, rows):
#     T, dv = len(q), torch.zeros_like(do)
#     for first in range(0, T, rows):
#         j = torch.arange(first, min(first + rows, T))
#         i = torch.arange(first, min(int(j[-1]) + window, T))
#         gap = i[:, None] - j[None, :]
#         s = (scale * q[i] @ k[j].T).masked_fill((gap < 0) | (gap >= window), float("-inf"))
#         p = torch.exp(s - m[i, None]) / l[i, None]
#         dv[j] = p.T @ do[i]
#     return dv
# ```
# </details>

# %% [markdown]
# The kernel does this for dk and dv together. It visits the queries in blocks of COLS, which begin at multiples of COLS. It multiplies q by kᵀ as the forward pass does and then transposes the tile: k qᵀ might be rounded differently, and then p could exceed 1 where all weight is on one key.

# %%
show(A.dkv_kernel)

# %% [markdown]
# **Check.** We compare the gradients of the kernels with autograd through `naive` in float64, for T < S, a length that is no multiple of the block, and padding.

# %%
def all_gradients(backend, dtype):
    """(dq, dk, dv) of two texts, the second with 11 places of padding."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(2, 1, n, 16, generator=generator).to(device, dtype)
                   for n in (37, 60, 60, 37))
    real = torch.arange(60) >= torch.tensor([[0], [11]])
    o = A.attention(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), scale=0.25,
                    window=20, key_mask=real.to(device), backend=backend)
    return torch.autograd.grad(o, (q, k, v), do)

# %%
found, right = all_gradients("triton", torch.float32), all_gradients("naive", torch.float64)
for name, mine, true in zip(("dq", "dk", "dv"), found, right):
    print(f"{name} {tuple(mine.shape)}: largest difference {(mine - true).abs().max():.1e}")
    assert (mine - true).abs().max() < 1e-5

# %% [markdown]
# ## 5. Half precision
#
# In float16 a kernel cannot equal the float64 truth, and `naive` in float16 does not either. So both are compared with float64, and the error of the kernel may be at most twice that of `naive`.
#
# **Predict:** the kernel keeps its scores and sums in float32, and rounds the weights and the output. Is its error larger or smaller than that of `naive`, which rounds its scores too?

# %%
def half_error(backend, T, S, D, window):
    """Relative error of the output in float16, against naive in float64."""
    generator = torch.Generator().manual_seed(T + S + D)
    how = dict(scale=D ** -0.5, window=window)
    q, k, v = (torch.randn(1, 2, n, D, generator=generator).half().to(device) for n in (T, S, S))
    true = A.attention(q.double(), k.double(), v.double(), backend="naive", **how)
    return ((A.attention(q, k, v, backend=backend, **how) - true).norm() / true.norm()).item()

# %%
print("   T    S   D    W   naive's error   the kernel's")
for size in [(1, 300, 64, 256), (37, 300, 64, 64), (65, 65, 80, 5), (300, 300, 96, 256)]:
    of_naive, of_kernel = half_error("naive", *size), half_error("triton", *size)
    print("{:4} {:4} {:3} {:4}".format(*size), f"{of_naive:13.1e} {of_kernel:14.1e}")
    assert of_kernel < of_naive

# %% [markdown]
# In each of these cases it is smaller. `tests/test_triton.py` demands at most 1.2 times the error of `naive` over many random calls.
#
# **A deliberate mistake: bfloat16 in the interpreter.** NumPy has no bfloat16, and in this version of Triton the interpreter's `tl.dot` multiplies the *bit patterns* as whole numbers, without a warning. Here we call the operator below `attention`, without its guard.

# %%
if A.INTERPRETED:
    x = torch.randn(1, 1, 40, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    unguarded, _, _ = A.triton_forward(x, x, x, None, 0.25, 7)
    guarded, right = (A.attention(x, x, x, scale=0.25, window=7, backend=name)
                      for name in ("triton", "naive"))
    print("largest output:", *(f"{o.abs().max():.3g}" for o in (unguarded, guarded, right)))
    assert unguarded.abs().max() > 1e6 and (guarded - right).abs().max() < 0.1

# %% [markdown]
# The unguarded output is about a billion where 4 is right. So `triton_attention` casts to float32 in the interpreter, which holds every bfloat16 exactly, and rounds the result. On a GPU this cast does not happen, so a test in the interpreter says nothing about `tl.dot` in bfloat16. Its error was measured on an H200 ([gpu.md](../benchmarks/h200/gpu.md)).

# %%
show(A.triton_attention)

# %% [markdown]
# ## 6. TF32
#
# For float32 inputs, `tl.dot` on an NVIDIA GPU rounds to **TF32** by default: 10 bits of fraction instead of 23. The interpreter ignores `input_precision`, so it cannot show this. But the rounding can be imitated.
#
# ### Exercise 3b.4 · Round to fewer bits
#
# Difficulty 3 of 5 · 15 minutes
#
# A float32 is 1 bit of sign, 8 of exponent and 23 of fraction. Round each number of `x` to the nearest with only `bits` bits of fraction. With 7 bits the result must be what `x.bfloat16().float()` gives. `x.view(torch.int32)` has the same bits as whole numbers. (What happens to a number exactly half-way between two does not matter here.)

# %% tags=["stub"]
def fewer_bits(x, bits):
    """x (float32) with its fraction rounded to `bits` bits."""
    ...

# %% tags=["check"]
with exercise("3b.4"):
    x = torch.tensor([1.0, -1.01, 3.14159, 1000.7, -0.001, 1.999])
    same(fewer_bits(x, 23), x, "23 bits")
    same(fewer_bits(x, 7), x.bfloat16(), "7 bits")
    same(fewer_bits(torch.tensor([1 + 2.0 ** -10, 1 + 2.0 ** -12]), 10), [1 + 2.0 ** -10, 1],
         "10 bits, of 1 + 2⁻¹⁰ and 1 + 2⁻¹²")

# %% tags=["wrong"]
def fewer_bits(x, bits):                                   # cuts, and does not round
    return (x.view(torch.int32) & ~((1 << (23 - bits)) - 1)).view(torch.float32)

# %% tags=["wrong"]
def fewer_bits(x, bits):                                   # digits after the point, not of fraction
    return (x * 2 ** bits).round() / 2 ** bits

# %% tags=["wrong"]
def fewer_bits(x, bits):                                   # keeps one bit too few
    drop = 24 - bits
    return ((x.view(torch.int32) + (1 << (drop - 1))) & ~((1 << drop) - 1)).view(torch.float32)

# %% [markdown]
# <details><summary>Hint</summary>
#
# 23 - bits bits are dropped. Add half of the last bit that is kept, then set the dropped bits to 0 with `& ~mask`. If the fraction overflows, the exponent grows by one, which is right.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def fewer_bits(x, bits):
#     """x (float32) with its fraction rounded to `bits` bits."""
#     drop = 23 - bits
#     half, mask = (1 << drop) >> 1, (1 << drop) - 1
#     return ((x.contiguous().view(torch.int32) + half) & ~mask).view(torch.float32)
# ```
# </details>

# %% [markdown]
# **Predict:** with q and k of the speech rounded to TF32, how many digits of the scores are lost?

# %%
def tf32(x):                                               # 13 of 23 bits are dropped
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
true = q.double() @ k.double().mT
for name, s in {"ieee": q @ k.mT, "tf32": tf32(q) @ tf32(k).mT}.items():
    error = ((s - true).norm() / true.norm()).item()
    print(f"{name}: scores off by {error:.1e}")
    assert (error > 1e-5) == (name == "tf32") and (error < 1e-6) == (name == "ieee")

# %% [markdown]
# The error grows from below 1e-6 to above 1e-5: two to three digits. In a kernel that claims to equal the float32 definition this would be a mistake, and no test on a CPU would notice it. That is why the project's kernels say `input_precision="ieee"` in every `tl.dot`.
#
# ## 7. What a GPU has to do
#
# Work and memory follow from the number of tiles. `benchmarks/kernels.py` computes them for the block sizes that the kernels use in half precision. **These figures are computed, not measured.** The same command compiles all kernels for A100 and H100 without having one; [kernels.md](../benchmarks/kernels.md) has the registers, the shared memory and the tensor-core instructions, and no kernel spills registers to memory.
#
# **Predict:** on axes that are both logarithmic, T² is a line of slope 2. Which slope has a local layer, for T much larger than W?

# %%
LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384]
operations = {}
for name in kernels.KERNELS:
    for layer, window in {"local": 256, "global": None}.items():
        operations[f"{name}, {layer}"] = [
            kernels.work(name, n, window or n, 64)["operations"] / 1e9 for n in LENGTHS]

# %% tags=["cover"] alt="Six lines on logarithmic axes: the work of the three kernels grows with slope 2 in a global layer and with slope 1 in a local one."
axes = curves(LENGTHS, operations, "work of one head 64 wide, computed from tiles (W = 256)",
              "T, tokens", "10⁹ operations", marker="o", log="xy")
plain_ticks(axes, LENGTHS[::2])
for name, line in operations.items():
    growth = line[-1] / line[-2]                           # from 8192 to 16384 tokens
    assert abs(growth - (2 if "local" in name else 4)) < 0.1

# %% [markdown]
# Slope 1: twice the tokens are twice the work. In a global layer they are four times the work. The forward kernel needs 2 products for each of its tiles, `dq_kernel` 5, and `dkv_kernel` 4.
#
# How long a GPU takes for this work can only be measured on one. [gpu.md](../benchmarks/h200/gpu.md) has what was **measured** on one NVIDIA H200, and [benchmarks/README.md](../benchmarks/README.md#on-a-gpu) says which later changes no GPU has run. This notebook was made without a GPU. Where there is one, the following lines measure: milliseconds of forward and backward, for 12 heads 64 wide and W = 256 in float16.

# %%
if device == "cuda":
    from benchmarks.backends import measure
    for n in (512, 1024, 2048, 4096, 8192):
        tensors = torch.randn(4, 1, 12, n, 64, device=device, dtype=torch.float16)
        for name in A.BACKENDS:
            print(n, name, measure(name, *tensors, backward=True, scale=0.125, window=256))
else:
    print("skipped: no CUDA GPU")

# %% [markdown]
# ## 8. In the model, and against the reference
#
# The backend is an argument of `from_pretrained`. The reference is transformers' own GPT-Neo with its eager attention, on more tokens than one window has.

# %%
import transformers
transformers.utils.logging.disable_progress_bar()
reference = transformers.GPTNeoForCausalLM.from_pretrained(
    FOLDER, attn_implementation="eager", dtype=torch.float32)
ours = AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="triton").to(device)
with torch.no_grad():
    theirs = reference(ids[:, :100]).logits                # (B, T, V)
    mine = ours(ids[:, :100].to(device)).logits.cpu()

# %%
error = (mine - theirs).norm() / theirs.norm()
print(f"logits {tuple(mine.shape)}: {error:.1e} relative")
assert error < 1e-5 and torch.equal(mine.argmax(-1), theirs.argmax(-1))

# %% [markdown]
# The likeliest next token is the same at every position too. With a network, the same kernel runs an official model whose heads are only 4 wide; they are padded to 16, the least that `tl.dot` multiplies.

# %%
if found := official("roneneldan/TinyStories-1M", attn_implementation="triton"):
    story, tokenizer = found
    row = tokenizer("Once upon a time there was", return_tensors="pt").input_ids.to(device)
    best = story.to(device)(row).logits[0, -1].topk(5).indices.tolist()
    print([tokenizer.decode([i]) for i in best])

# %% [markdown]
# ## In three sentences
#
# The backward pass computes every tile of weights again from two numbers for each row, so it needs no T × S memory either: one kernel has queries and sums dq, another has keys and sums dk and dv. Where the numbers come from decides their precision: m and l apart, delta from the same dp, sums in float32, and no TF32. An interpreter on a CPU shows that a kernel computes the right numbers in float32 and float16, but bfloat16, TF32 and speed have to be checked elsewhere.
#
# ## Further
#
# * Dao 2023, “FlashAttention-2”, section 3.1, has the backward pass that most kernels use.
# * `tests/test_triton.py` shows what one can ask of a kernel, and `tests/test_gpu.py` what a GPU has to answer.
# * `python benchmark.py gpu --out DIR` checks and times everything on a GPU.
