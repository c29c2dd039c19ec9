# %% [markdown]
# # 5. Sampling: from logits to text
#
# A language model does not write. It gives a number to every token of its vocabulary, and something else has to
# choose. `sampling.py` does this, and its settings change how the text reads.
#
# **Time** 35 minutes to read, and 85 minutes for the four exercises. **Needs** a CPU and the bundled demo checkpoints; a
# network only for what `official` fetches, which is skipped without one, and transformers for the last section.
# You should know what a logit and a softmax are. Letters and terms: [the words and letters](README.md).
#
# **Objectives.** After this notebook you can
# - read a next-token distribution and say how unsure it is,
# - explain what temperature, top-k, top-p and a repetition penalty do to it, and why their order matters,
# - say what makes two runs equal and what does not,
# - explain what a KV cache saves, and measure it,
# - stream text without ever showing half a character, and score a text longer than the model can see.

# %%
import sys; sys.path[:0] = [".."]                      # the modules lie one folder up
import itertools, math, time
import torch
from attention import KVCache
from sampling import Settings, choose, keep_min_p, keep_top_k, keep_top_p, penalize, stream
from lesson import exercise, official, same, show
from load_weights import AutoModelForCausalLM, AutoTokenizer
from plots import *
from score import likeliest, log_probs, score_text, shown, windows
from training.finetune_shakespeare import acts

# %%
torch.set_num_threads(1)                               # one core: the same numbers at each run
torch.set_grad_enabled(False)
path = "../checkpoints/demo-neo"
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
print(f"{model.num_parameters():,} weights, {len(tokenizer)} tokens")

# %% [markdown]
# The demo model has read Shakespeare's plays, two of them excepted. One of the two is *Macbeth*, so this speech is new to
# it. The speech is our text, and its beginning our prompt. (`ids` are the prompt's tokens, `text` the speech's.)

# %%
speech = """MACBETH.
She should have died hereafter.
There would have been a time for such a word.
To-morrow, and to-morrow, and to-morrow,
Creeps in this petty pace from day to day,
To the last syllable of recorded time;
And all our yesterdays have lighted fools
The way to dusty death. Out, out, brief candle!
Life's but a walking shadow; a poor player,
That struts and frets his hour upon the stage,
And then is heard no more: it is a tale
Told by an idiot, full of sound and fury,
Signifying nothing.
"""
prompt = "MACBETH.\nShe should have died"
ids = tokenizer(prompt, return_tensors="pt").input_ids             # (1, T)
text = tokenizer(speech, return_tensors="pt").input_ids
print(tuple(ids.shape), tuple(text.shape),
      f"{len(speech) / text.size(1):.1f} characters a token")

# %% [markdown]
# ## 1. The distribution
#
# The model gives logits (B, T, V): after every token, a score for each of the V possible next ones. To continue the
# prompt we need the last row only. Its softmax is the *next-token distribution*.
#
# **Predict:** Shakespeare's next word is "hereafter". How much probability will the likeliest single token have,
# and the twenty likeliest together?

# %% alt="Bars of the 20 likeliest tokens after She should have died; the longest is below 0.2, and the shortest are near 0.01."
scores = model(ids).logits[:, -1].float()                          # (1, V)
probs = scores.softmax(-1)[0]                                      # (V,)
top = likeliest(model, tokenizer, prompt, 20)                      # (probability, id, shown text)
bars([token for _, _, token in top], [p for p, _, _ in top],
     "What follows “She should have died”: the 20 likeliest of 2048", "probability")
print(f"first {top[0][0]:.3f}, all twenty {sum(p for p, _, _ in top):.3f}")

# %%
if pythia := official("EleutherAI/pythia-70m"):                    # the list of an official model
    print(*likeliest(*pythia, prompt, 5), sep="\n")

# %% [markdown]
# One number says how unsure that is: the *entropy*, $H = -\sum_i p_i \log_2 p_i$, in bits. $2^H$ is easier to read: the
# model is as unsure as somebody who has to choose among $2^H$ equally likely tokens.

# %%
def entropy(p):
    """Bits; p (..., V) -> (...)."""
    return -torch.special.xlogy(p, p).sum(-1) / math.log(2)        # p log p, and 0 for p = 0

H = entropy(probs)
print(f"{H:.2f} bits, as among {2 ** H:.0f} equal tokens; at most {math.log2(2048):.0f} bits")

# %% [markdown]
# The entropy differs from place to place. Here is the whole speech, each token coloured by how unsure the model
# was before it (dark: unsure; ↵ is a line break; the first token is left out, since nothing stands before it).
#
# **Predict:** where is the model sure?

# %% alt="The speech of Macbeth, each token on a ground of its entropy: the ends of lines are light, most words are dark."
along = model(text).logits[0].float()                              # (T, V), row t predicts t + 1
unsure = entropy(along.softmax(-1))[:-1]                           # (T - 1,)
pieces = [tokenizer.decode([i]) for i in text[0, 1:].tolist()]
coloured_text(pieces, unsure, "How unsure before each token of the speech", "entropy, bits")
ends = unsure[[piece == "\n" for piece in pieces]]
print(f"{unsure.mean():.2f} bits on average, {ends.mean():.2f} before line breaks")
assert ends.mean() < unsure.mean() - 1

# %% [markdown]
# This little model is surer where a line ends than elsewhere.
#
# ## 2. Greedy, and its loops
#
# The simplest choice is always the likeliest token. It needs no randomness and no settings.
#
# **Predict:** what does it write in the long run?

# %%
far = dict(max_new_tokens=300, eos_token_id=None)                  # 300 tokens, whatever they are
greedy = model.generate(ids, **far)                                # (1, T + 300)
print(tokenizer.decode(greedy[0, :200]))
repeated = greedy[0, -60:].unfold(0, 4, 1)                         # runs of four at the end
assert len(repeated.unique(dim=0)) < 0.5 * len(repeated)

