# %% [markdown]
# # GPT-Neo and local attention
#
# **Time** 75 minutes, and 45 minutes for the three exercises. **Needs** a CPU; no GPU, no network. You have seen GPT-2's attention once; shapes are named as in notebook 0:
# B batch, T new tokens, S tokens in view, C width, H heads, D width of a head, V vocabulary.
#
# **Objectives.** Afterwards you can
# * follow a token through a GPT-Neo by hand, from its id to the next token's probability, and get the module's own numbers;
# * say what GPT-Neo does that GPT-2 does not: scores without 1/√D, and every second layer local;
# * draw the mask of a local layer, count its window, and compute how far information travels through a stack of them;
# * compute what local attention saves, and say which code saves it;
# * check a port against the reference in a way that notices a wrong window.
#
# The model is `demo-neo`: 4 layers, C = 256, 4 heads of D = 64, window 64, trained on Shakespeare's plays. The file to have open is `neo.py`.

# %%
import sys; sys.path[:0] = [".."]                      # the modules lie one folder up
import inspect, math, torch, torch.nn.functional as F
import neo
from dataclasses import replace
from attention import KVCache, naive, visible
from base import ACTIVATIONS
from compare import trace
from lesson import exercise, official
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
# ## 1 · One text in, one token out
#
# The running example is a speech from *Macbeth*, a play that the model was not trained on. It is longer than three windows, which will matter: **a text
# that fits into the window cannot show what a local layer does.** The third cell shows where we are going: the next token, and some more.

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

# %%
ids = tokenizer(TEXT, return_tensors="pt").input_ids
T = ids.size(1)
assert T > 3 * config.window_size
def pieces(ids):
    return [repr(tokenizer.decode([i])) for i in ids.tolist()]
print(tuple(ids.shape), *pieces(ids[0, :20]))

# %%
best = model(ids).logits[0, -1].softmax(-1).topk(8)
bars(pieces(best.indices), best.values, "after “… There's no such”",
     "probability of the next token")
print(tokenizer.decode(model.generate(ids, max_new_tokens=24)[0, T:].tolist()))

# %% [markdown]
# Nothing was put before the text: the first id is its first token, not an end-of-text mark, unlike what some other families do.
#
# ## 2 · Token and position
#
# Attention by itself does not know order. GPT-Neo, like GPT-2, adds to each token's row of one table (`embed`) the row of its position in another
# (`pos_embed`), which was learned. The picture shows how alike the learned rows are: early ones resemble each other, late ones resemble each other, and the two
# ends of the table point away from each other. Nobody told the model that positions have an order. On both sides of the diagonal you also see thin lines
# parallel to it. Can you think of a reason why positions that are 103 apart should be alike?
#
# **Predict:** the table has P = 512 rows. What happens to a text of 513 tokens?

# %%
embed, pos_embed = model.transformer.embed, model.transformer.pos_embed
x = embed(ids) + pos_embed(torch.arange(T))                # (B, T, C)
print("x", tuple(x.shape))
assert torch.equal(x, model(ids, output_hidden_states=True).hidden_states[0])

# %%
rows = F.normalize(pos_embed.weight, dim=-1)               # (P, C)
alike = rows @ rows.T                                      # (P, P)
matrix(alike, "how alike two positions are (cosine)", "position", "position",
       bar=True, colours="PuOr", limits=(-0.4, 0.4))
assert alike[:50, :50].mean() > 0.1 and alike[-50:, -50:].mean() > 0.1
assert alike[:50, -50:].mean() < -0.1

# %% [markdown]
# The thin lines have nothing to do with language: they are the trace of how this model was trained. `training/texts.py` cuts the plays, 1,702,373 tokens, into
# windows of 512, and each time through the plays it starts at another offset. A token that stood at position p the second time stood at position p + 103 the third time,
# so these two rows of the table were trained on the same tokens. The next cell computes the offsets anew and looks for the strongest lines: each of their distances is
# the difference of two offsets, once around a window of 512.

