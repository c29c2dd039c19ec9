"""The benchmarks run, and what they say of the kernels holds."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import attention
import benchmark
from attention_cases import key_blocks
from benchmarks import gpu, kernels
from conftest import ROOT


def run(*command, **extra):
    """Outside Triton's interpreter, in which nothing can be compiled."""
    env = {name: value for name, value in os.environ.items()
           if not name.startswith(("TRITON", "FLASH"))} | extra
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True,
                          text=True)


def test_kernels_compile_without_a_spill(tmp_path):
    """Width 64, half precision: each kernel for a GPU, the largest one for both; the A100 with padding.

    In one process; test_kernels_of_every_kind_compile has more combinations, and benchmarks/kernels.md has all.
    """
    code = ("import json, triton\n"
            "from benchmarks import kernels as K\n"
            "which = [('forward', 'A100'), ('dq', 'H100'), ('dk, dv', 'A100'), ('dk, dv', 'H100')]\n"
            "found = [K.compiled((name, gpu, 'fp16', 64, gpu == 'A100')) for name, gpu in which]\n"
            "print(json.dumps([K.failures(found), found]))")
    out = run("-c", code, TRITON_CACHE_DIR=str(tmp_path))
    assert out.returncode == 0, out.stderr
    failed, found = json.loads(out.stdout)
    assert failed == [] and {x['kernel'] for x in found} == set(kernels.KERNELS)
    assert all(x["spilled"] == 0 and x["registers"] > 32 and x["tensor_core_instructions"] > 0
               for x in found)


