# %% [markdown]
# # Fine-tuning: a comedy, a history or a tragedy?
#
# A language model has learned to predict the next token. Whoever wants it for something else keeps almost all of it: one small
# layer is put on top, or the training simply goes on with other text. Both are done here, with the loop in full view,
# and the result is held against methods that need no transformer at all.
#
# **Time** 40 minutes, exercises not counted (they are 50 more). **Needs** a CPU, the bundled demo checkpoint, and for the comparisons
# scikit-learn and transformers; a network only for the cell marked *official*. You should know what a gradient is.
#
# **Objectives.** After this notebook you can
# - say what a task head is, which token it reads and why,
# - pad a batch, mask its labels, and name the three mistakes that are made there,
# - write a training loop, cut a batch into pieces without changing the gradient, and read the curves,
# - judge a result: with texts held out properly, simple methods beside it, and an interval,
# - go on training a language model, and keep the result in a format that other programs read.

# %%
import sys; sys.path[:0] = [".."]                      # the modules lie one folder up
import csv, inspect, json, math, tempfile, warnings
import torch, torch.nn.functional as F
import neo, task_heads
from lesson import exercise, official
from load_weights import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from plots import *
from training.finetune_shakespeare import acts, bag_of_words
from training.tasks import evaluating, score_texts
from training.texts import padded, read_examples
torch.set_num_threads(1);                              # one core: the same numbers at each run

# %% [markdown]
# ## 1 · The task
#
# `data/` holds passages of ten lines from Shakespeare's plays, each with the kind of the play it is from. (The kinds are the First Folio's of 1623.)

# %%
KINDS = ["comedy", "history", "tragedy"]
train = read_examples(["data/passages_train.csv"])     # [(text, label, place)]
valid = read_examples(["data/passages_valid.csv"])
for part in (train, valid):
    print({kind: sum(label == kind for _, label, _ in part) for kind in KINDS})
print(*(f"\n--- {label}, from {place}\n{text}" for text, label, place in valid[::80]))

# %% [markdown]
# Can you tell them apart? It is not easy from ten lines. Above all, the names of speakers help, and names are what must not help: a model that
# has seen HAMLET in a tragedy knows the label of any passage with HAMLET. So the held-out passages are from *other plays*.

# %%
plays = {}
for part in ("train", "valid"):
    with open(f"data/passages_{part}.csv", encoding="utf-8", newline="") as file:
        plays[part] = [row["play"] for row in csv.DictReader(file)]
print(len(set(plays["train"])), "plays to learn from;", "held out:", *sorted(set(plays["valid"])))
assert not set(plays["train"]) & set(plays["valid"])

# %% [markdown]
# One more thing must be said before any number: the demo checkpoint was trained on the plain text of all plays but *Macbeth* and *Twelfth
# Night*. It has read four of the six held-out plays, though never with a label.
#
# ## 2 · What a head is
#
# `neo.py` builds the classifier from the backbone and a head of `task_heads.py`:

# %%
print(inspect.getsource(neo.GPTNeoForSequenceClassification))
print(inspect.getsource(task_heads.Head.__init__))
print(inspect.getsource(task_heads.ForSequenceClassification.forward))

# %% [markdown]
# The *backbone* is the model without its output matrix: tokens in, one vector of width C for each token out. The head is one
# matrix from C to the N labels. The checkpoint has no such matrix, so it is drawn at random, and a warning says so.

