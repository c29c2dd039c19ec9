# %% [markdown]
# # 3. A Triton kernel that knows the window
#
# **Time** 25 minutes to read and run, 105 minutes more for the exercises. **Needs** PyTorch and the `triton` package (Linux; `pip install triton`). No GPU: without one the kernels run in Triton's interpreter. Read `visible` and `naive` at the top of `attention.py` before. [The words and letters](README.md) are explained in one place.
#
# **Objectives.** Afterwards you can
# * write a Triton kernel: programs, blocks, and masks for lengths that are no multiple of the block;
# * take a softmax in one pass over its row, and say where it becomes NaN and why;
# * say which blocks of keys a block of queries needs, and how much work a window saves;
# * write an attention kernel for the window, and read the project's own;
# * check a kernel against its definition, and say what such a check cannot show.
#
# You write seven small kernels and functions, each a step towards the last. The backward pass and questions of precision follow in notebook 3b.

# %%
import os, sys; sys.path[:0] = [".."]                      # the modules lie one folder up
import torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                   # before triton, which reads it
import triton, triton.language as tl
import attention as A

# %%
from lesson import exercise, same, show
from plots import *
device = "cuda" if torch.cuda.is_available() else "cpu"
assert A.INTERPRETED or device == "cuda"
print(f"triton {triton.__version__} on {device},", "interpreted" if A.INTERPRETED else "compiled")

# %% [markdown]
# ## 1. Load and store
#
# A GPU kernel is a function that runs many times at once. Each run is a **program**. It knows its own number (`tl.program_id`) and works independently of the others. In Triton, a program works on whole **blocks** of numbers, whose length is a power of two. Tensors arrive as addresses: `X + at` are the addresses of the elements `at` of `X`. `tl.load` reads the numbers there, and `tl.store` writes them.
#
# The **interpreter** runs the programs one after the other, in Python, and keeps the blocks in NumPy arrays. It shows whether a kernel computes the right numbers. It says nothing about speed.

# %%
@triton.jit
def copy_kernel(X, OUT, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)    # the elements of this program
    tl.store(OUT + at, tl.load(X + at))

# %% [markdown]
# The kernel is started with `kernel[grid](arguments)`, where the grid is the number of programs.
#
# **Predict:** `x` has ten numbers that we want to copy; behind them, in the same memory, are six numbers of somebody else. The output has 16 places and holds -1 at first. How many programs with blocks of four are needed? What is in places 10 to 15 afterwards?

# %%
memory = torch.tensor([*range(100, 110), *[999] * 6], dtype=torch.float32, device=device)
x, out = memory[:10], torch.full((16,), -1.0, device=device)
programs = triton.cdiv(len(x), 4)                          # 10 / 4, rounded up
copy_kernel[(programs,)](x, out, BLOCK=4)
print(programs, "programs:", out.int().tolist())
assert out[10:].tolist() == [999, 999, -1, -1, -1, -1]

# %% [markdown]
# The third program has the places 8 to 11. It has read two numbers that do not belong to `x`, and written them to two places where nothing should be written. On a GPU such an access can also end in an error.
#
# So every load and store has a **mask** of the same shape as its addresses: `tl.load(address, mask=ok, other=0.0)` and `tl.store(address, value, mask=ok)`. Where the mask is False, nothing is read (the value is `other`), and nothing is written.
#
# ### Exercise 3.1 · A masked copy
#
# Difficulty 1 of 5 · 5 minutes
#
# Copy the `N` numbers of `X` to `OUT`, and read and write nothing else.

# %% tags=["stub"]
@triton.jit
def masked_copy_kernel(X, OUT, N, BLOCK: tl.constexpr):
    """OUT[n] = X[n] for 0 <= n < N; this program has BLOCK of them."""
    ...

# %% tags=["check"]
with exercise("3.1"):
    for n, block in [(8, 4), (10, 4), (3, 8)]:
        out = torch.full((16,), -1.0, device=device)
        masked_copy_kernel[(triton.cdiv(n, block),)](memory, out, n, BLOCK=block)
        right = [*memory[:n].tolist(), *[-1] * (16 - n)]
        same(out, right, f"{n} numbers in blocks of {block}")

# %% tags=["wrong"]
@triton.jit
def masked_copy_kernel(X, OUT, N, BLOCK: tl.constexpr):    # no mask
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + at))

# %% tags=["wrong"]
@triton.jit
def masked_copy_kernel(X, OUT, N, BLOCK: tl.constexpr):    # only the load has a mask
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + at, mask=at < N, other=0.0))

# %% tags=["wrong"]
@triton.jit
def masked_copy_kernel(X, OUT, N, BLOCK: tl.constexpr):    # one number too many
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + at, mask=at <= N), mask=at <= N)

# %% tags=["wrong"]
@triton.jit
def masked_copy_kernel(X, OUT, N, BLOCK: tl.constexpr):    # every program copies the first block
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + at, mask=at < N), mask=at < N)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The elements of this program are computed as in `copy_kernel`. Which of them exist?
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# @triton.jit
# def masked_copy_kernel(X, OUT, N, BLOCK: tl.constexpr):
#     at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
#     x = tl.load(X + at, mask=at < N)
#     tl.store(OUT + at, x, mask=at < N)
# ```
# </details>

# %% [markdown]
# ## 2. A row for each program
#
# In a matrix, a program can take one row. `tl.max(x, 0)` and `tl.sum(x, 0)` reduce a block of one dimension to one number. The places of the block beyond the row must not change the result, so `other` has to be chosen for the operation: a sum needs 0 there.
#
# ### Exercise 3.2 · The largest of each row
#
# Difficulty 1 of 5 · 10 minutes
#
# Program `t` finds the largest of `X[t, 0], …, X[t, D - 1]` and stores it in `OUT[t]`. The rows of `X` are stored one after the other. `D` is any number, and `D_PAD` is the next power of two. In the check all numbers are negative.

