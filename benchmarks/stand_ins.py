"""What replaces a missing package, so that `benchmark.py gpu` needs torch and triton alone.

Machines with a GPU are often borrowed, without a network and without pip.  The checks there look at
the models and not at texts or files, so each package that the project imports at the top of a
module may be missing:

    tqdm           no progress bar is shown
    tiktoken       every byte of a text becomes a token of its own: right ids, but more of them
    safetensors    checkpoints cannot be read or written, so train.py cannot be checked
    numpy          checkpoints in their original formats cannot be read
"""

import importlib.machinery
import importlib.util
import sys
import types


class NoBar:
    """tqdm's interface as far as this project uses it, without a bar."""

    def __init__(self, iterable=(), **options):
        self.iterable = iterable

    def __iter__(self):
        return iter(self.iterable)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ignore(self, *arguments, **options):
        pass

    update = set_postfix_str = write = close = ignore


class Bytes:
    """tiktoken.Encoding that joins nothing: one id for each byte."""

    def __init__(self, name, *, mergeable_ranks, **options):
        self.ranks = mergeable_ranks

    def encode_ordinary(self, text):
        return [self.ranks[bytes([byte])] for byte in text.encode("utf-8", errors="replace")]


def missing(package):
    """A function that raises ImportError with the package's name when it is called."""
    def function(*arguments, **options):
        raise ImportError(f"the package {package} is missing")
    return function


CONTENTS = {
    "tqdm": dict(tqdm=NoBar),
    "tiktoken": dict(Encoding=Bytes),
    "safetensors": dict(SafetensorError=type("SafetensorError", (Exception,), {}),
                        safe_open=missing("safetensors")),
    "safetensors.torch": dict(save_file=missing("safetensors"), load_file=missing("safetensors")),
}
# Parts of the project that need numpy.  It has no stand-in itself, as torch would take it for real.
NEED_NUMPY = {
    "originals": dict(original_config=lambda *arguments: None,         # there are none
                      original_files=lambda *arguments: None, read_original=missing("numpy")),
    "originals.flax": dict(write_flax=missing("numpy")),
    "originals.neox": dict(NUMPY_STATE=[]),
}


def install():
    """Put a stand-in in the place of each missing package; returns the names of these packages."""
    absent = [name for name in CONTENTS if "." not in name and name not in sys.modules
              and importlib.util.find_spec(name) is None]
    modules = {name: x for name, x in CONTENTS.items() if name.split(".")[0] in absent}
    if importlib.util.find_spec("numpy") is None:
        modules |= NEED_NUMPY
    for name, contents in modules.items():
        sys.modules[name] = module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)   # torch.compile reads it
        vars(module).update(contents)
    return absent