# %%
tokenizer = AutoTokenizer.from_pretrained("../checkpoints/demo-neo")
def fresh():
    """The demo checkpoint's backbone with a new head; the same at each call."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as said:
        model = AutoModelForSequenceClassification.from_pretrained(
            "../checkpoints/demo-neo", id2label=dict(enumerate(KINDS)),
            pad_token_id=tokenizer.eos_token_id)
    print("warning:", said[0].message)
    return model

# %%
model = fresh()
shape = model.score.weight.shape
print(f"{model.num_parameters():,} weights, the head has {shape.numel()}: {tuple(shape)}")

# %% [markdown]
# ## 3 · A batch
#
# Texts have different lengths and a tensor has one, so the shorter ones are filled up, *padded*. GPT-Neo has no token for that. As everyone does, we take
# `<|endoftext|>` (`pad_token_id=` above). To be quick, we read 96 tokens of each passage at most.

# %%
pad, longest = tokenizer.eos_token_id, 96
def encode(examples):
    return [(tokenizer.encode(text)[:longest], KINDS.index(label)) for text, label, _ in examples]

def collate(rows):
    """[(ids, class id)] -> ids (B, T), mask (B, T), labels (B,); padded on the right."""
    ids, labels = zip(*rows)
    return padded(ids, pad), padded([[1] * len(row) for row in ids], 0), torch.tensor(labels)

# %%
train_rows, valid_rows = encode(train), encode(valid)
lengths = sorted(len(ids) for ids, _ in train_rows)
full = sum(n == longest for n in lengths)
print(f"{lengths[0]} to {lengths[-1]} tokens; {full} of {len(lengths)} fill all {longest}")

# %% [markdown]
# For the next cells we take four short texts, whose padding can be seen.

# %%
lines = ["Tomorrow, and tomorrow, and tomorrow", "If music be the food of love, play on",
         "Once more unto the breach, dear friends, once more", "O, beware, my lord, of jealousy"]
ids, mask, labels = collate(list(zip([tokenizer.encode(line) for line in lines], [2, 0, 1, 2])))
print("ids", tuple(ids.shape), "\n", ids, "\nmask sums", mask.sum(1).tolist())
with evaluating(model, "float32"):
    print("logits", tuple(model(ids, mask).logits.shape))

# %% [markdown]
# ### Which token is read
#
# Attention is causal: a token knows itself and what comes before it. Only the *last* token has seen the whole text, so its vector goes to the head.
# The last real one, that is:

# %%
print(inspect.getsource(task_heads.ForSequenceClassification.last_token))
print(model.last_token(ids).tolist(), "of", ids.size(1), "tokens")

# %% [markdown]
# ### Exercise 6.1 · Where a text ends
# *Difficulty 1/5 · importance ●●●○○ · 8 minutes*
#
# Find the index of each row's last token that is not `pad`, without a model. The padding may be on either side, and the pad id may
# also stand inside a text.

# %% tags=["stub"]
def last_index(ids, pad):
    """ids (B, T) -> (B,)"""
    ...

# %% tags=["check"]
with exercise("6.1"):
    hand = torch.tensor([[5, 6, 7, 9, 9], [9, 9, 5, 6, 7], [5, 9, 6, 7, 9], [5, 6, 7, 8, 4]])
    found = last_index(hand, 9)
    assert found is not None, "nothing came back"
    assert torch.as_tensor(found).tolist() == [2, 4, 3, 4], torch.as_tensor(found).tolist()
    assert torch.as_tensor(last_index(ids, pad)).tolist() == model.last_token(ids).tolist()

# %% [markdown]
# <details><summary>Hint</summary>
#
# Give every real token its own index as a score and every pad the score 0. Where is the largest?
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def last_index(ids, pad):
#     """ids (B, T) -> (B,)"""
#     return (torch.arange(ids.size(1)) * (ids != pad)).argmax(-1)
# ```
# </details>

# %% tags=["wrong"]
def last_index(ids, pad):
    return (ids != pad).sum(1) - 1                                 # right padding alone

# %% tags=["wrong"]
def last_index(ids, pad):
    return (ids == pad).int().argmax(1) - 1                        # the first pad, wherever it is

# %% [markdown]
# ## 4 · A fresh head knows nothing
#
# The loss is the cross entropy: $-\log p$ of the right label, averaged over the texts.
#
# **Predict:** what is it for three labels and a head that was drawn at random?

# %%
def evaluate(model, rows):
    """Mean loss, and the predicted class ids (texts,)."""
    nats, found = 0.0, []
    with evaluating(model, "float32"):
        for i in range(0, len(rows), 24):
            ids, mask, labels = collate(rows[i:i + 24])
            out = model(ids, mask, labels=labels)
            nats, found = nats + out.loss.item() * len(labels), found + [out.logits.argmax(-1)]
    return nats / len(rows), torch.cat(found)

def tally(found):
    """How often each kind was answered."""
    return dict(zip(KINDS, found.bincount(minlength=3).tolist()))

# %%
start, guesses = evaluate(model, valid_rows[::4])
print(f"loss {start:.3f}; ln 3 = {math.log(3):.3f}; answers {tally(guesses)}")
assert abs(start - math.log(3)) < 0.15

# %% [markdown]
# Small weights give small logits, hence three probabilities near 1/3, and $-\log(1/3) = \ln 3$. Look at this number at the start of every
# training: a first loss far from it says that something is wrong before any learning has begun.
#
# ## 5 · The head alone
#
# First we leave the backbone as it is (*frozen*). Then its output never changes, so it is computed once for all passages, and what remains to be trained is
# logistic regression on 256 numbers.

# %%
def states(rows):
    """The frozen backbone's output for each token (texts, longest, C), with ids and labels."""
    with evaluating(model, "float32"):
        ids, mask, labels = collate(rows)
        parts = [model.transformer(*part) for part in zip(ids.split(24), mask.split(24))]
    return torch.cat([part.last_hidden_state for part in parts]), ids, labels

# %%
x, train_ids, y = states(train_rows)
x_valid, valid_ids, y_valid = states(valid_rows)
print("train", tuple(x.shape), "valid", tuple(x_valid.shape))