# %% tags=["stub"]
@triton.jit
def row_max_kernel(X, OUT, D: tl.constexpr, D_PAD: tl.constexpr):
    """OUT[t] = max of X[t, 0:D], where t is this program's row."""
    ...

# %% tags=["check"]
with exercise("3.2"):
    for rows, width, padded in [(3, 4, 4), (7, 5, 8), (2, 48, 64)]:
        space = torch.full((rows * width + padded,), 1e9, device=device)     # 1e9 behind the rows
        values = space[:rows * width].view(rows, width)
        values.copy_(-1 - torch.rand(rows, width))
        found = torch.full((rows,), float("nan"), device=device)
        row_max_kernel[(rows,)](values, found, D=width, D_PAD=padded)
        same(found, values.amax(1), f"{rows} rows, D = {width}")

# %% tags=["wrong"]
@triton.jit
def row_max_kernel(X, OUT, D: tl.constexpr, D_PAD: tl.constexpr):
    t, d = tl.program_id(0), tl.arange(0, D_PAD)
    x = tl.load(X + t * D + d, mask=d < D, other=0.0)      # 0 is larger than negative numbers
    tl.store(OUT + t, tl.max(x, 0))

# %% tags=["wrong"]
@triton.jit
def row_max_kernel(X, OUT, D: tl.constexpr, D_PAD: tl.constexpr):
    t, d = tl.program_id(0), tl.arange(0, D_PAD)
    x = tl.load(X + t * D + d)                             # reads into the next row
    tl.store(OUT + t, tl.max(x, 0))

# %% tags=["wrong"]
@triton.jit
def row_max_kernel(X, OUT, D: tl.constexpr, D_PAD: tl.constexpr):
    t, d = tl.program_id(0), tl.arange(0, D_PAD)
    x = tl.load(X + t * D + d, mask=d < D - 1, other=float("-inf"))     # the last is forgotten
    tl.store(OUT + t, tl.max(x, 0))

# %% [markdown]
# <details><summary>Hint</summary>
#
# Row t begins at `X + t * D`. Which value can never be larger than another?
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# @triton.jit
# def row_max_kernel(X, OUT, D: tl.constexpr, D_PAD: tl.constexpr):
#     t, d = tl.program_id(0), tl.arange(0, D_PAD)
#     x = tl.load(X + t * D + d, mask=d < D, other=float("-inf"))
#     tl.store(OUT + t, tl.max(x, 0))
# ```
# -inf is the neutral element of max, as 0 is that of a sum. Section 4 starts its running maximum with it, and section 5 shows which problem that brings.
# </details>

# %% [markdown]
# ## 3. What the definition costs
#
# The example is a speech, read by `demo-neo`: a GPT-Neo of 4 layers with 4 heads and D = 64. Every second layer is **local**, with W = 64. A function in the place of `attention` keeps the q, k and v of each layer.

# %%
from unittest.mock import patch
from load_weights import AutoModelForCausalLM, AutoTokenizer
SPEECH = """HAMLET.
To be, or not to be, that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles,
And by opposing end them. To die, to sleep,
No more; and by a sleep to say we end
The heart-ache, and the thousand natural shocks
That flesh is heir to: 'tis a consummation
Devoutly to be wish'd. To die, to sleep.
To sleep, perchance to dream. Ay, there's the rub,
For in that sleep of death what dreams may come,
When we have shuffled off this mortal coil,
Must give us pause."""

# %%
FOLDER = "../checkpoints/demo-neo"
model = AutoModelForCausalLM.from_pretrained(FOLDER).requires_grad_(False)
ids, layers = AutoTokenizer.from_pretrained(FOLDER)(SPEECH, return_tensors="pt").input_ids, []
def keep(q, k, v, **how):
    layers.append((q, k, v))
    return A.attention(q, k, v, **how)
with patch("neo.attention", keep):
    model(ids)
q, k, v = layers[1]                                        # the first local layer
print("q, k, v", tuple(q.shape), "= (B, H, T, D)   windows", model.config.windows)

# %% [markdown]
# `naive` computes the whole T × S matrix of scores. Then it sets the scores that a query may not read to the lowest finite number, and takes the softmax of each row.
#
# **Predict:** which part of that matrix is of use in this layer, with T = S = 199 and W = 64: a half, a third, a quarter?

# %% alt="Left, the band of scores that may be used, 27 % of the square; right, the weights of a head, which are zero outside this band."
T, W = ids.size(1), 64
seen = A.visible(T, T, W)
_, weights = A.naive(q, k, v, scale=1.0, window=W, upcast=True, return_weights=True)
share = 100 * seen.float().mean()
left, right = panels(2, 9, 4.2)
matrix(seen, f"{seen.sum():,} of {T * T:,} scores\nmay be used ({share:.0f} %)", axes=left)
matrix(weights[0, 1], "weights of head 1: zero outside the\nband, yet computed and stored",
       axes=right, limits=(0, 0.12), bar=True)
assert round(share.item()) == 27 and (weights[0, 1][~seen] == 0).all()

# %% [markdown]
# About a quarter is of use. The matrix also needs much memory. Here are the numbers for one layer of gpt-neo-125m at its full context, in float32.

# %%
n, heads, width = 2048, 12, 64
scores, qkvo = heads * n * n * 4, 4 * heads * n * width * 4            # bytes
used = {window: A.visible(n, n, window).float().mean().item() for window in (256, None)}
print(f"scores {scores / 1e6:.0f} MB; q, k, v and the output together {qkvo / 1e6:.0f} MB")
print(f"of use: {used[256]:.0%} in a local layer, {used[None]:.0%} in a global one")
assert scores == 8 * qkvo and round(100 * used[256]) == 12 and round(100 * used[None]) == 50