def test_failures_are_noticed():
    good = dict(dtype="fp16", spilled=0, shared=1, shared_limit=2, tensor_core_instructions=3)
    bad = [good | change
           for change in (dict(spilled=4), dict(shared=3), dict(tensor_core_instructions=0))]
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
        columns, cols = rows.any(0).nonzero(), sizes["COLS"]
        start = cols if name == "dk, dv" else 1            # it begins at a multiple of this
        begin = int(columns.min()) // start * start
        expected.append(-(-(int(columns.max()) + 1 - begin) // cols))
    assert kernels.tiles(name, T, window, 64) == expected
    if name == "forward":
        assert expected == key_blocks(T, T, window, 64, 64)


@pytest.mark.slow
def test_kernels_of_every_kind_compile(tmp_path):
    """Each kernel, GPU, dtype and width, and both kinds of padding, in combinations that differ."""
    code = ("import json, triton\n"
            "from benchmarks import kernels as K\n"
            "jobs = K.combinations(K.WIDTHS, K.DTYPES)[::7]\n"
            "assert [len(set(kind)) for kind in zip(*jobs)] == [3, 2, 3, 5, 2]\n"
            "print(json.dumps(K.failures([K.compiled(job) for job in jobs])))")
    out = run("-c", code, TRITON_CACHE_DIR=str(tmp_path))
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout) == []


@pytest.mark.long
def test_all_kernels_compile_as_the_page_says():
    """Every combination, which takes both cores for four minutes; the page is this command's output."""
    out = run("benchmark.py", "kernels")
    assert out.returncode == 0, out.stderr
    page = (ROOT / "benchmarks" / "kernels.md").read_text()
    assert out.stdout.splitlines()[1:] == page.splitlines()[1:]


@pytest.mark.slow
def test_attention_is_timed_and_checked(tmp_path):
    """What runs on a CPU, with the reasons of what does not, and the plot."""
    pytest.importorskip("matplotlib")
    out = run("benchmark.py", "attention", "--lengths", "32", "64", "--heads", "1", "--head-dim",
              "16", "--window", "16",
              "--plot", str(tmp_path / "plot.png"), "--json", str(tmp_path / "all.json"))
    assert out.returncode == 0, out.stderr
    assert "there is no CUDA GPU" in out.stdout and "flash-attn package" in out.stdout
    rows = json.loads((tmp_path / "all.json").read_text())["attention"]
    assert len(rows) == 8 and all(isinstance(row["milliseconds"][b], float)
                                  for row in rows for b in ("naive", "sdpa"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Two shapes small enough to time in a test; returns a function that runs a command and gives
    its JSON."""
    from benchmarks import growth
    from benchmarks.shapes import SHAPES
    from neo import GPTNeoConfig
    from neox import GPTNeoXConfig
    small = {"tiny-neo": GPTNeoConfig(hidden_size=16, num_layers=2, num_heads=2,
                                      attention_types=[[["global", "local"], 1]]),
             "tiny-neox": GPTNeoXConfig(vocab_size=50304, hidden_size=16, num_hidden_layers=2,
                                        num_attention_heads=2,
                                        intermediate_size=64, rotary_pct=0.5)}
    for name, config in small.items():
        monkeypatch.setitem(SHAPES, name, config)
    monkeypatch.setattr(growth, "MODELS", {"tiny-neo": "-", "tiny-neox": "--"})
    monkeypatch.setattr(growth, "CONTEXTS", (16, 300))
    monkeypatch.setattr(growth, "LENGTHS", (20, 300))

    def command(*arguments):
        benchmark.main([*arguments, "--json", str(tmp_path / "found.json")])
        return json.loads((tmp_path / "found.json").read_text())[arguments[0]]

    return command


def test_prefill_is_timed_for_all(tiny, capsys, tmp_path):
    found = tiny("prefill", "--model", "tiny-neo", "--rounds", "2", "--lengths", "20", "300",
                 "--plot", str(tmp_path / "plot.png"))
    assert {T: {name: len(times) for name, times in figures.items()}
            for T, figures in found.items()} == {
        T: {"ours": 2, "transformers": 2} for T in ("20", "300")}
    assert "share of the floor" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-neo", pytest.param("tiny-neox", marks=pytest.mark.long)])
def test_decode_and_batch_are_timed_for_all(tiny, model, capsys):
    names = {"ours", "compiled", "transformers"}
    found = tiny("decode", "--model", model, "--rounds", "2", "--contexts", "16", "300",
                 "--new-tokens", "3")
    assert found.keys() == {"16", "300"} and all(figures.keys() == names
                                                 for figures in found.values())
    found = tiny("batch", "--model", model, "--rounds", "1", "--new-tokens", "3")
    assert found.keys() == {"1", "4", "16"} and all(figures.keys() == names
                                                    for figures in found.values())
    assert "| 16 |" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_training_and_growth(tiny, capsys, tmp_path):
    """Peaks are of processes with torch inside, so some hundred MB; both pictures are drawn."""
    found = tiny("memory", "--model", "tiny-neo")
    assert all(1e8 < peak < 2e9 for peaks in found.values() for peak in peaks)
    found = tiny("train", "--model", "tiny-neox", "--rounds", "1")
    assert found["seconds"].keys() == found["peak bytes"].keys() == {"ours", "transformers"}
    found = tiny("growth", "--rounds", "1", "--new-tokens", "2", "--plot", str(tmp_path / "plots"))
    assert found["cache"]["tiny-neo"]["300"] == {"ours": 4 * 2 * 16 * (300 + 256),
                                                 "transformers": 4 * 2 * 16 * 600}
    assert found["cache"]["tiny-neox"]["300"]["ours"] == 4 * 2 * 16 * 600
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"decode.png", "prefill.png"}
    assert "one query's attention" in capsys.readouterr().out


def test_a_slow_minute_falls_on_all_points():
    """growth.by_turns: each round goes through all names at all points before the next one begins."""
    from benchmarks import growth
    order = []
    found = growth.by_turns((16, 300), lambda n: {name: lambda: order.append((n, name)) or len(order)
                                                  for name in ("ours",)}, 2)
    assert order == [(16, "ours"), (300, "ours")] * 3      # the first round warms up
    assert found == {16: {"ours": [3, 5]}, 300: {"ours": [4, 6]}}


@pytest.mark.slow
def test_ceilings(tiny, capsys):
    found = tiny("ceilings")
    assert all(value > 0 for value in found.values()) and "weight first" in capsys.readouterr().out


# benchmark.py gpu, as far as it can be tried without a GPU

def few(part, every):
    """A part of the command that takes one case in so many, without the interpreter, which is slow.
    """
    name, cases, function, share = part

    def some(sizes):
        return [x for x in cases(sizes) if "triton" not in x][::every]

    return name, some, function, share


def gpu_on_cpu(folder):
    """Run the command's code at small sizes on the CPU; returns the report."""
    benchmark.main(["gpu", "--device", "cpu", "--out", str(folder)])
    return json.loads((folder / "gpu.json").read_text())


def test_the_gpu_command_works_at_small_sizes(monkeypatch, tmp_path):
    """A few cases of each part, and what is written about them."""
    pytest.importorskip("matplotlib")
    every = dict(backends=2, models=4, generation=99, compiled=99, training=9, timings=1, flex=99)
    every["whole models"] = 4
    monkeypatch.setattr(gpu, "PARTS", [few(part, every[part[0]]) for part in gpu.PARTS])
    report = gpu_on_cpu(tmp_path)
    assert [part["name"] for part in report["parts"]] == ["backends", "models", "generation",
                                                          "training", "whole models", "timings"]
    assert all(part["rows"] and part["left_out"] == [] for part in report["parts"])
    page = (tmp_path / "gpu.md").read_text()
    assert "## global layer, forward and backward: milliseconds (share of the bandwidth" in page
    assert "## Whole models, one text: milliseconds" in page and "| gpt-neo-125m | a prompt | " in page
    assert "* models, 2 cases: flash: it needs a GPU" in page
    assert "Plot: the plot is gpu.png." in page
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


@pytest.mark.slow
def test_every_fourth_case_of_the_gpu_command_at_small_sizes(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PARTS", [(name, lambda sizes, cases=cases: cases(sizes)[::4], *rest)
                                       for name, cases, *rest in gpu.PARTS])
    report = gpu_on_cpu(tmp_path)
    assert all(x["right"] for part in report["parts"] for x in part["rows"])
    assert {x["reason"].split()[0] for part in report["parts"] for x in part["cannot_run"]} <= {
        "flash:", "triton:"}                               # the last: not timed in the interpreter


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        benchmark.main(["gpu", "--out", str(tmp_path / "new")])
    assert end.value.code == 2 and not (tmp_path / "new").exists()
    assert capsys.readouterr().err == (
        "benchmark.py gpu: error: torch finds no CUDA GPU on this machine\n")


def test_what_is_wrong_fails_the_gpu_command(monkeypatch, tmp_path):
    """A backend that errs, one that raises, one that is missing, and one that the time does not
    reach."""
    def check(case, device, sizes):
        if case == "broken":
            raise RuntimeError("illegal memory access")
        if case == "missing":
            raise gpu.CannotRun("no such package")
        return [gpu.row(case, float("nan") if case == "nan" else 3.0, 2.0)]

    part = gpu.run_part("p", lambda sizes: ["large", "nan", "broken", "missing"], check, "cpu",
                        gpu.SMALL, float("inf"))
    assert [x["right"] for x in part["rows"]] == [False, False, False]
    assert part["cannot_run"] == [dict(case="missing", reason="no such package")]
    late = gpu.run_part("p", lambda sizes: ["large"], check, "cpu", gpu.SMALL, 0.0)
    assert late["rows"] == [] and late["left_out"] == ["large"]
    monkeypatch.setattr(gpu, "PARTS", [("p", lambda sizes: ["large", "missing"], check, 1.0)])
    with pytest.raises(SystemExit, match="1 of the results are wrong"):
        gpu_on_cpu(tmp_path)
    assert "large: 3, limit 2" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("name", ["sdpa", pytest.param("triton", marks=pytest.mark.slow)])
def test_the_gpu_checks_notice_a_wrong_backend(monkeypatch, name):
    """A window that is forgotten, in each check that looks at numbers."""
    right = attention.BACKENDS[name]

    def wrong(q, k, v, *, window=None, **how):
        return right(q, k, v, **how)

    monkeypatch.setitem(attention.BACKENDS, name, wrong)
    for cached in (gpu.errors, gpu.model_errors):
        cached.cache_clear()
    rows = (gpu.check_backend((16, torch.float32, False, name), "cpu", gpu.SMALL)
            + gpu.check_model(("neo", name, torch.float32), "cpu", gpu.SMALL)
            + gpu.check_generation(("neo", name, torch.float32, False), "cpu", gpu.SMALL))
    if name == "sdpa":                                     # triton is not timed in the interpreter
        rows += gpu.time_backend((32, "local", True, name), "cpu", gpu.SMALL)
    for cached in (gpu.errors, gpu.model_errors):
        cached.cache_clear()
    wrong = [x["what"] for x in rows if not x["right"]]
    assert len(wrong) == len(rows) - 1, rows    # sampled twice, it is equal


ALONE = """
import sys
sys.path[:0] = [{packages!r}, {root!r}]
sys.argv = ["benchmark.py", "gpu", "--device", "cpu", "--out", {out!r}, "--minutes", "0"]
import benchmark
benchmark.main()
from benchmarks import gpu
case = ("neo", "sdpa", benchmark.torch.float32, False)
assert gpu.check_generation(case, "cpu", gpu.SMALL)[0]["right"]
try:
    gpu.check_training("bfloat16", "cpu", gpu.SMALL)
except gpu.CannotRun as reason:
    print(reason)
"""


def test_the_gpu_command_needs_torch_alone(tmp_path):
    """In a Python that sees torch, its own requirements and nothing else."""
    packages, seen, wanted = tmp_path / "packages", set(), ["torch"]
    packages.mkdir()
    while wanted:
        if (name := wanted.pop()) in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:    # for another system or Python
            continue
        wanted += [re.match(r"[\w.-]+", line)[0] for line in distribution.requires or []
                   if "extra ==" not in line]
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            (packages / top).symlink_to(distribution.locate_file(top))
    assert not any((packages / name).exists()
                   for name in ("numpy", "tqdm", "tiktoken", "safetensors", "matplotlib"))
    code = ALONE.format(packages=str(packages), root=str(ROOT), out=str(tmp_path / "out"))
    out = run("-I", "-S", "-c", code)
    assert out.returncode == 0, out.stderr
    assert out.stdout.endswith("train.py: the package safetensors is missing\n")
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "Missing packages: tqdm, tiktoken, safetensors." in page
    assert "no plot was drawn, because matplotlib is missing" in page


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--lengths", "8", "-1"], ["--window", "nan"], ["--heads", "9" * 20],
                                     ["--json", "nowhere/figures.json"], ["--plot", "nowhere/figure.png"], ["--json", "."]])
def test_bad_options_are_said_before_anything_is_measured(options, capsys):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["attention", *options])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("benchmark.py: error: ") or options[0] in last or options[1] in last
