"""Functions run in several connected processes, as torchrun would start them."""

import functools
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from processes import join_processes

FORKS = multiprocessing.get_context("forkserver")


def environment(i, N, port):
    """What torchrun sets for process i of N on one machine."""
    return dict(TORCHELASTIC_RUN_ID="test", RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(N),
                MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1")


@functools.cache
def messages():
    """A folder that goes when the tests end."""
    return tempfile.TemporaryDirectory(prefix="several-")


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(function, N, *args, connect=True):
    """N processes that call function(*args); what they print goes to FOLDER/out and FOLDER/err."""
    folder, port = tempfile.mkdtemp(dir=messages().name), free_port()
    FORKS.set_forkserver_preload(["test_parallel"])        # imported once, not in each process
    with pytest.MonkeyPatch.context() as patch:            # the server that forks finds these files
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
        multiprocessing.forkserver.ensure_running()
    made = []
    for i in range(N):
        made.append(FORKS.Process(target=child, args=(function, args, environment(i, N, port), folder, connect)))
        made[-1].start()
    return made, Path(folder)


def in_several(function, N, *args):
    """Call function(*args) in N connected processes; an assertion that fails in one fails here."""
    made, folder = start(function, N, *args)
    for process in made:
        process.join(300)
    said = (folder / "err").read_text(encoding="utf-8")
    codes = [process.exitcode for process in made]
    for process in made:                                   # one that hangs would wait for a day
        process.kill()
    assert codes == [0] * N, said


def child(function, args, env, folder, connect):
    os.environ |= env
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    if connect:
        join_processes()
    try:
        status = function(*args)
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)                  # at once: a peer that waits for this one sees it go
