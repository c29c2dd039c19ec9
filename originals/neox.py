"""GPT-NeoX's own checkpoints: DeepSpeed's files, each layer by itself and each cut into parts.

    NEOX          names in a layer's file -> the hub's, and how parts go together
    read_neox     the tensors of a layer, joined one at a time
    split_neox    the other way: the hub's tensors as the files of a chosen number of parts
    neox_config   the .yml and the shapes -> the hub's config.json; neox_yml the other way

Sources: EleutherAI/gpt-neox, megatron/model/gpt2_model.py (stages), megatron/mpu/layers.py (parts),
tools/ckpts/convert_neox_to_hf.py (joining).
"""

import contextlib
import functools
import re
import warnings
import zipfile

import numpy as np
import torch
import yaml

from files import error_line, plain, shown

# Training spread a layer's matrices over the GPUs of one machine (tensor parallelism).  A matrix
# that widens, and the embedding, is cut by its output rows: a part has some of the heads, of the
# inner width, of the vocabulary.  The matrix that follows is cut by its input columns, so that each
# GPU goes on with what it has, and their results are added up.
ROWS, COLUMNS = "rows", "columns"
# Norms are on every GPU, meant to be the same.  So are biases that are added after the sum.  But
# with gpt_j_residual each GPU adds its own bias before the one sum of attention and MLP
# (megatron/model/transformer.py), so the model's bias is the sum of theirs.
COPIES, SUMMANDS = "copies", "summands"

# Key in a layer's file -> the hub's name, and how its parts go together.
NEOX = {
    "word_embeddings.weight":        ("gpt_neox.embed_in.weight", ROWS),
    "input_layernorm.*":             ("gpt_neox.layers.#.input_layernorm.*", COPIES),
    "attention.query_key_value.*":   ("gpt_neox.layers.#.attention.query_key_value.*", ROWS),
    "attention.dense.weight":        ("gpt_neox.layers.#.attention.dense.weight", COLUMNS),
    "attention.dense.bias":          ("gpt_neox.layers.#.attention.dense.bias", SUMMANDS),
    "attention.rotary_emb.inv_freq": ("gpt_neox.layers.#.attention.rotary_emb.inv_freq", COPIES),
    "post_attention_layernorm.*":    ("gpt_neox.layers.#.post_attention_layernorm.*", COPIES),
    "mlp.dense_h_to_4h.*":           ("gpt_neox.layers.#.mlp.dense_h_to_4h.*", ROWS),
    "mlp.dense_4h_to_h.weight":      ("gpt_neox.layers.#.mlp.dense_4h_to_h.weight", COLUMNS),
    "mlp.dense_4h_to_h.bias":        ("gpt_neox.layers.#.mlp.dense_4h_to_h.bias", SUMMANDS),
    "norm.*":                        ("gpt_neox.final_layer_norm.*", COPIES),
    "final_linear.weight":           ("embed_out.weight", ROWS),
}
# The same under newer names: GPT-NeoX 2, then NVIDIA's transformer_engine.
NEWER = {"mlp.linear1.": "mlp.dense_h_to_4h.", "mlp.linear2.": "mlp.dense_4h_to_h.",
         "attention.qkv.": "attention.query_key_value.", "attention.proj.": "attention.dense.",
         "mlp.fc1_": "mlp.dense_h_to_4h.", "mlp.fc2_": "mlp.dense_4h_to_h.",
         "mlp.layer_norm_": "post_attention_layernorm."}

# Layers are stages of a pipeline: 0 the embedding, 1 a function, 2 ... L+1 the blocks, L+2 a
# function, L+3 the final norm, L+4 the head, unless it is tied.  Without a pipeline a rank has all
# of them in mp_rank_RR_model_states.pt, under "module", as sequential.LL.key.
LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
FIRST_BLOCK = 2
# The keys by which a layer is known.
MARKS = {"word_embeddings.weight": "embedding", "attention.dense.weight": "block",
         "norm.weight": "final norm", "final_linear.weight": "head"}
