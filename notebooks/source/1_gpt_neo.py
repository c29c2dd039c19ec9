# %% [markdown]
# # 1. GPT-Neo and local attention
#
# This notebook follows a text through a GPT-Neo, from its ids to the probabilities of the next token.
# Every step is done by hand, and its result is compared with the model's own.
#
# **60 minutes** to read, **45 minutes** for the four exercises · **needs** a CPU, no GPU and no network;
# you should have seen GPT-2's attention once and read notebook 0 · [the words and letters](README.md)
#
# **Objectives.** Afterwards you can
# * compute attention by hand and get the same numbers as the module, to the bit;
# * say what GPT-Neo does that GPT-2 does not: scores without 1/√D, and every second layer local;
# * draw the mask of a local layer, count its window, and compute how far information travels through a
#   stack of such layers;
# * compute what local attention saves, and say which code saves it;
# * check a port against the reference in such a way that a wrong window is noticed.
#
# The model is `demo-neo`: 4 layers, C = 256, 4 heads of D = 64, window 64, trained on Shakespeare's
# plays. Have the file `neo.py` open beside this notebook.

# %%
import sys; sys.path[:0] = [".."]                      # the modules lie one folder up
import math, torch, torch.nn.functional as F
import neo
from dataclasses import replace
from attention import KVCache, naive, visible
from base import ACTIVATIONS
from compare import trace
from lesson import exercise, official, same, show
from load_weights import AutoModelForCausalLM, AutoTokenizer
from plots import *

# %%
FOLDER = "../checkpoints/demo-neo"
model = AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="naive")
model.requires_grad_(False)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
config, blocks = model.config, model.transformer.blocks
print(config.attention_layers, f"window {config.window_size}, C = {config.hidden_size},",
      f"H = {config.num_heads}, D = {config.head_dim}")

# %% [markdown]
# ## 1. One text in, one token out
#
# The running example is a speech from *Macbeth*, a play that was not in the training data. It is longer
# than three windows. This will matter, because **a text that fits into the window cannot show what a
# local layer does.**

# %%
TEXT = """MACBETH.
Is this a dagger which I see before me,
The handle toward my hand? Come, let me clutch thee.
I have thee not, and yet I see thee still.
Art thou not, fatal vision, sensible
To feeling as to sight? or art thou but
A dagger of the mind, a false creation,
Proceeding from the heat-oppressed brain?
I see thee yet, in form as palpable
As this which now I draw.
Thou marshall'st me the way that I was going;
And such an instrument I was to use.
Mine eyes are made the fools o' the other senses,
Or else worth all the rest: I see thee still;
And on thy blade and dudgeon gouts of blood,
Which was not so before. There's no such"""

# %% [markdown]
# Nothing is put before the text. The first id is the text's first token, whereas some other families
# begin each text with a special token.

# %%
ids = tokenizer(TEXT, return_tensors="pt").input_ids
T = ids.size(1)
assert T > 3 * config.window_size
def pieces(ids):
    return [repr(tokenizer.decode([i])) for i in ids.tolist()]
print(tuple(ids.shape), *pieces(ids[0, :20]))
assert tokenizer.decode(ids[0, :5].tolist()) == "MACBETH"

# %% [markdown]
# This is where the notebook is going: the probabilities of the next token, and some more text.

# %% alt="Eight horizontal bars: after “There's no such” the model gives “a” 40 % and every other token less than 4 %."
best = model(ids).logits[0, -1].softmax(-1).topk(8)
bars(pieces(best.indices), best.values, "after “… There's no such”",
     "probability of the next token")
print(tokenizer.decode(model.generate(ids, max_new_tokens=24)[0, T:].tolist()))

# %% [markdown]
# ## 2. Token and position
#
# Attention by itself does not know the order of the tokens. GPT-Neo, like GPT-2, has two tables. One
# has a row for each token (`embed`), the other has a row for each position (`pos_embed`). Both were
# learned, and the model reads the sum of the two rows.

# %%
embed, pos_embed = model.transformer.embed, model.transformer.pos_embed
x = embed(ids) + pos_embed(torch.arange(T))                # (B, T, C)
print("x", tuple(x.shape))
assert torch.equal(x, model(ids, output_hidden_states=True).hidden_states[0])

# %% [markdown]
# How similar are the rows of two positions? Early rows resemble each other, and so do late ones. The
# two ends of the table point away from each other. The model learned this from the texts alone: nothing
# in the architecture tells it that position 5 comes after position 4.
#
# On both sides of the diagonal there is also a thin line parallel to it. **Predict:** what could make
# two positions alike that are exactly 103 apart?

# %% alt="A square of 512 by 512 cosines: dark corners at the start and the end of the diagonal, light ones far from it, and thin lines parallel to the diagonal."
rows = F.normalize(pos_embed.weight, dim=-1)               # (P, C)
alike = rows @ rows.T                                      # (P, P)
matrix(alike, "how similar two positions are (cosine)", "position", "position", bar=True,
       colours="PuOr", limits=(-0.4, 0.4), axes=panels(1, 7.4, 6.2)[0])
assert alike[:50, :50].mean() > 0.1 and alike[-50:, -50:].mean() > 0.1
assert alike[:50, -50:].mean() < -0.1

# %% [markdown]
# The thin lines have nothing to do with language. They show how this model was trained.
# `training/texts.py` cuts the plays, 1,702,373 tokens, into windows of 512, and in each epoch it begins
# at another offset. The token that stood at position p in one epoch stands 103 positions later in
# another epoch, so these two rows of the table were trained on the same tokens.
#
# We compute the offsets again. Every distance between two of them, counted around a window of 512,
# should have its line.