# %%
from training.texts import epoch_generator
spare = 1_702_373 % 512                                    # tokens that no window needs
offsets = [torch.randint(spare + 1, (), generator=epoch_generator(0, n)).item() for n in range(4)]
explained = {(a - b) % 512 for a in offsets for b in offsets}
print("offsets", offsets)

# %%
by_distance = torch.stack([alike.diagonal(d).mean() for d in range(512)])
around = F.avg_pool1d(by_distance[None], 9, 1, 4)[0]       # of the 9 distances around each
lines = (by_distance - around)[2:-8].topk(4).indices + 2
curves(range(512), {"": by_distance}, "mean of each diagonal", "distance", "cosine")
print("strongest lines at distances", sorted(lines.tolist()))
assert set(lines.tolist()) == {103, 113, 399, 409} <= explained

# %%
try:
    model(torch.zeros(1, 513, dtype=torch.long))
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# There is no row 512, and nothing to make one from: a learned table ends where training ended. (What GPT-NeoX does about it is notebook 2.)
#
# ## 3 · The block
#
# A block reads the **residual stream** x twice and adds to it twice: once what attention found among earlier tokens, once what the MLP makes of
# each token by itself. Each reads x through a LayerNorm (pre-norm), so x itself is never normalised until the end. The next cell prints the module's lines,
# the one after it does them by hand. **Predict:** does the norm of x shrink, stay, or grow from block to block?

# %%
print(inspect.getsource(neo.Block.forward))

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

# %%
parts = {"x, as it comes in": incoming, "added by attention": from_attention,
         "added by the MLP": from_mlp}
norms = {name: [t.norm(dim=-1).mean() for t in tensors] for name, tensors in parts.items()}
axes = curves(range(4), norms, "the stream grows from block to block", "block",
              "norm, mean over tokens", marker="o")
axes.set_xticks(range(4));

# %% [markdown]
# ## 4 · Attention by hand
#
# First so small that you can do it on paper: four tokens, D = 2, a window of 2. Every token asks with a **query** q, is found by a **key** k and, where found, hands over a **value** v.
# The **scores** q · k say how much each token listens to each other one. The mask forbids later tokens and those outside the window. Softmax makes **weights** that sum to 1, and the
# weights mix the values. Take log 3 for 1.0986: then each row of weights is made of quarters, halves and wholes.

# %%
q = torch.tensor([[1., 0], [0, 1], [1, 0], [0, 1]])                # (T, D): what each token asks
k = torch.tensor([[0., 0], [0, 1], [1, 0], [1, 1]]) * math.log(3)  # (T, D): how it is found
v = torch.tensor([[4., 0], [0, 4], [8, 0], [0, 8]])                # (T, D): what it hands over
scores = q @ k.T
print("scores / log 3", (scores / math.log(3)).round().int().tolist())

# %%
weights = scores.masked_fill(~visible(4, 4, 2), -math.inf).softmax(-1)
print("weights", weights.round(decimals=2), sep="\n")
print("weights @ v", (weights @ v).round(decimals=2), sep="\n")
quarters = torch.tensor([[4., 0, 0, 0], [1, 3, 0, 0], [0, 1, 3, 0], [0, 0, 1, 3]]) / 4
torch.testing.assert_close(weights, quarters)              # e⁰ : e^log 3 is 1 : 3

# %% [markdown]
# Now the module itself. `neo.Attention` has three matrices for q, k and v, without a bias, and one, `out_proj`, with a bias, that mixes what the heads have found. Its `forward` is printed
# below. `attention(...)` in it is what you have just done, for all heads at once; its definition is `naive` in `attention.py`, which the second cell prints without its comments.

# %%
print(inspect.getsource(neo.Attention.forward))

