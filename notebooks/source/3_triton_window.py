# %% [markdown]
# # 3. A Triton kernel that knows the window
#
# **Time** 60 minutes, and as long again for all four exercises. **Needs** PyTorch and the `triton` package (Linux; `pip install triton`), transformers for the last check; no GPU: without
# one the kernel runs in Triton's interpreter. Read before: `visible` and `naive` at the top of `attention.py`.
#
# **Objectives.** Afterwards you can
# * write a small Triton kernel: programs, blocks, masks at the ragged end;
# * say which blocks of keys a block of queries needs, and what a window saves, in work and in memory;
# * take a softmax in one pass, and say where it turns into NaN and why;
# * read every line of `forward_kernel`, and know what the backward kernels do with `m`, `l` and `delta`;
# * check a kernel against its definition, and say what such a check cannot show.
#
# **B** batch, **H** heads, **T** queries, **S** keys in view, **D** width of a head, **W** window in tokens.

# %%
import os, sys; sys.path[:0] = [".."]                      # the modules lie one folder up
import torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                   # before triton, which reads it
import triton, triton.language as tl
import attention as A

# %%
import inspect, textwrap
from lesson import exercise, official
from plots import *
device = "cuda" if torch.cuda.is_available() else "cpu"
assert A.INTERPRETED or device == "cuda"
print(f"triton {triton.__version__} on {device},", "interpreted" if A.INTERPRETED else "compiled")

# %% [markdown]
# ## 1. Programs and blocks
#
# A GPU kernel is a function that runs many times at once. Each run is a **program**; it knows its number (`tl.program_id`) and nothing of the
# others. In Triton a program works on whole **blocks** of numbers, whose length is a power of two. Tensors arrive as addresses: `X + at` is
# where the elements `at` of `X` lie, `tl.load` fetches them, `tl.store` writes them.
#
# Data rarely has a length that is a multiple of the block. So every load and store has a **mask**: where it is False nothing is
# read (the value is `other`) and nothing is written.
#
# The **interpreter** runs the programs one after the other, in Python, with NumPy for the blocks. It shows whether a kernel is right. It says nothing about
# speed, and section 7 shows one number format that it gets wrong.

# %%
@triton.jit
def add_kernel(X, Y, OUT, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)    # the elements of this program
    ok = at < N                                            # the last block may be ragged
    x = tl.load(X + at, mask=ok, other=0.0)
    y = tl.load(Y + at, mask=ok, other=0.0)
    tl.store(OUT + at, x + y, mask=ok)

# %% [markdown]
# **Predict:** ten numbers, blocks of four. How many programs are needed? The output below has room for 16 numbers and holds -1 at first. What
# will stand in places 10 to 15 afterwards?

# %%
x, y = torch.arange(10.0, device=device), torch.full((10,), 100.0, device=device)
out = torch.full((16,), -1.0, device=device)
programs = triton.cdiv(10, 4)
add_kernel[(programs,)](x, y, out, 10, BLOCK=4)            # [grid](arguments)
print(programs, "programs:", out.int().tolist())

# %% [markdown]
# The third program owned places 8 to 11, and its mask kept it off 10 and 11.
#
# ### Exercise 3.1 · The largest of each row
#
# Difficulty ●○○○○, importance ●●●●○, 10 minutes. Program `t` finds the largest of `X[t, 0], …, X[t, D - 1]` and stores it in `OUT[t]`. The rows of `X` lie one
# after the other, `D` is any number, and `D_PAD` is the next power of two. Mind what the places beyond `D` hold: in the check all numbers are negative.

# %% tags=["stub"]
@triton.jit
def row_max_kernel(X, OUT, D: tl.constexpr, D_PAD: tl.constexpr):
    """OUT[t] = max of X[t, 0:D], t this program's row; tl.max(x, 0) is a block's largest."""
    ...

# %% tags=["check"]
with exercise("3.1"):
    for rows, width, padded in [(3, 4, 4), (7, 5, 8), (2, 48, 64)]:
        memory = torch.full((rows * width + padded,), 1e9, device=device)    # 1e9 behind the rows
        values = memory[:rows * width].view(rows, width)
        values.copy_(-1 - torch.rand(rows, width))
        found, right = torch.full((rows,), float("nan"), device=device), values.amax(1)
        row_max_kernel[(rows,)](values, found, D=width, D_PAD=padded)
        assert torch.equal(found, right), f"D = {width}: {found.tolist()}, not {right.tolist()}"

# %% [markdown]
# <details><summary>Hint</summary>
#
# Row t begins at `X + t * D`. A place that does not exist must not win, and 0 beats every negative number: which value never wins?
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
# The neutral element of max is -inf, as that of a sum is 0. Section 4 starts its running maximum there, and section 5 shows what that costs.
# </details>