AFTER = {"embedding": 0, "block": 1, "final norm": 3, "head": 4}    # its number - that of blocks
LARGEST_DRIFT = 0.1    # how far copies may differ, relative to their norm: some have drifted

# DeepSpeed keeps NumPy's random state beside the weights: an array of uint32, which takes these to
# build.
RECONSTRUCT = np.zeros(0).__reduce__()[0]
NUMPY_STATE = [(RECONSTRUCT, "numpy.core.multiarray._reconstruct"),          # as NumPy 1 wrote it
               (RECONSTRUCT, "numpy._core.multiarray._reconstruct"), np.ndarray, np.dtype,
               type(np.dtype("uint32"))]               # the class of the dtype, not a name in files


def oldest(key):
    """The key under its first name."""
    for newer, older in NEWER.items():
        if key.startswith(newer):
            return older + key.removeprefix(newer)
    return key


def hub_name(layer, key):
    """(the hub's name, how parts are joined) of a key in a layer's file, or (None, None)."""
    key = oldest(key)
    stem, _, tail = key.rpartition(".")
    name, kind = NEOX.get(key) or NEOX.get(f"{stem}.*") or (None, None)
    return name and name.replace("#", str(layer - FIRST_BLOCK)).replace("*", tail), kind


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

def neox_folder(folder):
    """The folder of the files: this one, the step that `latest` names, the only step; or None."""
    def holds(place):
        names = [path.name for path in place.iterdir()]
        return any(LAYER_FILE.fullmatch(name) or RANK_FILE.fullmatch(name) for name in names)

    if holds(folder):
        return folder
    steps = [place for place in sorted(folder.glob("global_step*"))
             if place.is_dir() and holds(place)]
    latest = folder / "latest"
    if latest.is_file():
        named = latest.read_text(encoding="utf-8", errors="replace").strip()
        steps = [place for place in steps if place.name == named]
        if not steps:
            raise FileNotFoundError(f"{latest} names {shown(named)}, which is not a folder there "
                                    "with GPT-NeoX's files")
    if len(steps) > 1:
        raise ValueError(f"{folder} has {len(steps)} steps and no file 'latest': give the folder "
                         f"of one, as {steps[-1]}")
    return steps[0] if steps else None


def neox_files(folder):
    """{layer: [file of rank 0, of rank 1, ...]}; the layer is None where a file holds all layers.

    Raises FileNotFoundError that names the file where a layer lacks a part that others have.
    """
    found = {}
    names = sorted(path.name for path in folder.iterdir())
    for match in filter(None, map(LAYER_FILE.fullmatch, names)):
        found.setdefault(int(match[1]), {})[int(match[2])] = folder / match[0]
    if not found:
        matches = filter(None, map(RANK_FILE.fullmatch, names))
        found[None] = {int(match[1]): folder / match[0] for match in matches}
    ranks = 1 + max(rank for paths in found.values() for rank in paths)
    for layer, paths in sorted(found.items()):
        for rank in range(ranks):
            if rank not in paths:
                raise missing(folder, layer, rank)
    return {layer: [paths[rank] for rank in range(ranks)] for layer, paths in sorted(found.items())}


def file_name(layer, rank):
    if layer is None:
        return f"mp_rank_{rank:02d}_model_states.pt"
    return f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"


def missing(folder, layer, rank):
    return FileNotFoundError(f"no {file_name(layer, rank)} in {folder}: a part of the "
                             "weights is missing")


def read_part(path, unpickle):
    """{(layer, key): tensor} of one file, mapped and not read."""
    check_renamed(path)
    match = LAYER_FILE.fullmatch(path.name)
    state = unpickle(path, module=not match)
    state = {key: tensor for key, tensor in state.items() if not key.endswith("._extra_state")}
    if match:
        return {(int(match[1]), key): tensor for key, tensor in state.items()}
    if not state:
        raise FileNotFoundError(f"{path} holds no weights, and the files "
                                "layer_00-model_00-model_states.pt and so on, which hold them, are "
                                "not beside it: get these")
    slots = [re.fullmatch(r"sequential\.(\d{1,4})\.(.*)", key) for key in state]
    if None in slots:
        raise ValueError(f"{path}: {plain(list(state)[slots.index(None)])} is not of the form "
                         "sequential.LL.name")
    return {(int(slot[1]), slot[2]): tensor for slot, tensor in zip(slots, state.values())}


