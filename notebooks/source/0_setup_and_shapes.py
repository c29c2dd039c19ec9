# %% [markdown]
# # Set-up and shapes: ids in, logits out
#
# **Time** 15 minutes, and 10 minutes for the exercise. **Needs** a CPU; no GPU, no network. You should have seen GPT-2's attention once.
#
# **Objectives.** Afterwards you can
# * load a checkpoint, turn a line of text into ids and ids into a next token;
# * say what each of the letters B T S C H D R V stands for, in every tensor of one block, in both families;
# * predict the number of weights from a config, and say which part of a model holds most of them;
# * find the file to read for what you want to know.
#
# **Set-up**, once, in the project's folder: `python3 -m venv .venv && .venv/bin/pip install -r requirements-test.txt`
# and then `.venv/bin/jupyter lab notebooks` (or VS Code, with `.venv` as the kernel). Everything below runs on two small models that
# come with the project, trained on Shakespeare's plays: `demo-neo`, a GPT-Neo, and `demo-neox`, a GPT-NeoX.
#
# ## Load
#
# A checkpoint is a folder: `config.json` (the shape of the model), `model.safetensors` (its weights), and the
# tokenizer's files. `from_pretrained` takes a folder, or the name of a checkpoint on the Hugging Face hub, where there is a network.

# %%
import sys; sys.path[:0] = [".."]                      # the modules lie one folder up
import torch
from load_weights import AutoModelForCausalLM, AutoTokenizer
from lesson import exercise, official
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
# ## Ids in
#
# A model reads numbers, not letters. The tokenizer cuts the text into **tokens**, pieces that are frequent in its training text, and looks up the
# number of each, its **id**. The two models have different vocabularies, so the same line becomes different ids.
#
# **Predict:** the line below has 10 words. More than 10 tokens, or fewer?

# %%
LINE = "So foul and fair a day I have not seen."
ids = {}
for name, tokenizer in tokenizers.items():
    ids[name] = tokenizer(LINE, return_tensors="pt").input_ids             # (B, T)
    row = ids[name][0].tolist()
    print(f"{name:9}{tuple(ids[name].shape)}", [(tokenizer.decode([i]), i) for i in row])
    assert tokenizer.decode(row) == LINE

# %% [markdown]
# The space before a word belongs to its token, rare words fall into pieces, and nothing is put before the first token. The last line of the cell
# says that the way back is exact.
#
# ## Logits out
#
# For every position the model gives one number for each entry of the vocabulary, the **logit**: the higher, the likelier is that entry as the
# *next* token. Softmax turns a position's logits into probabilities.
#
# **Predict** the shape of the logits before you run the next cell: 1 line, its tokens, a vocabulary of 2048 (GPT-Neo) or 1472 (GPT-NeoX).

# %%
PROMPT, logits = "HAMLET.\nTo be, or not to", {}
for name, model in models.items():
    prompt = tokenizers[name](PROMPT, return_tensors="pt").input_ids       # (B, T)
    logits[name] = model(prompt).logits                                    # (B, T, V)
    print(f"{name:9} ids {tuple(prompt.shape)} -> logits {tuple(logits[name].shape)}")

# %% [markdown]
# The eight likeliest next tokens, and how likely they are:

# %% tags=["cover"]
for axes, name in zip(panels(2, 9, 2.8), models):
    best = logits[name][0, -1].softmax(-1).topk(8)
    words = [repr(tokenizers[name].decode([i])) for i in best.indices.tolist()]
    bars(words, best.values, f"{name}: after “… or not to”",
         "probability of the next token", axes=axes)

# %% [markdown]
# To write text, take one of the likely tokens, put it at the end, and ask again. `generate.py` does this at the command line; here as a subprocess,
# as you would type it. Text goes to standard output, the line about the run to standard error.

# %%
import subprocess
command = [sys.executable, "../generate.py", PROMPT, "--seed", "3", "--max-new-tokens", "60"]
done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
print(done.stdout, done.stderr, sep="\n")

# %% [markdown]
# ## Eight letters
#
# All files of this project name the sizes of a tensor by the same letters, in comments such as `# (B, H, T, S)`. The next cell fills them in for one
# and the same moment: **8 tokens of the line have been read before, 3 new ones come in**, and there are 2 rows. (A **cache** keeps the keys and
# values of what was read, so that only new tokens have to be computed. This is how text is generated, and it is why T and S are two letters.)
# The cell after it says what each letter means.

# %%
B, T, past = 2, 3, 8
sizes = {}
for name, model in models.items():
    c = model.config
    sizes[name] = dict(B=B, T=T, S=past + T, C=c.hidden_size, H=c.num_attention_heads,
                       D=c.head_dim, R=getattr(c, "rotary_ndims", "-"), V=c.vocab_size)
    print(name, sizes[name])


