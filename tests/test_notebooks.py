"""The notebooks say what the code does: fresh, executed, checked, and their exercises can be solved and failed."""

import ast
import html
import linecache
import math
import re
import resource
import statistics
import sys
import textwrap
import types

import numpy as np
import pytest
import torch

import neo
import neox
from conftest import ROOT

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("matplotlib.pyplot")
ipywidgets = pytest.importorskip("ipywidgets")
jupytext = pytest.importorskip("jupytext")
nbconvert = pytest.importorskip("nbconvert")
nbformat = pytest.importorskip("nbformat")
sys.path.insert(0, str(ROOT / "notebooks"))
import build  # noqa: E402
import lesson  # noqa: E402

MODULES = sorted(path for folder in ("", "training", "fast") for path in (ROOT / folder).glob("*.py"))
NUMBERS = ["0", "1", "2", "3", "3b", "4", "5", "6", "6b"]
SHORT = {"3", "3b", "6", "6b"}                             # their notebooks have at most 65 cells
# (notebook, function): three times the arguments and what is then to be seen: texts of the picture or of what is
# printed, or a function of the list of axes.
SLIDERS = {
    ("1_gpt_neo", "mask_of"): [
        (dict(T=24, W=6), ["visible(24, 24, 6): 129 scores"]),
        (dict(T=1, W=24), ["visible(1, 24, 24): 24 scores"]),
        (dict(T=3, W=2), ["visible(3, 24, 2): 6 scores", lambda axes: axes[0].images[0].get_array().sum() == 6]),
    ],
    ("2_gpt_neox", "hands"): [
        (dict(position=0), ["pair 0", "pair 7", lambda axes: hands_at(axes, 0)]),
        (dict(position=40), [lambda axes: hands_at(axes, 40)]),
        (dict(position=511), [lambda axes: hands_at(axes, 511)]),
    ],
    ("3_triton_window", "tile_grid"): [
        (dict(window=64, block=64), ["15 tiles, 2.00 times the needed scores"]),
        (dict(window=16, block=128), ["7 tiles, 14.21 times the needed scores"]),
        (dict(window=512, block=16), ["528 tiles, 1.03 times the needed scores", lambda axes: len(axes[0].patches) >= 528]),
    ],
    ("4_weights_and_equivalence", "mistake_at"): [
        (dict(mistake="window one too long", T=65), ["window one too long, T = 65", lambda axes: lasting(axes) == "00+++++"]),
        (dict(mistake="window one too long", T=64), ["window one too long, T = 64", lambda axes: lasting(axes) == "0000000"]),
        (dict(mistake="exact GELU for tanh", T=1), ["exact GELU for tanh, T = 1", lambda axes: lasting(axes) == "0++++++"]),
    ],
    ("5_sampling", "candidates_slider"): [
        (dict(t=1.0, p=0.9), ["t 1.0, p 0.90: 139 tokens"]),
        (dict(t=1.0, p=1.0), ["t 1.0, p 1.00: 2048 tokens"]),
        (dict(t=0.1, p=0.05), ["t 0.1, p 0.05: 1 tokens", lambda axes: axes[0].patches[18].get_width() == 1]),
    ],
    ("6_finetuning", "rate_slider"): [                     # each trains a head; the ends of its two losses
        (dict(log_rate=-4.5), ["rate 3.2e-05", lambda axes: axes[0].lines[0].get_ydata()[-1] > 0.95]),
        (dict(log_rate=-2.5), ["rate 0.0032", lambda axes: 0.3 < axes[0].lines[0].get_ydata()[-1] < 0.6]),
        (dict(log_rate=0.0), ["rate 1", lambda axes: axes[0].lines[1].get_ydata()[-1] > 2]),
    ],
}
# They run half of their notebook first: the states of 840 passages, a dozen traces, a text of 500 tokens.
SLOW_SLIDERS = {("6_finetuning", "rate_slider"), ("4_weights_and_equivalence", "mistake_at"), ("5_sampling", "candidates_slider")}


