"""Official checkpoints in, official checkpoints out.

    NAMES             two flat tables: checkpoint name -> our name
    fetch             a file of a checkpoint, from a folder or from the Hugging Face hub
    load_pretrained   folder or hub id -> model, with one copy of the weights in memory
    save_pretrained   model -> folder that transformers and this project both read
    AutoModelForCausalLM, AutoTokenizer   choose the class by config.json

The model is built on the meta device, which has shapes and no memory, and each tensor of the file
takes the place of its parameter (`assign=True`).  safetensors are mapped from disk, not read: a
weight costs memory when it is first used.
"""

import json
import os
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

# '#' stands for the layer number, '*' for weight or bias.  None: known, and ignored on purpose.
# The left side is what lies on EleutherAI's hub pages; a name without a rule is an error.
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
    "lm_head.weight":                                  "lm_head.weight",   # transformers >= 5.14, in memory
    "gpt_neox.layers.#.attention.bias":                None,   # the causal mask, saved as a buffer
    "gpt_neox.layers.#.attention.masked_bias":         None,   # the constant -1e9
    "gpt_neox.layers.#.attention.rotary_emb.inv_freq": None,   # rounded in some files: recomputed
}
NAMES = {"gpt_neo": GPT_NEO, "gpt_neox": GPT_NEOX}

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")


# ------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------

def our_name(name, table):
    """One checkpoint name -> ours, or None to ignore it.  Raises KeyError where no rule fits."""
    base = next(iter(table)).split(".")[0] + "."           # "transformer." or "gpt_neox."
    for full in (name, base + name):                       # base models are saved without the prefix
        layer = re.search(r"\.(\d+)\.", full)
        exact = re.sub(r"\.\d+\.", ".#.", full, count=1)
        stem, _, tail = exact.rpartition(".")
        for pattern in (exact, stem + ".*" if tail in ("weight", "bias") else exact):
            if pattern in table:
                ours = table[pattern]
                return ours and ours.replace("#", layer[1] if layer else "").replace("*", tail)
    raise KeyError(name)


def official_names(state, table):
    """{our name: tensor} -> {checkpoint name: tensor}, by the same table read backwards."""
    back = {}
    for theirs, ours in table.items():
        back.setdefault(ours, theirs)                      # the first spelling is the one on disk
    named = {}
    for name, tensor in state.items():
        layer = re.search(r"\.(\d+)\.", name)
        exact = re.sub(r"\.\d+\.", ".#.", name, count=1)
        stem, _, tail = exact.rpartition(".")
        theirs = back[exact] if exact in back else back[stem + ".*"]
        named[theirs.replace("#", layer[1] if layer else "").replace("*", tail)] = tensor
    return named


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

def fetch(name_or_folder, filename, revision=None, required=True):
    """Path of one file of a checkpoint: in a folder of that name, else from the hub (and its cache).

    Returns None where the file is not there and not required.  Raises FileNotFoundError or
    ConnectionError with one line that says what was looked for, where, and what to do.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        if (folder / filename).is_file():
            return folder / filename
        if required:
            raise FileNotFoundError(f"no {filename} in {folder}: is it the folder of a checkpoint?")
        return None
    name = str(name_or_folder)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "/")):
        raise FileNotFoundError(f"no folder {name}, and it cannot be a hub id like EleutherAI/pythia-70m")
    return fetch_from_hub(name, filename, revision, required)


def fetch_from_hub(repo, filename, revision, required):
    """The same for a hub id; downloads show their progress and are kept in the hub's own cache."""
    from huggingface_hub import hf_hub_download            # here, since it is slow to import
    from huggingface_hub import errors

    where = f"{repo} (revision {revision})" if revision else repo
    try:
        return Path(hf_hub_download(repo, filename, revision=revision))
    except errors.GatedRepoError:
        problem = f"{where} is gated on the hub: accept its terms there, then set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = f"no folder {repo} here and no model {repo} on the hub: check the spelling"
    except errors.RevisionNotFoundError:
        problem = f"{repo} has no revision {revision!r} on the hub (Pythia's are step0 ... step143000)"
    except errors.LocalEntryNotFoundError as error:        # before EntryNotFoundError, its parent
        raise ConnectionError(f"no folder {repo} here, {filename} is not in the hub's cache, and the "
                              f"hub cannot be reached: give a local folder, or try again with a "
                              f"network ({type(error.__cause__ or error).__name__})") from None
    except errors.EntryNotFoundError:
        if not required:
            return None
        problem = f"{where} has no {filename} on the hub: it is not a checkpoint of this kind"
    except (OSError, errors.HfHubHTTPError) as error:
        raise ConnectionError(f"downloading {filename} of {where} failed; run the same command again "
                              f"to go on ({error_line(error)})") from None
    raise FileNotFoundError(problem)


