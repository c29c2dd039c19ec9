"""The notebooks say what the code does: fresh, executed, checked, and their exercises can be solved and failed."""

import ast
import linecache
import re
import resource
import statistics
import sys

import pytest
import torch

from conftest import ROOT

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("matplotlib.pyplot")
jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
sys.path.insert(0, str(ROOT / "notebooks"))
import build  # noqa: E402
import lesson  # noqa: E402

MODULES = ["attention", "base", "compare", "decode", "generate", "heads", "load_weights", "neo", "neox", "score", "tokenizer", "train", "training/tasks", "training/texts"]
ALL = ["0_setup_and_shapes", "1_gpt_neo", "2_gpt_neox", "3_triton_window", "4_weights_and_equivalence", "5_sampling", "6_finetuning"]
notebooks = pytest.mark.parametrize("name", build.NAMES)


def source(name):
    return jupytext.read(ROOT / "notebooks" / "source" / f"{name}.py")


def committed(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def exercises(name):
    """[(stub cell, check cell, text with hint and solution, wrong cells)] in order."""
    found = []
    for cell in source(name).cells:
        if build.tagged(cell, "stub"):
            found.append([cell, None, "", []])
        elif build.tagged(cell, "check"):
            found[-1][1] = cell
        elif build.tagged(cell, "wrong"):
            found[-1][3].append(cell)
        elif cell.cell_type == "markdown" and "<summary>Solution" in cell.source:
            found[-1][2] = cell.source
    return found


def run(text, title, space):
    """exec, with its lines where inspect and Triton look for the source of a function."""
    title = f"<{title} {len(linecache.cache)}>"
    linecache.cache[title] = (len(text), None, text.splitlines(keepends=True), title)
    exec(compile(text, title, "exec"), space)


def solution(text):
    return re.search(r"<summary>Solution.*?```python\n(.*?)```", text, re.DOTALL)[1]


@notebooks
def test_outputs_belong_to_the_source(name):
    """Same cells, all of them executed, no error among the outputs."""
    expected, found = build.read(name), committed(name)
    assert [(c.cell_type, c.source) for c in found.cells] == [(c.cell_type, c.source) for c in expected.cells], "make notebooks"
    assert [c.execution_count for c in code(found)] == list(range(1, len(code(found)) + 1))
    assert not any(output.output_type == "error" for c in code(found) for output in c.outputs)


@notebooks
def test_shape(name):
    """Short cells, an opening with time, needs and objectives, pictures, a deliberate mistake, exercises with all parts."""
    notebook = committed(name)
    cells = code(notebook)
    assert statistics.median(len(c.source.splitlines()) for c in cells) <= 6
    assert max(len(line) for c in cells for line in c.source.splitlines()) <= 98        # a page on GitHub
    opening = notebook.cells[0].source.lower()
    assert opening.startswith("# ") and all(word in opening for word in ("minutes", "needs", "objectives"))
    assert any("image/png" in output.get("data", {}) for c in cells for output in c.outputs)
    if name != "0_setup_and_shapes":
        assert "deliberate mistake" in "\n".join(c.source for c in notebook.cells).lower()
    for stub, check, text, wrong in exercises(name):
        assert check is not None and "exercise(" in check.source and wrong, stub.source
        assert "<summary>Hint" in text and ast.parse(solution(text)).body


@notebooks
def test_defines_nothing_that_the_modules_define(name):
    taken = {node.name for module in MODULES if (ROOT / f"{module}.py").exists()
             for node in ast.parse((ROOT / f"{module}.py").read_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for cell in code(committed(name)):
        text = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!")))
        defined = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert not defined & taken, cell.source


def test_all_are_there_and_small():
    """Seven, each with its row and its picture in the README."""
    assert build.NAMES == ALL
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ALL:
        assert f"(notebooks/{name}.ipynb)" in readme and f"notebooks/pictures/{name}.png" in readme
        assert build.cover(committed(name)) == (ROOT / "notebooks" / "pictures" / f"{name}.png").read_bytes()
    assert sum((ROOT / "notebooks" / f"{name}.ipynb").stat().st_size for name in ALL) < 12e6
    assert sum(len(exercises(name)) for name in ALL) >= 18


@pytest.mark.slow
@notebooks
def test_runs_from_top_to_bottom(name):
    """In at most 180 seconds of one core, whatever else runs on this machine."""
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])    # noqa: E731
    before = used()
    build.execute(build.read(name))
    print(f"{name}: {used() - before:.0f} s of one core")
    assert 1 < used() - before <= 180


@pytest.fixture
def as_before():
    """A notebook may switch off gradients or take one thread; the tests after it shall not."""
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    yield
    torch.set_grad_enabled(gradients)
    torch.set_num_threads(threads)
    matplotlib.pyplot.close("all")


@pytest.mark.slow
@notebooks
def test_exercises(name, monkeypatch, as_before):
    """Each stub and each wrong answer is rejected, each solution accepted."""
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT / "notebooks")
    parts, done, space = exercises(name), 0, {"__name__": "__main__", "display": print}
    for cell in code(build.read(name)):
        if build.tagged(cell, "check"):
            stub, check, text, wrong = parts[done]
            done += 1
            number = re.search(r'exercise\("(.*?)"\)', check.source)[1]
            for answer, right in [*((w.source, False) for w in (stub, *wrong)), (solution(text), True)]:
                run(answer, f"{name} answer {number}", space)
                run(check.source, f"{name} check {number}", space)
                assert lesson.results[number] is right, answer
        elif not build.tagged(cell, "stub"):
            text = "\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!")))
            run(text, name, space)
    assert done == len(parts)