# %% [markdown]
# Pooling is now a matter of indexing. And here is a training loop, all of it. *AdamW* is gradient descent that scales each
# weight's step by the size of its recent gradients; `weight_decay` pulls weights towards 0.

# %%
def last(x, ids):
    return x[torch.arange(len(x)), model.last_token(ids)]          # (texts, T, C) -> (texts, C)

def accuracy(found, labels):
    return (found == labels).float().mean().item()

pooled, pooled_valid = last(x, train_ids), last(x_valid, valid_ids)
print(tuple(pooled.shape), tuple(pooled_valid.shape))

# %%
def train_head(x, x_valid, lr=3e-3, steps=150):
    """A head (N, C) trained on pooled states; loss and accuracy (steps, 2 parts, 2 numbers)."""
    torch.manual_seed(0)
    head, history = torch.nn.Linear(x.size(1), len(KINDS), bias=False), []
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        F.cross_entropy(head(x), y).backward()                     # gradients
        optimizer.step()                                           # new weights
        optimizer.zero_grad()                                      # or they would add up
        with torch.no_grad():
            history.append([(F.cross_entropy(z, t).item(), accuracy(z.argmax(-1), t))
                            for z, t in ((head(x), y), (head(x_valid), y_valid))])
    return head, torch.tensor(history)

# %% [markdown]
# **Predict:** which of the two losses falls to the end, and which does not?

# %%
def draw_both(part, title="", unit="loss, nats", axes=None):
    named = dict(zip(("training plays", "other plays"), part.T))
    return curves(range(1, len(part) + 1), named, title, "step", unit, axes)

_, history = train_head(pooled, pooled_valid, steps=600)
left, right = panels(2)
draw_both(history[..., 0], "The loss on other plays turns", axes=left)
draw_both(history[..., 1], "Overfitting", "accuracy", right);

# %%
seen, unseen = history[-1, :, 1].tolist()
print(f"lowest held-out loss at step {history[:, 1, 0].argmin() + 1}; "
      f"at the end accuracy {seen:.2f} on training plays, {unseen:.2f} on others")
assert history[-1, 1, 0] > history[:, 1, 0].min() + 0.02 and seen > unseen + 0.1

# %% [markdown]
# That is *overfitting*: the head goes on to learn what is peculiar to the training passages. One may stop early. But whoever chooses the stopping step by
# the lowest point of the held-out curve has used these plays to choose, and their score is then a little too good. We choose nothing that way: 150 steps were fixed first, and a
# careful study would keep a third set of plays.
#
# The most important setting is the learning rate. (If you can run this, there is a slider below the picture.)

# %%
words = {1e-4: "too small", 3e-3: "fair", 1.0: "too large"}
for axes, rate in zip(panels(3, height=3.0), words):
    _, h = train_head(pooled, pooled_valid, rate)
    draw_both(h[..., 0], f"rate {rate:g}: {words[rate]}", axes=axes)
head, history = train_head(pooled, pooled_valid)       # the fair one, for what follows

# %% tags=["interactive"]
from ipywidgets import interact

def look(log_rate=-2.5):
    _, h = train_head(pooled, pooled_valid, 10**log_rate)
    draw_both(h[..., 0], f"rate {10**log_rate:.2g}").set_ylim(0, 2)
    plt.show()

interact(look, log_rate=(-4.5, 0.0, 0.25));

# %% [markdown]
# ### A deliberate mistake: the last column
#
# `x[:, -1]` looks like the last token and is shorter to write. In a batch padded on the right it is the padding of every row but the longest.

# %%
short, found = valid_ids[:, -1] == pad, {}                         # rows with padding
for name, part in (("last real token", pooled_valid), ("last column", x_valid[:, -1])):
    right = head(part).argmax(-1) == y_valid
    found[name] = [right[some].float().mean() for some in (short, ~short)]
    print(f"{name}: accuracy {found[name][0]:.2f} on {int(short.sum())} padded texts, "
          f"{found[name][1]:.2f} on the others")
assert found["last column"][0] < found["last real token"][0]

# %% [markdown]
# Nothing fails, and no error is shown; few texts have padding here, so even the accuracy of the whole hardly moves. A pad's vector is not noise:
# it stands behind the text and attends to it. But now a text's logits depend on its neighbours in the batch:

# %%
naive = fresh()
naive.set_attn_implementation("naive")
alone, _, _ = collate([(tokenizer.encode(lines[0]), 2)])
with evaluating(naive, "float32"):
    outs = naive.transformer(alone), naive.transformer(ids, mask)
    broken = [naive.score(out.last_hidden_state[0, -1]) for out in outs]
    repaired = [naive(alone).logits[0], naive(ids, mask).logits[0]]
