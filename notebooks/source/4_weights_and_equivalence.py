# %% [markdown]
# # 4. Official weights, and the proof that it is the same model
#
# **Time** 45 minutes to read and run, 55 minutes more for the exercises. **Needs** PyTorch basics, and what a block of a GPT is; no GPU, no network. Notebooks 1 and 2 explain the two architectures; this one does not depend on them. [The words and letters](README.md) are explained in one place.
#
# **Objectives.** Afterwards you can
# 1. read a checkpoint without any model code, and say where its bytes are;
# 2. map its names to yours, so that no tensor is left out without an error, and load it with one copy in memory;
# 3. choose measures, text lengths and bounds that tell a right model from one that is almost right;
# 4. find a mistake from the layer in which the numbers first differ.
#
# A wrong port does not crash. It writes fluent text and is a little worse than the original. So the question "is it the same model?" has to be answered with numbers.
#
# One text is used in the whole notebook: Macbeth's speech. The play was held out when the demo checkpoints were trained, so no model has seen it. The text is three windows long on purpose; section 8 shows why.

# %%
import sys; sys.path[:0] = [".."]                      # the modules lie one folder up
import copy, json, random, shutil, subprocess, tempfile
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers                                    # the reference, for checks only
from safetensors.torch import load_file, save_file

import compare, load_weights, neo, neox
from base import next_token_loss
from benchmarks.shapes import SHAPES, model_class
from load_weights import NAMES, AutoModelForCausalLM, AutoTokenizer, NoInit, our_name
from lesson import exercise, official, same, show
from plots import *

torch.set_num_threads(1)                               # small models: a second thread only waits
transformers.utils.logging.disable_progress_bar()
print("torch", torch.__version__, " transformers", transformers.__version__)

