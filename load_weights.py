"""Load official checkpoints, and save them for transformers.

    NAMES             two flat tables: checkpoint name -> our name
    load_pretrained   folder or hub id -> model, with one copy of the weights in memory
    save_pretrained   model -> folder that transformers and this project both read
    AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
                      choose the class by config.json

The model is built on the meta device, where tensors have shapes but no memory, and each tensor of
the files replaces its parameter (`assign=True`).  safetensors are mapped from disk, not read: a
weight takes memory when it is first used.
"""

import contextlib
import json
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import quantize
from bin_files import read_bin
from files import error_line, fetch, plain, read_json, shown, write_files
from originals import original_config, original_files, read_original
from originals.flax import write_flax
from parallel import add_up, check_connected, check_parts, cut, piece
from transformers_arguments import HUB, loading_options, settings_dict

# The names in EleutherAI's files on the hub -> our names.  '#' stands for the layer number, '*' for
# weight or bias.  None means that the name is known and ignored; a name without a rule is an error.
GPT_NEO = {
    "transformer.wte.weight":                          "transformer.embed.weight",
    "transformer.wpe.weight":                          "transformer.pos_embed.weight",
    "transformer.h.#.ln_1.*":                          "transformer.blocks.#.ln_1.*",
    "transformer.h.#.attn.attention.q_proj.weight":    "transformer.blocks.#.attn.q_proj.weight",
    "transformer.h.#.attn.attention.k_proj.weight":    "transformer.blocks.#.attn.k_proj.weight",
    "transformer.h.#.attn.attention.v_proj.weight":    "transformer.blocks.#.attn.v_proj.weight",
    "transformer.h.#.attn.attention.out_proj.*":       "transformer.blocks.#.attn.out_proj.*",
    "transformer.h.#.ln_2.*":                          "transformer.blocks.#.ln_2.*",
    "transformer.h.#.mlp.c_fc.*":                      "transformer.blocks.#.mlp.up_proj.*",
    "transformer.h.#.mlp.c_proj.*":                    "transformer.blocks.#.mlp.down_proj.*",
    "transformer.ln_f.*":                              "transformer.ln_f.*",
    "lm_head.weight":                                  "lm_head.weight",
    "score.weight":                                    "score.weight",     # the three task heads
    "classifier.*":                                    "classifier.*",
    "qa_outputs.*":                                    "qa_outputs.*",
    "transformer.h.#.attn.attention.bias":             None,   # the causal mask, saved as a buffer
    "transformer.h.#.attn.attention.masked_bias":      None,   # the constant -1e9
}
GPT_NEOX = {
    "gpt_neox.embed_in.weight":                        "transformer.embed.weight",
    "gpt_neox.layers.#.input_layernorm.*":             "transformer.blocks.#.ln_1.*",
    "gpt_neox.layers.#.attention.query_key_value.*":   "transformer.blocks.#.attn.qkv_proj.*",
    "gpt_neox.layers.#.attention.dense.*":             "transformer.blocks.#.attn.out_proj.*",
    "gpt_neox.layers.#.post_attention_layernorm.*":    "transformer.blocks.#.ln_2.*",
    "gpt_neox.layers.#.mlp.dense_h_to_4h.*":           "transformer.blocks.#.mlp.up_proj.*",
    "gpt_neox.layers.#.mlp.dense_4h_to_h.*":           "transformer.blocks.#.mlp.down_proj.*",
    "gpt_neox.final_layer_norm.*":                     "transformer.ln_f.*",
    "embed_out.weight":                                "lm_head.weight",
    "lm_head.weight":                                  "lm_head.weight",   # in memory, since 5.14
    "score.weight":                                    "score.weight",     # the three task heads
    "classifier.*":                                    "classifier.*",
    "qa_outputs.*":                                    "qa_outputs.*",
    "gpt_neox.layers.#.attention.bias":                None,   # the causal mask, saved as a buffer
    "gpt_neox.layers.#.attention.masked_bias":         None,   # the constant -1e9
    "gpt_neox.layers.#.attention.rotary_emb.inv_freq": None,   # rounded in some files: recomputed
}
NAMES = {"gpt_neo": GPT_NEO, "gpt_neox": GPT_NEOX}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)      # what weights may be
HEADS = ("lm_head", "score", "classifier", "qa_outputs")

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json",
                "flax_model.msgpack", "flax_model.msgpack.index.json")
