# %% [markdown]
# # 0. Set-up and shapes: ids in, logits out
#
# This notebook turns a line of text into numbers, sends them through both models, and names the
# shape of every tensor on the way.
#
# **20 minutes** to read, **20 minutes** for the two exercises · **needs** a CPU, no GPU and no
# network; you should have seen GPT-2's attention once · [the words and letters](README.md)
#
# **Objectives.** Afterwards you can
# * load a checkpoint, turn a line of text into ids, and find the likeliest next token;
# * say what each of the letters B T S C H D R V stands for, in every tensor of one block, in both
#   families;
# * compute the number of weights from a config, and say which part of a model holds most of them;
# * find the file that answers your question.
#
# `make lab` in the project's folder installs what is needed and opens the notebooks. All of them run
# on small models that come with the project. The two of this notebook were trained on Shakespeare's
# plays: `demo-neo` is a GPT-Neo, and `demo-neox` is a GPT-NeoX.
#
# ## 1. Load
#
# A checkpoint is a folder with three things: `config.json` (the shape of the model),
# `model.safetensors` (its weights), and the tokenizer's files. `from_pretrained` takes a folder or,
# where there is a network, the name of a checkpoint on the Hugging Face hub.

# %%
import sys; sys.path[:0] = [".."]                      # the modules lie one folder up
import torch
from load_weights import AutoModelForCausalLM, AutoTokenizer
from lesson import exercise, official, same
from plots import *
print("Python", sys.version.split()[0], "and torch", torch.__version__)

# %%
FOLDERS = {"GPT-Neo": "../checkpoints/demo-neo", "GPT-NeoX": "../checkpoints/demo-neox"}
models, tokenizers = {}, {}
for name, folder in FOLDERS.items():
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    models[name], tokenizers[name] = model, AutoTokenizer.from_pretrained(folder)
    print(f"{name:9}{type(model).__name__:20} {model.num_parameters():,} weights,",
          f"{model.dtype}, {model.config.num_hidden_layers} blocks")

# %% [markdown]
# ## 2. Ids in
#
# A model reads numbers, not letters. The tokenizer cuts the text into **tokens**, pieces of text that
# are frequent in its training data, and looks up the number of each, its **id**. The two models have
# different vocabularies, so the same line becomes different ids.
#
# **Predict:** the line below has 10 words. Does it have more than 10 tokens, or fewer?

# %%
LINE = "So foul and fair a day I have not seen."
ids = {}
for name, tokenizer in tokenizers.items():
    ids[name] = tokenizer(LINE, return_tensors="pt").input_ids             # (B, T)
    row = ids[name][0].tolist()
    print(f"{name:9}{tuple(ids[name].shape)}", [(tokenizer.decode([i]), i) for i in row])
    assert tokenizer.decode(row) == LINE and len(row) > len(LINE.split()) == 10

# %% [markdown]
# There are more tokens than words: the full stop is a token of its own, and the smaller vocabulary
# cuts the rarer words into pieces. The space before a word belongs to its token. Nothing is put
# before the first token. Decoding all ids gives the line back exactly, which the assert checks.
#
# ## 3. Logits out
#
# At every position the model gives one number for each entry of the vocabulary, the **logit**. The
# higher the logit, the likelier is that entry as the *next* token. Softmax turns the logits of a
# position into probabilities.
#
# **Predict** the shape of the logits: there is one text, and the vocabularies have 2048 entries
# (GPT-Neo) and 1472 entries (GPT-NeoX).

# %%
PROMPT, logits = "HAMLET.\nTo be, or not to", {}
for name, model in models.items():
    prompt = tokenizers[name](PROMPT, return_tensors="pt").input_ids       # (B, T)
    logits[name] = model(prompt).logits                                    # (B, T, V)
    print(f"{name:9} ids {tuple(prompt.shape)} -> logits {tuple(logits[name].shape)}")

# %% [markdown]
# These are the eight likeliest next tokens and their probabilities:

# %% tags=["cover"] alt="For each model, eight horizontal bars show the likeliest tokens after “or not to” and their probabilities."
for axes, name in zip(panels(2, 9, 2.8), models):
    best = logits[name][0, -1].softmax(-1).topk(8)
    words = [repr(tokenizers[name].decode([i])) for i in best.indices.tolist()]
    bars(words, best.values, f"{name}: after “… or not to”",
         "probability of the next token", axes=axes)