def error_line(error):
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_json(path):
    """The object in a JSON file; ValueError that names the file where there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def read_config(name_or_folder, revision=None):
    """config.json as a dict, of a family that is known here."""
    path = fetch(name_or_folder, "config.json", revision)
    raw = read_json(path)
    if raw.get("model_type") not in NAMES:
        raise ValueError(f"{path}: config field 'model_type' is {raw.get('model_type')!r}; "
                         f"supported: {', '.join(NAMES)}")
    return raw


def weight_files(name_or_folder, revision=None):
    """Paths of all files that hold weights: safetensors before .bin, one file before shards."""
    for filename in WEIGHT_FILES:
        path = fetch(name_or_folder, filename, revision, required=False)
        if path is None:
            continue
        if not filename.endswith(".index.json"):
            return [path]
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise ValueError(f"{path} has no 'weight_map' of tensor names to file names")
        shards = sorted(set(weight_map.values()))
        if outside := [s for s in shards if Path(s).name != s or s in ("", ".", "..")]:
            raise ValueError(f"{path} names a shard outside its folder: {outside[0]!r}")
        try:
            return [fetch(name_or_folder, shard, revision) for shard in shards]
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} names a shard that is missing: {error}") from None
    raise FileNotFoundError(f"no weights in {name_or_folder}: looked for {', '.join(WEIGHT_FILES)}")


def read_tensors(path):
    """Yield (name, tensor) of one weight file, mapped from disk rather than read where possible."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error_line(error)}): "
                             "get it again") from None
        return
    try:
        state = load_bin(path)
    except pickle.UnpicklingError:                         # weights_only: data yes, code no
        raise ValueError(f"{path} was refused: a pickle with something other than tensors in it could "
                         "run code when loaded") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a whole .bin file ({error_line(error)}): get it again") from None
    if not isinstance(state, dict) or not all(torch.is_tensor(t) for t in state.values()):
        raise ValueError(f"{path} must hold a dict of tensors")
    yield from state.items()


def load_bin(path):
    """torch.load without code; files from before torch 1.6 are no zip and cannot be mapped."""
    import zipfile
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


# ------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------

