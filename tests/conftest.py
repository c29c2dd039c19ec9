"""Shared by all tests: the project on the path, quiet transformers, one thread, kernels interpreted."""

import gc
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")             # both are read when the packages are imported
# Each of JAX's programs runs only once or twice here: compiling it quickly is what saves time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ["FLASH_ATTENTION_TRITON_AMD_ENABLE"] = "TRUE"   # flash-attn without CUDA: its own Triton backend

import pytest  # noqa: E402


def pytest_configure(config):
    """Not in the process that only hands tests to workers, since these imports take seconds."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    # jsonschema, which jupytext imports, compiles grammars with it for a second: for addresses that no notebook has.
    sys.modules.setdefault("rfc3987_syntax", None)
    gc.disable()
    import torch
    import transformers
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # The models are tiny, so a second thread only waits; make test-cpus tries other numbers.
    torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


def pytest_collection_modifyitems(items):
    """What loads torch's compiler comes first, and so into one worker: it takes longest, and loading takes seconds."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/test_decode.py") and "compiled_decoding" not in item.name)


def pytest_collection_finish():
    """What was imported stays: looking through all of it again and again for garbage took a twentieth of the time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def vectors_folder(tmp_path_factory):
    """A folder of test vectors, written once for all files of tests."""
    import compare
    path = tmp_path_factory.mktemp("vectors") / "vectors"
    assert compare.main(["--vectors", str(path)]) == 0
    return path