# %% [markdown]
# The text falls into loops and still repeats itself at the end. Is the model to blame, or the choice? Let the model
# itself judge three texts. The *surprise* of a token is $-\log_2 p$ bits, where $p$ is the probability that the model gave
# it. (`log_probs` is from `score.py`; section 10.)

# %% alt="Surprise so far over some 150 tokens: the line of the greedy text is the lowest and flattens, the lines of Shakespeare and of the drawn text rise together far above it."
def seeded(n):
    return torch.Generator().manual_seed(n)            # our own random numbers; section 7

drawn = model.generate(ids, do_sample=True, top_k=0, generator=seeded(0), **far)
n = text.size(1) - 1                                               # as far as the speech goes
bits = {"Shakespeare": text, "drawn from the distribution": drawn, "greedy": greedy}
for name, row in bits.items():
    bits[name] = -log_probs(model, row[0])[:n].cumsum(0) / math.log(2)
curves(range(1, n + 1), bits, "Greedy text is far likelier than what people write",
       "tokens", "surprise so far, bits")
print({name: round(line[-1].item() / n, 2) for name, line in bits.items()}, "bits a token")
for seed in range(1, 5):
    row = model.generate(ids, do_sample=True, top_k=0, generator=seeded(seed), **far)[0]
    total = -log_probs(model, row)[:n].sum() / math.log(2)
    print(f"drawn with seed {seed}: {total / n:.2f}")
    assert 0.75 < total / bits["Shakespeare"][-1] < 1.3
assert 2 * bits["greedy"][-1] < bits["Shakespeare"][-1]

# %% [markdown]
# People do not write the likeliest words. Greedy text has less than half the surprise of Shakespeare's, while a text *drawn* from the
# distribution is about as surprising as his, for each of five seeds. This is the reason for sampling. (Holtzman and others
# made this picture famous: *The Curious Case of Neural Text Degeneration*, 2020.)
#
# A cheap repair of greedy is a *repetition penalty*: what already stands in the text, prompt included, becomes
# unlikelier. `penalize` divides a positive score by the penalty and multiplies a negative one by it.

# %%
show(penalize)

# %%
def distinct(ids):
    """The share of runs of four tokens that have not been there before."""
    runs = [tuple(ids[i:i + 4]) for i in range(len(ids) - 3)]
    return len(set(runs)) / len(runs)

new_runs = {}
for penalty in (1.0, 1.2, 1.3):
    new = model.generate(ids, repetition_penalty=penalty, **far)[0, ids.size(1):].tolist()
    new_runs[penalty] = distinct(new)
    print(f"--- penalty {penalty}: {distinct(new):.0%} of the runs of four are new")
    print(tokenizer.decode(new[-60:]), end="\n\n")
assert new_runs[1.0] < new_runs[1.2] <= new_runs[1.3]

# %% [markdown]
# Shown are the ends of the texts. The penalty helps, but it is crude: an id counts once, however often it stands there, and "the" and the full
# stop are penalized as much as "my lord".
#
# ### Exercise 5.1 · A penalty that counts
# Difficulty 2 of 5 · 15 minutes
#
# `penalize` treats an id that stood there once like one that stood there thirty times. Write the *frequency penalty*:
# every occurrence of an id in a row takes `alpha` off that row's score for it. Leave the scores that you were given as they are.

# %% tags=["stub"]
def count_penalty(scores, ids, alpha):
    """scores (B, V), ids (B, T) -> new scores (B, V)"""
    ...

# %% tags=["check"]
with exercise("5.1"):
    given = torch.tensor([[1.0, 2.0, -3.0, 0.0], [1.0, 2.0, -3.0, 0.0]])
    there = torch.tensor([[2, 0, 2], [1, 1, 1]])
    for row, seen, right in (([1.0, 2], [0], [0.5, 2.0]), ([1.0, 2], [0, 0], [0.0, 2.0])):
        case = f"scores [{row}], ids [{seen}], alpha 0.5"
        same(count_penalty(torch.tensor([row]), torch.tensor([seen]), 0.5), [right], case)
    same(count_penalty(given, there, 0.5), [[0.5, 2.0, -4.0, 0.0], [1.0, 0.5, -3.0, 0.0]],
         f"scores {given.tolist()}, ids {there.tolist()}, alpha 0.5")
    same(given[0], [1.0, 2.0, -3.0, 0.0], "the scores that you were given, afterwards")
    same(count_penalty(scores, greedy, 0.0), scores, "alpha = 0")

# %% [markdown]
# <details><summary>Hint</summary>
#
# `scores[row, ids] -= alpha` does not do it: with an index that occurs twice, the last write wins. You need something
# that *adds up* where indices repeat.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def count_penalty(scores, ids, alpha):
#     """scores (B, V), ids (B, T) -> new scores (B, V)"""
#     return scores.scatter_add(1, ids, torch.full(ids.shape, -alpha, dtype=scores.dtype))
# ```
# </details>

# %% tags=["wrong"]
def count_penalty(scores, ids, alpha):
    return scores.scatter(1, ids, scores.gather(1, ids) - alpha)   # once, however often

# %% tags=["wrong"]
def count_penalty(scores, ids, alpha):
    return scores - alpha * torch.bincount(ids.flatten(), minlength=scores.size(1))  # of all rows

# %% tags=["wrong"]
def count_penalty(scores, ids, alpha):
    return scores.scatter_add_(1, ids, torch.full(ids.shape, -alpha))   # in place

# %% [markdown]
# ## 3. Temperature
#
# From here on we draw. All that happens between the scores and the token is `choose`. It goes through the steps that the settings ask for, in
# a fixed order; section 4 explains two of them:

