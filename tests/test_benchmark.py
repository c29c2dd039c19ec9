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


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Two shapes small enough to time in a test; returns a function that runs a command and gives its JSON."""
    import benchmark
    from benchmarks import growth
    from benchmarks.shapes import SHAPES
    from neo import GPTNeoConfig
    from neox import GPTNeoXConfig
    small = {"tiny-neo": GPTNeoConfig(hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]),
             "tiny-neox": GPTNeoXConfig(vocab_size=50304, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                        intermediate_size=64, rotary_pct=0.5)}
    for name, config in small.items():
        monkeypatch.setitem(SHAPES, name, config)
    monkeypatch.setattr(growth, "MODELS", {"tiny-neo": "-", "tiny-neox": "--"})
    monkeypatch.setattr(growth, "CONTEXTS", (16, 300))
    monkeypatch.setattr(growth, "LENGTHS", (20, 300))

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, "--json", str(tmp_path / "found.json")])
        benchmark.main()
        return json.loads((tmp_path / "found.json").read_text())[arguments[0]]

    return command


def test_prefill_is_timed_for_all(tiny, capsys, tmp_path):
    found = tiny("prefill", "--model", "tiny-neo", "--rounds", "2", "--lengths", "20", "300", "--plot", str(tmp_path / "plot.png"))
    assert {T: {name: len(times) for name, times in figures.items()} for T, figures in found.items()} == {
        T: {"ours": 2, "transformers": 2} for T in ("20", "300")}
    assert "share of the floor" in capsys.readouterr().out and (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-neo", "tiny-neox"])
def test_decode_and_batch_are_timed_for_all(tiny, model, capsys):
    names = {"ours", "compiled", "transformers"}
    found = tiny("decode", "--model", model, "--rounds", "2", "--contexts", "16", "300", "--new-tokens", "3")
    assert found.keys() == {"16", "300"} and all(figures.keys() == names for figures in found.values())
    found = tiny("batch", "--model", model, "--rounds", "1", "--new-tokens", "3")
    assert found.keys() == {"1", "4", "16"} and all(figures.keys() == names for figures in found.values())
    assert "| 16 |" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_training_and_growth(tiny, capsys, tmp_path):
    """Peaks are of processes with torch inside, so some hundred MB; both pictures are drawn."""
    found = tiny("memory", "--model", "tiny-neo")
    assert all(1e8 < peak < 2e9 for peaks in found.values() for peak in peaks)
    found = tiny("train", "--model", "tiny-neox", "--rounds", "1")
    assert found["seconds"].keys() == found["peak bytes"].keys() == {"ours", "transformers"}
    found = tiny("growth", "--rounds", "1", "--new-tokens", "2", "--plot", str(tmp_path / "plots"))
    assert found["cache"]["tiny-neo"]["300"] == {"ours": 4 * 2 * 16 * (300 + 256), "transformers": 4 * 2 * 16 * 600}
    assert found["cache"]["tiny-neox"]["300"]["ours"] == 4 * 2 * 16 * 600
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"decode.png", "prefill.png"}
    assert "one query's attention" in capsys.readouterr().out


@pytest.mark.slow
def test_ceilings(tiny, capsys):
    found = tiny("ceilings")
    assert all(value > 0 for value in found.values()) and "weight first" in capsys.readouterr().out