# %%
for name, (one, many) in (("last column", broken), ("last real token", repaired)):
    print(f"{name}\n  alone {one.tolist()}\n  batch {many.tolist()}")
assert torch.allclose(*repaired, atol=1e-5) and not torch.allclose(*broken, atol=1e-2)

# %% [markdown]
# **The repair** is `last_token`, above. (Its last digits differ by rounding: matrices of other shapes are summed in another order.) Padding on the
# left makes the last column real, but GPT-Neo has learned its positions, and they must then count from the text's first token:

# %%
left_ids = torch.stack([row.roll(int((row == pad).sum())) for row in ids])    # pads first
left_mask = (left_ids != pad).long()
positions = (left_mask.cumsum(1) - 1).clamp(min=0)

# %%
with evaluating(naive, "float32"):
    expected = naive(ids, mask).logits
    for name, where in (("from the first column", None), ("from the first token", positions)):
        off = (naive(left_ids, left_mask, where).logits - expected).abs().max()
        print(f"positions counted {name}: logits differ by up to {off:.1e}")
assert off < 1e-5

# %% [markdown]
# ### Exercise 6.2 · The mean of all tokens
# *Difficulty 3/5 · importance ●●●○○ · 15 minutes*
#
# Is the last token the best one to read? Average the vectors of all *real* tokens instead. The check trains a head on your pooling.

# %% tags=["stub"]
def mean_pool(x, mask):
    """x (B, T, C), mask (B, T) of ones and zeros -> (B, C)"""
    ...

# %% tags=["check"]
with exercise("6.2"):
    h = torch.tensor([[[1.0, 2], [3, 4], [50, 60]], [[1, 0], [2, 0], [6, 3]]])
    found = mean_pool(h, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert found is not None, "nothing came back"
    assert found.tolist() == [[2.0, 3.0], [3.0, 1.0]], found.tolist()
    masks = [(part != pad).long() for part in (train_ids, valid_ids)]
    _, h = train_head(mean_pool(x, masks[0]), mean_pool(x_valid, masks[1]))
    print(f"held-out accuracy {h[-1, 1, 1]:.2f} with the mean, {history[-1, 1, 1]:.2f} without")
    assert h[-1, 1, 1] > history[-1, 1, 1]

# %% [markdown]
# <details><summary>Hint</summary>
#
# Multiply by the mask (it needs one more dimension), sum over tokens, and divide by the number of real tokens, not by T.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def mean_pool(x, mask):
#     """x (B, T, C), mask (B, T) of ones and zeros -> (B, C)"""
#     return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
# ```
#
# With a frozen backbone it is better. The last token was trained to predict the next word, not to sum up the text; the mean
# collects many weak hints. When the backbone is trained as well, it can learn to bring them to the last token.
# </details>

# %% tags=["wrong"]
def mean_pool(x, mask):
    return x.mean(1)                                               # padding counts

# %% tags=["wrong"]
def mean_pool(x, mask):
    return (x * mask[..., None]).sum(1) / x.size(1)                # divided by T

# %% [markdown]
# ## 6 · All weights
#
# Now the backbone learns too. A step costs a whole forward and backward pass, so we take few. Three things are new in the loop: a *batch* is a
# random part of the texts; the learning rate begins small (*warm-up*) and ends at 0; and the gradient is *clipped*: if its norm is
# above 1, it is scaled down to 1, so that one odd batch cannot throw the weights far.

# %%
def finetune(model, batches, lr):
    """One step for each batch (ids, mask, labels); -> its losses and gradient norms."""
    optimizer, log = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01), []
    model.train()                                                  # dropout on
    for step, (ids, mask, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 6, 1 - step / len(batches))
        loss = model(ids, mask, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append((loss.item(), norm.item()))
    model.eval()
    return torch.tensor(log)

# %%
order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(0)).tolist()
batches = [collate([train_rows[i] for i in order[k:k + 16]]) for k in range(0, len(order), 16)]
print(len(batches), "batches; the first", tuple(batches[0][0].shape), batches[0][2].tolist())
log = finetune(model, batches, 3e-4)                               # one epoch: each passage once

# %%
smooth = log.unfold(0, 8, 1).mean(-1)
left, right = panels(2)
curves(range(len(log)), {"each step": log[:, 0]}, "One epoch", "step", "loss, nats", left)
left.plot(range(4, 4 + len(smooth)), smooth[:, 0].tolist(), color=RED, label="mean of 8")
level(left, math.log(3), "ln 3", 26)
curves(range(len(log)), {"norm": log[:, 1]}, "Gradient before clipping", "step", "norm", right)
level(right, 1.0, "clipped above", 0)
left.legend(loc="lower left")
print(f"{int((log[:, 1] > 1).sum())} of {len(log)} steps were clipped")

