"""GPT-Neo as first published: a TensorFlow checkpoint of EleutherAI's code on Mesh-TensorFlow.

    MESH          its names -> the hub's
    mesh_config   its config.json -> the hub's
    read_mesh     its tensors, read without TensorFlow
"""

import functools
import re

import numpy as np
import torch

from files import error_line, plain, read_json, shown
from originals.flax import tensor_of

# '#' stands for the layer number.  Matrices are (in, out) here too, so they are transposed, except
# the two tables that are looked up.  "conv1d" is a name kept from GPT-2: a convolution of width 1
# is a matrix.
MESH = {
    "gpt2/wte":                              "transformer.wte.weight",
    "gpt2/wpe":                              "transformer.wpe.weight",
    "gpt2/h#/norm_1/g":                      "transformer.h.#.ln_1.weight",
    "gpt2/h#/norm_1/b":                      "transformer.h.#.ln_1.bias",
    "gpt2/h#/attn/q":                        "transformer.h.#.attn.attention.q_proj.weight",
    "gpt2/h#/attn/k":                        "transformer.h.#.attn.attention.k_proj.weight",
    "gpt2/h#/attn/v":                        "transformer.h.#.attn.attention.v_proj.weight",
    "gpt2/h#/attn/o":                        "transformer.h.#.attn.attention.out_proj.weight",
    "gpt2/h#/attn/compute_output_bias/o_b":  "transformer.h.#.attn.attention.out_proj.bias",
    "gpt2/h#/norm_2/g":                      "transformer.h.#.ln_2.weight",
    "gpt2/h#/norm_2/b":                      "transformer.h.#.ln_2.bias",
    "gpt2/h#/mlp/conv1d_main/c_fc/kernel":   "transformer.h.#.mlp.c_fc.weight",
    "gpt2/h#/mlp/conv1d_main/c_fc/bias":     "transformer.h.#.mlp.c_fc.bias",
    "gpt2/h#/mlp/conv1d_main/c_proj/kernel": "transformer.h.#.mlp.c_proj.weight",
    "gpt2/h#/mlp/conv1d_main/c_proj/bias":   "transformer.h.#.mlp.c_proj.bias",
    "gpt2/ln_f/g":                           "transformer.ln_f.weight",
    "gpt2/ln_f/b":                           "transformer.ln_f.bias",
}
NOT_WEIGHTS = re.compile(r"global_step|.*/adam_[mv]")   # the step, and the optimizer's two averages
TABLES = ("gpt2/wte", "gpt2/wpe")

# Field of its config.json -> ours.
MESH_CONFIG = {"n_embd": "hidden_size", "n_layer": "num_layers", "n_head": "num_heads",
               "n_vocab": "vocab_size", "n_ctx": "max_position_embeddings",
               "attention_types": "attention_types", "local_attention_radius": "window_size",
               "res_dropout": "resid_dropout", "embed_dropout": "embed_dropout",
               "attn_dropout": "attention_dropout"}
MESH_DEFAULTS = {"local_attention_radius": 256, "res_dropout": 0, "embed_dropout": 0,
                 "attn_dropout": 0}
MESH_OTHER_MODELS = ("scalenorm", "rezero", "mlp_glu", "macaron", "moe_layers", "rotary_emb",
                     "axial_pos_emb", "num_mem_kv", "no_weight_tie", "share_parameters",
                     "mlm_training")
GPT2_TOKENS, GPT2_PADDED = 50257, 50304             # the second a multiple of 128, for the hardware


def mesh_config(path):
    """Its config.json -> the contents of the hub's.  Raises ValueError that names the field.

    The activation is the tanh form of GELU (mesh_tensorflow.gelu) whatever "activation_function"
    says: the original code never reads this field.
    """
    raw = read_json(path)
    for name in MESH_OTHER_MODELS:
        if raw.get(name):
            raise ValueError(f"{path}: config field {name!r} is {shown(raw[name])}; supported: "
                             "none or false")
    if raw.get("activation_fn") not in (None, "gelu"):
        raise ValueError(f"{path}: config field 'activation_fn' is {shown(raw['activation_fn'])}; "
                         "supported: gelu")
    if missing := [name for name in MESH_CONFIG if name not in raw and name not in MESH_DEFAULTS]:
        raise ValueError(f"{path} has no field {', '.join(missing)}: is it the config of an "
                         "original GPT-Neo?")
    config = {ours: raw.get(name, MESH_DEFAULTS.get(name)) for name, ours in MESH_CONFIG.items()}
    config |= {name: float(config[name])
               for name in ("resid_dropout", "embed_dropout", "attention_dropout")
               if type(config[name]) is int}
    if config["vocab_size"] == GPT2_PADDED:
        config["vocab_size"] = GPT2_TOKENS
    end = GPT2_TOKENS - 1 if config["vocab_size"] == GPT2_TOKENS else None
    return {"model_type": "gpt_neo", **config, "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "bos_token_id": end,
            "eos_token_id": end}