FLAX_FIRST = (*WEIGHT_FILES[-2:], *WEIGHT_FILES[:-2])     # the order in which the Flax classes look


# ------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------

def translate(name, rules):
    """The name on the right side of a table for one on its left side, with '#' and '*' filled in.

    Returns None for a name to ignore; raises KeyError if no rule fits.
    """
    stem, _, part = name.rpartition(".")
    if part in quantize.PARTS:                        # the three that a quantized matrix is made of
        other = translate(f"{stem}.weight", rules)
        return other and other.removesuffix("weight") + part
    layer = re.search(r"\.(\d+)\.", name)
    pattern = name.replace(layer[0], ".#.", 1) if layer else name
    stem, _, tail = pattern.rpartition(".")
    if pattern not in rules and tail in ("weight", "bias"):
        pattern = f"{stem}.*"
    other = rules[pattern]
    return other and other.replace("#", layer[1] if layer else "#").replace("*", tail)


def our_name(name, table):
    """Our name of a tensor in a checkpoint, or None to ignore it.  KeyError if no rule fits."""
    base = next(iter(table)).split(".")[0]                # "transformer" or "gpt_neox"
    for full in (name, f"{base}.{name}"):                 # base models are saved without the prefix
        with contextlib.suppress(KeyError):
            return translate(full, table)
    raise KeyError(name)


def official_names(state, table):
    """{our name: tensor} -> {checkpoint name: tensor}, by the same table in reverse.

    Raises ValueError, with the name, for a tensor that no official checkpoint has.
    """
    back = {ours: theirs for theirs, ours in reversed(table.items())}    # the first spelling wins
    named = {}
    for name, tensor in state.items():
        try:
            named[translate(name, back)] = tensor
        except KeyError:
            raise ValueError(f"the official format has no tensor for {plain(name)}: take out of "
                             "the model what was added to it (torch.nn.utils.prune.remove, "
                             "parametrize.remove_parametrizations), or save its state_dict with "
                             "torch.save") from None
    return named


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

def read_config(name_or_folder, revision=None, **hub):
    """The contents of config.json; ValueError if its model_type is neither of the two families."""
    raw, path = original_config(name_or_folder, read_bin), Path(name_or_folder, "config.json")
    if raw is None:
        path = fetch(name_or_folder, "config.json", revision, **hub)
        raw = read_json(path)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in NAMES:
        raise ValueError(f"{path}: config field 'model_type' is {shown(family)}; "
                         f"supported: {', '.join(NAMES)}")
    return raw


def weight_files(name_or_folder, revision=None, use_safetensors=None, names=WEIGHT_FILES, **hub):
    """Paths of all files that hold weights: safetensors before .bin, one file before shards.

    use_safetensors: True looks for these alone, False for .bin alone.
    names: what to look for, in this order.
    """
    looked_for = [name for name in names
                  if use_safetensors is None
                  or (".safetensors" if use_safetensors else ".bin") in name]
    for filename in looked_for:
        path = fetch(name_or_folder, filename, revision, required=False, **hub)
        if path is not None and filename.endswith(".index.json"):
            return shards(path, name_or_folder, revision, hub)
        if path is not None:
            return [path]
    if use_safetensors is None and (paths := original_files(name_or_folder, read_bin)):
        return paths
    where = ""
    if not Path(name_or_folder).is_dir():
        where = " on the hub (or in its cache, if it is out of reach)"
    raise FileNotFoundError(f"no weights in {name_or_folder}{where}: looked for "
                            f"{', '.join(looked_for)}")