# %% tags=["wrong"]
@triton.jit
def row_max_kernel(X, OUT, D: tl.constexpr, D_PAD: tl.constexpr):
    t, d = tl.program_id(0), tl.arange(0, D_PAD)
    x = tl.load(X + t * D + d, mask=d < D, other=0.0)      # 0 wins against negative numbers
    tl.store(OUT + t, tl.max(x, 0))

# %% tags=["wrong"]
@triton.jit
def row_max_kernel(X, OUT, D: tl.constexpr, D_PAD: tl.constexpr):
    t, d = tl.program_id(0), tl.arange(0, D_PAD)
    x = tl.load(X + t * D + d)                             # reads into the next row
    tl.store(OUT + t, tl.max(x, 0))

# %% [markdown]
# ## 2. What the definition costs
#
# The running example is a speech, read by `demo-neo`: a GPT-Neo of 4 layers with 4 heads, D = 64, of which every second layer is **local**, with W = 64.
# A spy in the place of `attention` keeps the q, k and v of each layer.

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
ids = AutoTokenizer.from_pretrained(FOLDER)(SPEECH, return_tensors="pt").input_ids
layers = []
def spy(q, k, v, **how):
    layers.append((q, k, v))
    return A.attention(q, k, v, **how)
with patch("neo.attention", spy):
    model(ids)
q, k, v = layers[1]                                        # the first local layer
print("ids", tuple(ids.shape), "  q, k, v", tuple(q.shape), "= (B, H, T, D)",
      "  windows", model.config.windows)

# %% [markdown]
# `naive` forms the whole T × S matrix of scores, sets what a query may not read to the lowest finite number, and takes the softmax of each row.
#
# **Predict:** which part of that matrix is of use in this layer, with T = S = 199 and W = 64? A half, a third, a quarter?

# %%
T, W = ids.size(1), 64
seen = A.visible(T, T, W)
_, weights = A.naive(q, k, v, scale=1.0, window=W, upcast=True, return_weights=True)
share = 100 * seen.float().mean()
print("weights", tuple(weights.shape), f" {share:.0f} % of use")

# %%
left, right = panels(2, 9, 4.2)
matrix(seen, f"the band: {seen.sum():,} of {T * T:,} scores\nmay be used ({share:.0f} %)",
       axes=left)
matrix(weights[0, 1], "head 1's weights: zero outside the band,\nyet computed and stored",
       axes=right, limits=(0, 0.12), bar=True);

# %%
n, heads, width = 2048, 12, 64                             # a full context of gpt-neo-125m
scores, qkvo = heads * n * n * 4, 4 * heads * n * width * 4            # bytes in float32
print(f"q, k, v, o: {qkvo / 1e6:.0f} MB     the scores of one layer: {scores / 1e6:.0f} MB,",
      f"{scores / qkvo:.0f} times as much")
for name, window in ("local, W = 256", 256), ("global", None):
    print(f"of use, {name}: {100 * A.visible(n, n, window).float().mean():.0f} %")

# %% [markdown]
# So there are two things to gain. The scores need not be written to memory at all, if softmax can be taken without having the whole row (section
# 4). And in a local layer most of them need not be computed (section 3).
#
# ## 3. Which blocks of keys are needed
#
# A program of the kernel owns one block of queries of one head. It walks over the keys in blocks too; such a rectangle of scores is a **tile**. A tile
# can be *full* (all its scores count), *on an edge* (some are masked), or *skipped*: neither loaded nor computed. The function below finds
# the tiles the lazy way, by looking at the mask. The kernel may not: it must never form the mask as a whole.

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

print(tiles_of(8, 8, 3, 4, 4))

# %% [markdown]
# **Predict:** T = 2048, W = 256, blocks of 64. That is 32 blocks of keys. How many of them does a block of queries need at most? (Four blocks are 256 keys.
# The answer is not four.)

# %%
local, whole = (tiles_of(2048, 2048, window, 64, 64) for window in (256, None))
for name, tiles in {"local layer, W = 256": local, "global layer": whole}.items():
    visits = [sum(tile[0] == first for tile in tiles) for first in range(0, 2048, 64)]
    print(f"{name}: {len(tiles)} tiles, {sum(tile[4] for tile in tiles)} of them full;",
          f"a block of queries needs at most {max(visits)} of 32")

# %% tags=["cover"]
left, right = panels(2, 9, 5)
key_blocks(local, 2048, 2048, f"local layer, W = 256: {len(local)} tiles of 1024", axes=left)
key_blocks(whole, 2048, 2048, f"global layer: {len(whole)} tiles of 1024", axes=right)
key_block_legend(left)