# %%
lines = inspect.getsource(naive).split('"""')[2].splitlines()
print(*[line for line in lines if line.strip() and not line.strip().startswith("#")], sep="\n")

# %% [markdown]
# Block 1 is local. Its head 0 in a few lines:

# %%
stream = model(ids, output_hidden_states=True).hidden_states       # into blocks 0 to 3; the end
attn, h = blocks[1].attn, blocks[1].ln_1(stream[1])                # (B, T, C)
q = attn.q_proj(h).view(T, 4, 64)[:, 0]                            # (T, D): head 0 of 4
k = attn.k_proj(h).view(T, 4, 64)[:, 0]
v = attn.v_proj(h).view(T, 4, 64)[:, 0]
print("q, k, v", tuple(q.shape))

# %%
scores = q @ k.T                                                   # (T, T), and no / sqrt(D)
weights = scores.masked_fill(~visible(T, T, 64), -math.inf).softmax(-1)     # (T, T)
y = weights @ v                                                    # (T, D)
print("scores", tuple(scores.shape), " weights", tuple(weights.shape), " y", tuple(y.shape))
torch.testing.assert_close(weights, model(ids, output_attentions=True).attentions[1][0, 0])
print("token", T - 1, "reads", int((weights[-1] > 0).sum()), "tokens;",
      "its weights sum to", round(weights[-1].sum().item(), 6))

# %% [markdown]
# The other three heads do the same with their own 64 of the 256 numbers. What they find is put side by side again, (T, 256), and `out_proj` mixes it. With that the block's
# attention is complete: the last line compares with the module's own output, to the bit.

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
# ## 5 · No 1/√D
#
# Attention as it is taught divides the scores by √D, here 8, so that softmax does not start out saturated. GPT-Neo does not. Its original code folded the factor
# into the *first* values of the query weights, training went on from there, and so the trained weights want scores as they are.
#
# **Predict:** with D = 64, will these scores be within ±3, within ±30, or within ±300? And what does dividing by 8 do to how many tokens a head listens to?

# %%
def scores_of(layer):
    """q · k of every head (H, T, T), and which of them count (T, T)."""
    a, h = blocks[layer].attn, blocks[layer].ln_1(stream[layer])
    q = a.q_proj(h).view(T, 4, 64).transpose(0, 1)         # (H, T, D)
    k = a.k_proj(h).view(T, 4, 64).transpose(0, 1)
    return q @ k.transpose(-2, -1), visible(T, T, a.window)

s, seen = scores_of(2)
print("scores", tuple(s.shape), f" largest |score| {s[:, seen].abs().max():.1f}")

# %%
def entropy(scores, seen):
    """Bits of each row's weights, for the rows from 100 on: (H, T - 100)"""
    p = scores.masked_fill(~seen, -math.inf).softmax(-1)[:, 100:]
    return -(p * p.clamp(min=1e-30).log2()).sum(-1)

print("entropy", tuple(entropy(s, seen).shape))

# %%
left, right = panels(2)
histograms({"q · k, as trained": s[:, seen], "q · k / √D": s[:, seen] / 8},
           "scores of layer 2", "score", bins=[n / 4 for n in range(-64, 29)], axes=left)
histograms({"as trained": entropy(s, seen), "divided by √D": entropy(s / 8, seen)},
           "how widely a query of layer 2 listens", "entropy of its weights, bits",
           bins=[n / 10 for n in range(25, 80)], axes=right);

# %%
print("mean entropy, bits:")
for layer in range(4):
    s, seen = scores_of(layer)
    trained, divided = entropy(s, seen).mean(), entropy(s / 8, seen).mean()
    blind = seen.sum(1)[100:].log2().mean()                # n tokens alike: log2(n) bits
    print(f"  layer {layer}: as trained {trained:.2f}   divided {divided:.2f}",
          f"  every token alike {blind:.2f}")
    assert blind - divided < 0.05

