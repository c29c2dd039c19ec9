"""flax_model.msgpack: GPT-Neo as transformers' Flax classes (until 4.57) kept it.

    read_flax, write_flax    one tensor in memory at a time

msgpack maps in maps, whose leaves are extensions of type 1: shape, name of the dtype, bytes in C
order (flax/serialization.py).
"""

import math
import mmap

import torch

from files import error_line, plain, shown

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64)}


def tensor_of(data, dtype, shape):
    """Bytes in C order -> a tensor, a copy of them.  ValueError for a wrong number of bytes."""
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for a tensor {tuple(shape)} of {dtype}")
    if not data:                                           # torch.frombuffer refuses none
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


# Flax names a weight by what its layer does with it, and keeps a matrix as (in, out), x @ kernel;
# torch's Linear computes x @ weight.T from (out, in).  So a kernel is transposed.
FLAX_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
ARRAY = 1                                                  # the extension's type
DEEPEST = 12                                               # levels of maps; the models have 7


def read_flax(path):
    """Yield (the hub's name, tensor) of a flax_model.msgpack or of one shard of it.

    Raises ValueError, naming the file, for one that is damaged or holds anything but arrays, and
    ModuleNotFoundError without the package msgpack.
    """
    msgpack = flax_package(path)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # 0 means 2**32 bytes, as much as msgpack can say
            unpacker = msgpack.Unpacker(file, max_buffer_size=0, ext_hook=flax_array)
            for name, tensor in flax_leaves(unpacker, data):
                stem, _, kind = name.rpartition(".")
                if not torch.is_tensor(tensor) or kind not in FLAX_NAMES:
                    raise ValueError(f"{plain(name)} is not an array of a known layer")
                if kind == "kernel":
                    tensor = tensor.T.contiguous()
                yield f"{stem}.{FLAX_NAMES[kind]}", tensor
            if unpacker.tell() != len(data):
                raise ValueError(f"{len(data) - unpacker.tell()} bytes follow the last array")
    except OSError:
        raise
    except Exception as error:                             # msgpack has many kinds
        raise ValueError(f"{path} is not a whole msgpack file of Flax ({error_line(error)}): "
                         "get it again") from None


def flax_leaves(unpacker, data, above=()):
    """Yield ("a.b.c", value) for each leaf.  The next byte of `data` tells a map from a leaf."""
    first = data[unpacker.tell()]
    if not (first & 0xF0 == 0x80 or first in (0xDE, 0xDF)):             # fixmap, map 16, map 32
        yield ".".join(above).replace("/", "."), unpacker.unpack()      # keys of shards are "a/b/c"
        return
    if len(above) > DEEPEST:
        raise ValueError("maps within maps without end")
    for _ in range(unpacker.read_map_header()):
        key = unpacker.unpack()
        if not isinstance(key, str):
            raise ValueError(f"the key {shown(key)} is not a text")
        if key == "__msgpack_chunked_array__":
            raise ValueError("an array in chunks, which Flax makes of 1 GiB and more: no "
                             "GPT-Neo has one")
        yield from flax_leaves(unpacker, data, (*above, key))


def flax_array(kind, payload):
    """The tensor in an extension of msgpack."""
    msgpack = flax_package(None)
    if kind != ARRAY:
        raise ValueError(f"an extension of type {kind}, which is not an array")
    shape, dtype, data = msgpack.unpackb(payload)
    if dtype not in DTYPES:
        raise ValueError(f"an array of dtype {shown(dtype)}; supported: {', '.join(DTYPES)}")
    return tensor_of(data, DTYPES[dtype], shape)


def write_flax(path, tensors):
    """Write {the hub's name: tensor} as one flax_model.msgpack, which Flax and read_flax both read.

    A tied head is left out by the caller.  Matrices other than the two embeddings are transposed.
    """
    packer, tree = flax_package(path).Packer(), {}
    for name, tensor in tensors.items():
        *above, last = name.split(".")
        if last == "weight":
            last = ("scale" if tensor.dim() == 1 else
                    "embedding" if above[-1] in ("wte", "wpe") else "kernel")
        inner = tree
        for level in above:
            inner = inner.setdefault(level, {})
        inner[last] = tensor.T if last == "kernel" else tensor
    with open(path, "wb") as file:
        write_flax_tree(file, packer, tree)


def write_flax_tree(file, packer, tree):
    if torch.is_tensor(tree):
        tensor = tree.detach().cpu().contiguous()
        data = tensor.flatten().view(torch.uint8).numpy().tobytes()
        dtype = str(tensor.dtype).removeprefix("torch.")
        file.write(packer.pack_ext_type(ARRAY, packer.pack([list(tensor.shape), dtype, data])))
        return
    file.write(packer.pack_map_header(len(tree)))
    for key, inner in tree.items():
        file.write(packer.pack(key))
        write_flax_tree(file, packer, inner)


def flax_package(path):
    try:
        import msgpack
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path} needs the package msgpack: pip "
                                  "install msgpack") from None
    return msgpack