def lasting(axes):
    """For a line over the rows of a model, "0" for each row that lies on the floor of exact zeros, else "+"."""
    heights = axes[0].lines[0].get_ydata()
    labels = dict(zip(axes[0].get_yticks(), (label.get_text() for label in axes[0].get_yticklabels())))
    return "".join("0" if labels.get(height) == "exactly 0" else "+" for height in heights)


def hands_at(axes, position):
    """Is there one arrow for each of 8 pairs, labelled with the position and turned by position · speed?"""
    texts = [ax.texts for ax in axes]
    angles = [position * 10 ** (-i / 2) for i in range(8)]
    return [label.get_text() for _, label in texts] == [str(position)] * 8 and all(
        math.dist(arrow.xy, (math.cos(angle), math.sin(angle))) < 1e-3 for (arrow, _), angle in zip(texts, angles))


notebooks = pytest.mark.parametrize("name", build.NAMES)


def source(name):
    return jupytext.read(ROOT / "notebooks" / "source" / f"{name}.py")


def committed(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def number_of(name):
    return name.split("_")[0]


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
def test_opening(name):
    """Title with its number, a link to the glossary, and the minutes that a reader and the exercises need, in the tables too."""
    notebook = committed(name)
    opening = notebook.cells[0].source
    assert opening.startswith(f"# {number_of(name)}. ") and "](README.md" in opening
    text = re.sub(r"<details>.*?</details>", "", "\n".join(markdown(notebook)), flags=re.DOTALL)
    words = len(text.split())
    read = [c for c in code(notebook) if not set(c.metadata.get("tags", [])) & {"stub", "check"}]
    needed = words / 180 + len(read) / 2
    claimed = [int(n) for n in re.findall(r"(\d+) minutes", opening)]         # of reading, of the exercises
    assert claimed[0] % 5 == 0 and needed <= claimed[0] <= 2 * needed, f"{needed:.0f} minutes of reading at least"
    exercise_minutes = [int(n) for n in re.findall(DIFFICULTY, "\n".join(markdown(notebook)), re.MULTILINE)]
    assert len(exercise_minutes) == len(exercises(name))
    assert claimed[1:] == [sum(exercise_minutes)]
    table = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"\({name}\.ipynb\) \| (\d+) \| (\d+) \|", table).groups() == tuple(map(str, claimed))
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"\(notebooks/{name}\.ipynb\) \| (\d+) \|", table)[1] == str(claimed[0])


DIFFICULTY = r"^Difficulty [1-5] of 5 · (\d+) minutes"


@notebooks
def test_headings(name):
    """`## 1. Title` in order, `### Exercise 2.4 · title` with its line, `## In three sentences`, `## Further`; no others."""
    number = number_of(name)
    text = re.sub(r"```.*?```", "", "\n".join(markdown(committed(name))), flags=re.DOTALL)
    found = re.findall(r"^##+ .*$", text, re.MULTILINE)
    sections = [line for line in found if line.startswith("## ")]
    assert sections[-2:] == ["## In three sentences", "## Further"]
    assert [re.match(r"## (\d+)\. \S", line)[1] for line in sections[:-2]] == [str(n + 1) for n in range(len(sections) - 2)]
    exercise_lines = [line for line in found if not line.startswith("## ")]
    assert [re.match(r"### Exercise (\S+) · \S", line)[1] for line in exercise_lines] == [
        f"{number}.{n + 1}" for n in range(len(exercise_lines))]
    for line in exercise_lines:
        assert re.match(DIFFICULTY, text.split(line)[1].strip()), f"no line of difficulty and minutes under {line}"
    summary = text.split("## In three sentences")[1].split("## Further")[0].strip()
    assert len(re.split(r"(?<=[.!?])\s+", summary)) == 3, summary


@notebooks
def test_form(name):
    """No cell is named by its place, sources are shown by `show`, three wrong answers an exercise, few cells."""
    notebook = committed(name)
    by_place = r"(?i)\b((second|third|fourth|fifth|last) cell|next (two|three|few) cells|cells? (above|after|further))"
    for text in markdown(notebook):
        assert not re.search(by_place, text), re.search(by_place, text)[0]
        assert not re.search("[●○]", text), "difficulty is said in words"
    assert not any("inspect.getsource(" in c.source for c in code(notebook))
    assert all(len(wrong) >= 3 for _, _, _, wrong in exercises(name))
    assert number_of(name) not in SHORT or len(notebook.cells) <= 65


