# %% [markdown]
# # GPT-NeoX: rotary positions and the parallel residual
#
# **Time** 45 minutes, and as much again for the four exercises. **Needs** a CPU; no GPU, no network, no complex numbers except in one exercise. You have
# seen attention once, GPT-2's or GPT-Neo's. Letters: B batch, T tokens, C width of the model, H heads, D width of a head, R rotated dims of a head, V vocabulary.
#
# **Objectives.** Afterwards you can
# * say what changed between GPT-Neo (2021) and GPT-NeoX (2022), and point at the lines;
# * explain why turning queries and keys by their positions makes a score depend on their distance alone, and predict that score with a formula;
# * tell the two conventions of pairing dims apart, and the two ways of cutting a QKV matrix, by what the wrong one costs;
# * say why angles are never computed in bfloat16;
# * draw both forms of the residual block, and show what the parallel one makes possible;
# * check a port against the reference so that none of these mistakes gets through.
#
# The model is `demo-neox`: 4 layers, C = 256, 4 heads of D = 64, trained on Shakespeare's plays. The file to have open is `neox.py`. The running
# example is a speech from *Macbeth*, a play that the model was not trained on. Its loss, the mean of −ln p over the next tokens, will tell us what a mistake
# costs, in nats per token.

# %%
import sys; sys.path[:0] = [".."]                      # the modules lie one folder up
import copy, inspect, json, math, torch, torch.nn.functional as F
import neo, neox
from difflib import unified_diff
from unittest.mock import patch
from benchmarks.shapes import SHAPES
from lesson import exercise, official
from load_weights import AutoModelForCausalLM, AutoTokenizer
from neox import GPTNeoXConfig, rotary_tables, rotate
from plots import *

# %%
FOLDER = "../checkpoints/demo-neox"
model = AutoModelForCausalLM.from_pretrained(FOLDER).requires_grad_(False)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
config, blocks = model.config, model.transformer.blocks
C, H, V = config.hidden_size, config.num_attention_heads, config.vocab_size
D, R, base = config.head_dim, config.rotary_ndims, config.rotary_emb_base
print(f"C = {C}   H = {H}   D = {D}   R = {R}   V = {V}   layers {len(blocks)}   base {base}")

TEXT = """MACBETH.
Tomorrow, and tomorrow, and tomorrow,
Creeps in this petty pace from day to day,
To the last syllable of recorded time;
And all our yesterdays have lighted fools
The way to dusty death. Out, out, brief candle!
Life's but a walking shadow; a poor player
That struts and frets his hour upon the stage
And then is heard no more: it is a tale
Told by an idiot, full of sound and fury,
Signifying nothing.
"""
ids = tokenizer(TEXT, return_tensors="pt").input_ids
T = ids.size(1)
right = model(ids, labels=ids)
print("ids", tuple(ids.shape), "→ logits", tuple(right.logits.shape))
print(f"loss {right.loss:.3f}; a guess among V ids would cost ln V = {math.log(V):.3f}")

# %% [markdown]
# ## 1 · The diff
#
# `neo.py` and `neox.py` have the same parts in the same order under the same names, so that `diff neo.py neox.py` is a table of contents.
#
# **Predict:** which of the parts below changed most, and which hardly at all, before you run the next cell.

# %%
for name in ("Attention", "MLP", "Block", "GPTNeoModel", "GPTNeoForCausalLM"):
    newer = name.replace("Neo", "NeoX")
    old = inspect.getsource(getattr(neo, name)).splitlines()
    new = inspect.getsource(getattr(neox, newer)).splitlines()
    added = sum(line.startswith("+") for line in unified_diff(old, new, n=0)) - 1  # less a title
    print(f"{newer:20} {added:3} of {len(new):3} lines are new")

# %% [markdown]
# | GPT-Neo | GPT-NeoX | section |
# |---|---|---|
# | a learned vector for each position, added to the token's | queries and keys turned by their position | 2, 3, 6 |
# | | only R of the D dims of a head are turned, in pairs of halves | 4, 5 |
# | three matrices for q, k and v, without bias | one matrix with bias, interleaved head by head | 7 |
# | attention, then the MLP | both at once | 8 |
# | output head = embedding | two matrices, and more rows than tokens | 9 |
# | tanh form of GELU | whatever `hidden_act` says, exact in Pythia's | end |
# | scores not divided by √D, every second layer local | divided by √D, every layer global | notebook 1 |
#
# ## 2 · Why rotate
#
# But for the causal mask, attention does not know the order of tokens: a score is q · k wherever the two stand. GPT-Neo adds a learned vector for each position, so position 512
# of a 512-row table does not exist. **Rotary position embedding** (Su et al. 2021) has no table to learn. It takes the dims of q and k in pairs, sees each
# pair as an arrow in the plane, and turns the arrow by an angle proportional to the token's position. Two functions are all of it.
#
# First a head that has nothing but one pair: R = D = 2. Its speed is base⁰ = 1 radian a token. **Predict:** at which position from 0 to 7 does the arrow come
# closest to where it started?