# %% [markdown]
# A batch of 16 is a rough sample (the last one even has only 8 texts), so the loss of a single step says little; the mean of several shows the
# course. Note the clipping: where every step is clipped, it is no longer a guard against odd batches. It scales all gradients alike to norm 1, and AdamW divides by
# their size anyhow.
#
# **Predict:** is the result better than the head alone?

# %%
tuned_loss, tuned = evaluate(model, valid_rows)
_, tuned_train = evaluate(model, train_rows[::5])
print(f"other plays, head alone:  loss {history[-1, 1, 0]:.3f}, accuracy {history[-1, 1, 1]:.2f}")
print(f"other plays, all weights: loss {tuned_loss:.3f}, accuracy {accuracy(tuned, y_valid):.2f}")
print(f"training passages (every fifth): accuracy {accuracy(tuned_train, y[::5]):.2f}")
assert tuned_loss < history[-1, 1, 0]

# %% [markdown]
# ## 7 · A batch in pieces
#
# If a batch does not fit into memory, it is cut up: the gradients of the pieces add up until `optimizer.step()` (*gradient accumulation*). The sum must be the
# gradient of the whole batch's mean loss. Averaging the means of the pieces is right only when all pieces score equally many. We cut 5 texts into 3 and 2:

# %%
def gradient(pieces, shares):
    """The gradient of all weights as one vector; each piece's loss counts by its share."""
    model.zero_grad()
    for (ids, mask, labels), share in zip(pieces, shares):
        (model(ids, mask, labels=labels).loss * share).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])

# %%
five = train_rows[:5]
cut = [collate(five[:3]), collate(five[3:])]
whole = gradient([collate(five)], [1])
for shares in (1 / 2, 1 / 2), (3 / 5, 2 / 5):
    off = (gradient(cut, shares) - whole).norm() / whole.norm()
    print(f"shares {shares}: relative difference {off:.1e}")
assert off < 1e-4
model.zero_grad()

# %% [markdown]
# The rest is rounding: sums in another order. For a language model the "size" is the number of tokens that are *scored*, which is another
# in every piece (section 10). transformers itself had that wrong until October 2024.
#
# ### Exercise 6.3 · Loss of the whole from the pieces
# *Difficulty 2/5 · importance ●●●●○ · 10 minutes*
#
# Each piece comes as a pair: its mean loss, and how many labels it scored. Return the mean loss of the whole batch. A piece in which nothing is
# scored has the mean of nothing, which is NaN; it must not spoil the rest.

# %% tags=["stub"]
def whole_loss(pieces):
    """[(mean loss, number scored), ...] -> float"""
    ...

# %% tags=["check"]
with exercise("6.3"):
    z = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 1, -100, 2, 1, -100, -100])
    pieces = [(F.cross_entropy(a, b).item(), (b != -100).sum().item())
              for a, b in zip(z.split([2, 3, 2]), t.split([2, 3, 2]))]
    found = whole_loss(pieces)
    assert found is not None, "nothing came back"
    assert not math.isnan(whole_loss(pieces)), "NaN: the last piece scores nothing"
    assert abs(found - F.cross_entropy(z, t).item()) < 1e-6
    assert abs(whole_loss([(1.0, 1), (4.0, 3)]) - 3.25) < 1e-9

# %% [markdown]
# <details><summary>Hint</summary>
#
# A mean times its number is a sum. Sums add up. Leave out pieces with number 0: NaN times 0 is NaN.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def whole_loss(pieces):
#     """[(mean loss, number scored), ...] -> float"""
#     return sum(loss * n for loss, n in pieces if n) / sum(n for _, n in pieces)
# ```
# </details>

# %% tags=["wrong"]
def whole_loss(pieces):
    return sum(loss for loss, n in pieces if n) / sum(n > 0 for _, n in pieces)      # the mean of means

# %% tags=["wrong"]
def whole_loss(pieces):
    return sum(loss * n for loss, n in pieces) / sum(n for _, n in pieces)           # NaN * 0

# %% [markdown]
# ## 8 · How good is it?
#
# A number alone says nothing. Beside it belong the simplest answer (always the same kind) and a method from before transformers: *bag of words*, which counts
# words, weighs down the common ones (tf-idf), and leaves the rest to logistic regression. It reads the same 96 tokens. How strongly its weights are held down (C) is
# chosen on training plays left out in turn, so it gets more care than our own training had.

# %%
texts, texts_valid = ([tokenizer.decode(i) for i, _ in rows] for rows in (train_rows, valid_rows))
said = bag_of_words([*zip(texts, (label for _, label, _ in train), plays["train"])], texts_valid)
words = torch.tensor([KINDS.index(label) for label in said])
print(f"accuracy {accuracy(words, y_valid):.2f} on other plays")

# %% [markdown]
# 240 texts are few. With accuracy $p$ on $n$ texts, another draw of texts would give another value; 95 % of such draws lie within about $1.96\sqrt{p(1-p)/n}$.

