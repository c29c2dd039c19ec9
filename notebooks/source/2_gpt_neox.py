# %% [markdown]
# # 2. GPT-NeoX: rotary positions and the parallel residual
#
# This notebook shows what changed from GPT-Neo (2021) to GPT-NeoX (2022) and Pythia. It makes each change on
# a trained model, and it makes the usual mistakes too, so that you see what they cost.
#
# **45 minutes** to read, **75 minutes** for the five exercises · **needs** a CPU, no GPU and no network;
# you should have seen GPT-2's attention once and read notebook 1 · [the words and letters](README.md)
#
# **Objectives.** Afterwards you can
# * point at the lines in which the two families differ;
# * explain why a score depends only on the distance of two tokens when queries and keys are turned by
#   their positions, and predict that score with a formula;
# * tell the two conventions of pairing dims apart, and the two ways of cutting a QKV matrix, by what the
#   wrong one costs;
# * say why angles are never computed in bfloat16;
# * draw both forms of the residual block, and show what the parallel one makes possible;
# * find an induction head in a model, break it, and show that the model can then no longer copy.
#
# The model is `demo-neox`: 4 layers, C = 256, 4 heads of D = 64, trained on Shakespeare's plays. Have the
# file `neox.py` open beside this notebook. The running example is a speech from *Macbeth*, a play that the
# model was not trained on. The loss is the mean of −ln p over the next tokens, in nats per token. It will
# tell us what a mistake costs.

# %%
import sys; sys.path[:0] = [".."]                      # the modules lie one folder up
import copy, json, math, torch, torch.nn.functional as F
import neo, neox
from unittest.mock import patch
from benchmarks.shapes import SHAPES
from lesson import exercise, official, same, show, side_by_side
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
# ## 1. The diff
#
# `neo.py` and `neox.py` have the same parts in the same order under the same names. Here are the two
# `Attention` classes and the two `Block` classes side by side, without their comments. The table is made
# from the files, with − and red for lines of GPT-Neo alone, and + and green for lines of GPT-NeoX alone.
#
# **Predict:** which of the two classes changed more?

# %%
side_by_side((neo.Attention, neox.Attention), (neo.Block, neox.Block))

# %% [markdown]
# | GPT-Neo | GPT-NeoX | section |
# |---|---|---|
# | a learned vector for each position, added to the token's vector | queries and keys are turned by their position | 2, 3, 6 |
# | | only R of the D dims of a head are turned, in pairs of halves | 4, 5 |
# | three matrices for q, k and v, without bias | one matrix with bias, interleaved head by head | 7 |
# | attention first, then the MLP | both read the same x | 8 |
# | the output head is the embedding | two matrices, and more rows than tokens | 9 |
# | the tanh form of GELU | whatever `hidden_act` says; in Pythia the exact form | |
# | scores are not divided by √D, and every second layer is local | divided by √D, and every layer is global | notebook 1 |
#
# ## 2. Why rotate
#
# Apart from the causal mask, attention does not know the order of the tokens: a score is q · k wherever the
# two tokens stand. GPT-Neo adds a learned vector for each position, so a model with a table of 512 rows has
# no position 512. **Rotary position embedding** (Su et al. 2021) has no table. It takes the dims of q and k in
# pairs, sees each pair as an arrow in the plane, and turns the arrow by an angle that is proportional to the
# token's position. These two functions are all of it.

# %%
show(rotary_tables, rotate)

# %% [markdown]
# We begin with a head that has one pair only: R = D = 2. Its speed is base⁰ = 1 radian per token.
# **Predict:** at which position from 1 to 7 does the arrow come closest to where it started?

# %% alt="Two circles with eight arrows each, labelled 0 to 7: the arrows go round once, and number 6 lies closest to number 0."
query, key = torch.tensor([0.9, 0.4]), torch.tensor([-0.3, 0.8])
cos, sin = rotary_tables(torch.arange(24)[None], 2, base, torch.float32)     # each (1, 1, 24, 1)
q = rotate(query.expand(1, 1, 24, 2), cos, sin)[0, 0]      # (24, 2): one arrow at 24 positions
k = rotate(key.expand(1, 1, 24, 2), cos, sin)[0, 0]
turning({"query at positions 0 … 7": q[:8], "key at positions 0 … 7": k[:8]}, width=6.4)
assert (q[1:8] - q[0]).norm(dim=-1).argmin() + 1 == 6;

# %% [markdown]
# Now we compute every score between the query at position m and the key at position n. **Predict:** this
# (24, 24) matrix has a simple structure. What will the picture show?

# %% alt="A square of 24 by 24 scores in diagonal stripes: along each diagonal the colour is the same."
scores = q @ k.T                                           # (24, 24)
matrix(scores, "score by both positions", bar=True,
       x="n, position of the key", y="m, position of the query")
assert torch.allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-5)
print(f"m - n = 3 at m = 3, 10, 23: {scores[3, 0]:.5f} {scores[10, 7]:.5f} {scores[23, 20]:.5f}");

# %% [markdown]
# Along each diagonal, m − n is the same, and so is the score. One line proves it. Turning by an angle is a
# matrix $M_m$ whose transpose turns back, so
#
# $$(M_m q)\cdot(M_n k) = q^\top M_m^\top M_n\, k = q^\top M_{n-m}\, k .$$
#
# Two positions went in, and only their difference comes out. **Predict:** what happens to the logits of the
# whole model if we tell it that the speech begins at position 300 and not at 0? And what happens in GPT-Neo?

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
    assert moved < 1e-5 if family == "neox" else moved > 0.1 and there.loss > here.loss

# %% [markdown]
# In GPT-NeoX a text gives the same logits wherever it stands, up to rounding. In GPT-Neo the logits move by
# 19 %, and the loss becomes higher.
#
# ### Exercise 2.1 · Rotate by complex numbers
#
# Difficulty 2 of 5 · 10 minutes
#
# Many implementations never write a sine. They make a complex number of each pair and multiply it by
# e^{i·angle}. Write `rotate` in this way, for x (T, R) and angles (T, R/2). Pair i is made of the dims
# i and i + R/2, as in `rotate`.