# %%
MEANING = dict(B="batch: rows at once", T="new tokens", S="tokens in view, cached + new",
               C="width of the model (hidden_size)", H="attention heads",
               D="width of one head, C / H", R="rotated dims of a head", V="vocabulary")
print(" " * 40, *(f"{name:>9}" for name in models))
for letter, meaning in MEANING.items():
    print(f"{letter}   {meaning:36}", *(f"{size[letter]:>9}" for size in sizes.values()))

# %% [markdown]
# ## Every tensor on the way through a block
#
# A block is attention and an MLP, each after a LayerNorm, each added to what came in. The next cell writes down the shape of what every part puts
# out, without copying the model: **forward hooks** are functions that PyTorch calls with each module's output, and for what lies
# inside attention, which is a function and not a module, a spy takes its place for the time of one call.
#
# **Predict**, for the table under the third cell: which rows exist in one family only? And which tensor alone has both a T and an S?

# %%
from unittest.mock import patch
import neo, neox
from attention import KVCache, attention

def walk(model, ids, past):
    """{part: shape} of what each part puts out while ids[:, past:] pass; the first block's."""
    seen, cache = {}, KVCache(model.config, len(ids), ids.size(1))
    model(ids[:, :past], cache=cache)                                      # read before
    def note(name, x):
        seen.setdefault(name, tuple(x.shape))                              # the first block stays
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
# The same by letters: `spelled` looks up which letter has the size of a dimension.

# %%
ORDER = """embed pos_embed ln_1 q_proj k_proj v_proj qkv_proj q k v weights y out_proj
           ln_2 up_proj down_proj ln_f lm_head""".split()
assert set(ORDER) == set(table["GPT-Neo"]) | set(table["GPT-NeoX"])

def spelled(shape, size):
    """(2, 3, 256) -> "(B, T, C)     (2, 3, 256)"; a part that the family does not have is "-"."""
    if shape is None:
        return "-".ljust(35)
    letter = {size[x]: x for x in "BTSCHDV"} | {3 * size["C"]: "3C", 4 * size["C"]: "4C"}
    letters = ", ".join(letter.get(n, str(n)) for n in shape)
    return f"({letters})".ljust(15) + str(shape).ljust(20)


print(" " * 12, *(name.ljust(34) for name in models))
for part in ORDER:
    print(part.ljust(12), *(spelled(table[name].get(part), sizes[name]) for name in models))

# %%
c, positions = models["GPT-NeoX"].config, torch.arange(past, past + T)[None]
cos, sin = neox.rotary_tables(positions, c.rotary_ndims, c.rotary_emb_base, torch.float32)
print("cos, sin of GPT-NeoX   (1, 1, T, R/2)", tuple(cos.shape))

# %% [markdown]
# Read it from top to bottom. `embed` looks up a row of C numbers for each token. GPT-Neo adds a row for each *position* (`pos_embed`);
# GPT-NeoX has none and turns q and k by angles instead, which come from the two tables of the last cell, for each new token R/2 numbers, one for each
# *pair* of turned dims. GPT-Neo has three matrices for q, k and v, GPT-NeoX one that is three times as wide. From there on the heads work side by side
# on D numbers each.
# Only the attention **weights** have both a T and an S: for each new token a number for each token in view. Read in one piece, a text of twice the length
# has four times as many.
# The MLP is four times as wide inside, and the end is one number for each entry of the vocabulary.
#
# ## Where the weights are
#
# **Predict:** in which part does a small model have most of its weights, and in which a large one? The shapes of the official models
# need no download: on PyTorch's `meta` device a model has shapes and no memory.

# %%
small = neo.GPTNeoConfig(hidden_size=768, num_layers=12, num_heads=12,
                         attention_types=[[["global", "local"], 6]])
with torch.device("meta"):
    models["gpt-neo-125m"] = neo.GPTNeoForCausalLM(small)
    models["gpt-neo-1.3B"] = neo.GPTNeoForCausalLM(neo.GPTNeoConfig())
    models["gpt-neox-20b"] = neox.GPTNeoXForCausalLM(neox.GPTNeoXConfig())
for name, model in models.items():
    print(f"{name}: {model.num_parameters():,} weights on {model.device}")

# %%
PARTS = {"embedding": ".embed.", "positions": "pos_embed", "attention": "attn", "MLP": "mlp",
         "LayerNorms": "ln_", "output head": "lm_head"}                   # part of their names