# %%
text = """SEYTON.
The queen, my lord, is dead.

MACBETH.
She should have died hereafter.
There would have been a time for such a word.
Tomorrow, and tomorrow, and tomorrow,
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
NEO, NEOX = "../checkpoints/demo-neo", "../checkpoints/demo-neox"
ids = AutoTokenizer.from_pretrained(NEO)(text, return_tensors="pt").input_ids
ids_x = AutoTokenizer.from_pretrained(NEOX)(text, return_tensors="pt").input_ids
print("tokens of demo-neo, of demo-neox:", ids.shape[1], ids_x.shape[1])

# %% [markdown]
# ## 1. What is in the file
#
# A `.safetensors` file begins with 8 bytes that hold a length *n*. Then come *n* bytes of JSON, the header, and then numbers and nothing else. A pickled `.bin` file can contain code that runs when it is loaded; this format cannot. No library is needed to look inside.

# %%
raw = Path(f"{NEO}/model.safetensors").read_bytes()
n = int.from_bytes(raw[:8], "little")
header = json.loads(raw[8:8 + n])
header.pop("__metadata__", None)
print(f"{len(raw):,} bytes: 8, {n:,} of header, {len(raw) - 8 - n:,} of numbers")
print(len(header), "tensors")

# %% [markdown]
# The header says for each tensor its dtype, its shape, and where its bytes begin and end. These offsets count from the end of the header. The file is printed for layer 1 and for what belongs to no layer.
#
# **Predict:** the model has an output head, `lm_head`. At which place of the file does its matrix lie?

# %%
end = 0
for name, tensor in header.items():
    assert tensor["data_offsets"][0] == end            # back to back, in the header's order
    end = tensor["data_offsets"][1]
    if ".h.1." in name or ".h." not in name:           # layer 1, and what belongs to no layer
        print(f"{name:50} {tensor['dtype']} {str(tensor['shape']):13} {tensor['data_offsets']}")
assert end == len(raw) - 8 - n and not any("lm_head" in name for name in header)

# %% [markdown]
# There is no `lm_head` in the file. Section 5 says why.
#
# ## 2. The config
#
# The weights do not say how they are to be used. The number of heads, the window and the activation are in `config.json`. Our dataclass has fields with the official names.

# %%
official_json = json.loads(Path(f"{NEO}/config.json").read_text())
known = {field.name for field in fields(neo.GPTNeoConfig)}
print("in the file, no field of ours:", sorted(official_json.keys() - known))
config = neo.GPTNeoConfig.from_pretrained(NEO)
print("the layers:", official_json["attention_types"], "->", config.windows)

# %% [markdown]
# The names of fields change over the years: transformers 5 moved the rotary numbers into a dict. A loader that knows only the old spelling would take its default, and load *another model* without an error. And a model has to refuse what it cannot do. A config that asks for scaled rotary angles, for instance, would run without an error in code that does not scale them.

# %%
new = dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=1.0, rope_theta=500))
assert neox.GPTNeoXConfig.from_dict(new).rotary_pct == 1.0                 # the default is 0.25
try:
    neox.GPTNeoXConfig.from_dict(dict(rope_scaling={"type": "linear", "factor": 2.0}))
except ValueError as error:
    print("refused:", error)

# %% [markdown]
# ## 3. The table of names
#
# The official names are those of transformers. Ours are shorter and the same in both families. One flat table connects them. `#` stands for the number of a layer and `*` for `weight` or `bias`. `None` means that the tensor is known and is ignored on purpose.
#
# **Predict:** old files hold both `transformer.h.2.attn.attention.bias` and `transformer.h.2.attn.attention.out_proj.bias`. One of the two is a parameter. Which one? And what does the table do with the other?

# %%
table = NAMES["gpt_neo"]
for pattern, ours_ in table.items():
    print(f"{pattern:50}{ours_}")
assert our_name("transformer.h.2.attn.attention.bias", table) is None
assert sum(our_name(name, table) is not None for name in header) == len(header) == 56

# %% [markdown]
# The first is the causal mask, which old versions of transformers saved with the weights. A loader that ignores every name with `.bias` after `attention` would also ignore the real biases of `out_proj`. So each name must match a rule of the table; otherwise it is an error. Below, one tensor of the file is given a name that no rule matches.

# %%
tensors = load_file(f"{NEO}/model.safetensors")
state = {our_name(name, table): tensor.float() for name, tensor in tensors.items()}    # for later
tensors["transformer.h.1.mlp.w_out.weight"] = tensors.pop("transformer.h.1.mlp.c_proj.weight")
with tempfile.TemporaryDirectory() as folder:
    shutil.copytree(NEO, folder, dirs_exist_ok=True)
    save_file(tensors, f"{folder}/model.safetensors")
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        print(str(error).replace(folder, "..."))

# %% [markdown]
# **A deliberate mistake: `strict=False`.** Some code avoids such an error by `load_state_dict(state, strict=False)`. Parameters for which the file has no tensor then keep the values that they were created with: random matrices, biases of 0, norm weights of 1. We leave out one part of the file at a time and measure the loss on the speech.
#
# **Predict:** which of these parts could be missing without a visible change of the loss: the biases of `down_proj`, the second LayerNorms, the position embeddings, the MLPs?

# %%
def loss_without(part):                                # where `part` is in a tensor's name
    torch.manual_seed(0)
    model = neo.GPTNeoForCausalLM(config).eval()
    kept = {name: tensor for name, tensor in state.items() if part not in name}
    model.load_state_dict(kept, strict=False)          # the rest stays as it was created
    return model(ids, labels=ids).loss.item()

# %% alt="A dot for each of eleven parts on a log axis: without ln_2 the loss changes by about 0.001, without the MLPs or the embedding by more than 1; down_proj.bias alone lowers it."
parts = ["nothing", "out_proj.bias", "up_proj.bias", "down_proj.bias", "ln_1", "ln_2", "ln_f",
         "pos_embed", "q_proj", "v_proj", "mlp", "transformer.embed"]
losses = {part: loss_without(part) for part in parts}
losses_without(losses, "What leaving out a part does to the loss (strict=False)")
assert losses["down_proj.bias"] < losses["nothing"]
assert abs(losses["ln_2"] - losses["nothing"]) < 0.005

# %% [markdown]
# The second LayerNorm of all four blocks can be missing, and the loss changes by less than 0.005. Without the biases of `down_proj` the loss even falls. So a look at the loss would not show either mistake. The remedy is a loader without such an option: `load_pretrained` lists every tensor that is missing, unexpected or of another shape, and raises an error.
#
# ### Exercise 4.1 · The table of a sibling
# Difficulty 3 of 5 · 25 minutes
#
# GPT-J is the model that EleutherAI published between GPT-Neo and GPT-NeoX. The tensors in its file are listed below; it has 28 layers. Write its table in the format of `NAMES`, from this list alone. Where our models have the same part, use our name (`transformer.blocks.#.attn.q_proj.weight` …); a tensor that our models do not have keeps its official name. The two buffers are to be ignored.

# %%
C, V = 4096, 50400
layer = {"ln_1.weight": (C,), "ln_1.bias": (C,),
         "attn.bias": (1, 1, 2048, 2048), "attn.masked_bias": (),
         "attn.k_proj.weight": (C, C), "attn.v_proj.weight": (C, C),
         "attn.q_proj.weight": (C, C), "attn.out_proj.weight": (C, C),
         "mlp.fc_in.weight": (4 * C, C), "mlp.fc_in.bias": (4 * C,),
         "mlp.fc_out.weight": (C, 4 * C), "mlp.fc_out.bias": (C,)}
GPT_J = {"transformer.wte.weight": (V, C),
         "transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,),
         "lm_head.weight": (V, C), "lm_head.bias": (V,)}
for i in range(28):
    GPT_J |= {f"transformer.h.{i}.{name}": shape for name, shape in layer.items()}
print(len(GPT_J), "tensors")

# %% [markdown]
# Your table is checked against `shapes`: the names and shapes of a GPT-Neo of that size. It is built on the *meta device*, where tensors have shapes but no memory (section 4).

# %%
def on_meta(config):
    with torch.device("meta"), NoInit():
        return model_class(config)(config)

like_gpt_j = replace(config, vocab_size=V, hidden_size=C, intermediate_size=4 * C, num_heads=16,
                     num_layers=28, attention_types=[[["global"], 28]])
shapes = {name: tuple(p.shape) for name, p in on_meta(like_gpt_j).state_dict().items()}
print(*list(shapes.items())[-8:-5], sep="\n")

# %% tags=["stub"]
def sibling_table():
    """{official pattern: our pattern, or None to ignore it}"""
    ...

# %% tags=["check"]
with exercise("4.1"):
    answer = sibling_table()
    assert answer is not None, "nothing came (None), expected a table"
    found = {name: our_name(name, dict(answer)) for name in GPT_J}         # KeyError: no rule
    for name, our in found.items():
        buffer = name.endswith((".attn.bias", ".masked_bias"))
        rule = "to be ignored (None)" if buffer else "to be loaded, as it is a parameter"
        assert (our is None) == buffer, f"{name}: came {our}, expected {rule}"
    kept = {our: name for name, our in found.items() if our is not None}
    twice = next((name for name, our in found.items() if our and kept[our] != name), None)
    assert not twice, f"{twice} and {kept[found[twice]]} both came as {found[twice]}"
    for our, name in kept.items():
        known = shapes.get(our, GPT_J[name] if our == "lm_head.bias" else None)
        assert known, f"{name}: came {our}, expected a name of ours or lm_head.bias"
        same(GPT_J[name], known, f"shape of {name} as {our}")
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        ours_ = f"transformer.blocks.9.attn.{part}.weight"
        same(kept[ours_], f"transformer.h.9.attn.{part}.weight", f"the source of {ours_}")

# %% [markdown]
# <details><summary>Hint</summary>
#
# Start from `NAMES["gpt_neo"]` and leave out what the list does not have. `out_proj` has no bias here, so a rule that ends in `.weight` will do.
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def sibling_table():
#     """{official pattern: our pattern, or None to ignore it}"""
#     h, blocks = "transformer.h.#", "transformer.blocks.#"
#     table = {"transformer.wte.weight": "transformer.embed.weight",
#              "transformer.ln_f.*": "transformer.ln_f.*",
#              "lm_head.*": "lm_head.*",
#              f"{h}.ln_1.*": f"{blocks}.ln_1.*",
#              f"{h}.mlp.fc_in.*": f"{blocks}.mlp.up_proj.*",
#              f"{h}.mlp.fc_out.*": f"{blocks}.mlp.down_proj.*",
#              f"{h}.attn.bias": None,
#              f"{h}.attn.masked_bias": None}
#     for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
#         table[f"{h}.attn.{part}.weight"] = f"{blocks}.attn.{part}.weight"
#     return table
# ```
#
# The list also says much about GPT-J. There is no `wpe`, so positions do not come from a table (GPT-J rotates q and k). There is one LayerNorm in a layer, because attention and MLP read the same input, in parallel. `lm_head` has a bias, so the head is not the embedding. The list does not say the scale of the scores, nor which dims rotate in which pairs.
#
# </details>

# %% tags=["wrong"]
def sibling_table():                                   # the MLP's two swapped
    h, blocks = "transformer.h.#", "transformer.blocks.#"
    table = {"transformer.wte.weight": "transformer.embed.weight",
             "transformer.ln_f.*": "transformer.ln_f.*", "lm_head.*": "lm_head.*",
             f"{h}.ln_1.*": f"{blocks}.ln_1.*", f"{h}.mlp.fc_in.*": f"{blocks}.mlp.down_proj.*",
             f"{h}.mlp.fc_out.*": f"{blocks}.mlp.up_proj.*",
             f"{h}.attn.bias": None, f"{h}.attn.masked_bias": None}
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        table[f"{h}.attn.{part}.weight"] = f"{blocks}.attn.{part}.weight"
    return table

# %% tags=["wrong"]
def sibling_table():                                   # order k, v, q taken for q, k, v
    h, blocks = "transformer.h.#", "transformer.blocks.#"
    table = {"transformer.wte.weight": "transformer.embed.weight",
             "transformer.ln_f.*": "transformer.ln_f.*", "lm_head.*": "lm_head.*",
             f"{h}.ln_1.*": f"{blocks}.ln_1.*", f"{h}.mlp.fc_in.*": f"{blocks}.mlp.up_proj.*",
             f"{h}.mlp.fc_out.*": f"{blocks}.mlp.down_proj.*",
             f"{h}.attn.bias": None, f"{h}.attn.masked_bias": None}
    for a, b in (("k", "q"), ("v", "k"), ("q", "v"), ("out", "out")):
        table[f"{h}.attn.{a}_proj.weight"] = f"{blocks}.attn.{b}_proj.weight"
    return table

# %% tags=["wrong"]
def sibling_table():                                   # the mask taken for a bias
    h, blocks = "transformer.h.#", "transformer.blocks.#"
    table = {"transformer.wte.weight": "transformer.embed.weight",
             "transformer.ln_f.*": "transformer.ln_f.*", "lm_head.*": "lm_head.*",
             f"{h}.ln_1.*": f"{blocks}.ln_1.*", f"{h}.mlp.fc_in.*": f"{blocks}.mlp.up_proj.*",
             f"{h}.mlp.fc_out.*": f"{blocks}.mlp.down_proj.*",
             f"{h}.attn.bias": f"{blocks}.attn.out_proj.bias", f"{h}.attn.masked_bias": None}
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        table[f"{h}.attn.{part}.weight"] = f"{blocks}.attn.{part}.weight"
    return table

# %% [markdown]
# ## 4. Loading without a second copy
#
# Many tutorials write `model = Model(config); model.load_state_dict(torch.load(path))`. For a moment this holds all weights twice: the random ones of the new model, and those of the file. Three steps avoid the second copy. The model is built on the *meta device*. The file is *mapped* into memory, so that bytes are read when they are first used. And each tensor *takes the place* of its parameter (`assign=True`) instead of being copied into it.

# %%
empty = on_meta(config)
print(empty.lm_head.weight.shape, empty.lm_head.weight.device, "\n")
show(load_weights.load_pretrained)

# %% [markdown]
# Three ways to load are measured below, each in a process of its own. The system reports the most memory that a process has had at any time, its peak. A small checkpoint is loaded first, so that the memory for imports is not counted. Every weight is then read once, since a mapped file that is never read needs no memory.

# %%
SCRIPT = """
import sys; sys.path[:0] = [".."]
import torch, transformers
from generate import peak_memory
from neo import GPTNeoConfig, GPTNeoForCausalLM
transformers.utils.logging.disable_progress_bar()