def shards(index, name_or_folder, revision, hub):
    """Paths of the files that an index names, all of them beside it."""
    weight_map = read_json(index).get("weight_map")
    if (not isinstance(weight_map, dict) or not weight_map
            or not all(isinstance(f, str) for f in weight_map.values())):
        raise ValueError(f"{index} has no 'weight_map' of tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise ValueError(f"{index} names a shard outside its folder: {shown(name)}")
        if Path(name).suffix not in (".safetensors", ".bin", ".msgpack"):
            raise ValueError(f"{index} names a shard that is neither .safetensors nor .bin: "
                             f"{shown(name)}")
    try:
        return [fetch(name_or_folder, name, revision, **hub) for name in names]
    except OSError as error:                               # a name that is too long is another kind
        raise FileNotFoundError(f"{index} names a shard that is missing: "
                                f"{error_line(error)}") from None


def read_tensors(path, apart=False):
    """Yield (name, tensor) of one weight file, mapped from disk rather than read where possible.

    apart: map each tensor by itself, so that its pages leave the memory when it is deleted.
    """
    if Path(path).suffix in (".msgpack", ".index", ".pt"):
        yield from read_original(path, read_bin)
        return
    if Path(path).suffix != ".safetensors":
        yield from read_bin(path).items()
        return
    name = None
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            if not apart:
                for name in names:
                    yield name, file.get_tensor(name)
        for name in names if apart else ():
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
            yield name, tensor
            del tensor
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error_line(error)}): "
                         "get it again") from None
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:  # a dtype that torch lacks
        raise ValueError(f"{path}: tensor {plain(name)} cannot be read "
                         f"({error_line(error)})") from None


# ------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------

def load_pretrained(cls, name_or_folder, *, revision=None, torch_dtype=None, dtype=None,
                    device=None, attn_implementation="auto", weights=None, raw=None, changes=None,
                    names=WEIGHT_FILES):
    """Load a model of the class `cls`: from_pretrained of every model, see base.PreTrainedModel.

    raw: the contents of config.json, if they have been read already.
    changes: transformers' other arguments (transformers_arguments.LOADING) and fields of the config
    to set.  names: the files of weights to look for, in order.
    """
    changes = dict(changes or {})
    shared = take_sharing(changes)
    hub, use_safetensors, device = loading_options(changes, device)
    raw = with_changes(read_config(name_or_folder, revision, **hub) if raw is None else raw,
                       changes, cls)
    weights, stored, raw = quantize.what_to_load(raw, weights)
    config = make_config(cls, name_or_folder, raw)
    dtype = choose_dtype(torch_dtype, dtype, raw, name_or_folder)
    generation_config, where = read_generation_config(name_or_folder, revision, raw, cls, hub)
    if stored:
        paths = [fetch(name_or_folder, quantize.FILE, revision, **hub)]
    else:
        paths = weight_files(name_or_folder, revision, use_safetensors, names, **hub)
    if shared:
        check_sharing(name_or_folder, config, weights if stored else None)

    with torch.inference_mode(False):          # tensors of inference mode could not be trained
        with torch.device("meta"), NoInit():
            model = cls(config, "auto" if attn_implementation is None else attn_implementation)
        state = read_state(name_or_folder, paths, model, dtype, device, weights, stored, shared)
        model.load_state_dict(state, strict=True, assign=True)
    if shared:
        add_up(model)
    if hasattr(model, "tie_weights") and not weights:      # integers are the head's own
        model.tie_weights()
    model.generation_config.update(generation_config)
    vars(model.generation_config)["file"] = where
    return model.eval()


def take_sharing(changes):
    """Take tp_plan, transformers' name for tensor parallelism, out of `changes`: "auto" or None.

    Raises ValueError for another value, RuntimeError for "auto" if no processes are connected.
    """
    shared = changes.pop("tp_plan", None)
    if shared not in (None, "auto"):
        raise ValueError(f"tp_plan={shown(shared)} is not supported: 'auto' shares the model among "
                         "the processes of torchrun, None does not")
    if shared:
        check_connected()
    return shared


def check_sharing(name_or_folder, config, stored_as):
    """Raise ValueError for a model that cannot be shared among the processes."""
    if stored_as:
        raise ValueError(f"{name_or_folder} is stored as {stored_as}, which cannot be shared among "
                         "processes: take the checkpoint that it was made from, with "
                         f"weights={stored_as!r}")
    check_parts(config)


def make_config(cls, name_or_folder, raw):
    """The config of a model class from the contents of config.json.

    Raises ValueError for a checkpoint of the other family and for a value that is not supported.
    """
    family = cls.config_class.model_type
    if raw["model_type"] != family:
        raise ValueError(f"{name_or_folder} is a {raw['model_type']} checkpoint, {cls.__name__} "
                         f"loads {family}: use AutoModelForCausalLM to have the class chosen")
    try:
        return cls.config_class.from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{name_or_folder}/config.json: {error}") from None