# %%
show(choose, keep_top_k, keep_top_p)

# %% [markdown]
# One step divides the scores by the *temperature*. The odds of two tokens, $p_i/p_j = e^{s_i - s_j}$, are thereby raised
# to the power $1/t$. Below 1 the likely becomes likelier, above 1 all tokens come closer together. The order of the tokens never changes.
#
# **Predict:** what is the entropy as $t \to 0$, and as $t \to \infty$?

# %% alt="Left: probability by rank at temperatures 0.5, 1 and 2, three falling curves of which the coldest is steepest. Right: the entropy rises with temperature from 0 to 11 bits."
ts = torch.logspace(-1.3, 1.3, 40)                                 # 0.05 to 20
three = {f"t = {t}": (scores[0] / t).softmax(-1) for t in (0.5, 1.0, 2.0)}
left, right = panels(2)
by_rank(three, "Temperature tilts the curve", axes=left)
curves(ts, {"entropy": [entropy((scores[0] / t).softmax(-1)) for t in ts]},
       "From certainty to all alike", "temperature", "entropy, bits", right, log="x")
cold = model.generate(ids, do_sample=True, temperature=1e-4, max_new_tokens=40)
assert torch.equal(cold, greedy[:, :cold.size(1)])                 # t → 0 is greedy
low, high = (entropy((scores[0] / t).softmax(-1)) for t in (1e-4, 1e4))
assert low < 1e-3 and high > 11 - 1e-3

# %% [markdown]
# Towards 0 all probability goes to one token (0 bits) and sampling becomes greedy; towards infinity all 2048 tokens become equally likely (11
# bits). Exactly 0 would divide by zero, so it is a case of its own: `do_sample=False` here, `--temperature 0` on the command line.
#
# ## 4. Cutting the tail: top-k and top-p
#
# Each of the many tokens far down the list is very unlikely, but together they are not, and a single wrong token can
# spoil a text. *Top-k* keeps the k likeliest. *Top-p* (nucleus sampling) keeps the smallest set
# that holds probability p. What is left is scaled up to 1 again by the softmax.
#
# Here are the three side by side, on our prompt. In a plot by rank the 2000 thin bars of the tail cannot be seen. So
# the ranks are grouped, each group twice as wide as the one before (1, 2–3, 4–7, …), and a bar is the probability of its
# *whole* group.
#
# **Predict:** how much lies beyond rank 63?

# %% tags=["cover"] alt="Three plots of probability by groups of ranks, the model's in grey and what is drawn from in outline: temperature 0.7 moves it to the low ranks, top-k 20 and top-p 0.9 cut off the tail."
def distribution(scores, temperature=1.0, k=0, p=1.0):
    """What `choose` draws from: (1, V) -> (V,)"""
    left = keep_top_k(scores / temperature, k or scores.size(1))
    return keep_top_p(left, p).softmax(-1)[0]

rank_octaves(probs, {"temperature 0.7 moves it": distribution(scores, temperature=0.7),
                     "top-k 20 cuts at a rank": distribution(scores, k=20),
                     "top-p 0.9 cuts at a probability": distribution(scores, p=0.9)})
beyond = probs.sort(descending=True).values[63:].sum()
print(f"beyond rank 63: {beyond:.2f} of the probability")
assert beyond > 0.1 and probs.sort().values[-64] < 0.01

# %% [markdown]
# The same on the likeliest tokens themselves, for four settings of temperature and p:

# %% alt="Four plots of the 18 likeliest tokens, the model's probability in grey and what is drawn from in blue, for four pairs of temperature and p; each title counts the tokens that are left."
names = [shown(token) for token in tokenizer.convert_ids_to_tokens(range(2048))]
knobs = [(1.0, 0.9), (1.0, 0.5), (0.6, 0.9), (1.5, 0.9)]
candidates(names, probs, {f"t {t}, p {p}": distribution(scores, t, p=p) for t, p in knobs})

# %% [markdown]
# With a slider for each:

# %% tags=["interactive"]
from ipywidgets import interact

def candidates_slider(t=1.0, p=0.9):
    candidates(names, probs, {f"t {t:.1f}, p {p:.2f}": distribution(scores, t, p=p)})

interact(candidates_slider, t=(0.1, 2.0, 0.1), p=(0.05, 1.0, 0.05));

# %% [markdown]
# **A deliberate mistake: dropping the token that crosses p.** “Keep tokens while their sum is at most p” sounds right and is a common way to write it. Try it on our prompt, with smaller and
# smaller p.
#
# **Predict:** how many tokens are kept at p = 0.1?

# %%
def kept(scores):
    """How many tokens of each row are left: (B, V) -> (B,)"""
    return (scores > -math.inf).sum(-1)

def keep_at_most_p(scores, p):
    ranked, order = scores.sort(descending=True)
    drop = ranked.softmax(-1).cumsum(-1) > p                       # the sum with the token itself
    drop = torch.zeros_like(drop).scatter(1, order, drop)          # back in the order of the ids
    return scores.masked_fill(drop, -math.inf)

print({p: kept(keep_at_most_p(scores, p)).item() for p in (0.9, 0.5, 0.1)}, "tokens kept")
print(keep_at_most_p(scores, 0.1).softmax(-1))
empty = kept(keep_at_most_p(along, 0.5)) == 0                      # (T,)
print(f"along the speech {empty.sum()} of {len(empty)} sets are empty at p = 0.5")
assert kept(keep_at_most_p(scores, 0.1)) == 0 and empty.any()

# %% [markdown]
# Nothing is left at p = 0.1: the first token alone is above it. A softmax over nothing is 0/0, and nobody can draw from that.
# Along the speech it happens even at 0.5, wherever one token has more than half of the probability. Where the set is not empty,
# nobody notices the mistake, which is worse: the set holds less than p and lacks its last token.
#
# **The repair:** drop a token if those *before* it already hold p, so that the one that crosses p stays. `keep_top_p` sums from the
# least likely token on, and keeps the same tokens.