def check_renamed(path):
    """torch.save notes a file's name in it: raise ValueError where two files were exchanged."""
    name = noted_name(path)
    if name in (None, path.name):
        return
    other = path.with_name(name)
    if other.is_file() and noted_name(other) != name:
        raise ValueError(f"{path} was saved as {name}, and the file of that name as another: they "
                         "were exchanged; give them back their names")
    warnings.warn(f"{path} was saved as {name}: is it a copy of that file?", stacklevel=2)


def noted_name(path):
    """The name of such a file that torch.save has noted in it, or None."""
    with contextlib.suppress(zipfile.BadZipFile, IndexError), zipfile.ZipFile(path) as archive:
        root = archive.infolist()[0].filename.split("/")[0] + ".pt"
        found = LAYER_FILE.search(root) or RANK_FILE.search(root)    # convert.py: .NAME.random
        return found and found[0]


def neox_shapes(files, unpickle):
    """{(layer, key): shape of one part} of all files, which are checked to be those of one model.

    Raises ValueError or FileNotFoundError that names the file.
    """
    shapes = {}
    for paths in files.values():
        parts = [{slot: (tuple(tensor.shape), tensor.dtype)
                  for slot, tensor in read_part(path, unpickle).items()} for path in paths]
        for path, part in zip(paths, parts):
            for slot in {**parts[0], **part}:
                if part.get(slot) != parts[0].get(slot):
                    raise ValueError(f"{path} does not fit {paths[0].name}: {plain(slot[1])} is "
                                     f"{part.get(slot, 'missing')}, there "
                                     f"{parts[0].get(slot, 'missing')}")
        shapes |= {slot: shape for slot, (shape, _) in parts[0].items()}
    check_layers(shapes, files)
    return shapes


def check_layers(shapes, files):
    """Raise where a layer is missing, is not what its number says, or lacks its last part."""
    first = next(iter(files.values()))
    kinds = layer_kinds(shapes)
    if not kinds:
        raise ValueError(f"{first[0]} holds no layer of a GPT-NeoX")
    count = count_blocks(kinds)
    expected = {0: "embedding", **dict.fromkeys(range(2, count + 2), "block"),
                count + 3: "final norm"}
    if kinds[max(kinds)] == "head":
        expected[count + 4] = "head"
    for layer, kind in expected.items():
        paths = files.get(None) or files.get(layer)
        if paths is None:
            raise missing(first[0].parent, layer, 0)
        if kinds.get(layer) != kind:
            raise ValueError(f"{paths[0]}: layer {layer} should be the {kind}, and what is there "
                             f"is {kinds.get(layer, 'nothing known')}: has each file its own name?")
    for (layer, key), shape in shapes.items():
        if oldest(key) == "attention.dense.weight" and shape[-1] * len(first) < shape[0]:
            raise missing(first[0].parent, None if None in files else layer, len(first))


def layer_kinds(shapes):
    """{layer: what it is}, by the keys in it."""
    return {layer: MARKS[oldest(key)] for layer, key in shapes if oldest(key) in MARKS}


def count_blocks(kinds):
    """The number of blocks, from what the last layer is."""
    return max(kinds) - AFTER[kinds[max(kinds)]]


# ------------------------------------------------------------------------------------------------
# Joining parts, and cutting into parts
# ------------------------------------------------------------------------------------------------

