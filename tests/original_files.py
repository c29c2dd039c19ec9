"""Writers of the original formats for the tests, written independently of what reads them.

Names and shapes: EleutherAI/gpt-neo models/gpt2, EleutherAI/gpt-neox megatron/model and tools/ckpts.
"""

import random
import struct
from pathlib import Path

import numpy as np
import torch

# ------------------------------------------------------------------------------------------------
# GPT-NeoX
# ------------------------------------------------------------------------------------------------

WIDENING = ("word_embeddings", "query_key_value", "dense_h_to_4h", "final_linear")
NARROWING = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")
LINEAR = {"mlp.dense_h_to_4h": "mlp.linear1", "mlp.dense_4h_to_h": "mlp.linear2"}
ENGINE = {"mlp.dense_h_to_4h.": "mlp.fc1_", "mlp.dense_4h_to_h.": "mlp.fc2_",
          "attention.query_key_value": "attention.qkv", "attention.dense.": "attention.proj.",
          "post_attention_layernorm.": "mlp.layer_norm_"}


def stage(name, layers):
    """The number of the layer's file, and the key in it, of a name on the hub."""
    if name == "gpt_neox.embed_in.weight":
        return 0, "word_embeddings.weight"
    if name.startswith("gpt_neox.final_layer_norm."):
        return layers + 3, name.replace("gpt_neox.final_layer_norm", "norm")
    if name == "embed_out.weight":
        return layers + 4, "final_linear.weight"
    _, _, layer, key = name.split(".", 3)
    return int(layer) + 2, key


def pieces(key, tensor, parts, parallel, generator):
    """What each rank has of a tensor."""
    if any(word in key for word in WIDENING):
        return [piece.clone() for piece in tensor.chunk(parts, 0)]
    if key in NARROWING:
        return [piece.clone() for piece in tensor.chunk(parts, 1)]
    if key.endswith(("attention.dense.bias", "dense_4h_to_h.bias")) and parallel and parts > 1:
        rest = [(tensor * torch.rand(tensor.shape, generator=generator)).to(tensor.dtype) for _ in range(parts - 1)]
        return [tensor - sum(rest), *rest]                 # independent numbers: their sum counts
    return [tensor.clone() for _ in range(parts)]


def neox_parts(tensors, layers, parts, parallel, names={}):
    """{(layer, rank): {key: tensor}} of the hub's tensors."""
    generator, files = torch.Generator().manual_seed(0), {}
    for name, tensor in tensors.items():
        layer, key = stage(name, layers)
        for rank, piece in enumerate(pieces(key, tensor, parts, parallel, generator)):
            new = key
            for old, newer in names.items():
                new = new.replace(old, newer)
            files.setdefault((layer, rank), {})[new] = piece
    return files


def write_neox(folder, files, sequential=False):
    """As DeepSpeed writes them: a file of each layer and rank, or one of each rank with much beside."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {rank for _, rank in files}
    for rank in ranks if sequential else ():
        module = {f"sequential.{layer}.{key}": tensor for (layer, r), state in files.items() if r == rank
                  for key, tensor in state.items()}
        torch.save({"module": module, "optimizer": None, "iteration": 3, "args": {"num_layers": 2},
                    "np_rng_state": np.random.get_state(), "random_rng_state": random.getstate(),
                    "torch_rng_state": torch.get_rng_state()}, folder / f"mp_rank_{rank:02d}_model_states.pt")
    for (layer, rank), state in () if sequential else files.items():
        torch.save(state, folder / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")


# ------------------------------------------------------------------------------------------------
# TensorFlow
# ------------------------------------------------------------------------------------------------

def varint(number):
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def message(*pairs):
    """A protobuf message of (field, value): an integer, bytes, or ("fixed32", integer)."""
    out = b""
    for field, value in pairs:
        if isinstance(value, tuple):
            out += varint(field << 3 | 5) + struct.pack("<I", value[1])
        elif isinstance(value, bytes):
            out += varint(field << 3 | 2) + varint(len(value)) + value
        elif value:                                        # proto3 leaves zeros out
            out += varint(field << 3) + varint(value)
    return out


def checksum(data):
    """Masked crc32c, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def table(pairs, restart=3):
    """One block of a sorted table, without its trailer."""
    out, last, restarts = b"", b"", []
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % restart == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(last), len(key)) and last[shared] == key[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + b"".join(struct.pack("<I", at) for at in [*restarts, len(restarts)])


def write_bundle(prefix, tensors, shards=2, per_block=5, partitioned=()):
    """{name: numpy array or bfloat16 tensor} as PREFIX.index and PREFIX.data-..."""
    numbers = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}
    data, entries = [b""] * shards, [(b"", message((1, shards), (3, message((1, 1)))))]
    for i, name in enumerate(sorted(tensors)):
        tensor = tensors[name]
        if torch.is_tensor(tensor):                        # bfloat16, which numpy lacks
            number, content = 14, tensor.contiguous().view(torch.int16).numpy().tobytes()
        else:
            number, content = numbers[tensor.dtype.name], np.ascontiguousarray(tensor).tobytes()
        shape = b"".join(message((2, message((1, size)) or b"")) or b"\x12\x00" for size in tensor.shape)
        shard = i % shards
        entry = message((1, number), (2, shape), (3, shard), (4, len(data[shard])), (5, len(content)),
                        (6, ("fixed32", checksum(content))))
        entries.append((name.encode(), entry + (message((7, b"\x0a\x02\x08\x01")) if name in partitioned else b"")))
        data[shard] += content
    out, handles = b"", []
    for i in range(0, len(entries), per_block):
        body = table(entries[i:i + per_block])
        handles.append((entries[min(i + per_block, len(entries)) - 1][0], varint(len(out)) + varint(len(body))))
        out += body + b"\0" + struct.pack("<I", checksum(body + b"\0"))
    places = b""
    for body in (table([]), table(handles, restart=1)):
        places += varint(len(out)) + varint(len(body))
        out += body + b"\0" + struct.pack("<I", checksum(body + b"\0"))
    out += places.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    Path(f"{prefix}.index").write_bytes(out)
    for shard, content in enumerate(data):
        Path(f"{prefix}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)


def mesh_variables(tensors):
    """The hub's tensors of a GPT-Neo under the names and shapes of the original code, as numpy arrays."""
    names = {"ln_1": "norm_1", "ln_2": "norm_2", "mlp": "mlp/conv1d_main", "weight": "g", "bias": "b"}
    out = {"global_step": np.array(7, np.int64)}
    for name, tensor in tensors.items():
        array = tensor.T.contiguous() if tensor.dim() == 2 and ".h." in name else tensor
        array = array if array.dtype == torch.bfloat16 else array.numpy()
        words = name.removeprefix("transformer.").split(".")
        if words[0] in ("wte", "wpe"):
            path = words[0]
        elif "out_proj" in name:
            path = f"h{words[1]}/attn/" + ("o" if words[-1] == "weight" else "compute_output_bias/o_b")
        elif "attention" in name:
            path = f"h{words[1]}/attn/{words[4][0]}"
        elif "mlp" in name:
            path = f"h{words[1]}/mlp/conv1d_main/{words[3]}/{'kernel' if words[-1] == 'weight' else 'bias'}"
        else:
            path = "/".join(names.get(word, word) for word in words).replace("h/", "h")
        out[f"gpt2/{path}"] = array
    out["gpt2/wpe/adam_m"] = np.zeros(tensors["transformer.wpe.weight"].shape, np.float32)
    return out