# %% [markdown]
# Five: the first query of a block reaches back 255 keys, and the last one is 63 keys further on, so that together they need 319 keys, which is just under 5 · 64.
# Three of the five are full. The saving grows with T: a local layer adds 5 tiles for each new block of queries, a global one adds ever more.
#
# Smaller blocks waste less at the edges. But each is a step of its own with less to do, and the multiplying units of a GPU (tensor cores) want at
# least 16 × 16. Move the sliders, or read the picture below them.

# %% tags=["interactive"]
from ipywidgets import interact
@interact(window=(16, 512, 16), block=[16, 32, 64, 128])
def tile_grid(window=128, block=64):
    tiles = tiles_of(512, 512, window, block, block)
    title = f"{len(tiles)} tiles, {sum(tile[4] for tile in tiles)} full"
    key_block_legend(key_blocks(tiles, 512, 512, title))
    plt.show()

# %%
def waste(window, block):
    """Computed scores for each needed one."""
    computed = len(tiles_of(512, 512, window, block, block)) * block ** 2
    return computed / A.visible(512, 512, window).sum()

BLOCKS = [16, 32, 64, 128, 256]
lines = {f"W = {window}": [waste(window, b) for b in BLOCKS] for window in (16, 64, 256)}
axes = curves(BLOCKS, lines, "large blocks compute scores that nobody needs (T = 512)",
              "block: b queries, b keys at a time", "computed / needed scores",
              marker="o", log="xy")
plain_ticks(axes, BLOCKS, [1, 2, 5, 10, 20])

# %% [markdown]
# ### Exercise 3.2 · First and last key
#
# Difficulty ●●○○○, importance ●●●●●, 10 minutes. The T queries are the *last* T of S positions: query row r stands at position S - T + r. For the queries
# `first, …, first + rows - 1` (of which those from T on do not exist) give the first key that any of them reads, and one past the last. By arithmetic: no mask, no loop.

# %% tags=["stub"]
def key_range(first, rows, T, S, window):
    """(begin, end): keys begin, …, end - 1 are all that these queries may read, none too many."""
    ...

# %% tags=["check"]
with exercise("3.2"):
    for T_, S_, W_, rows in [(37, 37, 5, 16), (37, 100, 20, 16), (1, 300, 256, 64),
                             (64, 64, 1, 64), (40, 50, 50, 16)]:
        for first in range(0, T_, rows):
            needed = A.visible(T_, S_, W_)[first:first + rows].any(0).nonzero()
            right = (needed.min().item(), needed.max().item() + 1)
            case = f"first {first}, rows {rows}, T {T_}, S {S_}, W {W_}: {right}"
            assert key_range(first, rows, T_, S_, W_) == right, case

# %% [markdown]
# <details><summary>Hint</summary>
#
# The earliest key is the first query's: its position - (window - 1), but not less than 0. The latest key is the last query's own, if that query exists.
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
# These two lines stand in the kernel, and they are the whole of its saving.
# </details>

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
# Work and memory follow from counting tiles, without a GPU. `benchmarks/kernels.py` does so for the block sizes that the kernel uses in half precision.
# **These are computed figures, not measured ones**: how long a GPU takes for them, only a GPU can say.
#
# **Predict:** on axes that are both logarithmic, T² is a line of slope 2. Which slope will a local layer have, for T much larger than W?

# %%
from benchmarks import kernels
LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384]
whole_work = [kernels.work("forward", n, n, 64) for n in LENGTHS]
local_work = [kernels.work("forward", n, 256, 64) for n in LENGTHS]
print(local_work[0])

# %%
operations = {"naive": [4 * n * n * 64 / 1e9 for n in LENGTHS],
              "global": [work["operations"] / 1e9 for work in whole_work],
              "local, W = 256": [work["operations"] / 1e9 for work in local_work]}
for name, line in operations.items():
    print(f"{name}: from 8192 to 16384 tokens the work grows {line[-1] / line[-2]:.1f} times")

# %%
memory = {"naive: with scores": [(4 * n * 64 + n * n) * 2 / 1e6 for n in LENGTHS],
          "kernel, local or global": [work["least"] / 1e6 for work in whole_work]}
assert [work["least"] for work in whole_work] == [work["least"] for work in local_work]
left, right = panels(2, 9, 3.8)
curves(LENGTHS, operations, "work of a head, computed from tiles", "T, tokens",
       "10⁹ operations", axes=left, marker="o", log="xy")
curves(LENGTHS, memory, "memory of a head, float16, computed", "T, tokens",
       "MB for q, k, v, o (and scores)", axes=right, marker="o", log="xy")
plain_ticks(left, LENGTHS[::2])
plain_ticks(right, LENGTHS[::2])