# %%
if found := official("EleutherAI/gpt-neo-125m"):           # the left picture, official model
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
# An entropy of n bits is a choice among 2ⁿ equal candidates. Divided by √D, every layer's entropy is within 0.05 bits of listening to every token alike.
#
# **A deliberate mistake:** add the division, as anyone would who writes attention from memory (scaling q by 1/8 is the same thing), and see what it costs on
# this text. The loss alone does not say whether that is much, so it needs a yardstick: the loss of the same model without any attention.
# **Predict** first: how much of what attention contributes does the division destroy? The cell also repairs the weights.

# %%
before, losses = model(ids, labels=ids), {}
for name, factor in {"as trained": 1, "with 1/√D": 1 / 8, "repaired": 8}.items():
    for block in blocks:
        block.attn.q_proj.weight.mul_(factor)
    losses[name] = model(ids, labels=ids).loss.item()
    print(f"{name:10}   loss {losses[name]:.3f}   {losses[name] / before.loss - 1:+.1%}")
assert torch.equal(model(ids).logits, before.logits)       # 8 = 2³: nothing was rounded

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
# A loss that rises by 4 % looks harmless, but it is two thirds of the way to a model whose tokens do not see each other at all. Such a fault is easily overlooked: the
# text still looks like Shakespeare.
#
# The next cell is about rounding. Scores that are not divided are larger, and larger numbers round more coarsely. That is why GPT-Neo casts q and k up
# to float32 before it multiplies them (`upcast`), even where the model itself is bfloat16; GPT-NeoX, with its scores divided, does not.

# %%
for layer, block in enumerate(blocks):
    a, h, error = block.attn, block.ln_1(stream[layer]), []
    qkv = [proj(h).view(1, T, 4, 64).transpose(1, 2).bfloat16()
           for proj in (a.q_proj, a.k_proj, a.v_proj)]     # (B, H, T, D) each
    truth = naive(*(x.double() for x in qkv), scale=1.0, window=a.window)
    for upcast in (True, False):
        rounded = naive(*qkv, scale=1.0, window=a.window, upcast=upcast)
        error.append((rounded - truth).norm() / truth.norm())
    print(f"layer {layer}, q, k, v in bfloat16: relative error with scores",
          f"in float32 {error[0]:.2e}, in bfloat16 {error[1]:.2e}")

# %% [markdown]
# ## 6 · Who may see whom
#
# One function answers it for every layer, every length and every cache; the next cell prints it (a global layer has no window, W is None). The window **counts the query itself**: W keys in all,
# from i - W + 1 to i. Whoever reads “a window of 4” as “4 tokens before me” builds W + 1. Below are masks of a global and of three local layers, then a slider (it needs a running kernel).
#
# **Predict** for 12 tokens and W = 4: how many squares of the second picture are filled?

# %%
print(inspect.getsource(visible))

# %%
NAMES = {None: "global", 4: "local, W = 4", 5: "local, W = 5: one too many", 1: "local, W = 1"}
for axes, (W, name) in zip(panels(4, 9, 2.6), NAMES.items()):
    mask = visible(12, 12, W)                              # (T, S)
    matrix(mask, f"{name}\n{int(mask.sum())} of 144", axes=axes)
assert visible(12, 12, 4).sum(1).tolist() == [1, 2, 3] + [4] * 9
assert visible(12, 12, 4)[8].nonzero().flatten().tolist() == [5, 6, 7, 8]

# %% tags=["interactive"]
from ipywidgets import interact
@interact(T=(1, 24), W=(1, 24))
def slider(T=24, W=6):                                     # the last T of 24 tokens ask;
    mask = visible(T, 24, W)                               # T = 1 is decoding with a cache
    matrix(mask, f"visible({T}, 24, {W}): {int(mask.sum())} scores")
    plt.show()

