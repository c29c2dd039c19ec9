"""Sources in, executed notebooks out.

    python notebooks/build.py                  every notebook
    python notebooks/build.py 1_gpt_neo        one

A source is a percent script (jupytext) in notebooks/source/.  Cells tagged "wrong" are wrong answers to an
exercise, for the tests; they do not go into the notebook.  A cell tagged "interactive" keeps no output: it
holds a slider, which a page cannot show; here its function is called once, without the widget, whose
messages now and then leave nbclient waiting for ever.  The picture of the cell tagged "cover" also goes to
notebooks/pictures/, for the README.  A cell whose output is a picture says in `alt="..."` on its percent line
what there is to see; `describe` puts this where readers look.  All code runs from top to bottom in a fresh
kernel, in notebooks/.
"""

import base64
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in (HERE / "source").glob("*.py"))


# Runs before the first cell, and is taken out again.
WITHOUT_WIDGETS = """
import ipywidgets
def interact(*function, **ranges):
    import inspect                                         # the notebook's own names stay untouched
    def call(f):
        kept = {name: p.default for name, p in inspect.signature(f).parameters.items() if p.default is not p.empty}
        f(**{name: values[0] for name, values in ranges.items() if name not in kept})
        return f
    return call(*function) if function else call
ipywidgets.interact = interact
del ipywidgets, interact
"""


def tagged(cell, tag):
    return tag in cell.metadata.get("tags", [])


def read(name):
    """The notebook of a source, without wrong answers and without outputs."""
    notebook = jupytext.read(HERE / "source" / f"{name}.py")
    notebook.cells = [cell for cell in notebook.cells if not tagged(cell, "wrong")]
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"{name.split('_')[0]}-{i}"           # the same at each build: small diffs
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}})
    return notebook


def execute(notebook):
    """Run it; an error in a cell raises CellExecutionError."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(WITHOUT_WIDGETS))
    NotebookClient(notebook, timeout=240, kernel_name="python3", record_timing=False, coalesce_streams=True,
                   resources={"metadata": {"path": str(HERE)}}).execute()
    del notebook.cells[0]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count -= 1
            for output in cell.outputs:
                if output.get("execution_count"):
                    output.execution_count -= 1
        if tagged(cell, "interactive"):
            cell.outputs = []
    notebook.metadata.pop("widgets", None)
    return notebook


def describe(notebook):
    """Give each picture among the outputs the alternative text of its cell.

    nbconvert's classic pages take it from metadata["image/png"]["alt"], where IPython.display.Image(alt=...)
    puts it too; VS Code and readers without pictures take text/plain.  JupyterLab 4.6 and the lab pages of
    nbconvert 7.17 give a PNG output no alternative text, whatever its metadata say.
    """
    for cell in notebook.cells:
        alt = cell.metadata.get("alt")
        for output in cell.get("outputs", []) if alt else []:
            if "image/png" in output.get("data", {}):
                output.data["text/plain"] = alt
                output.metadata.setdefault("image/png", {})["alt"] = alt
    return notebook


def cover(notebook):
    """The bytes of the picture that stands for the notebook."""
    return next(base64.b64decode(output.data["image/png"]) for cell in notebook.cells if tagged(cell, "cover")
                for output in cell.outputs if "image/png" in output.get("data", {}))


def main(names):
    for name in names or NAMES:
        start = time.perf_counter()
        notebook = describe(execute(read(name)))
        target = HERE / f"{name}.ipynb"
        nbformat.write(notebook, target)
        (HERE / "pictures").mkdir(exist_ok=True)
        (HERE / "pictures" / f"{name}.png").write_bytes(cover(notebook))
        print(f"{name}: {len(notebook.cells)} cells, {time.perf_counter() - start:.0f} s, "
              f"{target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