# %% [markdown]
# Slope 1: beyond the window, twice the tokens are twice the work. A global layer does about half of the square, and the kernel's memory grows with T alone for both,
# since no score is ever stored. That needs a softmax that does not wait for the end of the row.
#
# ## 4. Softmax in one pass
#
# Softmax divides exp(s - m) by its sum, where m is the largest score of the row; without m, exp overflows. m is known only at the end of the row. **Online
# softmax** keeps the largest *so far*. When a block brings a larger one, all that was summed before is too large by the factor exp(new m - old m), so it
# is multiplied by the inverse: it *fades*. The same goes for the weighted sum of values, o. Here in plain torch: `s` is (rows, S), `v` is (S, D).
#
# The parameter `top` is what is subtracted in the exponent; for now it is the maximum itself.

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
# The speech's last token, head 1: the 64 keys of its window come in four blocks of 16.
#
# **Predict:** the maxima of the blocks are printed first. In which blocks will the old sum fade?

# %%
s_row, v_row = (q @ k.mT)[0, 1, -1:, -W:], v[0, 1, -W:]    # (1, 64) scores, (64, D) values
print("largest score of each block:", [f"{x:.2f}" for x in s_row.view(4, 16).amax(1)])
steps = [(m[0], l[0], o[0]) for m, l, o in online(s_row, v_row, 16)]
truth = (s_row.softmax(1) @ v_row)[0]
m, l, o = steps[-1]
print(f"largest difference from the softmax in two passes: {(o / l - truth).abs().max():.1e}")

# %%
online_steps(s_row[0], steps, truth, 16)

# %% [markdown]
# In blocks 2 and 3 the maximum rises (red, left). So the old sum shrinks from the dashed line to the blue bar (middle), and o grows paler by the same factor (right), before the
# block's own part is added. In block 4 nothing rises, and the factor is 1. At the end o / l is the definition's row.
#
# ## 5. The NaN
#
# A **deliberate mistake**. In a tile on the edge the scores that do not count are set to -inf, since exp(-inf) = 0. That is right as long as each row of the tile has
# *something* that counts. Below are 16 queries with W = 4, and keys in blocks of 8; the keys begin where the first query's window begins.
#
# **Predict:** which rows of this block of queries come out as NaN?

# %%
seen = A.visible(16, 19, 4)                                # queries at 3 to 18, keys at 0 to 18
s = (q[0, 1, 103:119] @ k[0, 1, 100:119].mT).masked_fill(~seen, float("-inf"))
v_tile = v[0, 1, 100:119]
*_, (m, l, o) = online(s, v_tile, 8)                       # the last block's
broken = (o / l[:, None]).isnan().any(1).nonzero().flatten().tolist()
masked_tiles(seen, 8, broken, "which scores count, in blocks of 8 keys; rows that became NaN")
blind = (~seen[:, :8].any(1)).nonzero().flatten().tolist()
print("rows with nothing visible in the first block:", blind, "  NaN:", broken)

# %% [markdown]
# Exactly the rows that see nothing in the *first* block. Their largest score so far is -inf, and -inf - (-inf) is NaN; once there, it never leaves the sum. A row
# that sees nothing *later* is unharmed: its maximum is finite by then.
# The kernel meets such rows where a block has more queries than keys (64 by 32 for heads 256 wide, section 6), and in batches that are padded on the left.
#
# `naive` avoids the trouble with the lowest finite number in place of -inf. In one pass that is a trap of its own: exp(lowest - lowest) = 1, so keys that may not be
# read are counted until a real score fades them to 0, and for ever in a row that reads nothing.
#
# **The repair**: as long as nothing has been seen, subtract 0. Then p = exp(-inf - 0) = 0 and fade = exp(-inf - 0) = 0.

# %%
def safe(risen):
    return torch.where(risen == float("-inf"), 0.0, risen)
*_, (m, l, o) = online(s, v_tile, 8, top=safe)
mine, right = o / l[:, None], s.softmax(1) @ v_tile        # (rows, D)
gap = (mine - right).abs().max()
print(f"NaN: {mine.isnan().sum()}, difference from softmax(s) v: {gap:.1e}")

# %%
finite = s.clamp(min=torch.finfo(s.dtype).min)             # the lowest finite number for -inf
m, l, o = next(online(finite, v_tile, 8))                  # after block 1
print("row 15 sees none of the block's keys, and has counted", l[15].item())
for line in inspect.getsource(A.forward_kernel.fn).splitlines():
    if "inf - inf" in line or "reads nothing" in line:
        print(line)

# %% [markdown]
# The last two lines are the kernel's: the same `where`, and one for rows that read nothing at all (padding), where l = 0 and o / l would be NaN once more.
#
# ### Exercise 3.3 · Two halves make a whole
#
# Difficulty ●●●○○, importance ●●●●○, 15 minutes. With one query and a long cache there is only one block of queries, and most of a GPU would idle. So the
# *keys* are dealt to several programs, and their (m, l, o) are merged afterwards (“split-K”, “Flash-Decoding”). Write the merge. Either half may be empty
# for some rows, or both: m = -inf, l = 0, o = 0. That must not become NaN.

