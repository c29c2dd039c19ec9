"""Several processes of one command, started by torchrun; without torchrun there is one.

In training process 0 evaluates, prints and writes.  The others only read, so all must see the
same files.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from files import error_line, one_line, plain


class SharedError(ValueError):
    """Something that went wrong in one process, raised in all of them."""


def processes():
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank():
    """Which process this is, counted from 0."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def say(text, file=None):
    """Print, in process 0 only, to standard error or to `file`."""
    if rank() == 0:
        print(text, file=file or sys.stderr)


def join_processes():
    """Connect to the other processes.  They wait while process 0 evaluates: the timeout is long."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))


def gathered(thing):
    """A list with each process's `thing`, in every process."""
    if processes() == 1:
        return [thing]
    things = [None] * processes()
    dist.all_gather_object(things, thing)
    return things


def everywhere(function, *args):
    """function(*args) in every process.

    Where it raises ValueError or OSError in one process, all of them raise SharedError with that
    message, so that none waits for a process that has ended.
    """
    if processes() == 1:
        return function(*args)
    result = problem = None
    try:
        result = function(*args)
    except (ValueError, OSError) as error:
        problem = one_line(error)
    for problem in filter(None, gathered(problem)):
        raise SharedError(problem)
    return result


def lost_process(error):
    """Does an error say that another process has ended?  Gloo and NCCL raise RuntimeError then."""
    return processes() > 1 and isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "NCCL", "Connection closed", "Connection reset"))


def usable_device(name):
    """The torch.device of that name; of several processes each has its own GPU.

    Raises ValueError where this machine or this torch has no such device.
    """
    try:
        if name == "cuda" and processes() > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(name)
        number = torch.ones(1, device=name)
        number.item()                                       # fails on the device "meta"
        return number.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {plain(name)} cannot be used here: "
                         f"{error_line(error):.100}") from None


def total(number):
    """The sum of a number over the processes."""
    if processes() == 1:
        return number
    number = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(number)
    return number.item()