# %% [markdown]
# To write text, a program takes one of the likely tokens, appends it, and asks the model again.
# `generate.py` does this on the command line. This cell runs it as you would type it. The text
# goes to standard output, and the line about the run goes to standard error.

# %%
import subprocess
command = [sys.executable, "../generate.py", PROMPT, "--seed", "3", "--max-new-tokens", "60"]
done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
print(done.stdout, done.stderr, sep="\n")

# %% [markdown]
# ## 4. Eight letters
#
# All files of this project name the sizes of a tensor by the same letters, in comments such as
# `# (B, H, T, S)`. We fill them in for one example: 8 tokens of the line have been read before, 3 new
# ones come in, and there are 2 rows. (A **cache** keeps the keys and values of the 8 tokens, so that
# only the 3 new ones have to be computed. Text is generated in this way, and this is why T and S are
# two letters.)

# %%
B, T, past = 2, 3, 8
sizes = {}
for name, model in models.items():
    c = model.config
    sizes[name] = dict(B=B, T=T, S=past + T, C=c.hidden_size, H=c.num_attention_heads,
                       D=c.head_dim, R=getattr(c, "rotary_ndims", "-"), V=c.vocab_size)
    print(name, sizes[name])

# %% [markdown]
# Each letter with its meaning:

# %%
MEANING = dict(B="batch: rows at once", T="new tokens", S="tokens in view, cached + new",
               C="width of the model (hidden_size)", H="attention heads",
               D="width of one head, C / H", R="rotated dims of a head", V="vocabulary")
print(" " * 40, *(f"{name:>9}" for name in models))
for letter, meaning in MEANING.items():
    print(f"{letter}   {meaning:36}", *(f"{size[letter]:>9}" for size in sizes.values()))

# %% [markdown]
# ## 5. Every tensor on the way through a block
#
# A block is an attention and an MLP. Each of them reads through a LayerNorm, and what each puts out is
# added to what came in.
#
# `walk` writes down the shape of what every part puts out, and it does not copy the model for that.
# **Forward hooks** are functions that PyTorch calls with the output of a module. The inside of
# attention is a function, not a module, so a spy takes its place during one call.

# %%
from unittest.mock import patch
import neo, neox
from attention import KVCache, attention

def walk(model, ids, past):
    """{part: shape} of what each part of the first block puts out while ids[:, past:] pass."""
    seen, cache = {}, KVCache(model.config, len(ids), ids.size(1))
    model(ids[:, :past], cache=cache)                                      # these are read before
    def note(name, x):
        seen.setdefault(name, tuple(x.shape))                              # of the first block
    def spy(q, k, v, **how):
        y, weights = attention(q, k, v, **how)
        for name, x in dict(q=q, k=k, v=v, weights=weights, y=y).items():
            note(name, x)
        return y, weights
    hooks = []
    for path, module in model.named_modules():
        if hasattr(module, "weight"):
            name = path.split(".")[-1]                                     # q_proj, ln_1, …
            hook = lambda module, args, out, name=name: note(name, out)
            hooks.append(module.register_forward_hook(hook))
    with patch.object(sys.modules[type(model).__module__], "attention", spy):
        model(ids[:, past:], cache=cache, output_attentions=True)
    for hook in hooks:
        hook.remove()
    return seen

# %%
table = {}
for name, model in models.items():
    two_rows = ids[name][:, :past + T].repeat(B, 1)
    table[name] = walk(model, two_rows, past)
    print(f"{name:9}{len(table[name])} tensors, among them q {table[name]['q']}")

# %% [markdown]
# The same shapes by letters: `lettered` looks up which letter has the size of a dimension.
#
# **Predict:** which rows of the table exist in one family only? And which tensor is the only one that
# has both a T and an S?

# %%
ORDER = """embed pos_embed ln_1 q_proj k_proj v_proj qkv_proj q k v weights y out_proj
           ln_2 up_proj down_proj ln_f lm_head""".split()
assert set(ORDER) == set(table["GPT-Neo"]) | set(table["GPT-NeoX"])

def lettered(shape, size):
    """(2, 3, 256) -> "(B, T, C)     (2, 3, 256)"; a part that the family does not have is "-"."""
    if shape is None:
        return "-".ljust(35)
    letter = {size[x]: x for x in "BTSCHDV"} | {3 * size["C"]: "3C", 4 * size["C"]: "4C"}
    letters = ", ".join(letter.get(n, str(n)) for n in shape)
    return f"({letters})".ljust(15) + str(shape).ljust(20)

