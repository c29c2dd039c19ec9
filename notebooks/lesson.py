"""What every notebook shares besides its pictures: checked exercises, code shown with its place, official checkpoints."""

import ast
import contextlib
import html
import inspect
import itertools
import os
import socket
import textwrap
from difflib import SequenceMatcher
from pathlib import Path

import torch
from IPython.display import HTML, Code, Markdown, display
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

HERE = Path(__file__).resolve().parent
results = {}                                               # exercise -> was the answer right?


class Listing(Code):
    """Python source whose colours and letters of one width stand in each element.

    Pages that keep no style sheet of an output, such as a notebook that JupyterLab does not trust, show them too.
    """

    def _repr_html_(self):
        return highlight(self.data, PythonLexer(), HtmlFormatter(noclasses=True, nobackground=True, prestyles=(
            "font-family: monospace; line-height: 1.3; color: #000000; background-color: #f8f8f8; padding: 8px")))

    def _repr_latex_(self):
        return None


def show(*objects):
    """Show the source of classes, functions or methods of the project, each below a link to its lines."""
    for shown in objects:
        shown = inspect.unwrap(getattr(shown, "fn", shown))    # a Triton kernel and decorators wrap it
        lines, first = inspect.getsourcelines(shown)
        path = Path(inspect.getsourcefile(shown)).resolve()
        first, name = max(first, 1), path.relative_to(HERE.parent).as_posix()
        last = first + len(lines) - 1
        link = Path(os.path.relpath(path, HERE)).as_posix()
        display(Markdown(f"[{name}, lines {first} to {last}]({link}#L{first}-L{last})"),
                Listing(textwrap.dedent("".join(lines)).rstrip(), language="python"))