def with_changes(raw, changes, cls):
    """The contents of a config.json with some fields changed; ValueError for an unknown field."""
    known = {*cls.config_class.__dataclass_fields__, "label2id"}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"{cls.__name__}.from_pretrained takes no {', '.join(unknown)}, and "
                         f"{cls.config_class.__name__} has no such field")
    stale = set()                                          # fields of the file that are replaced
    if {"num_labels", "id2label"} & set(changes):
        stale |= {"num_labels", "id2label", "label2id"}
    if "attention_types" in changes:
        stale.add("attention_layers")
    return {name: value for name, value in raw.items() if name not in stale} | changes


def read_generation_config(name_or_folder, revision, raw, cls, hub):
    """A checkpoint's settings for generate, and the file that has them, for error messages.

    As in transformers: if there is a generation_config.json, only that counts, and if it has no
    eos_token_id, generation does not stop at one.  Otherwise the settings may be in config.json
    (raw), as in files from before 2023.
    """
    path = fetch(name_or_folder, "generation_config.json", revision, required=False, **hub)
    if path is not None:
        return read_json(path) or {"eos_token_id": None}, str(path)
    names = getattr(getattr(cls, "generate", None), "settings", ())
    settings = {name: raw[name] for name in names if raw.get(name) is not None}
    if settings.keys() <= {"bos_token_id", "eos_token_id", "pad_token_id"}:
        settings = {}                                      # the model's own config has these
    return settings, f"{name_or_folder}/config.json"


class NoInit(TorchFunctionMode):
    """A context in which the functions of torch.nn.init do nothing.

    Loading replaces their values, and on the meta device normal_ would import modules of 150 MB.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def choose_dtype(torch_dtype, dtype, raw, folder=None):
    """The dtype that either argument names; None for "auto" if the config names none."""
    asked = {parse_dtype(given, raw, folder) for given in (torch_dtype, dtype) if given is not None}
    if len(asked) > 1:
        raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype} contradict each "
                         "other: give one")
    return asked.pop() if asked else torch.float32


def parse_dtype(dtype, raw, folder):
    """A dtype or its name -> the dtype; "auto" -> the config's, or None if it names none."""
    wrong = "dtype must be 'auto',"
    if dtype == "auto":
        field = "dtype" if raw.get("dtype") else "torch_dtype"
        dtype, wrong = raw.get(field), f"{folder}/config.json: config field {field!r} must be"
        if dtype is None:
            return None
    numpy = sys.modules.get("numpy")                       # a numpy dtype needs a loaded numpy
    if numpy and not isinstance(dtype, (str, torch.dtype)):        # numpy's and JAX's dtypes
        with contextlib.suppress(TypeError):
            dtype = numpy.dtype(dtype).name
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in FLOATS:
        raise ValueError(f"{wrong} float32, float16, bfloat16 or float64, got "
                         f"{shown(dtype)}")
    return found


def read_state(name_or_folder, paths, model, dtype, device, kind=None, stored=False, shared=None):
    """{our name: tensor} for exactly the model's parameters, each converted when it is read.

    dtype: None means that of the first weight.  kind, stored, shared: see prepare.  A missing task
    head is initialized randomly.  Raises one ValueError that lists all missing, unexpected and
    misfitting tensors.
    """
    table = NAMES[model.config.model_type]
    wanted, integers = prepare(model, kind, stored, shared)
    tied = "lm_head.weight" in wanted and model.config.tie_word_embeddings
    inside = "" if hasattr(model, "transformer") else "transformer."       # a base model by itself
    state, seen, problems = {}, set(), []
    for name, tensor in tensors_of(paths, "quantizing" if integers else "loading",
                                   bool(integers or shared)):
        if (ours := name_in_model(name, table, wanted, inside)) is None:
            continue
        if problem := misfit(name, tensor, ours, wanted, seen):
            problems.append(problem)
        else:
            dtype = dtype or tensor.dtype
            kept = piece(ours, tensor, model.config) if shared else tensor
            rounds = ours in integers and not (tied and ours == "lm_head.weight")
            problems += add_tensor(state, name, ours, kept, dtype, device, kind if rounds else None)
        seen.add(ours)
    if tied:
        problems += tie(state)
        seen.add("lm_head.weight")
        if "lm_head.weight" in integers and "lm_head.weight" in state:
            problems += add_tensor(state, "lm_head.weight", "lm_head.weight",
                                   state.pop("lm_head.weight"), dtype, device, kind)
    if model.head is not None and not any(name.startswith(model.head) for name in seen):
        state |= (fresh := fresh_head(model, wanted, dtype or torch.float32, device,
                                      name_or_folder))
        seen |= set(fresh)
    problems += missing_tensors(wanted, seen, table, inside)
    if problems:
        raise ValueError(f"the weights in {name_or_folder} do not fit its config.json: "
                         f"{problem_text(problems, table)}")
    return state