# %% tags=["stub"]
def merge(one, two):
    """(m, l, o) of the keys of `one` and `two` together; m and l are (rows,), o is (rows, D)."""
    ...

# %% tags=["check"]
with exercise("3.3"):
    s_ = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) * 30
    v_ = torch.randn(12, 4)
    s_[1, :7], s_[2, 7:], s_[3] = [float("-inf")] * 3      # left, right, both halves empty
    *_, all_ = online(s_, v_, 3, top=safe)
    *_, left_ = online(s_[:, :7], v_[:7], 3, top=safe)
    *_, right_ = online(s_[:, 7:], v_[7:], 3, top=safe)
    for name, mine, true in zip("mlo", merge(left_, right_), all_):
        message = f"{name} is {mine.tolist()}, should be {true.tolist()}"
        assert torch.allclose(mine, true, atol=1e-6), message

# %% [markdown]
# <details><summary>Hint</summary>
#
# Both halves fade to the larger of the two maxima, one of them by exp(0) = 1. This is one step of `online` with sums in place of a block.
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
# It does not matter in which order, or how, the keys are grouped: that is why blocks can be walked, and dealt out, as one likes.
# </details>

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

# %% [markdown]
# ## 6. The kernel, part by part
#
# All pieces are there. `part` prints lines of a kernel as they stand in `attention.py`; the four cells that follow are together the whole of `forward_kernel`. (A kernel's
# Python function is its `.fn`.)

# %%
shown = []
def part(kernel, first, last):
    """Print the source from the line that begins with `first` to one that begins with `last`."""
    lines = inspect.getsource(getattr(kernel, "fn", kernel)).splitlines()
    begin = end = next(n for n, line in enumerate(lines) if line.strip().startswith(first))
    while not lines[end].strip().startswith(last):
        end += 1
    shown.extend(lines[begin:end + 1])
    print(textwrap.dedent("\n".join(lines[begin:end + 1])), end="\n\n")

part(A.forward_kernel, "@jit", "q = load")

# %% [markdown]
# **Who am I?** `tl.constexpr` arguments are compiled in, the others come at run time. Programs are numbered on a grid of (B · H) × (blocks of queries): from its two
# numbers a program gets its batch row, its head, and its first query. `i` are the queries' positions, counted from the lower-right corner as in `visible`. Strides say how far
# apart rows lie, so that a slice of a cache or of a fused qkv needs no copy.
#
# The helpers do the addressing. A head 80 wide is loaded as 128 numbers, of which the last 48 are 0: blocks are powers of two, and zeros change no dot product. The base
# is a 64-bit number, since tensors can have more than 2³¹ elements.

# %%
part(A.rows_of, "@jit", "return")
part(A.load, "@jit", "return")
for D, dtype in ((4, torch.float16), (80, torch.float16), (256, torch.float16),
                 (80, torch.float32)):
    print(f"D = {D}, {dtype}:", A.block_sizes(A.forward_kernel, D, dtype))

# %%
part(A.forward_kernel, "m = tl.full", "seen = ")
part(A.readable, "@jit", "return ok")

# %% [markdown]
# **Which keys?** m, l and o as in `online`, in float32 whatever the inputs are. `begin` and `end` are exercise 3.2. The loop starts at the first key that is needed, not at
# a multiple of COLS. `seen` is the rule of `visible` for one tile: 0 ≤ i - j < window, and the key is real. It is applied to every tile, full ones too.

# %%
part(A.forward_kernel, "s = tl.dot", "m = risen")

# %% [markdown]
# **One step of online softmax.** Line for line with section 4:
#
# | plain torch | kernel | what is different |
# |---|---|---|
# | `s` was there | `s = tl.dot(q, kᵀ) · scale`, then `where(seen, s, -inf)` | the tile is computed here and is gone afterwards |
# | `risen = maximum(m, s_block.amax(1))` | the same | |
# | `top(risen)` | `top` | the repair of section 5 |
# | `p = exp(s_block - top)` | `….to(v.dtype)` | float16 values are multiplied by float16 weights |
# | `l · fade + p.sum(1)` | `p.to(tl.float32)` | sums the *rounded* p, those that meet v: their rounding then cancels in o / l |
# | `o · fade + p @ v_block` | `tl.dot(p, v)` | summed in float32 |
#
# `input_precision="ieee"` forbids a GPU to round float32 inputs to fewer bits; section 8 shows what that would cost.

# %%
part(A.forward_kernel, "l = tl.where", "tl.store(L")
lines = inspect.getsource(A.forward_kernel.fn).splitlines()
assert all(line in shown for line in lines if line), "a line of the kernel is missing above"