@notebooks
def test_pictures_have_alternative_texts(name):
    """A sentence for each picture in an output, where its readers look, and for each picture in the text."""
    for cell in code(committed(name)):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                alt = cell.metadata.get("alt", "")
                assert len(alt.split()) >= 5 and alt.endswith("."), f"no alt=\"…\" above {cell.source}"
                assert output.metadata["image/png"]["alt"] == output.data["text/plain"] == alt, "make notebooks"
    for text in markdown(committed(name)):
        assert all(len(alt.split()) >= 3 for alt in re.findall(r"!\[(.*?)\]\(", text))
        assert all(re.search(r'alt="[^"]{10,}"', tag) for tag in re.findall(r"<img.*?>", text, re.DOTALL))


def test_alternative_texts_are_written():
    """build.describe: for pictures alone, only where a cell has one; a page that nbconvert makes of them has it."""
    data = {"image/png": "AA==", "text/plain": "<Figure>"}
    cells = [nbformat.v4.new_code_cell(metadata=metadata, outputs=[nbformat.v4.new_output("display_data", data),
                                                                   nbformat.v4.new_output("stream", text="x")])
             for metadata in ({"alt": "A line goes up."}, {})]
    notebook = build.describe(nbformat.v4.new_notebook(cells=cells))
    with_alt, without = notebook.cells
    assert with_alt.outputs[0].metadata == {"image/png": {"alt": "A line goes up."}}
    assert with_alt.outputs[0].data["text/plain"] == "A line goes up." and with_alt.outputs[1].text == "x"
    assert without.outputs[0].metadata == {} and without.outputs[0].data["text/plain"] == "<Figure>"
    page, _ = nbconvert.HTMLExporter(template_name="classic").from_notebook_node(notebook)
    assert re.findall(r'<img[^>]*alt="(.*?)"', page)[0] == "A line goes up."