# %%
def keep_until_p(scores, p):
    ranked, order = scores.sort(descending=True)
    q = ranked.softmax(-1)
    drop = q.cumsum(-1) - q >= p                                   # the sum without the token
    drop = torch.zeros_like(drop).scatter(1, order, drop)
    return scores.masked_fill(drop, -math.inf)

for p in (0.1, 0.5, 0.9):
    right = kept(keep_top_p(along, p))                             # (T,), the module's
    assert torch.equal(kept(keep_until_p(along, p)), right)
    short = set((right - kept(keep_at_most_p(along, p))).tolist())
    print(f"p = {p}: repaired as large as the module's everywhere, broken short by {short}")
    assert short == {1}

# %% [markdown]
# **k is fixed, p adapts.** How many tokens are reasonable differs from place to place. Count them along the speech.
#
# **Predict:** between which numbers will the size of the top-p set move, at p = 0.9?

# %% alt="Tokens kept along 100 tokens of the speech, on a logarithmic axis: top-p 0.9 moves between 1 and several hundred, top-k 50 is a level line."
sizes = kept(keep_top_p(along, 0.9))                               # (T,)
curves(range(100), {"top-p 0.9": sizes[:100], "top-k 50": [50] * 100},
       "One k is too many here and too few there", "token of the speech", "tokens kept", log="y")
print(f"from {sizes.min()} to {sizes.max()}, the middle one {sizes.median()}")
assert sizes.min() == 1 and sizes.median() > 100
assert (sizes > 100).float().mean() > 0.5

# %% [markdown]
# In some places one token alone holds 0.9, and k = 50 lets 49 others in. In most places it takes more than a hundred, and
# k = 50 leaves half of them out. Note that `generate` samples with `top_k=50` unless told otherwise, as in transformers: `top_k=0` turns it off.
#
# ### Exercise 5.2 · Min-p
# Difficulty 1 of 5 · 10 minutes
#
# *Min-p* (Nguyen and others, 2024) keeps the tokens whose probability is at least `m` times that of the row's likeliest one.
# Where the model is sure, these are few, and elsewhere many. Return the scores, with -inf for all other tokens. (`sampling.py` has
# it as `keep_min_p`, with which the check compares; write yours first.)

# %% tags=["stub"]
def min_p(scores, m):
    """(B, V) -> (B, V)"""
    ...

# %% tags=["check"]
with exercise("5.2"):
    for rows in ([[0.5, 0.3, 0.2]], [[0.4, 0.25, 0.1, 0.25], [0.05, 0.9, 0.03, 0.02]]):
        hand = torch.log(torch.tensor(rows))
        kept_p = [[p if p >= 0.5 * max(row) else 0 for p in row] for row in rows]
        same(min_p(hand, 0.5), torch.tensor(kept_p).log(), f"log of {rows}, m = 0.5", 1e-6)
    for m in (1.0, 0.05, 0.0):
        same(min_p(scores, m), keep_min_p(scores, m), f"the prompt, m = {m}", 1e-6)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Softmax, the row's maximum with `amax(-1, keepdim=True)`, `masked_fill`. (Without a softmax: which difference of two
# scores is a factor of `m`?)
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def min_p(scores, m):
#     """(B, V) -> (B, V)"""
#     p = scores.softmax(-1)
#     return scores.masked_fill(p < m * p.amax(-1, keepdim=True), float("-inf"))
# ```
# </details>

# %% tags=["wrong"]
def min_p(scores, m):
    return scores.masked_fill(scores.softmax(-1) < m, float("-inf"))   # absolute

# %% tags=["wrong"]
def min_p(scores, m):
    p = scores.softmax(-1)
    return scores.masked_fill(p < m * p.max(), float("-inf"))          # the batch's likeliest

# %% tags=["wrong"]
def min_p(scores, m):
    p = scores.softmax(-1)                                             # probabilities, not scores
    return p.masked_fill(p < m * p.amax(-1, keepdim=True), float("-inf"))

# %% [markdown]
# ## 5. Order matters
#
# `choose` applies temperature, then top-k, then top-p, as transformers does. Other programs cut first and apply the temperature afterwards (llama.cpp
# [by default](https://github.com/ggml-org/llama.cpp/blob/b4000/examples/main/README.md)). For
# top-k both give the same set, since temperature keeps the order of the tokens. For top-p they do not.
#
# **Predict:** at temperature 2, is the top-p set larger if the temperature comes first?

# %% alt="Tokens kept against temperature, on a logarithmic axis: a rising curve if the temperature comes first, a level line if top-p comes first; they cross at temperature 1."
ts = torch.linspace(0.3, 2.5, 45)
warm_first = [kept(keep_top_p(scores / t, 0.9)).item() for t in ts]
cut_first = kept(keep_top_p(scores, 0.9)).item()
curves(ts, {"temperature, then top-p (ours)": warm_first,
            "top-p, then temperature": [cut_first] * len(ts)},
       "The same two settings, two different sets", "temperature", "tokens kept", log="y")
at_two = kept(keep_top_p(scores / 2, 0.9)).item()
print(f"at temperature 2: {at_two} tokens if it comes first, {cut_first} if it comes last")
assert at_two > 5 * cut_first
assert torch.equal(keep_top_k(scores / 2, 50), keep_top_k(scores, 50) / 2)     # top-k: the same

# %% [markdown]
# A temperature above 1 flattens the distribution, so that it takes more than five times as many tokens to gather 0.9. A
# high temperature thus lets the tail in, even with a strict top-p. In a program with the other order, the same settings
# mean another distribution.
#
# ## 6. Numerics
#
# `stream` turns the logits into float32 before it does anything else. Half precision (float16) has no number between 0
# and 6e-8, and a softmax has many.
#
# **Predict:** how many of the 2048 tokens get a probability of exactly 0 in float16?