def prepare(model, kind, stored, shared):
    """Give an empty model its layers for loading -> (the tensors to read, names to quantize).

    shared: cut the model to this process's share; of each tensor only that share will be kept.
    kind: replace the linear layers by quantized ones.  Their integers are in the files if `stored`;
    otherwise they are made from the weights, whose names are returned.
    The tensors are {our name: tensor on the meta device}, which tells the shape and the dtype.
    """
    wanted, integers = model.state_dict(), set()
    if shared:
        cut(model)
    if kind:
        integers = {f"{name}.weight" for name in quantize.replace_layers(model, kind)}
    return (model.state_dict(), set()) if stored else (wanted, integers)


def name_in_model(name, table, wanted, inside):
    """The model's name of a checkpoint's tensor; "" for an unknown one, None for one to ignore.

    A model without a language model head ignores the heads of other tasks.
    inside: what our names have in front of those of a base model, "transformer." or nothing.
    """
    try:
        ours = our_name(name, table)
    except KeyError:
        return ""
    if ours is None:
        return None
    other_head = ours.split(".")[0] in HEADS and ours not in wanted
    if other_head and "lm_head" not in {key.split(".")[0] for key in wanted}:
        return None
    return ours.removeprefix(inside)


def tensors_of(paths, doing, apart):
    """Yield (name, tensor) of all files, with a progress bar that says `doing`.

    apart: map each tensor by itself.  A model that keeps something smaller of each tensor needs
    this, because otherwise all pages that were read would stay in memory.
    """
    for path in paths:
        yield from tqdm(read_tensors(path, apart), desc=f"{doing} {path.name}",
                        unit=" tensors", leave=False, disable=None)


def add_tensor(state, name, ours, tensor, dtype, device, kind):
    """Add a tensor to the state: in the model's dtype or, with a kind, as a quantized matrix.

    Returns a list of problems, which names the tensor as the file does if it cannot be quantized.
    """
    stem, _, part = ours.rpartition(".")
    if not kind:
        state[ours] = tensor.to(device=device, dtype=quantize.PARTS.get(part, dtype))
        return []
    try:
        parts = quantize.quantize(tensor, kind)
    except ValueError as error:
        return [f"tensor {plain(name)} cannot become integers: {error}"]
    state.update((f"{stem}.{part}", x.to(device)) for part, x in zip(quantize.PARTS, parts))
    return []


QUANTIZED = {"GPTQ or AWQ": (".qweight", ".qzeros", ".g_idx"),
             "bitsandbytes": (".SCB", ".absmax", ".quant_map", ".weight_format"),
             "another tool": (".weight_scale", ".scales", ".zero_point", ".weight_packed")}


def problem_text(problems, table):
    """The problems as a text: one line for a common cause, otherwise the first ten and a count."""
    unexpected = [problem.split()[2] for problem in problems
                  if problem.startswith("unexpected tensor ")]
    for tool, endings in QUANTIZED.items():
        if any(name.endswith(endings) for name in unexpected):
            return f"they were quantized by {tool}, which this project does not read"
    prefix = unexpected[0].split(".")[0] + "." if len(unexpected) > 1 else "?"
    wrapped = len(unexpected) > 1 and all(n.startswith(prefix) and not known(n, table)
                                          for n in unexpected)
    if wrapped and any(known(rest, table) for rest in shorter_names(unexpected[0])):
        origin = {"module.": "saved from DataParallel: save model.module instead",
                  "_orig_mod.": "saved from torch.compile: save model._orig_mod instead"}
        where = origin.get(prefix, "saved from a wrapper of the model")
        return (f"every name begins with '{prefix}' ({where}, "
                "or take it off the names)")
    if len(problems) == 1:
        return problems[0]
    more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
    return "\n  " + "\n  ".join(problems[:10] + more)


def known(name, table):
    """Does the table have a rule for this name?"""
    with contextlib.suppress(KeyError):
        our_name(name, table)
        return True
    return False