print(" " * 12, *(name.ljust(34) for name in models))
for part in ORDER:
    print(part.ljust(12), *(lettered(table[name].get(part), sizes[name]) for name in models))
for name in models:
    found = [p for p in ORDER if "T, S" in lettered(table[name].get(p), sizes[name])]
    assert found == ["weights"] and table[name]["up_proj"][-1] == 4 * sizes[name]["C"]

# %% [markdown]
# GPT-NeoX has two more tensors, which its model computes once for all blocks: the cosines and sines of
# the angles by which q and k are turned.

# %%
c, positions = models["GPT-NeoX"].config, torch.arange(past, past + T)[None]
cos, sin = neox.rotary_tables(positions, c.rotary_ndims, c.rotary_emb_base, torch.float32)
print("cos, sin of GPT-NeoX   (1, 1, T, R/2)", tuple(cos.shape))

# %% [markdown]
# Read the table from top to bottom. `embed` looks up a row of C numbers for each token. GPT-Neo adds a
# row for each *position* (`pos_embed`). GPT-NeoX has no such table: it turns q and k by angles, and
# there are R/2 angles for each new token, one for each *pair* of turned dims. GPT-Neo has three
# matrices for q, k and v, and GPT-NeoX has one that is three times as wide. After them the heads work
# side by side, each on D numbers.
#
# Only the attention **weights** have both a T and an S, because they hold a number for each new token
# and each token in view. When a text is read in one piece, twice the length means four times as many
# of them. The MLP is four times as wide inside, and the last tensor has one number for each entry of
# the vocabulary.
#
# ### Exercise 0.1 · Predict the shapes
#
# Difficulty 1 of 5 · 10 minutes
#
# Write down, for one block of a GPT-Neo, the shapes of `q`, `k`, the attention `weights`, the result
# `y` of the attention, and the logits (`lm_head`). `past` tokens lie in the cache and T new ones come
# in. Use the config's `num_heads`, `head_dim` and `vocab_size`.

# %% tags=["stub"]
def predicted_shapes(config, B, T, past):
    """-> dict(q=(...), k=(...), weights=(...), y=(...), lm_head=(...))"""
    ...

# %% tags=["check"]
with exercise("0.1"):
    for rows, new, old, C, H in [(1, 1, 5, 64, 4), (2, 3, 8, 48, 6), (3, 4, 2, 40, 2)]:
        config = neo.GPTNeoConfig(hidden_size=C, num_heads=H, num_layers=1, vocab_size=100,
                                  attention_types=[[["global"], 1]])
        told = walk(neo.GPTNeoForCausalLM(config), torch.ones(rows, old + new).long(), old)
        expected = {part: told[part] for part in ("q", "k", "weights", "y", "lm_head")}
        same(predicted_shapes(config, rows, new, old), expected,
             f"B = {rows}, T = {new}, past = {old}, C = {C}, H = {H}")

# %% [markdown]
# <details><summary>Hint</summary>
#
# Attention gets q, k and v with the heads before the tokens: (B, H, ..., D). Queries come from new
# tokens alone. Keys come from all tokens in view.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def predicted_shapes(config, B, T, past):
#     H, D, S = config.num_heads, config.head_dim, past + T
#     return dict(q=(B, H, T, D), k=(B, H, S, D), weights=(B, H, T, S), y=(B, H, T, D),
#                 lm_head=(B, T, config.vocab_size))
# ```
# A weight belongs to a pair of a query and a key, so the weights have the query's T and the key's S.
# </details>

# %% tags=["wrong"]
def predicted_shapes(config, B, T, past):                            # forgets the cache
    H, D = config.num_heads, config.head_dim
    return dict(q=(B, H, T, D), k=(B, H, T, D), weights=(B, H, T, T), y=(B, H, T, D),
                lm_head=(B, T, config.vocab_size))

# %% tags=["wrong"]
def predicted_shapes(config, B, T, past):                            # tokens before heads
    H, D, S = config.num_heads, config.head_dim, past + T
    return dict(q=(B, T, H, D), k=(B, S, H, D), weights=(B, H, T, S), y=(B, T, H, D),
                lm_head=(B, T, config.vocab_size))