# %% alt="Probability by rank on a logarithmic axis, in float32 and float16: both fall together until 6e-8, where the float16 curve ends."
half = along.half().softmax(-1).float()                            # (T, V), computed in float16
zeros = (half == 0).sum(-1)                                        # (T,)
most = zeros.argmax()
here = tokenizer.decode(text[0, most - 5:most + 1])
by_rank({"float32": along[most].softmax(-1), "float16": half[most]},
        f"After {here!r}: float16 ends at 6e-8", floor=1e-13, log="y")
lost = (along.softmax(-1) * (half == 0)).sum(-1).max()
print(f"the smallest float16 is {2**-24:.1e}; {zeros[most]} zeros here,",
      f"{zeros.float().mean():.0f} at an average place, at most {lost:.1e} together")
assert zeros[most] > 100 and lost < 1e-3
assert ((half == 0).sum() - (along.half().softmax(-1) == 0).sum()) == 0        # and stay 0

# %% [markdown]
# Together these tokens have a probability of less than 0.001, so a short text hides it. But a token of probability 0 can never be drawn, and the
# *logarithm* of that 0, which the score of a text with the token contains, is minus infinity. Converting to float32 after the
# softmax does not bring the numbers back.
#
# **Rows without a token.** Large models have more rows in the output matrix than tokens, since round numbers are faster on GPUs. The rows beyond the
# last token have no text, but the softmax does not know this. Our demo model has none, so we add 128 rows, drawn at random as before training, and print
# their probability together:

# %%
hidden = model.transformer(ids).last_hidden_state[:, -1]           # (1, C)
fresh = 0.02 * torch.randn(128, hidden.size(1), generator=seeded(0))   # rows as before training
padded = torch.cat([scores, hidden @ fresh.T], dim=1)              # (1, V + 128)
print(f"128 rows: {padded.softmax(-1)[0, 2048:].sum():.1%}, text {tokenizer.decode([2050])!r}")
padded[:, len(tokenizer):] = -math.inf                             # what stream's real_vocab does
assert torch.allclose(padded.softmax(-1)[0, :2048], probs, atol=1e-6)
assert tokenizer.decode([2050]) == ""

# %% [markdown]
# Such a row is never the right answer, so training lowers its probability, but a softmax never makes it 0. The command line leaves these rows out.
# `model.generate` keeps them in, to give the reference's text.
#
# ## 7. Seeds
#
# A `torch.Generator` gives a sequence of random numbers. The same seed gives the same sequence, and each draw
# takes the next numbers of it. If you pass your own generator instead of calling `torch.manual_seed`, no other code can draw from it in between.
#
# **Predict:** which of these changes leave the text as it is? Each repeats a run of 100 tokens with one thing changed.
# (bfloat16 numbers take half the memory of float32 and have two or three digits.)

# %%
def sampled(model=model, seed=0, rows=1, **settings):
    out = model.generate(ids.repeat(rows, 1), do_sample=True, max_new_tokens=100,
                         eos_token_id=None, generator=seeded(seed), **settings)
    return out[0, ids.size(1):]                                    # (100,), the first row's

naive = AutoModelForCausalLM.from_pretrained(path, attn_implementation="naive")
coarse = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.bfloat16)
changes = {"nothing": sampled(), "another attention kernel": sampled(naive),
           "bfloat16": sampled(coarse), "top-p 0.99": sampled(top_p=0.99),
           "a second row in the batch": sampled(rows=2), "another seed": sampled(seed=1)}

# %% [markdown]
# How many tokens are the same before the first difference? (`cumprod` turns everything behind the first difference into zeros.)

# %% alt="Bars of the number of tokens, of 100, before the texts differ: 100 if nothing changed, few for another seed or a second row."
first = sampled()
agree = {name: (other == first).int().cumprod(0).sum().item() for name, other in changes.items()}
bars(list(agree), list(agree.values()), "Tokens until the texts part", "tokens of 100")
print(agree)
assert agree["nothing"] == 100 and 1 <= agree["a second row in the batch"] < 100
assert agree["another seed"] < 100

# %% [markdown]
# The same run twice gives the same text, on one machine. A second row takes numbers from the same sequence: the first row's *first* draw
# is as before, and its second is not. Another kernel, dtype, device or number of threads changes the
# last bits of the logits. This has no effect until a draw falls on the edge between two tokens; from there on the texts
# differ. So a seed repeats an experiment on one machine; it does not stand for one text everywhere.
#
# ### Exercise 5.3 · The chance that one of N contains it
# Difficulty 3 of 5 · 20 minutes
#
# One sample proves little. You drew M texts, and `hits[i]` says whether text i has what you look for. What is the chance that
# at least one of N texts (N ≤ M) has it? Estimate it from all M texts: take the average over *all* choices of N among your M,
# as a formula. (Benchmarks of code call it pass@k.) Here are 60 texts to try it on:

# %%
texts = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=20,
                       num_return_sequences=60, generator=seeded(0))
texts = [tokenizer.decode(row) for row in texts]
hits = ["lord" in written for written in texts]
print(f"'lord' is in {sum(hits)} of {len(hits)}; the first two:", texts[0], texts[1], sep="\n\n")

# %% tags=["stub"]
def chance(hits, N):
    """list of M bools, N <= M -> probability that at least one of N has it"""
    ...