def claims():
    """{number of a notebook: [(words, held by), ...]} of claims.md."""
    parts = re.split(r"^## Notebook (\S+)$", (ROOT / "tests" / "claims.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    rows = {number: [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
            for number, text in zip(parts[1::2], parts[2::2])}
    return {number: found[2:] for number, found in rows.items()}           # without the head of the table


def test_claims_has_a_heading_for_each_notebook():
    assert list(claims()) == NUMBERS


@notebooks
def test_claims_are_held(name):
    """The words stand in the notebook, and what holds them is there and asserts something."""
    notebook, rows = committed(name), claims()[number_of(name)]
    text = " ".join(" ".join(markdown(notebook)).split())
    assert rows
    for words, holder in rows:
        assert " ".join(words.split()) in text, f"not in the text: {words}"
        holder = holder.strip("`")
        if found := re.fullmatch(r"(tests/\w+\.py)::(\w+)", holder):
            assert re.search(rf"^def {found[2]}\(", (ROOT / found[1]).read_text(encoding="utf-8"), re.MULTILINE), holder
        elif not re.fullmatch(r"https?://\S+", holder):
            held = [c for c in code(notebook) if c.source.splitlines()[0].strip() == holder]
            assert any(re.search(r"\bassert|\bsame\(", c.source) for c in held), f"no cell with an assert begins with {holder}"


@notebooks
def test_shown_code_is_the_code(name):
    """What `show` printed still stands in the file to which its link leads; otherwise: make notebooks."""
    for cell in code(committed(name)):
        outputs = [output.get("data", {}) for output in cell.outputs]
        for link, listing in zip(outputs, outputs[1:]):
            found = re.fullmatch(r"\[(\S+), lines \d+ to \d+\]\(\S+\)", link.get("text/markdown", ""))
            if found:
                lines = [line.strip() for line in listing["text/plain"].splitlines()]
                file = [line.strip() for line in (ROOT / found[1]).read_text(encoding="utf-8").splitlines()]
                assert any(file[i:i + len(lines)] == lines for i in range(len(file))), (found[0], "make notebooks")


@notebooks
def test_defines_nothing_that_the_modules_define(name):
    taken = {node.name for path in MODULES for node in ast.parse(path.read_text(encoding="utf-8")).body
             if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for cell in code(committed(name)):
        text = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!")))
        defined = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert not defined & taken, cell.source


def test_all_are_there_and_small():
    """One for each number, each with its row and its picture in the README."""
    assert set(map(number_of, build.NAMES)) <= set(NUMBERS) and len(build.NAMES) == len(set(map(number_of, build.NAMES)))
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(build.NAMES)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in build.NAMES:
        assert f"(notebooks/{name}.ipynb)" in readme and f"notebooks/pictures/{name}.png" in readme
        assert build.cover(committed(name)) == (ROOT / "notebooks" / "pictures" / f"{name}.png").read_bytes()
    assert sum((ROOT / "notebooks" / f"{name}.ipynb").stat().st_size for name in build.NAMES) < 12e6
    assert sum(len(exercises(name)) for name in build.NAMES) >= 25


# ---- lesson.py ----

SAME = [                                                   # (found, expected, tolerance, message or None)
    ([1, 2], torch.tensor([1, 2]), 0, None),
    ((1, 2), [1, 2], 0, None),
    (torch.tensor([1.0, 2.0]), torch.tensor([1, 2], dtype=torch.int32), 0, None),
    (np.array([True, False]), torch.tensor([True, False]), 0, None),
    (torch.tensor([[1, 0]]), torch.tensor([[True, False]]), 0, None),
    ([torch.tensor(1.0), 2], [1.0, 2.0], 0, None),
    ([torch.ones(2), torch.ones(2)], torch.ones(2, 2, dtype=torch.bfloat16), 0, None),
    (np.float32(3), 3, 0, None),
    (torch.tensor([3]), 3, 0, None),
    (range(3), [0, 1, 2], 0, None),
    (math.inf, math.inf, 0, None),
    ([math.nan], [math.nan], 0, None),
    (torch.ones(2, requires_grad=True), [1, 1], 0, None),
    (("a", ["b"]), ["a", ("b",)], 0, None),
    ({"x": (1, 2)}, {"x": torch.tensor([1, 2])}, 0, None),
    (None, None, 0, None),
    (1.0 + 1e-7, 1.0, 1e-6, None),
    (1000.0005, 1000.0, 1e-6, None),
    (None, 3, 0, "case: nothing came (None), expected 3"),
    (..., [1, 2], 0, "case: nothing came (None), expected [1, 2]"),
    (4, 3, 0, "case: came 4, expected 3"),
    (1.001, 1.0, 1e-6, "case: came 1.001, expected 1"),
    ([1, 3], [1, 2], 0, "case: came [1, 3], expected [1, 2]"),
    ([[1, 2], [3, 5]], [[1, 2], [3, 4]], 0, "case: came [[1, 2], [3, 5]], expected [[1, 2], [3, 4]]"),
    ([1, 2, 3], [1, 2], 0, "case: came [1, 2, 3], expected [1, 2]"),
    (torch.zeros(3, 4), torch.zeros(4, 4), 0, "case: came a shape of (3, 4), expected a shape of (4, 4)"),
    ([0] * 20, torch.zeros(21), 0, "case: came 20 numbers, expected 21 numbers"),
    (torch.arange(100), torch.arange(100).clamp(max=97), 0, "case: at [98] came 98, expected 97 (2 of 100 differ)"),
    (torch.eye(4), torch.tril(torch.ones(4, 4)), 0, "case: at [1, 0] came 0, expected 1 (6 of 16 differ)"),
    (1 + 2.0 ** -30, 1.0, 1e-12, "case: came 1.0000000009313226, expected 1"),
    ([math.nan], [1.0], 0, "case: came nan, expected 1"),
    (math.inf, 1.0, 1e9, "case: came inf, expected 1"),
    ("ab", "abc", 0, "case: came 'ab', expected 'abc'"),
    ("ab", 3, 0, "case: came 'ab', expected 3"),
    ([[1], [2, 3]], [1, 2], 0, "case: came [[1], [2, 3]], expected [1, 2]"),
    ({"x": 1}, {"y": 1}, 0, "case: came the keys ['x'], expected ['y']"),
    ({"x": 1, "y": 2}, {"x": 1, "y": 3}, 0, "case: entry 'y': came 2, expected 3"),
]


@pytest.mark.parametrize("found, expected, tolerance, message", SAME)
def test_same(found, expected, tolerance, message):
    """Right answers in every form pass; of others one line says what came, what was expected and where."""
    if message is None:
        lesson.same(found, expected, "case", tolerance)
    else:
        with pytest.raises(AssertionError) as error:
            lesson.same(found, expected, "case", tolerance)
        assert str(error.value) == message


def test_exercise_says_in_one_line_what_is_wrong(capsys):
    with lesson.exercise("9.1"):
        lesson.same(3, 3)
    with lesson.exercise("9.2"):
        lesson.same(torch.zeros(100), torch.ones(100), "T = 5")
    with lesson.exercise("9.3"):
        raise TypeError("unsupported\noperand " + "x" * 9999)
    with lesson.exercise("9.4"):
        raise ValueError("x" * 9999)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["exercise 9.1: right",
                         "exercise 9.2: not yet. T = 5: at [0] came 0, expected 1 (100 of 100 differ)",
                         "exercise 9.3: not yet. TypeError: unsupported"]
    assert len(lines) == 4 and len(lines[3]) < 400
    assert [lesson.results[f"9.{n}"] for n in (1, 2, 3, 4)] == [True, False, False, False]


def test_show_links_to_the_lines(monkeypatch):
    """The link is relative, and its lines are the ones that are shown, of a decorated method too."""
    shown = []
    monkeypatch.setattr(lesson, "display", lambda *objects: shown.extend(objects))
    lesson.show(neo.Attention, neo.Block.forward, neo.GPTNeoForCausalLM.forward)
    for link, text in zip(shown[::2], shown[1::2]):
        name, first, last, path = re.fullmatch(r"\[(\S+), lines (\d+) to (\d+)\]\((\S+?)#L\2-L\3\)", link.data).groups()
        assert (name, path) == ("neo.py", "../neo.py")
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()[int(first) - 1:int(last)]
        assert textwrap.dedent("\n".join(lines)) == text.data
    assert "font-family: monospace" in shown[1]._repr_html_() and "<style" not in shown[1]._repr_html_()
    assert shown[1].data.startswith("class Attention(") and shown[3].data.startswith("def forward(")


def test_side_by_side(monkeypatch):
    """Each column is the class as it is in its file, without comments; lines that differ are marked by sign and colour."""
    shown = []
    monkeypatch.setattr(lesson, "display", shown.append)
    lesson.side_by_side((neo.Attention, neox.Attention), (neo.Block, neox.Block))
    rows = [[(html.unescape(words), colour) for colour, words in re.findall(r"background-color: (\S+)\">(.*?)</pre>", row)]
            for row in re.findall(r"<tr>(<td.*?)</tr>", shown[0].data)]
    for column, module in ((0, neo), (1, neox)):
        assert [row[column][0][2:] for row in rows if row[column][0]] == [
            *lesson.bare(module.Attention), *lesson.bare(module.Block)]
    for (left, left_colour), (right, right_colour) in rows:
        if left.startswith("  "):
            assert left == right and left_colour == right_colour == "#ffffff"
        else:
            assert left[:2] in ("", "− ") and right[:2] in ("", "+ ") and left_colour != right_colour
    text = "\n".join(lesson.bare(neox.Attention))
    assert "qkv_proj" in text and "#" not in text and '"""' not in text and 20 < len(rows) < 60


# ---- sliders ----

@pytest.fixture
def as_before():
    """A notebook may switch off gradients or take one thread; the tests after it shall not."""
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    yield
    torch.set_grad_enabled(gradients)
    torch.set_num_threads(threads)
    matplotlib.pyplot.close("all")


def needed_cells(cells, last):
    """The cells, in order, that define what the last one uses, found by the names that each loads and stores."""
    def names(cell, kind):
        text = "\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!")))
        nodes = list(ast.walk(ast.parse(text)))
        found = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, kind)}
        if kind is ast.Store:
            found |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            found |= {(alias.asname or alias.name).split(".")[0] for node in nodes
                      if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        return found
    kept, wanted = [cells[last]], names(cells[last], ast.Load)
    for cell in reversed(cells[:last]):
        stored = names(cell, ast.Store)
        if stored & (wanted | {"*"}):
            kept, wanted = [cell, *kept], wanted | names(cell, ast.Load)
    return kept


@pytest.mark.parametrize("name, function", [pytest.param(*key, marks=pytest.mark.slow if key in SLOW_SLIDERS else ())
                                            for key in SLIDERS])
def test_sliders(name, function, monkeypatch, capsys, as_before):
    """Moved to three positions, each draws or prints what belongs to its position."""
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setattr(ipywidgets, "interact", lambda *a, **how: a[0] if a else lambda f: f)
    cells, space = code(build.read(name)), {"__name__": "__main__", "display": print}
    slider = next(i for i, c in enumerate(cells) if build.tagged(c, "interactive") and f"def {function}(" in c.source)
    for cell in needed_cells(cells, slider):
        run("\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!"))), name, space)
    assert len(SLIDERS[name, function]) >= 3
    for arguments, seen in SLIDERS[name, function]:
        matplotlib.pyplot.close("all")
        capsys.readouterr()
        space[function](**arguments)
        axes = [a for n in matplotlib.pyplot.get_fignums() for a in matplotlib.pyplot.figure(n).axes]
        texts = [t.get_text() for a in axes for t in a.findobj(matplotlib.text.Text)]
        texts += [t.get_text() for n in matplotlib.pyplot.get_fignums() for t in matplotlib.pyplot.figure(n).texts]
        texts.append(capsys.readouterr().out)
        for what in seen:
            assert what(axes) if callable(what) else any(what in text for text in texts), (arguments, what, texts)