# %% tags=["cover"]
answers = {"always comedy": torch.zeros_like(y_valid), "bag of words": words,
           "head alone": head(pooled_valid).argmax(-1), "all weights": tuned}
rates = {name: accuracy(found, y_valid) for name, found in answers.items()}
margins = {name: 1.96 * math.sqrt(p * (1 - p) / len(y_valid)) for name, p in rates.items()}
rates_with_margins(rates, margins, "Held-out plays, 95 % intervals", "accuracy")
print({name: f"{rates[name]:.2f} ± {margins[name]:.2f}" for name in rates})
assert min(rates["head alone"], rates["all weights"]) > max(1 / 3 + 0.1, rates["bag of words"])

# %% [markdown]
# Both uses of the backbone are far above chance, and ahead of the bag of words, if not by much. But read it with care: the intervals of the last two overlap widely, so their order may be
# chance. One epoch on 600 passages has not made training all weights worth its cost, as far as accuracy goes; its *loss* above is lower, so its probabilities are better.
# And the interval counts passages as if they were drawn one
# by one; but they come from six plays, and plays differ:

# %%
names = sorted(set(plays["valid"]), key=plays["valid"].index)
of = {play: torch.tensor([p == play for p in plays["valid"]]) for play in names}
by_play = {name: [accuracy(found[of[play]], y_valid[of[play]]) for play in names]
           for name, found in answers.items() if name != "always comedy"}
grouped(names, by_play, "Accuracy by play (40 passages each)", "accuracy")
print({name: f"{min(values):.2f} to {max(values):.2f}" for name, values in by_play.items()})

# %% [markdown]
# Six plays are a small sample of plays, whatever the number of passages. Which kinds are taken for which? The *confusion matrix* counts:

# %%
for axes, name in zip(panels(3, 9.4, 3.5), by_play):
    counts = (3 * y_valid + answers[name]).bincount(minlength=9).view(3, 3)
    confusion(counts, KINDS, name, axes)
    print(name, tally(answers[name]))
assert max(tally(tuned), key=tally(tuned).get) == "comedy"

# %% [markdown]
# A row is a kind of play, a column an answer. The model with all weights trained says "comedy" most often, to tragedies as well: that explains its two
# excellent plays and its two worst. Accuracy alone would have hidden it.

# %% [markdown]
# ### Exercise 6.4 · Always the commonest, with a bootstrap
# *Difficulty 2/5 · importance ●●●○○ · 15 minutes*
#
# Always answer the label that is commonest *in training*. Return the accuracy on the held-out labels and a 95 % *bootstrap* interval: draw as many held-out texts with replacement,
# note the accuracy, do it `draws` times, and take the 2.5 % and 97.5 % quantiles.

# %% tags=["stub"]
def commonest(labels, labels_valid, draws=2000):
    """class ids (n,), (m,) -> (accuracy, low, high)"""
    ...

# %% tags=["check"]
with exercise("6.4"):
    given = torch.tensor([0] * 30 + [1] * 40 + [2] * 30)
    found = commonest(given, torch.tensor([0] * 60 + [1] * 100 + [2] * 240))
    assert found is not None, "nothing came back"
    middle, low, high = (float(v) for v in found)
    margin = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert abs(middle - 0.25) < 1e-6, f"accuracy {middle}: the commonest in training is 1"
    close = abs(0.25 - margin - low) < 0.012 and abs(0.25 + margin - high) < 0.012
    assert close, f"{low:.3f} to {high:.3f}; the formula says 0.25 ± {margin:.3f}"

# %% [markdown]
# <details><summary>Hint</summary>
#
# `labels.bincount().argmax()` is the commonest. `torch.randint(m, (draws, m))` are the indices of all draws at once.
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def commonest(labels, labels_valid, draws=2000):
#     """class ids (n,), (m,) -> (accuracy, low, high)"""
#     right = (labels_valid == labels.bincount().argmax()).float()                     # (m,)
#     means = right[torch.randint(len(right), (draws, len(right)))].mean(1)            # (draws,)
#     return right.mean(), means.quantile(0.025), means.quantile(0.975)
# ```
# </details>

# %% tags=["wrong"]
def commonest(labels, labels_valid, draws=2000):
    right = (labels_valid == labels_valid.bincount().argmax()).float()               # the held-out set's own commonest
    means = right[torch.randint(len(right), (draws, len(right)))].mean(1)
    return right.mean(), means.quantile(0.025), means.quantile(0.975)

# %% tags=["wrong"]
def commonest(labels, labels_valid, draws=2000):
    right = (labels_valid == labels.bincount().argmax()).float()
    means = torch.stack([right[torch.randperm(len(right))].mean() for _ in range(draws)])   # without replacement: no spread
    return right.mean(), means.quantile(0.025), means.quantile(0.975)

