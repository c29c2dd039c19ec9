"""Files of torch.save (.bin), read without running what is in them.

Such a file is a pickle, which is a program: it can call any function.  So only tensors are taken
from it, and its size is checked before.  transformers wrote these files before safetensors.

    read_bin    {name: tensor} of a file
"""

import os
import pickle
import pickletools
import zipfile

import torch

from files import error_line, plain, shown
from originals.neox import NUMPY_STATE

LARGEST_PICKLE = 2**20           # bytes; GPT-NeoX-20B's list of 660 tensors is an eighth of this
MOST_STEPS = 300_000             # in a pickle; a tensor takes about 30


def read_bin(path, module=False):
    """{name: tensor} of a file written by torch.save; code in the file is not run.

    module: read the entry "module" of the file's dict, as in a checkpoint of DeepSpeed.
    Raises ValueError, naming the file, for a damaged file, for one with anything but plain tensors,
    and for one that would take much more time or memory than its weights need.
    """
    try:
        zipped = zipfile.is_zipfile(path)       # older files, of torch before 1.6, are not mapped
        check_size(path, zipped)
        with torch.serialization.safe_globals(NUMPY_STATE if module else []):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        state = state["module"] if module else state
    except pickle.UnpicklingError:
        raise ValueError(f"{path} was refused: it holds something other than tensors, which could "
                         "run code when loaded, or it is damaged") from None
    except OversizeError as error:
        raise ValueError(f"{path} was refused: {error}") from None
    except Exception as error:                          # a broken pickle can raise anything
        raise ValueError(f"{path} is not a whole .bin file ({error_line(error)}): "
                         "get it again") from None
    if problem := something_else(state):
        raise ValueError(f"{path} must hold a dict of tensors, but {problem}")
    for name, tensor in state.items():
        if problem := oddity(tensor):
            raise ValueError(f"{path}: tensor {plain(name)} is {problem}; supported "
                             "are plain tensors")
    return {name: tensor.detach().resolve_neg() for name, tensor in state.items()}


class OversizeError(Exception):
    """A .bin file is larger, or has more in it, than any model needs."""


def check_size(path, zipped):
    """Raise OversizeError, before anything is unpickled, for a file that cannot be a model's.

    torch.save never compresses, and the list of a model's tensors is short.
    """
    if not zipped:
        with open(path, "rb") as file:                     # four pickles; the last one is the list
            for _ in range(4):
                check_steps(file)
        return
    with open(path, "rb") as file:                         # a zip ends with the length of its list
        file.seek(max(0, os.path.getsize(path) - 2**16))
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if 0 <= end and LARGEST_PICKLE < int.from_bytes(tail[end + 12:end + 16], "little") < 2**32 - 1:
        raise OversizeError("it holds more entries than any model has tensors")
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise OversizeError("it is compressed, which torch.save never does")
            if entry.filename.endswith(".pkl"):
                if entry.file_size > LARGEST_PICKLE:
                    raise OversizeError("it names more tensors than any model has")
                with archive.open(entry) as file:
                    check_steps(file)


def check_steps(file):
    """Raise OversizeError for a pickle of too many steps, which are counted and not executed."""
    for step, _ in enumerate(pickletools.genops(file)):
        if step > MOST_STEPS:
            raise OversizeError("it names more tensors than any model has")


def something_else(state):
    """What the content of a .bin file has that is not a named tensor, or None."""
    if not isinstance(state, dict):
        return f"holds a {type(state).__name__}"
    others = {name: value for name, value in state.items()
              if not isinstance(name, str) or not torch.is_tensor(value)}
    for name, value in others.items():
        if isinstance(value, dict) and any(map(torch.is_tensor, value.values())):
            return f"has one in its entry {shown(name)}: save that entry by itself"
    for name, value in others.items():
        return f"its entry {shown(name)} is of type {type(value).__name__}"
    return None


def oddity(tensor):
    """Why a tensor of a .bin file is not a plain array of numbers, or None if it is one."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_meta:
        return "on the meta device, which has no numbers"
    if tensor.is_complex():
        return "complex"
    return None