def read_neox(path, unpickle, parallel):
    """Yield (the hub's name, tensor) of one layer, or of all of them where a file holds all.

    path is the file of rank 0; the others lie beside it.  Of each part only the tensor that is
    joined is mapped at a time, so that joining takes the memory of that tensor.  parallel:
    gpt_j_residual.  A key without a rule is yielded as it is.  Raises ValueError that names the
    file.
    """
    layer = LAYER_FILE.fullmatch(path.name)
    paths = neox_files(path.parent)[int(layer[1]) if layer else None]
    for slot in list(read_part(path, unpickle)):
        name, kind = hub_name(*slot)
        parts = [read_part(part, unpickle)[slot] for part in (paths if name else paths[:1])]
        try:
            tensor = joined(parts, kind, parallel)
        except ValueError as error:
            raise ValueError(f"{path}: {plain(slot[1])} {error}") from None
        yield name or f"layer_{slot[0]:02d}.{slot[1]}", tensor


def joined(parts, kind, parallel):
    """One tensor from its parts in the order of the ranks, in their dtype, as in GPT-NeoX."""
    if len(parts) == 1:
        return parts[0]
    if kind in (ROWS, COLUMNS):
        return torch.cat(parts, dim=0 if kind == ROWS else 1)
    if kind == SUMMANDS and parallel:
        return sum(parts[1:], parts[0])
    if all(torch.equal(part, parts[0]) for part in parts):
        return parts[0].clone()
    bound = LARGEST_DRIFT * parts[0].double().norm().clamp(min=LARGEST_DRIFT)
    if not all((part.double() - parts[0].double()).norm() <= bound for part in parts):
        raise ValueError("should be the same in all parts and is not: are these the parts of one "
                         "model" + (kind == SUMMANDS) * ", trained without gpt_j_residual" + "?")
    return sum(parts[1:], parts[0]) / len(parts)


def cut(tensor, kind, count, parallel):
    """The parts from which `joined` makes exactly this tensor."""
    if kind in (ROWS, COLUMNS):
        return tensor.chunk(count, dim=0 if kind == ROWS else 1)
    if kind == COPIES or not parallel or count == 1:
        return [tensor] * count
    share = tensor / count                     # rounded: so the first may have to take what is left

    def exact(first):
        return joined([first, *[share] * (count - 1)], SUMMANDS, parallel) == tensor

    first = share.where(exact(share), tensor - sum([share] * (count - 2), share))
    return [first.where(exact(first), tensor), *[share.where(exact(first), 0)] * (count - 1)]


def split_neox(tensors, config, parts):
    """{the hub's name: tensor} -> {file name: function that makes its {key: tensor}}, in parts.

    Rows of the vocabulary are filled up with zeros to a multiple of the parts, as in training.
    Raises ValueError where heads or inner width cannot be cut so.
    """
    for field in ("num_attention_heads", "intermediate_size"):
        if parts < 1 or getattr(config, field) % parts:
            raise ValueError(f"{field} ({getattr(config, field)}) cannot be cut into {parts} parts")
    layers = {}
    for name in tensors:
        layer, key, kind = neox_place(name, config.num_hidden_layers)
        layers.setdefault(layer, []).append((key, kind, name))

    def state(entries, rank):
        made = {}
        for key, kind, name in entries:
            whole = tensors[name]
            if MARKS.get(key) in ("embedding", "head"):
                whole = torch.nn.functional.pad(whole, (0, 0, 0, -len(whole) % parts))
            made[key] = cut(whole, kind, parts, config.use_parallel_residual)[rank].clone()
        return made

    return {file_name(layer, rank): functools.partial(state, entries, rank)
            for layer, entries in sorted(layers.items()) for rank in range(parts)}


def neox_place(name, layers):
    """(layer, key, how parts are joined) of a hub's name, by the table read backwards."""
    block = re.search(r"\.layers\.(\d+)\.", name)
    pattern = name.replace(block[0], ".layers.#.") if block else name
    stem, _, tail = pattern.rpartition(".")
    back = {theirs: (key, kind) for key, (theirs, kind) in NEOX.items()}
    key, kind = back.get(pattern) or back[f"{stem}.*"]
    key = key.replace("*", tail)
    if block:
        return int(block[1]) + FIRST_BLOCK, key, kind
    part = MARKS.get(key, "final norm")
    return 0 if part == "embedding" else layers + AFTER[part], key, kind


# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------

# Key in the .yml, with _ for -, -> the values that make the model that neox.py is.
SUPPORTED = {
    "pos_emb": ("rotary",), "norm": ("layernorm",), "activation": ("gelu",), "gpt_j_tied": (False,),
    "use_qk_layernorm": (False,), "use_bias_in_norms": (True,), "use_bias_in_mlp": (True,),
    "mlp_type": ("regular",), "sliding_window_width": (None,), "rotary_interleaved": (False,),
    "output_layer_parallelism": ("column",), "moe_num_experts": (1,)}


def neox_settings(folder):
    """({key: value}, path) of the .yml files beside the weights, in configs/ or one folder up.

    GPT-NeoX takes any number of files; settings that contradict each other raise ValueError.
    """
    for place in (folder, folder / "configs", folder.parent, folder.parent / "configs"):
        paths = sorted([*place.glob("*.yml"), *place.glob("*.yaml")])
        settings = {}
        for path in paths:
            for key, value in read_yaml(path).items():
                key = str(key).replace("-", "_")
                if settings.setdefault(key, value) != value:
                    raise ValueError(f"{path}: {plain(key)} is {shown(value)}, but in another file "
                                     f"there {shown(settings[key])}")
        if paths:
            return settings, paths[0] if len(paths) == 1 else place
    return {}, None