# %% [markdown]
# ## 9 · What it looks at
#
# The head was trained on last tokens, but nothing keeps us from applying it to *every* token: what would the model say if the text ended
# here? (One pass is enough, since a token does not know what follows.) The passage is the first of *Macbeth* that has 96 tokens and comes out as a tragedy; the backbone has never read it.

# %%
chosen = next(i for i, play in enumerate(plays["valid"])
              if play == "macbeth" and tuned[i] == 2 and len(valid_rows[i][0]) == longest)
row = torch.tensor([valid_rows[chosen][0]])                        # (1, T)
with evaluating(model, "float32"):
    p = model.score(model.transformer(row).last_hidden_state)[0].softmax(-1)      # (T, 3)
    assert torch.allclose(p[-1], model(row).logits[0].softmax(-1), atol=1e-5)

# %%
pieces = [tokenizer.decode([i]) for i in row[0].tolist()]
coloured_text(pieces, p[:, 2].tolist(), "If the text ended here: tragedy?", "probability");

# %%
curves(range(1, len(p) + 1), dict(zip(KINDS, p.T)), "One passage, an answer after each token",
       "tokens read", "probability", panels(1)[0]).set_ylim(0, 1);

# %%
jumps = p.diff(dim=0)                                               # (T - 1, 3)
for place in jumps.abs().flatten().topk(6).indices.tolist():
    i, kind = divmod(place, 3)
    before = "".join(pieces[max(0, i - 5):i + 1])
    print(f"{jumps[i, kind]:+.2f} {KINDS[kind]} at {pieces[i + 1]!r}, after {before!r}")

# %% [markdown]
# The answer does not settle: it goes up and down with the words, and was trained at the ends only. The largest jumps listed here are at ends of lines.
# Does the model go by verse and prose? This picture shows what its output *follows*, not why. To know more one must change something and look again:
# the same words, every line break made a space.

# %%
some = valid[::3]
flat_rows = encode([(text.replace("\n", " "), label, place) for text, label, place in some])
_, flat = evaluate(model, flat_rows)
for name, found in (("as printed", tuned[::3]), ("without line breaks", flat)):
    print(f"{name}: {tally(found)}, accuracy {accuracy(found, y_valid[::3]):.2f}")
print(f"{int((flat != tuned[::3]).sum())} of {len(flat)} answers changed")
assert (flat == 0).sum() > (tuned[::3] == 0).sum() + 10

# %%
for kind in KINDS:
    printed = "\n".join(text for text, label, _ in train if label == kind).split("\n")
    n = [len(line) for line in printed if line]
    share = sum(k > 55 for k in n) / len(n)
    print(f"{kind}: {share:.0%} of the lines have more than 55 characters")

# %% [markdown]
# Almost everything is a comedy now, and only the lines are gone. So much of the answer was the shape of the text. Verse has short lines; the long ones are prose, of which comedies have
# most, as the last cell says. (With a caution: the model has never seen a text without line breaks, and may do anything with it.) A bag of words cannot see
# lines at all.
#
# ## 10 · Going on as a language model
#
# No head, no labels but the text itself: the same training as before, with other text. The demo has not read *Macbeth*, so acts 1 to 4 are
# given to it, and act 5 is for the score. First, how the checkpoint itself was made:

# %%
logs = {}
for family in ("demo-neo", "demo-neox"):
    with open(f"../checkpoints/metrics/{family}.jsonl", encoding="utf-8") as file:
        logs[family] = [json.loads(line) for line in file]
    print(family, f"{logs[family][-1]['valid_bits_per_byte']:.3f} bits per byte at the end")
training(logs)

# %% [markdown]
# ### Labels, and a second mistake
#
# A language model's labels are its input ids: `next_token_loss` shifts them by one. In a padded batch, the label -100 says "not scored". What if one forgets it?

# %%
lm = AutoModelForCausalLM.from_pretrained("../checkpoints/demo-neo")
ids, mask, _ = collate([(tokenizer.encode(line), 0) for line in lines])
labels = ids.masked_fill(mask == 0, -100)
with evaluating(lm, "float32"):
    for name, t in (("padding left out", labels), ("padding scored", ids)):
        print(f"{name}: {lm(ids, mask, labels=t).loss:.2f}, {(t[:, 1:] != -100).sum()} tokens")

# %% [markdown]
# Two different numbers, neither of which looks wrong. Training on the second spends its effort on `<|endoftext|>` after
# `<|endoftext|>`, and the more a batch is padded, the more. (The opposite mistake is as common: where pad and end are one id, masking *every* such id also
# hides the real end, and the model never learns to stop.)
#
# Now the training. Windows of 128 tokens need no padding. The loop is `finetune` from section 6, unchanged.