def bare(shown):
    """The lines of a class or function without docstrings, comments and empty lines."""
    lines = textwrap.dedent(inspect.getsource(shown)).splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            text = node.body[0]
            lines[text.lineno - 1:text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    lines = [line if "#" not in line else line[:line.index("#")] for line in lines]
    return [line.rstrip() for line in lines if line.strip()]


def side_by_side(*pairs):
    """A table of two columns: for each pair (old, new) its lines, with − and red or + and green where they differ."""
    def cell(line, sign, colour):
        words = html.escape(f"{sign} {line}") if line else ""
        return (f'<td style="text-align: left; padding: 0 6px; background-color: {colour}; color: #000000">'
                f'<pre style="margin: 0; font-size: 11px; color: #000000; background-color: {colour}">{words}</pre></td>')
    rows = []
    for old, new in pairs:
        old, new = bare(old), bare(new)
        for kind, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            for left, right in itertools.zip_longest(old[i:j], new[k:m], fillvalue=""):
                equal = kind == "equal"
                rows.append("<tr>" + cell(left, " " if equal else "−", "#ffffff" if equal or not left else "#ffd7d5")
                            + cell(right, " " if equal else "+", "#ffffff" if equal or not right else "#ccffd8") + "</tr>")
    names = [Path(inspect.getsourcefile(shown)).name for shown in pairs[0]]
    head = "".join(f'<th style="text-align: left">{name}</th>' for name in names)
    display(HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"))


# ---- exercises ----

@contextlib.contextmanager
def exercise(name):
    """Run a check: say in one line whether the answer above is right, and let the notebook go on either way."""
    results[name] = False
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["an assertion of the check does not hold"])[0]
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        print(f"exercise {name}: not yet. {kind}{shortened(reason)}")
    else:
        results[name] = True
        print(f"exercise {name}: right")


def same(found, expected, case="", tolerance=0.0):
    """Assert that an answer has the expected values, in whatever form it comes: list, tuple, tensor, numpy, number.

    Numbers may differ by `tolerance` times the larger of 1 and the expected size.  One number may come as a tensor
    with one element; other shapes must agree.  Of a dict, the first entry that differs is named; text and other
    objects are compared by ==.  The AssertionError says in one line what came, what was expected and where.
    """
    where = f"{case}: " if case else ""
    if found is None or found is ...:
        assert expected is None, f"{where}nothing came (None), expected {spelled(expected)}"
        return
    if isinstance(expected, dict):
        assert isinstance(found, dict), f"{where}came {spelled(found)}, expected a dict"
        assert found.keys() == expected.keys(), (
            f"{where}came the keys {spelled(list(found))}, expected {spelled(list(expected))}")
        for key, value in expected.items():
            same(found[key], value, f"{where}entry {key!r}", tolerance)
        return
    came, wanted = numbers(found), numbers(expected)
    if wanted is None or came is None:
        equal = as_list(found) == as_list(expected)
        assert equal, f"{where}came {spelled(found)}, expected {spelled(expected)}"
        return
    if wanted.numel() == came.numel() == 1:
        came, wanted = came.reshape(()), wanted.reshape(())
    if came.shape != wanted.shape:
        raise AssertionError(f"{where}came {spelled(found, came)}, expected {spelled(expected, wanted)}")
    differ = ~torch.isclose(came, wanted, rtol=0, atol=0, equal_nan=True)
    differ &= ~((came - wanted).abs() <= tolerance * wanted.abs().clamp(min=1))
    if not differ.any():
        return
    count = ""
    if wanted.numel() > 8:                                 # the first that differs stands for all
        place = differ.nonzero()[0].tolist()
        where, count = f"{where}at {place} ", f" ({int(differ.sum())} of {wanted.numel()} differ)"
        came, wanted = came[tuple(place)], wanted[tuple(place)]
    digits = 6 if spelled(found, came) != spelled(expected, wanted) else 17
    raise AssertionError(f"{where}came {spelled(found, came, digits)}, "
                         f"expected {spelled(expected, wanted, digits)}{count}")


def as_list(value):
    """Tuples, ranges and tensors as lists, all the way down, so that == does not ask for the form."""
    if isinstance(value, torch.Tensor) or hasattr(value, "dtype"):
        return value.tolist()
    return [as_list(v) for v in value] if isinstance(value, (list, tuple, range)) else value


def numbers(value):
    """The numbers of an answer as a float64 tensor, or None if it is no number, list, tuple or tensor of numbers."""
    try:
        if isinstance(value, (list, tuple, range)):
            rows = [numbers(v) for v in value]
            return torch.stack(rows) if rows else torch.empty(0, dtype=torch.float64)
        return torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):          # text, ragged lists, complex numbers
        return None


def number(value, digits=6):
    """Of a 0-dim float64 tensor: 3.0 -> "3", 0.123456789 -> "0.123457"."""
    value = value.item()
    return str(int(value)) if abs(value) < 1e15 and value == int(value) else f"{value:.{digits}g}"


def spelled(value, tensor=None, digits=6):
    """A value in at most one short line; of many numbers the shape alone."""
    tensor = numbers(value) if tensor is None else tensor
    if tensor is None:
        return shortened(repr(value), 80)
    if tensor.dim() == 0:
        return number(tensor, digits)
    if tensor.numel() <= 8:
        inside = [spelled(row, row, digits) for row in tensor]
        return f"[{', '.join(inside)}]"
    return f"{len(tensor)} numbers" if tensor.dim() == 1 else f"a shape of {tuple(tensor.shape)}"


def shortened(text, most=300):
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most - 1]}…"


# ---- official checkpoints ----

def official(name, revision=None, **how):
    """(model, tokenizer) of a checkpoint on the hub, or None where it cannot be had right now."""
    from load_weights import AutoModelForCausalLM, AutoTokenizer
    with contextlib.suppress(OSError):
        socket.create_connection(("huggingface.co", 443), timeout=2).close()
        return (AutoModelForCausalLM.from_pretrained(name, revision=revision, **how),
                AutoTokenizer.from_pretrained(name, revision=revision))
    print(f"{name}: skipped, no network")
    return None