# %% [markdown]
# **The end.** One division for each row, one rounding to the output's format. m and l go to memory as well, two numbers for each row: with them the backward pass can form
# any p again, p = exp(s - m) / l, instead of having kept T × S of them.
#
# ## 7. Is it right?
#
# Against `naive`, for sizes about the block edges (float32 has blocks of 16): T below, at and above 16; heads that are and are not powers of two; windows
# of one key, of a few, and none.

# %%
def call(backend, T, S, D, window, dtype=torch.float32, inputs=torch.float32):
    """One head of random numbers, rounded to `inputs`, through a backend in `dtype`."""
    generator = torch.Generator().manual_seed(T * 1000 + S + D)
    q, k, v = (torch.randn(1, 1, n, D, generator=generator).to(inputs).to(device, dtype)
               for n in (T, S, S))
    return A.attention(q, k, v, scale=D ** -0.5, window=window, backend=backend)

# %%
from itertools import product
sizes = [*product((1, 15, 16, 17, 37), (4, 48, 64, 80, 96), (1, 5, 256, None)),
         *product((300,), (48,), (1, 5, 256, None))]       # T, D, W
print(len(sizes), "shapes, among them", sizes[:3])

# %%
worst = 0
for n, D, window in sizes:
    gap = call("triton", n, n, D, window) - call("naive", n, n, D, window)
    worst = max(worst, gap.abs().max().item())
print(f"largest difference {worst:.1e}")
assert worst < 1e-5

# %% [markdown]
# And for T < S, the case of a cache; and in float16, where the yardstick is the definition's own rounding error: both are compared with float64, and ours may be at most
# twice as large as `naive`'s.

# %%
print("   T    S   D    W    naive's error   the kernel's   (float16, against float64)")
for size in [(1, 300, 64, 256), (37, 300, 64, 64), (65, 65, 80, 5), (300, 300, 96, 256),
             (300, 300, 48, None)]:
    half = dict(dtype=torch.float16, inputs=torch.float16)
    true = call("naive", *size, dtype=torch.float64, inputs=torch.float16)
    naive = (call("naive", *size, **half) - true).norm() / true.norm()
    ours = (call("triton", *size, **half) - true).norm() / true.norm()
    T_, S_, D, window = size
    print(f"{T_:4} {S_:4} {D:3} {window or 'all':>4}    {naive:.1e}         {ours:.1e}")
    assert ours <= 2 * naive

# %% [markdown]
# **Are the tiles really skipped?** The interpreter lets us count the `tl.dot`s of a run, two for each tile. And if the kernel read outside the band, NaN there would spread: the
# cell after the next one tries it.
#
# **Predict** the number of tiles, from section 3: T = 2048, W = 256.