# %% tags=["check"]
with exercise("5.3"):
    hand = [[True, False], [True, False, False], [False] * 5, [True] * 4, hits[:8] + [True]]
    for sample in hand:
        for N in range(1, len(sample) + 1):
            every = list(itertools.combinations(sample, N))
            share = sum(any(choice) for choice in every) / len(every)
            same(chance(sample, N), share, f"hits {sample}, N = {N}", 1e-6)
    for N in (1, 5, 20):
        print(f"at least one 'lord' in {N:2} texts: {chance(hits, N):.2f}")

# %% [markdown]
# <details><summary>Hint</summary>
#
# Count the choices of N that contain *no* hit. `math.comb(a, b)` is 0 if b > a. Why not $1 - (1 - c/M)^N$, with c the number
# of hits? It puts each text back before it draws the next, and it is too low on average: a curve that bends, averaged over an uncertain c/M.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def chance(hits, N):
#     """list of M bools, N <= M -> probability that at least one of N has it"""
#     M, c = len(hits), sum(hits)
#     return 1 - math.comb(M - c, N) / math.comb(M, N)
# ```
# </details>

# %% tags=["wrong"]
def chance(hits, N):
    return 1 - (1 - sum(hits) / len(hits)) ** N

# %% tags=["wrong"]
def chance(hits, N):
    return min(1.0, N * sum(hits) / len(hits))

# %% tags=["wrong"]
def chance(hits, N):
    return float(any(hits[:N]))                                        # the first N alone

# %% [markdown]
# ## 8. The KV cache
#
# `stream` is the loop itself. The prompt is read once (*prefill*); then each new token alone is fed back (*decode*),
# and attention finds the keys and values of all earlier tokens in the cache.
#
# Is this the same computation? Read the speech at once (that was `along`), and token by token through a cache:

# %%
cache, steps = KVCache(model.config, 1, text.size(1)), []
for i in range(text.size(1)):
    steps.append(model(text[:, i:i + 1], cache=cache).logits)      # (1, 1, V)
error = (torch.cat(steps, dim=1)[0] - along).abs().max()
print(f"largest difference of {along.numel():,} logits: {error:.1e}")
assert error < 1e-3

# %% [markdown]
# Without a cache the whole text passes through the model again for each new token.
#
# **Predict:** how many multiplications with weights does one more token then take at 500 tokens, compared with a cache? And how much longer does it take?

# %% alt="Numbers multiplied with a weight or with each other, in millions, for one more token: without a cache a line that rises steeply, with a cache one that hardly rises."
def products(n, cached):
    """Multiplications for one more token at the end of n: by weights, and in attention."""
    C, new = model.config.hidden_size, 1 if cached else n          # tokens through the blocks
    weights = sum(p.numel() for p in model.transformer.blocks.parameters())
    keys = [min(n, window or n) for window in windows_of]          # at most, in each layer
    return new * weights + sum(2 * C * new * k for k in keys) + C * model.config.vocab_size

windows_of = [model.config.window_size if kind == "local" else None
              for kind in model.config.attention_layers]
lengths = range(1, 501)
work = {name: [products(n, cached) / 1e6 for n in lengths]
        for name, cached in (("without a cache", False), ("with it", True))}
curves(lengths, work, "One more token", "tokens so far", "million multiplications")
print(f"at 500 tokens {work['without a cache'][-1]:.0f} and {work['with it'][-1]:.1f} million")
assert work["without a cache"][-1] > 200 * work["with it"][-1]
assert work["with it"][-1] < 1.5 * work["with it"][0]

# %% [markdown]
# The picture counts, so it is the same on every machine. A clock gives a smaller factor, since many small steps keep a processor less busy than one large one:

# %%
def seconds(f):
    """The best of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)

row, cache = torch.randint(2048, (1, 500)), KVCache(model.config, 1, 505)
model(row[:, :-1], cache=cache, logits_to_keep=1)                  # what has been read before
factor = seconds(lambda: model(row, logits_to_keep=1)) / seconds(
    lambda: model(row[:, -1:], cache=cache, logits_to_keep=1))
print("slower without a cache, by", "more than 3 times" if factor > 3 else f"{factor:.1f} times")
print(f"the cache of 512 tokens takes {KVCache(model.config, 1, 512).nbytes / 2**20:.2f} MiB")
assert 3 < factor < work["without a cache"][-1] / work["with it"][-1]

# %% [markdown]
# With the cache a token costs nearly the same at any length, since only that token passes through the weights. Without it, the
# whole text passes through again, so a text of n tokens costs the work of about n²/2 tokens. The price is memory. Half
# of GPT-Neo's layers are local, and their queries never look back more than a window, here 64; `KVCache` lets those layers forget.
#
# What remains is reading the weights, and the overhead of many small steps. `fast/step.py` writes the step for one token once more, in a form that
# `torch.compile` turns into a few loops: `model.generate(ids, compile=True)`, or `--compile` on the command line. It needs a C++ compiler and takes some
# seconds to start, so it is not run here.
#
# ## 9. Streaming
#
# `stream` is a generator: it yields each token as soon as it is chosen, and computes no further than it is asked.

# %%
how = dict(do_sample=True, temperature=0.8, top_k=0, top_p=0.9, max_new_tokens=40)
times, start = [], time.perf_counter()
for token in stream(model, ids, settings=Settings.of(model, how), generator=seeded(3)):
    print(tokenizer.decode(token), end="|")
    times.append(1000 * (time.perf_counter() - start))
assert times[0] < times[-1] / 2                                    # long before the last piece

# %% [markdown]
# The first piece appears long before the last. Decoding token by token works as long as each token is whole text. But the tokens of a byte-level tokenizer are *bytes*, and outside ASCII
# a character has two to four bytes.
#
# **Predict:** what does the same loop print for the tokens of “— é!”?

# %%
dash = tokenizer.encode("— é!")
print(len(dash), "tokens:", [shown(token) for token in tokenizer.convert_ids_to_tokens(dash)])
print("one by one: ", [tokenizer.decode([i]) for i in dash])
print("as a stream:", list(tokenizer.stream(dash)))
assert "".join(tokenizer.stream(dash)) == "— é!"

# %% [markdown]
# The mark � (U+FFFD) stands for bytes that are no character. `tokenizer.stream` keeps an unfinished character back until
# its last byte has come. (A *stop text* may begin in one piece and end in another; it needs the same care.)
#
# ## 10. Scoring a text
#
# The model can also be asked how likely a *given* text is. The mean surprise of a token, in nats, is the loss that the model was trained
# on; its exponential is the *perplexity*. The surprise per byte, in bits, compares models with different tokenizers.

# %%
folders = ["../checkpoints/demo-neo", "../checkpoints/demo-neox"]
neo, neox = [score_text(AutoModelForCausalLM.from_pretrained(folder),
                        AutoTokenizer.from_pretrained(folder), speech) for folder in folders]
for folder, s in zip(folders, (neo, neox)):
    print(f"{folder} {s.tokens} tokens, loss {s.loss:.3f}, perplexity {s.perplexity:.1f},",
          f"bits per byte {s.bits_per_byte:.3f}")
print(f"perplexity {neox.perplexity / neo.perplexity - 1:+.0%},",
      f"bits per byte {neox.bits_per_byte / neo.bits_per_byte - 1:+.1%}")
assert abs(neo.loss - model(text, labels=text).loss.item()) < 1e-4
assert 1.05 < neo.bits_per_byte / neox.bits_per_byte < 1.1

# %% [markdown]
# The two tokenizers cut the speech into different tokens, so the perplexities answer different questions. Bits per byte are about
# the same bytes, and there the second model is better by some 7 %. Never compare perplexities across
# tokenizers. Suppose that two models need the same bits per byte, and that the tokens of one are twice as long: at $b$ bits for a short token, its perplexity is $2^b$, and the other's is $2^{2b}$, the square.
#
# A text longer than the model can see has no single forward pass. The model refuses four copies of the speech:

# %%
refused = ""
try:
    model(text.repeat(1, 4))
except ValueError as error:
    print(refused := str(error))
assert refused

# %% [markdown]
# So `score_text` moves a window over the text, by a number of tokens called the *stride*, and scores only the tokens that no
# earlier window has scored. A small stride gives each token more text before it, and costs more passes. For 24 tokens and a window of 8:

# %% alt="Two drawings of windows over 24 tokens. With stride 4 each of five passes reads four tokens again and scores four new ones; with stride 8 three passes score nearly all that they read."
for axes, stride in zip(panels(2, height=2.6, sharex=True), (4, 8)):
    window_rows(windows(24, 8, stride), f"stride {stride}", axes)

# %% [markdown]
# **Predict:** both demo models see 512 tokens at once. How much better is the perplexity of an act of *Macbeth*, some 7000 tokens, at stride 128 than at stride 512?

# %%
all_acts = acts(open("data/macbeth.txt", encoding="utf-8").read())
gained = {}                                                        # (model, act) -> ratio
for folder in folders:
    m, t = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    for act in (2, 5):
        wide, narrow = (score_text(m, t, all_acts[act - 1], stride).perplexity
                        for stride in (512, 128))
        gained[folder[15:], act] = narrow / wide
        print(f"{folder[15:]}, act {act}: {wide:.1f} at stride 512, {narrow:.1f} at stride 128")

# %%
for (name, act), ratio in gained.items():
    print(f"{name}, act {act}: {ratio - 1:+.1%}")
    assert 0.97 < ratio < 1 if name == "demo-neox" else 1 < ratio < 1.04

# %% [markdown]
# The difference is small, 1 to 3 %, and only the GPT-NeoX model gains from the small stride. The GPT-Neo model gets a little *worse*, in both acts. (We have not tested why.)
# So do not take for granted that more context helps, and give a perplexity with its stride. On the command line:
# `python generate.py --score FILE`, and `python generate.py --top 5 "To be, or not to"` for the list of section 1.
#
# ### Exercise 5.4 · Beam search
# Difficulty 4 of 5 · 40 minutes
#
# Greedy takes the likeliest token, not the likeliest *text*. Beam search keeps the `width` likeliest beginnings at every step, extends
# each by every allowed token, and keeps the best `width` of all these. Return them after `steps` steps, best
# first, as pairs (log-probability of the new tokens, list of the new tokens). The check compares with all 8³ continuations.

# %% tags=["stub"]
def beam(model, ids, steps, width, allowed):
    """ids (1, T) -> at most `width` pairs (log-probability, [token, ...]), best first

    allowed: the ids that may be chosen.
    """
    ...

# %% tags=["check"]
with exercise("5.4"):
    allowed = [id for _, id, _ in likeliest(model, tokenizer, prompt, 8)]
    every = torch.cartesian_prod(*[torch.tensor(allowed)] * 3)     # (512, 3)
    rows = torch.cat([ids.expand(512, -1), every], dim=1)          # (512, T + 3)
    logp = model(rows, logits_to_keep=4).logits[:, :3].log_softmax(-1)             # (512, 3, V)
    sums = logp.gather(2, every[..., None])[..., 0].cumsum(1)      # (512, 3)
    table = {}                                                     # beginning -> log-probability
    for tokens, row in zip(every.tolist(), sums.tolist()):
        for n in (1, 2, 3):
            table[tuple(tokens[:n])] = row[n - 1]
    tops = []
    for width in (1, 3, 64):                                       # 1: greedy; 64: all is kept
        best = [()]
        for _ in range(3):
            longer = [tokens + (token,) for tokens in best for token in allowed]
            best = sorted(longer, key=table.get, reverse=True)[:width]
        found = beam(model, ids, 3, width, allowed)
        case = f"3 steps of width {width}"
        assert found is not None, f"{case}: nothing came (None), expected {width} pairs"
        same([tuple(tokens) for _, tokens in found][:3], best[:3], f"{case}, its best texts")
        same([tuple(tokens) for _, tokens in found], best, f"{case}, all texts")
        for score, tokens in found:
            same(score, table[tuple(tokens)], f"{case}, score of {tuple(tokens)}", 1e-3)
        print(f"width {width:2}: {found[0][0]:.2f} {tokenizer.decode(list(found[0][1]))!r}")
        tops.append(table[best[0]])
    assert best[0] == max((t for t in table if len(t) == 3), key=table.get)
    assert tops[0] < tops[-1] and tops == sorted(tops)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Start from `[(0.0, [])]`. All beams have the same length, so one forward pass reads them as a batch. Log-probabilities add up;
# take the log-softmax over the whole vocabulary, and look up the allowed tokens afterwards. Sort over all beams together.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def beam(model, ids, steps, width, allowed):
#     """ids (1, T) -> at most `width` pairs (log-probability, [token, ...]), best first
#
#     allowed: the ids that may be chosen.
#     """
#     beams = [(0.0, [])]
#     for _ in range(steps):
#         rows = torch.stack([torch.cat([ids[0], ids.new_tensor(new)]) for _, new in beams])
#         logp = model(rows, logits_to_keep=1).logits[:, -1].log_softmax(-1)    # (beams, V)
#         grown = []
#         for (score, tokens), row in zip(beams, logp):
#             for token in allowed:
#                 grown.append((score + row[token].item(), tokens + [token]))
#         beams = sorted(grown, reverse=True)[:width]
#     return beams
# ```
#
# The printed scores rise with the width, so greedy (width 1) did not find the likeliest text.
# </details>