# %% tags=["wrong"]
def predicted_shapes(config, B, T, past):                            # logits for the cached tokens too
    H, D, S = config.num_heads, config.head_dim, past + T
    return dict(q=(B, H, T, D), k=(B, H, S, D), weights=(B, H, T, S), y=(B, H, T, D),
                lm_head=(B, S, config.vocab_size))

# %% [markdown]
# ## 6. Where the weights are
#
# **Predict:** which part holds most of the weights of a small model, and which part of a large one?
#
# The shapes of the official models need no download: on PyTorch's `meta` device a model has shapes but
# no memory.

# %%
small = neo.GPTNeoConfig(hidden_size=768, num_layers=12, num_heads=12,
                         attention_types=[[["global", "local"], 6]])
pythia = neox.GPTNeoXConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=6,
                            num_attention_heads=8, vocab_size=50304)
with torch.device("meta"):
    models["pythia-70m"] = neox.GPTNeoXForCausalLM(pythia)
    models["gpt-neo-125m"] = neo.GPTNeoForCausalLM(small)
    models["gpt-neo-1.3B"] = neo.GPTNeoForCausalLM(neo.GPTNeoConfig())
    models["gpt-neox-20b"] = neox.GPTNeoXForCausalLM(neox.GPTNeoXConfig())
for name, model in models.items():
    print(f"{name}: {model.num_parameters():,} weights on {model.device}")

# %% [markdown]
# Each weight belongs to the part that its name tells:

# %%
PARTS = {"embedding": ".embed.", "positions": "pos_embed", "attention": "attn", "MLP": "mlp",
         "LayerNorms": "ln_", "output head": "lm_head"}                   # a piece of their names

def weights_by_part(model):
    counts = dict.fromkeys(PARTS, 0)
    for key, weight in model.named_parameters():
        counts[next(part for part, mark in PARTS.items() if mark in key)] += weight.numel()
    return counts

print(weights_by_part(models["GPT-Neo"]))

# %% alt="Stacked bars: embedding and output head fill most of pythia-70m, attention and MLP nearly all of gpt-neox-20b."
rows, share = {}, {}
for name, model in models.items():
    counts = weights_by_part(model)
    assert sum(counts.values()) == model.num_parameters()
    rows[f"{name}  {model.num_parameters():,}"] = counts
    share[name] = (counts["embedding"] + counts["output head"]) / model.num_parameters()
    print(f"{name}: MLP : attention = {counts['MLP'] / counts['attention']:.2f} : 1")
shares(rows, "where a model has its weights", "% of all weights");

# %%
print({name: f"{part:.1%}" for name, part in share.items()}, "in embedding and output head")
assert 0.73 < share["pythia-70m"] < 0.74 and share["gpt-neox-20b"] < 0.04
counts = weights_by_part(models["gpt-neox-20b"])
blocks = counts["attention"] + counts["MLP"]
assert blocks / sum(counts.values()) > 0.96 and 0.66 < counts["MLP"] / blocks < 0.67

# %% [markdown]
# In pythia-70m the vocabulary takes 73 % of all weights, because its 50,304 rows are needed twice, in
# the embedding and in the output head. In gpt-neox-20b attention and the MLPs take more than 96 %,
# and the MLPs are two thirds of them. GPT-Neo's bar has no output head because its head *is* the embedding,
# used once more (**tied**).
#
# ### Exercise 0.2 · Count the weights from the config
#
# Difficulty 2 of 5 · 10 minutes
#
# Compute, without making a model, how many weights a GPT-Neo has. Use the config's `vocab_size`,
# `max_position_embeddings`, `hidden_size`, `intermediate_size` and `num_layers`. Do not forget the
# biases: `print(models["GPT-Neo"])` says which layers have one. This is the quickest check that a
# checkpoint is what its name says.

# %% tags=["stub"]
def count_weights(config):
    """Number of weights of a GPT-Neo, whose head is its embedding."""
    ...

# %% tags=["check"]
with exercise("0.2"):
    for name, count in [("GPT-Neo", 3_811_840), ("gpt-neo-125m", 125_198_592),
                        ("gpt-neo-1.3B", 1_315_575_808)]:
        assert models[name].num_parameters() == count
        same(count_weights(models[name].config), count, name)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A linear layer from n to m numbers has n · m weights and, if it has a bias, m more. In a block,