def load_pretrained(cls, name_or_folder, *, revision=None, torch_dtype=None, dtype=None, device=None,
                    attn_implementation="auto"):
    """What every model's from_pretrained does; see base.PreTrainedModel."""
    raw = read_config(name_or_folder, revision)
    family = cls.config_class.model_type
    if raw["model_type"] != family:
        raise ValueError(f"{name_or_folder} is a {raw['model_type']} checkpoint, {cls.__name__} loads "
                         f"{family}: use AutoModelForCausalLM to have the class chosen")
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype} contradict each other: give one")
    try:
        config = cls.config_class.from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{name_or_folder}: {error}") from None
    dtype = parse_dtype(torch_dtype if dtype is None else dtype, raw)
    with torch.device("meta"):
        model = cls(config, attn_implementation)

    state = read_state(name_or_folder, revision, model, NAMES[family], dtype, device)
    model.load_state_dict(state, strict=True, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    path = fetch(name_or_folder, "generation_config.json", revision, required=False)
    model.generation_config = {} if path is None else read_json(path)
    return model.eval()


def parse_dtype(dtype, raw):
    """None -> float32; "auto" -> the config's, or None where it is silent; a name -> the dtype."""
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        dtype = raw.get("dtype") or raw.get("torch_dtype")
        if dtype is None:
            return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be 'auto' or a floating dtype such as float16, got {dtype!r}")
    return found


def read_state(name_or_folder, revision, model, table, dtype, device):
    """{our name: tensor} for exactly the model's parameters, each converted as it is read.

    Raises one ValueError that lists every missing, unknown and wrongly shaped tensor.
    """
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    inside = "" if any(name.startswith("transformer.") for name in wanted) else "transformer."
    tied = model.config.tie_word_embeddings and "lm_head.weight" in wanted
    state, problems = {}, []
    for path in weight_files(name_or_folder, revision):
        for name, tensor in tqdm(read_tensors(path), desc=f"loading {path.name}", unit=" tensors",
                                 leave=False, disable=None):
            try:
                ours = our_name(name, table)
            except KeyError:
                problems.append(f"unexpected tensor {name} {tuple(tensor.shape)}")
                continue
            if ours is None or (inside and ours == "lm_head.weight"):
                continue
            ours = ours.removeprefix(inside)
            if ours in state:
                problems.append(f"tensor {name} stands there twice, under two names or in two files")
            elif ours not in wanted:
                problems.append(f"unexpected tensor {name} {tuple(tensor.shape)}")
            elif tuple(tensor.shape) != wanted[ours]:
                problems.append(f"tensor {name} has shape {tuple(tensor.shape)}, expected {wanted[ours]}")
            else:
                state[ours] = tensor.to(device=device, dtype=dtype or tensor.dtype)
    if tied:
        problems += tie(state)
    official = official_names({inside + name: name for name in wanted}, table)
    problems += [f"missing tensor {name} {wanted[ours]}" for name, ours in official.items()
                 if ours not in state and "has shape" not in " ".join(p for p in problems if name in p)]
    if problems:
        raise ValueError(f"the weights in {name_or_folder} do not fit its config.json:\n  "
                         + "\n  ".join(problems))
    return state


def tie(state):
    """Let a tied head be the embedding; returns the problem if the file holds two different ones."""
    embed, head = state.get("transformer.embed.weight"), state.get("lm_head.weight")
    if embed is None:
        return []
    state["lm_head.weight"] = embed
    if head is None or head.data_ptr() == embed.data_ptr() or torch.equal(head, embed):
        return []
    return ["tensor lm_head.weight differs from the embedding, but config field "
            "'tie_word_embeddings' is true"]


# ------------------------------------------------------------------------------------------------
# Saving
# ------------------------------------------------------------------------------------------------

def save_pretrained(model, folder):
    """Write config.json, generation_config.json and model.safetensors into `folder`.

    Each file is written beside its place and renamed into it when all are whole, so an interrupted
    save leaves the old files, and the folder that the weights are mapped from may be the target.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "" if hasattr(model, "transformer") else "transformer."
    state = {prefix + name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)                  # safetensors stores no tensor twice
    named = official_names(state, NAMES[model.config.model_type])
    if prefix:                                             # base models carry no prefix on disk
        named = {name.split(".", 1)[1]: tensor for name, tensor in named.items()}
    config = {"architectures": [type(model).__name__], **model.config.to_dict(),
              "torch_dtype": str(model.dtype).removeprefix("torch.")}
    generation = model.generation_config or {
        k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config[k] is not None}

    temporary = {name: folder / f"{name}.{os.getpid()}.part"
                 for name in ("model.safetensors", "generation_config.json", "config.json")}
    try:
        save_file(named, temporary["model.safetensors"], metadata={"format": "pt"})
        for name, content in (("config.json", config), ("generation_config.json", generation)):
            temporary[name].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------
# Choosing the class
# ------------------------------------------------------------------------------------------------

class AutoModelForCausalLM:
    """GPTNeoForCausalLM or GPTNeoXForCausalLM, as config.json's model_type says."""

    @staticmethod
    def from_pretrained(name_or_folder, **kwargs):
        """Arguments and errors are base.PreTrainedModel.from_pretrained's."""
        from neo import GPTNeoForCausalLM
        from neox import GPTNeoXForCausalLM
        family = read_config(name_or_folder, kwargs.get("revision"))["model_type"]
        model_class = {"gpt_neo": GPTNeoForCausalLM, "gpt_neox": GPTNeoXForCausalLM}[family]
        return model_class.from_pretrained(name_or_folder, **kwargs)


class AutoTokenizer:
    """GPT2Tokenizer or GPTNeoXTokenizerFast, as config.json's model_type says."""

    @staticmethod
    def from_pretrained(name_or_folder, revision=None, **kwargs):
        """Arguments and errors are tokenizer.GPT2Tokenizer.from_pretrained's."""
        from tokenizer import GPT2Tokenizer, GPTNeoXTokenizerFast
        family = read_config(name_or_folder, revision)["model_type"]
        tokenizer_class = {"gpt_neo": GPT2Tokenizer, "gpt_neox": GPTNeoXTokenizerFast}[family]
        return tokenizer_class.from_pretrained(name_or_folder, revision=revision, **kwargs)