# %%
*first, last_act = acts(open("data/macbeth.txt", encoding="utf-8").read())
text = torch.tensor(tokenizer.encode("".join(first)))
windows = text[:len(text) // 128 * 128].view(-1, 128)              # (windows, 128)
order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:96]
before = score_texts(lm, [last_act], tokenizer, context=128)
print(f"{len(text):,} tokens in acts 1 to 4, of which {order.numel() * 128:,} are read once")

# %%
lm_log = finetune(lm, [(w, None, w) for w in windows[order].split(4)], 3e-4)
after = score_texts(lm, [last_act], tokenizer, context=128)
for name in ("perplexity", "bits_per_byte"):
    print(f"act 5, {name}: {before[name]:.3f} -> {after[name]:.3f} after {len(lm_log)} steps")
assert after["perplexity"] < before["perplexity"]

# %% [markdown]
# What did it learn? Compare the two models' $\log_2 p$ token by token in a few lines of act 5: dark tokens gained most.

# %%
at = last_act.index("MACBETH.\nBring me no more reports")
speech = torch.tensor([tokenizer.encode(last_act[at:at + 260])])
old = AutoModelForCausalLM.from_pretrained("../checkpoints/demo-neo")
with torch.no_grad():
    logp = [m(speech).logits[0, :-1].log_softmax(-1) for m in (old, lm)]   # (T - 1, V) each
gain = (logp[1] - logp[0]).gather(1, speech[0, 1:, None])[:, 0] / math.log(2)     # (T - 1,)

# %%
pieces = [tokenizer.decode([i]) for i in speech[0, 1:].tolist()]
coloured_text(pieces, gain.tolist(), "Names gained most from acts 1 to 4", "gain, bits")
top = [(piece, round(g, 1)) for g, piece in sorted(zip(gain.tolist(), pieces), reverse=True)]
print("most gained, bits:", top[:6], "\nmost lost:", top[-3:])

# %% [markdown]
# Above all the names: pieces of them are what the checkpoint could not know. (The passage begins inside "MACBETH", since its first token has nothing before it.)

# %% [markdown]
# The official version of the score. (Not comparable token by token, as Pythia has other tokens, but in bits per byte.)

# %%
if found := official("EleutherAI/pythia-70m"):
    print(score_texts(found[0], [last_act], found[1], context=128)["bits_per_byte"])

# %% [markdown]
# ## 11 · Keep it, and check it
#
# `save_pretrained` writes the official files, labels included. What comes back is the same to the bit:

# %%
folder = tempfile.mkdtemp()
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
again = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="naive")
for name, weight in again.state_dict().items():
    assert torch.equal(weight, model.state_dict()[name]), name
print(type(again).__name__, again.config.id2label, f"pad {again.config.pad_token_id}")

# %% [markdown]
# And transformers opens the same folder. The logits, the loss and the gradients of a training step are compared: the first two must be equal to
# the bit, the gradients up to rounding.

# %%
import transformers
transformers.utils.logging.disable_progress_bar()
theirs = transformers.GPTNeoForSequenceClassification.from_pretrained(
    folder, attn_implementation="eager").eval()

# %%
ids, mask, labels = batches[0]
mine, reference = again(ids, mask, labels=labels), theirs(ids, attention_mask=mask, labels=labels)
assert torch.equal(mine.logits, reference.logits) and torch.equal(mine.loss, reference.loss)
print(f"logits {tuple(mine.logits.shape)} and loss {mine.loss:.6f} equal to the bit")

# %%
mine.loss.backward(); reference.loss.backward()
a, b = again.transformer, theirs.transformer
for name, ours, reference in (
        ("head", again.score, theirs.score), ("embedding", a.embed, b.wte),
        ("first queries", a.blocks[0].attn.q_proj, b.h[0].attn.attention.q_proj)):
    off = (ours.weight.grad - reference.weight.grad).norm() / reference.weight.grad.norm()
    print(f"{name}: gradient {tuple(ours.weight.shape)}, relative difference {off:.1e}")
    assert off <= 1e-6

# %% [markdown]
# ## What we left out
#
# Training fewer weights than all (adapters, LoRA), the other two heads of `task_heads.py` (a label for each token; the beginning and end of an answer), lower
# precision, several processes, and going on after an interruption. `train.py` has the last three: `python train.py --task classify --train a.csv --valid b.csv --init … --out …`.
#
# ## Further
#
# - `python training/finetune_shakespeare.py`: the same task with all passages, 256 tokens and both families.
# - Howard and Ruder, *Universal Language Model Fine-tuning*, 2018: going on as a language model first, then the head.
# - Radford and others, *Improving Language Understanding by Generative Pre-Training*, 2018: the head on the last token.
# - `tests/test_task_heads.py`, which holds all six heads against the reference.
