"""The checks of `benchmark.py gpu` under pytest, each case by itself, for a machine with a CUDA
GPU:

    TRITON_INTERPRET=0 .venv/bin/python -m pytest -m gpu

(Without the 0 conftest.py has Triton's kernels interpreted.)  On a machine without a GPU
tests/test_benchmark.py shows, at small sizes, that the command itself works.
"""

import pytest
import torch

import attention
from benchmarks import gpu

if not torch.cuda.is_available() or attention.INTERPRETED:
    pytest.skip("needs a CUDA GPU, and TRITON_INTERPRET=0", allow_module_level=True)
pytestmark = pytest.mark.gpu
CHECKS = [(name, function, case) for name, cases, function, _ in gpu.PARTS
          if name not in ("timings", "flex")
          for case in cases(gpu.LARGE)]


@pytest.mark.parametrize("name, function, case", CHECKS,
                         ids=[f"{n}: {gpu.text_of(c)}" for n, _, c in CHECKS])
def test_on_the_gpu(name, function, case):
    try:
        rows = function(case, "cuda", gpu.LARGE)
    except gpu.CannotRun as reason:
        pytest.skip(str(reason))
    assert rows and all(row["right"] for row in rows), rows