# %% [markdown]
# ### Exercise 1.1 · The mask from two triangles
#
# Difficulty ●○○○○, importance ●●○○○, 10 minutes. transformers builds the local mask once as the *exclusive or* `^` of two lower triangles.
# Do the same with two calls of `torch.tril` on a square of ones, without positions and without comparing. Why is it equal?

# %% tags=["stub"]
def two_triangles(T, W):
    """(T, T) bool: visible(T, T, W), by torch.tril and ^."""
    ...

# %% tags=["check"]
with exercise("1.1"):
    for n, W in [(12, 4), (12, 1), (12, 12), (5, 9), (1, 1)]:
        found = two_triangles(n, W)
        assert found.dtype == torch.bool, f"{found.dtype}, not torch.bool"
        assert torch.equal(found, visible(n, n, W)), f"differs at T = {n}, W = {W}"

# %% tags=["wrong"]
def two_triangles(T, W):                                   # the fence-post
    ones = torch.ones(T, T, dtype=torch.bool)
    return torch.tril(ones) ^ torch.tril(ones, -W - 1)

# %% tags=["wrong"]
def two_triangles(T, W):                                   # sees the future
    ones = torch.ones(T, T, dtype=torch.bool)
    return torch.tril(ones, W - 1) ^ torch.tril(ones, -W)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.tril(x, -W)` keeps what lies at least W below the diagonal. The first of these keys, i - W, is the first that the window has *lost*.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def two_triangles(T, W):
#     ones = torch.ones(T, T, dtype=torch.bool)
#     return torch.tril(ones) ^ torch.tril(ones, -W)
# ```
# The second triangle, i - j ≥ W, lies inside the first, i - j ≥ 0. Where one set contains the other, exclusive or is the difference: 0 ≤ i - j < W.
# </details>
#
# ## 7 · How far information travels
#
# A local layer reads W tokens, but what it reads has itself read W tokens one layer below. After n local layers a token can know about
# n (W - 1) + 1 tokens; one global layer, anywhere, makes that everything. In pictures: “j can have told i” after n layers is a product of masks.
#
# That is what a token *can* know. Does the real model agree? The gradient of the last token's output with respect to each earlier embedding is exactly 0
# where nothing can have come from. The second and third cell write this down, the fourth makes all four layers local with W = 16, on the same weights, and
# measures after each layer.
# **Predict:** at which distance does each of the four curves end?

# %%
reach, step = torch.eye(40), visible(40, 40, 6).float()
for n, axes in enumerate(panels(4, 9, 2.6), start=1):
    reach = (step @ reach > 0).float()                     # (40, 40)
    matrix(reach, f"local layers: {n}, W = 6\nreach: {int(reach[-1].sum())} tokens", axes=axes)
    assert reach[-1].sum() == n * 5 + 1

# %%
def changed(**fields):
    """The same weights in another architecture."""
    other = neo.GPTNeoForCausalLM(replace(config, **fields), "naive")
    other.load_state_dict(model.state_dict())
    return other.eval().requires_grad_(False)

short = changed(attention_types=[[["local"], 4]], window_size=16)
print("windows, as trained:", config.windows, "  changed:", short.config.windows)

# %%
def felt(model, ids, layer):
    """How much the last token feels each embedding after so many layers, nearest first: (T,)"""
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

# %%
lines = {f"local layers: {n}, W = 16": felt(short, ids, n) for n in (1, 2, 3, 4)}
drawn = lines | {"as trained, global and local": felt(model, ids, 4)}
curves(range(T), drawn, "each local layer adds 15 tokens of reach; a global one adds all",
       "distance to the last token, tokens", "size of the gradient", log="y",
       axes=panels(1, 9, 3.6)[0])
assert [int((line > 0).sum()) for line in lines.values()] == [16, 31, 46, 61]

# %% [markdown]
# ### Exercise 1.2 · Reach of a stack
#
# Difficulty ●●○○○, importance ●●●○○, 10 minutes. `config.windows` lists for each layer its window, or None for a global one. How many tokens
# (itself included) can the last of T tokens know about after all of them? No loops over tokens: arithmetic.