# %%
print(inspect.getsource(rotary_tables), inspect.getsource(rotate), sep="\n")
query, key = torch.tensor([0.9, 0.4]), torch.tensor([-0.3, 0.8])
cos, sin = rotary_tables(torch.arange(24)[None], 2, base, torch.float32)     # each (1, 1, 24, 1)
q = rotate(query.expand(1, 1, 24, 2), cos, sin)[0, 0]      # (24, 2): one arrow at 24 positions
k = rotate(key.expand(1, 1, 24, 2), cos, sin)[0, 0]
turning({"query at positions 0 … 7": q[:8], "key at positions 0 … 7": k[:8]}, width=6.4);

# %% [markdown]
# Now every score between the query at position m and the key at position n. **Predict:** this (24, 24) matrix has a simple structure; what will the picture
# show, before you run the next cell?

# %%
scores = q @ k.T                                           # (24, 24)
matrix(scores, "score by both positions", bar=True,
       x="n, position of the key", y="m, position of the query")
assert torch.allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-5)
print(f"m - n = 3 at m = 3, 10, 23: {scores[3, 0]:.5f} {scores[10, 7]:.5f} {scores[23, 20]:.5f}");

# %% [markdown]
# Along each diagonal, where m − n is the same, the score is the same. One line proves it. Turning by an angle is a matrix `R_m` whose transpose turns back, so
#
# $$(R_m q)\cdot(R_n k) = q^\top R_m^\top R_n\, k = q^\top R_{n-m}\, k .$$
#
# Positions went in, and only their difference comes out. **Predict:** what happens to the logits of the whole model if we tell it that the speech begins at
# position 300 and not at 0? And what happens in GPT-Neo?

# %%
def relative(x, y):
    return ((x - y).norm() / y.norm()).item()

for family in ("neox", "neo"):
    m = AutoModelForCausalLM.from_pretrained(f"../checkpoints/demo-{family}")
    t = AutoTokenizer.from_pretrained(f"../checkpoints/demo-{family}")
    x = t(TEXT, return_tensors="pt").input_ids
    here = m(x, labels=x)
    there = m(x, labels=x, position_ids=torch.arange(300, 300 + x.size(1))[None])
    moved = relative(there.logits, here.logits)
    print(f"demo-{family:4}  logits move by {moved:.1e} relative,",
          f"loss {here.loss:.3f} → {there.loss:.3f}")

# %% [markdown]
# In GPT-NeoX a text means the same wherever it stands; what is left is rounding. GPT-Neo has to learn it for each position separately, and its loss suffers.
#
# ### Exercise 2.1 · Rotate by complex numbers
#
# Difficulty ●●○○○, importance ●●●○○, 10 minutes. Many implementations never write a sine. They make a complex number of each pair and multiply it by
# e^{i·angle}. Write `rotate` so, for x (T, R) and angles (T, R/2). Pair i is dims (i, i + R/2), as in `rotate`.

# %% tags=["stub"]
def turn(x, angles):
    """x (T, R) float32, angles (T, R/2) -> (T, R), each pair multiplied by exp(1j * angle)."""
    ...

# %% tags=["check"]
with exercise("2.1"):
    x, angles = torch.randn(9, 12), torch.rand(9, 6) * 40
    answer = turn(x, angles)
    assert answer is not None and answer.shape == x.shape, "returns no (T, R) tensor yet"
    assert not torch.is_complex(answer), "real dims go in, real dims come out"
    assert torch.allclose(answer, rotate(x, angles.cos(), angles.sin()), atol=1e-5), "not right"

# %% tags=["wrong"]
def turn(x, angles):
    z = torch.view_as_complex(x.view(x.size(0), -1, 2))    # pairs of neighbours
    z = z * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(z).flatten(-2)

# %% tags=["wrong"]
def turn(x, angles):
    a, b = x.chunk(2, dim=-1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), -angles)  # backwards
    return torch.cat([z.real, z.imag], dim=-1)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.complex(a, b)` is a + bi, `torch.polar(r, angle)` is r·e^{i·angle}, and `z.real`, `z.imag` lead back. (a + bi)(c + si) = (ac − bs) + (bc + as)i:
# compare with the last line of `rotate`.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def turn(x, angles):
#     a, b = x.chunk(2, dim=-1)
#     z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
#     return torch.cat([z.real, z.imag], dim=-1)
# ```
# </details>
#
# ## 3 · Many speeds
#
# One pair would be a poor clock: at 1 radian a token it has come round after 2π ≈ 6.3 tokens. So each pair gets a speed of its own, base^(−2i/R) radians a
# token for pair i, like the hands of a clock. The R = 16 dims of our model are 8 pairs; here are four of them at the same eight positions.
#
# A pair's **wavelength** is the number of tokens after which it has turned once. **Predict:** the speeds of our 8 pairs go from 1 down to 0.0003. Which pair
# turns just once in 2048 tokens, the context of all official checkpoints?