# %% [markdown]
# The scores take eight times as much memory as q, k, v and the output together. So there are two things to gain. The scores need not be written to memory at all, if softmax can be taken without the whole row (section 4). And in a local layer most of them need not be computed (section 6).
#
# ## 4. Softmax in one pass
#
# Softmax divides exp(s - m) by its sum, where m is the largest score of the row. Without m, exp would overflow for large scores. But m is known only at the end of the row. **Online softmax** works with the largest score *so far*. When a block brings a larger one, everything that was summed before is too large, by the factor exp(new m - old m). So the old sum is multiplied by the inverse of this factor, `fade`. The weighted sum of values, o, is corrected in the same way.
#
# Here it is in plain torch; `s` is (rows, S) and `v` is (S, D). `top` is what is subtracted in the exponent; for now it is the maximum itself.

# %%
def online(s, v, size, top=lambda risen: risen):
    """m, l, o of each row after every block of `size` keys; o / l at the end is softmax(s) v."""
    m = torch.full((len(s),), float("-inf"))               # (rows,)
    l, o = torch.zeros(len(s)), torch.zeros(len(s), v.size(1))         # (rows,), (rows, D)
    for s_block, v_block in zip(s.split(size, 1), v.split(size)):
        risen = torch.maximum(m, s_block.amax(1))
        p = torch.exp(s_block - top(risen)[:, None])
        fade = torch.exp(m - top(risen))
        l = l * fade + p.sum(1)
        o = o * fade[:, None] + p @ v_block
        m = risen
        yield m, l, o

# %% [markdown]
# We follow the last token of the speech in head 1. The 64 keys of its window come in four blocks of 16. The largest scores of the blocks are -1.58, -1.02, -0.26 and -1.00.
#
# **Predict:** in which blocks is the old sum made smaller?

# %% alt="Three panels. The largest score so far rises in blocks 2 and 3; the old sum shrinks there by a factor below 1 before the new part is added; the accumulator ends as the row of the definition."
s_row, v_row = (q @ k.mT)[0, 1, -1:, -W:], v[0, 1, -W:]    # (1, 64) scores, (64, D) values
steps = [(m[0], l[0], o[0]) for m, l, o in online(s_row, v_row, 16)]
truth = (s_row.softmax(1) @ v_row)[0]
online_steps(s_row[0], steps, truth, 16)
assert [a[0] < b[0] for a, b in zip(steps, steps[1:])] == [True, True, False]
assert (steps[-1][2] / steps[-1][1] - truth).abs().max() < 1e-5

# %% [markdown]
# The maximum rises in blocks 2 and 3 (red, left). So the old sum shrinks from the dashed line to the blue bar (middle), and o becomes paler by the same factor (right), before the part of the new block is added. In block 4 the maximum does not rise, and the factor is 1. At the end, o / l is the row of the definition.
#
# ### Exercise 3.3 · Online softmax of one row
#
# Difficulty 2 of 5 · 15 minutes
#
# Now as a kernel, without the values. Program `t` goes once through row `t` of `X`, `BLOCK` numbers at a time, and stores the largest number `m` and the sum `l` of exp(x - m). `S` is any number; inside a kernel, `for start in range(0, S, BLOCK)` is an ordinary loop.

# %% tags=["stub"]
@triton.jit
def row_softmax_kernel(X, M, L, S, BLOCK: tl.constexpr):
    """M[t] = max of X[t, 0:S] and L[t] = Σ exp(X[t, j] - M[t]), in one pass over the row."""
    ...

# %% tags=["check"]
with exercise("3.3"):
    for rows, S_ in [(2, 16), (3, 40), (4, 5)]:
        x = 5 * torch.randn(rows, S_, generator=torch.Generator().manual_seed(S_)) - 20
        m_, l_ = (torch.full((rows,), -1.0, device=device) for _ in range(2))
        row_softmax_kernel[(rows,)](x.to(device), m_, l_, S_, BLOCK=16)
        same(m_, x.amax(1), f"m of {rows} rows, S = {S_}")
        same(l_, (x - x.amax(1, True)).exp().sum(1), f"l of {rows} rows, S = {S_}", 1e-5)

# %% tags=["wrong"]
@triton.jit
def row_softmax_kernel(X, M, L, S, BLOCK: tl.constexpr):
    t, m, l = tl.program_id(0), float("-inf"), 0.0
    for start in range(0, S, BLOCK):
        j = start + tl.arange(0, BLOCK)
        x = tl.load(X + t * S + j, mask=j < S, other=float("-inf"))
        m = tl.maximum(m, tl.max(x, 0))
        l = l + tl.sum(tl.exp(x - m), 0)                   # the old sum stays as it was
    tl.store(M + t, m)
    tl.store(L + t, l)

# %% tags=["wrong"]
@triton.jit
def row_softmax_kernel(X, M, L, S, BLOCK: tl.constexpr):
    t, m, l = tl.program_id(0), float("-inf"), 0.0
    for start in range(0, S, BLOCK):
        j = start + tl.arange(0, BLOCK)
        x = tl.load(X + t * S + j, mask=j < S, other=0.0)  # 0 is a score like any other
        risen = tl.maximum(m, tl.max(x, 0))
        l = l * tl.exp(m - risen) + tl.sum(tl.exp(x - risen), 0)
        m = risen
    tl.store(M + t, m)
    tl.store(L + t, l)

# %% tags=["wrong"]
@triton.jit
def row_softmax_kernel(X, M, L, S, BLOCK: tl.constexpr):
    t, m, l = tl.program_id(0), float("-inf"), 0.0
    for start in range(0, S, BLOCK):
        j = start + tl.arange(0, BLOCK)
        x = tl.load(X + t * S + j, mask=j < S, other=float("-inf"))
        old, m = m, tl.maximum(m, tl.max(x, 0))
        l = (l + tl.sum(tl.exp(x - m), 0)) * tl.exp(old - m)       # the new part fades too
    tl.store(M + t, m)
    tl.store(L + t, l)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Start with `m, l = float("-inf"), 0.0`. The loop is that of `online`, with one row and without o. Keep the old m until `fade` has been computed.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# @triton.jit