def test_no_slider_is_forgotten():
    """Each cell tagged "interactive" defines a function of the table."""
    defined = {(name, function) for name in build.NAMES for c in code(build.read(name))
               if build.tagged(c, "interactive") for function in re.findall(r"^def (\w+)\(", c.source, re.MULTILINE)}
    assert defined <= set(SLIDERS)


# ---- all cells, executed ----

@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (i % 3 > 0)) for i, name in enumerate(build.NAMES)])
def test_runs_from_top_to_bottom(name):
    """In Jupyter, in at most 180 seconds of one core, whatever else runs.  Of three notebooks two are `long`, because
    test_exercises runs all their cells too, without Jupyter."""
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])    # noqa: E731
    before = used()
    build.execute(build.read(name))
    print(f"{name}: {used() - before:.0f} s of one core")
    assert 1 < used() - before <= 180


def as_list(x):
    return x.tolist() if isinstance(x, (torch.Tensor, np.ndarray)) else list(map(as_list, x)) if isinstance(x, tuple) else x


def as_tensor(x):
    """float64, whatever the solution's dtype."""
    return torch.as_tensor(x, dtype=torch.float64) if lesson.numbers(x) is not None else x


def as_numpy(x):
    return lesson.numbers(x).numpy() if lesson.numbers(x) is not None else x


FORMS = [as_list, as_tensor, as_numpy]
# Exercises whose answer the check computes with, so that its form is a part of the question.
FORM_MATTERS = set()


def wrap_functions(text, form, space):
    """What the functions of an answer return, or each entry of it if it is a dict, comes in another form."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            answer = space[node.name]
            if not isinstance(answer, types.FunctionType):             # a Triton kernel returns nothing
                continue
            space[node.name] = lambda *a, _answer=answer, **how: (
                {key: form(value) for key, value in found.items()}
                if isinstance(found := _answer(*a, **how), dict) else form(found))


@pytest.mark.slow
@notebooks
def test_exercises(name, monkeypatch, as_before):
    """Each stub and each wrong answer is rejected, each solution accepted, in every form in which it may come."""
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
            for form in FORMS if number not in FORM_MATTERS else ():
                run(solution(text), f"{name} answer {number}", space)
                wrap_functions(solution(text), form, space)
                run(check.source, f"{name} check {number}", space)
                assert lesson.results[number], f"exercise {number} refuses a right answer as {form.__name__}"
        elif not build.tagged(cell, "stub"):
            text = "\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!")))
            run(text, name, space)
    assert done == len(parts)