# %%
if A.INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder
    multiply = InterpreterBuilder.create_dot
    counted = dict(autospec=True, side_effect=multiply)    # counts calls, and still multiplies
    with patch.object(InterpreterBuilder, "create_dot", **counted) as dots:
        call("triton", 2048, 2048, 64, 256, torch.float16)
    print(dots.call_count, "products,", dots.call_count // 2, "tiles")
    assert dots.call_count // 2 == len(local) == sum(kernels.tiles("forward", 2048, 256, 64))

# %%
q_, k_, v_ = (torch.randn(1, 1, n, 64, device=device) for n in (40, 300, 300))
how = dict(scale=0.125, window=64, backend="triton")
clean = A.attention(q_, k_, v_, **how)
k_[:, :, :197], v_[:, :, :197] = float("nan"), float("nan")
poisoned = A.attention(q_, k_, v_, **how)                  # query 0, at 260, reads from 197 on
print("the same to the bit, with NaN before the band:", torch.equal(clean, poisoned))
assert torch.equal(clean, poisoned)

# %% [markdown]
# **Where the interpreter is wrong, without a word.** NumPy has no bfloat16, and in this version of Triton the interpreter's `tl.dot` multiplies the *bit patterns* as whole
# numbers. The next cell calls the operator below `attention`, past its guard.

# %%
if A.INTERPRETED:
    x = torch.randn(1, 1, 40, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    unguarded, _, _ = A.triton_forward(x, x, x, None, 0.25, 7)
    guarded = A.attention(x, x, x, scale=0.25, window=7, backend="triton")
    right = A.attention(x, x, x, scale=0.25, window=7, backend="naive")
    print(f"largest output: unguarded {unguarded.abs().max():.1e}",
          f"  attention() {guarded.abs().max():.2f}   naive {right.abs().max():.2f}")
    part(A.triton_attention, "if INTERPRETED", "q, k, v")

# %% [markdown]
# So `triton_attention` casts to float32 first, which holds every bfloat16 exactly, and rounds the result; on a GPU the cast does not happen. A green test in an interpreter
# is a statement about the interpreter too.
#
# ## 8. What the interpreter cannot show: TF32
#
# For float32 inputs an NVIDIA GPU's `tl.dot` by default rounds to **TF32**: 10 bits of fraction instead of 23. The interpreter ignores `input_precision`. But the rounding can be
# imitated, on the speech's own q and k. **Predict:** how many digits of the scores are lost?

# %%
def tf32(x):
    bits = x.contiguous().view(torch.int32)                # of 23 bits of fraction 13 go:
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)     # add half of the last kept, cut

true = q.double() @ k.double().mT
for name, s_ in {"ieee": q @ k.mT, "tf32": tf32(q) @ tf32(k).mT}.items():
    error = (s_ - true).norm() / true.norm()
    moved = (s_.softmax(-1) - true.softmax(-1)).abs().max()
    print(f"{name}: scores off by {error:.0e} relative, weights by at most {moved:.0e}")

# %% [markdown]
# About three digits. In a kernel that claims to equal the float32 definition, this would be a bug that no CPU test sees. Nor does the interpreter know the least size of a
# `tl.dot`, shared memory, registers, or races. For those the kernels are compiled for real GPUs without having one: `python benchmark.py kernels`, results in
# `benchmarks/kernels.md`.
#
# ## 9. Backward
#
# With P the weights of a row, o = P v, and do the gradient of o:
#
# * dv = Pᵀ do and dp = do vᵀ, as for any product;
# * through softmax: ds = p (dp - **delta**), where delta = Σ p dp, one number for each row;
# * dq = ds k · scale and dk = dsᵀ q · scale.
#
# Nothing of size T × S is needed from the forward pass: s is computed again, and p = exp(s - m) / l. There are two kernels, since a program should own what it sums. `dq_kernel` owns
# queries and walks over keys; `dkv_kernel` owns keys and walks over the queries that read them, from the key's own position to `window - 1` further on.

# %%
part(A.dq_kernel, "for sweep", "dq += ")

# %% [markdown]
# Two sweeps over the same keys, the first only for delta. Most kernels save it: since Σ p dp = Σ p (do · v) = do · o, delta can be had from o without any sweep. The docstring says why not
# here. Where one key has nearly all the weight, dp - delta is a small difference of large numbers, and o has been rounded to half precision. The next cell computes dq on
# the speech with either delta; all else is float32.
#
# **Predict:** ten times worse, a hundred times, a thousand times?

# %%
do = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))  # a gradient of o
def dq_with(delta_from, dtype):
    """dq of the first local layer, with inputs that are exact in float16."""
    Q, K, V, DO = (x.half().to(dtype) for x in (q, k, v, do))
    P = (Q @ K.mT).masked_fill(~A.visible(T, T, W), float("-inf")).softmax(-1)
    dp = DO @ V.mT
    if delta_from == "dp":
        delta = (P * dp).sum(-1)
    else:
        delta = (DO * (P @ V).half().to(dtype)).sum(-1)    # from o, rounded to half precision
    return (P * (dp - delta[..., None])) @ K
print("dq", tuple(dq_with("dp", torch.float32).shape))

# %%
Q, K, V = (x.half().requires_grad_() for x in (q, k, v))
o = A.naive(Q, K, V, scale=1.0, window=W, upcast=True)
of_naive, = torch.autograd.grad(o, Q, do.half())
print("dq", tuple(of_naive.shape))

# %%
true = dq_with("dp", torch.float64)
for name, dq in {"delta = do · o, o in half precision": dq_with("o", torch.float32),
                 "delta = Σ p dp": dq_with("dp", torch.float32),
                 "naive in float16, all its rounding": of_naive}.items():
    print(f"{name:36} dq off by {(dq - true).norm() / true.norm():.0e}")

# %% [markdown]
# Rounding o, and nothing else, already costs more than all the rounding of `naive`. The price of the sweep can be read above: two products in each sweep and one more in
# the second are five for a tile, where three would do.
#
# **Check**: gradients of the kernels against autograd through `naive` in float64, for T < S, a ragged end and padding.

# %%
def all_gradients(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(2, 1, n, 16, generator=generator).to(device, dtype)
                   for n in (37, 60, 60, 37))
    real = torch.arange(60) >= torch.tensor([[0], [11]])   # row 1: 11 places of padding
    o = A.attention(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), scale=0.25,
                    window=20, key_mask=real.to(device), backend=backend)
    return torch.autograd.grad(o, (q, k, v), do)

found, right = all_gradients("triton", torch.float32), all_gradients("naive", torch.float64)
for name, mine, true in zip(("dq", "dk", "dv"), found, right):
    print(f"{name} {tuple(mine.shape)}: largest difference {(mine - true).abs().max():.1e}")
    assert (mine - true).abs().max() < 1e-5