def shorter_names(name):
    """Yield the name without its first parts: "a.b.c" -> "b.c", "c"."""
    while "." in name:
        name = name.split(".", 1)[1]
        yield name


def missing_tensors(wanted, seen, table, inside):
    """A problem, under the official name, for each wanted tensor that was not seen in the files."""
    official = official_names({inside + name: name for name in wanted}, table)
    return [f"missing tensor {name} {tuple(wanted[ours].shape)}" for name, ours in official.items()
            if ours not in seen]


def fresh_head(model, wanted, dtype, device, name_or_folder):
    """{name: tensor} of a task head with random weights, as init_weights draws them.

    A warning names these weights.
    """
    fresh = {name: torch.zeros(p.shape) for name, p in wanted.items()
             if name.startswith(f"{model.head}.")}
    fresh[f"{model.head}.weight"].normal_(std=model.config.initializer_range)
    warnings.warn(f"{', '.join(fresh)}: not in {name_or_folder}, so drawn at random: train "
                  "the model before you use it", stacklevel=5)
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in fresh.items()}


def misfit(name, tensor, ours, wanted, seen):
    """Why a tensor of a file does not fit into the model, or None if it does."""
    shape = tuple(tensor.shape)
    if ours not in wanted:
        return f"unexpected tensor {plain(name)} {shape}"
    if ours in seen:
        return f"tensor {name} is there twice, under two names or in two files"
    if shape != tuple(wanted[ours].shape):
        return f"tensor {name} has shape {shape}, expected {tuple(wanted[ours].shape)}"
    if (part := ours.rpartition(".")[2]) in quantize.PARTS:
        right = quantize.PARTS[part]
        if tensor.dtype == right:
            return None
        return f"tensor {name} holds {tensor.dtype}, expected {right}"
    if tensor.dtype not in FLOATS:                        # quantized elsewhere, or a damaged header
        return (f"tensor {name} holds {tensor.dtype}, expected floating point: "
                "float32, float16, bfloat16 or float64")
    return None


def tie(state):
    """Make a tied head the embedding; return a problem if the file has two different ones."""
    embed, head = state.get("transformer.embed.weight"), state.get("lm_head.weight")
    if embed is None:
        return []
    state["lm_head.weight"] = embed
    if head is None or torch.equal(head, embed):
        return []
    return ["the tensor of the head differs from the embedding, but config field "
            "'tie_word_embeddings' is true"]


# ------------------------------------------------------------------------------------------------
# Saving
# ------------------------------------------------------------------------------------------------

def save_pretrained(model, folder):
    """Write config.json, generation_config.json and model.safetensors into `folder`.

    The last is quantize.FILE for a quantized model, which only this project reads.  All files are
    written or none (files.write_files).  `folder` may be the one that the weights are mapped from.
    """
    if model.shares > 1:
        raise ValueError(f"this process has only a part of the weights, which {model.shares} "
                         "processes share: save from a model that is loaded whole")
    if empty := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise ValueError(f"{len(empty)} tensors have no values (device meta), among them "
                         f"{empty[0]}: load the weights before saving")
    kind, quantized = quantize.kind_of(model), {}
    if kind:
        quantized = {"quantization_config": quantize.description(kind)}
        quantize.check_folder(folder, WEIGHT_FILES)
    state, file = official_state(model), quantize.FILE if kind else "model.safetensors"
    write_files(folder, {
        file: lambda path: save_file(state, path, metadata={"format": "pt"}),
        **settings_files(model, type(model).__name__, model.dtype, **quantized)},
        obsolete=old_shards(folder))


