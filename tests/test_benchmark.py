"""The benchmarks run, and what they say of the kernels holds."""

import json
import os
import subprocess
import sys

import pytest
import torch

import attention
from benchmarks import kernels
from conftest import ROOT
from test_triton import touched


def run(*command, **extra):
    """Outside Triton's interpreter, in which nothing can be compiled."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "FLASH"))} | extra
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


def test_kernels_compile_without_a_spill():
    """Width 64, half precision, A100 and H100, with padding and without; `benchmark.py kernels` does all."""
    code = ("import json\nfrom benchmarks import kernels as K\n"
            "if __name__ == '__main__': print(json.dumps([K.failures(found := K.compile_all((64,), ('fp16',))), found]))")
    out = run("-c", code, TRITON_INTERPRET="0")            # imported, and not interpreted
    assert out.returncode == 0, out.stderr
    failed, found = json.loads(out.stdout)
    assert failed == [] and len(found) == 12
    assert all(x["spilled"] == 0 and x["registers"] > 32 and x["tensor_core_instructions"] > 0 for x in found)


def test_failures_are_noticed():
    good = dict(dtype="fp16", spilled=0, shared=1, shared_limit=2, tensor_core_instructions=3)
    bad = [good | change for change in (dict(spilled=4), dict(shared=3), dict(tensor_core_instructions=0))]
    assert kernels.failures([good, *bad]) == bad


@pytest.mark.parametrize("name", kernels.KERNELS)
@pytest.mark.parametrize("T, window", [(2048, 256), (2048, 2048), (100, 7), (64, 1)])
def test_tiles_are_those_of_the_mask(name, T, window):
    """The count behind the computed table, against the mask itself."""
    sizes = attention.block_sizes(kernels.KERNELS[name], 64, torch.float16)
    seen = attention.visible(T, T, window)
    seen = seen.mT if name == "dk, dv" else seen
    expected = []
    for rows in seen.split(sizes["ROWS"]):
        columns = rows.any(0).nonzero()
        expected.append(-(-(int(columns.max() - columns.min()) + 1) // sizes["COLS"]))
    assert kernels.tiles(name, T, window, 64) == expected
    if name == "forward":
        assert expected == touched(T, T, window, 64, 64)


@pytest.mark.slow
def test_all_kernels_compile_as_the_page_says():
    """Every width and dtype; benchmarks/kernels.md is this command's output."""
    out = run("benchmark.py", "kernels")
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[1:] == (ROOT / "benchmarks" / "kernels.md").read_text().splitlines()[1:]


@pytest.mark.slow
def test_attention_is_timed_and_checked(tmp_path):
    """What runs on a CPU, with the reasons of what does not, and the plot."""
    pytest.importorskip("matplotlib")
    out = run("benchmark.py", "attention", "--lengths", "32", "64", "--heads", "1", "--head-dim", "16", "--window", "16",
              "--plot", str(tmp_path / "plot.png"), "--json", str(tmp_path / "all.json"))
    assert out.returncode == 0, out.stderr
    assert "there is no CUDA GPU" in out.stdout and "flash-attn package" in out.stdout
    rows = json.loads((tmp_path / "all.json").read_text())["attention"]
    assert len(rows) == 8 and all(isinstance(row["milliseconds"][b], float) for row in rows for b in ("naive", "sdpa"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000