# def row_softmax_kernel(X, M, L, S, BLOCK: tl.constexpr):
#     t, m, l = tl.program_id(0), float("-inf"), 0.0
#     for start in range(0, S, BLOCK):
#         j = start + tl.arange(0, BLOCK)
#         x = tl.load(X + t * S + j, mask=j < S, other=float("-inf"))
#         risen = tl.maximum(m, tl.max(x, 0))
#         l = l * tl.exp(m - risen) + tl.sum(tl.exp(x - risen), 0)
#         m = risen
#     tl.store(M + t, m)
#     tl.store(L + t, l)
# ```
# </details>

# %% [markdown]
# ## 5. The NaN
#
# **A deliberate mistake.** Scores that do not count are set to -inf, since exp(-inf) = 0. That is right as long as each row has seen *something* that counts. Below are 16 queries with W = 4, and their keys in blocks of 8. The keys begin where the window of the first query begins.
#
# **Predict:** which of these 16 rows become NaN?

# %% alt="A narrow diagonal band of scores that count, cut into blocks of 8 keys; the lower eight rows, which see nothing in the first block, are marked NaN."
seen, v_tile = A.visible(16, 19, 4), v[0, 1, 100:119]      # queries at 3 to 18, keys at 0 to 18
s = (q[0, 1, 103:119] @ k[0, 1, 100:119].mT).masked_fill(~seen, float("-inf"))
*_, (m, l, o) = online(s, v_tile, 8)                       # what the last block gives
broken = (o / l[:, None]).isnan().any(1)
masked_tiles(seen, 8, broken.nonzero().flatten().tolist(), "which scores count; rows with NaN")
assert torch.equal(broken, ~seen[:, :8].any(1)) and broken.sum() == 8

# %% [markdown]
# They are exactly the rows that see nothing in the *first* block. Their largest score so far is -inf, and -inf - (-inf) is NaN. Once NaN is in the sum, it stays there. A row that sees nothing in a *later* block is not harmed, because its maximum is finite by then. The kernel meets such rows where a block has more queries than keys, and in batches that are padded on the left.
#
# **The remedy**: as long as a row has seen nothing, subtract 0. Then p = exp(-inf - 0) = 0 and fade = exp(-inf - 0) = 0.
#
# `naive` uses the lowest finite number in place of -inf. In one pass this would bring another mistake: exp(lowest - lowest) = 1, so keys that may not be read would be counted until a real score comes.

# %%
def safe(risen):
    return torch.where(risen == float("-inf"), 0.0, risen)
*_, (m, l, o) = online(s, v_tile, 8, top=safe)
same(o / l[:, None], s.softmax(1) @ v_tile, "the definition's rows", tolerance=1e-5)

# %%
finite = s.clamp(min=torch.finfo(s.dtype).min)             # the lowest finite number for -inf
m, l, o = next(online(finite, v_tile, 8))                  # after block 1
print("row 15 may read none of the 8 keys of block 1, and has counted", l[15].item())
assert l[15] == 8

# %% [markdown]
# ### Exercise 3.4 · Two halves make a whole
#
# Difficulty 3 of 5 · 15 minutes
#
# With one query and a long cache there is only one block of queries, so most of a GPU would have nothing to do. Therefore the *keys* are divided among several programs, and their (m, l, o) are merged afterwards (“split-K”, “Flash-Decoding”). Write the merge. For some rows, one half or both may be empty: then m = -inf, l = 0, o = 0 there. This must not become NaN.

# %% tags=["stub"]
def merge(one, two):
    """(m, l, o) of the keys of `one` and `two` together; m and l are (rows,), o is (rows, D)."""
    ...

# %% tags=["check"]
with exercise("3.4"):
    s_ = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) * 5
    v_ = torch.arange(12.0).view(12, 1)
    s_[1, :7], s_[2, 7:], s_[3] = [float("-inf")] * 3      # left, right, both halves empty
    *_, both = online(s_, v_, 3, top=safe)
    *_, left_ = online(s_[:, :7], v_[:7], 3, top=safe)
    *_, right_ = online(s_[:, 7:], v_[7:], 3, top=safe)
    found = merge(left_, right_)
    assert found is not None and len(found) == 3, f"came {found}, expected m, l and o"
    for name, mine, true in zip("mlo", found, both):
        same(mine, true, f"{name}, rows: full, left, right, both halves empty", 1e-5)

# %% tags=["wrong"]
def merge(one, two):                                       # sums of different maxima, as they are
    (m1, l1, o1), (m2, l2, o2) = one, two
    return torch.maximum(m1, m2), l1 + l2, o1 + o2

# %% tags=["wrong"]
def merge(one, two):                                       # NaN where both halves are empty
    (m1, l1, o1), (m2, l2, o2) = one, two
    m = torch.maximum(m1, m2)
    a, b = torch.exp(m1 - m), torch.exp(m2 - m)
    return m, l1 * a + l2 * b, o1 * a[:, None] + o2 * b[:, None]

# %% tags=["wrong"]
def merge(one, two):                                       # fades o, and forgets l
    (m1, l1, o1), (m2, l2, o2) = one, two
    m = torch.maximum(m1, m2)
    a, b = torch.exp(m1 - safe(m)), torch.exp(m2 - safe(m))
    return m, l1 + l2, o1 * a[:, None] + o2 * b[:, None]

# %% [markdown]
# <details><summary>Hint</summary>
#
# Both halves fade to the larger of the two maxima; for one of them the factor is exp(0) = 1. This is one step of `online` with sums in place of a block.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def merge(one, two):
#     (m1, l1, o1), (m2, l2, o2) = one, two
#     m = torch.maximum(m1, m2)
#     fade1, fade2 = torch.exp(m1 - safe(m)), torch.exp(m2 - safe(m))
#     return m, l1 * fade1 + l2 * fade2, o1 * fade1[:, None] + o2 * fade2[:, None]
# ```
# Apart from rounding, the result does not depend on how the keys are grouped. That is why the blocks can be visited in any order and divided among programs.
# </details>