def mesh_index(folder):
    """model.ckpt-N.index of the step that the file `checkpoint` names, or the only one; or None."""
    found = {path.stem: path for path in sorted(folder.glob("model.ckpt-*.index"))}
    if (folder / "checkpoint").is_file() and found:
        text = (folder / "checkpoint").read_text(encoding="utf-8", errors="replace")
        named = re.search(r'^model_checkpoint_path: "(?:.*/)?([^/"]+)"', text, re.M)
        if named and named[1] in found:
            return found[named[1]]
    if len(found) > 1:
        raise ValueError(f"{folder} has {', '.join(map(plain, found))}, and no file 'checkpoint' "
                         "that names one of them: leave one there")
    return next(iter(found.values()), None)


def read_mesh(index, vocab_size):
    """Yield (the hub's name, tensor) of a TensorFlow checkpoint, one tensor in memory at a time.

    Rows of the embedding beyond vocab_size are padding and are left out, and so are the optimizer
    and the step; a name without a rule is yielded as it is.  Raises ValueError and
    FileNotFoundError that name the file.
    """
    entries, shards = read_index(index)
    for name, entry in entries.items():
        if NOT_WEIGHTS.fullmatch(name):
            continue
        tensor = read_entry(index, name, entry, shards)
        layer = re.match(r"gpt2/h(\d+)/", name)
        pattern = name.replace(layer[0], "gpt2/h#/", 1) if layer else name
        if pattern in MESH and pattern not in TABLES and tensor.dim() == 2:
            tensor = tensor.T.contiguous()
        if pattern == "gpt2/wte":
            tensor = tensor[:vocab_size]
        yield MESH.get(pattern, name).replace("#", layer[1] if layer else "#"), tensor


# The container, tensor_bundle (tensorflow/core/util/tensor_bundle): PREFIX.index is a sorted table
# as in LevelDB, whose values say in protobuf where each tensor lies in PREFIX.data-SSSSS-of-NNNNN.

MAGIC = bytes.fromhex("57fb808b247547db")
BUNDLE_DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64,
                 14: torch.bfloat16, 19: torch.float16}   # of tensorflow/core/framework/types.proto
DTYPE, SHAPE, SHARD, OFFSET, SIZE, CHECKSUM, SLICES = range(1, 8)       # fields of BundleEntryProto


def read_index(path):
    """({name: fields of its entry}, number of shards) of a .index file."""
    try:
        data = path.read_bytes()
        if data[-8:] != MAGIC:
            raise ValueError("it does not end as a table of TensorFlow")
        at = len(data) - 48
        for _ in range(3):                     # of the footer: metaindex offset, size, index offset
            start, at = varint(data, at)
        entries = {}
        for _, handle in block(data, start, varint(data, at)[0]):
            start, at = varint(handle, 0)
            entries |= {key: fields(value)
                        for key, value in block(data, start, varint(handle, at)[0])}
        header = entries.pop(b"")
        if header.get(2):
            raise ValueError("it was written on a big-endian machine")
        entries = {key.decode(): entry for key, entry in entries.items()
                   if not key.startswith(b"\0")}
        return entries, header[1]
    except OSError:
        raise
    except Exception as error:                 # damaged bytes lead anywhere
        raise ValueError(f"{path} is not a whole TensorFlow index ({error_line(error)}): "
                         "get it again") from None


def block(data, start, size):
    """The (key, value) pairs of one block: a key is what it shares with the last, and a rest."""
    body, tail = data[start:start + size], data[start + size:start + size + 5]
    if len(tail) < 5 or masked(crc32c(body + tail[:1])) != int.from_bytes(tail[1:], "little"):
        raise ValueError("a block's checksum is wrong")
    if tail[0] != 0:
        raise ValueError("it is compressed, which TensorFlow's Saver never does")
    end, at, key = size - 4 - 4 * int.from_bytes(body[-4:], "little"), 0, b""
    while at < end:
        shared, at = varint(body, at)
        fresh, at = varint(body, at)
        length, at = varint(body, at)
        key = key[:shared] + body[at:at + fresh]
        yield key, body[at + fresh:at + fresh + length]
        at += fresh + length