# %% tags=["stub"]
def tokens_reached(windows, T):
    """windows such as [None, 64] or [4, 4, 4]; T tokens -> a number from 1 to T."""
    ...

# %% tags=["check"]
with exercise("1.2"):
    for windows in ([4], [4, 4, 4], [2, 7], [1, 1], [None, 4], [4, None], [64, 64],
                    config.windows):
        for n in (1, 5, 12, 100):
            told = torch.eye(n)
            for W in windows:
                told = (visible(n, n, W).float() @ told > 0).float()
            reach = int(told[-1].sum())
            assert tokens_reached(windows, n) == reach, f"windows {windows}, T = {n}: {reach}"

# %% tags=["wrong"]
def tokens_reached(windows, T):                            # counts the token itself once a layer
    return T if None in windows else min(T, sum(windows))

# %% tags=["wrong"]
def tokens_reached(windows, T):                            # forgets that the text may be short
    return T if None in windows else 1 + sum(W - 1 for W in windows)

# %% tags=["wrong"]
def tokens_reached(windows, T):                            # the widest layer alone
    return T if None in windows else min(T, max(windows))

# %% [markdown]
# <details><summary>Hint</summary>
#
# One layer adds W - 1 tokens to what is known, none adds the token itself, which is there from the start. And a text of T tokens has no more than T.
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
# ## 8 · Real maps
#
# The weights of a global and of a local layer on the whole speech, as powers of ten. Everything above the diagonal is the future. In the local
# layer everything further back than the window is dark too: the **band**. A text of 64 tokens would show only the upper left corner, where the two
# masks are the same. Bright columns are single tokens that many later ones read; the cell after the picture lists them: this head has learned to look for *thou*, *thee* and *thy*.
# The second picture averages all heads.

# %% tags=["cover"]
maps = model(ids, output_attentions=True).attentions       # 4 tensors (B, H, T, T)
for axes, layer, head in zip(panels(2, 9, 4.2), (2, 1), (0, 0)):
    title = f"layer {layer}, {config.attention_layers[layer]}, head {head}: log₁₀ of the weight"
    log_weights = maps[layer][0, head].clamp(min=1e-4).log10()         # (T, T)
    matrix(log_weights, title, axes=axes, limits=(-4, 0), bar=True)
assert maps[1][0].masked_select(~visible(T, T, 64)).count_nonzero() == 0

# %%
received = maps[1][0, 0].sum(0) / visible(T, T, 64).sum(0)             # mean over a key's readers
most = received[:-20].topk(8).indices.sort().values                    # the last have few readers
print("most read by head 0 of layer 1:", *pieces(ids[0, most]))
found = [piece.strip("' ").lower() for piece in pieces(ids[0, most])]
assert sum(word in ("thou", "thee", "thy") for word in found) >= 6

# %%
by_distance = {}
for n, kind in enumerate(config.attention_layers):
    line = [maps[n][0].diagonal(-d, -2, -1).mean() for d in range(160)]
    by_distance[f"layer {n}, {kind}"] = line
curves(range(160), by_distance, "what trained layers do with their reach",
       "distance, tokens", "mean weight", log="y");

# %%
far = [m[0].masked_fill(visible(T, T, 64), 0).sum().item() / (4 * T) for m in maps]
assert far[0] > 1 / 3 and 1 / 10 < far[2] < 1 / 5 and far[1] == far[3] == 0
print("share of the weight beyond the window, by layer:", [round(share, 3) for share in far])

# %% [markdown]
# The local layers end at distance 63. Layer 0 is close to a mean over everything before it, with more than a third of its weight beyond the window; layer 2
# keeps less than a fifth there.
#
# ## 9 · What local saves
#
# **Predict:** at T = 2048 and W = 256, the official models' numbers, how many of a global layer's scores does a local layer need: a half, a quarter, an eighth?
# And how much of the cache, when every second layer is local?