# %% [markdown]
# ## 6. Which blocks of keys are needed
#
# A program of the attention kernel has one block of queries of one head. It visits the keys in blocks too. Such a rectangle of scores is a **tile**. A tile is *full* (all its scores count), *on an edge* (some are masked), or *skipped*: neither loaded nor computed. The function below finds the tiles in a simple way, by looking at the mask. The kernel may not do so, since it must never have the whole mask.

# %%
def tiles_of(T, S, window, rows, cols):
    """(first query, queries, first key, keys, full?) of each tile that holds a visible score."""
    seen, tiles = A.visible(T, S, window), []
    for first in range(0, T, rows):
        band = seen[first:first + rows]                    # what this block of queries reads
        needed = band.any(0).nonzero()                     # keys that some query of it reads
        begin, end = int(needed.min()), int(needed.max()) + 1
        for start in range(begin, end, cols):
            tile = band[:, start:min(start + cols, end)]
            full = bool(tile.all()) and tile.size(1) == cols
            tiles.append((first, len(tile), start, tile.size(1), full))
    return tiles

# %% [markdown]
# **Predict:** T = 2048, W = 256, blocks of 64. So there are 32 blocks of keys. How many of them does a block of queries need at most? (Four blocks are 256 keys. The answer is not four.)

# %% tags=["cover"] alt="Two squares of keys and queries. In the local layer a narrow band of 150 of 1024 tiles is visited, in the global layer the lower triangle of 528."
local, whole = (tiles_of(2048, 2048, window, 64, 64) for window in (256, None))
visits = [sum(tile[0] == first for tile in local) for first in range(0, 2048, 64)]
left, right = panels(2, 9, 5)
key_blocks(local, 2048, 2048, f"local layer, W = 256: {len(local)} tiles of 1024", axes=left)
key_blocks(whole, 2048, 2048, f"global layer: {len(whole)} tiles of 1024", axes=right)
key_block_legend(left)
assert max(visits) == 5 and (len(local), len(whole)) == (150, 528)

# %% [markdown]
# Five. The first query of a block reads back 255 keys, and the last one is 63 positions further on. Together they need 319 keys, just less than 5 · 64. A local layer adds 5 tiles for each further block of queries; a global layer adds one more each time.
#
# Smaller blocks compute fewer scores that nobody needs. But then there are more steps with less work in each, and the matrix units of a GPU (tensor cores) want at least 16 × 16. Move the sliders to see it.

# %% tags=["interactive"]
from ipywidgets import interact
@interact(window=(16, 512, 16), block=[16, 32, 64, 128])
def tile_grid(window=128, block=64):
    tiles = tiles_of(512, 512, window, block, block)
    ratio = len(tiles) * block ** 2 / A.visible(512, 512, window).sum()
    title = f"{len(tiles)} tiles, {ratio:.2f} times the needed scores"
    key_block_legend(key_blocks(tiles, 512, 512, title))
    plt.show()

# %% [markdown]
# ### Exercise 3.5 · First and last key
#
# Difficulty 2 of 5 · 10 minutes
#
# The T queries are the *last* T of S positions: query row r is at position S - T + r. For the queries `first, …, first + rows - 1` (of which those from T on do not exist) give the first key that any of them reads, and one past the last. Use arithmetic only: no mask and no loop.

# %% tags=["stub"]
def key_range(first, rows, T, S, window):
    """(begin, end): keys begin, …, end - 1 are all that these queries may read, none too many."""
    ...

# %% tags=["check"]
with exercise("3.5"):
    for T_, S_, W_, rows in [(37, 37, 5, 16), (37, 100, 20, 16), (1, 300, 256, 64),
                             (64, 64, 1, 64), (40, 50, 50, 16)]:
        for first in range(0, T_, rows):
            needed = A.visible(T_, S_, W_)[first:first + rows].any(0).nonzero()
            right = (needed.min().item(), needed.max().item() + 1)
            case = f"first {first}, rows {rows}, T {T_}, S {S_}, W {W_}"
            same(key_range(first, rows, T_, S_, W_), right, case)

# %% tags=["wrong"]
def key_range(first, rows, T, S, window):                  # forgets the cached keys
    return max(first - window + 1, 0), min(first + rows, T)

# %% tags=["wrong"]
def key_range(first, rows, T, S, window):                  # W keys before the query: one too many
    return max(S - T + first - window, 0), min(S - T + first + rows, S)

# %% tags=["wrong"]
def key_range(first, rows, T, S, window):                  # counts queries that do not exist
    return max(S - T + first - window + 1, 0), S - T + first + rows

# %% [markdown]
# <details><summary>Hint</summary>
#
# The earliest key is that of the first query: its position - (window - 1), but not less than 0. The latest key is the last query's own, if that query exists.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def key_range(first, rows, T, S, window):
#     begin = max(S - T + first - window + 1, 0)
#     end = min(S - T + first + rows, S)
#     return begin, end
# ```
# The same two lines are in the project's kernel. All that the kernel saves in a local layer is due to them.
# </details>

# %% [markdown]
# ## 7. One tile, then the band
#
# Now attention itself, first for a text so short that all its scores are one tile. `tl.dot` multiplies two matrices, and `tl.trans` transposes. `input_precision="ieee"` forbids a GPU to round float32 inputs to fewer bits (notebook 3b shows what that would cost).
#
# ### Exercise 3.6 · One tile
#
# Difficulty 3 of 5 · 20 minutes
#
# One program, one head, at most N = 16 tokens, D = 16. The loads are written. Compute the scores, decide which of them count (0 ≤ i - j < window), take the softmax of each row, and store the first `T` rows of the output.