# %% [markdown]
# ### Exercise 3.4 · The gradient of v, by blocks
#
# Difficulty ●●●●○, importance ●●●○○, 30 minutes. In plain torch, what `dkv_kernel` does for dv: for each block of `rows` keys, take only the queries that read one of
# them, form p from m and l, and sum pᵀ do. One head, T = S: q, k, do are (T, D), m and l are (T,). The check puts NaN into late queries, so that a block
# that looks too far is found out.

# %% tags=["stub"]
def dv_by_blocks(q, k, do, m, l, scale, window, rows):
    """dv (T, D); softmax's p is exp(s - m) / l where visible, 0 elsewhere."""
    ...

# %% tags=["check"]
with exercise("3.4"):
    generator = torch.Generator().manual_seed(0)
    Q, K, V, DO = torch.randn(4, 1, 1, 50, 8, dtype=torch.float64, generator=generator)
    A.naive(Q, K, V.requires_grad_(), scale=0.5, window=12).backward(DO)
    Q, K, DO, right = Q[0, 0], K[0, 0], DO[0, 0], V.grad[0, 0]
    s_ = (0.5 * Q @ K.T).masked_fill(~A.visible(50, 50, 12), float("-inf"))
    m_ = s_.amax(1)
    l_ = (s_ - m_[:, None]).exp().sum(1)
    found = dv_by_blocks(Q, K, DO, m_, l_, 0.5, 12, 8)
    assert found.shape == (50, 8), f"dv is {tuple(found.shape)}"
    assert (found - right).abs().max() < 1e-12, "dv differs from autograd's"
    Q[40:], DO[40:] = float("nan"), float("nan")           # key 23 is read up to query 34
    found = dv_by_blocks(Q, K, DO, m_, l_, 0.5, 12, 8)[:24]
    gap = (found - right[:24]).abs().max()
    assert gap < 1e-12, "a block looks at queries that do not read it"

# %% [markdown]
# <details><summary>Hint</summary>
#
# Keys `first, …, last` are read by the queries `first, …, last + window - 1`, as far as they exist. Within this tile the rule 0 ≤ i - j < window decides.
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
# The kernel visits these queries in blocks of COLS, which begin at multiples of COLS, and sums. It multiplies q by kᵀ as the forward pass does and then transposes the tile: k qᵀ may be rounded otherwise, and p would exceed 1 where all weight is on one key.
# </details>
#
# The kernel's own loop, for dk and dv together (its `begin` and `end` are for T ≤ S):

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

# %%
part(A.dkv_kernel, "begin", "end")
part(A.dkv_kernel, "s = tl.trans", "dk +=")

# %% [markdown]
# ## 10. In the model, and against the reference
#
# The backend is an argument of `from_pretrained`. The reference is transformers' own GPT-Neo with its eager attention, on the first 100 tokens, more than one window.

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
print(f"logits {tuple(mine.shape)}: {error:.1e} relative; same best token at every position:",
      torch.equal(mine.argmax(-1), theirs.argmax(-1)))
assert error < 1e-5

# %%
if found := official("roneneldan/TinyStories-1M", attn_implementation="triton"):
    story, tokenizer = found                               # heads 4 wide, padded to 16
    row = tokenizer("Once upon a time there was", return_tensors="pt").input_ids
    best = story.to(device)(row.to(device)).logits[0, -1].softmax(-1).topk(5)
    words = [repr(tokenizer.decode([i])) for i in best.indices.tolist()]
    bars(words, best.values, "TinyStories-1M, Triton kernel", "probability of the next token")

# %% [markdown]
# ## 11. Speed, on your GPU
#
# No GPU was at hand when this was written, so no figure is stored here, and block sizes were chosen by what compiles well. The next cell measures where there is one; `python benchmark.py
# attention --device cuda` does more. Milliseconds for 12 heads 64 wide, W = 256, float16; a backend that errs more than twice as much as `naive` gets no figure.

# %%
if device == "cuda":
    from benchmarks.backends import measure
    for n in (512, 1024, 2048, 4096, 8192):
        tensors = torch.randn(4, 1, 12, n, 64, device=device, dtype=torch.float16)
        for name in A.BACKENDS:
            print(n, name, measure(name, *tensors, backward=False, scale=0.125, window=256))
else:
    print("skipped: no CUDA GPU")

# %% [markdown]
# **What we left out:** dropout (the kernel refuses it); full tiles without mask arithmetic; autotuning, and warps that load while others multiply, as FlashAttention-3 does;
# split-K for decoding, of which exercise 3.3 is the heart; heads that share keys (grouped queries), which neither family has.
#
# **Further:** Milakov and Gimelshein 2018, “Online normalizer calculation for softmax”; Dao et al. 2022, “FlashAttention”, and Dao 2023, “FlashAttention-2”; Triton's tutorials,
# of which number 6 is a fused attention; Sasha Rush's Triton Puzzles; `tests/test_triton.py`, for what one can ask of a kernel.