# %%
from training.texts import epoch_generator
spare = 1_702_373 % 512                                    # tokens that no window needs
offsets = [torch.randint(spare + 1, (), generator=epoch_generator(0, n)).item() for n in range(4)]
explained = {(a - b) % 512 for a in offsets for b in offsets}
print("offsets", offsets, " their distances", sorted(explained))

# %% [markdown]
# The mean of each diagonal of the square shows the lines as peaks. The eight highest, measured against
# their neighbours, all stand at such a distance.

# %% alt="The mean cosine falls slowly with the distance of two positions; eight narrow peaks with their distances stand out, the highest at 103."
by_distance = torch.stack([alike.diagonal(d).mean() for d in range(512)])
around = F.avg_pool1d(by_distance[None], 9, 1, 4)[0]       # mean of the 9 distances around each
peaks = ((by_distance - around)[2:-8].topk(8).indices + 2).tolist()
axes = curves(range(1, 512), {"": by_distance[1:]}, "mean of each diagonal", "distance", "cosine")
for d in peaks:
    axes.annotate(d, (d, by_distance[d] + 0.005), fontsize=8.5, rotation=90, ha="center")
print("highest peaks at distances", sorted(peaks))
assert peaks[0] == 103 and set(peaks) <= explained

# %% [markdown]
# **Predict:** the table has 512 rows. What happens to a text of 513 tokens?

# %%
try:
    model(torch.zeros(1, 513, dtype=torch.long))
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# There is no row for position 512, and nothing from which it could be made: a learned table ends where
# training ended. (Notebook 2 shows what GPT-NeoX does instead.)
#
# ## 3. The block
#
# A block reads the **residual stream** x twice and adds to it twice. The first time it adds what
# attention found among earlier tokens. The second time it adds what the MLP computes from each token by
# itself. Each of them reads x through a LayerNorm (pre-norm), so x itself is not normalized before the
# end of the model.

# %%
show(neo.Block.forward)

# %% [markdown]
# The same steps by hand, for all four blocks:

# %%
incoming, from_attention, from_mlp = [], [], []
for block in blocks:
    incoming.append(x)
    a, _ = block.attn(block.ln_1(x))
    x = x + a
    m = block.mlp(block.ln_2(x))
    x = x + m
    from_attention.append(a)
    from_mlp.append(m)
assert torch.equal(x, trace(model, ids)[-3])               # what the model's last block puts out
print("x", tuple(x.shape), "is what the module's last block puts out, to the bit")

# %% [markdown]
# **Predict:** does the norm of x shrink, stay or grow from block to block?

# %% alt="Three lines over the four blocks: the norm of the stream grows from 2 to 44, while what attention and the MLP add stays below 23."
parts = {"x, as it comes in": incoming, "added by attention": from_attention,
         "added by the MLP": from_mlp}
norms = {name: [t.norm(dim=-1).mean() for t in tensors] for name, tensors in parts.items()}
axes = curves(range(4), norms, "the stream grows from block to block", "block",
              "norm, mean over tokens", marker="o")
axes.set_xticks(range(4))
assert norms["x, as it comes in"] == sorted(norms["x, as it comes in"])

# %% [markdown]
# ## 4. Attention by hand
#
# We begin with an example that you can compute on paper: four tokens, D = 2, a window of 2. Each token
# has three vectors. Its **query** q says what it looks for, its **key** k says how it is found, and its
# **value** v is what it hands over to those who find it. The **score** q · k says how well a query and
# a key fit. The keys below are multiples of log 3, so that all weights will be multiples of a quarter.

# %%
q = torch.tensor([[1., 0], [0, 1], [1, 0], [0, 1]])                # (T, D): what each token seeks
k = torch.tensor([[0., 0], [0, 1], [1, 0], [1, 1]]) * math.log(3)  # (T, D): how it is found
v = torch.tensor([[4., 0], [0, 4], [8, 0], [0, 8]])                # (T, D): what it hands over
scores = q @ k.T
print("scores / log 3", (scores / math.log(3)).round().int(), sep="\n")

# %% [markdown]
# The mask forbids later tokens and those before the window: their scores become -∞. Softmax takes e to
# the power of each score and divides by the sum of the row. In row 1 the scores are 0 and log 3, so
# e⁰ = 1 and e^(log 3) = 3, and the weights are 1/4 and 3/4. The weights then mix the values.
#
# **Predict** row 2 of the weights, and row 2 of the result, with a pencil.

# %%
weights = scores.masked_fill(~visible(4, 4, 2), -math.inf).softmax(-1)
print("weights", weights.round(decimals=2), sep="\n")
print("weights @ v", (weights @ v).round(decimals=2), sep="\n")
quarters = torch.tensor([[4., 0, 0, 0], [1, 3, 0, 0], [0, 1, 3, 0], [0, 0, 1, 3]]) / 4
torch.testing.assert_close(weights, quarters)
torch.testing.assert_close(weights @ v, torch.tensor([[4., 0], [1, 3], [6, 1], [2, 6]]))

# %% [markdown]
# Now the module itself. It has three matrices for q, k and v, without a bias, and one matrix with a
# bias, `out_proj`. In `forward`, each of q, k and v is cut into heads of D numbers. `attention` does for
# all heads at once what you have just done, the results of the heads are put side by side again, and
# `out_proj` mixes them.

# %%
show(neo.Attention)

# %% [markdown]
# `attention` chooses among several ways to compute the same thing. Its definition is `naive`. You will
# recognize the scores, the mask, the softmax and the mix; the other lines are for padded batches and
# for numbers with few digits.

# %%
show(naive)