# %% tags=["cover"]
cos, sin = rotary_tables(torch.arange(8)[None], R, base, torch.float32)      # each (1, 1, 8, R/2)
arrows = torch.stack([cos[0, 0], sin[0, 0]], dim=-1)       # (8, R/2, 2): where (1, 0) goes
titles = {i: f"pair {i}: {base ** (-2 * i / R):.2g} rad a token" for i in (0, 1, 2, 4)}
turning({title: arrows[:, i] for i, title in titles.items()});

# %% tags=["interactive"]
from ipywidgets import interact
@interact(position=(0, 511))
def hands(position=40):                                    # all eight hands of the clock
    cos, sin = rotary_tables(torch.tensor([[position]]), R, base, torch.float32)
    arrows = torch.stack([cos[0, 0], sin[0, 0]], dim=-1)   # (1, R/2, 2)
    turning({f"pair {i}": arrows[:, i] for i in range(R // 2)}, width=14); plt.show()

# %%
wavelength = 2 * math.pi * base ** (torch.arange(0, R, 2) / R)               # (R/2,)
contexts = {"context of demo-neox": 512, "context of the official models": 2048}
wavelengths(wavelength, contexts, "each pair turns √10 times more slowly than the one before")
print([round(w, 1) for w in wavelength.tolist()])
print(f"ratio of neighbours {wavelength[1] / wavelength[0]:.4f} = √10 = {10 ** 0.5:.4f}")

# %% [markdown]
# Pair 5 needs 1987 tokens for a turn, and pairs 6 and 7 never come round: within the context they tell early from late, as the first ones tell
# neighbours apart.
#
# Now real queries and keys. What goes into each layer while the model reads the speech, put through the layer's `ln_1` and `qkv_proj`, gives them; section 7
# explains the cut. A score is linear in q and in k, so the score of the *mean* query and the *mean* key at distance d is the average over all pairs of tokens,
# had they stood d apart: it shows what a head prefers by distance alone. First we measure it, for three heads.
#
# The cell after that multiplies q · R k out: pair i, with q = (q₁, q₂) and k = (k₁, k₂), gives a cosine of the amount q₁k₁ + q₂k₂ and a sine of the
# amount q₁k₂ − q₂k₁, both at its own speed; the dims that are not rotated add a constant. **Predict:** will heads prefer near tokens, far ones, or neither?

# %%
states = model(ids, output_hidden_states=True).hidden_states                 # each (1, T, C)
qkv = torch.cat([block.attn.qkv_proj(block.ln_1(x)) for block, x in zip(blocks, states)])
qkv = qkv.view(len(blocks), T, H, 3 * D).transpose(1, 2)   # (layers, H, T, 3D), not yet rotated
q, k, v = qkv.chunk(3, dim=-1)
print(tuple(qkv.shape), "→ q, k, v", tuple(q.shape), "  layer, head, token, dim")

# %%
layers, heads, distance = [1, 2, 3], [1, 1, 2], torch.arange(100)            # three heads
a, b = q[layers, heads].mean(1), k[layers, heads].mean(1)  # each (3, D): mean query, mean key
cos, sin = rotary_tables(distance[None], R, base, torch.float32)
turned = rotate(a[None, :, None].expand(1, 3, 100, D), cos, sin)[0]          # (3, 100, D)
measured = (turned * b[:, None]).sum(-1) / D ** 0.5        # (3, 100)
print("highest at", measured.argmax(1), "\nat 0, 1, 8, 24:\n", measured[:, [0, 1, 8, 24]])

# %%
q1, q2, k1, k2 = a[:, :R // 2], a[:, R // 2:R], b[:, :R // 2], b[:, R // 2:R]    # each (3, R/2)
angles = distance[:, None] * base ** (-torch.arange(0, R, 2) / R)            # (100, R/2)
waves = (q1 * k1 + q2 * k2) @ angles.cos().T + (q1 * k2 - q2 * k1) @ angles.sin().T
formula = (waves + (a[:, R:] * b[:, R:]).sum(-1, keepdim=True)) / D ** 0.5   # (3, 100)
assert torch.allclose(measured, formula, atol=1e-4)
by_distance(measured, formula, [f"layer {i}, head {j}" for i, j in zip(layers, heads)])

# %% [markdown]
# All three prefer what is near, and on average their best distance is 1; two fall steeply, with the first two pairs as ripples of 6 and 20 tokens, and the middle one slowly and
# smoothly. Nobody told them: training chose the amounts of the eight waves.
#
# ### Exercise 2.2 · A head that looks one token back
#
# Difficulty ●●●○○, importance ●●●●○, 15 minutes. Such heads can be made by hand. Given a key vector k (before rotation; the same for every token), find the
# query vector q (before rotation) whose score, after both are rotated by their positions, is highest for the key exactly **one** token back. All R dims rotate.

# %% tags=["stub"]
def query_for_previous(k, R, base):
    """k (R,) -> q (R,) such that rotate(q at m) · rotate(k at n) is highest for n = m - 1."""
    ...

# %% tags=["check"]
with exercise("2.2"):
    cos, sin = rotary_tables(torch.arange(500)[None], R, base, torch.float32)
    for k0 in torch.randn(5, R):
        q0 = query_for_previous(k0, R, base)
        assert torch.is_tensor(q0) and q0.shape == (R,), "returns no (R,) tensor yet"
        queries, keys = (rotate(x.expand(1, 1, 500, R), cos, sin)[0, 0] for x in (q0, k0))
        future = torch.ones(500, 500).triu(1).bool()
        best = (queries @ keys.T).masked_fill(future, -math.inf).argmax(-1)      # (500,)
        assert best[1:].equal(torch.arange(499)), f"from 100 it looks at {best[100]}, not at 99"

# %% tags=["wrong"]
def query_for_previous(k, R, base):
    return k                                               # looks at itself

# %% tags=["wrong"]
def query_for_previous(k, R, base):
    cos, sin = rotary_tables(torch.tensor([[1]]), R, base, torch.float32)
    return rotate(k.view(1, 1, 1, R), cos, sin).view(R)    # one token forward, into the masked

# %% [markdown]
# <details><summary>Hint</summary>
#
# With q = k the score is Σ |kᵢ|² cos(d · speedᵢ), highest at d = 0. You want d − 1 in place of d. What undoes a rotation: which of cos and sin changes its
# sign with the angle?
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def query_for_previous(k, R, base):
#     cos, sin = rotary_tables(torch.tensor([[1]]), R, base, torch.float32)
#     return rotate(k.view(1, 1, 1, R), cos, -sin).view(R)         # turned back by one position
# ```
#
# `rotate(x, cos, -sin)` is the inverse rotation: the sine is odd, the cosine even.
# </details>
#
# ## 4 · Only a quarter
#
# GPT-NeoX turns R = int(0.25 · D) dims of each head and lets the others pass: they can say *what* without saying *where*. Cut off, not rounded, and it is a
# share of the head, not of the model. **Predict:** 16 of 64 dims rotate. What part of the scores' spread do they make in the trained model: about a
# quarter, less, or more? And what would the model lose if every token stood at position 0, so that nothing turns?

# %%
for name in ("gpt-neox-20b", "pythia-70m", "pythia-1b", "pythia-2.8b", "pythia-12b"):
    c = SHAPES[name]
    assert c.rotary_ndims == int(c.head_dim * c.rotary_pct) == c.head_dim // 4
    print(f"{name:13} C = {c.hidden_size:4} = {c.num_attention_heads:2} heads of {c.head_dim:3}",
          f"  R = {c.rotary_ndims}: {c.rotary_ndims // 2:2} pairs,",
          f"{c.head_dim - c.rotary_ndims:3} dims pass")

# %%
def spread(q, k):
    """Standard deviation of the scores that the mask lets see, mean of the heads: (layers,)."""
    scores = q @ k.transpose(-2, -1) / D ** 0.5            # (layers, H, T, T)
    return scores[..., torch.ones(T, T).tril().bool()].std(-1).mean(-1)

cos, sin = rotary_tables(torch.arange(T)[None], R, base, torch.float32)
turned_q, turned_k = rotate(q, cos, sin), rotate(k, cos, sin)                # (layers, H, T, D)
by_layer({f"the {R} dims that rotate": spread(turned_q[..., :R], turned_k[..., :R]),
          f"the {D - R} that pass": spread(q[..., R:], k[..., R:])},
         "a quarter of the dims makes most of the score", "layer", "standard deviation")

# %%
def effect(name, out):
    same = (out.logits.argmax(-1) == right.logits.argmax(-1)).float().mean()
    print(f"{name:20} logits off by {relative(out.logits, right.logits):.1e} relative,",
          f"same best guess {same:4.0%}, loss {out.loss:.3f}")

nowhere = model(ids, labels=ids, position_ids=torch.zeros_like(ids))         # nothing turns
effect("all at position 0", nowhere)
effect("as it should be", right)

# %% [markdown]
# ## 5 · Halves or neighbours
#
# Which two dims are a pair? GPT-J takes neighbours, (0, 1), (2, 3), …; GPT-NeoX takes halves, (0, R/2), (1, R/2 + 1), …. Both are called rotary, and articles
# mix them up.
#
# **The first deliberate mistake** is to put the neighbours' rotation in the place of `neox.rotate`. Each score still depends on distances only, every shape
# fits, nothing complains. **Predict:** the loss was 4.05 with the right pairing and 4.90 when all positions were 0. Where between them will it be now?

# %%
pairing = {"halves: GPT-NeoX": [i % (R // 2) for i in range(R)],
           "neighbours: GPT-J": [i // 2 for i in range(R)]}
strips({name: [(pair, 1, COLOURS[pair]) for pair in pairs] for name, pairs in pairing.items()},
       f"the pair that each rotated dim belongs to; dims {R} to {D - 1} pass", "dim of a head");

# %%
def rotate_neighbours(x, cos, sin):
    R = 2 * cos.size(-1)
    a, b = x[..., 0:R:2], x[..., 1:R:2]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., R:]], dim=-1)

with patch.object(neox, "rotate", rotate_neighbours):
    effect("neighbours", model(ids, labels=ids))
effect("halves again", model(ids, labels=ids))
assert f"{right.loss:.2f} {nowhere.loss:.2f}" == "4.05 4.90"

# %% [markdown]
# Seven guesses in ten change, and the loss is still far below the ln V of an ignorant model: no crash, no nonsense. The repair is the right pairing, or other
# weights:
#
# ### Exercise 2.3 · The permutation between the two pairings
#
# Difficulty ●●●○○, importance ●●●○○, 15 minutes. A score does not mind if q and k have their dims in another order, as long as both have the same. So the
# *rows* of `qkv_proj` can be put in an order in which neighbours are the right pairs. Ports of weights between the two conventions do this. The rows of one
# head are D for q, D for k, D for v (section 7). Find the order; the check applies it to a copy of the model that rotates neighbours.

# %% tags=["stub"]
def neighbour_order(H, D, R):
    """Index tensor (3 H D,): row r of the new qkv_proj is row order[r] of the old."""
    ...

# %% tags=["check"]
with exercise("2.3"):
    order = neighbour_order(H, D, R)
    assert torch.is_tensor(order), "returns no tensor yet"
    assert order.sort().values.equal(torch.arange(3 * H * D)), "each row must come exactly once"
    moved = copy.deepcopy(model)
    for block in moved.transformer.blocks:
        for p in block.attn.qkv_proj.parameters():
            p.data = p.data[order]
    with patch.object(neox, "rotate", rotate_neighbours):
        off = relative(moved(ids).logits, right.logits)
    assert off < 1e-5, f"the logits are off by {off:.1e} relative"

# %% tags=["wrong"]
def neighbour_order(H, D, R):
    pairs = torch.arange(R).view(R // 2, 2).T.flatten()    # 0, 2, 4, …: the way back
    head = torch.cat([pairs, torch.arange(R, D)])
    block = torch.cat([head, D + head, 2 * D + torch.arange(D)])
    return torch.cat([h * 3 * D + block for h in range(H)])

# %% tags=["wrong"]
def neighbour_order(H, D, R):
    pairs = torch.arange(R).view(2, R // 2).T.flatten()
    head = torch.cat([pairs, torch.arange(R, D)])
    return torch.cat([h * D + head for h in range(3 * H)])      # moves v's rows as well

# %% [markdown]
# <details><summary>Hint</summary>
#
# New dims 0 and 1 must be old dims 0 and R/2: `torch.arange(R).view(2, R // 2).T.flatten()`. Then the dims that pass, then the same for k; v is not rotated
# and must stay, because `out_proj` knows its order.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def neighbour_order(H, D, R):
#     pairs = torch.arange(R).view(2, R // 2).T.flatten()                # 0, R/2, 1, R/2 + 1, ...
#     head = torch.cat([pairs, torch.arange(R, D)])
#     block = torch.cat([head, D + head, 2 * D + torch.arange(D)])       # q, k, and v as it was
#     return torch.cat([h * 3 * D + block for h in range(H)])
# ```
# </details>
#
# ## 6 · The trap of half precision
#
# An angle is position × speed, and at position 2047 the first pair has turned 2047 radians. Only what is left after full turns matters. bfloat16 has 8 bits
# of precision. **Predict:** what does it make of the number 2047? The picture shows the largest error of an angle up to each position.

# %%
numbers = torch.tensor([255, 257, 2045, 2047, 2048])
print(numbers.tolist(), "in bfloat16:", numbers.bfloat16().tolist())
positions, speeds = torch.arange(1, 2049), base ** (-torch.arange(0, R, 2).double() / R)

def error(dtype):
    """The largest error of an angle up to each position, in radians: (2048, R/2)."""
    angles, exact = positions.to(dtype)[:, None] * speeds.to(dtype), positions[:, None] * speeds
    return (angles.double() - exact).abs().cummax(dim=0).values

low, high = error(torch.float32), error(torch.bfloat16)
angle_errors(positions, low, high)
print(f"largest error: {high.max():.1f} radians in bfloat16, {low.max():.1e} in float32")

# %% [markdown]
# Half a turn is 3.14 radians: an error of that size points the arrow the opposite way. Therefore `rotary_tables` computes angles in float32 whatever the
# model is, and rounds only the finished cosines and sines. Here is the model with angles in bfloat16. **Predict:** the speech has 159 tokens, and bfloat16
# tells all numbers up to 256 apart. Will the mistake be visible there? And if the same speech begins at position 300, or 1900?

# %%
def tables_in_bfloat16(position_ids, R, base, dtype):
    speeds = 1.0 / base ** (torch.arange(0, R, 2, dtype=torch.float32) / R)
    angles = (position_ids[..., None].bfloat16() * speeds.bfloat16()).float()
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]

for start in (0, 300, 1900):
    where = dict(labels=ids, position_ids=torch.arange(start, start + T)[None])
    effect(f"float32, from {start}", model(ids, **where))
    with patch.object(neox, "rotary_tables", tables_in_bfloat16):
        effect(f"bfloat16, from {start}", model(ids, **where))

# %% [markdown]
# A check on a short text would have let this through with a tolerance of 10⁻²; far out it is another model. (EleutherAI/gpt-neox issue 1003 is this bug.)
#
# ## 7 · One matrix for q, k and v
#
# `qkv_proj` has 3C rows. How they lie is the surprise of this family: q, k and v of head 0, then q, k and v of head 1, and so on. `Attention.forward` cuts the
# heads apart first (`view(B, T, -1, 3 * D)`), then q, k, v (`chunk(3)`). Whoever knows GPT-2 cuts the rows into thirds.
#
# **Predict:** in how many of the 12 blocks do both ways agree? And **the second deliberate mistake**: what do thirds cost, more than the wrong pairs or less?
# We do not rewrite the module: cutting W in thirds is the same as cutting rightly a matrix whose rows were moved accordingly. The repair is the inverse move, and
# the same line splits these weights into three matrices such as GPT-Neo's.

# %%
kinds = dict(q=BLUE, k=RED, v=GREEN)
lie = [(f"{kind}{h}", D, kinds[kind]) for h in range(H) for kind in kinds]
cut = [(f"{kind}{h}", D, kinds[kind]) for kind in kinds for h in range(H)]
print("both ways agree:", [ours[0] for ours, theirs in zip(lie, cut) if ours == theirs])
strips({"as they lie": lie, "as thirds read them": cut},
       "rows of qkv_proj: number of the head, colour for q, k, v", "row");

# %%
def reorder(model, move):
    """A copy whose qkv_proj rows (and biases) were moved."""
    model = copy.deepcopy(model)
    for block in model.transformer.blocks:
        for p in block.attn.qkv_proj.parameters():
            p.data = move(p.data)
    return model

thirds = reorder(model, lambda w: w.view(3, H, D, -1).transpose(0, 1).reshape(w.shape))
effect("cut in thirds", thirds(ids, labels=ids))

# %%
repaired = reorder(thirds, lambda w: w.view(H, 3, D, -1).transpose(0, 1).reshape(w.shape))
effect("repaired", repaired(ids, labels=ids))
assert torch.equal(repaired(ids).logits, right.logits)
w = blocks[0].attn.qkv_proj.weight
Wq, Wk, Wv = w.view(H, 3, D, -1).transpose(0, 1).reshape(3, C, C)              # heads in order
print(tuple(w.shape), "→ three of", tuple(Wq.shape))

# %% [markdown]
# ## 8 · The parallel residual
#
# In GPT-2 and GPT-Neo a block is two steps: the MLP reads what attention has written. In GPT-J, GPT-NeoX and Pythia both read the same x, and one sum ends
# the block. `use_parallel_residual` in the config decides; RedPajama's models, for instance, have this architecture and the sequential form.
#
# Why in parallel? The GPT-NeoX-20B paper (Black et al. 2022) names efficiency: with the matrices of a layer spread over several GPUs, every residual sum needs one
# exchange between them, and now there is one sum a block instead of two. On one device two products can become one: the norms' weights can be folded into
# the matrices behind them, since both branches normalize the same x. In the sequential form the second product must wait for attention.
#
# There are **two** LayerNorms, not one. The 20B's authors meant to share one and call the second an oversight; the weights have it, so ours must. **Predict:**
# which is the worse mistake in a trained model, the sequential form, or `ln_1` in both places? How soon do the hidden states part?

# %%
residual_forms()
print(inspect.getsource(neox.Block.forward))

# %%
block, x = blocks[0], torch.randn(5, C)
n1, n2, qkv_proj, up = block.ln_1, block.ln_2, block.attn.qkv_proj, block.mlp.up_proj
W = torch.cat([qkv_proj.weight * n1.weight, up.weight * n2.weight])          # (3C + 4C, C)
bias = torch.cat([qkv_proj(n1.bias), up(n2.bias)])         # the norms' biases go through as well
one = F.linear(F.layer_norm(x, (C,), eps=n1.eps), W, bias)
two = torch.cat([qkv_proj(n1(x)), up(n2(x))], dim=-1)
print("one product of", tuple(W.shape), f"→ {tuple(one.shape)}  off by {relative(one, two):.0e}")
assert relative(one, two) < 1e-5

# %%
sequential, shared = copy.deepcopy(model), copy.deepcopy(model)
for a, b in zip(sequential.transformer.blocks, shared.transformer.blocks):
    a.parallel, b.ln_2 = False, b.ln_1
alike = {}
for name, wrong in {"sequential": sequential, "ln_1 in both places": shared}.items():
    out = wrong(ids, labels=ids, output_hidden_states=True)
    effect(name, out)
    pairs = zip(out.hidden_states, states)                 # each (1, T, C)
    alike[name] = [F.cosine_similarity(s, t, dim=-1).mean() for s, t in pairs]
by_layer(alike, "hidden states beside the right ones, same weights",
         "layers done (the last after the final norm)", "cosine similarity")

# %% [markdown]
# The forms are not two ways to compute one model: weights belong to the form that they were trained in. The shared norm hardly shows: the model's best guess
# stays for most tokens, so a test that compares greedy text may well pass.
#
# ## 9 · Two matrices at the ends, and rows without tokens
#
# GPT-Neo uses its embedding once more as the output head. GPT-NeoX has two matrices. **Predict:** after training, how alike are a token's row in the one and
# its row in the other: cosine near 1, near 0, near −1?
#
# The official vocabulary has 50,277 tokens: 50,254 and 23 runs of spaces (`tests/test_tokenizer.py` counts them in the true file); our demo's is made the same way. For
# the hardware's sake the number of rows is rounded up to a multiple of 128 · M, where M is the number of parts that training cut the matrix into.
#
# What do rows hold whose token never came? The demo has such tokens: bytes from 0x80 on, which no text of plain English letters contains. Before training, a row has
# a length of about 0.02 · √256 = 0.32. **Predict:** what has training done to the rows of these tokens in the embedding, and what in the head?

# %%
E, U = model.transformer.embed.weight, model.lm_head.weight                  # each (V, C)
cosine = F.cosine_similarity(E, U).mean()
print(f"tied: {E is U}, mean cosine of a token's two rows: {cosine:.3f}")
words, runs = tokenizer.vocab_size, len(tokenizer) - tokenizer.vocab_size
print(f"demo-neox     {words} + {runs} = {len(tokenizer)} tokens, {len(E)} rows")
assert 50254 + runs == 50277
cuts = {"pythia-70m": 1, "pythia-2.8b": 1, "pythia-6.9b": 2, "gpt-neox-20b": 2, "pythia-12b": 4}
for name, M in cuts.items():
    rows = math.ceil(50277 / (128 * M)) * 128 * M
    assert rows == SHAPES[name].vocab_size
    print(f"{name:13} 50254 + {runs} = 50277 tokens,",
          f"{rows} rows = {rows // (128 * M)} · 128 · {M}, {rows - 50277} without a token")

# %%
pieces = [tokenizer.decode([i]) for i in range(V)]
never = torch.tensor([piece == "\ufffd" for piece in pieces])             # no character by itself
in_E, in_U = E.norm(dim=-1), U.norm(dim=-1)                # (V,) lengths of the rows
row_lengths(in_E, in_U, never, f"{never.sum()} bytes from 0x80 on")
print(f"embedding rows {in_E[never].min():.2f} to {in_E[never].max():.2f} long,",
      f"at the start about {config.initializer_range * C ** 0.5:.2f}")

# %%
cosine = F.normalize(U[never], dim=-1).mean(0).norm() ** 2
share = right.logits.softmax(-1)[..., never].sum(-1).mean()
print(f"head rows: mean cosine of two {cosine:.3f}, together {share:.0e} of the probability")
print(f"decoding id {V}, which has no token: {tokenizer.decode([V])!r}")
corner = [pieces[i] for i in torch.where((in_U > 2.8) & ~never)[0].tolist()]
print("others in the same corner:", *[piece for piece in corner if piece.isprintable()])

# %% [markdown]
# A row of the embedding that is never read stays where the dice put it. A row of the head is trained at every step, always in the same direction: be less
# likely, and all of these end up as nearly one vector. Padded rows of the official models are in the same situation: sampling hardly meets them, nothing
# forbids them, and decoding one gives no text.
#
# ## 10 · Over training
#
# Both demo checkpoints left a log, a line for each step. A loss per token is no fair comparison, because the two have vocabularies of different size; bits
# per byte of held-out text are. It is one run each, with other vocabularies and windows: the curves show that both learn, and not which architecture is
# better. **Predict:** demo-neo took 3500 steps to its last value. After how many of its steps did demo-neox pass that?

# %%
logs = {}
for name in ("demo-neo", "demo-neox"):
    with open(f"../checkpoints/metrics/{name}.jsonl") as file:
        logs[name] = [json.loads(line) for line in file]
    last = logs[name][-1]                                  # a test on held-out plays
    print(f"{name}: {last['valid_bits_per_byte']:.3f} bits per byte after {last['step']} steps")
training(logs)
goal = logs["demo-neo"][-1]["valid_bits_per_byte"]
passed = [row["step"] for row in logs["demo-neox"] if row.get("valid_bits_per_byte", 9) < goal]
print(f"demo-neox passed {goal:.3f} by step {passed[0]}")

# %% [markdown]
# ### Exercise 2.4 · Find the induction head
#
# Difficulty ●●●●○, importance ●●●●○, 20 minutes. An *induction head* (Olsson et al. 2022) continues patterns: at a token that came before, it reads what
# followed it the last time. On a text of n tokens written twice, such a head at position i ≥ n reads position i − n + 1. Give each head its mean weight
# there, over the whole second copy. The check tries heads made by hand, and then prints the demo's.

# %% tags=["stub"]
def induction(weights):
    """Attention weights (B, H, 2n, 2n) on texts of n tokens written twice -> (H,), 0 to 1."""
    ...

# %% tags=["check"]
with exercise("2.4"):
    n, i = 20, torch.arange(40)
    def looks(back):                                       # reads `back` positions before itself
        return F.one_hot((i - back).clamp(min=0), 2 * n).float()
    everywhere = torch.ones(2 * n, 2 * n).tril() / (i + 1)[:, None]
    made = torch.stack([looks(n - 1), looks(1), looks(n), everywhere])           # (4, 2n, 2n)
    answer = induction(made[None].repeat(3, 1, 1, 1))
    assert torch.is_tensor(answer) and answer.shape == (4,), "returns no (H,) tensor yet"
    wanted = torch.tensor([1, 0, 0, (1 / (i[n:] + 1)).mean()])
    assert torch.allclose(answer, wanted), f"four heads made by hand get {answer.tolist()}"
    found = model(torch.cat([ids, ids], dim=1), output_attentions=True).attentions
    print("demo-neox, layers by heads:", torch.stack([induction(w) for w in found]), sep="\n")

# %% tags=["wrong"]
def induction(weights):
    n = weights.size(-1) // 2
    return weights.diagonal(-n, -2, -1).mean((0, -1))      # the same token, not its successor

# %% tags=["wrong"]
def induction(weights):
    n = weights.size(-1) // 2
    seen = weights.diagonal(1 - n, -2, -1)                 # averages over the first copy too
    return seen.sum((0, -1)) / weights.size(0) / (2 * n)

# %% [markdown]
# <details><summary>Hint</summary>
#
# The entries (i, i − n + 1) are a diagonal: `weights.diagonal(1 - n, dim1=-2, dim2=-1)`. Its first entry belongs to i = n − 1, the last token of the *first*
# copy, and does not count.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def induction(weights):
#     n = weights.size(-1) // 2
#     return weights.diagonal(1 - n, dim1=-2, dim2=-1)[..., 1:].mean((0, -1))
# ```
#
# Every head of the demo stays near 0: none has formed. What it does have is the first half of the trick, heads whose best distance is 1 (section 3).
# </details>
#
# There is another way to see it, without looking into heads: is a text easier the second time? Pythia's training left checkpoints at 154 steps, as
# revisions of one name, so that with a network (three downloads) one can watch the change. **Predict:** what does our model's loss on the second copy say?

# %%
def first_and_second(model, ids):
    twice, n = torch.cat([ids, ids], dim=1), ids.size(1)
    logits = model(twice).logits
    losses = F.cross_entropy(logits[0, :-1], twice[0, 1:], reduction="none")     # (2n - 1,)
    print(f"loss on the speech {losses[:n - 1].mean():.3f}, after itself {losses[n:].mean():.3f}")

first_and_second(model, ids)
for step in (512, 4000, 143000):
    if found := official("EleutherAI/pythia-70m", revision=f"step{step}"):
        pythia, its_tokenizer = found
        print("pythia-70m after", step, "steps:", end=" ")
        first_and_second(pythia, its_tokenizer(TEXT, return_tensors="pt").input_ids)

# %% [markdown]
# The second copy is no easier: at a distance of 159 tokens the scores of section 3 have long fallen off. Whether Pythia's heads learn to look that far, and at which step, the
# cell above shows with a network.
#
# ## 11 · Check against the reference
#
# transformers' GPTNeoX, small, with random weights that are drawn wide (the usual small ones hide a shared LayerNorm: `tests/helpers.py`), at two rotary
# fractions and in both residual forms. No tolerance: `torch.equal`. And the demo itself.

# %%
import tempfile, transformers
transformers.utils.logging.disable_progress_bar()

def both(folder):
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    return theirs, AutoModelForCausalLM.from_pretrained(folder, attn_implementation="naive")

theirs, ours = (m(ids).logits for m in both(FOLDER))
print("equal:", torch.equal(theirs, ours), f" largest |difference| {(theirs - ours).abs().max()}")

# %%
shape = dict(vocab_size=V, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
for fraction, parallel in ((0.25, True), (0.25, False), (1.0, True), (1.0, False)):
    small = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        **shape, intermediate_size=128, rotary_pct=fraction, use_parallel_residual=parallel))
    for p in small.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        reference, own = both(folder)
    a, b = reference(ids).logits, own(ids).logits
    print(f"rotary on {fraction:4.0%}, {'parallel' if parallel else 'sequential':10}: equal",
          f"{torch.equal(a, b)}, R = {own.config.rotary_ndims}, logits to {a.abs().max():.0f}")
    assert torch.equal(a, b)

# %% [markdown]
# ## What we left out
#
# Dropout, padding (an attention mask beside the causal one; positions that skip it are `generate`'s work, notebook 5), caches (the *rotated* keys are kept, so that none is
# turned twice), longer contexts than trained by slower rotation (`rope_scaling`; no official checkpoint uses it, and `neox.py` refuses it by name), and
# the activation: Pythia's config says exact GELU although it was trained with the tanh form (`base.py`).
#
# **Further.** `tests/test_mistakes.py` plants each mistake of this notebook and more. Su et al. 2021 for rotary positions, Wang and Komatsuzaki 2021 (GPT-J) for the parallel
# form, Black et al. 2022 for the 20B, Biderman et al. 2023 for Pythia, Olsson et al. 2022 for induction heads. EleutherAI/gpt-neox, `megatron/model/transformer.py`, is
# where these weights come from.