# %%
lengths = range(64, 2049, 64)
needed = {"global": [int(visible(n, n).sum()) for n in lengths],
          "local, W = 256": [int(visible(n, n, 256).sum()) for n in lengths],
          "computed by naive, either kind": [n * n for n in lengths]}
print("scores of a head at 2048 tokens:", {name: f"{row[-1]:,}" for name, row in needed.items()})

# %%
neo125 = neo.GPTNeoConfig(hidden_size=768, num_layers=12, num_heads=12,
                          attention_types=[[["global", "local"], 6]])
everything = replace(neo125, attention_types=[[["global"], 12]])
held = {name: [KVCache(c, 1, n, device="meta").nbytes / 1e6 for n in lengths]
        for name, c in {"everything kept": everything, "local layers forget": neo125}.items()}
kept = held["local layers forget"][-1] / held["everything kept"][-1]
print(f"cache at 2048 tokens: {kept:.2%} of everything")

# %%
left, right = panels(2)
curves(lengths, {name: torch.tensor(row) / 1e6 for name, row in needed.items()},
       "scores of one head of one layer", "tokens", "millions", axes=left)
curves(lengths, held, "KV cache of gpt-neo-125m, float32", "tokens", "MB", axes=right);

# %% [markdown]
# Said plainly: **the definition, `naive`, saves nothing.** It computes all T² scores and then forbids most of them, local or not. To save work, code has to
# know the window: `sdpa` cuts a local layer into blocks, the Triton kernel walks the band (notebook 3), and the cache gives a local layer W slots
# and uses them as a ring.
#
# ### Exercise 1.3 · Slots of the ring
#
# Difficulty ●●●○○, importance ●●○○○, 15 minutes. `KVCache` puts position p of a local layer into slot p % W, so that a new token overwrites the one that no
# later query can read. After `length` tokens, which position lies in each slot? The check fills real caches, in one piece and token by token, and looks.

# %% tags=["stub"]
def positions_held(length, W):
    """A list of W positions, one for each slot; -1 where a slot has never been used."""
    ...

# %% tags=["check"]
with exercise("1.3"):
    for length in (1, 5, 63, 64, 65, 100, 128, 300):
        for piece in (length, 1):
            cache = KVCache(config, 1, 512)
            for start in range(0, length, piece):          # keys that say where they stand
                p = torch.arange(start, start + piece).float()[:, None].expand(1, 4, -1, 64)
                cache.append(1, p + 1, p + 1)              # layer 1 is local
                cache.advance(piece)
            there = (cache.keys[1][0, 0, :, 0] - 1).int().tolist()     # -1: a slot never used
            found = positions_held(length, 64)
            assert found == there, f"after {length} tokens the ring holds something else"

# %% tags=["wrong"]
def positions_held(length, W):                             # as if the ring were shifted
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
# Slot s holds the *largest* p below `length` with p % W == s. Go back from the last position, `length - 1`, which lies in slot (length - 1) % W.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def positions_held(length, W):
#     last = length - 1
#     return [max(last - (last - s) % W, -1) for s in range(W)]
# ```
# `(last - s) % W` is how many tokens ago slot s was written. Where that is before the text began, the result is negative: never used.
# </details>
#
# ## 10 · MLP, head, and a look between the layers
#
# Two smooth functions go by the name GELU: the exact one, x Φ(x), and a tanh that comes close. GPT-Neo was trained with the tanh, and its config says so:
# `gelu_new`. In the left picture you cannot tell them apart.

# %%
z = torch.linspace(-5, 5, 2001, dtype=torch.float64)
exact, tanh = ACTIVATIONS["gelu"](z), ACTIVATIONS["gelu_new"](z)
left, right = panels(2)
curves(z, {"exact": exact, "tanh": tanh}, "two functions, one curve", "x", "GELU(x)", axes=left)
gap = tanh - exact
curves(z, {"": gap * 1e4}, "tanh - exact: up to 4.7 · 10⁻⁴", "x", "difference · 10⁴", axes=right)
print(f"largest difference {gap.abs().max():.2e} at x = ±{z[gap.abs().argmax()].abs():.2f}")