def read_yaml(path):
    """The mapping in a YAML file, without building any object that it may name."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of settings, not a {type(content).__name__}")
    return content


def neox_config(folder, unpickle):
    """Settings and shapes -> the contents of the hub's config.json.  Shapes win, with a warning.

    hidden_act is "gelu" as on the hub's pages of Pythia, though training took the tanh form where
    bias_gelu_fusion is true; GPT-NeoX's own script does the same.  The tokenizer's end is id 0.
    """
    settings, path = neox_settings(folder)
    if path is None:
        raise FileNotFoundError(f"no .yml in {folder} or the folder above: put GPT-NeoX's settings "
                                "there, or the hub's config.json")
    check_settings(settings, path)
    files = neox_files(folder)
    shapes, ranks = neox_shapes(files, unpickle), len(next(iter(files.values())))
    hub = {hub_name(*slot)[0]: shape for slot, shape in shapes.items()}
    hub = {(name or "").replace("gpt_neox.layers.0.", "0."): shape for name, shape in hub.items()}
    layers, hidden = count_blocks(layer_kinds(shapes)), hub["0.attention.dense.weight"][0]
    inner = hub.get("0.mlp.dense_h_to_4h.weight", (0,))[0] * ranks
    head = "embed_out.weight" in hub
    if settings.get("no_weight_tying") is True and not head:
        raise missing(folder, None if None in files else layers + AFTER["head"], 0)
    warn_of_others(settings, path,
                   {"num_layers": layers, "hidden_size": hidden, "intermediate_size": inner,
                    "model_parallel_size": ranks, "no_weight_tying": head})
    rotary = hub.get("0.attention.rotary_emb.inv_freq")

    def number(key, default=None):
        return setting(settings, path, key, default)

    return {"model_type": "gpt_neox", "vocab_size": hub["gpt_neox.embed_in.weight"][0] * ranks,
            "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner,
            "num_attention_heads": count_heads(settings, path, layers, hidden, rotary),
            "max_position_embeddings": number("max_position_embeddings"), "hidden_act": "gelu",
            "rotary_pct": float(number("rotary_pct", 1.0)),
            "rotary_emb_base": number("rotary_emb_base", 10000),
            "use_parallel_residual": number("gpt_j_residual", False),
            "layer_norm_eps": float(number("layernorm_epsilon", 1e-5)),
            "initializer_range": float(number("init_method_std", 0.02)),
            "attention_bias": "0.attention.dense.bias" in hub, "tie_word_embeddings": not head,
            "bos_token_id": 0, "eos_token_id": 0}


def warn_of_others(settings, path, shapes):
    """Warn of each setting that is not what the shapes of the weights say: {key: value}."""
    for key, value in shapes.items():
        given = settings.get(key, False if key == "no_weight_tying" else None)
        if given not in (None, value):
            warnings.warn(f"{path}: {key} is {shown(given)}; the weights say {value}, "
                          "which is taken", stacklevel=3)


def setting(settings, path, key, default):
    """A number or truth value.  YAML reads 1e-5 as a text; it becomes a number here.

    If the default is None, the setting must be there.
    """
    value = settings.get(key, default)
    if value is None:
        raise ValueError(f"{path} has no {key}")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if not isinstance(value, (int, float)):
        raise ValueError(f"{path}: {key} is {shown(value)}, which is not a number")
    return value


def check_settings(settings, path):
    """Raise ValueError that names the key for settings of another model."""
    for key, supported in SUPPORTED.items():
        if key in settings and settings[key] not in supported:
            raise ValueError(f"{path}: {key} is {shown(settings[key])}; supported: {supported[0]}")
    if settings.get("num_kv_heads") not in (None, settings.get("num_attention_heads")):
        raise ValueError(f"{path}: num_kv_heads is {shown(settings['num_kv_heads'])}; supported: "
                         "as many as num_attention_heads")
    kinds = settings.get("attention_config")
    if unknown := set(re.findall(r"[A-Za-z_]\w*", str(kinds or ""))) - {"global", "flash", "all"}:
        raise ValueError(f"{path}: attention_config names {', '.join(sorted(unknown))}; supported: "
                         "global, flash")


def count_heads(settings, path, layers, hidden, rotary):
    """The number of heads.  A published pythia-12b-deduped.yml has layers and heads exchanged."""
    heads, other = (setting(settings, path, key, None)
                    for key in ("num_attention_heads", "num_layers"))
    turning = float(setting(settings, path, "rotary_pct", 1.0))

    def fits(heads):
        if type(heads) is not int or heads < 1 or hidden % heads:
            return False
        return rotary is None or rotary[0] == -(-int(hidden // heads * turning) // 2)

    if fits(other) and other != layers and (heads == layers or not fits(heads)):
        warnings.warn(f"{path}: num_layers and num_attention_heads seem to be exchanged: {other} "
                      "heads are taken", stacklevel=2)
        return other
    if not fits(heads):
        raise ValueError(f"{path}: num_attention_heads is {shown(heads)}, which does not fit the "
                         f"weights: width {hidden}"
                         + (f", of each head {2 * rotary[0]} dims rotate" if rotary else ""))
    return heads


def neox_yml(config, parts):
    """The settings of a model in `parts` tensor-parallel parts, to go on training it in GPT-NeoX.

    GPT-NeoX pads its tokenizer's vocabulary to a multiple of make_vocab_size_divisible_by times the
    parts.  Here this multiple is the number of rows itself.
    """
    rows = -(-config.vocab_size // parts)
    return {"pipe_parallel_size": 1, "model_parallel_size": parts,
            "num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.intermediate_size, "make_vocab_size_divisible_by": rows,
            "seq_length": config.max_position_embeddings,
            "max_position_embeddings": config.max_position_embeddings,
            "norm": "layernorm", "layernorm_epsilon": config.layer_norm_eps, "pos_emb": "rotary",
            "rotary_pct": config.rotary_pct, "rotary_emb_base": config.rotary_emb_base,
            "no_weight_tying": not config.tie_word_embeddings,
            "gpt_j_residual": config.use_parallel_residual, "gpt_j_tied": False,
            "output_layer_parallelism": "column", "activation": "gelu",
            "bias_gelu_fusion": config.hidden_act != "gelu",               # the tanh form
            "use_bias_in_attn_linear": config.attention_bias,
            "hidden_dropout": config.hidden_dropout, "attention_dropout": config.attention_dropout,
            "init_method_std": config.initializer_range}