def weights_by_part(model):
    counts = dict.fromkeys(PARTS, 0)
    for key, weight in model.named_parameters():
        counts[next(part for part, mark in PARTS.items() if mark in key)] += weight.numel()
    return counts

print(weights_by_part(models["GPT-Neo"]))

# %%
rows = {}
for name, model in models.items():
    counts = weights_by_part(model)
    assert sum(counts.values()) == model.num_parameters()
    rows[f"{name}  {model.num_parameters():,}"] = counts
    print(f"{name}: MLP : attention = {counts['MLP'] / counts['attention']:.2f} : 1")
shares(rows, "where a model has its weights", "% of all weights");

# %% [markdown]
# GPT-Neo's output head is empty because it *is* the embedding, used once more (**tied**). In a small model the vocabulary weighs a good part of the
# whole; in a large one the blocks are nearly all, and of them the MLP is two thirds.
#
# ### Exercise 0.1 · Count the weights from the config
#
# Difficulty ●●○○○, importance ●●●○○, 10 minutes. Write down, without making a model, how many weights a GPT-Neo has. Use the config's
# `vocab_size`, `max_position_embeddings`, `hidden_size`, `intermediate_size` and `num_layers`. Mind the biases:
# `print(models["GPT-Neo"])` says which layers have one. It is the quickest check that a checkpoint is what its name says.

# %% tags=["stub"]
def count_weights(config):
    """Number of weights of a GPT-Neo, whose head is its embedding."""
    ...

# %% tags=["check"]
with exercise("0.1"):
    for name, count in [("GPT-Neo", 3_811_840), ("gpt-neo-125m", 125_198_592),
                        ("gpt-neo-1.3B", 1_315_575_808)]:
        found = count_weights(models[name].config)
        assert models[name].num_parameters() == count
        assert found == count, f"{name} has {count:,} weights, not {found}"

# %% [markdown]
# <details><summary>Hint</summary>
#
# A linear layer from n to m numbers has n · m weights and, if it has a bias, m more. In a block, `q_proj`, `k_proj` and `v_proj` have no bias; `out_proj`,
# `up_proj` and `down_proj` have one; each of the two LayerNorms has 2 C. One more LayerNorm follows the last block.
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
# With I = 4 C a block comes to 12 C² + 10 C: the rule of thumb “12 C² for each layer”.
# </details>

# %% tags=["wrong"]
def count_weights(config):                                 # a head of its own: not tied
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
# ## Where is what
#
# Each file is flat and has one subject; its first line says which (next cell). Each reads from top to bottom in the order in which data flows.
#
# | you want to know | read |
# |---|---|
# | what a GPT-Neo is | `neo.py`, then notebook 1 |
# | what changed to GPT-NeoX and Pythia | `diff neo.py neox.py`, then notebook 2 |
# | which token may read which, and fast ways to do it | `attention.py`: `visible`, `naive`; notebook 3 for the Triton kernel |
# | what the tensors of an official file are called, and whether a port is right | `load_weights.py`, `compare.py`, notebook 4 |
# | temperature, top-k, top-p | `choose` in `sampling.py`, notebook 5 |
# | how one token at a time becomes fast | `fast/step.py` |
# | how likely a given text is: loss, perplexity, bits per byte | `score.py`, notebook 5 |
# | training | `train.py`, notebook 6 |
# | what is trained on: files of text, or labels of texts | `training/`, notebook 6 |
# | classifying texts or tokens, finding an answer in a text | `task_heads.py`, notebook 6 |
#
# Below the list of files stands the picture of “Logits out” for an official model, by its name on the hub; without a network that cell says “skipped”.

# %%
import ast
from pathlib import Path
for path in sorted(Path("..").glob("*.py")):
    text = path.read_text(encoding="utf-8")
    subject = ast.get_docstring(ast.parse(text)).splitlines()[0]
    print(f"{path.name:16}{len(text.splitlines()):5} lines   {subject}")

# %%
if found := official("EleutherAI/pythia-70m"):
    pythia, tokenizer = found
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    best = pythia(prompt).logits[0, -1].softmax(-1).topk(8)
    words = [repr(tokenizer.decode([i])) for i in best.indices.tolist()]
    bars(words, best.values, f"pythia-70m, {pythia.num_parameters():,} weights",
         "probability of the next token")


# %% [markdown]
# **What we left out:** what happens between these shapes, which is the subject of notebooks 1 (GPT-Neo) and 2 (GPT-NeoX); batches of lines of different
# length (pad on the left, pass the attention mask). **Further:** the README's “Things that people stumble over”; Karpathy's “Let's build GPT” for
# attention from nothing; the TransformerLens glossary for the vocabulary of those who look inside models.