# `q_proj`, `k_proj` and `v_proj` have no bias; `out_proj`, `up_proj` and `down_proj` have one. Each of
# the two LayerNorms has 2 C weights. One more LayerNorm follows the last block.
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def count_weights(config):
#     V, P = config.vocab_size, config.max_position_embeddings
#     C, I = config.hidden_size, config.intermediate_size
#     attention_part = 4 * C * C + C
#     mlp_part = 2 * C * I + I + C
#     return V * C + P * C + config.num_layers * (attention_part + mlp_part + 4 * C) + 2 * C
# ```
# With I = 4 C a block has 12 C² + 10 C weights. Hence the rule of thumb “12 C² for each layer”.
# (10 C: a bias of C in `out_proj`, of 4 C and C in the MLP, and 4 C in the two LayerNorms.)
# </details>

# %% tags=["wrong"]
def count_weights(config):                                 # an output head that is not tied
    V, P = config.vocab_size, config.max_position_embeddings
    C, I = config.hidden_size, config.intermediate_size
    block = 4 * C * C + C + 2 * C * I + I + C + 4 * C
    return 2 * V * C + P * C + config.num_layers * block + 2 * C

# %% tags=["wrong"]
def count_weights(config):                                 # biases for q, k and v, as in GPT-2
    V, P = config.vocab_size, config.max_position_embeddings
    C, I = config.hidden_size, config.intermediate_size
    block = 4 * C * C + 4 * C + 2 * C * I + I + C + 4 * C
    return V * C + P * C + config.num_layers * block + 2 * C

# %% tags=["wrong"]
def count_weights(config):                                 # the rule of thumb alone
    V, C = config.vocab_size, config.hidden_size
    return 12 * config.num_layers * C ** 2 + V * C

# %% [markdown]
# ## 7. Where is what
#
# Each file has one subject and reads from top to bottom in the order in which data flows.
#
# | you want to know | read |
# |---|---|
# | what a GPT-Neo is | `neo.py`, then notebook 1 |
# | what changed to GPT-NeoX and Pythia | `diff neo.py neox.py`, then notebook 2 |
# | which token may read which, and fast ways to compute it | `attention.py`: `visible`, `naive`; notebook 3 for the Triton kernel |
# | what the tensors of an official file are called, and whether a port is right | `load_weights.py`, `compare.py`, notebook 4 |
# | temperature, top-k, top-p | `choose` in `sampling.py`, notebook 5 |
# | how decoding becomes fast | `fast/step.py` |
# | how likely a given text is: loss, perplexity, bits per byte | `score.py`, notebook 5 |
# | training | `train.py`, notebook 6 |
# | what a model is trained on: files of text, or texts with labels | `training/`, notebook 6 |
# | classifying texts or tokens, finding an answer in a text | `task_heads.py`, notebook 6 |
#
# The first line of each file says what it is about:

# %%
import ast
from pathlib import Path
for path in sorted(Path("..").glob("*.py")):
    text = path.read_text(encoding="utf-8")
    subject = ast.get_docstring(ast.parse(text)).splitlines()[0]
    print(f"{path.name:16}{len(text.splitlines()):5} lines   {subject}")

# %% [markdown]
# An official model is loaded by its name on the hub. This cell draws the picture of section 3 for
# pythia-70m; without a network it says “skipped”.

# %% alt="Eight horizontal bars show the likeliest tokens after “or not to” by pythia-70m."
if found := official("EleutherAI/pythia-70m"):
    pythia, tokenizer = found
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    best = pythia(prompt).logits[0, -1].softmax(-1).topk(8)
    words = [repr(tokenizer.decode([i])) for i in best.indices.tolist()]
    bars(words, best.values, f"pythia-70m, {pythia.num_parameters():,} weights",
         "probability of the next token")


# %% [markdown]
# ## In three sentences
#
# A tokenizer turns text into ids (B, T), and a model turns ids into logits (B, T, V), one number for
# each possible next token at each position. Between them every tensor has a shape that eight letters
# name, and only the attention weights have both T and S, so they alone grow with the square of the
# text. A small model with a large vocabulary has most of its weights in the vocabulary's rows, and a
# large model has nearly all of them in its blocks.
#
# ## Further
#
# What happens between these shapes is the subject of notebooks 1 (GPT-Neo) and 2 (GPT-NeoX). Texts of
# different lengths can be computed together: pad them on the left and pass the attention mask. The
# README lists things that people stumble over. Karpathy's video “Let's build GPT” builds attention
# from nothing, and the glossary of TransformerLens explains the vocabulary of those who look inside
# models.