# %% [markdown]
# ### Exercise 1.1 · One query, without a mask
#
# Difficulty 2 of 5 · 10 minutes
#
# When a model writes text, there is one new query, and the keys and values of all tokens so far lie in
# a cache. A mask is not needed then: whoever knows the window takes the right keys and leaves the
# others. Compute the output of the last token by slicing, without `visible`.

# %% tags=["stub"]
def last_token(q, k, v, W):
    """q (D,), k and v (S, D), window W -> (D,), what the last of S tokens finds."""
    ...

# %% tags=["check"]
with exercise("1.1"):
    three = torch.randn(3, 70, 2, generator=torch.Generator().manual_seed(0))
    for count, W in [(1, 1), (2, 1), (3, 2), (3, 4), (5, 4), (70, 64)]:
        rows_of = three[:, None, None, :count]             # q, k, v: each (B, H, T, D)
        found = last_token(three[0, count - 1], three[1, :count], three[2, :count], W)
        same(found, naive(*rows_of, scale=1.0, window=W)[0, 0, -1], f"S = {count}, W = {W}", 1e-5)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `k[-W:]` takes the last W rows, or all of them where there are fewer than W. The scores are
# `k[-W:] @ q`, one number for each key.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def last_token(q, k, v, W):
#     weights = (k[-W:] @ q).softmax(-1)
#     return weights @ v[-W:]
# ```
# There is no future to forbid, because the last token may read all tokens of its window.
# </details>

# %% tags=["wrong"]
def last_token(q, k, v, W):                                 # divides by √D, as GPT-2 does
    weights = (k[-W:] @ q / len(q) ** 0.5).softmax(-1)
    return weights @ v[-W:]

# %% tags=["wrong"]
def last_token(q, k, v, W):                                 # W tokens before itself, and itself
    weights = (k[-W - 1:] @ q).softmax(-1)
    return weights @ v[-W - 1:]

# %% tags=["wrong"]
def last_token(q, k, v, W):                                 # a negative start where S < W
    first = len(k) - W
    return (k[first:] @ q).softmax(-1) @ v[first:]

# %% tags=["wrong"]
def last_token(q, k, v, W):                                 # forgets softmax
    return (k[-W:] @ q) @ v[-W:]

# %% [markdown]
# Block 1 of the model is local. Here is its head 0 in a few lines, on the whole speech:

# %%
stream = model(ids, output_hidden_states=True).hidden_states       # into blocks 0 to 3; the end
attn, h = blocks[1].attn, blocks[1].ln_1(stream[1])                # (B, T, C)
q = attn.q_proj(h).view(T, 4, 64)[:, 0]                            # (T, D): head 0 of 4
k = attn.k_proj(h).view(T, 4, 64)[:, 0]
v = attn.v_proj(h).view(T, 4, 64)[:, 0]
print("q, k, v", tuple(q.shape))

# %% [markdown]
# Scores, mask, softmax and mix, as in the example with four tokens. The model's own weights of
# this head must be the same.

# %%
scores = q @ k.T                                                   # (T, T), and no / sqrt(D)
weights = scores.masked_fill(~visible(T, T, 64), -math.inf).softmax(-1)     # (T, T)
y = weights @ v                                                    # (T, D)
print("scores", tuple(scores.shape), " weights", tuple(weights.shape), " y", tuple(y.shape))
torch.testing.assert_close(weights, model(ids, output_attentions=True).attentions[1][0, 0])
print("token", T - 1, "reads", int((weights[-1] > 0).sum()), "tokens;",
      "its weights sum to", round(weights[-1].sum().item(), 6))

# %% [markdown]
# The other three heads do the same, each with its own 64 of the 256 numbers. Their results are put side
# by side, (B, T, C), and `out_proj` mixes them. This ends the attention of the block, and it equals the
# module's own output, to the bit:

# %%
q, k, v = (proj(h).view(1, T, 4, 64).transpose(1, 2)               # (B, H, T, D) each
           for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
scores = (q @ k.transpose(-2, -1)).masked_fill(~visible(T, T, 64), torch.finfo(q.dtype).min)
heads = scores.softmax(-1) @ v                                     # (B, H, T, D)
together = heads.transpose(1, 2).contiguous().view(1, T, 256)      # (B, T, C): side by side
assert attn.q_proj.bias is None and attn.out_proj.bias is not None
assert torch.equal(attn.out_proj(together), attn(h)[0])
print("heads", tuple(heads.shape), " together", tuple(together.shape),
      " equal to the module, to the bit")

# %% [markdown]
# ## 5. No 1/√D
#
# Attention as it is usually taught divides the scores by √D, here by 8, so that softmax does not
# saturate at the start of training. GPT-Neo does not divide. Its original code put the factor into the
# *initial* values of the query weights instead. Training went on from there, so the trained weights
# expect scores that are not divided.
#
# **Predict:** with D = 64, do these scores lie within ±3, within ±30, or within ±300?

# %%
def scores_of(layer):
    """q · k of every head (H, T, T), and which of them count (T, T)."""
    a, h = blocks[layer].attn, blocks[layer].ln_1(stream[layer])
    q = a.q_proj(h).view(T, 4, 64).transpose(0, 1)         # (H, T, D)
    k = a.k_proj(h).view(T, 4, 64).transpose(0, 1)
    return q @ k.transpose(-2, -1), visible(T, T, a.window)

s, seen = scores_of(2)
print("scores", tuple(s.shape), f" largest |score| {s[:, seen].abs().max():.1f}")
assert 3 < s[:, seen].abs().max() < 30

# %% [markdown]
# To how many tokens does a head listen? The **entropy** of its weights says it: an entropy of n bits is a
# choice among 2ⁿ equally likely tokens.

# %%
def entropy(scores, seen):
    """Bits of each row's weights, for the rows from 100 on: (H, T - 100)"""
    p = scores.masked_fill(~seen, -math.inf).softmax(-1)[:, 100:]
    return -(p * p.clamp(min=1e-30).log2()).sum(-1)

print("entropy", tuple(entropy(s, seen).shape))

# %% [markdown]
# **Predict:** what does the division by 8 do to the entropy?

# %% alt="Two pairs of histograms for layer 2: divided scores crowd around 0, and the entropy of the weights moves from about 6.3 to about 7.3 bits."
left, right = panels(2)
histograms({"q · k, as trained": s[:, seen], "q · k / √D": s[:, seen] / 8},
           "scores of layer 2", "score", bins=[n / 4 for n in range(-64, 29)], axes=left)
histograms({"as trained": entropy(s, seen), "divided by √D": entropy(s / 8, seen)},
           "to how many tokens a query of layer 2 listens", "entropy of its weights, bits",
           bins=[n / 10 for n in range(25, 80)], axes=right);

# %% [markdown]
# Divided by √D, the entropy in every layer is within 0.05 bits of the entropy of a head that listens to
# all tokens alike. Layers 1 to 3, as trained, are far from that. Layer 0 is close to a mean of all tokens
# even as trained.

# %%
print("mean entropy, bits:")
for layer in range(4):
    s, seen = scores_of(layer)
    trained, divided = entropy(s, seen).mean(), entropy(s / 8, seen).mean()
    blind = seen.sum(1)[100:].log2().mean()                # n tokens alike: log2(n) bits
    print(f"  layer {layer}: as trained {trained:.2f}   divided {divided:.2f}",
          f"  every token alike {blind:.2f}")
    assert blind - divided < 0.05 and (blind - trained > 0.5 if layer else blind - trained < 0.2)

# %% [markdown]
# The same for an official model, where there is a network:

# %% alt="Two histograms of gpt-neo-125m: the scores of layer 2 as trained, and divided by √D."
if found := official("EleutherAI/gpt-neo-125m"):
    big, words = found
    big.requires_grad_(False)
    row = words(TEXT, return_tensors="pt").input_ids
    block, n = big.transformer.blocks[2], row.size(1)      # a global layer
    h = block.ln_1(big(row, output_hidden_states=True).hidden_states[2])
    q = block.attn.q_proj(h).view(n, big.config.num_heads, -1).transpose(0, 1)
    k = block.attn.k_proj(h).view(n, big.config.num_heads, -1).transpose(0, 1)
    s = (q @ k.transpose(-2, -1))[:, visible(n, n)]
    histograms({"q · k, as trained": s, "q · k / √D": s / 8},
               "gpt-neo-125m, scores of layer 2", "score")

# %% [markdown]
# **A deliberate mistake:** add the division, as one does who writes attention from memory. (Scaling
# the weights of q by 1/8 has the same effect.) What does it cost on this text? The loss alone does not
# say whether a rise is large. It needs a yardstick: the loss of the same model without any attention.
#
# **Predict:** how much of what attention contributes does the division destroy?
#
# First the loss with the mistake. The cell also repairs the weights.

# %%
before, losses = model(ids, labels=ids), {}
for name, factor in {"as trained": 1, "with 1/√D": 1 / 8, "repaired": 8}.items():
    for block in blocks:
        block.attn.q_proj.weight.mul_(factor)
    losses[name] = model(ids, labels=ids).loss.item()
    print(f"{name:10}   loss {losses[name]:.3f}   {losses[name] / before.loss - 1:+.1%}")
assert torch.equal(model(ids).logits, before.logits)       # 8 = 2³: nothing was rounded

# %% [markdown]
# Then the yardstick. A hook puts zeros in place of what each attention adds.

# %%
def nothing(module, inputs, out):
    return torch.zeros_like(out[0]), None

hooks = [block.attn.register_forward_hook(nothing) for block in blocks]
without = model(ids, labels=ids).loss.item()               # no token sees another
for hook in hooks:
    hook.remove()
lost = (losses["with 1/√D"] - losses["as trained"]) / (without - losses["as trained"])
print(f"without attention   loss {without:.3f};  1/√D destroys {lost:.0%}",
      "of what attention contributes")
assert 0.6 < lost < 0.7

# %% [markdown]
# A loss that rises by 4 % looks harmless. In truth it is almost two thirds of the way to a model whose
# tokens do not see each other at all.
#
# The missing division has one more consequence. Scores that are not divided are larger, so they are
# rounded more coarsely in bfloat16, where a number has only 8 significant bits. GPT-Neo casts q and k up
# to float32 before it multiplies them (`upcast`), even where the model itself is bfloat16. GPT-NeoX
# divides its scores and does not cast.
#
# **Predict:** how much less exact is the result with bfloat16 scores? And would it matter if the scores
# were divided?

# %%
for layer, block in enumerate(blocks):
    a, h, errors = block.attn, block.ln_1(stream[layer]), []
    qkv = [proj(h).view(1, T, 4, 64).transpose(1, 2).bfloat16()
           for proj in (a.q_proj, a.k_proj, a.v_proj)]     # (B, H, T, D) each
    for scale in (1.0, 1 / 8):
        truth = naive(*(x.double() for x in qkv), scale=scale, window=a.window)
        exact, coarse = (naive(*qkv, scale=scale, window=a.window, upcast=upcast) - truth
                         for upcast in (True, False))
        errors.append((coarse.norm() / exact.norm()).item() - 1)
    print(f"layer {layer}: bfloat16 scores add {errors[0]:.0%} to the error,",
          f"divided by √D {errors[1]:.0%}")
    assert errors[0] > 0.1 and errors[1] < 0.03

# %% [markdown]
# All outputs here are bfloat16 and have its rounding error in any case. Where the scores are bfloat16 too,
# the error grows noticeably, and with divided scores it hardly grows.
#
# ## 6. Who may see whom
#
# One function answers this for every layer, every length and every cache. (A global layer has no window:
# W is None.) The window **counts the query itself**: W keys in all, from i - W + 1 to i. Whoever reads
# “a window of 4” as “4 tokens before me” builds W + 1.

# %%
show(visible)

# %% [markdown]
# **Predict:** for 12 tokens and W = 4, how many squares are allowed (yellow)?

# %% alt="Four masks of 12 by 12 squares: a triangle, bands of 4 and of 5 squares, and the diagonal alone, with 78, 42, 50 and 12 allowed."
NAMES = {None: "global", 4: "local, W = 4", 5: "local, W = 5: one too many", 1: "local, W = 1"}
for axes, (W, name) in zip(panels(4, 9, 2.6), NAMES.items()):
    mask = visible(12, 12, W)                              # (T, S)
    matrix(mask, f"{name}\n{int(mask.sum())} of 144", axes=axes, borders=True)
assert visible(12, 12, 4).sum(1).tolist() == [1, 2, 3] + [4] * 9
assert visible(12, 12, 4)[8].nonzero().flatten().tolist() == [5, 6, 7, 8]

# %% [markdown]
# With a running kernel you can move T and W. The last T of 24 tokens ask, so T = 1 is decoding with a
# cache.

# %% tags=["interactive"]
from ipywidgets import interact
def mask_of(T=24, W=6):
    mask = visible(T, 24, W)
    matrix(mask, f"visible({T}, 24, {W}): {int(mask.sum())} scores", borders=True)
    plt.show()

interact(mask_of, T=(1, 24), W=(1, 24));

# %% [markdown]
# ### Exercise 1.2 · The mask from two triangles
#
# Difficulty 1 of 5 · 10 minutes
#
# transformers builds the local mask as the *exclusive or* `^` of two lower triangles. Do the same with
# two calls of `torch.tril` on a square of ones, without positions and without comparisons. Why is the
# result equal to `visible`?

# %% tags=["stub"]
def two_triangles(T, W):
    """(T, T) bool: visible(T, T, W), by torch.tril and ^."""
    ...

# %% tags=["check"]
with exercise("1.2"):
    for n, W in [(1, 1), (3, 2), (5, 1), (5, 9), (12, 4), (12, 12)]:
        same(two_triangles(n, W), visible(n, n, W), f"T = {n}, W = {W}")

# %% tags=["wrong"]
def two_triangles(T, W):                                   # one key too many
    ones = torch.ones(T, T, dtype=torch.bool)
    return torch.tril(ones) ^ torch.tril(ones, -W - 1)

# %% tags=["wrong"]
def two_triangles(T, W):                                   # sees the future
    ones = torch.ones(T, T, dtype=torch.bool)
    return torch.tril(ones, W - 1) ^ torch.tril(ones, -W)

# %% tags=["wrong"]
def two_triangles(T, W):                                   # an upper triangle
    ones = torch.ones(T, T, dtype=torch.bool)
    return torch.tril(ones) ^ torch.triu(ones, -W)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.tril(x, -W)` keeps what lies at least W below the diagonal. In row i it ends with key i - W, the
# nearest key that the window no longer contains.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def two_triangles(T, W):
#     ones = torch.ones(T, T, dtype=torch.bool)
#     return torch.tril(ones) ^ torch.tril(ones, -W)
# ```
# The second triangle, i - j ≥ W, lies inside the first, i - j ≥ 0. Where one set contains the other,
# exclusive or is the difference: 0 ≤ i - j < W.
# </details>
#
# ## 7. How far information travels
#
# A token in a local layer reads W tokens, and each of these has read W tokens in the layer below. So after
# n local layers a token can know about n (W - 1) + 1 tokens. One global layer, anywhere in the stack,
# makes that all tokens. In pictures, “i can know about j” after n layers is a product of masks:

# %% alt="Four squares with a band below the diagonal, which grows from 6 to 11, 16 and 21 tokens with each local layer."
reach, step = torch.eye(40), visible(40, 40, 6).float()
for n, axes in enumerate(panels(4, 9, 2.6), start=1):
    reach = (step @ reach > 0).float()                     # (40, 40)
    matrix(reach, f"local layers: {n}, W = 6\nreach: {int(reach[-1].sum())} tokens", axes=axes)
    assert reach[-1].sum() == n * 5 + 1

# %% [markdown]
# This is what a token *can* know. Does the real model agree? We give the trained weights to another
# architecture, in which all four layers are local with W = 16.

# %%
def changed(**fields):
    """The same weights in another architecture."""
    other = neo.GPTNeoForCausalLM(replace(config, **fields), "naive")
    other.load_state_dict(model.state_dict())
    return other.eval().requires_grad_(False)

short = changed(attention_types=[[["local"], 4]], window_size=16)
print("windows, as trained:", config.windows, "  changed:", short.config.windows)

# %% [markdown]
# The gradient of the last token's output with respect to the embedding of an earlier token is exactly 0
# where nothing of that token can have arrived. `felt` computes its size for every distance, after any
# number of layers. After one layer it ends at the window:

# %%
def felt(model, ids, layer):
    """How much the last token's output depends on each embedding, nearest first: (T,)"""
    start = []
    def grab(module, args, out):
        start.append(out.requires_grad_())                 # the embeddings: gradients end here
    hook = model.transformer.dropout.register_forward_hook(grab)
    end = model(ids, output_hidden_states=True).hidden_states[layer][0, -1]      # (C,)
    hook.remove()
    direction = torch.linspace(-1, 1, len(end)).cos()      # fixed: one number from C
    gradient, = torch.autograd.grad(end @ direction, start[0])                   # (B, T, C)
    return gradient[0].norm(dim=-1).flip(0)
print([round(g, 3) for g in felt(short, ids, 1)[:20].tolist()])

# %% [markdown]
# **Predict:** at which distance does each of the four curves end?

# %% alt="On a log axis the size of the gradient ends at distance 15, 30, 45 and 60 after one to four local layers; as trained it goes on to the end of the text."
lines = {f"local layers: {n}, W = 16": felt(short, ids, n) for n in (1, 2, 3, 4)}
drawn = lines | {"as trained, global and local": felt(model, ids, 4)}
curves(range(T), drawn, "each local layer adds 15 tokens of reach; a global one adds all",
       "distance to the last token, tokens", "size of the gradient", log="y",
       axes=panels(1, 9, 3.6)[0])
assert [int((line > 0).sum()) for line in lines.values()] == [16, 31, 46, 61]
assert (drawn["as trained, global and local"] > 0).all()

# %% [markdown]
# ### Exercise 1.3 · Reach of a stack
#
# Difficulty 2 of 5 · 10 minutes
#
# `config.windows` has for each layer its window, or None for a global layer. About how many tokens,
# itself included, can the last of T tokens know after all layers? Compute it without a loop over tokens.

# %% tags=["stub"]
def tokens_reached(windows, T):
    """windows such as [None, 64] or [4, 4, 4]; T tokens -> a number from 1 to T."""
    ...

# %% tags=["check"]
with exercise("1.3"):
    for n in (1, 5, 12, 100):
        for windows in ([4], [1, 1], [2, 7], [4, 4, 4], [64, 64], [None, 4], [4, None],
                        list(config.windows)):
            told = torch.eye(n)
            for W in windows:
                told = (visible(n, n, W).float() @ told > 0).float()
            same(tokens_reached(windows, n), told[-1].sum(), f"windows {windows}, T = {n}")

# %% tags=["wrong"]
def tokens_reached(windows, T):                            # counts the token itself in each layer
    return T if None in windows else min(T, sum(windows))

# %% tags=["wrong"]
def tokens_reached(windows, T):                            # longer than the text
    return T if None in windows else 1 + sum(W - 1 for W in windows)

# %% tags=["wrong"]
def tokens_reached(windows, T):                            # the widest window alone
    return T if None in windows else min(T, max(windows))

# %% [markdown]
# <details><summary>Hint</summary>
#
# Each layer adds W - 1 tokens. The token itself is known from the start, so no layer adds it. And a text
# of T tokens has no more than T.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def tokens_reached(windows, T):
#     if None in windows:
#         return T
#     return min(T, 1 + sum(W - 1 for W in windows))
# ```
# </details>
#
# ## 8. Real attention maps
#
# The weights of a global and of a local layer on the whole speech, as powers of ten. Everything above the
# diagonal is the future. In the local layer everything before the window is dark too, and what remains
# is the **band**. A text of 64 tokens would show only the upper left corner, where the two masks are
# the same.

# %% tags=["cover"] alt="Two attention maps of 220 by 220 tokens: the global layer fills the lower triangle, the local layer only a band of 64 tokens below the diagonal."
maps = model(ids, output_attentions=True).attentions       # 4 tensors (B, H, T, T)
for axes, layer, head in zip(panels(2, 9, 4.2), (2, 1), (0, 0)):
    title = f"layer {layer}, {config.attention_layers[layer]}, head {head}: log₁₀ of the weight"
    log_weights = maps[layer][0, head].clamp(min=1e-4).log10()         # (T, T)
    matrix(log_weights, title, axes=axes, limits=(-4, 0), bar=True)
assert maps[1][0].masked_select(~visible(T, T, 64)).count_nonzero() == 0

# %% [markdown]
# Bright columns are single tokens that many later ones read. In the local layer, which tokens are they?

# %%
received = maps[1][0, 0].sum(0) / visible(T, T, 64).sum(0)             # mean over a key's readers
most = received[:-20].topk(8).indices.sort().values                    # the last have few readers
print("most read by head 0 of layer 1:", *pieces(ids[0, most]))
found = [piece.strip("' ").lower() for piece in pieces(ids[0, most])]
assert sum(word in ("thou", "thee", "thy") for word in found) >= 6

# %% [markdown]
# Head 0 of layer 1 has learned to look for *thou*, *thee* and *thy*: they are at least six of its eight
# most read tokens.
#
# The mean over all heads and queries shows how the weight depends on the distance. The local layers end
# at distance 63.

# %% alt="Four lines of mean weight over distance, on a log axis: the local layers stop at 63, layer 0 hardly falls beyond 40, layer 2 falls more than tenfold by 120."
by_distance = {}
for n, kind in enumerate(config.attention_layers):
    line = [maps[n][0].diagonal(-d, -2, -1).mean() for d in range(160)]
    by_distance[f"layer {n}, {kind}"] = line
curves(range(160), by_distance, "what trained layers do with their reach",
       "distance, tokens", "mean weight", log="y");

# %% [markdown]
# Layer 0 has more than a third of its weight beyond the window, and layer 2 has less than a fifth there:

# %%
far = [m[0].masked_fill(visible(T, T, 64), 0).sum().item() / (4 * T) for m in maps]
assert far[0] > 1 / 3 and 1 / 10 < far[2] < 1 / 5 and far[1] == far[3] == 0
print("share of the weight beyond the window, by layer:", [round(share, 3) for share in far])

# %% [markdown]
# ## 9. What local attention saves
#
# **Predict**, for T = 2048 and W = 256 as in the official models: how many of the scores of a global
# layer does a local layer need, a half, a quarter or an eighth? And how much of the cache is left when
# every second layer is local?

# %%
lengths = range(64, 2049, 64)
needed = {"global": [int(visible(n, n).sum()) for n in lengths],
          "local, W = 256": [int(visible(n, n, 256).sum()) for n in lengths],
          "computed by naive, either kind": [n * n for n in lengths]}
print("scores of a head at 2048 tokens:", {name: f"{row[-1]:,}" for name, row in needed.items()})
assert needed["global"][-1] == 2_098_176 and needed["local, W = 256"][-1] == 491_648
assert 491_648 / 2_098_176 < 1 / 4

# %% [markdown]
# Less than a quarter. The cache is counted in bytes, on the `meta` device, where it needs no memory:

# %%
neo125 = neo.GPTNeoConfig(hidden_size=768, num_layers=12, num_heads=12,
                          attention_types=[[["global", "local"], 6]])
everything = replace(neo125, attention_types=[[["global"], 12]])
held = {name: [KVCache(c, 1, n, device="meta").nbytes / 1e6 for n in lengths]
        for name, c in {"everything kept": everything, "local layers forget": neo125}.items()}
kept = held["local layers forget"][-1] / held["everything kept"][-1]
print(f"cache at 2048 tokens: {kept:.2%} of everything")
assert round(kept, 2) == 0.56

# %% alt="Left, the number of scores grows with the square of the length, in a local layer with the length; right, the cache grows half as fast after 256 tokens when local layers forget."
left, right = panels(2)
curves(lengths, {name: torch.tensor(row) / 1e6 for name, row in needed.items()},
       "scores of one head of one layer", "tokens", "millions", axes=left)
curves(lengths, held, "KV cache of gpt-neo-125m, float32", "tokens", "MB", axes=right);

# %% [markdown]
# **The definition, `naive`, saves nothing.** It computes all T² scores, in local layers too, and forbids
# most of them afterwards. To save work, code has to know the window. `sdpa` cuts a local layer into
# blocks, the Triton kernel visits only the band (notebook 3), and the cache gives a local layer W slots
# and uses them as a ring.
#
# ### Exercise 1.4 · Slots of the ring
#
# Difficulty 3 of 5 · 15 minutes
#
# `KVCache` puts position p of a local layer into slot p % W. So a new token overwrites the one that no
# later query can read. After `length` tokens, which position lies in each slot? The check fills real
# caches, in one piece and token by token, and compares.

# %% tags=["stub"]
def positions_held(length, W):
    """A list of W positions, one for each slot; -1 where a slot has never been used."""
    ...

# %% tags=["check"]
with exercise("1.4"):
    for W, length in [(4, 1), (4, 3), (4, 4), (4, 5), (4, 7), (4, 8), (64, 100), (64, 300)]:
        for piece in (length, 1):
            cache = KVCache(replace(config, window_size=W), 1, 512)
            for start in range(0, length, piece):          # keys that say where they stand
                p = torch.arange(start, start + piece).float()[:, None].expand(1, 4, -1, 64)
                cache.append(1, p + 1, p + 1)              # layer 1 is local
                cache.advance(piece)
            there = cache.keys[1][0, 0, :, 0] - 1          # -1: a slot never used
            same(positions_held(length, W), there, f"W = {W}, {length} tokens")

# %% tags=["wrong"]
def positions_held(length, W):                             # in order of age, not by slot
    return list(range(max(length - W, 0), length)) + [-1] * max(W - length, 0)

# %% tags=["wrong"]
def positions_held(length, W):                             # never overwrites
    return [s if s < length else -1 for s in range(W)]

# %% tags=["wrong"]
def positions_held(length, W):                             # one token behind
    return [max(length - 2 - (length - 2 - s) % W, -1) for s in range(W)]

# %% [markdown]
# <details><summary>Hint</summary>
#
# Slot s holds the *largest* p below `length` with p % W == s. Go back from the last position,
# `length - 1`, which lies in slot (length - 1) % W.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def positions_held(length, W):
#     last = length - 1
#     return [max(last - (last - s) % W, -1) for s in range(W)]
# ```
# Slot s was written `(last - s) % W` tokens before the last one. Where that is before the start of the
# text, the result is negative: the slot has never been used.
# </details>
#
# ## 10. MLP, head, and a look between the layers
#
# Two smooth functions have the name GELU: the exact one, x Φ(x), and one with a tanh that comes close.
# GPT-Neo was trained with the tanh, and its config says so: `gelu_new`. The curves on the left lie on
# each other, and their difference on the right is below 5 · 10⁻⁴ everywhere.

# %% alt="Left, the two GELU functions lie on each other; right, their difference has four bumps, the largest 4.7 in units of a ten-thousandth."
z = torch.linspace(-5, 5, 2001, dtype=torch.float64)
exact, tanh = ACTIVATIONS["gelu"](z), ACTIVATIONS["gelu_new"](z)
left, right = panels(2)
curves(z, {"exact": exact, "tanh": tanh}, "two functions, one curve", "x", "GELU(x)", axes=left)
gap = tanh - exact
curves(z, {"": gap * 1e4}, "tanh - exact: up to 4.7 · 10⁻⁴", "x", "difference · 10⁴", axes=right)
assert gap.abs().max() < 5e-4
print(f"largest difference {gap.abs().max():.2e} at x = ±{z[gap.abs().argmax()].abs():.2f}")

# %% [markdown]
# The output head is the embedding once more (**tied**): a logit is the product of the final stream with
# a token's own row. Every block *adds* to the same stream, so the head can be applied to the stream
# between any two blocks. This is the **logit lens**: what would the model say if it stopped there?
#
# **Predict:** what does the lens show before block 0, where the stream is a token's embedding and its
# position?

# %%
assert model.lm_head.weight is model.transformer.embed.weight       # tied: one matrix, (V, C)
stages = trace(model, ids)[:5]                                      # into block 0, out of each
logits = torch.cat([model.lm_head(model.transformer.ln_f(s)) for s in stages])
p, best = logits[:, -12:].softmax(-1).max(-1)                       # (5, 12) each
own = (logits[0].argmax(-1) == ids[0]).float().mean().item()
print(f"the embedding of a token gives back the token itself: {own:.0%} of {T} tokens")
assert own > 0.95

# %% [markdown]
# The true next token is the label one further to the right.

# %% alt="A table of words, five stages by twelve tokens: the embeddings give back the token itself, and later stages give guesses at the next one, with colours for the probability."
def bare(row):
    return [piece[1:-1] for piece in pieces(row)]                   # without the quotes
names = ["embeddings", "after block 0", "after block 1", "after block 2", "after block 3"]
lens([bare(row) for row in best], p, bare(ids[0, -12:]), names,
     "the likeliest next token if the model stopped there");

# %% [markdown]
# The embeddings give back the token that was read, with few exceptions, because the head is the embedding
# and a row is most similar to itself. After block 0 the lens shows guesses at the next token, and they
# become better from block to block: the loss of the lens falls.

# %%
targets = ids[0, 1:]
lens_losses = [F.cross_entropy(row[:-1], targets).item() for row in logits]
print("loss of the lens, from stage to stage:", [round(x, 2) for x in lens_losses])
assert lens_losses == sorted(lens_losses, reverse=True)

# %% [markdown]
# ## 11. Check
#
# Is all this the reference's model? With attention as it is defined (`naive`) the logits are equal to
# the last bit, below the window, at it, and far above.

# %%
from transformers import GPTNeoForCausalLM as Reference             # for checks alone
from transformers.utils import logging
logging.disable_progress_bar()
reference = Reference.from_pretrained(FOLDER, attn_implementation="eager", dtype=torch.float32)
reference.eval().requires_grad_(False)
equal = {}
for n in (5, 64, 65, T):
    equal[n] = torch.equal(model(ids[:, :n]).logits, reference(ids[:, :n]).logits)
print("logits equal to the last bit:", equal)
assert all(equal.values())

# %% [markdown]
# Then more **deliberate mistakes**, one at a time. Somebody could have written each of these ports.

# %%
def relative_error(port, n):
    ours, theirs = port(ids[:, :n]).logits, reference(ids[:, :n]).logits
    return ((ours - theirs).norm() / theirs.norm()).item()
print("our model:", relative_error(model, 64), "and", relative_error(model, T))

# %% [markdown]
# **Predict:** which of the mistakes does a test with 64 tokens notice, and which does the loss?

# %%
MISTAKES = {"none": {}, "window 65, not 64": dict(window_size=65),
            "window 63": dict(window_size=63), "exact GELU": dict(activation_function="gelu"),
            "all layers global": dict(attention_types=[[["global"], 4]]),
            "local first": dict(attention_types=[[["local", "global"], 2]])}
for name, changes in MISTAKES.items():
    port = changed(**changes)
    short_error, long_error = relative_error(port, 64), relative_error(port, T)
    loss = port(ids, labels=ids).loss
    print(f"{name:18} relative error at T = 64: {short_error:.1e}   at T = {T}: {long_error:.1e}",
          f"  loss {loss:.3f}")
    assert (short_error == 0) == (name not in ("window 63", "exact GELU"))
    assert abs(loss / before.loss - 1) < 0.01
    assert name == "none" or long_error > 1e-5 and (name != "exact GELU" or long_error < 2e-3)

# %% [markdown]
# At T = 64 three wrong models are right to the bit: **no text shorter than W + 1 can tell a window of W
# from a wider one.** The loss hardly helps, because it changes by less than 1 % in each case. A wrong GELU
# changes the logits by 0.1 %, so a tolerance of 1 % lets it pass. What tells a right port from a wrong one is
# its logits, at more than W tokens, held to equality or to 10⁻⁵. The repair is the same in each case:
# do what the line of `config.json` says.
#
# ## In three sentences
#
# A GPT-Neo is a GPT-2 whose q, k and v have no bias, whose scores are not divided by √D, and whose every
# second layer reads only the last W tokens, itself included. At 2048 tokens such a local layer needs less
# than a quarter of the scores, and its cache has stopped growing, but only code that knows the window
# saves anything. A port with too wide a window gives the right logits for every text of up to W tokens,
# and the loss hardly shows the mistake in longer ones, so compare logits at more than W tokens.
#
# ## Further
#
# This notebook left out dropout (0 when a model is used), training, padded batches (a mask for the padding
# comes on top of the causal one), and how the fast backends avoid the T × T matrix (notebook 3). Next read
# `diff neo.py neox.py` and notebook 2. `tests/test_mistakes.py` makes each classic mistake and shows what
# it costs. Section 2.1 of GPT-3's paper (Brown et al. 2020) mentions “alternating dense and locally banded
# sparse attention”, Child et al. 2019 say where it comes from, and EleutherAI/gpt-neo is the code that
# trained these models, in Mesh TensorFlow.