def varint(data, at):
    """(an integer of 7 bits a byte, the lowest first; the place after it)"""
    value = 0
    for shift in range(0, 64, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("an integer of more than 64 bits")


def fields(data):
    """A protobuf message -> {field number: value}; of repeated fields a list.  Zeros are absent."""
    found, at = {}, 0
    while at < len(data):
        tag, at = varint(data, at)
        if tag & 7 == 0:
            value, at = varint(data, at)
        elif tag & 7 == 5:
            value, at = int.from_bytes(data[at:at + 4], "little"), at + 4
        elif tag & 7 == 2:
            size, at = varint(data, at)
            value, at = data[at:at + size], at + size
        else:
            raise ValueError(f"a protobuf field of kind {tag & 7}")
        number = tag >> 3
        if number in found:
            found[number] = [*found[number], value]
        else:
            found[number] = [value] if tag & 7 == 2 else value
    return found


def read_entry(index, name, entry, shards):
    """The tensor of one entry, from its shard."""
    if SLICES in entry:
        raise ValueError(f"{index}: {plain(name)} is a partitioned variable, which Mesh-TensorFlow "
                         "never writes; supported are whole ones")
    path = index.with_name(f"{index.stem}.data-{entry.get(SHARD, 0):05d}-of-{shards:05d}")
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}, which holds "
                                f"{plain(name)}: get it too")
    with open(path, "rb") as file:
        file.seek(entry.get(OFFSET, 0))
        data = file.read(min(entry.get(SIZE, 0), path.stat().st_size))
    if len(data) != entry.get(SIZE, 0) or masked(crc32c(data)) != entry.get(CHECKSUM, 0):
        raise ValueError(f"{path} is damaged: the checksum of {plain(name)} is wrong; get it again")
    if entry.get(DTYPE) not in BUNDLE_DTYPES:
        raise ValueError(f"{index}: {plain(name)} is of TensorFlow's dtype {entry.get(DTYPE)}; "
                         f"supported: {', '.join(map(str, BUNDLE_DTYPES.values()))}")
    dims = fields(entry.get(SHAPE, [b""])[0]).get(2, [])
    try:
        return tensor_of(data, BUNDLE_DTYPES[entry[DTYPE]], [fields(dim).get(1, 0) for dim in dims])
    except ValueError as error:
        raise ValueError(f"{index}: {plain(name)} has {error}") from None


# The checksum is linear over bits.  So the checksum of A followed by B is that of A, moved past as
# many zero bytes as B has, xor that of B.  Here numpy merges all pairs of neighbours at once, then
# all pairs of pairs, and so on.

CHUNK = 2**18                                           # words of 4 bytes that are merged at a time


def crc32c(data):
    """Castagnoli's checksum of bytes."""
    if len(data) < 4:
        return by_bits(0xFFFFFFFF, data) ^ 0xFFFFFFFF
    words = -(-len(data) // 4)
    size = min(CHUNK, 1 << (words - 1).bit_length())
    padded = np.zeros(-(-words // size) * size * 4, np.uint8)       # zeros before it change nothing
    padded[-len(data):] = np.frombuffer(data, np.uint8)
    padded[len(padded) - len(data):][:4] ^= 0xFF           # the checksum begins with 32 ones
    register = np.uint32(0)
    for merged in padded.view("<u4").reshape(-1, size):
        level = 0
        while len(merged) > 1:
            merged = moved(merged[0::2], level) ^ merged[1::2]
            level += 1
        register = moved(register, level) ^ merged[0]
    return int(moved(register, 0)) ^ 0xFFFFFFFF


def by_bits(register, data):
    """The definition: a division of polynomials, bit by bit."""
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register


def moved(words, level):
    """Registers (uint32) moved past 4 * 2**level zero bytes: xor of a table for each half."""
    low, high = moving(level)
    return low[words & 0xFFFF] ^ high[words >> 16]


@functools.cache
def moving(level):
    """The two tables that `moved` looks up: at level 0 by the definition, else moved twice."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    images = (moved(moved(bits, level - 1), level - 1) if level else
              np.array([by_bits(int(bit), bytes(4)) for bit in bits], np.uint32))
    tables = np.zeros((2, 1), np.uint32)
    for low, high in zip(images[:16], images[16:]):        # each bit doubles what the tables know
        tables = np.concatenate([tables, tables ^ np.array([[low], [high]])], axis=1)
    return tables


def masked(checksum):
    """A checksum in its stored form, which is safe to be part of checksummed data (crc32c.h)."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