# %% tags=["stub"]
def turn(x, angles):
    """x (T, R) float32, angles (T, R/2) -> (T, R), each pair multiplied by exp(1j * angle)."""
    ...

# %% tags=["check"]
with exercise("2.1"):
    x, angles = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[math.pi / 2, 0.0]])
    case = "x = [[1, 2, 3, 4]], angles = [[π/2, 0]]"
    same(turn(x, angles), [[-3, 2, 1, 4]], case, 1e-5)
    x, angles = torch.randn(9, 12), torch.rand(9, 6) * 40
    wanted = rotate(x, angles.cos(), angles.sin())
    same(turn(x, angles), wanted, "9 random rows with R = 12", 1e-5)

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

# %% tags=["wrong"]
def turn(x, angles):
    a, b = x.chunk(2, dim=-1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(z).flatten(-2)               # the pairs come back as neighbours

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.complex(a, b)` is a + bi, `torch.polar(r, angle)` is r·e^{i·angle}, and `z.real` and `z.imag` lead
# back. (a + bi)(c + si) = (ac − bs) + (bc + as)i: compare this with the last line of `rotate`.
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
# ## 3. Many speeds
#
# One pair would be a poor clock: at 1 radian per token it has come round after 2π ≈ 6.3 tokens. So each pair
# gets a speed of its own, like the hands of a clock: base^(−2i/R) radians per token for pair i. The R = 16
# dims of our model are 8 pairs. Here are four of them at the same eight positions.

# %% tags=["cover"] alt="Four circles with the arrows of pairs 0, 1, 2 and 4 at positions 0 to 7: pair 0 goes round once, pair 4 hardly moves."
cos, sin = rotary_tables(torch.arange(8)[None], R, base, torch.float32)      # each (1, 1, 8, R/2)
arrows = torch.stack([cos[0, 0], sin[0, 0]], dim=-1)       # (8, R/2, 2): where (1, 0) goes
titles = {i: f"pair {i}: {base ** (-2 * i / R):.2g} rad a token" for i in (0, 1, 2, 4)}
turning({title: arrows[:, i] for i, title in titles.items()});

# %% [markdown]
# Move the slider to see all eight hands at any position.

# %% tags=["interactive"]
from ipywidgets import interact
@interact(position=(0, 511))
def hands(position=40):                                    # all eight hands of the clock
    cos, sin = rotary_tables(torch.tensor([[position]]), R, base, torch.float32)
    arrows = torch.stack([cos[0, 0], sin[0, 0]], dim=-1)   # (1, R/2, 2)
    turning({f"pair {i}": arrows[:, i] for i in range(R // 2)}, 14, [position]); plt.show()

# %% [markdown]
# A pair's **wavelength** is the number of tokens in which it turns once. **Predict:** the speeds of our 8
# pairs go from 1 down to 0.0003. Which pair turns about once in 2048 tokens, the context of all official
# checkpoints?

# %% alt="The wavelengths of the pairs 0 to 7 rise on a straight line on a log axis, from 6 to 19,869 tokens; two dashed lines mark contexts of 512 and 2048."
wavelength = 2 * math.pi * base ** (torch.arange(0, R, 2) / R)               # (R/2,)
contexts = {"context of demo-neox": 512, "context of the official models": 2048}
wavelengths(wavelength, contexts, "each pair turns √10 times more slowly than the one before")
print([round(w, 1) for w in wavelength.tolist()])
assert torch.allclose(wavelength[1:] / wavelength[:-1], torch.tensor(10.0).sqrt())
assert wavelength[5].round() == 1987 and wavelength[6] > 2048

# %% [markdown]
# Pair 5 needs 1987 tokens for a turn. Pairs 6 and 7 do not come round within 2048 tokens: they can tell far
# from near, as the fast pairs can tell one neighbour from the next.
#
# Now we take real queries and keys. The input of each layer goes through the layer's `ln_1` and `qkv_proj`;
# section 7 explains how the result is cut.

# %%
states = model(ids, output_hidden_states=True).hidden_states                 # each (1, T, C)
qkv = torch.cat([block.attn.qkv_proj(block.ln_1(x)) for block, x in zip(blocks, states)])
qkv = qkv.view(len(blocks), T, H, 3 * D).transpose(1, 2)   # (layers, H, T, 3D), not yet rotated
q, k, v = qkv.chunk(3, dim=-1)
print(tuple(qkv.shape), "→ q, k, v", tuple(q.shape), "  layer, head, token, dim")

# %% [markdown]
# A score is linear in q and in k. So the score of the *mean* query and the *mean* key at distance d is the
# average over all pairs of tokens, if all of them stood d apart. It shows what a head prefers by distance
# alone. **Predict:** will the heads prefer near tokens, far ones, or neither?

# %% alt="Four panels, one for each layer, with the curves of its four heads over the distance: nearly flat in layer 0, falling from a maximum near 0 in most heads of the other layers."
a, b = q.mean(2), k.mean(2)                                # (layers, H, D): mean query, mean key
cos, sin = rotary_tables(torch.arange(100)[None], R, base, torch.float32)
turned = rotate(a[:, :, None].expand(-1, -1, 100, D), cos, sin)              # (layers, H, 100, D)
measured = (turned * b[:, :, None]).sum(-1) / D ** 0.5     # (layers, H, 100)
by_distance(measured)

# %%
best = measured.argmax(-1)                                 # (layers, H)
extent = measured.amax(-1) - measured.amin(-1)
print("best distance, layers by heads:", best, "highest less lowest score:", extent, sep="\n")
assert best.max() <= 4 and (best == 1).sum() == 8
assert extent[0].max() < 1.5 and (extent[1:] > 6).sum() >= 10

# %% [markdown]
# The dot on each curve is its highest point. No head has its best distance beyond 4, and for 8 of the 16 heads
# it is 1. In layer 0 the distance matters little: a curve changes by less than 1.5 there, and by more than 6
# in most of the later heads. Nothing in the architecture says so; training chose it.
#
# What are the curves made of? Multiplied out, pair i with q = (q₁, q₂) and k = (k₁, k₂) gives a cosine of the
# size q₁k₁ + q₂k₂ and a sine of the size q₁k₂ − q₂k₁, both at the pair's own speed. The dims that are not
# rotated add a constant. This formula gives the curves of all 16 heads.

# %%
q1, q2, k1, k2 = *a[..., :R].chunk(2, -1), *b[..., :R].chunk(2, -1)          # (layers, H, R/2)
angles = torch.arange(100)[:, None] * base ** (-torch.arange(0, R, 2) / R)   # (100, R/2)
waves = (q1 * k1 + q2 * k2) @ angles.cos().T + (q1 * k2 - q2 * k1) @ angles.sin().T
formula = (waves + (a[..., R:] * b[..., R:]).sum(-1, keepdim=True)) / D ** 0.5
print(f"largest difference {(measured - formula).abs().max():.0e}")
assert torch.allclose(measured, formula, atol=1e-4)

# %% [markdown]
# ### Exercise 2.2 · A head that looks one token back
#
# Difficulty 3 of 5 · 15 minutes
#
# A head that reads the previous token can be made by hand. Given a key vector k before rotation, the same
# for every token, find a query vector q before rotation. After both are rotated by their positions, the
# score must be highest for the key exactly **one** token back. All R dims rotate.

# %% tags=["stub"]
def query_for_previous(k, R, base):
    """k (R,) -> q (R,) such that rotate(q at m) · rotate(k at n) is highest for n = m - 1."""
    ...

# %% tags=["check"]
with exercise("2.2"):
    cos, sin = rotary_tables(torch.arange(500)[None], R, base, torch.float32)
    for k0 in torch.randn(5, R):
        q0 = query_for_previous(k0, R, base)
        assert q0 is not None, "nothing came (None), expected R numbers"
        q0 = torch.as_tensor(q0, dtype=torch.float32)
        queries, keys = (rotate(x.expand(1, 1, 500, R), cos, sin)[0, 0] for x in (q0, k0))
        future = torch.ones(500, 500).triu(1).bool()
        most = (queries @ keys.T).masked_fill(future, -math.inf).argmax(-1)      # (500,)
        same(most[1], 0, "position with the highest score for the query at position 1")
        same(most[100], 99, "position with the highest score for the query at position 100")
        same(most[1:], torch.arange(499), "the same for the queries at 1 to 499")

# %% tags=["wrong"]
def query_for_previous(k, R, base):
    return k                                               # looks at itself

# %% tags=["wrong"]
def query_for_previous(k, R, base):
    cos, sin = rotary_tables(torch.tensor([[1]]), R, base, torch.float32)
    return rotate(k.view(1, 1, 1, R), cos, sin).view(R)    # one token forward, into the masked

# %% tags=["wrong"]
def query_for_previous(k, R, base):
    a, b = k.chunk(2)
    c, s = math.cos(1), math.sin(1)                        # each pair by 1 radian, not by its speed
    return torch.cat([a * c + b * s, b * c - a * s])

# %% [markdown]
# <details><summary>Hint</summary>
#
# With q = k the score is Σ |kᵢ|² cos(d · speedᵢ), which is highest at d = 0. You want d − 1 in place of d. To
# undo a rotation, turn by the opposite angle: which of cos and sin then changes its sign?
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
# ## 4. Only a quarter
#
# GPT-NeoX turns R = int(0.25 · D) dims of each head and leaves the others as they are. These others can say
# *what* a token is without saying *where* it stands. R is rounded down, and it is a share of the head, not
# of the model.

# %%
for name in ("gpt-neox-20b", "pythia-70m", "pythia-1b", "pythia-2.8b", "pythia-12b"):
    c = SHAPES[name]
    assert c.rotary_ndims == int(c.head_dim * c.rotary_pct) == c.head_dim // 4
    print(f"{name:13} C = {c.hidden_size:4} = {c.num_attention_heads:2} heads of {c.head_dim:3}",
          f"  R = {c.rotary_ndims}: {c.rotary_ndims // 2:2} pairs,",
          f"{c.head_dim - c.rotary_ndims:3} dims pass")

# %% [markdown]
# **Predict:** 16 of 64 dims rotate. How much of the spread of the scores do they make in the trained model:
# about a quarter, less, or more?

# %% alt="Two lines over the layers 0 to 3: the standard deviation of the part of the scores that rotates and of the part that does not."
def spread(q, k):
    """Standard deviation of the scores that the mask lets see, mean of the heads: (layers,)."""
    scores = q @ k.transpose(-2, -1) / D ** 0.5            # (layers, H, T, T)
    return scores[..., torch.ones(T, T).tril().bool()].std(-1).mean(-1)

cos, sin = rotary_tables(torch.arange(T)[None], R, base, torch.float32)
turned_q, turned_k = rotate(q, cos, sin), rotate(k, cos, sin)                # (layers, H, T, D)
parts = {f"the {R} dims that rotate": spread(turned_q[..., :R], turned_k[..., :R]),
         f"the {D - R} that do not": spread(q[..., R:], k[..., R:])}
by_layer(parts, "how much the scores vary", "layer", "standard deviation")
ratio = spread(turned_q[..., :R], turned_k[..., :R]) / spread(q[..., R:], k[..., R:])
assert ratio.min() > 1.4;

# %% [markdown]
# In every layer the quarter of the dims that rotates makes the larger part of the scores. **Predict:** what
# does the model lose if every token stands at position 0, so that nothing turns?

# %%
def effect(name, out):
    same = (out.logits.argmax(-1) == right.logits.argmax(-1)).float().mean()
    print(f"{name:20} logits off by {relative(out.logits, right.logits):.1e} relative,",
          f"same best guess {same:4.0%}, loss {out.loss:.3f}")

# %%
nowhere = model(ids, labels=ids, position_ids=torch.zeros_like(ids))         # nothing turns
effect("all at position 0", nowhere)
effect("as it should be", right)

# %% [markdown]
# ## 5. Halves or neighbours
#
# Which two dims are a pair? GPT-J takes neighbours: (0, 1), (2, 3), and so on. GPT-NeoX takes halves:
# (0, R/2), (1, R/2 + 1), and so on. Both are called rotary, and articles mix them up.

# %% alt="Two strips of 16 dims, each coloured by its pair: 0 to 7 twice in the upper strip, 0 0 1 1 to 7 7 in the lower one."
pairing = {"halves: GPT-NeoX": [i % (R // 2) for i in range(R)],
           "neighbours: GPT-J": [i // 2 for i in range(R)]}
strips({name: [(pair, 1, COLOURS[pair]) for pair in pairs] for name, pairs in pairing.items()},
       f"the pair of each rotated dim; dims {R} to {D - 1} do not rotate", "dim of a head");

# %% [markdown]
# **The first deliberate mistake** is to put the neighbours' rotation in the place of `neox.rotate`. Each score
# still depends on distances only, every shape fits, and nothing complains. **Predict:** the loss was 4.05 with
# the right pairing and 4.90 when all positions were 0. Where between them will it be now?

# %%
def rotate_neighbours(x, cos, sin):
    R = 2 * cos.size(-1)
    a, b = x[..., 0:R:2], x[..., 1:R:2]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., R:]], dim=-1)

with patch.object(neox, "rotate", rotate_neighbours):
    mispaired = model(ids, labels=ids)
effect("neighbours", mispaired)
effect("halves again", model(ids, labels=ids))
assert f"{right.loss:.2f} {nowhere.loss:.2f} {mispaired.loss:.2f}" == "4.05 4.90 4.57"
assert (mispaired.logits.argmax(-1) != right.logits.argmax(-1)).float().mean() > 0.65

# %% [markdown]
# For about seven tokens in ten the best guess changes, and the loss of 4.57 is still far below the
# ln V = 7.29 of a model that knows nothing. There is no crash and no obvious nonsense. The repair is the right
# pairing, or other weights.
#
# ### Exercise 2.3 · The permutation between the two pairings
#
# Difficulty 3 of 5 · 15 minutes
#
# A score stays the same if q and k have their dims in another order, as long as both have the same order. So
# the *rows* of `qkv_proj` can be put in an order in which neighbours are the right pairs. Ports of weights
# between the two conventions do this. The rows of one head are D for q, D for k and D for v (section 7). Find
# the order. The check applies it to a copy of the model that rotates neighbours.

# %% tags=["stub"]
def neighbour_order(H, D, R):
    """Index tensor (3 H D,): row r of the new qkv_proj is row order[r] of the old."""
    ...

# %% tags=["check"]
with exercise("2.3"):
    order = neighbour_order(H, D, R)
    assert order is not None, "nothing came (None), expected 3 H D numbers"
    order = torch.as_tensor(order).long()
    same(order.sort().values, torch.arange(3 * H * D), "the rows in order, each exactly once")
    moved = copy.deepcopy(model)
    for block in moved.transformer.blocks:
        for p in block.attn.qkv_proj.parameters():
            p.data = p.data[order]
    with patch.object(neox, "rotate", rotate_neighbours):
        off = relative(moved(ids).logits, right.logits)
    wanted = "expected less than 1e-5; look at the rows of head 0"
    assert off < 1e-5, f"the logits are off by {off:.1e} relative, {wanted}"

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

# %% tags=["wrong"]
def neighbour_order(H, D, R):
    pairs = torch.arange(R).view(2, R // 2).T.flatten()
    head = torch.cat([pairs, torch.arange(R, D)])
    block = torch.cat([head, torch.arange(D, 3 * D)])      # q has a new order, and k has not
    return torch.cat([h * 3 * D + block for h in range(H)])

# %% [markdown]
# <details><summary>Hint</summary>
#
# New dims 0 and 1 must be the old dims 0 and R/2: `torch.arange(R).view(2, R // 2).T.flatten()`. After them
# come the dims that do not rotate. The same goes for k. The rows of v must stay, because v is not rotated and
# `out_proj` expects its order.
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
# ## 6. The trap of half precision
#
# An angle is position × speed, and at position 2047 the first pair has turned by 2047 radians. Only what is
# left after full turns matters. bfloat16 has 8 significant bits. **Predict:** what does it make of the number
# 2047? The picture shows the largest error of an angle up to each position.

# %% alt="Errors of angles over the position on two log axes: in bfloat16 they rise above half a turn, in float32 they stay below a ten-thousandth of a radian."
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
assert high.max() > math.pi and low.max() < 1e-4

# %% [markdown]
# Half a turn is 3.14 radians: an error of that size points the arrow the opposite way. Therefore
# `rotary_tables` computes angles in float32 in every model, and rounds only the finished cosines and sines.
#
# Here is the model with angles in bfloat16. **Predict:** the speech has 159 tokens, and bfloat16 can tell all
# whole numbers up to 256 apart. Will the mistake be visible? And what if the same speech begins at position
# 300, or 1900?

# %%
def tables_in_bfloat16(position_ids, R, base, dtype):
    speeds = 1.0 / base ** (torch.arange(0, R, 2, dtype=torch.float32) / R)
    angles = (position_ids[..., None].bfloat16() * speeds.bfloat16()).float()
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]

for start in (0, 300, 1900):
    where = dict(labels=ids, position_ids=torch.arange(start, start + T)[None])
    effect(f"float32, from {start}", model(ids, **where))
    with patch.object(neox, "rotary_tables", tables_in_bfloat16):
        wrong = model(ids, **where)
    effect(f"bfloat16, from {start}", wrong)
    off = relative(wrong.logits, right.logits)
    assert off < 1e-2 if start == 0 else off > 0.1

# %% [markdown]
# On a short text, a check with a tolerance of 10⁻² lets this mistake pass. Further out the logits are off by
# more than 10 %. (EleutherAI/gpt-neox issue 1003 is this bug.)
#
# ## 7. One matrix for q, k and v
#
# `qkv_proj` has 3C rows: first q, k and v of head 0, then q, k and v of head 1, and so on.
# `Attention.forward` cuts the heads apart first (`view(B, T, -1, 3 * D)`), and then each head into q, k and v
# (`chunk(3)`). A reader who knows GPT-2 expects three thirds: q of all heads, k of all heads, v of all heads.
#
# **Predict:** in how many of the 12 blocks do both ways agree?

# %% alt="Two strips of twelve blocks: q0 k0 v0 q1 k1 v1 and so on above, all q, then all k, then all v below."
kinds = dict(q=BLUE, k=RED, v=GREEN)
lie = [(f"{kind}{h}", D, kinds[kind]) for h in range(H) for kind in kinds]
cut = [(f"{kind}{h}", D, kinds[kind]) for kind in kinds for h in range(H)]
agree = [ours[0] for ours, theirs in zip(lie, cut) if ours == theirs]
print("both ways agree:", agree); assert agree == ["q0", "v3"]
strips({"as they lie": lie, "as thirds read them": cut},
       "rows of qkv_proj: number of the head, colour for q, k, v", "row");

# %% [markdown]
# **The second deliberate mistake** is to cut the rows into thirds. We do not rewrite the module for it: it is
# the same to cut a matrix rightly whose rows were moved accordingly. **Predict:** does this cost more than the
# wrong pairs, or less?

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
assert thirds(ids, labels=ids).loss > mispaired.loss + 0.5

# %% [markdown]
# It costs more than twice as much. The repair is the inverse move of the rows. The same line splits these
# weights into three matrices like those of GPT-Neo.

# %%
assert thirds(ids, labels=ids).loss - right.loss > 2 * (mispaired.loss - right.loss)
repaired = reorder(thirds, lambda w: w.view(H, 3, D, -1).transpose(0, 1).reshape(w.shape))
effect("repaired", repaired(ids, labels=ids))
assert torch.equal(repaired(ids).logits, right.logits)

# %%
w = blocks[0].attn.qkv_proj.weight
Wq, Wk, Wv = w.view(H, 3, D, -1).transpose(0, 1).reshape(3, C, C)              # heads in order
print(tuple(w.shape), "→ three of", tuple(Wq.shape))

# %% [markdown]
# ## 8. The parallel residual
#
# In GPT-2 and GPT-Neo a block has two steps: the MLP reads what attention has written. In GPT-J, GPT-NeoX and
# Pythia both read the same x, and one sum ends the block. `use_parallel_residual` in the config decides.
# RedPajama's models, for instance, have this architecture with the sequential form.

# %% alt="Two drawings of a block: on the left attention and the MLP hang on the stream one after the other, on the right both branch off at the same place and meet in one sum."
residual_forms()
show(neox.Block.forward)

# %% [markdown]
# Why in parallel? The paper on GPT-NeoX-20B (Black et al. 2022) names efficiency: when the matrices of a layer
# are spread over several GPUs, each residual sum needs one exchange between them, and now there is one sum in
# a block instead of two. On one device two products can become one: the weights of the norms can be folded
# into the matrices behind them, since both branches normalize the same x. In the sequential form the second
# product must wait for attention.

# %%
block, x = blocks[0], torch.randn(5, C)
n1, n2, qkv_proj, up = block.ln_1, block.ln_2, block.attn.qkv_proj, block.mlp.up_proj
W = torch.cat([qkv_proj.weight * n1.weight, up.weight * n2.weight])          # (3C + 4C, C)
bias = torch.cat([qkv_proj(n1.bias), up(n2.bias)])         # the norms' biases go through as well
one = F.linear(F.layer_norm(x, (C,), eps=n1.eps), W, bias)
two = torch.cat([qkv_proj(n1(x)), up(n2(x))], dim=-1)
print("one product of", tuple(W.shape), f"→ {tuple(one.shape)}, off by {relative(one, two):.0e}")
assert relative(one, two) < 1e-5

# %% [markdown]
# A block has **two** LayerNorms, not one. The authors of the 20B model meant to share one and call the second
# an oversight. The weights have both, so our code needs both. **Predict:** which is the worse mistake in a
# trained model, the sequential form, or `ln_1` in both places?

# %% alt="Cosine similarity of the hidden states with the right ones, by layer: with the shared norm it stays near 1, with the sequential form it falls."
sequential, shared = copy.deepcopy(model), copy.deepcopy(model)
for a, b in zip(sequential.transformer.blocks, shared.transformer.blocks):
    a.parallel, b.ln_2 = False, b.ln_1
alike = {}
for name, wrong in {"sequential": sequential, "ln_1 in both places": shared}.items():
    out = wrong(ids, labels=ids, output_hidden_states=True)
    effect(name, out)
    pairs = zip(out.hidden_states, states)                 # each (1, T, C)
    alike[name] = [F.cosine_similarity(s, t, dim=-1).mean() for s, t in pairs]
assert out.loss < right.loss + 0.02
by_layer(alike, "hidden states beside the right ones, same weights",
         "layers done (the last after the final norm)", "cosine similarity")

# %% [markdown]
# The two forms are not two ways to compute one model: weights belong to the form in which they were trained.
# The shared norm hardly shows. It raises the loss by less than 0.02, so a test that compares greedy text may
# well pass.
#
# ## 9. Two matrices at the ends, and rows without tokens
#
# GPT-Neo uses its embedding once more as the output head. GPT-NeoX has two matrices. **Predict:** after
# training, how alike are a token's row in the one and its row in the other? Is their cosine near 1, 0 or −1?
#
# The official tokenizer has 50,277 tokens: 50,254 and 23 runs of spaces (`tests/test_tokenizer.py` counts them
# in the true file). Our demo's tokenizer is made in the same way. For the hardware's sake the number of rows
# is rounded up to a multiple of 128 · M, where M is the number of parts into which training cut the matrix.

# %%
E, U = model.transformer.embed.weight, model.lm_head.weight                  # each (V, C)
cosine = F.cosine_similarity(E, U).mean()
print(f"tied: {E is U}, mean cosine of a token's two rows: {cosine:.3f}")
assert E is not U and abs(cosine) < 0.02
words, runs = tokenizer.vocab_size, len(tokenizer) - tokenizer.vocab_size
print(f"demo-neox     {words} + {runs} = {len(tokenizer)} tokens, {len(E)} rows")
assert 50254 + runs == 50277
cuts = {"pythia-70m": 1, "pythia-2.8b": 1, "pythia-6.9b": 2, "gpt-neox-20b": 2, "pythia-12b": 4}
for name, M in cuts.items():
    rows = math.ceil(50277 / (128 * M)) * 128 * M
    assert rows == SHAPES[name].vocab_size
    print(f"{name:13} 50254 + {runs} = 50277 tokens,",
          f"{rows} rows = {rows // (128 * M)} · 128 · {M}, {rows - 50277} without a token")

# %% [markdown]
# The two rows of a token are unrelated: the mean cosine is 0.
#
# What do rows hold whose token never came? The demo has such tokens: the bytes from 0x80 on, which no text of
# plain English letters contains. Before training, a row has a length of about 0.02 · √256 = 0.32.
# **Predict:** what has training done to the rows of these tokens in the embedding, and what in the head?

# %% alt="A cloud of dots for the tokens that came and, apart from it at the top left, a small group of triangles for the bytes that never came: short rows in the embedding, the longest ones in the head."
pieces = [tokenizer.decode([i]) for i in range(V)]
never = torch.tensor([piece == "\ufffd" for piece in pieces])             # no character by itself
in_E, in_U = E.norm(dim=-1), U.norm(dim=-1)                # (V,) lengths of the rows
row_lengths(in_E, in_U, never, f"{never.sum()} bytes from 0x80 on")
print(f"embedding rows {in_E[never].min():.2f} to {in_E[never].max():.2f} long,",
      f"at the start about {config.initializer_range * C ** 0.5:.2f}")
assert 0.25 < in_E[never].min() and in_E[never].max() < 0.4

# %%
cosine = F.normalize(U[never], dim=-1).mean(0).norm() ** 2
share = right.logits.softmax(-1)[..., never].sum(-1).mean()
print(f"head rows: mean cosine of two {cosine:.3f}, together {share:.0e} of the probability")
print(f"decoding id {V}, which has no token: {tokenizer.decode([V])!r}")
assert cosine > 0.99 and share < 1e-4
corner = [pieces[i] for i in torch.where((in_U > 2.8) & ~never)[0].tolist()]
print("others in the same corner:", *[piece for piece in corner if piece.isprintable()])

# %% [markdown]
# A row of the embedding that is never read keeps the length that it had at the start. A row of the head is
# trained at every step, always in the same direction: towards being less likely. All of these rows end up as
# nearly one vector; their mean cosine is above 0.99. The rows without a token in the official models are in
# the same situation: their probability is small, nothing forbids them, and decoding one gives no text.
#
# ## 10. Maps and a lens
#
# These are the attention maps of all 16 heads, for the first 40 tokens of the speech. Every layer is global.
# **Predict:** which heads of section 3 will show a bright line just below the diagonal?

# %% alt="Sixteen attention maps, layers as rows and heads as columns: broad and dim in layer 0, bright lines along the diagonal in some heads of layers 1 to 3."
maps = model(ids, output_attentions=True).attentions       # 4 tensors (B, H, T, T)
attention_maps([m[0, :, :40, :40] for m in maps])
previous = torch.stack([m[0].diagonal(-1, -2, -1).mean(-1) for m in maps])   # (layers, H)
print("mean weight on the previous token, layers by heads:", previous, sep="\n")
assert (previous > 0.35).sum() == 3 and previous[0].max() < 0.1

# %% [markdown]
# Three heads give more than a third of their weight to the token before; one is in layer 1, two are in
# layer 3. No head of layer 0 gives it a tenth.
#
# The **logit lens** puts the residual stream after each block through the last norm and the output head. It
# shows what the model would say if it stopped there. **Predict:** what does it say before the first block, in
# the family whose head is the embedding, and in the one whose head is a matrix of its own?

# %% alt="Two tables of words coloured by their probability: in GPT-Neo the row before the first block repeats the tokens that were read, in GPT-NeoX it does not."
for family in ("neo", "neox"):
    m = AutoModelForCausalLM.from_pretrained(f"../checkpoints/demo-{family}")
    t = AutoTokenizer.from_pretrained(f"../checkpoints/demo-{family}")
    x = t(TEXT, return_tensors="pt").input_ids
    *early, last = m(x, output_hidden_states=True).hidden_states             # each (B, T, C)
    said = torch.cat([m.lm_head(h) for h in (*map(m.transformer.ln_f, early), last)])
    p, words = (values[:, 20:28] for values in said.softmax(-1).max(-1))     # (layers + 1, 8)
    read = [repr(t.decode([i])) for i in x[0, 20:28].tolist()]
    lens([[t.decode([i]) for i in row] for row in words.tolist()], p, read,
         ["embedding", *(f"after block {i}" for i in range(4))], f"demo-{family}")
    losses = [F.cross_entropy(row[:-1], x[0, 1:]).item() for row in said]
    repeats = (said[0].argmax(-1) == x[0]).float().mean().item()
    print(f"demo-{family}: loss of the lens", [round(loss, 2) for loss in losses],
          f"tokens repeated before the first block {repeats:.0%}")
    assert losses[1:] == sorted(losses[1:], reverse=True)
    assert repeats > 0.9 if family == "neo" else repeats < 0.05

# %% [markdown]
# In both families the loss of the lens falls from block to block. Before the first block, GPT-Neo's lens
# repeats the tokens that were read, because the head is the embedding. GPT-NeoX's head was never trained to
# read the embedding directly, and its loss there is that of a model that knows nothing.
#
# ## 11. Over training
#
# Both demo checkpoints left a log with a line for each step. A loss per token would be no fair comparison,
# because the two vocabularies have different sizes; bits per byte of held-out text can be compared. There is
# one run of each, and the two differ in vocabulary and window too. So the curves show that both learn, and
# not which architecture is better. **Predict:** demo-neo took 3500 steps to its last value. After how many of
# its own steps did demo-neox pass that value?

# %% alt="Two panels: the training losses of both demo checkpoints fall over the steps, and so do their held-out bits per byte."
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
# ## 12. An induction head
#
# An **induction head** (Olsson et al. 2022) continues patterns: at a token that came before, it reads the token
# that followed it the last time. A model that has one finds a text much easier the second time. **Predict:**
# what is the loss of demo-neox on the speech when it has just read the same speech?

# %%
def first_and_second(model, ids):
    """Mean loss of texts (B, n) and of the same texts when they follow themselves."""
    twice, n = torch.cat([ids, ids], dim=1), ids.size(1)
    logits = model(twice).logits[:, :-1]
    each = F.cross_entropy(logits.transpose(1, 2), twice[:, 1:], reduction="none")   # (B, 2n - 1)
    return each[:, :n - 1].mean().item(), each[:, n:].mean().item()

for n in (16, 32, 64, T):                                  # parts of n tokens, each read twice
    first, second = first_and_second(model, ids[0].unfold(0, n, n))
    print(f"{n:3} tokens: loss {first:.3f}, the second time {second:.3f}")
    assert first - second < 0.1

# %% [markdown]
# The second copy is hardly easier: demo-neox gains less than 0.1 nats, even where the copies stand only 16
# tokens apart. So the distance is not what keeps it from copying. What does is left open here.
#
# `demo-induction` learned to copy, because its text rewards nothing else: a line is 3 to 31 random words, and
# then the same words in the same order again and again. It is a GPT-NeoX of 2 layers with 4 heads each, C = 128,
# D = 32. All 32 dims of a head rotate ([how it was trained](../checkpoints/README.md)).

# %%
COPIES = "../checkpoints/demo-induction"
copier = AutoModelForCausalLM.from_pretrained(COPIES, attn_implementation="naive")
copier.requires_grad_(False)
its_tokenizer = AutoTokenizer.from_pretrained(COPIES)

# %%
words = [consonant + vowel for consonant in "bcdfghklmnprstvz" for vowel in "aeiou"]
word_ids = torch.tensor([its_tokenizer.encode(f" {word}") for word in words])[:, 0]     # (80,)
torch.manual_seed(0)
orders = torch.stack([torch.randperm(80) for _ in range(32)])        # (B, 80)
print(its_tokenizer.decode(word_ids[orders[0, :20]].tolist()))

# %%
for n in (7, 12, 20, 28):
    first, second = first_and_second(copier, word_ids[orders[:, :n]])
    print(f"32 texts of {n:2} words: loss {first:.2f}, the second time {second:.2f}")
    assert first > 4 and second < first / 4

# %% [markdown]
# Random words cannot be predicted: a guess among 80 costs ln 80 = 4.38. The second time, a word costs less than
# a quarter of what it cost the first time, at each of four lengths. So the model does not look back by a fixed
# distance: it finds where the word stood before.
#
# ### Exercise 2.4 · Find the induction head
#
# Difficulty 4 of 5 · 20 minutes
#
# On a text of n tokens written twice, an induction head at position i ≥ n reads position i − n + 1: the token
# after the previous occurrence. Give each head its mean weight there, over the whole second copy and all
# texts. The check tries heads made by hand, and then prints the scores of demo-induction.

# %% tags=["stub"]
def induction(weights):
    """Attention weights (B, H, 2n, 2n) on texts of n tokens written twice -> (H,), 0 to 1."""
    ...

# %% tags=["check"]
with exercise("2.4"):
    n, i = 3, torch.arange(6)
    def looks(back):                                       # reads `back` positions before itself
        return F.one_hot((i - back).clamp(min=0), 2 * n).float()
    made = torch.stack([looks(n - 1), looks(1), looks(n), torch.full((6, 6), 0.1)])  # (4, 2n, 2n)
    names = "2 texts of n = 3; heads that read 2, 1 and 3 back, and one with 0.1 everywhere"
    same(induction(made[None].repeat(2, 1, 1, 1)), [1, 0, 0, 0.1], names, 1e-6)
    twice = word_ids[orders[:, :20]].repeat(1, 2)
    for layer, w in enumerate(copier(twice, output_attentions=True).attentions):
        print(f"layer {layer}:", [round(float(x), 2) for x in induction(w)])

# %% tags=["wrong"]
def induction(weights):
    n = weights.size(-1) // 2
    return weights.diagonal(-n, -2, -1).mean((0, -1))      # the same token, not its successor

# %% tags=["wrong"]
def induction(weights):
    n = weights.size(-1) // 2
    seen = weights.diagonal(1 - n, -2, -1)                 # divides by the first copy too
    return seen.sum((0, -1)) / weights.size(0) / (2 * n)

# %% tags=["wrong"]
def induction(weights):
    return weights.diagonal(-1, -2, -1).mean((0, -1))      # the previous token

# %% [markdown]
# <details><summary>Hint</summary>
#
# The entries (i, i − n + 1) are a diagonal: `weights.diagonal(1 - n, dim1=-2, dim2=-1)`. Its first entry belongs
# to i = n − 1, the last token of the *first* copy, and does not count.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def induction(weights):
#     n = weights.size(-1) // 2
#     return weights.diagonal(1 - n, dim1=-2, dim2=-1)[..., 1:].mean((0, -1))
# ```
# </details>
#
# How can a head know which token *follows* an earlier one? It needs help from the layer before: a
# **previous-token head** writes at each position which token stood before it. The induction head then looks for
# a position that says: before me stood the token that you are reading now. **Predict:** in which layer of
# demo-induction are the heads of either kind?

# %%
twice = word_ids[orders[:, :20]].repeat(1, 2)              # (B, 2n), n = 20
maps = copier(twice, output_attentions=True).attentions    # 2 tensors (B, H, 2n, 2n)
before = torch.cat([m.diagonal(-1, -2, -1).mean((0, -1)) for m in maps])     # (8,)
after = torch.cat([m.diagonal(-19, -2, -1)[..., 1:].mean((0, -1)) for m in maps])
names = [f"layer {layer}, head {h}" for layer in range(2) for h in range(4)]

# %% alt="Two bar charts of the eight heads of demo-induction: one head of layer 0 reads the previous token, and the heads of layer 1 read the token to copy."
left, right_side = panels(2, 9, 2.8)
bars(names, before, "weight on the previous token", "mean weight", left)
bars(names, after, "weight on the token to copy", "mean weight", right_side, RED)
assert before.max() > 0.8 and before.argmax() < 4 and before.sort().values[-2] < 0.5
assert after[:4].max() < 0.2 and after[4:].min() > 0.4;

# %% [markdown]
# One head of layer 0 reads the previous token, and every head of layer 1 is an induction head. A single layer
# could not do this: its heads would see the tokens, but not yet what stood before them.
#
# ### Exercise 2.5 · Knock out a head
#
# Difficulty 3 of 5 · 15 minutes
#
# Write a function that returns a copy of a model in which one head writes nothing, while all other heads and
# the biases work as before. (`out_proj` reads the outputs of all heads, one after the other, D numbers each.)

# %% tags=["stub"]
def without(model, layer, head):
    """A copy of a GPT-NeoX whose head `head` in layer `layer` adds nothing to the stream."""
    ...

# %% tags=["check"]
with exercise("2.5"):
    untouched, cut = copy.deepcopy(copier), without(copier, 0, 1)
    assert isinstance(cut, torch.nn.Module), f"came {cut!r:.60}, expected a model"
    y = torch.arange(128.0)[None]                          # as if heads 0 to 3 gave these outputs
    kept = y.clone(); kept[:, 32:64] = 0
    old, new = untouched.transformer.blocks[0].attn, cut.transformer.blocks[0].attn
    same(copier(twice).logits, untouched(twice).logits, "logits of the model that was given")
    same(new.out_proj(y), old.out_proj(kept), "out_proj of layer 0 without head 1", 1e-4)
    print(f"the second copy: loss {first_and_second(cut, twice[:, :20])[1]:.2f} without head 1")

# %% tags=["wrong"]
def without(model, layer, head):
    model = copy.deepcopy(model)
    w = model.transformer.blocks[layer].attn.out_proj.weight
    w.data[head * 32:(head + 1) * 32] = 0                  # rows are outputs, columns are inputs
    return model

# %% tags=["wrong"]
def without(model, layer, head):
    model = copy.deepcopy(model)
    w = model.transformer.blocks[layer].attn.out_proj.weight
    w.data[:, head::4] = 0                                 # every fourth number, as if interleaved
    return model

# %% tags=["wrong"]
def without(model, layer, head):
    model = copy.deepcopy(model)
    w = model.transformer.blocks[layer].attn.qkv_proj.weight
    w.data[head * 96:head * 96 + 64] = 0                   # without q and k it reads all tokens alike
    return model

# %% [markdown]
# <details><summary>Hint</summary>
#
# `copy.deepcopy(model)` is a copy. `out_proj` multiplies the *columns* of its weight by its inputs, and head h
# has the D columns from h · D on. Setting them to 0 leaves the bias as it is.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def without(model, layer, head):
#     model, D = copy.deepcopy(model), model.config.head_dim
#     w = model.transformer.blocks[layer].attn.out_proj.weight
#     w.data[:, head * D:(head + 1) * D] = 0
#     return model
# ```
# </details>
#
# Now we break the copying without touching an induction head. Each head of layer 0 in turn has its outputs
# set to 0 on their way into `out_proj`. **Predict:** what becomes of the loss of the second copy without the
# previous-token head, and without one of the other three?

# %%
def silence(head):
    keep = torch.ones(128)
    keep[head * 32:(head + 1) * 32] = 0                    # D = 32
    return lambda module, inputs: (inputs[0] * keep,)

# %% alt="Bars of the loss of the second copy: low for the whole model and without three heads of layer 0, high without the previous-token head."
losses = {"whole model": first_and_second(copier, twice[:, :20])[1]}
for head in range(4):
    out_proj = copier.transformer.blocks[0].attn.out_proj
    hook = out_proj.register_forward_pre_hook(silence(head))
    losses[f"without head {head} of layer 0"] = first_and_second(copier, twice[:, :20])[1]
    hook.remove()
bars(list(losses), list(losses.values()), "The second copy of 20 random words", "loss")
ordered = sorted(losses.values())
assert ordered[-1] == losses[f"without head {before.argmax()} of layer 0"] > 3 > 1 > ordered[-2]

# %% [markdown]
# Without the previous-token head the copying is gone: the loss rises above 3 nats. Without any other head of
# layer 0 it stays below 1. The heads of layer 1 are untouched, but they no longer find what they look for.
#
# Pythia's training left checkpoints at 154 steps, as revisions of one name. With a network one can watch when
# pythia-70m begins to find a text easier the second time. Without a network each line says that it was skipped.

# %%
for step in (512, 4000, 143000):
    if found := official("EleutherAI/pythia-70m", revision=f"step{step}"):
        pythia, its = found
        first, second = first_and_second(pythia, its(TEXT, return_tensors="pt").input_ids)
        print(f"after {step} steps: loss {first:.3f}, the second time {second:.3f}")

# %% [markdown]
# ## 13. Check against the reference
#
# The reference is transformers. First the demo itself, then small models with random weights, at two rotary
# fractions and in both residual forms. The weights are drawn with a large spread, because the usual small
# ones hide a shared LayerNorm (`tests/helpers.py`). There is no tolerance: `torch.equal`.

# %%
import tempfile, transformers
transformers.utils.logging.disable_progress_bar()

def both(folder):
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    return theirs, AutoModelForCausalLM.from_pretrained(folder, attn_implementation="naive")

theirs, ours = (m(ids).logits for m in both(FOLDER))
print("equal:", torch.equal(theirs, ours), f" largest |difference| {(theirs - ours).abs().max()}")
assert torch.equal(theirs, ours)

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
# ## In three sentences
#
# GPT-NeoX has no table of positions: it turns pairs of dims of each query and key, so that a score depends on
# the distance of two tokens and not on where they stand. Its QKV rows lie head by head, its pairs are
# halves, and its attention and MLP read the same x; code that gets one of these wrong still runs, and only
# the numbers show it. Two heads in two layers, one that writes down the previous token and one that looks
# for it, are enough to copy a text that was read once.
#
# ## Further
#
# This notebook left out dropout, padding (an attention mask beside the causal one; `generate` gives positions
# that skip it, notebook 5), caches (they keep the *rotated* keys, so that no key is turned twice) and longer
# contexts by slower rotation (`rope_scaling`; no official checkpoint uses it, and `neox.py` refuses it by
# name). `tests/test_mistakes.py` makes each mistake of this notebook and more. Read Su et al. 2021 on rotary
# positions, Wang and Komatsuzaki 2021 (GPT-J) on the parallel form, Black et al. 2022 on the 20B model,
# Biderman et al. 2023 on Pythia, and Olsson et al. 2022 on induction heads. These weights come from
# EleutherAI/gpt-neox, `megatron/model/transformer.py`.