# %% tags=["stub"]
@triton.jit
def tile_kernel(Q, K, V, OUT, T, window, scale, D: tl.constexpr, N: tl.constexpr):
    """OUT = softmax(Q Kᵀ · scale, where visible) V, for T <= N tokens."""
    t = tl.arange(0, N)                                    # the tokens
    at, ok = t[:, None] * D + tl.arange(0, D)[None, :], (t < T)[:, None]    # (N, D), (N, 1)
    q = tl.load(Q + at, mask=ok, other=0.0)
    k = tl.load(K + at, mask=ok, other=0.0)
    v = tl.load(V + at, mask=ok, other=0.0)
    ...

# %% tags=["check"]
with exercise("3.6"):
    for T_, W_ in [(1, 1), (16, 16), (16, 3), (11, 4)]:
        generator = torch.Generator().manual_seed(T_)
        q_, k_, v_ = torch.randn(3, 1, 1, T_, 16, generator=generator).to(device)
        found = torch.full((16, 16), -1.0, device=device)
        tile_kernel[(1,)](q_, k_, v_, found, T_, W_, 0.25, D=16, N=16)
        right = A.naive(q_, k_, v_, scale=0.25, window=W_)[0, 0]
        same(found[:T_], right, f"T = {T_}, W = {W_}", tolerance=1e-5)
        same(found[T_:], torch.full((16 - T_, 16), -1.0), f"rows from T = {T_} on")