def tutorial(folder):
    model = GPTNeoForCausalLM(GPTNeoConfig.from_pretrained(folder))
    model.load_state_dict(torch.load(folder + "/ours.bin"))
    return model

def ours(folder):
    return GPTNeoForCausalLM.from_pretrained(folder)

def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")

load, small, large = globals()[sys.argv[1]], sys.argv[2], sys.argv[3]
load(small)
before = peak_memory(torch.device("cpu"))
total = sum(p.sum() for p in load(large).parameters())
print(peak_memory(torch.device("cpu")) - before)
"""

# %%
def random_checkpoint(folder, **changes):
    """Random weights in float32, in the official format and as torch.save writes them."""
    model = neo.GPTNeoForCausalLM(replace(config, **changes))
    model.save_pretrained(folder)
    torch.save(model.state_dict(), f"{folder}/ours.bin")

peaks = {}
with tempfile.TemporaryDirectory() as root:
    small, large = f"{root}/small", f"{root}/large"
    random_checkpoint(small, hidden_size=8, intermediate_size=8, vocab_size=8)
    random_checkpoint(large, hidden_size=640, intermediate_size=2560, num_heads=10,
                      vocab_size=16384)
    file_size = Path(f"{large}/model.safetensors").stat().st_size
    for way in ("tutorial", "ours", "theirs"):
        command = [sys.executable, "-c", SCRIPT, way, small, large]
        done = subprocess.run(command, capture_output=True, check=True)
        peaks[way] = int(done.stdout) / file_size

# %% alt="Three bars: building the model and copying the file into it needs twice the size of the file at its peak, from_pretrained of this project and of transformers about once."
bars(["Model(config), load_state_dict", "our from_pretrained", "transformers' from_pretrained"],
     list(peaks.values()), f"Peak memory of loading {file_size / 1e6:.0f} MB of weights",
     "sizes of the file")
print({way: round(peak, 2) for way, peak in peaks.items()})
assert max(peaks["ours"], peaks["theirs"]) < 1.3 < 1.7 < peaks["tutorial"]

# %% [markdown]
# Both `from_pretrained` functions need little more than one copy of the weights; the first way needs nearly two. For GPT-NeoX-20B in float16, one copy is 41 GB (section 11).
#
# ## 5. Tied or not
#
# GPT-Neo's output head *is* the embedding matrix, used a second time: the two are tied. So the file holds it once, and in memory it must be one parameter, not two with equal values. GPT-NeoX has two matrices.

# %%
ours = AutoModelForCausalLM.from_pretrained(NEO, attn_implementation="naive")
ours_x = AutoModelForCausalLM.from_pretrained(NEOX, attn_implementation="naive")
for model in (ours, ours_x):
    tied = model.lm_head.weight is model.transformer.embed.weight
    print(f"{type(model).__name__}: one parameter: {tied}, {model.num_parameters():,} weights")
    assert tied == (model is ours)

# %% [markdown]
# One parameter means one object, not only the same memory. Section 10 breaks this rule and shows that the forward pass does not notice it.
#
# ## 6. Equal?
#
# `compare.trace` runs a model, ours or that of transformers, and keeps what comes out of the embeddings, of every block and of the final norm, and the logits. The reference is transformers with its eager attention. Ours runs with `naive`, the definition of attention in the same order of operations. Both are in float32.
#
# **Predict:** how many of the seven rows have the same bits?

# %%
def reference(folder, dtype=torch.float32):
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()

# %%
theirs, theirs_x = reference(NEO), reference(NEOX)
right, right_x = compare.trace(ours, ids), compare.trace(ours_x, ids_x)
rows = compare.row_names(config)
for row, a, b in zip(rows, right, compare.trace(theirs, ids)):
    print(f"{row:27}{str(tuple(a.shape)):16} same bits: {torch.equal(a, b)}")
assert all(map(torch.equal, right_x, compare.trace(theirs_x, ids_x)))      # demo-neox too

# %% [markdown]
# Equality to the bit is possible because both do the same operations in the same order. It is the one test that needs no bound. A port to another framework, or with another kernel, adds numbers in another order and cannot reach it. It needs a *measure* and a *bound*, and both can be chosen badly.
#
# To choose them, we need models that are known to be right or wrong. `sdpa` is right and adds in another order. bfloat16 is right and rounds. The three wrong models have the same weights and a config that is wrong in one detail.

# %%
def rebuilt(model, **changes):
    """The same weights under another config."""
    other = type(model)(replace(model.config, **changes), "naive").eval()
    other.load_state_dict(model.state_dict())
    return other

# %%
sdpa = AutoModelForCausalLM.from_pretrained(NEO, attn_implementation="sdpa")
bfloat16 = AutoModelForCausalLM.from_pretrained(NEO, dtype=torch.bfloat16)
gelu, window = rebuilt(ours, activation_function="gelu"), rebuilt(ours, window_size=65)
swapped = rebuilt(ours, attention_types=[[["local", "global"], 2]])
print("windows of the last two:", window.config.windows, swapped.config.windows)

# %% [markdown]
# Five measures are compared:
# * the largest difference of a logit;
# * the relative difference |x − r| / |r|, with norms over the whole tensor;
# * the Kullback–Leibler divergence (KL) of the next-token distributions, in nats, as a mean over positions;
# * how often the likeliest token is the same;
# * the loss.
#
# **Predict:** which of the five separate the two right models from the three wrong ones?

# %%
def measures(x, r):
    """Five differences of logits x from the right ones, r."""
    found = compare.measure(x, r, None)
    log_p, log_q = r.double().log_softmax(-1), x.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    agree = (x.argmax(-1) == r.argmax(-1)).double().mean().item()
    return dict(max=found["max_abs"], relative=found["relative"], kl=kl, same=agree,
                loss=next_token_loss(x, ids).item())

# %%
models = {"the definition": ours, "right: sdpa, float32": sdpa, "right: bfloat16": bfloat16,
          "wrong: exact GELU": gelu, "wrong: window 65": window, "wrong: local first": swapped}
results = {name: measures(compare.trace(m, ids)[-1], right[-1]) for name, m in models.items()}
print(f"{'':20} max |Δ|  relative       KL   same token    loss")
for name, row in results.items():
    print(f"{name:20}{row['max']:8.1e}{row['relative']:10.1e}{row['kl']:9.1e}", end="")
    print(f"{row['same']:13.1%}{row['loss']:8.4f}")

# %%
base, exact, half, wrong = (results[name] for name in list(models)[:4])
assert wrong["same"] > half["same"] and wrong["max"] < half["max"]
assert wrong["relative"] < half["relative"] and 4e5 < 1 / wrong["kl"] < 6e5
assert sum(results[name]["loss"] < base["loss"] for name in list(models)[3:]) == 2
assert exact["relative"] < 1e-5 < wrong["relative"] > 1000 * exact["relative"]

# %% [markdown]
# The table is best read by columns.
# * **Same token.** The wrong GELU keeps more of the likeliest tokens than the right model in bfloat16 does. This measure sees a difference only where the two largest logits are close.
# * **Loss.** Two of the wrong models have a *lower* loss on this text than the right one. A loss says how good a model is, not whether it is the same.
# * **max |Δ|.** bfloat16, which is right, differs by more than the wrong GELU. So no fixed number of logits separates right from wrong.
# * **Relative.** In float32 the mildest mistake here differs more than 1000 times as much as the right model, and the bound 1e-5 lies between them. In bfloat16 the rounding is larger than that mistake. So: **check a port in float32 first, and by relative differences.**
# * **KL.** In float32 it separates the models too. The KL of the wrong GELU is very small: one would have to read about 1 / KL tokens, half a million, to collect one nat of evidence for one of the two models.
#
# **A deliberate mistake: a bound that depends on the size of the logits.** The logits of Pythia-70m are near 1000: `pythia` holds the first ten of [a test in transformers](https://github.com/huggingface/transformers/blob/main/tests/models/gpt_neox/test_modeling_gpt_neox.py). Most of them have one large number in common, an offset, which softmax does not see.
#
# **Predict:** we add that offset to all logits of the demo model and change nothing else. What happens to the absolute difference of the right model, and to the relative difference of the wrong one?

# %%
pythia = torch.tensor([1069, 228.75, 1072, 1072, 1069, 1068, 1068, 1071, 1071, 1071])
for name, model in (("right: sdpa", sdpa), ("wrong: exact GELU", gelu)):
    x, r = compare.trace(model, ids)[-1] + pythia.median(), right[-1] + pythia.median()
    row = measures(x, r)
    print(f"{name:18}", *(f"  {key} {row[key]:.1e}" for key in ("max", "relative", "kl")))
    assert row["max"] > 1e-5 > row["relative"]         # both verdicts are wrong

# %% [markdown]
# Both verdicts are wrong now. The right model fails an absolute bound of 1e-5, by rounding alone. The wrong one passes a relative bound of 1e-5, since the offset has made the denominator large. The remedy is to compare what softmax sees: distributions, or logits after their mean over the vocabulary has been subtracted. The hidden states are worth a comparison too, since no offset is free there.
#
# With a network, you can see the offset in the official weights. The transformers test above has the ten logits for this prompt.

# %%
if found := official("EleutherAI/pythia-70m"):
    logits = found[0](found[1]("My favorite food is", return_tensors="pt").input_ids).logits
    print(f"pythia-70m: mean of the logits {logits.mean():.0f}, spread {logits.std():.1f}")

# %% [markdown]
# ### Exercise 4.2 · A relative difference that an offset does not change
# Difficulty 1 of 5 · 5 minutes
#
# Write `centred_difference(x, reference)` for logits (B, T, V): |x − r| / |r| over the whole tensor, after the mean over the vocabulary has been subtracted from both, at each position. Compute in float64: the largest float16 is 65504, and a norm adds squares.

# %% tags=["stub"]
def centred_difference(x, reference):
    """Relative difference of what softmax can see, as a float."""
    ...

# %% tags=["check"]
with exercise("4.2"):
    def answer(x, r):
        found = centred_difference(x, r)
        assert found is not None, "nothing came (None), expected a number"
        return torch.as_tensor(found).item()
    x, r = compare.trace(gelu, ids)[-1].double(), right[-1].double()
    same(answer(r, r), 0, "the reference against itself")
    same(answer(2 * r, r), 1, "twice the reference against it", tolerance=1e-6)
    near, size = torch.tensor([[[1.0, 2, 6]]]), torch.tensor([[[1.0, 2, 3]]])
    same(answer(near, size), 3 ** 0.5, "logits 1, 2, 6 against 1, 2, 3", tolerance=1e-6)
    shift = 1000 * torch.arange(ids.shape[1])[:, None]                     # one for each position
    plain = answer(x, r)
    same(answer(x + shift, r + shift) / plain, 1, "with offsets, relative to without", 1e-3)
    same(answer(x + 1000, r) / plain, 1, "one side with an offset, relative to without", 1e-3)
    half = answer((1000 * x).half(), (1000 * r).half())
    assert 0 < half < 0.01, f"1000 times the logits in float16: came {half}, expected below 0.01"

# %% [markdown]
# <details><summary>Hint</summary>
#
# `t.mean(-1, keepdim=True)` keeps the shape that subtraction needs. First `double()`, then everything else.
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# def centred_difference(x, reference):
#     """Relative difference of what softmax can see, as a float."""
#     x, r = x.double(), reference.double()
#     x, r = x - x.mean(-1, keepdim=True), r - r.mean(-1, keepdim=True)
#     return ((x - r).norm() / r.norm()).item()
# ```
#
# </details>

# %% tags=["wrong"]
def centred_difference(x, reference):                  # one mean for the whole tensor
    x, r = x.double(), reference.double()
    x, r = x - x.mean(), r - r.mean()
    return ((x - r).norm() / r.norm()).item()

# %% tags=["wrong"]
def centred_difference(x, reference):                  # in the dtype of the logits
    x, r = x - x.mean(-1, keepdim=True), reference - reference.mean(-1, keepdim=True)
    return ((x - r).norm() / r.norm()).item()

# %% tags=["wrong"]
def centred_difference(x, reference):                  # only the difference is centred
    gap = x.double() - reference.double()
    return ((gap - gap.mean(-1, keepdim=True)).norm() / reference.double().norm()).item()

# %% [markdown]
# ## 7. Finding the culprit
#
# Suppose that the logits differ. The mistake need not be near the logits: every row after the mistake differs too. The *first* row that differs names the layer. Here are three patients: copies of the model, each with one part of one block broken.

# %%
def profile(model, right, ids):
    """Relative difference of every row of a trace."""
    traced = compare.trace(model, ids)
    return [compare.measure(x, r, None)["relative"] for x, r in zip(traced, right)]

def blocks(model):
    return model.transformer.blocks

# %%
first, second, third = (copy.deepcopy(ours) for _ in range(3))
blocks(first)[1].attn.window = 65
blocks(second)[2].attn.q_proj.weight.data *= config.head_dim ** -0.5
blocks(third)[3].mlp.act = F.gelu
patients = {"block 1: window 65": first, "block 2: scores / √D": second,
            "block 3: exact GELU": third}

# %% [markdown]
# **Predict:** for the patient with block 2 broken, which of the seven rows differ from the right model's?

# %% tags=["cover"] alt="Three lines on a log axis over the rows of the model: each is exactly 0 up to the block that was broken, jumps to about a thousandth or a hundredth there, and stays near that size."
sick = {name: profile(model, right, ids) for name, model in patients.items()}
differences(rows, sick, "The first row that differs is the block that was broken")
for i, gaps in enumerate(sick.values(), 2):            # rows: embeddings, block 0, block 1, ...
    assert not any(gaps[:i]) and min(gaps[i:]) > max(gaps[i:]) / 10

# %% [markdown]
# Every row before the broken block is equal to the bit, and every row from it on differs. The *size* of the difference does not help: from the broken block to the logits it changes by less than a factor of 10. That is why one looks for the first row that differs and not for the largest difference.
#
# The layer is known now. The first *position* that differs says more. Position 0 can attend only to itself, so a mistake in the scores cannot show there. A window that is too long shows at the first position with a key too many.
#
# `compare.py` does all this for a port in any language. The port saves what it computed for given ids, and the tool names the row, the position and what to look at. Here the first patient takes the role of the port.
#
# **Predict:** its window is 65 and not 64. Which position does the tool name?

# %%
with tempfile.TemporaryDirectory() as folder:
    compare.save_ours(f"{folder}/port.safetensors", ids, compare.trace(first, ids))
    compare.main([NEO, "--theirs", f"{folder}/port.safetensors"])

# %% [markdown]
# The next models have mistakes in all layers, of the kinds that a port can make. For GPT-Neo, most of them are a wrong config.

# %%
divided, shifted = copy.deepcopy(ours), copy.deepcopy(ours)
for block in blocks(divided):
    block.attn.q_proj.weight.data *= config.head_dim ** -0.5
positions = shifted.transformer.pos_embed.weight.data
positions.copy_(positions.roll(-1, 0))

MISTAKES = {"local layers first": swapped, "window one too long": window,
            "window one too short": rebuilt(ours, window_size=63),
            "all layers global": rebuilt(ours, attention_types=[[["global"], 4]]),
            "exact GELU for tanh": gelu, "scores divided by √D": divided,
            "positions from 1": shifted}

# %% [markdown]
# For GPT-NeoX, two of the mistakes are about order. They are planted here by reordering the rows of the QKV matrix. *Split in thirds*: the port takes the first third of the rows for q, although q, k and v are stored head by head. *Rotary pairs of neighbours*: the port rotates the dims in pairs (0, 1), (2, 3), … as GPT-J does, and not (0, 8), (1, 9), …

# %%
split, paired, one_norm = (copy.deepcopy(ours_x) for _ in range(3))
order = [*range(0, 16, 2), *range(1, 16, 2), *range(16, 64)]               # 16 of 64 dims rotate
for i in range(4):
    blocks(one_norm)[i].ln_2 = blocks(one_norm)[i].ln_1
    for name in ("weight", "bias"):                    # 4 heads, in each 64 rows of q, k, v
        rows_ = getattr(blocks(split)[i].attn.qkv_proj, name).data
        rows_.copy_(rows_.view(3, 4, 64, -1).transpose(0, 1).reshape(rows_.shape))
        rows_ = getattr(blocks(paired)[i].attn.qkv_proj, name).data.view(4, 3, 64, -1)
        rows_[:, :2] = rows_[:, :2, order]             # q and k; (0, 1), (2, 3), ... will turn

# %%
MISTAKES_X = {"QKV split in thirds": split, "rotary pairs of neighbours": paired,
              "one LayerNorm for both": one_norm,
              "rotary on all dims": rebuilt(ours_x, rotary_pct=1.0),
              "sequential residual": rebuilt(ours_x, use_parallel_residual=False),
              "tanh GELU for exact": rebuilt(ours_x, hidden_act="gelu_new")}

# %% [markdown]
# **Predict:** which of the thirteen mistakes change the logits by less than half a percent?

# %% alt="A dot for each of 13 mistakes and of two right models on a log axis: all mistakes lie above 1e-4, both right models below 1e-6; only the two wrong GELUs lie below 1e-3."
costs = {name: profile(model, right, ids)[-1] for name, model in MISTAKES.items()}
costs_x = {name: profile(model, right_x, ids_x)[-1] for name, model in MISTAKES_X.items()}
fine = {"transformers, eager": theirs, "ours, sdpa": sdpa}
fine = {name: profile(model, right, ids)[-1] for name, model in fine.items()}
ladder({"GPT-Neo": costs, "GPT-NeoX": costs_x, "right (GPT-Neo)": fine},
       "What each mistake changes, and three bounds", bounds=(1e-5, 1e-3, 1e-2));

# %%
wrong = {**costs, **costs_x}
for bound in (1e-2, 1e-3, 1e-5):
    passed = [name for name, cost in wrong.items() if cost < bound]
    print(f"a bound of {bound:.0e} lets pass:", ", ".join(passed) or "none of them")
gelus = [costs["exact GELU for tanh"], costs_x["tanh GELU for exact"]]
assert sorted(wrong.values())[:2] == sorted(gelus) and max(gelus) < 5e-3
assert max(fine.values()) < 1e-6 < 1e-5 < min(wrong.values())

# %% [markdown]
# A bound of 1e-5 finds all of these mistakes, and the right models are at least ten times below it. A bound of 1e-2 lets a wrong GELU pass in either family.
#
# Would a model with random weights do for such a test? **Predict:** a GPT-NeoX that has just been created shares one LayerNorm between attention and MLP, by mistake. How large is the difference?

# %%
fresh = neox.GPTNeoXForCausalLM(ours_x.config, "naive").eval()             # every norm is 1 and 0
truth = compare.trace(fresh, ids_x)
for block in blocks(fresh):
    block.ln_2 = block.ln_1
print("one LayerNorm for both, on fresh weights:", profile(fresh, truth, ids_x)[-1])
assert profile(fresh, truth, ids_x)[-1] == 0

# %% [markdown]
# There is no difference: in a new model every LayerNorm has weights 1 and biases 0, so the two *are* the same. `tests/test_mistakes.py` plants such mistakes in our own model, and uses random weights in which all norms and biases differ.
#
# With ipywidgets, the sliders below show every GPT-Neo mistake at every length of the text.

# %% tags=["interactive"]
from ipywidgets import interact
def mistake_at(mistake, T):
    truth = compare.trace(ours, ids[:, :T])
    lines = {mistake: profile(MISTAKES[mistake], truth, ids[:, :T])}
    differences(rows, lines, f"{mistake}, T = {T}")
    plt.show()
interact(mistake_at, mistake=list(MISTAKES), T=(1, ids.shape[1]));

# %% [markdown]
# ### Exercise 4.3 · The planted bug
# Difficulty 3 of 5 · 25 minutes
#
# `patient(1)` to `patient(5)` are demo-neo with one of four parts of one block broken. Write `locate(model)`. It returns the number of the block and the name of the part, `"ln_1"`, `"attn"`, `"ln_2"` or `"mlp"`. To find them, compare what comes out of the parts with what comes out of the same parts of the right model, `ours`. The block and the kind of damage are computed from the number, so everybody has the same five patients; the function is to find them without reading `patient`.

# %%
def patient(number):
    """demo-neo with one part broken; -> (model, (block, part))"""
    i, kind = random.Random(number + 3).randrange(4), 3 * number % 5
    model = copy.deepcopy(ours)
    block = blocks(model)[i]
    match kind:
        case 0: block.attn.window = 65
        case 1: block.mlp.act = F.gelu
        case 2: block.ln_1.eps = 1e-3
        case 3: block.ln_2.bias.data.zero_()
        case 4: block.attn.out_proj.bias.data.zero_()
    return model, (i, ("attn", "mlp", "ln_1", "ln_2", "attn")[kind])

# %% tags=["stub"]
def locate(model):
    """(block, name of its part) where the model first differs from `ours` on `ids`."""
    ...

# %% tags=["check"]
with exercise("4.3"):
    for number in range(1, 6):
        model, culprit = patient(number)
        same(locate(model), culprit, f"patient {number}")

# %% [markdown]
# <details><summary>Hint</summary>
#
# `module.register_forward_hook(function)` calls `function(module, args, output)` after every forward and returns a handle with `remove()`. An attention returns a pair, of which the first is the output. Collect `{(block, part): output}` of both models in the order in which the parts run, and look for the first pair that is not `torch.equal`.
#
# </details>
#
# <details><summary>Solution</summary>
#
# ```python
# @torch.no_grad()
# def locate(model):
#     """(block, name of its part) where the model first differs from `ours` on `ids`."""
#     def part_outputs(model):
#         """{(block, part): what came out of it}, in the order in which the parts run."""
#         seen, hooks = {}, []
#         for i, block in enumerate(blocks(model)):
#             for part in ("ln_1", "attn", "ln_2", "mlp"):
#                 def keep(module, args, out, key=(i, part)):
#                     seen[key] = out[0] if isinstance(out, tuple) else out
#                 hooks.append(getattr(block, part).register_forward_hook(keep))
#         model(ids)
#         for hook in hooks:
#             hook.remove()
#         return seen
#
#     good, bad = part_outputs(ours), part_outputs(model)
#     return next(key for key in good if not torch.equal(good[key], bad[key]))
# ```
#
# </details>

# %% tags=["wrong"]
def locate(model):                                     # the largest difference, not the first
    gaps = profile(model, right, ids)[1:-2]
    return gaps.index(max(gaps)), "attn"

# %% tags=["wrong"]
def locate(model):                                     # the right block, and always its attention
    gaps = profile(model, right, ids)[1:-2]
    return next(i for i, gap in enumerate(gaps) if gap), "attn"

# %% tags=["wrong"]
def locate(model):                                     # compares parameters: a window is none
    for i, (good, bad) in enumerate(zip(blocks(ours), blocks(model))):
        for part in ("ln_1", "attn", "ln_2", "mlp"):
            pairs = zip(getattr(good, part).parameters(), getattr(bad, part).parameters())
            if not all(torch.equal(a, b) for a, b in pairs):
                return i, part

# %% tags=["wrong"]
def locate(model):                                     # counts blocks from 1
    gaps = profile(model, right, ids)
    return next(i for i, gap in enumerate(gaps) if gap), "attn"

# %% [markdown]
# ## 8. Which lengths
#
# Everything above used a text of three windows.
#
# **Predict:** which of the six GPT-Neo mistakes below cannot be seen at all with a text of 64 tokens, one whole window?

# %% alt="Six lines on a log axis over the length of the text: local layers first, all layers global and a window too long are exactly 0 up to 64 tokens and jump up at 65; a window too short shows from 64 on."
six = ["local layers first", "all layers global", "window one too long", "window one too short",
       "exact GELU for tanh", "scores divided by √D"]
lengths = [1, 8, 16, 32, 48, 62, 63, 64, 65, 66, 70, 80, 96, 128, 160, ids.shape[1]]
lines = {name: [] for name in six}
for T in lengths:
    truth = compare.trace(ours, ids[:, :T])
    for name in six:
        lines[name].append(profile(MISTAKES[name], truth, ids[:, :T])[-1])
differences(lengths, lines, "Up to one window, three of the six mistakes change nothing",
            x="tokens of the text, T (not to scale)", edge=64);

# %%
for T in (1, 64, 65):
    unseen = [name for name in six if lines[name][lengths.index(T)] == 0]
    print(f"no trace at T = {T}:", ", ".join(unseen) or "none of them")
assert all(lines[name][lengths.index(64)] == 0 for name in six[:3])
assert min(line[lengths.index(65)] for line in lines.values()) > 1e-5
assert [first - 64 + 1 >= 64 for first in (0, 64, 128)] == [False, False, True]   # blocks of 64
print("compare.py, gpt-neo-125m:", compare.default_lengths(SHAPES["gpt-neo-125m"]))

# %% [markdown]
# A text of at most one window does not test local attention at all. It must be at least one token longer than the window. More than two windows are needed to test a fast kernel too: it skips blocks of keys that no query of a block can read, and with W = 64 and blocks of 64 the first queries that skip a whole block are those from 128 on. The window of the official models is 256 tokens, so a test sentence of a few words shows nothing. `compare.py` chooses its lengths around the window.
#
# ## 9. Precision
#
# Different bits alone are not a mistake. How large may the error of a *right* model be? We take float64 as the truth and measure the error of every model against it; the error of the definition itself is the standard. Weights in bfloat16 have fewer digits than the file, which is in float16; this loss is included. The truth is our own model in float64, not that of transformers: its GPT-Neo attention casts to float32, also when the model is in float64.

# %%
truths, texts = {}, {NEO: ids, NEOX: ids_x}
for folder, tokens in texts.items():
    how = dict(dtype=torch.float64, attn_implementation="naive")
    exact = AutoModelForCausalLM.from_pretrained(folder, **how)
    truths[folder] = compare.trace(exact, tokens)[-1]

# %%
def error(model, folder):
    """Relative error of the logits against float64."""
    x = compare.trace(model, texts[folder])[-1]
    return compare.measure(x, truths[folder], None)["relative"]

# %%
of_theirs = error(reference(NEO, torch.float64), NEO)
print(f"transformers in float64 against ours: {of_theirs:.1e}")
assert of_theirs > 1e-9                                # float64 alone would be near 1e-15

# %% [markdown]
# **Predict:** which changes the error more, the dtype or the implementation?

# %%
errors = {"ours, naive": {}, "ours, sdpa": {}, "transformers, eager": {}}
for folder in texts:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        label = f"{Path(folder).name} {str(dtype)[6:]}"
        for backend in ("naive", "sdpa"):
            how = dict(dtype=dtype, attn_implementation=backend)
            model = AutoModelForCausalLM.from_pretrained(folder, **how)
            errors[f"ours, {backend}"][label] = error(model, folder)
        errors["transformers, eager"][label] = error(reference(folder, dtype), folder)

# %%
print(f"{'error against float64':22}" + "".join(f"{name:>22}" for name in errors))
for label, own in errors["ours, naive"].items():
    print(f"{label:22}" + "".join(f"{column[label]:22.1e}" for column in errors.values()))
    assert errors["ours, sdpa"][label] < 2 * own       # theirs: the very same error as naive
    assert errors["transformers, eager"][label] == own
for folder in ("demo-neo", "demo-neox"):
    full, half, brain = (own for label, own in errors["ours, naive"].items()
                         if label.split()[0] == folder)
    assert 100 * full < half and 4 * half < brain

# %% [markdown]
# The dtype decides: float16 has more than 100 times the error of float32, and bfloat16 more than four times that of float16. `sdpa` stays within a factor of 2 of the definition in each of them. So a good rule for a faster path is: **its error against float64 is at most a small factor, here 2, times the error of the definition in the same dtype.** It needs no separate bound for each dtype, and it accepts a path that is *more exact* than the definition.
#
# ## 10. Gradients too
#
# For training, the gradients have to be compared too. A forward pass can be right while the backward pass is wrong: because of a `detach` in the wrong place, for instance, or of an embedding that is not tied. Here we compute one loss and one backward pass on both sides, and compare the gradients of all parameters.

# %%
def gradients_of(model):
    """The loss and every gradient on the speech, under official names."""
    model.zero_grad()
    return compare.gradients(model, ids, table)

grads, expected = gradients_of(ours), gradients_of(theirs)
equal = sum(torch.equal(grads[name], expected[name]) for name in expected)
print(f"loss and gradients: {equal} of {len(expected)} have the same bits")
assert grads.keys() == expected.keys() and equal == len(expected)

# %% [markdown]
# Now a model whose embedding is not tied. `assign=True` puts the same tensor in both places, but `tie_weights()` is forgotten. So there is one memory, but there are two parameters.
#
# **Predict:** are its logits the same, and are its gradients?

# %%
untied = on_meta(config).eval()
untied.load_state_dict(ours.state_dict(), assign=True)
untied.set_attn_implementation("naive")
head, embed = untied.lm_head.weight, untied.transformer.embed.weight
print("same memory:", head.data_ptr() == embed.data_ptr(), " same parameter:", head is embed)
assert torch.equal(compare.trace(untied, ids)[-1], right[-1])          # forward: the same bits
mine = gradients_of(untied)
for name in grads:
    if not torch.equal(mine[name], grads[name]):
        print(f"{name}: {compare.measure(mine[name], grads[name], None)['relative']:.0%} off")
        assert name == "transformer.wte.weight"

# %%
untied.double()
head, embed = untied.lm_head.weight, untied.transformer.embed.weight
print("after a cast, the same memory:", head.data_ptr() == embed.data_ptr())
assert head.data_ptr() != embed.data_ptr()

# %% [markdown]
# The logits are the same to the bit. The gradient of the embedding is wrong, and it is the only one: what comes through the head is missing. After a cast there are two matrices in memory, and training would change them separately. A comparison of outputs does not show this mistake; a comparison of gradients does.
#
# ## 11. Twenty billion weights, without memory
#
# Names and shapes can be checked before anything is downloaded. On the meta device, GPT-NeoX-20B needs no memory for its weights. Their number can be computed from the config: two matrices of V × C for the vocabulary; in each of L layers 4C² for attention, 8C² for the MLP and 13C for biases and norms; and 2C for the last norm.

# %%
big, L, C, V = on_meta(SHAPES["gpt-neox-20b"]), 44, 6144, 50432
assert all(p.is_meta for p in big.parameters())        # no memory behind any of them
assert big.num_parameters() == 2 * V * C + L * (12 * C * C + 13 * C) + 2 * C == 20_554_567_680
names = load_weights.official_names(big.state_dict(), NAMES["gpt_neox"])
print(f"{2 * big.num_parameters() / 1e9:.1f} GB in float16, {len(names)} tensors, for example")
print(*((name, tuple(names[name].shape)) for name in list(names)[3:5]), sep="\n")

# %% [markdown]
# ## In three sentences
#
# A loader must know every name of the file and raise an error for each tensor that is missing or unexpected, since the loss can stay nearly the same without it. Two implementations are compared in float32, by relative differences of every layer, on a text longer than two windows, and the first row that differs names the layer with the mistake. Where the bits cannot be equal, float64 is the truth, and the error of the definition in the same dtype says how much is allowed.
#
# ## Further
#
# * `python compare.py CHECKPOINT --gradients --plot layers.png` does the same from the command line; with `--theirs` it compares the numbers that a port has saved.
# * `load_weights.weight_files` and `read_bin` read what this notebook left out: checkpoints in several files with an index, and old pickled files, without running code from them.
# * `tests/test_cache.py` checks every step of generation with the cache, across the edge of the window.
# * `tests/test_mistakes.py` plants each mistake in our own model and demands that the tests fail.
# * [The safetensors format](https://github.com/huggingface/safetensors). EleutherAI's own converter is `tools/ckpts/convert_neox_to_hf.py` in [EleutherAI/gpt-neox](https://github.com/EleutherAI/gpt-neox).