# %% [markdown]
# The head is the embedding once more: a logit is the product of the final stream with a token's own row. Because every block *adds* to one stream, the
# same head can be held to the stream after any block. This is the **logit lens**: what would the model say if it stopped here?
#
# **Predict:** what does the lens show before block 0, where the stream is a token's own embedding and its position? (The true next token is the label
# one further to the right.)

# %%
assert model.lm_head.weight is model.transformer.embed.weight       # tied: one matrix, (V, C)
stages = trace(model, ids)[:5]                                      # into block 0, out of each

logits = torch.cat([model.lm_head(model.transformer.ln_f(s)) for s in stages])
p, best = logits[:, -12:].softmax(-1).max(-1)                       # (5, 12) each
print("logits", tuple(logits.shape), " best of the last 12 tokens", tuple(best.shape))

# %%
def bare(row):
    return [piece[1:-1] for piece in pieces(row)]                   # without the quotes
names = ["embeddings", "after block 0", "after block 1", "after block 2", "after block 3"]
lens([bare(row) for row in best], p, bare(ids[0, -12:]), names,
     "the likeliest next token, were the model to stop there");


# %% [markdown]
# The embeddings give each token back: the head is the embedding, and a row is most like itself. From block to block that turns into guesses about what
# comes next.
#
# ## 11 · Check
#
# Is all this the reference's model? With attention as it is defined (`naive`), to the last bit, below the window, at it, and far above.
#
# Then more **deliberate mistakes**, one at a time, each a port that somebody could have written. **Predict:** which of them does a test with 64 tokens
# notice, and which does the loss?

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

# %%
def relative_error(port, n):
    ours, theirs = port(ids[:, :n]).logits, reference(ids[:, :n]).logits
    return ((ours - theirs).norm() / theirs.norm()).item()
print("our model:", relative_error(model, 64), "and", relative_error(model, T))

# %%
MISTAKES = {"none": {}, "window 65, not 64": dict(window_size=65),
            "window 63": dict(window_size=63), "exact GELU": dict(activation_function="gelu"),
            "all layers global": dict(attention_types=[[["global"], 4]]),
            "local first": dict(attention_types=[[["local", "global"], 2]])}
for name, changes in MISTAKES.items():
    port = changed(**changes)
    short_error, long_error = relative_error(port, 64), relative_error(port, T)
    print(f"{name:18} relative error at T = 64: {short_error:.1e}   at T = {T}: {long_error:.1e}",
          f"  loss {port(ids, labels=ids).loss:.3f}")
    assert (short_error == 0) == (name not in ("window 63", "exact GELU"))


# %% [markdown]
# At T = 64 three wrong models are right to the bit: **no text shorter than W + 1 can tell a window of W from a wider one**. The loss notices almost nothing, and
# the wrong GELU stays far below a tolerance of 10⁻². Only logits, at more than W tokens, held to equality or to 10⁻⁵, tell a right port from a wrong one. The repair
# is in each case the same: obey the line of `config.json`.
#
# ## What we left out
#
# Dropout (0 when a model is used), training, batches with padding (an attention mask beside the causal one), the official models' sizes, and how the fast
# backends do it without the T × T matrix (notebook 3).
#
# **Further.** `diff neo.py neox.py`, then notebook 2. `tests/test_mistakes.py` plants each classic mistake and shows what it costs. GPT-3's paper (Brown et
# al. 2020, section 2.1) on “alternating dense and locally banded sparse attention”, Child et al. 2019 on where that comes from, and EleutherAI/gpt-neo,
# whose Mesh-TensorFlow code trained these models.