# %% tags=["wrong"]
@triton.jit
def tile_kernel(Q, K, V, OUT, T, window, scale, D: tl.constexpr, N: tl.constexpr):
    t = tl.arange(0, N)
    at, ok = t[:, None] * D + tl.arange(0, D)[None, :], (t < T)[:, None]
    q, k = tl.load(Q + at, mask=ok, other=0.0), tl.load(K + at, mask=ok, other=0.0)
    v = tl.load(V + at, mask=ok, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    gap = t[:, None] - t[None, :]
    s = tl.where((gap >= 0) & (gap <= window), s, float("-inf"))           # one key too many
    p = tl.exp(s - tl.max(s, 1)[:, None])
    tl.store(OUT + at, tl.dot(p, v, input_precision="ieee") / tl.sum(p, 1)[:, None], mask=ok)

# %% tags=["wrong"]
@triton.jit
def tile_kernel(Q, K, V, OUT, T, window, scale, D: tl.constexpr, N: tl.constexpr):
    t = tl.arange(0, N)
    at, ok = t[:, None] * D + tl.arange(0, D)[None, :], (t < T)[:, None]
    q, k = tl.load(Q + at, mask=ok, other=0.0), tl.load(K + at, mask=ok, other=0.0)
    v = tl.load(V + at, mask=ok, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    gap = t[:, None] - t[None, :]
    p = tl.exp(s - tl.max(s, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    p = tl.where((gap >= 0) & (gap < window), p, 0.0)      # masked after softmax: sums below 1
    tl.store(OUT + at, tl.dot(p, v, input_precision="ieee"), mask=ok)

# %% tags=["wrong"]
@triton.jit
def tile_kernel(Q, K, V, OUT, T, window, scale, D: tl.constexpr, N: tl.constexpr):
    t = tl.arange(0, N)
    at, ok = t[:, None] * D + tl.arange(0, D)[None, :], (t < T)[:, None]
    q, k = tl.load(Q + at, mask=ok, other=0.0), tl.load(K + at, mask=ok, other=0.0)
    v = tl.load(V + at, mask=ok, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    gap = t[:, None] - t[None, :]
    s = tl.where((gap >= 0) & (gap < window), s, float("-inf"))
    p = tl.exp(s - tl.max(s, 1)[:, None])                  # the division is forgotten
    tl.store(OUT + at, tl.dot(p, v, input_precision="ieee"), mask=ok)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `gap = t[:, None] - t[None, :]` is i - j for the whole tile. `tl.where` sets the scores that do not count to -inf. `tl.max(s, 1)` and `tl.sum(p, 1)` go along the rows. Every query reads at least its own key, so no NaN arises here.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# @triton.jit
# def tile_kernel(Q, K, V, OUT, T, window, scale, D: tl.constexpr, N: tl.constexpr):
#     t = tl.arange(0, N)
#     at, ok = t[:, None] * D + tl.arange(0, D)[None, :], (t < T)[:, None]
#     q = tl.load(Q + at, mask=ok, other=0.0)
#     k = tl.load(K + at, mask=ok, other=0.0)
#     v = tl.load(V + at, mask=ok, other=0.0)
#     s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale             # (N, N)
#     gap = t[:, None] - t[None, :]
#     s = tl.where((gap >= 0) & (gap < window), s, float("-inf"))
#     p = tl.exp(s - tl.max(s, 1)[:, None])
#     o = tl.dot(p, v, input_precision="ieee") / tl.sum(p, 1)[:, None]
#     tl.store(OUT + at, o, mask=ok)
# ```
# </details>

# %% [markdown]
# ### Exercise 3.7 · The band
#
# Difficulty 4 of 5 · 30 minutes
#
# Everything together: for any T, with S = T. A program has `ROWS` queries, `first, …, first + ROWS - 1`. It visits only the keys of exercise 3.5, `COLS` at a time, with the online softmax of section 4 and the remedy of section 5. In one of the checks a block has more queries than keys; in another, the keys far before the window hold NaN.

# %% tags=["stub"]
@triton.jit
def band_kernel(Q, K, V, OUT, T, window, scale,
                D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """OUT (T, D) for ROWS queries, from the keys in their windows."""
    first = tl.program_id(0) * ROWS
    i, d = first + tl.arange(0, ROWS), tl.arange(0, D)
    q_at, q_ok = i[:, None] * D + d[None, :], (i < T)[:, None]
    q = tl.load(Q + q_at, mask=q_ok, other=0.0)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l, o = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    ...

# %% tags=["check"]
with exercise("3.7"):
    for T_, W_, rows in [(16, 16, 16), (40, 5, 16), (37, 64, 16), (70, 4, 32), (50, 5, 16)]:
        generator = torch.Generator().manual_seed(T_)
        q_, k_, v_ = torch.randn(3, 1, 1, T_, 16, generator=generator).to(device)
        right = A.naive(q_, k_, v_, scale=0.25, window=W_)[0, 0]
        found, begin, case = torch.full_like(right, -1.0), 0, f"T {T_}, W {W_}, ROWS {rows}"
        if T_ == 50:                                       # no query from 32 on reads them
            k_[:, :, :16], v_[:, :, :16], begin = float("nan"), float("nan"), 32
            case += ", NaN in keys 0 to 15, queries 32 to 49"
        band_kernel[(triton.cdiv(T_, rows),)](q_, k_, v_, found, T_, W_, 0.25,
                                              D=16, ROWS=rows, COLS=16)
        same(found[begin:], right[begin:], case, tolerance=1e-5)

# %% tags=["wrong"]
@triton.jit
def band_kernel(Q, K, V, OUT, T, window, scale,
                D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    first = tl.program_id(0) * ROWS
    i, d = first + tl.arange(0, ROWS), tl.arange(0, D)
    q_at, q_ok = i[:, None] * D + d[None, :], (i < T)[:, None]
    q = tl.load(Q + q_at, mask=q_ok, other=0.0)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l, o = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    for start in range(0, tl.minimum(first + ROWS, T), COLS):              # visits all keys
        j = start + tl.arange(0, COLS)
        k_at, k_ok = j[:, None] * D + d[None, :], (j < T)[:, None]
        k, v = tl.load(K + k_at, mask=k_ok, other=0.0), tl.load(V + k_at, mask=k_ok, other=0.0)
        gap = i[:, None] - j[None, :]
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where((gap >= 0) & (gap < window), s, float("-inf"))
        risen = tl.maximum(m, tl.max(s, 1))
        top = tl.where(risen == float("-inf"), 0.0, risen)
        p, fade = tl.exp(s - top[:, None]), tl.exp(m - top)
        l = l * fade + tl.sum(p, 1)
        o = o * fade[:, None] + tl.dot(p, v, input_precision="ieee")
        m = risen
    l = tl.where(l == 0.0, 1.0, l)
    tl.store(OUT + q_at, o / l[:, None], mask=q_ok)

# %% tags=["wrong"]
@triton.jit
def band_kernel(Q, K, V, OUT, T, window, scale,
                D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    first = tl.program_id(0) * ROWS
    i, d = first + tl.arange(0, ROWS), tl.arange(0, D)
    q_at, q_ok = i[:, None] * D + d[None, :], (i < T)[:, None]
    q = tl.load(Q + q_at, mask=q_ok, other=0.0)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l, o = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    for start in range(tl.maximum(first - window + 1, 0), tl.minimum(first + ROWS, T), COLS):
        j = start + tl.arange(0, COLS)
        k_at, k_ok = j[:, None] * D + d[None, :], (j < T)[:, None]
        k, v = tl.load(K + k_at, mask=k_ok, other=0.0), tl.load(V + k_at, mask=k_ok, other=0.0)
        gap = i[:, None] - j[None, :]
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where((gap >= 0) & (gap < window), s, float("-inf"))
        risen = tl.maximum(m, tl.max(s, 1))                # without the remedy: NaN
        p, fade = tl.exp(s - risen[:, None]), tl.exp(m - risen)
        l = l * fade + tl.sum(p, 1)
        o = o * fade[:, None] + tl.dot(p, v, input_precision="ieee")
        m = risen
    tl.store(OUT + q_at, o / l[:, None], mask=q_ok)

# %% tags=["wrong"]
@triton.jit
def band_kernel(Q, K, V, OUT, T, window, scale,
                D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    first = tl.program_id(0) * ROWS
    i, d = first + tl.arange(0, ROWS), tl.arange(0, D)
    q_at, q_ok = i[:, None] * D + d[None, :], (i < T)[:, None]
    q = tl.load(Q + q_at, mask=q_ok, other=0.0)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l, o = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    for start in range(tl.maximum(first - window + 1, 0), tl.minimum(first + ROWS, T), COLS):
        j = start + tl.arange(0, COLS)
        k_at, k_ok = j[:, None] * D + d[None, :], (j < T)[:, None]
        k, v = tl.load(K + k_at, mask=k_ok, other=0.0), tl.load(V + k_at, mask=k_ok, other=0.0)
        gap = i[:, None] - j[None, :]
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where((gap >= 0) & (gap < window), s, float("-inf"))
        risen = tl.maximum(m, tl.max(s, 1))
        top = tl.where(risen == float("-inf"), 0.0, risen)
        p, fade = tl.exp(s - top[:, None]), tl.exp(m - top)
        l = l * fade + tl.sum(p, 1)
        o = o + tl.dot(p, v, input_precision="ieee")       # o does not fade
        m = risen
    l = tl.where(l == 0.0, 1.0, l)
    tl.store(OUT + q_at, o / l[:, None], mask=q_ok)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The loop is `for start in range(begin, end, COLS)`, with `tl.maximum` and `tl.minimum` in place of `max` and `min`. In the loop: load k and v as in `tile_kernel`, compute s, mask it, and do one step of `online` with `top` as in `safe`. Rows from T on may have read nothing; their l is 0.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# @triton.jit
# def band_kernel(Q, K, V, OUT, T, window, scale,
#                 D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
#     first = tl.program_id(0) * ROWS
#     i, d = first + tl.arange(0, ROWS), tl.arange(0, D)
#     q_at, q_ok = i[:, None] * D + d[None, :], (i < T)[:, None]
#     q = tl.load(Q + q_at, mask=q_ok, other=0.0)
#     m = tl.full((ROWS,), float("-inf"), tl.float32)
#     l, o = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
#     begin, end = tl.maximum(first - window + 1, 0), tl.minimum(first + ROWS, T)
#     for start in range(begin, end, COLS):
#         j = start + tl.arange(0, COLS)
#         k_at, k_ok = j[:, None] * D + d[None, :], (j < T)[:, None]
#         k = tl.load(K + k_at, mask=k_ok, other=0.0)
#         v = tl.load(V + k_at, mask=k_ok, other=0.0)
#         gap = i[:, None] - j[None, :]
#         s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
#         s = tl.where((gap >= 0) & (gap < window) & (j < T)[None, :], s, float("-inf"))
#         risen = tl.maximum(m, tl.max(s, 1))
#         top = tl.where(risen == float("-inf"), 0.0, risen)
#         p, fade = tl.exp(s - top[:, None]), tl.exp(m - top)
#         l = l * fade + tl.sum(p, 1)
#         o = o * fade[:, None] + tl.dot(p, v, input_precision="ieee")
#         m = risen
#     l = tl.where(l == 0.0, 1.0, l)
#     tl.store(OUT + q_at, o / l[:, None], mask=q_ok)
# ```
# </details>

# %% [markdown]
# ## 8. The project's kernel
#
# You have written its core. What `forward_kernel` has besides:
#
# | part | what for |
# |---|---|
# | `batch`, `head`, strides | A grid of (B · H) × (blocks of queries). Strides say how far apart rows are, so a slice of a cache needs no copy. |
# | `D_PAD` | A head 80 wide is loaded as 128 numbers, of which the last 48 are 0. Zeros change no dot product. |
# | `S - T` | The queries are the last T of S positions. |
# | `KEY_MASK` | Keys that are padding do not count. |
# | `.to(v.dtype)` | float16 values are multiplied by float16 weights. l sums these *rounded* weights, so that part of the rounding cancels in o / l. |
# | `M`, `L` | Two numbers for each row, which the backward pass needs. |

# %%
show(A.forward_kernel, A.load, A.readable)

# %% [markdown]
# ## 9. Is it right?
#
# We compare it with `naive`, for sizes near the edges of the blocks (in float32 they have 16 or 32 rows): T below, at and above 16 and 32; heads whose width is a power of two and others; windows of one key, of a few, and none.

# %%
from itertools import product
def call(backend, T, S, D, window, dtype=torch.float32):
    """One head of random numbers through a backend."""
    generator = torch.Generator().manual_seed(T * 1000 + S + D)
    q, k, v = (torch.randn(1, 1, n, D, generator=generator).to(device, dtype) for n in (T, S, S))
    return A.attention(q, k, v, scale=D ** -0.5, window=window, backend=backend)

# %%
sizes = [(n, n + more, D, window) for n, more, D, window in
         product((1, 15, 16, 17, 32, 33), (0, 70), (4, 48, 64, 80), (1, 5, 256, None))]
gaps = [(call("triton", *size) - call("naive", *size)).abs().max().item() for size in sizes]
print(f"{len(sizes)} shapes, largest difference {max(gaps):.1e}")
assert max(gaps) < 1e-5

# %% [markdown]
# **Are the tiles really skipped?** The interpreter lets us count the calls of `tl.dot`: there are two for each tile.
#
# **Predict** the number of tiles for T = 2048 and W = 256, from section 6.

# %%
if A.INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder
    multiply = InterpreterBuilder.create_dot
    counted = dict(autospec=True, side_effect=multiply)    # counts calls, and still multiplies
    with patch.object(InterpreterBuilder, "create_dot", **counted) as dots:
        call("triton", 2048, 2048, 64, 256, torch.float16)
    print(dots.call_count, "products,", dots.call_count // 2, "tiles")
    assert dots.call_count == 2 * len(local)

# %% [markdown]
# ## 10. What is known, and how
#
# This notebook was made on a machine without a GPU, so none of its own figures is a time. What is said of the project's kernel is known in different ways, and they should not be mixed up.
#
# | what is said of the kernel | how it is known |
# |---|---|
# | Its numbers are those of the definition. | **Interpreted**, on a CPU: section 9 and [tests/test_triton.py](../tests/test_triton.py). |
# | It visits 150 tiles in a local layer and 528 in a global one. | **Computed** from the block sizes, and counted in the interpreter. |
# | Registers, shared memory and tensor-core instructions; no spilled registers. | **Compiled** for A100 and H100, without having one: [kernels.md](../benchmarks/kernels.md). |
# | Least time at the published peak of a GPU. | **Computed**, in the same file. It is a lower bound, not a prediction. |
# | Its error and its milliseconds on a GPU. | **Measured** on one NVIDIA H200: [gpu.md](../benchmarks/h200/gpu.md). [benchmarks/README.md](../benchmarks/README.md#on-a-gpu) says which later changes no GPU has run. |
# | The kernels of your exercises. | **Interpreted** by their checks. |
#
# The interpreter cannot show some mistakes at all: races between programs, too little shared memory, a `tl.dot` that is smaller than the hardware allows, rounding to fewer bits. Notebook 3b looks at the last.
#
# ## In three sentences
#
# A Triton kernel is written for one program and its block of numbers, and masks keep it within its data. Online softmax needs no row as a whole, so an attention kernel can visit keys block by block and never store the scores; rows that have seen nothing yet need a remedy against NaN. In a local layer each block of queries visits only the keys of its windows, so for long texts the work grows with T and not with T².
#
# ## Further
#
# * Milakov and Gimelshein 2018, “Online normalizer calculation for softmax”; Dao et al. 2022, “FlashAttention”; Dao 2023, “FlashAttention-2”.
# * [Triton's tutorials](https://triton-lang.org/main/getting-started/tutorials/index.html), of which number 6 is a fused attention, and Sasha Rush's [Triton Puzzles](https://github.com/srush/Triton-Puzzles), which also go in small steps.
# * What the kernel does not have: dropout (it refuses it), autotuning, split-K for decoding (exercise 3.4 is its core), and heads that share keys, which neither family has.