# %% tags=["wrong"]
def beam(model, ids, steps, width, allowed):                       # the best one of each beam
    beams = [(0.0, [])]
    for _ in range(steps):
        rows = torch.stack([torch.cat([ids[0], ids.new_tensor(new)]) for _, new in beams])
        logp = model(rows, logits_to_keep=1).logits[:, -1].log_softmax(-1)
        grown = []
        for (score, tokens), row in zip(beams, logp):
            more, token = max((row[token].item(), token) for token in allowed)
            grown.append((score + more, tokens + [token]))
        beams = sorted(grown, reverse=True)[:width]
    return beams

# %% tags=["wrong"]
def beam(model, ids, steps, width, allowed):                       # only the last token counts
    beams = [(0.0, [])]
    for _ in range(steps):
        rows = torch.stack([torch.cat([ids[0], ids.new_tensor(new)]) for _, new in beams])
        logp = model(rows, logits_to_keep=1).logits[:, -1].log_softmax(-1)
        grown = []
        for (score, tokens), row in zip(beams, logp):
            for token in allowed:
                grown.append((row[token].item(), tokens + [token]))
        beams = sorted(grown, reverse=True)[:width]
    return beams

# %% tags=["wrong"]
def beam(model, ids, steps, width, allowed):                       # a softmax of the allowed
    beams = [(0.0, [])]
    for _ in range(steps):
        rows = torch.stack([torch.cat([ids[0], ids.new_tensor(new)]) for _, new in beams])
        logp = model(rows, logits_to_keep=1).logits[:, -1][:, allowed].log_softmax(-1)
        grown = []
        for (score, tokens), row in zip(beams, logp):
            for token, more in zip(allowed, row.tolist()):
                grown.append((score + more, tokens + [token]))
        beams = sorted(grown, reverse=True)[:width]
    return beams

# %% [markdown]
# ## 11. Check against the reference
#
# All of this is what transformers' `generate` does, in the same order, so the same seed must give the same ids, not similar ones:

# %%
import transformers
transformers.utils.logging.disable_progress_bar()
theirs = transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32, attn_implementation="eager").eval()
same = dict(attention_mask=torch.ones_like(ids), max_new_tokens=40, eos_token_id=None,
            pad_token_id=0)

# %%
ways = [dict(), dict(repetition_penalty=1.3), dict(do_sample=True),
        dict(do_sample=True, temperature=0.7, top_k=0, top_p=0.9),
        dict(do_sample=True, temperature=1.5, top_k=30, top_p=0.8, repetition_penalty=1.2,
             num_return_sequences=3)]
for how in ways:
    outs = []
    for one in (naive, theirs):
        torch.manual_seed(11)
        outs.append(one.generate(ids, **same, **how))
    assert torch.equal(*outs), how
    print(f"{outs[0].numel() - ids.size(1) * len(outs[0]):3} new ids equal:", how)

# %% [markdown]
# **What we left out.** Other cuts (typical, eta), and constraints such as a grammar that the text must
# obey would each be one more function between the scores and `multinomial`. Mirostat also keeps a state from token to token. Classifier-free guidance needs a second forward pass for each token,
# without the prompt, whose scores it compares with the first's. In speculative decoding a small model proposes several tokens, and one forward pass of the large model checks them.
#
# ## In three sentences
#
# A model gives a distribution over the next token, and the settings (temperature, top-k, top-p, penalties) change it before one token is drawn, in an order that matters.
# The KV cache turns the work of a whole text for each token into the work of one token, and a seed repeats a text only with the same batch, dtype and machine.
# Perplexity depends on the tokenizer and on the stride, so compare bits per byte, at the same stride.
#
# ## Further
#
# - Holtzman and others, *The Curious Case of Neural Text Degeneration*, 2020: top-p, and the picture of section 2.
# - Nguyen and others, *Turning Up the Heat: Min-p Sampling*, 2024.
# - `sampling.py` from top to bottom, and `tests/test_generate.py`, which holds it against the reference for 500 tokens.
# - Notebook 1 on the layers that may forget, notebook 3 on the kernel, notebook 6 on training.