def old_shards(folder):
    """Names of an index of safetensors shards in the folder, and of the shards that it names.

    Some programs would read these in place of a model.safetensors beside them.
    """
    index = Path(folder) / "model.safetensors.index.json"
    if not index.is_file():
        return []
    return [index.name, *(path.name for path in sorted(Path(folder).iterdir())
                          if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", path.name))]


def save_flax(model, state, folder):
    """Write config.json, generation_config.json and flax_model.msgpack for a model of neo_jax.py.

    state: {our name: tensor}.
    """
    inside = "" if "transformer.embed.weight" in state else "transformer."
    named = official_names({inside + name: tensor for name, tensor in state.items()}, GPT_NEO)
    named = {name.removeprefix(inside): tensor for name, tensor in named.items()}
    dtype = next(iter(named.values())).dtype
    write_files(folder, {"flax_model.msgpack": lambda path: write_flax(path, named),
                         **settings_files(model, type(model).__name__.removeprefix("Flax"), dtype)})


def settings_files(model, architecture, dtype, **more):
    """{name: content} of generation_config.json and config.json; write_files needs this order."""
    config = {"architectures": [architecture], **model.config.to_dict(),
              "torch_dtype": str(dtype).removeprefix("torch."), **more}
    generation = settings_dict(model.generation_config) or {
        k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config[k] is not None}
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in (
        ("generation_config.json", generation), ("config.json", config))}


def official_state(model):
    """{checkpoint name: tensor} as in transformers: no tied head, no prefix on a base model."""
    table = NAMES[model.config.model_type]
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if not hasattr(model, "transformer"):
        named = official_names({f"transformer.{name}": tensor for name, tensor in state.items()},
                               table)
        return unshared({name.split(".", 1)[1]: tensor for name, tensor in named.items()})
    if "lm_head.weight" in state and model.config.tie_word_embeddings:
        if tie(state):
            raise ValueError("lm_head.weight is no longer the embedding, but config field "
                             "'tie_word_embeddings' is true: the files could not hold both")
        del state["lm_head.weight"]
    return official_names(unshared(state), table)


def unshared(state):
    """The tensors, each in its own memory: safetensors refuses tensors that share memory."""
    times = Counter(tensor.data_ptr() for tensor in state.values())
    return {name: tensor.clone() if times[tensor.data_ptr()] > 1 else tensor
            for name, tensor in state.items()}


# ------------------------------------------------------------------------------------------------
# Choosing the class
# ------------------------------------------------------------------------------------------------

class AutoModelForCausalLM:
    """GPTNeoForCausalLM or GPTNeoXForCausalLM, as config.json's model_type says."""

    kind = "CausalLM"

    @classmethod
    def from_pretrained(cls, name_or_folder, **kwargs):
        """Arguments and errors are base.PreTrainedModel.from_pretrained's."""
        import neo
        import neox
        hub = {name: kwargs[name] for name in HUB if name in kwargs}
        raw = read_config(name_or_folder, kwargs.get("revision"), **hub)
        module, name = {"gpt_neo": (neo, "GPTNeoFor"),
                        "gpt_neox": (neox, "GPTNeoXFor")}[raw["model_type"]]
        named = ("revision", "torch_dtype", "dtype", "device", "attn_implementation", "weights")
        given = {name: kwargs.pop(name) for name in named if name in kwargs}
        return load_pretrained(getattr(module, name + cls.kind), name_or_folder, raw=raw,
                               changes=kwargs, **given)


class AutoModelForSequenceClassification(AutoModelForCausalLM):
    """The classifier of texts of either family, chosen in the same way."""

    kind = "SequenceClassification"


class AutoTokenizer:
    """The tokenizer class that the checkpoint's files name, else that of config.json's model_type.

    As in transformers, tokenizer_class in tokenizer_config.json comes first, then the one in
    config.json, so that a folder may hold a tokenizer alone.
    """

    @staticmethod
    def from_pretrained(name_or_folder, *, revision=None, **kwargs):
        """Arguments and errors are tokenizer.Tokenizer.from_pretrained's."""
        from tokenizer import class_named
        hub = {name: kwargs[name] for name in HUB if name in kwargs}
        path = fetch(name_or_folder, "tokenizer_config.json", revision, required=False, **hub)
        named = read_json(path).get("tokenizer_class") if path else None
        has_json = fetch(name_or_folder, "tokenizer.json", revision, required=False,
                         **hub) is not None
        config = fetch(name_or_folder, "config.json", revision, required=False, **hub)
        if named is None and has_json and config is None:
            named = "PreTrainedTokenizerFast"          # as transformers decides
        if named is not None and config is not None:
            read_json(config)                          # one that is broken is refused in any case
        if named is None:
            path = fetch(name_or_folder, "config.json", revision, **hub)
            raw = read_config(name_or_folder, revision, **hub)
            named = raw.get("tokenizer_class")
        if named is None:
            named = {"gpt_neo": "GPT2Tokenizer", "gpt_neox": "GPTNeoXTokenizer"}[raw["model_type"]]
        tokenizer_class = class_named(named, path, has_json)
        return tokenizer_class.from_pretrained(name_or_folder, revision=revision, **kwargs)
